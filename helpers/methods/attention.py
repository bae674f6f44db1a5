"""AIzheimer's attention losses: what re-steering, distraction and random stimulus share.

Objective: L = recon * L_recon + lam * L_attn (AIzheimer, Eq. 7), with L_attn one of Eq. 4, 5, 6 on
the cross-attention that the concept's tokens get.

Fidelity: the default ``variant="paper"`` is the printed equation, with a reconstruction term on the
same forward pass. Our reading: EOS and padding, which have read the concept, are its tokens too,
and other concepts (the retain set) are reconstructed. ``variant="code"`` is what the release
computes (the last token only, other targets and sums). It has no reconstruction term: ``recon=0``
gives that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.attention import (
    AttentionProcessor,
    concept_mask,
    cross_attentions,
    processors,
)
from helpers.denoise import predict
from helpers.diffusion import noised
from helpers.images import caption_templates, concept_latents, retain_latents
from helpers.options import Count, Images, Positive, Weight, Whole
from helpers.parameters import Dense, Group
from helpers.seeds import step_generator
from helpers.training import Problem, Training
from helpers.worlds import World


@dataclass(frozen=True)
class Options(Training):
    """Options of the three losses, each default with its reason."""

    variant: Literal["paper", "code"] = "paper"
    lam: Weight = 0.0  # weight of the attention loss: each method has its own
    recon: Weight = 1.0  # weight of the reconstruction term; the release has none (0)
    # whose images: other concepts, or the concept itself, whose images work against L_attn
    recon_on: Literal["retain", "concept"] = "retain"
    end: bool = True  # EOS and padding count too: they have read the name, and would still say it
    group: Group = "xattn"  # which parameters: all of cross-attention, as the paper trains
    skip_first_and_last: bool = False  # the paper's rows S: neither trained nor counted
    skip_as_released: bool = False  # the release's reading of "last": the middle block, for study
    images: Images = 16  # a folder of the user's own, or how many the base model samples
    add_noise: bool = True  # False: the paper's Table IV, where clean latents are fed
    steps: Whole = 40
    lr: Positive = 1e-3  # the release's 2e-5 is for a network a hundred times as large
    batch_size: Count = 4
    decay: Literal["constant", "cosine"] = "cosine"
    clip: Positive | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.lam + self.recon == 0:
            raise ValueError("lam is 0 and recon 0: give at least one loss a weight")


def chosen_layers(world: World, options: Options) -> list[str]:
    """Names of the cross-attention layers that are trained and counted, in execution order."""
    layers = list(cross_attentions(world.unet))
    if options.skip_as_released:
        return [name for name in layers[1:] if not name.startswith("mid_block")]
    return layers[1:-1] if options.skip_first_and_last else layers


def token_columns(
    world: World, prompts: list[str], owners: list[str], options: Options,
    templates: list[str] | None = None,
) -> list[list[int]]:  # fmt: skip
    """For each prompt, the positions whose attention counts.

    templates: what the prompts were filled from, where only the name's own places count.
    """
    columns = []
    for prompt, owner, form in zip(prompts, owners, templates or prompts, strict=True):
        forms = templates and [form]
        mask = concept_mask(world, [prompt], owner, end=options.end, templates=forms)[0]
        if options.variant == "code":  # only the last token
            mask = concept_mask(world, [prompt], owner, end=False, templates=forms)[0]
            mask[: mask.nonzero().max()] = False
        columns.append(mask.nonzero().flatten().tolist())
    return columns


def problem(
    world: World, concepts: list[str], options: Options, seed: int, *, loss: Callable
) -> Problem:
    """Cross-attention trained on L = recon * L_recon + lam * L_attn, ``loss`` being L_attn."""
    layers = chosen_layers(world, options)
    increments = Dense(world, options.group, within=layers)
    latents, prompts, owners = concept_latents(world, concepts, options.images, seed)
    columns = token_columns(world, prompts, owners, options, caption_templates(world, owners))
    rehearse = options.recon > 0 and options.recon_on == "retain"
    if rehearse:
        retain_x0, retain_prompts = retain_latents(world, concepts)
        latents, prompts = torch.cat([latents, retain_x0]), [*prompts, *retain_prompts]
    states = world.encode(prompts).float()
    n = options.batch_size

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(owners), (n,), generator=generator)  # the concept's come first
        if rehearse:
            others = torch.randint(len(owners), len(latents), (n,), generator=generator)
            pick = torch.cat([pick, others])
        x_t, t, noise = noised(latents[pick], world.alpha_bar, generator)
        if not options.add_noise:
            x_t = latents[pick]
        maps: list[list[Tensor]] = [[] for _ in range(n)]  # the layers of each concept image

        def collect(A: Tensor) -> None:
            for row, i, A_i in zip(maps, pick[:n].tolist(), A[:n].float(), strict=True):
                row.append(A_i[None, :, :, columns[i]])  # (1, heads, pixels, n)

        with processors(world.unet, lambda name: AttentionProcessor(collect), layers):
            eps_hat = predict(world, increments.leaves, x_t, t, states[pick])
        with torch.random.fork_rng(devices=[]):  # random stimulus draws its targets on the spot
            torch.manual_seed(step_generator(seed, step).initial_seed())
            values = {"attention": torch.stack([loss(layers) for layers in maps]).mean()}
        if options.recon:
            rows = slice(n, None) if rehearse else slice(None)
            values["reconstruction"] = losses.reconstruction(eps_hat[rows], noise[rows])
        return values

    weights = {"attention": options.lam, "reconstruction": options.recon}
    return Problem(increments.leaves, increments.delta, terms, weights)
