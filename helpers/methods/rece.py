"""RECE: UCE, then the embedding that would undo it is erased as well, and again (Gong et al.).

Each epoch: c' = (gamma 1 + sum W'^T W')^-1 (sum W'^T W) c, the state that the edited matrices read
as the base's read c (``closedform.derived_states``), for all rows of the concept's prompt; then a
step of UCE that moves c' to the rows of the empty prompt, anchored at the *current* matrices.

Fidelity: ``variant="code"`` starts from UCE as released. As there, the anchor lam ||W'' - W'||^2
and the targets W' c* of the second step are of the current matrices. ``hold_erased`` is ours: rows
that UCE has moved are held where they are; the release leaves them free, and they may come back.
Left out: the release keeps the epoch with the lowest rate of a detector, a choice by the test.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.closedform import derived_states, text_map
from helpers.edits import Edit
from helpers.methods import rows, uce
from helpers.options import Positive, Weight, Whole
from helpers.parameters import select_parameters
from helpers.worlds import World

VARIANTS = {"code": {**uce.VARIANTS["code"], "hold_erased": False}}


@dataclass(frozen=True)
class Options(uce.Options):
    """Options of RECE, each default with its reason."""

    epochs: Whole = 1  # the release's for styles and objects
    gamma: Positive = 1e-3  # the release's for styles and hard objects; 0.1 for easy ones
    step_lam: Weight = 0.1  # of the second step: the release's
    step_preserve: Weight = 0.1  # the release's
    # hold what is already erased, too: without it the second step may bring the concept back
    hold_erased: bool = True


def found_again(world: World, T: Tensor, states: Tensor, gamma: float) -> Tensor:
    """The states that matrices W T read as the base's read ``states``."""
    matrices = [W.detach().double().cpu() for W in select_parameters(world, "kv").values()]
    return derived_states(states, [(W, W @ T) for W in matrices], gamma=gamma).double()


def solve(world: World, concepts: list[str], options: Options, seed: int) -> Edit:
    """UCE and its epochs, all of them one map of text space; the seed plays no part."""
    old, new = rows.moved_rows(world, concepts, options)
    kept = rows.held_rows(world, concepts, options)
    first = {"lam": options.lam, "erase": options.erase, "preserve": options.preserve}
    T = text_map(old, new, kept, **first)
    states = world.encode(concepts).double().cpu()
    empty = world.encode([""]).double().cpu().expand_as(states).flatten(0, 1)
    held = torch.cat([kept, empty, *([old] if options.hold_erased else [])])
    for _ in range(options.epochs):
        again = found_again(world, T, states, options.gamma).flatten(0, 1)
        then = {"lam": options.step_lam, "erase": 1.0, "preserve": options.step_preserve}
        T = T @ text_map(again, empty, held, **then)
    return rows.multiplied(world, T, rows=len(old))
