"""Distraction (AIzheimer, Eq. 5): spread each head's attention to the concept evenly.

What the three losses share is in ``attention``.
"""

import functools
from dataclasses import dataclass

from helpers import losses
from helpers.methods import attention
from helpers.options import Weight
from helpers.training import Problem
from helpers.worlds import World


@dataclass(frozen=True)
class Options(attention.Options):
    """Options of distraction: those of the attention losses."""

    # the paper gives none; this one lets the gradient of L_recon hold against that of L_attn
    lam: Weight = 0.0012


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """L = recon * L_recon + lam * L_attn with ``losses.distraction``."""
    loss = functools.partial(losses.distraction, variant=options.variant)
    return attention.problem(world, concepts, options, seed, loss=loss)
