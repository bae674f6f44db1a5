"""ESD: erased Stable Diffusion, the concept's prompt taught to lead away from the concept (Gandikota et al.).

Objective: L = mean || eps_{theta + delta}(x_t, c, t) - [eps_null - eta (eps_c - eps_null)] ||^2, eps_null and eps_c
of the frozen model; x_t is drawn from noise, with the concept's prompt, down to a random t. No pictures are needed.

Fidelity: ``variant="paper"`` draws x_t with the model that is being edited, as the paper and its first release do, and
SepME's release after them (all of cross-attention, eta 1, guidance 3); ``variant="code"`` draws it with the frozen
model, as the newer release does. The releases take t near the noise level of x_t, within a DDIM step; here it is that
very level. Several concepts (our reading): each row of a batch draws its own.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import losses
from helpers.edits import Edit
from helpers.rollouts import branches, rollout, timed
from helpers.training import Training, finished, new_increments, predict, run
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of ESD, each default with its reason."""

    variant: str = "paper"  # "paper" (x_t from the edited model) or "code" (from the frozen one)
    eta: float = 1.0  # strength of the negated guidance, in the paper's sense: the releases' default in effect
    group: str = "ESD-x"  # for names and styles; "ESD-u" is the paper's choice for what shows without being named
    guidance: float = 3.0  # of the rollout: the paper's
    rollout_steps: int = 5  # DDIM steps over the whole schedule; the paper's 50 would take ten times as long
    steps: int = 50  # the paper's 1000, of one picture each, would take minutes
    lr: float = 3e-4  # the paper's 1e-5 is for a network a hundred times as large and twenty times the steps
    batch_size: int = 2  # one t each; twice as many cost nearly twice the rollouts
    decay: str = "cosine"
    clip: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in ("paper", "code"):
            raise ValueError(f"unknown variant {self.variant!r} of ESD: choose 'paper' or 'code'")


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train the chosen group towards negated guidance, return the increments; meta["parts"] has the seconds by part."""
    start = time.time()
    delta = new_increments(world.unet, options.group)
    states, null = world.encode(concepts).float(), world.encode([""]).float()
    length, batch = len(world.pipe.scheduler.alphas_cumprod), options.batch_size
    drawing = delta if options.variant == "paper" else {}
    parts = {"rollout": 0.0}

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        c = states[torch.randint(len(states), (batch,), generator=generator)]  # (b, tokens, width)
        t = torch.randint(length, (batch,), generator=generator).to(world.device)
        x_T = torch.randn((batch, *world.latent_shape), generator=generator).to(world.device)
        with timed(parts, "rollout"):
            x_t = rollout(world, drawing, x_T, t, c, null, steps=options.rollout_steps, guidance=options.guidance)
        with torch.no_grad():
            eps_null, eps_c = branches(world.unet, {}, x_t, t, c, null)
        target = losses.negated_guidance(eps_null, eps_c, options.eta)
        return {"alignment": losses.alignment(predict(world.unet, delta, x_t, t, c), target)}

    with timed(parts, "training"):
        history = run(delta, terms, {"alignment": 1.0}, options.schedule(seed), progress=progress)
    parts["training"] -= parts["rollout"]
    return finished(
        world, delta, history, method=method, concepts=concepts, options=options, seed=seed, start=start, parts=parts
    )
