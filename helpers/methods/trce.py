"""TRCE: where a prompt ends, the concept's end is read as the safe one's (Chen et al.), stage 1.

W' = (mean W e_s e_m^T + knowledge sum W k k^T)(mean e_m e_m^T + knowledge sum k k^T)^-1, with e_m
and e_s the first EOS states of a prompt with and without the concept, and k the rows of what is to
be kept (``closedform.text_map`` with lam 0).

Fidelity: the closed form is the paper's; its knowledge rows come from captions of photographs, ours
from the world's own prompts. Stage 2, which trains on stored trajectories, is not in the kit yet.
"""

from dataclasses import dataclass
from typing import Literal

from helpers.closedform import text_map
from helpers.edits import Edit
from helpers.methods import rows
from helpers.options import Positive, Weight
from helpers.worlds import World


@dataclass(frozen=True)
class Options(rows.Options):
    """Options of TRCE's first stage, each default with its reason."""

    tokens: Literal["last", "end", "after", "all"] = "end"  # the first EOS, as in the paper
    stages: Literal[1] = 1  # the closed form
    knowledge: Positive = 1e-4  # the release's kappa squared
    lam: Weight = 0.0  # the release has none; then knowledge rows have to fill the width

    def __post_init__(self):
        super().__post_init__()
        rows.require_retained(self, "TRCE without knowledge rows is singular")


def solve(world: World, concepts: list[str], options: Options, seed: int) -> Edit:
    """One linear solve; the seed plays no part."""
    old, new = rows.moved_rows(world, concepts, options)
    everywhere = rows.Options(tokens="all", prompts=options.prompts, retain=options.retain)
    kept = rows.held_rows(world, concepts, everywhere)
    weights = {"lam": options.lam, "erase": 1 / len(old), "preserve": options.knowledge}
    return rows.multiplied(world, text_map(old, new, kept, **weights), rows=len(old))
