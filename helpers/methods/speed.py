"""SPEED: a concept moved inside the null space of what is to be kept (Li et al.).

Delta = argmin ||(W + Delta P) C - W C*||^2 + ||Delta P||^2  subject to  Delta P F = 0, with P the
projector on what a retain set does not see and F the rows of the empty prompt
(``closedform.projected_map``).

The retain set is refined first. *Filter*: of the rows r those stay that an unheld edit would move
most, ||Delta_0 r||^2 > the mean, Delta_0 being UCE's without a retain list. *Augment*: r + xi P_min
joins them, xi ~ N(0, 1) and P_min the directions that the matrices answer least.

Fidelity: the closed form is printed. Filter and augmentation follow the paper's description, with
one influence and one P_min over all matrices, and ``WEAKEST`` directions: our reading. What is
retained is ours, and so is ``energy``: the rows of the world fill its width, so the directions that
hold the least of them are given up; retained rows are held nearly, the empty prompt exactly. Both
refinements are off by default: the rule of ``workflow/closed_forms.py`` has not judged them yet.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from helpers.closedform import projected_map, retaining_projector, text_map
from helpers.edits import Edit
from helpers.methods import rows
from helpers.options import Above, Below, Whole
from helpers.parameters import select_parameters
from helpers.worlds import World


@dataclass(frozen=True)
class Options(rows.Options):
    """Options of SPEED, each default with its reason."""

    # the share of the retained rows' energy that is held, by the rule of workflow/closed_forms.py;
    # None: all of it, to rounding
    energy: Annotated[float, Above(0), Below(1)] | None = 0.999
    filtered: bool = False  # hold the rows that an unheld edit would move most, not all
    augmented: Whole = 0  # noisy copies of each retained row; the paper has them for width 768

    def __post_init__(self):
        super().__post_init__()
        rows.require_retained(self, "SPEED without a retain set has no null space to work in")


WEAKEST = 4  # directions of text space that P_min keeps: ours


def influence(T: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """How far the edit W T moves what all matrices read: sum_l ||W_l (T - 1) r||^2, (m,).

    gram: sum_l W_l^T W_l (width, width); kept r (m, width). Source: SPEED's filter.
    """
    moved = kept @ T.T - kept
    return ((moved @ gram) * moved).sum(1)


def least_answered(gram: Tensor, rank: int = WEAKEST) -> Tensor:
    """P_min: the projector on the directions that the matrices answer least, (width, width)."""
    weakest = torch.linalg.eigh(gram).eigenvectors[:, :rank]  # eigenvalues ascend
    return weakest @ weakest.T


def refined(world: World, moved, kept: Tensor, options: Options, seed: int) -> Tensor:
    """The retain set after filter and augmentation; ``moved``: old and new states."""
    matrices = [W.detach().double().cpu() for W in select_parameters(world, "kv").values()]
    gram = sum(W.T @ W for W in matrices)
    if options.filtered:
        moves = influence(text_map(*moved, kept[:0]), gram, kept)
        kept = kept[moves > moves.mean()]
    generator = torch.Generator().manual_seed(seed)
    P_min = least_answered(gram)
    noisy = [
        kept + torch.randn(kept.shape, generator=generator, dtype=kept.dtype) @ P_min
        for _ in range(options.augmented)
    ]
    return torch.cat([kept, *noisy])


def solve(world: World, concepts: list[str], options: Options, seed: int) -> Edit:
    """One projected solve; the seed plays no part but in the noise of the augmentation."""
    old, new = rows.moved_rows(world, concepts, options)
    kept = rows.held_rows(world, concepts, options)
    if options.filtered or options.augmented:
        kept = refined(world, (old, new), kept, options, seed)
    projector = retaining_projector(kept, energy=options.energy)
    fixed = world.encode([""]).double().cpu()[0]
    T = projected_map(old, new, fixed, projector)
    return rows.multiplied(world, T, rows=len(old), room=round(projector.trace().item()))
