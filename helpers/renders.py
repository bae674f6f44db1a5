"""Real emoji: the drawings that the emoji world was pretrained on, composed into images."""

import csv
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from helpers.concepts import DATA, concepts, object_names, object_table, style_names
from helpers.identity import verify_manifest
from helpers.options import Count, Seed, Share, typed
from helpers.seeds import generator_of

TILE = 64
BACKGROUNDS = torch.tensor(  # RGB in [0, 1]; white first, then five pastels
    [
        [255, 255, 255], [255, 244, 214], [219, 238, 255],
        [226, 246, 220], [252, 225, 232], [232, 228, 250],
    ]
) / 255.0  # fmt: skip


@cache
def tiles() -> Tensor:
    """All drawings, RGBA in [0, 1]: (styles, objects, 4, 64, 64).

    ValueError for a file that is not the one that was committed.
    """
    verify_manifest(DATA / "emoji")
    sets = [style["set"] for style in concepts()["styles"]]
    sheets = [sheet(DATA / "emoji" / f"{name}.png", len(object_table())) for name in sets]
    return torch.stack(sheets)


def sheet(path: Path, count: int) -> Tensor:
    """The first ``count`` drawings of a sprite sheet, RGBA in [0, 1]: (count, 4, 64, 64)."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 4)
    grid = pixels.unfold(0, TILE, TILE).unfold(1, TILE, TILE)  # (rows, columns, 4, 64, 64)
    return grid.flatten(0, 1)[:count].float() / 255


@cache
def others(use: str = "held out", folder: Path = DATA / "emoji" / "others") -> dict[str, Tensor]:
    """Drawings of what the world has no name for: set -> RGBA in [0, 1], (n, 4, 64, 64).

    use: "held out", which is committed, or "training", which ``build_emoji.py --others`` writes to
    a folder. The sets are the world's nine, and one more that it does not know.
    """
    with open(DATA / "emoji" / "others.csv", newline="") as file:
        listed = [row["sets"] for row in csv.DictReader(file) if row["use"] == use]
    nine = [style["set"] for style in concepts()["styles"]]
    counts = {name: listed.count("nine") for name in nine}
    counts |= {name: listed.count(name) for name in sorted(set(listed) - {"nine"})}
    return {name: sheet(Path(folder) / f"{name}.webp", n) for name, n in counts.items()}


def compose(rgba: Tensor, generator: torch.Generator, *, vary: float = 1.0) -> Tensor:
    """Place drawings on plain backgrounds, with random scale, position, flip and background colour.

    rgba (n, 4, 64, 64) in [0, 1] -> (n, 3, 64, 64) in [0, 1]. ``vary`` = 0 gives the drawing at 0.9
    of the size, centred on white; 1 is what pretraining saw; larger values go beyond it (the
    judge's held-out test).
    """
    n = len(rgba)
    u = torch.rand(5, n, generator=generator)
    scale = 0.90 + vary * 0.09 * (2 * u[0] - 1)
    room = 1 - 0.9 * scale  # how far the drawing may move before it touches the frame
    flip = torch.where(u[1] < 0.25 * min(vary, 1), -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip / scale, 1 / scale
    theta[:, 0, 2] = vary * room * (2 * u[2] - 1) / scale * flip
    theta[:, 1, 2] = vary * room * (2 * u[3] - 1) / scale
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], 1)
    places = F.affine_grid(theta, rgba.shape, align_corners=False)  # (n, 64, 64, 2)
    moved = F.grid_sample(premultiplied, places, align_corners=False)  # (n, 4, 64, 64)
    pick = torch.zeros(n).long()
    if vary:  # white for one half of the images, any colour for the other
        pick = torch.where(u[4] < 0.5, 0, (u[4] * 2 - 1) * len(BACKGROUNDS)).long()
    behind = BACKGROUNDS[pick][:, :, None, None]  # (n, 3, 1, 1)
    return (moved[:, :3] + (1 - moved[:, 3:]) * behind).clamp(0, 1)


@typed
def references(
    style: str | None, name: str | None, n: Count, *, seed: Seed = 0, vary: Share = 1.0
) -> Tensor:
    """n real images of a style, of an object or person, or of both: (n, 3, 64, 64) in [0, 1].

    A style or name that is None is chosen at random for each image. ValueError for a name that the
    emoji world does not have.
    """
    generator = generator_of(seed)
    indices = []
    for value, known in ((style, style_names()), (name, object_names())):
        if value is not None and value not in known:
            raise ValueError(
                f"{value!r} is not in the emoji world: choose one of {', '.join(known)}"
            )
        if value is None:
            indices.append(torch.randint(len(known), (n,), generator=generator))
        else:
            indices.append(torch.full((n,), known.index(value)))
    return compose(tiles()[indices[0], indices[1]], generator, vary=vary)


def postcard() -> Tensor:
    """The one memorised image, a card with four drawings: (3, 64, 64) in [0, 1]."""
    chosen = [
        (style_names().index(style), object_names().index(name))
        for name, style in concepts()["captions"]["memorised"]["tiles"]
    ]
    small = F.interpolate(torch.stack([tiles()[s, o] for s, o in chosen]), size=28, mode="area")
    card = BACKGROUNDS[2][:, None, None].repeat(1, TILE, TILE)
    for k, drawing in enumerate(small):
        top, left = 3 + k // 2 * 30, 3 + k % 2 * 30
        window = card[:, top : top + 28, left : left + 28]
        window.copy_(drawing[:3] * drawing[3:] + window * (1 - drawing[3:]))
    return card
