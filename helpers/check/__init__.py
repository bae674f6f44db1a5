"""Checks of the notebooks' exercises: what an answer must satisfy, never the answer itself.

Each check takes the reader's function. It prints one line when the answer is right or the stub is
still untouched, and raises AssertionError with a hint when the answer is wrong. There is one file
for each notebook, and ``built`` for the exercises in three steps; ``from helpers import check;
check.snr(mine)`` reaches all of them.
"""

# two files, distraction and resteering, have a check of the same name: the package gives the check
from helpers.check.attention_hooks import hide_weight, share_out, word_map
from helpers.check.baselines import erasing_target, front, matching_ema, negative_prompt_scale
from helpers.check.built import (
    attend,
    both_steps,
    closed_form,
    erase_step,
    even_pull,
    floors,
    irrelevant,
    look_away,
    two_losses,
    undone,
    unseen_increment,
    verdict,
)
from helpers.check.closed_forms import dragged, most_moved
from helpers.check.diffusion_basics import eta_step, reverse_drift, snr, steer_away
from helpers.check.distraction import distraction, evenness, fair_lam
from helpers.check.forget_me_not import fold_mask, memory, min_snr
from helpers.check.gcirs import correlation_slope, eta_gradients, stop_step
from helpers.check.measuring import canvas, layer_distance, pictures_needed
from helpers.check.papers_tables import rank_correlation
from helpers.check.random_stimulus import paired, stimulus
from helpers.check.resteering import balanced, resteering, resteering_gradient
from helpers.check.sepme import capacity, null_space

__all__ = [
    "attend",
    "balanced",
    "both_steps",
    "canvas",
    "capacity",
    "closed_form",
    "correlation_slope",
    "distraction",
    "dragged",
    "erase_step",
    "erasing_target",
    "eta_gradients",
    "eta_step",
    "even_pull",
    "evenness",
    "fair_lam",
    "floors",
    "fold_mask",
    "front",
    "hide_weight",
    "irrelevant",
    "layer_distance",
    "look_away",
    "matching_ema",
    "memory",
    "min_snr",
    "most_moved",
    "negative_prompt_scale",
    "null_space",
    "paired",
    "pictures_needed",
    "rank_correlation",
    "resteering",
    "resteering_gradient",
    "reverse_drift",
    "share_out",
    "snr",
    "steer_away",
    "stimulus",
    "stop_step",
    "two_losses",
    "undone",
    "unseen_increment",
    "verdict",
    "word_map",
]
