"""FMN inside SepME: the baseline that SepME's tables call FMN, another loss than Forget-Me-Not's own.

Objective: L = sum_l mean (Z_l(c) - Z_l(c'))^2 over heads, pixels and all tokens, with Z_l(c) = q K_l(c)^T / sqrt(d)
the logits of layer l before the softmax, c = "a painting of NAME" and c' = "a painting of"; q is the same in both.

Fidelity: ``sepme-code``, what SepME's release computes; that q is the query of the pass with c is our reading. Its
table rows FMN10, FMN20, ... stop at that index, so FMN10 is 11 updates, and it never zeroes gradients:
``accumulate_grads=True`` gives that. Forget-Me-Not's own loss is in ``fmn.py``.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import losses
from helpers.attention import cross_attentions
from helpers.diffusion import noised
from helpers.edits import Edit
from helpers.training import BARE, Training, concept_latents, finished, new_increments, predict, run
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of SepME's FMN, each default with its reason."""

    template: str = "a painting of {c}"  # the release's caption, for styles, objects and people; c' is it without {c}
    group: str = "xattn"  # all of cross-attention, as the release trains
    images: str | int = 8  # a folder of the user's pictures, or how many the base model draws
    steps: int = 11  # FMN10 of SepME's Table 1; its other rows are 21, 31 and 51
    lr: float = 8e-4  # FMN50 moves weights 1.6 to 2 times as far as AbConcept; in SepME's Tables 2 and 7, 1.6 to 1.7
    batch_size: int = 4  # the release has one picture a step
    decay: str = "constant"  # the release's
    clip: float | None = None  # the release clips nothing
    accumulate_grads: bool = False  # True: the release's missing zero_grad, for study

    def __post_init__(self):
        super().__post_init__()
        if "{c}" not in self.template:
            raise ValueError(
                f"the template {self.template!r} does not hold {{c}}: mark the place of the concept's name"
            )


@contextlib.contextmanager
def logit_differences(unet, states: Tensor, without: Tensor) -> Iterator[list[Tensor]]:
    """Collect q (K(c) - K(c'))^T / sqrt(d) of every cross-attention layer that a pass with ``states`` runs.

    The difference of logits is taken where the queries are made, inside the pass, so that gradients reach increments of
    both projections. states, without (b, tokens, width). Yields a list of (b, heads, pixels, tokens), one a layer.
    """
    kept: list[Tensor] = []

    def keep(attn):
        def hook(module, args, q):
            k = attn.to_k(states) - attn.to_k(without)  # (b, tokens, heads * d)
            q, k = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k))  # (b, heads, n, d)
            kept.append((q * attn.scale @ k.transpose(-1, -2)).float())

        return hook

    handles = [attn.to_q.register_forward_hook(keep(attn)) for attn in cross_attentions(unet).values()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train cross-attention until its logits are those of the prompt without the concept, and return the increments."""
    start = time.time()
    delta = new_increments(world.unet, options.group)
    latents, _, owners = concept_latents(world, concepts, options.images, seed, templates=BARE)
    states = world.encode([options.template.format(c=owner) for owner in owners])
    without = world.encode([options.template.format(c="").strip()])
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator)
        x_t, t, _ = noised(latents[pick], alpha_bar, generator)
        c = states[pick]
        with logit_differences(world.unet, c, without.expand_as(c)) as differences:
            predict(world.unet, delta, x_t, t, c)
        return {"logits": losses.logit_difference(differences)}

    history = run(delta, terms, {"logits": 1.0}, options.schedule(seed), progress=progress)
    return finished(world, delta, history, method=method, concepts=concepts, options=options, seed=seed, start=start)
