"""Step 4 of 5: the judge, trained on real drawings and on images sampled from the base model.

    python data/pretrain/train_judge.py [--steps 1500] [--seeds 2]

The papers' protocol: the classifier sees images of the very model that is later edited, from seeds
that no evaluation uses (the judge's range in ``helpers.seeds``). The shipped judge saw images of
DDIM, 25 steps, guidance 5: ``--sampler``, ``--sampling-steps`` and ``--guidance`` say others.
Half of every batch is real drawings, some of them softened as the autoencoder does. A tenth is
blank: plain, noise, or a drawing smeared until nothing in it can be told. The classifier of objects
sees most images recoloured and blurred: an edit that only changes a church's colour must not pass
for one that forgot it.
"""

from pathlib import Path

import torch
from common import (
    DEVICE,
    WORK,
    Recipe,
    arguments,
    cosine,
    fit,
    load_checkpoint,
    place_drawings,
    save_checkpoint,
)
from torch import Tensor
from torch.nn import functional as F

from helpers import concepts, load_world, renders, sample
from helpers.images import to_bytes
from helpers.judge import BLANK, Classifier, Judge, save_judge
from helpers.seeds import judge_seeds, step_generator

SEED = 44
PEAK = 2e-3  # learning rate


def sample_base_images(path: Path, seeds: int, **sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Images of every object and person in every style, ``seeds`` each, kept on disk.

    Returns (n, 3, H, W) uint8, and the indices of styles and objects, (n,) both.
    """
    if not path.exists():
        world = load_world("emoji", dtype=torch.bfloat16 if DEVICE == "cpu" else None)
        styles, things = concepts.style_names(), concepts.object_names()
        pairs = [
            (s, o) for _ in range(seeds) for s in range(len(styles)) for o in range(len(things))
        ]
        prompts = [concepts.pair_prompt(things[o], styles[s]) for s, o in pairs]
        images = sample(world, prompts, judge_seeds(len(pairs)), **sampling)
        style, thing = torch.tensor(pairs).T
        saved = {"images": to_bytes(images), "style": style, "thing": thing}
        save_checkpoint(path, {"sampled": saved})
    sampled = load_checkpoint(path)[0]["sampled"]
    return sampled["images"], sampled["style"], sampled["thing"]


def reduced(images: Tensor, size: int) -> Tensor:
    """Images reduced to ``size`` pixels a side and enlarged again: (n, 3, H, W)."""
    small = F.interpolate(images, size=size, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def smears(n: int, generator: torch.Generator) -> Tensor:
    """Drawings at 2 to 4 pixels a side, enlarged: colours without a shape, (n, 3, 64, 64)."""
    images = place_drawings(n, generator)[0]
    return reduced(images, int(torch.randint(2, 5, (), generator=generator))).clamp(0, 1)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Two images in three with hues turned by any angle, other saturation, contrast, brightness.

    Colours turn about the grey axis: with g = (1, 1, 1) / sqrt(3) and x = grey + colour,
    x' = grey * contrast + brightness + saturation (cos a * colour + sin a * g x colour).
    """
    n = len(images)
    angle, saturation, contrast, brightness, which = torch.rand(5, n, 1, 1, 1, generator=generator)
    angle, saturation = angle * 2 * torch.pi, 0.3 + 1.2 * saturation
    grey = images.mean(1, keepdim=True)
    colour = images - grey
    across = torch.linalg.cross(torch.ones_like(colour) / 3**0.5, colour, dim=1)
    turned = saturation * (angle.cos() * colour + angle.sin() * across)
    out = (grey - 0.5) * (0.7 + 0.6 * contrast) + 0.5 + 0.2 * (brightness - 0.5) + turned
    return torch.where(which < 2 / 3, out.clamp(0, 1), images)


def blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """One image in two reduced to between a fifth and half of its size and enlarged again."""
    soft = reduced(images, int(torch.randint(13, 33, (), generator=generator)))
    return torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, soft, images)


def blanks(n: int, generator: torch.Generator) -> Tensor:
    """Images that show nothing: a plain colour, and noise of any strength and coarseness.

    Returns (n, 3, 64, 64) in [0, 1].
    """
    side = renders.TILE
    out = torch.rand(n, 3, 1, 1, generator=generator).expand(-1, -1, side, side).clone()
    for i in range(n):
        size = side // int(2 ** torch.randint(0, 6, (), generator=generator))
        noise = torch.randn(1, 3, size, size, generator=generator)
        noise = F.interpolate(noise, size=side, mode="bilinear")[0]
        out[i] += noise * torch.rand((), generator=generator) * 0.4
    return out.clamp(0, 1)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by reducing and enlarging, as the autoencoder does to edges; one image in two."""
    share = 0.5 + 0.4 * torch.rand((), generator=generator).item()
    soft = reduced(images, int(images.shape[-1] * share))
    which = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(which, soft, images)


class Batches:
    """Training batches by step: images and labels of either classifier, "style" and "thing"."""

    def __init__(self, batch: int, images: Tensor, labels: dict[str, Tensor]):
        self.images, self.labels = images, labels  # sampled from the base model
        self.half, self.tenth = batch // 2, batch // 10
        self.rest = batch - self.half - self.tenth

    def __call__(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        generator = step_generator(SEED, step)
        real, shown = place_drawings(self.half, generator, vary=1.2)
        real = soften(real, generator)
        pick = torch.randint(len(self.images), (self.rest,), generator=generator)
        plain = blanks(self.tenth // 2, generator)
        smeared = smears(self.tenth - self.tenth // 2, generator)
        images = torch.cat([real, self.images[pick].float() / 255, plain, smeared])
        classes = {"style": len(concepts.style_names()), "thing": len(concepts.object_names())}
        labels = {
            kind: torch.cat([shown[kind], self.labels[kind][pick], torch.full((self.tenth,), last)])
            for kind, last in classes.items()  # the last class is the blank one
        }
        return {"style": images, "thing": blur(recolour(images, generator), generator)}, labels


def train(batches: Batches, steps: int) -> Judge:
    """Train both classifiers, or go on from the checkpoint."""
    styles, things = [*concepts.style_names(), BLANK], [*concepts.object_names(), BLANK]
    torch.manual_seed(0)
    nets = {
        "style": Classifier(len(styles)).to(DEVICE),
        "thing": Classifier(len(things)).to(DEVICE),
    }
    parameters = [p for net in nets.values() for p in net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, weight_decay=0.02)

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batches(step)
        labels = {kind: indices.to(DEVICE) for kind, indices in labels.items()}
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = {kind: net(images[kind].to(DEVICE)).float() for kind, net in nets.items()}
        loss = sum(
            F.cross_entropy(logits[kind], labels[kind], label_smoothing=0.05) for kind in nets
        )
        right = {kind: (logits[kind].argmax(1) == labels[kind]).float().mean() for kind in nets}
        return loss, right

    recipe = Recipe(steps, cosine(PEAK, steps, warmup=50), save_every=200)
    fit(WORK / "judge.safetensors", nets, optimizer, batch_loss, recipe)
    return Judge(nets["style"].cpu().eval(), nets["thing"].cpu().eval(), styles, things)


def main() -> None:
    args = arguments(
        __doc__, steps=1500, batch=96, seeds=2, sampler="ddim", sampling_steps=25, guidance=5.0
    )
    sampling = {
        "sampler": args.sampler, "steps": args.sampling_steps, "guidance": args.guidance
    }  # fmt: skip
    name = "_".join(map(str, ("judge_images", args.seeds, *sampling.values())))
    images, style, thing = sample_base_images(WORK / f"{name}.safetensors", args.seeds, **sampling)
    batches = Batches(args.batch, images, {"style": style, "thing": thing})
    save_judge(train(batches, args.steps))


if __name__ == "__main__":
    main()
