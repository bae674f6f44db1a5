"""The judge of Stable Diffusion's images, as in SepME: two of torchvision's ResNets.

Objects: ResNet50 with its 1000 ImageNet classes. Styles: ResNet18 with a new last layer. Only this
layer is trained, on images that the base model samples for each artist's name and for the empty
prompt. People have no judge: neither network knows a face.

Departures from the release (audit S25): images are resized to 256 pixels and normalised as in the
training of both networks, batch statistics stay frozen, and the last epoch is kept, not the one
that is best on the test images.
"""

import json
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.checked import load_tensors, require_finite, save_tensors
from helpers.files import shown
from helpers.judge import Judge

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which both networks expect
IMAGENET = {  # SepME's nine objects (``world.objects``) -> ImageNet's numbers
    "chain saw": 491, "church": 497, "gas pump": 571, "tench": 0, "garbage truck": 569,
    "English springer": 217, "golf ball": 574, "parachute": 701, "French horn": 566,
}  # fmt: skip


class Resnet(nn.Module):
    """A torchvision ResNet with the two methods of ``judge.Classifier``."""

    def __init__(self, network: nn.Module, head: nn.Linear | None = None, size: int = 256):
        super().__init__()
        self.size, self.head, self.body = size, head or network.fc, network
        self.body.fc = nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, features)."""
        x = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        return self.body((x - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> logits (n, classes)."""
        return self.head(self.features(images))


def pretrained(name: str) -> nn.Module:
    """torchvision's network of this name ("resnet18", "resnet50") with ImageNet's weights.

    OSError, which says what to do, when the weights cannot be fetched.
    """
    try:
        return getattr(torchvision.models, name)(weights="IMAGENET1K_V1")
    except OSError as error:  # urllib's errors are of this kind
        raise OSError(
            f"the weights of {name} are neither cached here nor reachable: "
            "go online once (torchvision fetches them)"
        ) from error


def style_features(images: dict[str, Tensor]) -> list[Tensor]:
    """ResNet18's features of each style's images, (n, 3, H, W) in 0 ... 255: one (n, 512) a style.

    The body is frozen, so each image passes through it only once.
    """
    network = Resnet(pretrained("resnet18")).eval().requires_grad_(False)
    with torch.no_grad():
        return [
            torch.cat([network.features(part / 255) for part in some.split(64)])
            for some in images.values()
        ]


def labelled(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of each class -> all features (n, width) and the number of each one's class (n,)."""
    numbers = [torch.full((len(x),), i) for i, x in enumerate(features)]
    return torch.cat(features), torch.cat(numbers)


def train_styles(
    images: dict[str, Tensor], path: str | Path, *,
    epochs: int = 20, batch: int = 30, lr: float = 0.01, seed: int = 0,
) -> float:  # fmt: skip
    """Train the last layer on images of each style and of ``BLANK``, and write it to ``path``.

    images: name -> (n, 3, H, W), 8-bit numbers; the first 70 % of each are for training. Returns
    the accuracy on the rest. SGD with momentum 0.9 and weight decay 5e-4; the learning rate goes
    once up to ``lr`` and down again. Source: SepME, section 4.1 and its release.
    """
    features = style_features(images)
    train = labelled([x[: int(0.7 * len(x))] for x in features])
    test = labelled([x[int(0.7 * len(x)) :] for x in features])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(train[0].shape[1], len(images))
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(train[0]) // batch)
    up = max(1, steps // 2)
    schedule = torch.optim.lr_scheduler.CyclicLR(
        optimizer,
        lr / 10,
        lr,
        step_size_up=up,
        step_size_down=max(1, steps - up),
        cycle_momentum=False,
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0]), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(head(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (head(test[0]).argmax(1) == test[1]).float().mean().item()
    tensors = {name: value.detach().contiguous() for name, value in head.state_dict().items()}
    metadata = {"names": json.dumps(list(images)), "accuracy": str(accuracy)}
    save_tensors(path, tensors, metadata)
    return accuracy


def load_judge(path: str | Path) -> Judge:
    """The judge with the last layer that ``train_styles`` wrote.

    FileNotFoundError, which says what to do, when the file is missing; ValueError when it is
    damaged or holds no such layer.
    """
    remedy = "`make tables SCALE=paper` trains it again, or train_styles"
    tensors, metadata = load_tensors(path, "file of the judge's last layer", remedy)
    require_finite(tensors, path, remedy)
    try:
        styles = json.loads(metadata["names"])
        head = nn.Linear(*reversed(tensors["weight"].shape))
        head.load_state_dict(tensors)
        if len(styles) != head.out_features:
            raise ValueError(f"{len(styles)} names for {head.out_features} classes")
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{shown(path)} holds no such layer ({error}): {remedy}") from error
    things = [f"ImageNet {i}" for i in range(1000)]
    for name, i in IMAGENET.items():
        things[i] = name
    networks = Resnet(pretrained("resnet18"), head), Resnet(pretrained("resnet50"))
    return Judge(*(network.eval().requires_grad_(False) for network in networks), styles, things)
