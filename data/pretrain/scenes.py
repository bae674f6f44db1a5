"""What the judges are trained on: drawings as a person would still know them, and what is none.

Every function is seeded by its generator. Images are (n, 3, 64, 64) in [0, 1].
"""

import math

import torch
from common import place_drawings
from torch import Tensor
from torch.nn import functional as F

from helpers import renders

SIDE = renders.TILE
SEEN = 0.12  # the least difference between a drawing and its ground for a person to see it


def chance(n: int, share: float, generator: torch.Generator) -> Tensor:
    """True for about ``share`` of n images: (n, 1, 1, 1)."""
    return torch.rand(n, 1, 1, 1, generator=generator) < share


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """n numbers between the bounds: (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def reduced(images: Tensor, size: int) -> Tensor:
    """Images reduced to ``size`` pixels a side and enlarged again: (n, 3, H, W)."""
    small = F.interpolate(images, size=size, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by reducing and enlarging, as the autoencoder does to edges; one image in two."""
    share = 0.5 + 0.4 * torch.rand((), generator=generator).item()
    soft = reduced(images, int(images.shape[-1] * share))
    return torch.where(chance(len(images), 0.5, generator), soft, images)


def textures(n: int, generator: torch.Generator) -> Tensor:
    """Grounds with a pattern: two colours mixed by a gradient, stripes, a board, or soft noise."""
    a, b = torch.rand(2, n, 3, 1, 1, generator=generator)
    line = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle, often = uniform(n, 0, math.pi, generator), uniform(n, 2, 9, generator)
    along = angle.cos() * x + angle.sin() * y  # (n, 1, 64, 64)
    across = angle.cos() * y - angle.sin() * x
    size = int(torch.randint(3, 17, (), generator=generator))
    noise = torch.rand(n, 1, size, size, generator=generator)
    patterns = torch.stack(
        [
            (along + 1) / 2,
            (torch.sin(often * along * math.pi) > 0).float(),
            (torch.sin(often * along * math.pi) * torch.sin(often * across * math.pi) > 0).float(),
            F.interpolate(noise, size=SIDE, mode="bilinear"),
        ]
    ).clamp(0, 1)
    which = torch.randint(len(patterns), (n,), generator=generator)
    mix = patterns[which, torch.arange(n)]  # (n, 1, 64, 64)
    return a + (b - a) * mix * uniform(n, 0.2, 1, generator)


def grounds(n: int, generator: torch.Generator) -> Tensor:
    """What drawings stand on: white, pastel, any colour, dark, saturated, grey, or textured."""
    pastel = renders.BACKGROUNDS[torch.randint(len(renders.BACKGROUNDS), (n,), generator=generator)]
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    strong = torch.rand(n, 3, 1, 1, generator=generator).round() * uniform(n, 0.5, 1, generator)
    plain = torch.stack(
        [
            torch.ones(n, 3, 1, 1),
            pastel[:, :, None, None],
            colour,
            colour * 0.3,
            (colour - colour.amin(1, keepdim=True)) * 1.3,
            strong,
            uniform(n, 0, 1, generator).expand(-1, 3, -1, -1),
        ]
    ).clamp(0, 1)
    shares = torch.tensor([0.22, 0.1, 0.16, 0.1, 0.1, 0.08, 0.09, 0.15])  # the last is textured
    which = torch.multinomial(shares, n, replacement=True, generator=generator)
    pattern = textures(n, generator)
    one = plain[which.clamp_max(len(plain) - 1), torch.arange(n)].expand(-1, -1, SIDE, SIDE)
    return torch.where((which == len(plain))[:, None, None, None], pattern, one)


def moved(rgba: Tensor, generator: torch.Generator, *, low: float = 0.4) -> Tensor:
    """Drawings at any size from ``low`` to 1 and at any place, some turned: premultiplied RGBA."""
    n = len(rgba)
    u = torch.rand(6, n, generator=generator)
    scale = torch.where(u[0] < 0.4, 0.81 + 0.18 * u[1], low + (1 - low) * u[1])
    flip = torch.where(u[2] < 0.25, -1.0, 1.0)
    angle = torch.where(u[3] < 0.25, (2 * u[3] / 0.25 - 1) * math.pi / 4, 0.0)
    angle = torch.where((u[3] > 0.25) & (u[3] < 0.29), math.pi, angle)
    room = 1.05 - 0.9 * scale
    shift = room * (2 * u[4:] - 1)  # (2, n)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [
            torch.stack([flip * cos, flip * sin, flip * (cos * shift[0] + sin * shift[1])], 1),
            torch.stack([-sin, cos, -sin * shift[0] + cos * shift[1]], 1),
        ],
        1,
    )  # (n, 2, 3)
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], 1)
    return F.grid_sample(
        premultiplied, F.affine_grid(theta, rgba.shape, align_corners=False), align_corners=False
    )


def on_ground(drawing: Tensor, ground: Tensor) -> Tensor:
    """A premultiplied drawing over a ground; white, or else grey, where it could not be seen."""
    for other in (1.0, 0.5):
        hidden = contrast(drawing, ground) < SEEN
        ground = torch.where(hidden[:, None, None, None], other, ground)
    return over(drawing, ground)


def over(drawing: Tensor, ground: Tensor) -> Tensor:
    """A premultiplied drawing over a ground: (n, 4, H, W), (n, 3, H, W) -> (n, 3, H, W)."""
    return (drawing[:, :3] + (1 - drawing[:, 3:]) * ground).clamp(0, 1)


def contrast(drawing: Tensor, ground: Tensor) -> Tensor:
    """How far a drawing differs from its ground where it is opaque: (n,), from 0 to 1."""
    difference = (over(drawing, ground) - ground).abs().amax(1).mean((1, 2))
    return difference / drawing[:, 3].mean((1, 2)).clamp_min(1e-4)


def scenes(rgba: Tensor, beside: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings on grounds of every kind; one in eight stands beside another, ``beside``, halved."""
    n = len(rgba)
    one = moved(rgba, generator)
    pair = [F.interpolate(moved(x, generator, low=0.8), size=SIDE // 2) for x in (rgba, beside)]
    two = F.pad(torch.cat(pair, 3), (0, 0, SIDE // 4, SIDE // 4))  # side by side, in the middle
    drawing = torch.where(chance(n, 1 / 8, generator), two, one)
    return on_ground(drawing, grounds(n, generator))


def covered(images: Tensor, generator: torch.Generator) -> Tensor:
    """One image in four with a bar across it or a patch on it, of any one colour."""
    n = len(images)
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    colour = torch.where(chance(n, 0.5, generator), colour.round() * 0, colour)
    at, wide = uniform(n, 8, 48, generator), uniform(n, 4, 18, generator)
    line = torch.arange(SIDE).float()
    rows = ((line[:, None] >= at) & (line[:, None] < at + wide)).expand(-1, -1, -1, SIDE)
    rows = torch.where(chance(n, 0.5, generator), rows, rows.transpose(2, 3))
    across = uniform(n, 0, 44, generator)
    patch = rows & (line >= across) & (line < across + 20)
    cover = torch.where(chance(n, 0.6, generator), rows, patch) & chance(n, 1 / 4, generator)
    return torch.where(cover, colour, images)


def lit(images: Tensor, generator: torch.Generator, *, invert: float = 0.1) -> Tensor:
    """Some images inverted, some darkened to as little as a quarter, some of low contrast."""
    n = len(images)
    images = torch.where(chance(n, invert, generator), 1 - images, images)
    dark = images * uniform(n, 0.25, 1, generator)
    images = torch.where(chance(n, 0.15, generator), dark, images)
    mean = images.mean((1, 2, 3), keepdim=True)
    flat = mean + (images - mean) * uniform(n, 0.15, 1, generator)
    images = torch.where(chance(n, 0.12, generator), flat, images)
    noise = torch.randn(images.shape, generator=generator) * uniform(n, 0, 0.15, generator)
    return torch.where(chance(n, 0.1, generator), images + noise, images).clamp(0, 1)


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
    return torch.where(chance(len(images), 0.5, generator), soft, images)


def smears(n: int, generator: torch.Generator) -> Tensor:
    """Drawings at 2 to 4 pixels a side, enlarged: colours without a shape, (n, 3, 64, 64)."""
    images = place_drawings(n, generator)[0]
    return reduced(images, int(torch.randint(2, 5, (), generator=generator))).clamp(0, 1)


def blanks(n: int, generator: torch.Generator) -> Tensor:
    """Images that show nothing: a plain colour, noise of any strength, a texture alone."""
    out = torch.rand(n, 3, 1, 1, generator=generator).expand(-1, -1, SIDE, SIDE).clone()
    for i in range(n):
        size = SIDE // int(2 ** torch.randint(0, 6, (), generator=generator))
        noise = torch.randn(1, 3, size, size, generator=generator)
        noise = F.interpolate(noise, size=SIDE, mode="bilinear")[0]
        out[i] += noise * torch.rand((), generator=generator) * 0.4
    return torch.where(chance(n, 0.25, generator), textures(n, generator), out).clamp(0, 1)


def shapes(n: int, generator: torch.Generator) -> Tensor:
    """A disc, ring, box, triangle, star or cross of one colour on a ground: no concept."""
    line = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    x, y = x - uniform(n, -0.5, 0.5, generator), y - uniform(n, -0.5, 0.5, generator)
    angle, size = uniform(n, 0, 2 * math.pi, generator), uniform(n, 0.25, 0.8, generator)
    angle = torch.where(chance(n, 0.5, generator), torch.zeros(()), angle)
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    x = x / uniform(n, 0.6, 1, generator)
    far, turn = (x.square() + y.square()).sqrt(), torch.atan2(y, x)
    points = torch.randint(3, 9, (n, 1, 1, 1), generator=generator)
    star = size * (0.65 + 0.35 * torch.cos(points * turn))
    wedge = math.pi / points
    polygon = far * torch.cos(torch.remainder(turn, 2 * wedge) - wedge)
    thin = torch.minimum(x.abs(), y.abs()) < size * 0.3
    inside = torch.stack(
        [
            far < size, (far < size) & (far > 0.6 * size), torch.maximum(x.abs(), y.abs()) < size,
            polygon < 0.7 * size, far < star, thin & (torch.maximum(x.abs(), y.abs()) < size),
            (x.abs() < size) & (y.abs() < 0.25 * size),
        ]
    )  # fmt: skip
    which = torch.randint(len(inside), (n,), generator=generator)
    mask = inside[which, torch.arange(n)].float()
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    colour = torch.where(chance(n, 0.3, generator), colour.round(), colour)
    shade = colour * (1 - uniform(n, 0, 0.5, generator) * (y + 1) / 2)
    return on_ground(torch.cat([shade * mask, mask], 1), grounds(n, generator))


def shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images cut into blocks of 8 or 16 pixels, put together in any order: nothing is left."""
    block = (8, 16)[int(torch.randint(2, (), generator=generator))]
    cut = F.unfold(images, block, stride=block)  # (n, 3 * block^2, blocks)
    order = torch.rand(len(images), 1, cut.shape[-1], generator=generator).argsort(2)
    return F.fold(cut.gather(2, order.expand_as(cut)), SIDE, block, stride=block)
