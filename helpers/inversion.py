"""Textual inversion: soft tokens, found by gradient descent, that stand in a prompt for pictures without a name.

Only public parts of the text encoder are used: a forward hook on its embedding layer puts the soft tokens where a
prompt holds the placeholder. That is the start mark, which no prompt has behind its first position. Tokenizer and
weights stay as they are.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import losses
from helpers.diffusion import noised, to_latents
from helpers.training import Schedule, predict, run
from helpers.worlds import World


def encode(world: World, prompts: list[str]) -> Tensor:
    """``world.encode`` with gradients: text states that know which embeddings they came from.

    Equal to ``world.encode`` to the bit. Returns (n, tokens, width). ValueError for a prompt that is too long.
    """
    return world.pipe.text_encoder(world.token_ids(prompts).to(world.device)).last_hidden_state


@contextlib.contextmanager
def soft_tokens(world: World, embeddings: Tensor) -> Iterator[str]:
    """Let prompts hold soft tokens inside a ``with`` block.

    ``with soft_tokens(world, v) as soft: sample(world, [f"a picture of a {soft}"], [0])``

    embeddings (n, width), as the embedding layer's rows. Yields the phrase that stands for all n of them in a prompt; a
    prompt without it is read as ever. ValueError for another width, or a prompt with a part of the phrase only.
    Source: Gal et al., An image is worth one word, section 3.
    """
    layer = world.pipe.text_encoder.get_input_embeddings()
    if embeddings.ndim != 2 or embeddings.shape[1] != layer.embedding_dim:
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)}: this text encoder wants (n, {layer.embedding_dim})"
        )
    mark, mark_id, n = world.pipe.tokenizer.bos_token, world.pipe.tokenizer.bos_token_id, len(embeddings)

    def replace(module, args, output: Tensor) -> Tensor:
        places = args[0] == mark_id  # (b, tokens)
        places[:, 0] = False  # the true start of the prompt
        counts = places.sum(1)
        if not torch.isin(counts, torch.tensor([0, n], device=counts.device)).all():
            raise ValueError(
                f"prompts hold {counts.tolist()} placeholders: write the phrase of {n} once, or not at all"
            )
        rows = embeddings.to(output).repeat(int((counts > 0).sum()), 1)
        return output.masked_scatter(places[..., None], rows)  # filled in reading order; gradients reach the embeddings

    handle = layer.register_forward_hook(replace)
    try:
        yield mark * n
    finally:
        handle.remove()


def first_guess(world: World, tokens: int, start: str | None, seed: int) -> Tensor:
    """Where an inversion starts: the rows of the words ``start``, then random directions as long as a usual row.

    Returns (tokens, width), fp32. Source: Forget-Me-Not's release: its four tokens start at a name and two random rows.
    """
    table = world.pipe.text_encoder.get_input_embeddings().weight.detach().float().cpu()
    noise = torch.randn(tokens, table.shape[1], generator=torch.Generator().manual_seed(seed))
    guess = F.normalize(noise, dim=1) * usual_norm(world)
    ids = world.pipe.tokenizer(start, add_special_tokens=False).input_ids[:tokens] if start else []
    guess[: len(ids)] = table[ids]
    return guess


def usual_norm(world: World) -> float:
    """The mean length of the embedding layer's rows: about 0.4 in Stable Diffusion 1.x, the constant of the release."""
    return world.pipe.text_encoder.get_input_embeddings().weight.detach().float().norm(dim=1).mean().item()


def pulled(embeddings: Tensor, norm: float, pull: float) -> Tensor:
    """Norm control: each row's length moves a share of the way to ``norm``, its direction stays.

    v <- v / |v| * (|v| + pull * (norm - |v|))

    embeddings (n, width) -> the same shape; pull 0 leaves them alone, 1 sets the length.
    Source: Forget-Me-Not's release.
    """
    length = embeddings.norm(dim=1, keepdim=True)
    return F.normalize(embeddings, dim=1) * (length + pull * (norm - length))


def invert(
    world: World, images: Tensor, *, tokens: int = 1, start: str | None = "picture",
    template: str = "a picture of a {c}", edit=None, steps: int = 60, lr: float = 1e-2, batch_size: int = 4,
    pull: float = 0.1, seed: int = 0, progress: bool = True,
) -> tuple[Tensor, list[dict]]:  # fmt: skip
    """Find the soft tokens under which the model denoises reference pictures best; nothing else is trained.

    v* = argmin_v E || eps - eps_theta(x_t, c(v), t) ||^2, with the length of v pulled to the usual one after each step

    images (k, 3, H, W) in [0, 1], inverted together; template: the prompt, with {c} where the tokens stand; start: a
    word to start from (a neutral one by default), None for random rows (``first_guess``); edit: an ``Edit`` applied
    meanwhile, so that an edited model can be inverted. The release takes 4 tokens, 500 steps of one picture at 1e-3,
    AdamW (its decay is lost beside the norm control).
    Returns the embeddings (tokens, width), fp32 on the CPU, and the history of ``training.run``.
    ValueError for no picture, pictures of another size, no token, or a template without {c}.
    Source: Gal et al., An image is worth one word, Eq. 2; norm control: Forget-Me-Not's release.
    """
    wanted = (3, world.image_size, world.image_size)
    if len(images) < 1 or images.shape[1:] != wanted:
        raise ValueError(f"reference pictures of shape {tuple(images.shape)}: give at least one of shape {wanted}")
    if tokens < 1 or "{c}" not in template:
        raise ValueError(f"{tokens} tokens in {template!r}: want at least one, and {{c}} where they stand")
    latents = torch.cat([to_latents(world, part) for part in images.split(16)]).float()
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
    norm = usual_norm(world)
    soft = first_guess(world, tokens, start, seed).to(world.device).requires_grad_(True)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        if step:  # the update before this one has changed the lengths
            with torch.no_grad():
                soft.copy_(pulled(soft, norm, pull))
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        x_t, t, noise = noised(latents[pick], alpha_bar, generator)
        with soft_tokens(world, soft) as phrase:
            states = encode(world, [template.format(c=phrase)])  # (1, tokens, width)
        eps_hat = predict(world.unet, {}, x_t, t, states.expand(batch_size, -1, -1))
        return {"reconstruction": losses.reconstruction(eps_hat, noise)}

    schedule = Schedule(steps=steps, lr=lr, batch_size=batch_size, decay="constant", seed=seed)
    with world.applied(edit) if edit is not None else contextlib.nullcontext():
        history = run({"soft": soft}, terms, {"reconstruction": 1.0}, schedule, progress=progress)
    found = pulled(soft.detach(), norm, pull) if steps else soft.detach()
    return found.cpu(), history
