"""How far the two judges can be trusted: their verdicts on what neither was trained on.

    python data/pretrain/evaluate_judge.py

Writes ``data/judge/evaluation.json`` and the figures of the card beside it. Drawings are the
world's own, all 450 of them, changed by hand and not by the training's random scenes; what the
world has no name for are the icons that ``others.csv`` holds out. A drawing counts where a person
can see it: one that differs from its ground by less than ``scenes.SEEN`` is left out of that row.
"""

import json
import platform
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
ICONS = "held-out icons"
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
        rows[f"{ICONS}, {name}"] = (renders.compose(icons, draw, vary=1.1), ELSE)
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
    rows = {row: of_named(judges, *given) for row, given in named().items()}
    certain = [row.pop("sure") for row in rows.values()]
    sure = {
        name: [torch.cat(part) for part in zip(*(row[name] for row in certain), strict=True)]
        for name in judges
    }
    others = {row: of_unnamed(judges, *given) for row, given in unnamed().items()}
    icons = [row for name, row in others.items() if name.startswith(ICONS)]
    others[f"{ICONS}, all"] = {"images": sum(row["images"] for row in icons), "right": ELSE} | {
        name: round(statistics.fmean(row[name] for row in icons), 4)
        for name in icons[0]
        if name not in ("images", "right")
    }
    return {
        "made_with": {
            "torch": torch.__version__, "machine": platform.machine(), "seed": SEED,
            **{name: judge.fingerprint() for name, judge in judges.items()},
        },
        "named": rows,
        "unnamed": others,
        "calibration": {name: round(calibration_error(*sure[name]), 4) for name in judges},
    }  # fmt: skip


def of_named(judges: dict[str, Judge], images: Tensor, seen: Tensor) -> dict:
    """One row of ``named``: each judge's share of right verdicts, by kind, and their agreement.

    "sure": each judge's certainty of its verdict on things, and whether it was right.
    """
    styles, things = len(style_names()), len(object_names())
    truth = {
        "style": [name for name in style_names() for _ in range(things)],
        "thing": object_names() * styles,
    }
    row, said, sure = {"images": int(seen.sum())}, {}, {}
    for name, judge in judges.items():
        said[name] = verdicts(judge, images)
        for kind, shown in truth.items():
            right = torch.tensor([a == b for a, b in zip(said[name][kind], shown, strict=True)])
            row[f"{name} {kind}"] = round(right[seen].float().mean().item(), 4)
        sure[name] = judge.probabilities(images, "thing").amax(1)[seen], right[seen]
    return {**row, "alike": alike(said), "sure": sure}


def of_unnamed(judges: dict[str, Judge], images: Tensor, right: str) -> dict:
    """One row of ``unnamed``: how often each judge says what is right, and how often a concept."""
    row, said = {"images": len(images), "right": right}, {}
    for name, judge in judges.items():
        said[name] = verdicts(judge, images)
        things = said[name]["thing"]
        row[f"{name} right"] = round(things.count(right) / len(images), 4)
        row[f"{name} a concept"] = round(
            sum(thing not in NO_CONCEPT for thing in things) / len(images), 4
        )
    return {**row, "alike": alike(said)}


def verdicts(judge: Judge, images: Tensor) -> dict[str, list[str]]:
    """What a judge says of images, by classifier."""
    return {"style": judge.styles(images), "thing": judge.things(images)}


def alike(said: dict[str, dict[str, list[str]]]) -> float:
    """The share of images of which both judges name the same thing."""
    first, second = (kinds["thing"] for kinds in said.values())
    return round(statistics.fmean(a == b for a, b in zip(first, second, strict=True)), 4)


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


def card(found: dict) -> str:
    """The figures of the card, as Markdown."""
    made = found["made_with"]
    lines = [
        "Measured with `python data/pretrain/evaluate_judge.py` on the judges "
        f"`{made['judge']}` and `{made['second']}` (cpu, torch {made['torch']}). Seed "
        f"{made['seed']} for what is random.",
        "",
        "The share of right names; “alike”: both judges name the same thing.",
        "",
        "| all 450 drawings | seen | judge: thing | second | judge: style | second | alike |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = [f"{name} {kind}" for kind in ("thing", "style") for name in ("judge", "second")]
    for name, row in found["named"].items():
        shares = " | ".join(f"{row[column]:.2f}" for column in columns)
        lines.append(f"| {name} | {row['images']} | {shares} | {row['alike']:.2f} |")
    lines += [
        "",
        "| what has no name here | images | right is | judge: right | second | judge: a concept | "
        "second | alike |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = [f"{name} {what}" for what in ("right", "a concept") for name in ("judge", "second")]
    for name, row in found["unnamed"].items():
        shares = " | ".join(f"{row[column]:.3f}" for column in columns)
        lines.append(
            f"| {name} | {row['images']} | {row['right']} | {shares} | {row['alike']:.2f} |"
        )
    errors = found["calibration"]
    lines += [
        "",
        "Expected calibration error over the first table's verdicts on things: "
        f"{errors['judge']:.3f} and {errors['second']:.3f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    found = measure({"judge": load_judge(), "second": load_second_judge()})
    with complete(JUDGE / "evaluation.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    readme = JUDGE / "README.md"
    readme.write_text(between_marks(readme.read_text(), "figures", card(found)))


if __name__ == "__main__":
    main()
