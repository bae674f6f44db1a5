"""Cross-attention: its layers, recording their probabilities, and hiding tokens from them."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from helpers.concepts import filled
from helpers.options import NOT_EMPTY, Finite, typed

EXECUTION_ORDER = ("down_blocks", "mid_block", "up_blocks")


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, torch.nn.Module]:
    """The cross-attention modules (``attn2``) by name, in the order of a forward pass.

    ``named_modules`` lists ``mid_block`` last, so its order is not used.
    """
    found = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    return dict(
        sorted(found.items(), key=lambda item: EXECUTION_ORDER.index(item[0].split(".")[0]))
    )


@typed(prompts=NOT_EMPTY)
def find_tokens(world, prompts: list[str], phrase: str) -> list[list[int]]:
    """Positions of ``phrase``'s tokens in each prompt, every occurrence.

    ValueError for a phrase without tokens, or a prompt without the phrase.
    """
    wanted = world.word_ids(phrase)
    if not wanted:
        raise ValueError(f"the phrase {phrase!r} has no tokens: give a word of the prompt")
    found = []
    for prompt, row in zip(prompts, world.token_ids(prompts).tolist(), strict=True):
        starts = [i for i in range(1, len(row)) if row[i : i + len(wanted)] == wanted]  # not BOS
        if not starts:
            raise ValueError(
                f"the prompt {prompt!r} does not hold {phrase!r}: "
                "give a phrase whose tokens appear in it, in order"
            )
        found.append(sorted({i + k for i in starts for k in range(len(wanted))}))
    return found


def name_tokens(world, template: str, name: str) -> list[int]:
    """Positions of a name's tokens in the filled template, only where the template puts the name.

    "a picture of a {c}" holds the word "picture" before the concept "picture" does. ValueError for
    a name without tokens, or one whose tokens melt into the words beside it.
    """
    everywhere = find_tokens(world, [filled(template, name)], name)[0]
    parts = template.split("{c}")
    before = [name.join(parts[:k]) for k in range(1, len(parts))]  # the text to the left of each
    starts, n = [1 + len(world.word_ids(text)) for text in before], len(world.word_ids(name))
    places = [start + i for start in starts for i in range(n)]
    return places if set(places) <= set(everywhere) else everywhere


@typed(prompts=NOT_EMPTY, same_rows="prompts templates")
def concept_mask(
    world, prompts: list[str], phrase: str, *, end: bool, templates: list[str] | None = None
) -> Tensor:
    """Which positions of each prompt hold the phrase's tokens; with ``end`` EOS and padding too.

    templates: what each prompt was filled from, where only the phrase's own places count. Returns
    (n, tokens), bool. The phrase may stand elsewhere in each prompt, so a batch needs one
    row for each image. (The release repeats the rows in another order than its heads, which is
    right for its batches of one only.) ValueError for a prompt without the phrase.
    """
    ids = world.token_ids(prompts)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    if templates is None:
        found = find_tokens(world, prompts, phrase)
    else:
        found = [name_tokens(world, template, phrase) for template in templates]
    for row, positions in zip(mask, found, strict=True):
        row[positions] = True
    mask[:, 0] = False  # BOS, which soft tokens borrow as their placeholder
    if end:
        mask |= (ids == world.pipe.tokenizer.eos_token_id).cumsum(1) > 0
    return mask


@typed
def token_roles(world, prompt: str) -> list[str]:
    """What is at each position: 'BOS', the prompt's tokens, 'EOS', then 'padding' (EOS again)."""
    tokenizer = world.pipe.tokenizer
    length = len(world.word_ids(prompt))
    words = tokenizer.convert_ids_to_tokens(world.token_ids([prompt])[0, 1 : 1 + length].tolist())
    words = [word.replace("</w>", "") for word in words]
    return ["BOS", *words, "EOS", *["padding"] * (world.text_length - length - 2)]


class AttentionProcessor:
    """Attention written out, to record its probabilities, weight them, or differentiate them.

    A = softmax(q k^T / sqrt(d)),  out = (A * weight) v,  q from the image and k, v from the text

    hidden_states (b, pixels, width), text states (b, tokens, text width);
    A (b, heads, pixels, tokens). ``on_probabilities(A)`` is called with A; ``weight`` (b, tokens)
    multiplies columns of A.
    Source: Vaswani et al., Attention is all you need, Eq. 1; Rombach et al., Latent diffusion,
    section 3.3.
    """

    def __init__(self, on_probabilities=None, weight: Tensor | None = None):
        self.on_probabilities, self.weight = on_probabilities, weight

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (  # (b, heads, n, d)
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v)
        )
        if attn.upcast_attention:  # Stable Diffusion 2.1, whose logits overflow in half precision
            q, k = q.float(), k.float()
        A = (q * attn.scale @ k.transpose(-1, -2)).softmax(-1).to(v)  # (b, heads, pixels, tokens)
        if self.on_probabilities is not None:
            self.on_probabilities(A)
        if self.weight is not None:
            A = A * self.weight.to(A)[:, None, None, :].expand_as(A)  # one row for each prompt
        out = (A @ v).transpose(1, 2).flatten(2)  # (b, pixels, width)
        return attn.to_out[1](attn.to_out[0](out))


@typed
@contextlib.contextmanager
def processors(
    unet: UNet2DConditionModel, make: Callable, layers: list[str] | None = None
) -> Iterator[None]:
    """Use ``make(name)`` as the processor of cross-attention layers inside a ``with`` block.

    layers: names, default all. ValueError for a layer that does not exist or an empty selection.
    RuntimeError inside another such block: the inner processors would replace the outer ones, and
    the outer block would silently record nothing, or hide nothing.
    """
    known = cross_attentions(unet)
    chosen = list(known) if layers is None else list(layers)
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        wrong = (
            f"no cross-attention layer is named {unknown}"
            if unknown
            else "the list of layers is empty"
        )
        raise ValueError(f"{wrong}: choose from {', '.join(known)}")
    before = {name: known[name].processor for name in chosen}
    taken = [
        name for name, processor in before.items() if isinstance(processor, AttentionProcessor)
    ]
    if taken:
        raise RuntimeError(
            f"{taken[0]} is hooked already: leave the first `with` block before you enter another"
        )
    try:
        for name in chosen:
            known[name].set_processor(make(name))
        yield
    finally:
        for name, processor in before.items():
            known[name].set_processor(processor)


@typed
@contextlib.contextmanager
def record(
    unet: UNet2DConditionModel, *, layers: list[str] | None = None, columns: list[int] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Record cross-attention probabilities: ``with record(unet) as maps`` fills ``maps[layer]``.

    Each forward pass adds one tensor (b, heads, pixels, tokens), with only the token ``columns`` if
    they are given. When sampling with guidance, the unconditional half of b comes first. Gradients
    flow through the maps if the pass itself has any.
    ValueError for a layer that does not exist or an empty selection.
    """
    chosen = list(cross_attentions(unet)) if layers is None else list(layers)
    if columns is not None and len(columns) == 0:
        raise ValueError("columns is empty: give at least one position of a token")
    maps: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def recorder(name: str):
        return AttentionProcessor(
            lambda A: maps[name].append(A if columns is None else A[..., columns])
        )

    with processors(unet, recorder, chosen):
        yield maps


@typed(A=Finite(4))
def token_maps(A: Tensor) -> Tensor:
    """Probabilities as square maps, averaged over heads.

    A (b, heads, pixels, tokens) -> (b, tokens, side, side). Pixels run row by row, as the UNet
    flattens them. ValueError if they do not fill a square.
    """
    side = math.isqrt(A.shape[2])
    if side * side != A.shape[2]:
        raise ValueError(
            f"{A.shape[2]} pixels do not fill a square: expected (b, heads, pixels, tokens)"
        )
    return A.mean(1).transpose(1, 2).unflatten(-1, (side, side))


@typed
@contextlib.contextmanager
def zeroed(
    world, columns: list[list[int]], *, guided: bool, layers: list[str] | None = None
) -> Iterator[None]:
    """Set the attention of each prompt's token ``columns`` to zero, in the conditional pass only.

    columns: positions for each prompt of the batch. guided: whether the batch has the unconditional
    half first, as when sampling with guidance. The other columns keep their probabilities (they are
    not renormalised). ValueError for a prompt without a column to hide.
    Source: Forget-Me-Not, visual denoising loss: the image that is sampled with the concept's
    attention set to zero.
    """
    if not columns or not all(columns):
        raise ValueError(
            f"nothing to hide, columns is {columns}: give a token's position for each prompt"
        )
    weight = torch.ones(len(columns), world.text_length)
    for row, positions in zip(weight, columns, strict=True):
        row[positions] = 0.0
    if guided:
        weight = torch.cat(
            [torch.ones_like(weight), weight]
        )  # (2b, tokens): unconditional, conditional
    weight = weight.to(world.device)
    with processors(world.unet, lambda name: AttentionProcessor(weight=weight), layers):
        yield
