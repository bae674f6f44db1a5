"""G-CiRs: generate concept-irrelevant representations, by driving the correlation with the base's own prediction to zero.

Objective: L = sum_i eta_i L_cor(c_i) + lam ||delta||_1 / M (SepME, Eq. 2 and 3), stopped by the momentum statistic of Eq. 4.
Fidelity: ``eta="tensor-norm"`` is what the release of SepME computes, ``"scalar"`` the printed ratio; both are detached, since
the printed one gives concepts 2..N no gradient otherwise. ``variant="code-jan"`` and ``"code-head"`` are the two states of the
release (January and April 2024; ``VARIANTS`` says what each changes), for study. Our reading: each concept has its own tau and its own statistic (the
tables give a tau for each concept; the release stops each on its own), and the test comes after the update, as released.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from helpers import losses
from helpers.diffusion import noised
from helpers.edits import Edit
from helpers.rollouts import branches
from helpers.training import BARE, Schedule, Training, concept_latents, finished, new_increments, run
from helpers.worlds import World

VARIANTS = {  # what the release does otherwise than the paper says: fields of the options
    "paper": {},
    "code-jan": {"accumulate_grads": True},  # its loops never clear a gradient
    "code-head": {"accumulate_grads": True},
}


@dataclass(frozen=True)
class Options(Training):
    """Options of G-CiRs, each default with its reason."""

    variants: ClassVar[dict[str, dict]] = VARIANTS

    # stop below it; one for all concepts, or one for each. The paper's default, 0, leaves "church" to be told in half of
    # the emoji world's pictures: what the prompt adds no longer agrees with what it added, and still draws a church
    tau: float | tuple[float, ...] = -2e-3
    lam: float = 3e-5  # weight of ||delta||_1 / M: the paper's
    eta: str = "tensor-norm"  # balance of several concepts: "tensor-norm" (release) or "scalar" (paper)
    group: str = "xattn"  # all of cross-attention, as the paper trains
    images: str | int = 16  # a folder of the user's pictures, or how many the base model draws
    steps: int = 200  # at most; the statistic stops earlier
    lr: float = 3e-4  # the paper's 1e-6 is for a network a hundred times as large
    batch_size: int = 4  # pictures of each concept a step; the paper uses one
    draws: int | None = None  # so many (picture, noise, t) in all, the base's side kept; None: always fresh
    momentum: float = 0.9  # alpha: the paper's
    min_steps: int = 12  # updates before a stop: the release's
    decay: str = "constant"  # the paper's
    clip: float | None = None  # the paper clips nothing
    variant: str = "paper"  # "code-jan" or "code-head" set what the release does otherwise, whatever was given

    def __post_init__(self):
        if self.variant not in self.variants:
            raise ValueError(f"unknown variant {self.variant!r}: choose from {', '.join(self.variants)}")
        for name, value in self.variants[self.variant].items():
            object.__setattr__(self, name, value)
        super().__post_init__()
        if self.lam < 0:
            raise ValueError(f"lam is {self.lam}: the weight of a loss term is not negative")
        if self.eta not in ("tensor-norm", "scalar"):
            raise ValueError(f"unknown eta {self.eta!r}: choose 'tensor-norm' or 'scalar'")
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"draws is {self.draws}: give at least one, or None for a fresh one at every step")

    def taus(self, concepts: list[str]) -> tuple[float, ...]:
        """One tau for each concept."""
        taus = self.tau if isinstance(self.tau, tuple) else (self.tau,) * len(concepts)
        if len(taus) != len(concepts):
            raise ValueError(f"{len(taus)} values of tau for {len(concepts)} concepts: give one, or one for each")
        return taus

    def until_forgotten(self, concepts: list[str], seed: int) -> Schedule:
        """The schedule that lets each concept's term stop below its own tau."""
        below = {term(c): tau for c, tau in zip(concepts, self.taus(concepts), strict=True)}
        return self.schedule(seed, stop_below=below, momentum=self.momentum, min_steps=self.min_steps)


def term(concept: str) -> str:
    """The name of a concept's correlation in the history."""
    return f"correlation of {concept}"


def delta_eps(unet, increments: dict[str, Tensor], x_t: Tensor, t: Tensor, c: Tensor, null: Tensor) -> Tensor:
    """Delta_eps(c) = eps(x_t, c, t) - eps(x_t, null, t), both in one batch: what the prompt adds to the prediction.

    x_t (b, ch, h, w), t (b,), c and null (tokens, width). Returns (b, ch, h, w). Source: SepME, Eq. 2.
    """
    eps_null, eps_c = branches(unet, increments, x_t, t, c.expand(len(x_t), -1, -1), null[None])
    return eps_c - eps_null


class Correlations:
    """Loss terms of each concept by name: the same pictures, noise and times through the base and the edited network.

    The base is the same network without increments. With ``draws``, the base's side of each draw is computed once.
    """

    def __init__(self, world: World, concepts: list[str], options: Options, seed: int):
        self.world, self.concepts, self.options, self.seed = world, concepts, options, seed
        latents = concept_latents(world, concepts, options.images, seed, templates=BARE)[0]
        self.latents = dict(zip(concepts, latents.chunk(len(concepts)), strict=True))
        *states, self.null = world.encode([*concepts, ""]).float()
        self.states = dict(zip(concepts, states, strict=True))
        self.alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
        self.kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def noised(self, concept: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x_t and t for n pictures of a concept, and the base's Delta_eps there."""
        x_0 = self.latents[concept]
        pick = torch.randint(len(x_0), (n,), generator=generator)
        x_t, t, _ = noised(x_0[pick], self.alpha_bar, generator)
        c = self.states[concept]
        with torch.no_grad():
            parts = zip(x_t.split(16), t.split(16), strict=True)
            return x_t, t, torch.cat([delta_eps(self.world.unet, {}, *part, c, self.null) for part in parts])

    def draw(self, concept: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One step's batch of ``noised``: fresh, or out of the concept's fixed ``draws``."""
        n, draws = self.options.batch_size, self.options.draws
        if draws is None:
            return self.noised(concept, n, generator)
        if concept not in self.kept:
            fixed = torch.Generator().manual_seed(self.seed)
            self.kept[concept] = self.noised(concept, draws, fixed)
        pick = torch.randint(draws, (n,), generator=generator)
        return tuple(value[pick] for value in self.kept[concept])

    def __call__(
        self, generator: torch.Generator, stopped: frozenset, increments: Callable[[str], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """L_cor of every concept that has not stopped, under its increments; its gradient is eta_i times its own."""
        values, first = {}, None
        for concept in self.concepts:
            seed = torch.randint(
                2**31, (1,), generator=generator
            ).item()  # for stopped ones too: the rest sees no change
            if term(concept) in stopped:
                continue
            x_t, t, base = self.draw(concept, torch.Generator().manual_seed(seed))
            edited = delta_eps(self.world.unet, increments(concept), x_t, t, self.states[concept], self.null)
            product = (base * edited).detach()
            first = product if first is None else first
            eta = losses.balance(first, product, variant=self.options.eta)
            value = losses.correlation(base, edited)
            values[term(concept)] = value.detach() + eta * (value - value.detach())  # value L_cor, gradient eta L_cor
        return values


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train cross-attention until what each concept adds to the prediction no longer agrees with what the base adds."""
    start = time.time()
    delta = new_increments(world.unet, options.group)
    schedule = options.until_forgotten(concepts, seed)
    correlations = Correlations(world, concepts, options, seed)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        return {**correlations(generator, stopped, lambda concept: delta), "norm": losses.mean_l1(delta)}

    weights = {**{term(concept): 1.0 for concept in concepts}, "norm": options.lam}
    history = run(delta, terms, weights, schedule, progress=progress)
    return finished(world, delta, history, method=method, concepts=concepts, options=options, seed=seed, start=start)
