"""Re-steering (AIzheimer, Eq. 4): drive the attention to the concept to zero.

What the three losses share is in ``attention``.
"""

import functools
from dataclasses import dataclass
from typing import Literal

from helpers import losses
from helpers.methods import attention
from helpers.options import Weight
from helpers.training import Problem
from helpers.worlds import World


@dataclass(frozen=True)
class Options(attention.Options):
    """Options of re-steering: those of the attention losses."""

    variant: Literal["paper", "code", "fmn"] = "paper"
    # the paper gives none; this one lets the gradient of L_recon hold against that of L_attn
    lam: Weight = 0.006


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """L = recon * L_recon + lam * L_attn with ``losses.resteering``."""
    # the release computes the paper's loss, of the last token only; "fmn": the squared sum
    variant = "paper" if options.variant == "code" else options.variant
    loss = functools.partial(losses.resteering, variant=variant)
    return attention.problem(world, concepts, options, seed, loss=loss)
