"""Step 5 of 5: AlexNet's convolutions for "LPIPS (emoji backbone)".

    python data/pretrain/train_lpips.py [--steps 2000] [--batch 96]

They are torchvision's AlexNet up to its fifth ReLU, the part that LPIPS reads. They are trained to
tell the styles and objects of real drawings, under two linear layers that are thrown away, on
images scaled as LPIPS scales them. Real drawings only, some of them softened: the metric must not
know the model that it measures. Writes ``data/lpips/alexnet.safetensors`` (fp16), with the accuracy
on held-out placements in its metadata.
"""

from pathlib import Path

import lpips
import torch
from common import DEVICE, HELD_OUT, WORK, Recipe, arguments, cosine, fit, place_drawings
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import alexnet
from train_judge import soften

from helpers import concepts, renders
from helpers.checked import save_tensors
from helpers.perceptual import WEIGHTS
from helpers.seeds import step_generator

SEED = 45
LAST = 12  # features[:12] end with the fifth ReLU; LPIPS never reads the pooling after it
PEAK = 5e-4  # learning rate: without normalisation AlexNet does not stand the judge's 2e-3


class Backbone(nn.Module):
    """AlexNet's convolutions, and a linear layer each for styles and for objects and people."""

    def __init__(self):
        super().__init__()
        self.scale = lpips.ScalingLayer()
        self.features = alexnet().features[:LAST]
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # torchvision's start shrinks the signal by layer
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        width = self.features(torch.zeros(1, 3, renders.TILE, renders.TILE)).numel()
        self.style = nn.Linear(width, len(concepts.style_names()))
        self.thing = nn.Linear(width, len(concepts.object_names()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) in [0, 1] -> logits by kind, (n, classes)."""
        x = self.features(self.scale(images * 2 - 1)).flatten(1)
        return {"style": self.style(x), "thing": self.thing(x)}


def train(steps: int, batch: int, path: Path) -> Backbone:
    """Train, or go on from ``path``; every random choice is seeded by its step."""
    torch.manual_seed(0)
    model = Backbone().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.02)

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(SEED, step)
        images, labels = place_drawings(batch, generator, vary=1.2)
        images = soften(images, generator).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(images)
        labels = {kind: indices.to(DEVICE) for kind, indices in labels.items()}
        loss = sum(F.cross_entropy(logits[kind].float(), labels[kind]) for kind in labels)
        right = {kind: (logits[kind].argmax(1) == labels[kind]).float().mean() for kind in labels}
        return loss, right

    recipe = Recipe(steps, cosine(PEAK, steps, warmup=100), save_every=200, clip=1.0)
    fit(path, {"model": model}, optimizer, batch_loss, recipe)
    return model.cpu().eval()


@torch.no_grad()
def held_out(model: Backbone, n: int = 2000) -> dict[str, float]:
    """The share of real drawings, placed as in no training batch, that get the right name."""
    generator = torch.Generator().manual_seed(HELD_OUT)
    images, labels = place_drawings(n, generator, vary=1.1)
    logits = [model(part) for part in images.split(200)]
    return {
        kind: (torch.cat([part[kind] for part in logits]).argmax(1) == truth).float().mean().item()
        for kind, truth in labels.items()
    }


def save(model: Backbone, path: Path, **metadata: object) -> None:
    """The convolutions alone, fp16, under torchvision's names within ``features``."""
    tensors = {
        name: value.half().contiguous() for name, value in model.features.state_dict().items()
    }
    save_tensors(path, tensors, {name: str(value) for name, value in metadata.items()})


def main() -> None:
    args = arguments(__doc__, steps=2000, batch=96)
    model = train(args.steps, args.batch, WORK / "lpips.safetensors")
    accuracy = held_out(model)
    print("held-out drawings", accuracy)
    shares = {f"held_out_{kind}": share for kind, share in accuracy.items()}
    save(model, WEIGHTS, steps=args.steps, batch=args.batch, **shares)


if __name__ == "__main__":
    main()
