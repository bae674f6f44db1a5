"""SPEED: a concept moved inside the null space of what is to be kept (Li et al.).

Delta = argmin ||(W + Delta P) C - W C*||^2 + ||Delta P||^2  subject to  Delta P F = 0, with P the
projector on what a retain set does not see and F the rows of the empty prompt
(``closedform.projected_map``).

Fidelity: the closed form is printed; the retain set is ours. SPEED filters it by influence and
augments it by noise, so that its null space is not empty at width 768. Here all rows of the world
fill the width, and the directions that hold the least of their energy are given up
(``energy``): retained rows are held nearly, the empty prompt exactly.
"""

from dataclasses import dataclass
from typing import Annotated

from helpers.closedform import projected_map, retaining_projector
from helpers.edits import Edit
from helpers.methods import rows
from helpers.options import Above, Below
from helpers.worlds import World


@dataclass(frozen=True)
class Options(rows.Options):
    """Options of SPEED, each default with its reason."""

    # the share of the retained rows' energy that is held, by the rule of workflow/closed_forms.py;
    # None: all of it, to rounding
    energy: Annotated[float, Above(0), Below(1)] | None = 0.999

    def __post_init__(self):
        super().__post_init__()
        rows.require_retained(self, "SPEED without a retain set has no null space to work in")


def solve(world: World, concepts: list[str], options: Options, seed: int) -> Edit:
    """One projected solve; the seed plays no part."""
    old, new = rows.moved_rows(world, concepts, options)
    kept = rows.held_rows(world, concepts, options)
    projector = retaining_projector(kept, energy=options.energy)
    fixed = world.encode([""]).double().cpu()[0]
    T = projected_map(old, new, fixed, projector)
    return rows.multiplied(world, T, rows=len(old), room=round(projector.trace().item()))
