"""FMN inside SepME: what SepME's tables call FMN is another loss than Forget-Me-Not's own.

Objective: L = sum_l mean (Z_l(c) - Z_l(c'))^2 over heads, pixels and all tokens, with
Z_l(c) = q K_l(c)^T / sqrt(d) the logits of layer l before the softmax, c = "a painting of NAME" and
c' = "a painting of"; q is the same in both.

Fidelity: ``sepme-code``, what SepME's release computes; that q is the query of the pass with c is
our reading. Its table rows FMN10, FMN20, ... stop at that index, so FMN10 is 11 updates, and it
never zeroes gradients: ``accumulate_grads=True`` gives that. Forget-Me-Not's own loss is in
``fmn.py``.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.attention import cross_attentions
from helpers.concepts import BARE, filled
from helpers.denoise import predict
from helpers.diffusion import noised
from helpers.images import concept_latents
from helpers.options import Count, Images, Positive, Template, Whole
from helpers.parameters import Dense, Group
from helpers.training import Problem, Training
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of SepME's FMN, each default with its reason."""

    # the release's caption, for styles, objects and people; c' is it without {c}
    template: Template = "a painting of {c}"
    group: Group = "xattn"  # all of cross-attention, as the release trains
    images: Images = 8  # a folder of the user's own, or how many the base model samples
    steps: Whole = 11  # FMN10 of SepME's Table 1; its other rows are 21, 31 and 51
    # at it FMN50 moves weights 1.6 to 2 times as far as AbConcept; in SepME's Tables 2 and 7, 1.6
    # to 1.7
    lr: Positive = 8e-4
    batch_size: Count = 4  # the release has one image a step
    decay: Literal["constant", "cosine"] = "constant"  # the release's
    clip: Positive | None = None  # the release clips nothing
    accumulate_grads: bool = False  # True: the release's missing zero_grad, for study


@contextlib.contextmanager
def logit_differences(unet, states: Tensor, without: Tensor) -> Iterator[list[Tensor]]:
    """Collect q (K(c) - K(c'))^T / sqrt(d) of every cross-attention layer that a pass runs.

    The difference of logits is taken where the queries are made, inside the pass, so that gradients
    reach increments of both projections. states, without (b, tokens, width). Yields a list of
    (b, heads, pixels, tokens), one a layer.
    """
    differences: list[Tensor] = []

    def collect(attn):
        def hook(module, args, q):
            k = attn.to_k(states) - attn.to_k(without)  # (b, tokens, heads * d)
            q, k = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k))
            differences.append((q * attn.scale @ k.transpose(-1, -2)).float())  # (b, heads, n, d)

        return hook

    layers = cross_attentions(unet).values()
    handles = [attn.to_q.register_forward_hook(collect(attn)) for attn in layers]
    try:
        yield differences
    finally:
        for handle in handles:
            handle.remove()


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """Cross-attention trained until its logits are those of the prompt without the concept."""
    increments = Dense(world, options.group)
    latents, _, owners = concept_latents(world, concepts, options.images, seed, templates=BARE)
    states = world.encode([filled(options.template, owner) for owner in owners])
    without = world.encode([filled(options.template, "").strip()])

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator)
        x_t, t, _ = noised(latents[pick], world.alpha_bar, generator)
        c = states[pick]
        with logit_differences(world.unet, c, without.expand_as(c)) as differences:
            predict(world, increments.leaves, x_t, t, c)
        return {"logits": losses.logit_difference(differences)}

    return Problem(increments.leaves, increments.delta, terms, {"logits": 1.0})
