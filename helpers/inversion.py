"""Textual inversion: soft tokens, found by gradient descent, that stand in a prompt for images.

Only public parts of the text encoder are used: a forward hook on its embedding layer puts the soft
tokens where a prompt holds the placeholder. That is the BOS token, which no prompt has behind its
first position. Tokenizer and weights stay as they are.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import losses
from helpers.concepts import filled
from helpers.denoise import encode, predict
from helpers.diffusion import noised, to_latents
from helpers.options import (
    Count,
    Dims,
    Pictures,
    Positive,
    Seed,
    Share,
    Template,
    Whole,
    made,
    typed,
)
from helpers.reader import checked_images
from helpers.seeds import generator_of
from helpers.training import Problem, Training, run
from helpers.worlds import World


@dataclass(frozen=True)
class Inversion(Training):
    """How soft tokens are found, each default with its reason."""

    tokens: Count = 1
    start: str | None = "picture"  # words to start from, neutral by default; None: random rows
    template: Template = "a picture of a {c}"  # the prompt, {c} where the tokens stand
    norm_pull: Share = 0.1  # share of the way to the usual norm, after each step; the release's
    steps: Whole = 60  # the release takes 500 of one image
    lr: Positive = 1e-2  # the release's 1e-3, for a shorter run
    batch_size: Count = 4
    decay: Literal["constant", "cosine"] = "constant"


@typed
@contextlib.contextmanager
def soft_tokens(world: World, embeddings: Tensor) -> Iterator[str]:
    """Let prompts hold soft tokens inside a ``with`` block.

    ``with soft_tokens(world, v) as soft: sample(world, [f"a picture of a {soft}"], [0])``

    embeddings (n, width), as the embedding layer's rows. Yields the phrase that stands for all n of
    them in a prompt; a prompt without it is read as ever. ValueError for another width, or a prompt
    with a part of the phrase only. Source: Gal et al., An image is worth one word, section 3.
    """
    layer = world.pipe.text_encoder.get_input_embeddings()
    if embeddings.ndim != 2 or embeddings.shape[1] != layer.embedding_dim:
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)}: "
            f"this text encoder wants (n, {layer.embedding_dim})"
        )
    tokenizer, n = world.pipe.tokenizer, len(embeddings)

    def insert(module, args, output: Tensor) -> Tensor:
        places = args[0] == tokenizer.bos_token_id  # (b, tokens)
        places[:, 0] = False  # the true start of the prompt
        counts = places.sum(1)
        if not torch.isin(counts, torch.tensor([0, n], device=counts.device)).all():
            raise ValueError(
                f"prompts hold {counts.tolist()} placeholders: "
                f"write the phrase of {n} once, or not at all"
            )
        rows = embeddings.to(output).repeat(int((counts > 0).sum()), 1)
        return output.masked_scatter(places[..., None], rows)  # in reading order, with gradients

    handle = layer.register_forward_hook(insert)
    try:
        yield tokenizer.bos_token * n
    finally:
        handle.remove()


@typed
def first_guess(world: World, tokens: Count, start: str | None, seed: Seed) -> Tensor:
    """Where an inversion starts: the rows of the words ``start``, then random ones of usual norm.

    Returns (tokens, width), fp32.
    Source: Forget-Me-Not's release: its four tokens start at a name and two random rows.
    """
    table = world.pipe.text_encoder.get_input_embeddings().weight.detach().float().cpu()
    noise = torch.randn(tokens, table.shape[1], generator=generator_of(seed))
    guess = F.normalize(noise, dim=1) * usual_norm(world)
    ids = world.pipe.tokenizer(start, add_special_tokens=False).input_ids[:tokens] if start else []
    guess[: len(ids)] = table[ids]
    return guess


@typed
def usual_norm(world: World) -> float:
    """The mean norm of the embedding layer's rows: about 0.4 in Stable Diffusion 1.x."""
    table = world.pipe.text_encoder.get_input_embeddings().weight
    return table.detach().float().norm(dim=1).mean().item()


@typed(embeddings=Dims(2))
def pulled_to_norm(embeddings: Tensor, norm: Positive, pull: Share) -> Tensor:
    """Norm control: each row's norm moves a share of the way to ``norm``, its direction stays.

    v <- v / |v| * (|v| + pull * (norm - |v|))

    embeddings (n, width) -> the same shape; pull 0 leaves them alone, 1 sets the norm.
    Source: Forget-Me-Not's release.
    """
    length = embeddings.norm(dim=1, keepdim=True)
    return F.normalize(embeddings, dim=1) * (length + pull * (norm - length))


@typed
def invert(
    world: World, images: Pictures, *, edit=None, seed: Seed = 0, progress: bool = True, **options
) -> tuple[Tensor, list[dict]]:
    """Find the soft tokens under which the model denoises reference images best.

    v* = argmin_v E || eps - eps_theta(x_t, c(v), t) ||^2, the norm of v pulled to the usual one
    after each step; nothing else is trained.

    images (k, 3, H, W) in [0, 1], inverted together; edit: an ``Edit`` applied meanwhile, so that
    an edited model can be inverted; options: fields of ``Inversion``. The release uses AdamW (its
    decay is lost beside the norm control). Returns the embeddings (tokens, width), fp32 on the CPU,
    and the history of ``training.run``.
    ValueError for no image, images of another size, no token, or a template without {c}.
    Source: Gal et al., An image is worth one word, Eq. 2; norm control: Forget-Me-Not's release.
    """
    chosen = made(Inversion, options, "invert")
    checked_images(images, "reference images", size=world.image_size)
    latents, norm = to_latents(world, images).float(), usual_norm(world)
    soft = first_guess(world, chosen.tokens, chosen.start, seed)
    soft = soft.to(world.device).requires_grad_(True)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (chosen.batch_size,), generator=generator)
        x_t, t, noise = noised(latents[pick], world.alpha_bar, generator)
        with soft_tokens(world, soft) as phrase:
            states = encode(world, [filled(chosen.template, phrase)])  # (1, tokens, width)
        eps_hat = predict(world, {}, x_t, t, states.expand(chosen.batch_size, -1, -1))
        return {"reconstruction": losses.reconstruction(eps_hat, noise)}

    @torch.no_grad()
    def pull(done: int) -> None:
        soft.copy_(pulled_to_norm(soft, norm, chosen.norm_pull))

    found = Problem({"soft": soft}, dict, terms, {"reconstruction": 1.0}, after_step=pull)
    with world.applied(edit):
        history = run(found, chosen, seed=seed, progress=progress)
    return soft.detach().cpu().clone(), history
