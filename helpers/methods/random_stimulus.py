"""Random stimulus (AIzheimer, Eq. 6): pull the attention to the concept towards noise.

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
    """Options of random stimulus: those of the attention losses."""

    # the paper gives none; this one lets the gradient of L_recon hold against that of L_attn
    lam: Weight = 0.008


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """L = recon * L_recon + lam * L_attn with ``losses.random_stimulus``."""
    loss = functools.partial(losses.random_stimulus, variant=options.variant)
    return attention.problem(world, concepts, options, seed, loss=loss)
