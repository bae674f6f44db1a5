"""AdvUnlearn: the text encoder unlearns a prompt under attack (Zhang et al.).

    min_phi  mean || eps(x_t, E([d*; c])) - [eps_null - eta (eps_c - eps_null)] ||^2
             + retain mean || eps(x_t, E(c_r)) - eps*(x_t, c_r) ||^2
    d*    =  argmin_d mean || eps(x_t, E([d; c])) - eps*(x_t, c) ||^2

E is the edited encoder; eps*, eps_null and eps_c are the base's; d are soft tokens before the
concept's prompt. The UNet stays as it is.

Fidelity: both objectives, warm-up without an attack, ``mode`` and signed steps are the paper's and
its release's. Our reading: x_t is drawn once a step, for attack and defence (the release draws it
anew for each step of the attack); retained x_t are noised images of the retained names, where the
release samples them; the attacker's gradient is cleared (the release's adds up). Steps, rates and
``retain`` are the first that worked on one concept: no rule has chosen them yet.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.denoise import encode, guided_pair, predict, rollout
from helpers.diffusion import noised
from helpers.images import retain_latents
from helpers.inversion import first_guess, soft_tokens
from helpers.options import Count, Positive, Seed, Weight, Whole
from helpers.parameters import Dense, Part, text_names
from helpers.training import Problem, Training
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of AdvUnlearn, each default with its reason."""

    group: Part = "all"  # of the text encoder: the paper trains all of it, or some layers
    eta: float = 1.0  # strength of the negated guidance: the paper's
    retain: Weight = 1.0  # weight of the retain loss; the paper: 0.3
    # the two losses added in each step, or ("iter") taken in turn
    mode: Literal["reg", "iter"] = "reg"
    retain_batch: Count = 5  # names a step: the paper
    tokens: Count = 1  # adversarial ones, before the prompt: the paper
    attack_steps: Whole = 5  # the paper's 30 would take minutes
    attack_lr: Positive = 1e-2  # the paper's 1e-3, for a sixth of the steps
    attack: Literal["adam", "sign"] = "adam"  # "sign": one signed step a time, the fast variant
    warm_up: Whole = 8  # steps without an attack: the paper's fifth
    guidance: float = 3.0  # of the rollout: the paper
    rollout_steps: Count = 5  # as ESD's here
    steps: Whole = 40  # the paper's 1000
    lr: Positive = 1e-4  # the paper's 1e-5, for a twenty-fifth of the steps
    batch_size: Count = 2
    decay: Literal["constant", "cosine"] = "cosine"
    clip: Positive | None = 1.0


@dataclass
class Attacker:
    """Who looks for the soft tokens under which the edited encoder still names the concept."""

    world: World
    options: Options

    def reads(self, prompts: list[str], soft: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """E([d; c]) with the encoder as it stands: (b, tokens, width)."""
        with soft_tokens(self.world, soft) as phrase:
            return encode(self.world, [f"{phrase} {prompt}" for prompt in prompts], leaves)

    def loss(
        self, prompts: list[str], soft: Tensor, leaves: dict[str, Tensor], x_t: Tensor, t: Tensor,
        eps_c: Tensor,
    ) -> Tensor:  # fmt: skip
        """mean || eps(x_t, E([d; c])) - eps*(x_t, c) ||^2."""
        states = self.reads(prompts, soft, leaves)
        return losses.alignment(predict(self.world, {}, x_t, t, states), eps_c)

    def search(
        self, prompts: list[str], leaves: dict[str, Tensor], x_t: Tensor, t: Tensor, eps_c: Tensor,
        seed: Seed,
    ) -> Tensor:  # fmt: skip
        """d*, (tokens, width), from random rows of the usual norm on."""
        frozen = {name: leaf.detach() for name, leaf in leaves.items()}
        soft = first_guess(self.world, self.options.tokens, None, seed).to(self.world.device)
        soft.requires_grad_(True)
        optimizer = torch.optim.Adam([soft], lr=self.options.attack_lr)
        for _ in range(self.options.attack_steps):
            (gradient,) = torch.autograd.grad(self.loss(prompts, soft, frozen, x_t, t, eps_c), soft)
            soft.grad = gradient.sign() if self.options.attack == "sign" else gradient
            optimizer.step()
        return soft.detach()


class Defender:
    """The two losses of the encoder: what is asked for under attack, and what is to be kept."""

    def __init__(self, world: World, concepts: list[str], options: Options):
        self.world, self.concepts, self.options = world, concepts, options
        self.states, self.null = world.encode(concepts).float(), world.encode([""]).float()
        self.latents, self.names = retain_latents(world, concepts)
        self.attacker, self.timings = Attacker(world, options), {"rollout": 0.0}
        dense = Dense(world, "text").leaves
        self.leaves = {name: dense[name] for name in text_names(world, options.group)}

    def drawn(self, generator: torch.Generator) -> tuple[list[int], Tensor, Tensor]:
        """Which concepts, and x_t sampled under their prompts down to random t."""
        world, options = self.world, self.options
        pick = torch.randint(len(self.concepts), (options.batch_size,), generator=generator)
        t = torch.randint(len(world.alpha_bar), pick.shape, generator=generator).to(world.device)
        x_T = torch.randn((len(pick), *world.latent_shape), generator=generator).to(world.device)
        how = {"steps": options.rollout_steps, "guidance": options.guidance}
        start, states = time.perf_counter(), self.states[pick.to(world.device)]
        x_t = rollout(world, {}, x_T, t, states, self.null, **how)
        self.timings["rollout"] += time.perf_counter() - start
        return pick.tolist(), x_t, t

    def erase(self, step: int, generator: torch.Generator) -> Tensor:
        """ESD's loss, with adversarial tokens before the prompt once the warm-up is over."""
        pick, x_t, t = self.drawn(generator)
        seed = torch.randint(2**31, (1,), generator=generator).item()
        with torch.no_grad():
            pair = guided_pair(self.world, {}, x_t, t, self.states[pick], self.null)
        prompts = [self.concepts[i] for i in pick]
        if step < self.options.warm_up or self.options.attack_steps == 0:
            c = encode(self.world, prompts, self.leaves)
        else:
            soft = self.attacker.search(prompts, self.leaves, x_t, t, pair[1], seed)
            c = self.attacker.reads(prompts, soft, self.leaves)
        target = losses.negated_guidance(*pair, self.options.eta)
        return losses.alignment(predict(self.world, {}, x_t, t, c), target)

    def hold(self, generator: torch.Generator) -> Tensor:
        """Retained names are to be read as the base reads them."""
        size = (self.options.retain_batch,)
        pick = torch.randint(len(self.names), size, generator=generator).tolist()
        x_t, t, _ = noised(self.latents[pick], self.world.alpha_bar, generator)
        prompts = [self.names[i] for i in pick]
        with torch.no_grad():
            eps = predict(self.world, {}, x_t, t, self.world.encode(prompts).float())
        c = encode(self.world, prompts, self.leaves)
        return losses.alignment(predict(self.world, {}, x_t, t, c), eps)


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """A part of the text encoder trained against the attacker of each step."""
    defender = Defender(world, concepts, options)
    both = options.mode == "reg"

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        found = {}
        if both or step % 2 == 0:
            found["alignment"] = defender.erase(step, generator)
        if both or step % 2 == 1:
            found["retain"] = defender.hold(generator)
        return found

    leaves, weights = defender.leaves, {"alignment": 1.0, "retain": options.retain}
    return Problem(leaves, lambda: leaves, terms, weights, timings=defender.timings)
