"""Few-shot unlearning: the text encoder climbs the loss of textual inversion (Fuchi et al.).

Objective: L = - mean || eps_theta(x_t, E_{phi + delta}(caption), t) - eps ||^2 over a few images of
the concept; the UNet stays as it is. Trained are the feed-forward layers of every block of the
encoder, and the self-attention of its last.

Fidelity: the paper's loss, parameters and four images. It has no bottom and the paper no rule to
stop by: the release saves an encoder for each epoch and leaves the choice to the user; here a run
of fewer ``steps`` at a constant rate is that earlier encoder, to the bit. ``bound`` is ours. Adam's
own betas and no weight decay here, (0.9, 0.98) and 1e-8 there; our own templates.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers.concepts import TEMPLATES, filled
from helpers.denoise import encode, predict
from helpers.diffusion import noised
from helpers.images import concept_latents
from helpers.options import Count, Images, Positive, Whole
from helpers.parameters import Dense, Part, text_names
from helpers.training import Problem, Training
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of few-shot unlearning, each default with its reason."""

    group: Part = "few-shot"  # the paper's
    block: Whole | None = None  # of the encoder, the first is 0; None: of all
    # ours: an image whose error has grown to this is left alone; None as in the paper, without end
    bound: Positive | None = None
    images: Images = 4  # the paper's number: a folder of the user's, or sampled by the base
    steps: Whole = 10  # the paper's 5 epochs of 4 images by twos
    # of 1.5e-4, 2e-4 and 3e-4 the best balance of forgotten (name and pairs) and kept on Fluent,
    # guitar and detective, which no table shows; the paper's 1e-5 is for four times as many layers
    lr: Positive = 2e-4
    batch_size: Count = 2  # the paper
    decay: Literal["constant", "cosine"] = "constant"  # the paper
    clip: Positive | None = None  # the paper clips nothing


def ascent(eps_hat: Tensor, noise: Tensor, bound: float | None) -> Tensor:
    """- mean || eps_hat - eps ||^2, or with a bound mean max(0, bound - || eps_hat - eps ||^2).

    Both (b, c, h, w); the norm is a mean over an image's entries. Returns a number.
    """
    errors = (eps_hat - noise).square().flatten(1).mean(1)  # (b,)
    return -errors.mean() if bound is None else (bound - errors).clamp(min=0).mean()


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """A part of the text encoder trained away from the concept's images."""
    leaves = Dense(world, "text").leaves
    leaves = {name: leaves[name] for name in text_names(world, options.group, options.block)}
    latents, _, owners = concept_latents(world, concepts, options.images, seed)
    forms = {concept: TEMPLATES[world.kind(concept)] for concept in concepts}

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator).tolist()
        x_t, t, noise = noised(latents[pick], world.alpha_bar, generator)
        which = torch.randint(1 << 20, (len(pick),), generator=generator).tolist()
        said = [(forms[owners[i]], owners[i], k) for i, k in zip(pick, which, strict=True)]
        prompts = [filled(form[k % len(form)], owner) for form, owner, k in said]
        eps_hat = predict(world, leaves, x_t, t, encode(world, prompts, leaves))
        return {"ascent": ascent(eps_hat, noise, options.bound)}

    return Problem(leaves, lambda: leaves, terms, {"ascent": 1.0})
