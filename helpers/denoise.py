"""Denoising: what the network predicts, with increments and guidance, and the way to an image.

The base weights never change: a forward pass uses theta + delta, so the frozen model and the one
that is trained are the same network. A network that predicts velocity is one that predicts noise
from here on: ``predict`` converts its output, once, and everything else sees eps.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import diffusers
import torch
from torch import Tensor
from torch.func import functional_call

from helpers.diffusion import coefficient, ddim_step, guide, noise_of_velocity
from helpers.options import WHOLE, Count, Dims, OneOf, check_options, typed
from helpers.undo import undoing


def dpm_solver(config, **options):
    """DPM-Solver++ of second order, multistep ("2M")."""
    return diffusers.DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, **options
    )


SAMPLERS: dict[str, Callable] = {  # name -> the scheduler of a world's noise schedule
    "ddim": lambda c: diffusers.DDIMScheduler.from_config(c, clip_sample=False),
    "dpm++": lambda c: dpm_solver(c, use_lu_lambdas=True),  # steps even in log SNR: its authors'
    "dpm++ karras": lambda c: dpm_solver(c, use_karras_sigmas=True),
    "euler": diffusers.EulerDiscreteScheduler.from_config,
    "unipc": diffusers.UniPCMultistepScheduler.from_config,
    "pndm": lambda c: diffusers.PNDMScheduler.from_config(c, skip_prk_steps=True),
}


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; a world has a default of its own (``world.sampling``)."""

    steps: Count = 12
    guidance: float = 5.0  # 1: the plain conditional model
    sampler: Annotated[str, OneOf(SAMPLERS)] = "dpm++"  # DPM-Solver++ 2M; see ``SAMPLERS``
    batch_size: Count | None = None  # images at once; None: 16 on a CPU, 32 on a GPU

    def __post_init__(self):
        check_options(self)

    def scheduler(self, world):
        """A fresh diffusers scheduler for the world's noise schedule, its timesteps set.

        It is fed noise, whatever the network predicts. ValueError for more steps than timesteps.
        """
        length = len(world.alpha_bar)
        if self.steps > length:
            raise ValueError(f"steps is {self.steps}: the schedule has {length}, give 1 to it")
        config = {**world.pipe.scheduler.config, "prediction_type": "epsilon"}
        scheduler = SAMPLERS[self.sampler](config)
        scheduler.set_timesteps(self.steps, device=world.device)
        if scheduler.timesteps.max() >= length:  # the offset leads beyond the last timestep
            scheduler = SAMPLERS[self.sampler]({**config, "steps_offset": 0})
            scheduler.set_timesteps(self.steps, device=world.device)
        return scheduler


def of_part(delta: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The increments of one part of the pipeline, by the part's own parameter names.

    ``of_part({"unet.conv_in.bias": v}, "unet")`` is ``{"conv_in.bias": v}``.
    """
    prefix = part + "."
    return {n.removeprefix(prefix): v for n, v in delta.items() if n.startswith(prefix)}


def merged(module: torch.nn.Module, increments: dict[str, Tensor]) -> dict[str, Tensor]:
    """theta + delta for the named parameters: summed in fp32, cast to the network's type last."""
    base = dict(module.named_parameters())
    return {n: (base[n].float() + d).to(base[n].dtype) for n, d in increments.items()}


def recorded(layer: torch.nn.Module) -> bool:
    """Whether a block's passes are watched, by a hook or by a processor that is not diffusers'."""
    return any(
        module._forward_hooks
        or not type(getattr(module, "processor", None)).__module__.startswith(("diff", "builtins"))
        for module in layer.modules()
    )


@contextlib.contextmanager
def recomputing(network: torch.nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Gradient checkpointing that finds the increments again.

    A block that is run once more in the backward pass would meet the base weights, since
    ``functional_call`` has put them back by then. So each block takes its own of ``weights`` along.
    A block whose attention is recorded runs as it is: its maps are kept anyway, and once.
    """
    blocks = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False)]
    if not blocks or not torch.is_grad_enabled():
        yield
        return
    names = {module: name for name, module in network.named_modules()}
    before = [(block, block._gradient_checkpointing_func) for block in blocks]

    def undo() -> None:
        for block, function in before:
            block._gradient_checkpointing_func = function

    def carrying(function: Callable) -> Callable:
        def checkpoint(layer, *args):
            if layer not in names or recorded(layer):
                return layer(*args)
            prefix = names[layer] + "."
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            return function(Carried(layer, own), *args)

        return checkpoint

    with undoing(undo):
        for block, function in before:
            block._gradient_checkpointing_func = carrying(function)
        yield


@dataclass
class Carried:
    """A block together with the weights that it runs with."""

    layer: torch.nn.Module
    weights: dict[str, Tensor]

    def __call__(self, *args):
        return functional_call(self.layer, self.weights, args)


def called(network: torch.nn.Module, weights: dict[str, Tensor], inputs: tuple):
    """The network's output with some weights replaced; its own are back even after a Ctrl-C."""
    parameters = dict(network.named_parameters())
    own = [(*split_name(network, name), parameters[name]) for name in weights]

    def undo() -> None:
        for owner, leaf, parameter in own:
            if owner._parameters.get(leaf) is not parameter:
                owner._parameters[leaf] = parameter

    with undoing(undo), recomputing(network, weights):
        return functional_call(network, weights, inputs)


def split_name(network: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter, and the parameter's name there."""
    owner, _, leaf = name.rpartition(".")
    return network.get_submodule(owner), leaf


@typed(x_t=Dims(4), t=Dims(0, 1), states=Dims(3), same_rows="x_t t states")
def predict(world, delta: dict[str, Tensor], x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """eps_{theta + delta}(x_t, c, t): the noise that the UNet with the increments predicts.

    Gradients reach the increments. x_t (b, c, h, w), t (b,), states (b, tokens, width) ->
    (b, c, h, w), fp32. An empty ``delta`` is the base model. The output of a network that predicts
    velocity is converted here, and nowhere else (``diffusion.noise_of_velocity``).
    """
    with world.lock:
        unet = world.unet
        if x_t.shape[1] != unet.config.in_channels:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}: give {unet.config.in_channels} channels"
            )
        weights = merged(unet, of_part(delta, "unet"))
        inputs = (x_t.to(unet.dtype), t, states.to(unet.dtype))
        output = called(unet, weights, inputs).sample.float()
    if world.pipe.scheduler.config.prediction_type == "v_prediction":
        return noise_of_velocity(output, x_t, t, world.alpha_bar)
    return output


def encode(world, prompts: list[str], delta: dict[str, Tensor] | None = None) -> Tensor:
    """``world.encode`` with gradients: text states of the text encoder with the increments.

    Without increments equal to ``world.encode`` to the bit. Returns (n, tokens, width).
    ValueError for a prompt that is too long.
    """
    encoder = world.part("text_encoder")
    weights = merged(encoder, of_part(delta or {}, "text_encoder"))
    ids = world.token_ids(prompts).to(world.device)
    with world.lock:
        return called(encoder, weights, (ids,)).last_hidden_state


def guided_pair(
    world, delta: dict[str, Tensor], x_t: Tensor, t: Tensor, states: Tensor, null: Tensor
) -> tuple[Tensor, Tensor]:
    """eps_null and eps_c of the same x_t, by one pass of twice the batch.

    x_t (b, c, h, w), t (b,), states (b, tokens, width), null (1, tokens, width).
    Returns two of (b, c, h, w), fp32.
    """
    both = torch.cat([null.expand_as(states), states])  # (2b, tokens, width)
    pair = predict(world, delta, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    eps_null, eps_c = pair.chunk(2)
    return eps_null, eps_c


@torch.no_grad()
def guided(
    world, delta: dict[str, Tensor], x_t: Tensor, t: Tensor, states: Tensor, null: Tensor,
    guidance: float, prompts: list[str] | None = None,
) -> Tensor:  # fmt: skip
    """The noise that one step of sampling removes: guidance, then the world's guards.

    eps = eps_null + guidance (eps_c - eps_null); guidance 1 without guards needs no eps_null.
    prompts: one for each row, which gated adapters ask for. Returns (b, c, h, w).
    """
    if guidance == 1 and not world.guards:
        with world.batch_of(prompts):
            return predict(world, delta, x_t, t, states)
    with world.batch_of(prompts and [""] * len(prompts) + list(prompts)):
        eps_null, eps_c = guided_pair(world, delta, x_t, t, states, null)
    eps = guide(eps_null, eps_c, guidance)
    for guard in world.guards:
        eps = guard.eps(world, x_t, t, eps_null, eps_c, eps)
    return eps


class Walk:
    """A scheduler's own steps, all rows together."""

    def __init__(self, world, sampling: Sampling):
        self.scheduler = sampling.scheduler(world)
        self.timesteps = self.scheduler.timesteps

    def start(self, x_T: Tensor) -> Tensor:
        return x_T * self.scheduler.init_noise_sigma

    def under_way(self, t: Tensor) -> slice | Tensor:
        """Which rows are not there yet at timestep t."""
        return slice(None)

    def step(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.step(eps, t, x_t, return_dict=False)[0]


class Landing(Walk):
    """DDIM steps whose last one, for each row, ends on the row's own timestep.

    The grid is that of ``steps`` DDIM steps over the whole schedule (diffusers' "trailing"). The
    noise level of a row that has arrived is exactly that of its t.
    """

    def __init__(self, world, sampling: Sampling, until: Tensor):
        self.until, self.alpha_bar = until, world.alpha_bar
        length, steps = len(self.alpha_bar), sampling.steps
        if sampling.sampler != "ddim":
            raise ValueError(f"the sampler {sampling.sampler!r} cannot land on a t: use 'ddim'")
        if not 1 <= steps <= length:
            raise ValueError(f"a rollout of {steps} steps: the schedule has {length}, give 1 to it")
        if until.min() < 0 or until.max() >= length:
            raise ValueError(
                f"timesteps run from 0 to {length - 1}, "
                f"and a rollout was asked to end at {until.tolist()}"
            )
        grid = [round(length * (1 - k / steps)) - 1 for k in range(steps)] + [0]
        self.below = dict(itertools.pairwise(grid))
        self.timesteps = torch.tensor(grid[:-1], device=until.device)

    def start(self, x_T: Tensor) -> Tensor:
        return x_T.clone()

    def under_way(self, t: Tensor) -> Tensor:
        return self.until < t

    def step(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        rows = self.under_way(t)
        level, x = int(t), x_t[rows]
        ends = self.until[rows].clamp(min=self.below[level])
        a, a_prev = (coefficient(self.alpha_bar, k, x) for k in (level, ends))
        x_t = x_t.clone()
        x_t[rows] = ddim_step(x, eps, a, a_prev)
        return x_t


def of_rows(prompts: list[str] | None, rows: slice | Tensor) -> list[str] | None:
    """The prompts of the rows that are under way."""
    if prompts is None or isinstance(rows, slice):
        return prompts
    return [prompt for prompt, here in zip(prompts, rows.tolist(), strict=True) if here]


def trajectory(
    world, states: Tensor, x_T: Tensor, sampling: Sampling, *, null: Tensor | None = None,
    delta: dict[str, Tensor] | None = None, prompts: list[str] | None = None,
    until: Tensor | None = None,
) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None]]:  # fmt: skip
    """Every step from noise to latents: yields (t, x_t, eps) before each, then (None, x_end, None).

    x_T = noise, then x_prev = step(x_t, eps_null + guidance (eps_c - eps_null)) down to the end.

    states (b, tokens, width); x_T (b, c, h, w); null: text states of the empty prompt, (1, tokens,
    width), encoded here by default; delta: increments to predict with (default none); prompts: one
    for each row, which gated adapters and guards ask for. until (b,): timesteps at which the rows
    end (sampler "ddim" only); a row that has arrived leaves the batch, and eps holds the others.
    x_t is scaled as the sampler keeps it (with "euler": x_0 + sigma noise).
    The world's guards act on states, x_t and eps.
    Source: Song et al., DDIM, Eq. 12; Lu et al., DPM-Solver++, Algorithm 2; diffusers' schedulers.
    """
    if null is None:
        with world.batch_of(prompts and [""]):
            null = world.encode([""]).float()
    for guard in world.guards:
        states = guard.states(world, prompts, states)
    walk = Walk(world, sampling) if until is None else Landing(world, sampling, until)
    x_t = walk.start(x_T)
    for t in walk.timesteps:
        rows = walk.under_way(t)
        x, c = x_t[rows], states[rows]
        if len(x) == 0:
            break
        for guard in world.guards:
            x = guard.latents(world, x, t, c)
        ts, said = t.expand(len(x)), of_rows(prompts, rows)
        fed = walk.scheduler.scale_model_input(x, t) if until is None else x
        eps = guided(world, delta or {}, fed, ts, c, null, sampling.guidance, said)
        if world.guards:
            x_t = x_t.clone()
            x_t[rows] = x
        yield t, x_t, eps
        x_t = walk.step(x_t, eps, t)
    yield None, x_t, None


def end_of(steps: Iterator[tuple]) -> Tensor:
    """The latents at the end of a ``trajectory``; no earlier step stays in memory."""
    return deque(steps, maxlen=1).pop()[1]


@typed(x_T=Dims(4), until=WHOLE, states=Dims(3), null=Dims(3), same_rows="x_T until states")
@torch.no_grad()
def rollout(
    world, delta: dict[str, Tensor], x_T: Tensor, until: Tensor, states: Tensor, null: Tensor, *,
    steps: Count, guidance: float,
) -> Tensor:  # fmt: skip
    """x_t for each row's own t, sampled from noise by guided DDIM with the model theta + delta.

    x_T (b, c, h, w); until (b,) integers, the t; states (b, tokens, width); null (1, tokens,
    width). Returns (b, c, h, w). ValueError for steps or t outside the schedule.
    Source: ESD and SDD, x_t by sampling; Song et al., DDIM, Eq. 12.
    """
    sampling = Sampling(steps, guidance, "ddim")
    return end_of(trajectory(world, states, x_T, sampling, null=null, delta=delta, until=until))
