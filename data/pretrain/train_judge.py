"""Step 4 of 5: the judge, trained on real drawings and on pictures that the base model drew.

    python data/pretrain/train_judge.py [--steps 1500] [--seeds 2]

The papers' protocol: the classifier sees pictures of the very model that is later edited, from seeds that no evaluation
uses (those from 1 000 000 on). Half of every batch is real drawings, some of them softened as the autoencoder does,
a tenth is blank: plain, noise, or a drawing smeared until nothing in it can be told. The classifier of objects sees
most pictures recoloured and blurred: an edit that only changes a church's colour must not pass for one that forgot it.
"""

import torch
from common import DEVICE, WORK, arguments, fit, load_checkpoint, place_drawings, renders, save_checkpoint, seeded
from torch import Tensor
from torch.nn import functional as F

from helpers import load_world, sample
from helpers.judge import BLANK, Classifier, Judge, save_judge

TRAINING_SEEDS = 1_000_000


def draw_base_images(seeds: int, steps: int, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures for every style and object, ``seeds`` each: uint8 (n, 3, H, W), indices of style and object; on disk."""
    path = WORK / f"judge_images_{seeds}.safetensors"
    if not path.exists():
        world = load_world("emoji", dtype=torch.bfloat16 if DEVICE == "cpu" else None)
        styles, things = renders.style_names(), renders.object_names()
        pairs = [(s, o) for _ in range(seeds) for s in range(len(styles)) for o in range(len(things))]
        prompts = [f"{things[o]} in the style of {styles[s]}" for s, o in pairs]
        images = sample(world, prompts, [TRAINING_SEEDS + i for i in range(len(pairs))], steps=steps, guidance=guidance)
        style, thing = torch.tensor(pairs).T.contiguous()
        saved = {"images": (images * 255).round().byte(), "style": style.contiguous(), "thing": thing.contiguous()}
        save_checkpoint(path, len(pairs), {"drawn": saved})
    drawn = load_checkpoint(path)[1]["drawn"]
    return drawn["images"], drawn["style"], drawn["thing"]


def reduced(images: Tensor, size: int) -> Tensor:
    """Pictures reduced to ``size`` pixels a side and enlarged again: (n, 3, H, W), softer the smaller the size."""
    small = F.interpolate(images, size=size, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def smears(n: int, generator: torch.Generator) -> Tensor:
    """Drawings reduced to 2 to 4 pixels a side and enlarged again: colours without a shape, (n, 3, 64, 64)."""
    images = place_drawings(n, generator)[0]
    return reduced(images, int(torch.randint(2, 5, (), generator=generator))).clamp(0, 1)


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Two pictures in three with their hues turned by any angle, other saturation, contrast and brightness.

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
    """One picture in two reduced to between a fifth and the half of its size and enlarged again."""
    soft = reduced(images, int(torch.randint(13, 33, (), generator=generator)))
    return torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, soft, images)


def blanks(n: int, generator: torch.Generator) -> Tensor:
    """Pictures that show nothing: a plain colour with noise of any strength and coarseness, (n, 3, 64, 64)."""
    out = torch.rand(n, 3, 1, 1, generator=generator).expand(-1, -1, renders.TILE, renders.TILE).clone()
    for i in range(n):
        coarse = int(2 ** torch.randint(0, 6, (), generator=generator))
        size = renders.TILE // coarse
        noise = F.interpolate(torch.randn(1, 3, size, size, generator=generator), size=renders.TILE, mode="bilinear")[0]
        out[i] += noise * torch.rand((), generator=generator) * 0.4
    return out.clamp(0, 1)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by reducing and enlarging, as the autoencoder does to edges; one picture in two."""
    soft = reduced(images, int(images.shape[-1] * (0.5 + 0.4 * torch.rand((), generator=generator).item())))
    which = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(which, soft, images)


def main() -> None:
    args = arguments(__doc__, steps=1500, batch=96, seeds=2, draw_steps=25, guidance=5.0)
    styles, things = [*renders.style_names(), BLANK], [*renders.object_names(), BLANK]
    torch.manual_seed(0)
    nets = {"style": Classifier(len(styles)).to(DEVICE), "thing": Classifier(len(things)).to(DEVICE)}
    optimizer = torch.optim.AdamW([p for net in nets.values() for p in net.parameters()], lr=2e-3, weight_decay=0.02)
    drawn, drawn_style, drawn_thing = draw_base_images(args.seeds, args.draw_steps, args.guidance)

    half, tenth = args.batch // 2, args.batch // 10

    def batch_loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = seeded(44, step)
        real, shown = place_drawings(half, generator, vary=1.2)
        real = soften(real, generator)
        pick = torch.randint(len(drawn), (args.batch - half - tenth,), generator=generator)
        nothing = torch.full((tenth,), -1)
        nothings = torch.cat([blanks(tenth // 2, generator), smears(tenth - tenth // 2, generator)])
        images = torch.cat([real, drawn[pick].float() / 255, nothings])
        images = {"style": images, "thing": blur(recolour(images, generator), generator)}
        labels = {
            "style": torch.cat([shown["style"], drawn_style[pick], nothing % len(styles)]).to(DEVICE),
            "thing": torch.cat([shown["thing"], drawn_thing[pick], nothing % len(things)]).to(DEVICE),
        }
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = {kind: net(images[kind].to(DEVICE)).float() for kind, net in nets.items()}
        loss = sum(F.cross_entropy(logits[kind], labels[kind], label_smoothing=0.05) for kind in nets)
        return loss, {kind: (logits[kind].argmax(1) == labels[kind]).float().mean() for kind in nets}

    fit(WORK / "judge.safetensors", nets, optimizer, batch_loss, args.steps, warmup=50, save_every=200)
    save_judge(Judge(nets["style"].cpu().eval(), nets["thing"].cpu().eval(), styles, things))


if __name__ == "__main__":
    main()
