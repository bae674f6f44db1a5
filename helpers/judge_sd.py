"""The judge of Stable Diffusion's pictures, as in SepME: two ResNets of torchvision, one with a last layer trained on styles.

Objects: ResNet50 and its 1000 ImageNet classes. Styles: ResNet18, of which only the last layer is trained, on pictures that
the base model draws of each artist's name and of the empty prompt. Departures from the release (audit S25): pictures are
resized to 256 pixels and normalised as both networks were trained, batch statistics stay frozen, and the last epoch is kept,
not the one that is best on the test pictures. Nobody's face is known: people have no judge.
"""

import json
from pathlib import Path

import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.files import complete
from helpers.judge import Judge

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which both networks expect
IMAGENET = {  # SepME's nine objects (``world.objects``) -> ImageNet's numbers
    "chain saw": 491, "church": 497, "gas pump": 571, "tench": 0, "garbage truck": 569, "English springer": 217,
    "golf ball": 574, "parachute": 701, "French horn": 566,
}  # fmt: skip


class Resnet(nn.Module):
    """A torchvision ResNet behind ``Classifier``'s two methods."""

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
        return self.head(self.features(images))


def pretrained(name: str) -> nn.Module:
    """ "resnet18" or "resnet50" with ImageNet's weights. OSError with the remedy where they cannot be had."""
    try:
        return getattr(torchvision.models, name)(weights="IMAGENET1K_V1")
    except OSError as error:  # urllib's errors are of this kind
        raise OSError(
            f"the weights of {name} are neither cached here nor reachable: go online once (torchvision fetches them)"
        ) from error


def train_styles(
    pictures: dict[str, Tensor], path: str | Path, *, epochs: int = 20, batch: int = 30, lr: float = 0.01, seed: int = 0
) -> float:
    """Train the last layer on pictures of each style (and of ``BLANK``), write it, and return its accuracy on the rest.

    pictures: name -> (n, 3, H, W), 8-bit numbers; the first 70 % of each are for training. SGD with momentum 0.9 and weight
    decay 5e-4, the learning rate once up to ``lr`` and down again. Source: SepME, section 4.1 and its release.
    """
    network = Resnet(pretrained("resnet18")).eval().requires_grad_(False)
    names = list(pictures)
    with torch.no_grad():  # the body is frozen, so each picture passes through it once
        features = [torch.cat([network.features(part / 255) for part in pictures[name].split(64)]) for name in names]
    first = [int(0.7 * len(x)) for x in features]
    train, test = (
        (torch.cat([x[s] for x, s in zip(features, cut, strict=True)]),
         torch.cat([torch.full((len(x[s]),), i) for i, (x, s) in enumerate(zip(features, cut, strict=True))]))
        for cut in ([slice(n) for n in first], [slice(n, None) for n in first])
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(train[0].shape[1], len(names))
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(train[0]) // batch)
    up = max(1, steps // 2)
    schedule = torch.optim.lr_scheduler.CyclicLR(
        optimizer, lr / 10, lr, step_size_up=up, step_size_down=max(1, steps - up), cycle_momentum=False
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
    with complete(path) as temporary:
        save_file(tensors, temporary, metadata={"names": json.dumps(names), "accuracy": str(accuracy)})
    return accuracy


def load_judge(path: str | Path) -> Judge:
    """The judge with the last layer that ``train_styles`` wrote. FileNotFoundError with the remedy when it is missing."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing: `make tables SCALE=paper` trains it, or train_styles")
    with safe_open(path, "pt") as file:
        styles = json.loads(file.metadata()["names"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    head = nn.Linear(*reversed(tensors["weight"].shape))
    head.load_state_dict(tensors)
    things = [f"ImageNet {i}" for i in range(1000)]
    for name, i in IMAGENET.items():
        things[i] = name
    networks = Resnet(pretrained("resnet18"), head), Resnet(pretrained("resnet50"))
    return Judge(*(network.eval().requires_grad_(False) for network in networks), styles, things)
