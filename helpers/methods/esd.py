"""ESD: the concept's prompt is taught to lead away from the concept (Gandikota et al.).

Objective: L = mean || eps_{theta + delta}(x_t, c, t) - [eps_null - eta (eps_c - eps_null)] ||^2,
eps_null and eps_c of the frozen model; x_t is sampled from noise, with the concept's prompt, down
to a random t. No images are needed.

Fidelity: ``variant="paper"`` samples x_t with the model that is being edited, as the paper and its
first release do, and SepME's release after them (all of cross-attention, eta 1, guidance 3);
``variant="code"`` samples it with the frozen model, as the newer release does. The releases take t
near the noise level of x_t, within a DDIM step; here it is that very level. Several concepts (our
reading): each row of a batch has one of its own.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.denoise import guided_pair, predict, rollout
from helpers.options import Count, Positive, Whole
from helpers.parameters import Dense, Group
from helpers.training import Problem, Training
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of ESD, each default with its reason."""

    # x_t from the edited model, or ("code") from the frozen one
    variant: Literal["paper", "code"] = "paper"
    eta: float = 1.0  # strength of the negated guidance, in the paper's sense: the releases' too
    group: Group = "ESD-x"  # for names and styles; "ESD-u" for what shows without being named
    guidance: float = 3.0  # of the rollout: the paper's
    rollout_steps: Count = (
        5  # DDIM steps over the whole schedule; the paper's 50 take ten times as long
    )
    steps: Whole = 50  # the paper's 1000, of one image each, would take minutes
    lr: Positive = (
        3e-4  # the paper's 1e-5 is for a network a hundred times as large, 20 times the steps
    )
    batch_size: Count = 2  # one t each; twice as many cost nearly twice the rollouts
    decay: Literal["constant", "cosine"] = "cosine"
    clip: Positive | None = 1.0


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """The chosen group trained towards negated guidance."""
    increments = Dense(world, options.group)
    delta = increments.leaves
    states, null = world.encode(concepts).float(), world.encode([""]).float()
    length, batch = len(world.alpha_bar), options.batch_size
    sampled_by = delta if options.variant == "paper" else {}
    how = {"steps": options.rollout_steps, "guidance": options.guidance}
    timings = {"rollout": 0.0}

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        c = states[torch.randint(len(states), (batch,), generator=generator)]  # (b, tokens, width)
        t = torch.randint(length, (batch,), generator=generator).to(world.device)
        x_T = torch.randn((batch, *world.latent_shape), generator=generator).to(world.device)
        start = time.perf_counter()
        x_t = rollout(world, sampled_by, x_T, t, c, null, **how)
        timings["rollout"] += time.perf_counter() - start
        with torch.no_grad():
            eps_null, eps_c = guided_pair(world, {}, x_t, t, c, null)
        target = losses.negated_guidance(eps_null, eps_c, options.eta)
        return {"alignment": losses.alignment(predict(world, delta, x_t, t, c), target)}

    return Problem(delta, increments.delta, terms, {"alignment": 1.0}, timings=timings)
