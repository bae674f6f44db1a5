"""RealEra, in the manner of: a concept's whole neighbourhood is moved, what lies beyond is held.

For each row e that moves, neighbours e_k = |e| (s_k e^ + sqrt(1 - s_k^2) u_k) with cosine s_k in
``near`` and u_k a random direction at right angles, and a set b_m beyond, cosines in ``far``:

W' = (lam W + (1/K) sum W a e_k^T + (beta/M) sum W b_m b_m^T)
     (lam 1 + (1/K) sum e_k e_k^T + (beta/M) sum b_m b_m^T)^-1

Fidelity: our reading. RealEra's losses are not published; known is that perturbed states within a
distance and a band of cosines are erased and those outside are kept, and that a closed form comes
first. Its second stage, a LoRA, is not in the kit yet.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from helpers.closedform import text_map
from helpers.edits import Edit
from helpers.methods import rows
from helpers.options import Between, Count, Rule, Weight
from helpers.seeds import generator_of
from helpers.worlds import World

Cosine = Annotated[float, Between(-1, 1)]
Band = Annotated[tuple[Cosine, Cosine], Rule("the lower one first", lambda b: b[0] <= b[1])]


@dataclass(frozen=True)
class Options(rows.Options):
    """Options in the manner of RealEra, each default with its reason: all are ours."""

    lam: Weight = 0.5  # UCE's
    near: Band = (0.9, 1.0)  # cosines of what is moved with the concept's row
    far: Band = (0.4, 0.7)  # cosines of what is held
    neighbours: Count = 4  # K for each row
    beyond: Count = 4  # M for each row
    beta: Weight = 1.0  # weight of what is held beyond
    preserve: Weight = 1.0  # weight of the retained names' rows, as in UCE


def cone(rows_: Tensor, count: int, band: tuple[float, float], draw: torch.Generator) -> Tensor:
    """Random states of each row's own length, with cosines within a band: (n * count, width)."""
    e = rows_.repeat_interleave(count, 0)
    length = e.norm(dim=1, keepdim=True)
    unit = e / length
    u = torch.randn(e.shape, generator=draw, dtype=e.dtype)
    u = u - (u * unit).sum(1, keepdim=True) * unit
    u = u / u.norm(dim=1, keepdim=True)
    low, high = band
    s = low + (high - low) * torch.rand(len(e), 1, generator=draw, dtype=e.dtype)
    return length * (s * unit + (1 - s.pow(2)).clamp_min(0).sqrt() * u)


def solve(world: World, concepts: list[str], options: Options, seed: int) -> Edit:
    """One linear solve over neighbours that the seed draws."""
    old, new = rows.moved_rows(world, concepts, options)
    draw = generator_of(seed)
    near = cone(old, options.neighbours, options.near, draw)
    far = cone(old, options.beyond, options.far, draw)
    kept = rows.held_rows(world, concepts, options)
    held = torch.cat([
        torch.full((len(far),), options.beta / options.beyond),
        torch.full((len(kept),), float(options.preserve)),
    ])  # fmt: skip
    T = text_map(
        near, new.repeat_interleave(options.neighbours, 0), torch.cat([far, kept]),
        lam=options.lam, erase=1 / options.neighbours, preserve=held.double(),
    )  # fmt: skip
    return rows.multiplied(world, T, rows=len(near))
