"""UCE: keys and values that read a concept as something else, by least squares (Gandikota et al.).

W' = argmin e sum_i ||W' c_i - W c*_i||^2 + p sum_j ||W' k_j - W k_j||^2 + lam ||W' - W||^2, for
every key and value matrix of cross-attention, in closed form (``closedform.text_map``).

Fidelity: ``variant="code"`` is the release: one row for each concept, its name's last token, moved
to the last token of the anchor (BOS for none), nothing held unless you name it. The default is ours
in what it takes for the concept: all its prompts of the world, every row from the name on.
"""

from dataclasses import dataclass
from typing import Literal

from helpers.closedform import text_map
from helpers.edits import Edit
from helpers.methods import rows
from helpers.options import Weight
from helpers.worlds import World

VARIANTS = {"code": {"tokens": "last", "prompts": "names", "retain": "none"}}


@dataclass(frozen=True)
class Options(rows.Options):
    """Options of UCE, each default with its reason."""

    variant: Literal["paper", "code"] = "paper"
    lam: Weight = 0.5  # the release's: how hard the rest of text space holds
    erase: Weight = 1.0  # weight e of a row that moves: the release's
    preserve: Weight = 1.0  # weight p of a row that is held: the release's


def solve(world: World, concepts: list[str], options: Options, seed: int) -> Edit:
    """One linear solve; the seed plays no part."""
    old, new = rows.moved_rows(world, concepts, options)
    kept = rows.held_rows(world, concepts, options)
    weights = {"lam": options.lam, "erase": options.erase, "preserve": options.preserve}
    return rows.multiplied(world, text_map(old, new, kept, **weights), rows=len(old))
