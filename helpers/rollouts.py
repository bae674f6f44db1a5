"""Rollouts: noisy latents that a model draws itself, part of the way, for methods that need no pictures."""

import contextlib
import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.diffusion import coefficient, ddim_step, guide
from helpers.training import predict
from helpers.worlds import World


def branches(
    unet, increments: dict[str, Tensor], x_t: Tensor, t: Tensor, states: Tensor, null: Tensor
) -> tuple[Tensor, Tensor]:
    """eps_null and eps_c of the same x_t, by one pass of twice the batch.

    x_t (b, c, h, w), t (b,), states (b, tokens, width), null (1, tokens, width). Returns two of (b, c, h, w), fp32.
    """
    both = torch.cat([null.expand_as(states), states])  # (2b, tokens, width)
    eps_null, eps_c = predict(unet, increments, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return eps_null, eps_c


@torch.no_grad()
def rollout(
    world: World, increments: dict[str, Tensor], x_T: Tensor, until: Tensor, states: Tensor, null: Tensor, *,
    steps: int, guidance: float,
) -> Tensor:  # fmt: skip
    """x_t for each row's own t, drawn from pure noise by guided DDIM with the model theta + increments.

    x_T = noise, then x_prev = DDIM(x, eps_null + guidance (eps_c - eps_null)) down to t.

    The grid is that of ``steps`` DDIM steps over the whole schedule (diffusers' "trailing"), and the last step of a
    row ends on its t rather than on the grid: the noise level of x_t is exactly t's. A row that has arrived leaves the
    batch. x_T (b, c, h, w); until (b,) integers, the t; states (b, tokens, width); null (1, tokens, width). Returns
    (b, c, h, w). ValueError for steps or t outside the schedule.
    Source: ESD and SDD, x_t by sampling; Song et al., DDIM, Eq. 12.
    """
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(x_T.device)
    length = len(alpha_bar)
    if not 1 <= steps <= length:
        raise ValueError(f"a rollout of {steps} steps: the schedule has {length} timesteps, so give 1 to {length}")
    if until.min() < 0 or until.max() >= length:
        raise ValueError(f"timesteps run from 0 to {length - 1}, and a rollout was asked to end at {until.tolist()}")
    grid = [round(length * (1 - k / steps)) - 1 for k in range(steps)] + [0]
    x_t = x_T.clone()
    for level, below in itertools.pairwise(grid):
        going = until < level
        if not going.any():
            break
        x = x_t[going]
        eps_null, eps_c = branches(world.unet, increments, x, torch.full_like(until[going], level), states[going], null)
        alpha_bar_t = coefficient(alpha_bar, level, x)
        alpha_bar_prev = coefficient(alpha_bar, until[going].clamp(min=below), x)
        x_t[going] = ddim_step(x, guide(eps_null, eps_c, guidance), alpha_bar_t, alpha_bar_prev)
    return x_t


@contextlib.contextmanager
def timed(parts: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that a ``with`` block takes to ``parts[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - start
