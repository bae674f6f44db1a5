"""Sampling: seeded, in batches; image i depends on prompt i and seed i alone."""

import contextlib
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from helpers.attention import find_tokens, zeroed
from helpers.denoise import Sampling, end_of, trajectory
from helpers.diffusion import to_images
from helpers.options import NOT_EMPTY, Seed, made, typed
from helpers.seeds import generator_of
from helpers.worlds import World


@typed(seeds=NOT_EMPTY)
def initial_noise(world: World, seeds: list[Seed]) -> Tensor:
    """x_T for each seed, drawn on the CPU, so that every device starts alike: (n, c, h, w)."""
    shape = world.latent_shape
    generators = [generator_of(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def sampling_of(world: World, options: dict) -> Sampling:
    """The world's ``Sampling``, but for the given options. ValueError for an unknown one."""
    given = {name: value for name, value in options.items() if value is not None}
    return made(Sampling, {**asdict(world.sampling), **given}, "sample")


def checked(
    world: World, prompts: list[str], seeds: list[int], states: Tensor | None, hide
) -> None:
    """ValueError for what cannot be sampled, before any work is done."""
    if len(prompts) == 0:
        raise ValueError("the list of prompts is empty: give at least one")
    if len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt"
        )
    world.token_ids(list(prompts))
    wanted = (len(prompts), world.text_length, world.unet.config.cross_attention_dim)
    if states is not None and states.shape != wanted:
        raise ValueError(
            f"states have shape {tuple(states.shape)}: give {wanted}, one text state a prompt"
        )
    if isinstance(hide, list) and len(hide) != len(prompts):
        raise ValueError(
            f"hide has {len(hide)} rows for {len(prompts)} prompts: give positions for each prompt"
        )


@typed
@torch.no_grad()
def sample(
    world: World, prompts: list[str], seeds: list[Seed], edit=None, *,
    states: Tensor | None = None, hide: str | list[list[int]] | None = None,
    progress: bool = True, **sampling,
) -> Tensor:  # fmt: skip
    """Sample one image for each pair of prompt and seed, with classifier-free guidance.

    eps = eps_null + guidance * (eps_c - eps_null); guidance 1 is the plain conditional model.

    prompts, seeds: lists of one length n. edit: an ``Edit`` applied meanwhile. states: text states
    (n, tokens, width) in place of the prompts' own, for attacks that write no prompt. hide: a
    phrase of the prompts (or the token positions of each) whose cross-attention is zero in the
    conditional pass. sampling: ``steps``, ``guidance``, ``sampler``, ``batch_size``, the world's
    own unless given (``denoise.Sampling``); batches are halved when memory runs out.
    Returns (n, 3, H, W) in [0, 1] on the CPU, fp32. ValueError for an empty list, lists of
    different length, a prompt longer than the text length, states of a wrong shape, or an unknown
    option; FloatingPointError for images that are not finite.
    Source: Ho and Salimans, classifier-free guidance, Eq. 6; ``denoise.trajectory``.
    """
    checked(world, prompts, seeds, states, hide)
    how = sampling_of(world, sampling)
    hidden = find_tokens(world, prompts, hide) if isinstance(hide, str) else hide
    size = how.batch_size or (16 if world.device.type == "cpu" else 32)
    images: list[Tensor] = []
    bar = tqdm(total=len(prompts), desc="sampling", disable=not progress, leave=False)
    with world.applied(edit), bar:
        start = 0
        while start < len(prompts):
            rows = slice(start, start + size)
            given = None if states is None else states[rows]
            try:
                batch = sample_batch(
                    world,
                    prompts[rows],
                    seeds[rows],
                    how,
                    states=given,
                    hidden=hidden and hidden[rows],
                )
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                size //= 2
                continue
            images.append(batch)
            start += len(batch)
            bar.update(len(batch))
    return torch.cat(images)


@typed(prompts=NOT_EMPTY, seeds=NOT_EMPTY)
def sample_each(
    world: World, prompts: list[str], seeds: list[Seed], edit=None, **options
) -> dict[str, Tensor]:
    """Sample every prompt from the same seeds, so that models can be compared noise by noise.

    options: of ``sample``. Returns prompt -> (len(seeds), 3, H, W), in the order of prompts, each
    once. ValueError as ``sample``.
    """
    prompts = list(dict.fromkeys(prompts))
    words = [prompt for prompt in prompts for _ in seeds]
    images = sample(world, words, list(seeds) * len(prompts), edit, **options)
    return dict(zip(prompts, images.split(len(seeds)), strict=True))


def sample_batch(
    world: World, prompts: list[str], seeds: list[int], sampling: Sampling, *,
    states: Tensor | None = None, hidden: list[list[int]] | None = None,
) -> Tensor:  # fmt: skip
    """One batch: the end of its ``trajectory``, decoded. Returns (n, 3, H, W) in [0, 1]."""
    if hidden and world.guards:
        raise ValueError(
            f"{world.guards[0]} may add passes of its own, which hide= does not know: "
            "sample without the one or the other"
        )
    if states is None:
        with world.batch_of(prompts):  # adapters of the text encoder may ask for them
            states = world.encode(prompts)
    states = states.to(world.device)
    x_T = initial_noise(world, seeds).to(world.device)
    guided = sampling.guidance != 1 or bool(world.guards)  # then the batch has two halves
    hide = zeroed(world, hidden, guided=guided) if hidden else contextlib.nullcontext()
    with hide:
        x_0 = end_of(trajectory(world, states.float(), x_T, sampling, prompts=prompts))
    images = to_images(world, x_0)
    if not (x_0.isfinite().all() and images.isfinite().all()):
        raise FloatingPointError(
            f"images of {prompts[0]!r} and its batch are not finite ({world.unet.dtype}, guidance "
            f"{sampling.guidance:g}, edits applied: {world.is_edited:d}): scale the edit down, "
            "lower the guidance, or load the world with dtype=torch.float32"
        )
    return images
