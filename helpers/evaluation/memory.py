"""M-Score: is the concept still in the model, where no prompt looks?"""

import torch
from torch.nn import functional as F

from helpers.concepts import TEMPLATES, filled
from helpers.denoise import predict
from helpers.diffusion import noised, to_latents
from helpers.inversion import Inversion, invert
from helpers.options import Count, Pictures, Seed, Seeds, Whole, made, typed
from helpers.seeds import generator_of


@typed
@torch.no_grad()
def presence(
    world, concept: str, references: Pictures, *, repeats: Count = 8, seed: Seed = 0
) -> float:
    """How much the concept's name helps the model to denoise its images: above 0, it knows it.

    1 - L(c) / L(""),  L(c) = mean || eps - eps_theta(x_t, c, t) ||^2, the same x_t, t, eps for both

    references (k, 3, H, W) in [0, 1], each noised ``repeats`` times.
    Source: ours; the loss is Ho et al., DDPM, Eq. 14.
    """
    generator = generator_of(seed)
    states = world.encode([filled(TEMPLATES[world.kind(concept)][-1], concept), ""])
    error = torch.zeros(2)
    for x_0 in to_latents(world, references).float().repeat(repeats, 1, 1, 1).split(16):
        x_t, t, noise = noised(x_0, world.alpha_bar, generator)
        for i, state in enumerate(states):
            eps_hat = predict(world, {}, x_t, t, state.expand(len(x_0), -1, -1))
            error[i] += (eps_hat - noise).pow(2).sum().cpu()
    return (1 - error[0] / error[1]).item()


@typed
def m_score(
    world, edit, concept: str, references: Pictures, *, seeds: Seeds = (0,),
    second_seed_offset: Whole = 0, **options,
) -> float:  # fmt: skip
    """M-Score: how alike the tokens are by which base and edited model find a concept's images.

    M = mean over seeds and tokens of cos(v_base, v_edited), v = ``inversion.invert`` of the same
    references

    1: the edited model would find the concept where the base does; the lower, the more was
    forgotten. references (k, 3, H, W) in [0, 1], inverted together. second_seed_offset: added to
    the seed of the second inversion; with 0 an edit of zero scores 1. edit None stands for the
    base:
    with an offset of 1 that is the ceiling, which inversion's own noise leaves, and edits are read
    beside it with an offset of 1 too. options: those of ``invert``; all inversions of a seed start
    at the same neutral word, so that an edited model under which nothing moves scores low.
    ValueError: no reference, no seed, a name that the world does not know, or one that does not
    help the base model with these references (``presence``): what is absent already cannot be
    forgotten.
    Source: our reading; Forget-Me-Not names the score and publishes neither formula nor code.
    """
    wanted = {name: value for name, value in options.items() if name != "progress"}
    made(Inversion, wanted, "m_score")  # a wrong one is refused before any work
    template = TEMPLATES[world.kind(concept)][-1]
    gain = presence(world, concept, references)
    if gain <= 0:
        raise ValueError(
            f"the base model denoises these references no better for being told {concept!r} "
            f"(gain {gain:.4f}): the concept is absent already and M-Score is undefined; "
            "give images of it, or take another concept"
        )
    cosines = []
    for seed in seeds:
        before, _ = invert(world, references, template=template, seed=seed, **options)
        other = seed + second_seed_offset
        after, _ = invert(world, references, template=template, seed=other, edit=edit, **options)
        cosines.append(F.cosine_similarity(before, after, dim=1).mean())
    return torch.stack(cosines).mean().item()
