"""Seeded, batched drawing: picture i depends on prompt i and seed i alone."""

import contextlib

import torch
from torch import Tensor
from tqdm.auto import tqdm

from helpers.attention import find_tokens, zeroed
from helpers.worlds import World


def initial_noise(world: World, seeds: list[int]) -> Tensor:
    """x_T for each seed, drawn on the CPU so that every device starts from the same noise: (n, c, h, w)."""
    noise = [torch.randn(world.latent_shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(noise)


@torch.no_grad()
def sample(
    world: World,
    prompts: list[str],
    seeds: list[int],
    edit=None,
    steps: int = 25,
    guidance: float = 5.0,
    *,
    zero: str | None = None,
    states: Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Draw one picture for each pair of prompt and seed, by DDIM with classifier-free guidance.

    eps = eps_null + guidance * (eps_c - eps_null); guidance 1 is the plain conditional model.

    prompts, seeds: lists of one length n. edit: an ``Edit`` applied while drawing. zero: a phrase of the prompts whose
    tokens get no cross-attention in the conditional pass. states: text states (n, tokens, width) to draw from in place
    of the prompts' own, for attacks that write no prompt. batch_size: pictures at once (default 16 on a CPU, 32 on a
    GPU; halved when memory runs out). Returns (n, 3, H, W) in [0, 1] on the CPU, fp32.
    ValueError for an empty list, lists of different length, a prompt longer than the text length, or states of a wrong
    shape. Source: Song et al., DDIM, Eq. 12 (eta = 0); Ho and Salimans, classifier-free guidance, Eq. 6.
    """
    if isinstance(prompts, str) or isinstance(seeds, int):
        raise ValueError("prompts and seeds are lists of one length: write sample(world, ['church'], [0])")
    prompts, seeds = list(prompts), list(seeds)
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    if steps < 1:
        raise ValueError(f"steps is {steps}: give at least 1")
    world.token_ids(prompts)
    wanted = (len(prompts), world.text_length, world.unet.config.cross_attention_dim)
    if states is not None and states.shape != wanted:
        raise ValueError(f"states have shape {tuple(states.shape)}: give {wanted}, one text state for each prompt")
    columns = find_tokens(world, prompts, zero) if zero else None
    batch_size = batch_size or (16 if world.device.type == "cpu" else 32)

    images: list[Tensor] = []
    with world.applied(edit) if edit is not None else contextlib.nullcontext(), tqdm(
        total=len(prompts), desc="drawing", disable=not progress, leave=False
    ) as bar:  # fmt: skip
        start = 0
        while start < len(prompts):
            part = slice(start, start + batch_size)
            try:
                hidden, given = columns and columns[part], None if states is None else states[part]
                drawn = draw_batch(world, prompts[part], seeds[part], steps, guidance, hidden, given)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                torch.cuda.empty_cache()
                batch_size = batch_size // 2
                continue
            images.append(drawn.float().cpu())
            start += len(drawn)
            bar.update(len(drawn))
    return torch.cat(images)


def draw_batch(
    world: World, prompts: list[str], seeds: list[int], steps: int, guidance: float, columns: list | None,
    states: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One batch through the diffusers pipeline: (n, 3, H, W) in [0, 1]."""
    dtype, device = world.pipe.unet.dtype, world.device
    hide = zeroed(world, columns, guided=guidance > 1) if columns else contextlib.nullcontext()
    with hide:
        return world.pipe(
            prompt_embeds=world.encode(prompts) if states is None else states.to(device, dtype),
            negative_prompt_embeds=world.encode([""]).expand(len(prompts), -1, -1),
            latents=initial_noise(world, seeds).to(device, dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
