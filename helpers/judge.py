"""The judge: two small classifiers that name the style, and the object or person, of an image."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.checked import load_tensors, require_finite, save_tensors
from helpers.concepts import DATA
from helpers.files import shown
from helpers.identity import module_digest, verify_manifest

WEIGHTS = DATA / "judge" / "judge.safetensors"
BLANK = "blank"


class Classifier(nn.Module):
    """A small convolutional network for 64x64 images.

    Four stages that halve the size, mean and maximum over places, one linear layer. It uses group
    normalisation, so that an image's verdict does not depend on the other images of the batch.
    """

    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
            )
            for a, b in itertools.pairwise(sizes)
        )  # fmt: skip
        self.head = nn.Linear(2 * sizes[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, features)."""
        x = images * 2 - 1
        for stage in self.stages:
            x = stage(x)  # (n, channels, H / 2, W / 2)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> logits (n, classes)."""
        return self.head(F.dropout(self.features(images), 0.2, self.training))


@dataclass
class Judge:
    """Two classifiers and the names of their classes.

    Each has a class ``"blank"`` for images that show nothing.
    """

    style: Classifier
    thing: Classifier
    style_names: list[str]
    thing_names: list[str]

    def _part(self, concept: str) -> tuple[Classifier, list[str]]:
        """The classifier that knows a concept, and its classes. ValueError if neither does."""
        for network, names in ((self.style, self.style_names), (self.thing, self.thing_names)):
            if concept in names and concept != BLANK:
                return network, names
        raise ValueError(
            f"the judge does not know {concept!r}: it knows the styles {self.style_names} "
            f"and {self.thing_names}"
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor, kind: str) -> Tensor:
        """Class probabilities: (n, 3, H, W) in [0, 1] -> (n, classes).

        kind: "style" or "thing".
        """
        network = {"style": self.style, "thing": self.thing}[kind]
        return torch.cat([network(part).softmax(1) for part in images.float().cpu().split(256)])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Both classifiers' features, for FID: (n, 3, H, W) in [0, 1] -> (n, features)."""
        return torch.cat(
            [
                torch.cat([self.style.features(part), self.thing.features(part)], 1)
                for part in images.float().cpu().split(256)
            ]
        )

    def fingerprint(self) -> str:
        """A short digest of both classifiers' weights, which results carry to name their judge."""
        return module_digest(self.style, self.thing, rounded=False)

    def styles(self, images: Tensor) -> list[str]:
        """The style that the judge gives to each image, or ``"blank"``."""
        return [self.style_names[i] for i in self.probabilities(images, "style").argmax(1)]

    def things(self, images: Tensor) -> list[str]:
        """The object or person that the judge gives to each image, or ``"blank"``."""
        return [self.thing_names[i] for i in self.probabilities(images, "thing").argmax(1)]

    def gives(self, images: Tensor, concept: str) -> Tensor:
        """Whether the judge gives each image to ``concept``: bool (n,).

        ValueError for an unknown concept.
        """
        network, names = self._part(concept)
        kind = "style" if network is self.style else "thing"
        return self.probabilities(images, kind).argmax(1) == names.index(concept)


def save_judge(judge: Judge, path: Path = WEIGHTS) -> None:
    """Write both networks' weights to one safetensors file, with their classes in its metadata.

    Weights are rounded to fp16. The file is written under a temporary name and then renamed.
    """
    tensors = {}
    for kind, network in (("style", judge.style), ("thing", judge.thing)):
        for name, value in network.state_dict().items():
            tensors[f"{kind}.{name}"] = value.half().contiguous()
    names = {"style": json.dumps(judge.style_names), "thing": json.dumps(judge.thing_names)}
    save_tensors(path, tensors, names)


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Read what ``save_judge`` wrote, in eval mode; the shipped one is compared with its manifest.

    FileNotFoundError, which says what to do, when the file is missing; ValueError when it is
    damaged or holds no judge.
    """
    remedy = "run `git checkout -- data/judge`"
    tensors, metadata = load_tensors(path, "file of the judge's weights", remedy)
    if Path(path).is_relative_to(DATA):
        verify_manifest(Path(path).parent, [Path(path).name])
    require_finite(tensors, path, remedy)
    networks, names = {}, {}
    try:
        for kind in ("style", "thing"):
            names[kind] = json.loads(metadata[kind])
            network, prefix = Classifier(len(names[kind])), f"{kind}."
            network.load_state_dict(
                {
                    k.removeprefix(prefix): v.float()
                    for k, v in tensors.items()
                    if k.startswith(prefix)
                }
            )
            networks[kind] = network.eval().requires_grad_(False)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{shown(path)} holds no judge ({error}): {remedy}") from error
    return Judge(networks["style"], networks["thing"], names["style"], names["thing"])
