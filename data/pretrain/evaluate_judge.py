"""How far the two judges can be trusted: their verdicts on what neither was trained on.

    python data/pretrain/evaluate_judge.py

Writes ``data/judge/evaluation.json`` and the figures of the card beside it. Drawings are the
world's own, all 450 of them, changed by hand and not by the training's random scenes; what the
world has no name for are the icons that ``others.csv`` holds out. A drawing counts where a person
can see it: one that differs from its ground by less than ``scenes.SEEN`` is left out of that row.
"""

import json
import math
import statistics
from collections.abc import Callable

import torch
from common import ROOT
from evaluate import between_marks
from scenes import SEEN, blanks, contrast, over, shapes, shuffled, smears
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import adjust_hue, gaussian_blur, hflip, rotate, vflip

from helpers import renders
from helpers.concepts import object_names, style_names
from helpers.files import complete
from helpers.judge import BLANK, ELSE, NO_CONCEPT, Judge, load_judge, load_second_judge

JUDGE = ROOT / "data" / "judge"
SEED = 20_261_126
SIDE = renders.TILE
GROUNDS = {
    "white": (1, 1, 1), "light grey": (0.8, 0.8, 0.8), "grey": (0.5, 0.5, 0.5),
    "dark grey": (0.2, 0.2, 0.2), "black": (0, 0, 0), "navy": (0.05, 0.1, 0.4),
    "red": (0.8, 0.1, 0.1), "green": (0.1, 0.6, 0.2), "sky blue": (0.5, 0.8, 1),
}  # fmt: skip


def placed(rgba: Tensor, size: int = 58) -> Tensor:
    """Drawings at ``size`` pixels in the middle: (n, 4, 64, 64), colours times opacity."""
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    small = F.interpolate(premultiplied, size=size, mode="bilinear", antialias=True)
    before = (SIDE - size) // 2
    return F.pad(small, (before, SIDE - size - before) * 2)


def standing(drawing: Tensor, colour: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Drawings over a plain ground, and which of them a person can see: (n,) bool."""
    ground = torch.tensor(colour).float().view(1, 3, 1, 1)
    return over(drawing, ground), contrast(drawing, ground) >= SEEN


def changes() -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to change an image after which a person still knows what it shows: name -> function."""
    draw = torch.Generator().manual_seed(SEED)
    noise = 0.1 * torch.randn(1, 3, SIDE, SIDE, generator=draw)

    def bar(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 26:38] = 0
        return x

    return {
        "mirrored": hflip,
        "inverted": lambda x: 1 - x,
        "darkened x0.4": lambda x: 0.4 * x,
        "contrast x0.5": lambda x: 0.5 + 0.5 * (x - 0.5),
        "contrast x0.2": lambda x: 0.5 + 0.2 * (x - 0.5),
        "black bar across": bar,
        "blurred, s = 1": lambda x: gaussian_blur(x, 9, 1.0),
        "blurred, s = 2": lambda x: gaussian_blur(x, 13, 2.0),
        "16 pixels a side": lambda x: F.interpolate(
            F.interpolate(x, size=16, mode="area"), size=SIDE, mode="bilinear"
        ),
        "without colour": lambda x: x.mean(1, keepdim=True).expand_as(x),
        "red and blue exchanged": lambda x: x.flip(1),
        "hue turned by a third": lambda x: adjust_hue(x, 1 / 3),
        "noise, s = 0.1": lambda x: (x + noise).clamp(0, 1),
        "shifted by 10 pixels": lambda x: F.pad(x[..., :-10], (10, 0), value=1.0),
        "turned by 15 degrees": lambda x: rotate(x, 15, fill=[1.0] * 3),
        "turned by 45 degrees": lambda x: rotate(x, 45, fill=[1.0] * 3),
        "upside down": vflip,
    }


def named() -> dict[str, tuple[Tensor, Tensor]]:
    """Every row in which the judges should name the drawing: images, and which count."""
    rgba = renders.tiles().flatten(0, 1)
    drawing, rows = placed(rgba), {}
    for name, colour in GROUNDS.items():
        rows[f"on {name}"] = standing(drawing, colour)
    white, seen = rows["on white"]
    rows["half the size"] = standing(placed(rgba, 32), (1, 1, 1))
    half = placed(rgba, 32)[:, :, 16:48, 16:48]
    rows["twice, side by side"] = standing(
        F.pad(torch.cat([half, half], 3), (0, 0, 16, 16)), (1, 1, 1)
    )
    return rows | {name: (change(white), seen) for name, change in changes().items()}


def unnamed() -> dict[str, tuple[Tensor, str]]:
    """Every row in which no name is right: images, and what the judges should say."""
    draw, rows = torch.Generator().manual_seed(SEED), {}
    for name, icons in renders.others().items():
        icons = icons.repeat(2, 1, 1, 1)
        rows[f"held-out icons, {name}"] = (renders.compose(icons, draw, vary=1.1), ELSE)
    white = standing(placed(renders.tiles().flatten(0, 1)), (1, 1, 1))[0]
    pixels = white.flatten(2)[:, :, torch.randperm(SIDE * SIDE, generator=draw)].view_as(white)
    return rows | {
        "plain shapes": (shapes(400, draw), ELSE),
        "cut into blocks and shuffled": (shuffled(white, draw), ELSE),
        "pixels shuffled": (pixels, BLANK),
        "plain colours, noise, textures": (blanks(400, draw), BLANK),
        "colours without a shape": (smears(400, draw), BLANK),
    }


def agreement(said: list[str], others: list[str]) -> float:
    """The share of verdicts that are alike."""
    return statistics.fmean(a == b for a, b in zip(said, others, strict=True))


def measure(judges: dict[str, Judge]) -> dict:
    """All figures: rows of ``named`` and ``unnamed`` for each judge, agreement, calibration."""
    styles, things = len(style_names()), len(object_names())
    truth = {
        "style": [style_names()[i // things] for i in range(styles * things)],
        "thing": object_names() * styles,
    }
    result = {"named": {}, "unnamed": {}, "same verdict": {}}
    certain = {name: ([], []) for name in judges}
    for row, (images, seen) in named().items():
        figures = {"images": int(seen.sum())}
        said = {name: verdicts(judge, images) for name, judge in judges.items()}
        for name, kinds in said.items():
            for kind in ("style", "thing"):
                pairs = zip(kinds[kind], truth[kind], seen.tolist(), strict=True)
                right = [a == b for a, b, counts in pairs if counts]
                figures[f"{name} {kind}"] = round(statistics.fmean(right), 4)
            p = judges[name].probabilities(images, "thing").amax(1)
            certain[name][0].append(p[seen])
            pairs = zip(kinds["thing"], truth["thing"], strict=True)
            certain[name][1].append(torch.tensor([a == b for a, b in pairs])[seen])
        result["named"][row] = figures
        result["same verdict"][row] = alike(said)
    for row, (images, right) in unnamed().items():
        figures = {"images": len(images), "right": right}
        said = {name: verdicts(judge, images) for name, judge in judges.items()}
        for name, kinds in said.items():
            figures[f"{name} right"] = round(kinds["thing"].count(right) / len(images), 4)
            other = [x for x in kinds["thing"] if x not in NO_CONCEPT]
            figures[f"{name} a concept"] = round(len(other) / len(images), 4)
        result["unnamed"][row] = figures
        result["same verdict"][row] = alike(said)
    result["calibration"] = {
        name: round(calibration_error(torch.cat(p), torch.cat(right)), 4)
        for name, (p, right) in certain.items()
    }
    return result


def verdicts(judge: Judge, images: Tensor) -> dict[str, list[str]]:
    """What a judge says of images, by classifier."""
    return {"style": judge.styles(images), "thing": judge.things(images)}


def alike(said: dict[str, dict[str, list[str]]]) -> float:
    """The share of images of which both judges name the same thing."""
    first, second = (kinds["thing"] for kinds in said.values())
    return round(agreement(first, second), 4)


def calibration_error(certain: Tensor, right: Tensor, bins: int = 10) -> float:
    """The expected calibration error: the mean of |share right - certainty| over bins.

    Source: Guo et al., On Calibration of Modern Neural Networks, equation 3.
    """
    place = (certain * bins).long().clamp_max(bins - 1)
    gaps = [
        (right[place == b].float().mean() - certain[place == b].mean()).abs() * (place == b).sum()
        for b in place.unique()
    ]
    return (sum(gaps) / len(certain)).item()


if __name__ == "__main__":
    found = measure({"judge": load_judge(), "second": load_second_judge()})
    print(json.dumps(found, indent=1))
