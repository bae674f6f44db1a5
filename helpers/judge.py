"""The judges: each is two small classifiers that name the style, and the thing, of an image.

There are two, which share no weight, no architecture and no training image: ``load_judge`` says
what the tables count, and ``load_second_judge`` is its witness. The first has seen images of the
base model, as in the papers; the second real drawings alone.
"""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import shufflenet_v2_x0_5

from helpers.checked import load_tensors, require_finite, save_tensors
from helpers.concepts import DATA
from helpers.files import shown
from helpers.identity import module_digest, verify_manifest

WEIGHTS = DATA / "judge" / "judge.safetensors"
SECOND = DATA / "judge" / "second.safetensors"
BLANK = "blank"  # an image that shows nothing
ELSE = "something else"  # one that shows what the world has no name for
NO_CONCEPT = (BLANK, ELSE)


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


class Witness(nn.Module):
    """ShuffleNet V2 at half width, on images of 64x64: the second judge's classifier.

    Its first layer keeps the size, and nothing is pooled before the blocks: at 64 pixels little
    would be left. Source: Ma et al., ShuffleNet V2; torchvision's implementation.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.network = shufflenet_v2_x0_5(num_classes=classes)
        self.network.maxpool = nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, features)."""
        net, x = self.network, self.network.conv1(images * 2 - 1)
        x = net.conv5(net.stage4(net.stage3(net.stage2(x))))
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> logits (n, classes)."""
        return self.network.fc(self.features(images))


ARCHITECTURES = {"convolutions": Classifier, "shufflenet": Witness}


@dataclass
class Judge:
    """Two classifiers and the names of their classes.

    Each has a class ``"blank"`` for images that show nothing, and one ``"something else"`` for
    images that show what it has no name for. temperature: of each classifier's softmax, fitted on
    drawings that it was not trained on.
    """

    style: nn.Module
    thing: nn.Module
    style_names: list[str]
    thing_names: list[str]
    temperature: dict[str, float] = field(default_factory=lambda: {"style": 1.0, "thing": 1.0})

    def _part(self, concept: str) -> tuple[nn.Module, list[str]]:
        """The classifier that knows a concept, and its classes. ValueError if neither does."""
        for network, names in ((self.style, self.style_names), (self.thing, self.thing_names)):
            if concept in names and concept not in NO_CONCEPT:
                return network, names
        raise ValueError(
            f"the judge does not know {concept!r}: it knows the styles {self.style_names} "
            f"and {self.thing_names}"
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor, kind: str) -> Tensor:
        """Class probabilities: (n, 3, H, W) in [0, 1] -> (n, classes).

        softmax(logits / temperature); kind: "style" or "thing". An image that is not finite is
        blank for certain; ValueError where the judge has no such class.
        """
        network = {"style": self.style, "thing": self.thing}[kind]
        names = {"style": self.style_names, "thing": self.thing_names}[kind]
        images = images.float().cpu()
        sound = images.isfinite().flatten(1).all(1)
        parts = torch.where(sound[:, None, None, None], images, 1.0).split(256)
        found = torch.cat([(network(x) / self.temperature[kind]).softmax(1) for x in parts])
        if not sound.all():
            if BLANK not in names:
                raise ValueError(
                    f"{int((~sound).sum())} of {len(sound)} images hold NaN or infinity, and this "
                    "judge has no class for what shows nothing: leave them out"
                )
            found[~sound] = F.one_hot(torch.tensor(names.index(BLANK)), len(names)).float()
        return found

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
        """The style that the judge gives to each image, ``"blank"`` or ``"something else"``."""
        return [self.style_names[i] for i in self.probabilities(images, "style").argmax(1)]

    def things(self, images: Tensor) -> list[str]:
        """The object or person of each image, ``"blank"`` or ``"something else"``."""
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
            rounded = value.half() if value.is_floating_point() else value
            tensors[f"{kind}.{name}"] = rounded.contiguous()
    architectures = {kind: name for name, kind in ARCHITECTURES.items()}
    names = {
        "style": json.dumps(judge.style_names), "thing": json.dumps(judge.thing_names),
        "temperature": json.dumps(judge.temperature),
        "architecture": architectures[type(judge.style)],
    }  # fmt: skip
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
    try:
        return judge_of(tensors, metadata)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{shown(path)} holds no judge ({error}): {remedy}") from error


def judge_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Judge:
    """A judge from what its file holds. KeyError, TypeError, ValueError, RuntimeError if none."""
    names = {kind: json.loads(metadata[kind]) for kind in ("style", "thing")}
    networks, build = {}, ARCHITECTURES[metadata.get("architecture", "convolutions")]
    for kind, classes in names.items():
        network, prefix = build(len(classes)), f"{kind}."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        networks[kind] = network.eval().requires_grad_(False)
    temperature = json.loads(metadata.get("temperature", '{"style": 1, "thing": 1}'))
    if any(not 0 < float(temperature[kind]) < math.inf for kind in names):
        raise ValueError(f"a temperature of {temperature}")
    return Judge(networks["style"], networks["thing"], names["style"], names["thing"], temperature)


def load_second_judge() -> Judge:
    """The witness beside the judge: another architecture and seed, trained on real drawings only.

    It has never seen an image of the model. Errors as ``load_judge``.
    """
    return load_judge(SECOND)
