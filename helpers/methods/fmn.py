"""Forget-Me-Not: attention re-steering as in its Algorithm 1, the visual denoising loss, and both.

Objective: L = attention * L_Attn + visual * L_vis.

Fidelity: ``variant="paper"`` is Algorithm 1, the squared attention of the concept's own tokens;
``variant="code"`` is what the release computes, one un-squared norm over all layers, of the
concept's tokens and of every EOS and padding token. L_vis is the paper's equation, which no release
holds. Our reading: x0_tilde is compared in latent space, and the concept's attention is also what
goes to EOS and padding: the causal text encoder fills their states with the concept, so it stays in
view when only its own tokens are hidden.
"""

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.attention import AttentionProcessor, concept_mask, processors
from helpers.concepts import TEMPLATES, filled
from helpers.denoise import predict
from helpers.diffusion import noised, predict_x0, snr, to_latents
from helpers.images import augmented, base_images, caption_templates, captions, own_images
from helpers.inversion import invert, soft_tokens
from helpers.options import Count, Images, Positive, Share, Weight, Whole
from helpers.parameters import Dense, Group
from helpers.seeds import training_seeds
from helpers.training import Problem, Training
from helpers.worlds import World

RESTEERING = {"paper": "fmn", "code": "paper"}  # our variant -> that of ``losses.resteering``


@dataclass(frozen=True)
class Options(Training):
    """Options of Forget-Me-Not, each default with its reason."""

    attention: Weight = 1.0  # weight of re-steering; the paper gives none
    # weight of the visual denoising loss; the paper gives none, the release has no such loss (0)
    visual: Weight = 1.0
    # Algorithm 1, or un-squared and with EOS and padding tokens
    variant: Literal["paper", "code"] = "paper"
    # x0_tilde is blind to the concept's tokens, or to EOS and padding too: these carry it on
    hidden: Literal["concept", "end"] = "end"
    # keys and values of cross-attention, the paper's target: with queries and outputs too ("xattn")
    # no one rate was found for a style, an object and a person; the release trains all, "unet"
    group: Group = "kv"
    # of L_vis over t, so that noisy t do not rule; "none" is as printed
    weighting: Literal["none", "min-snr"] = "min-snr"
    gamma: Positive = 5.0  # largest weight of "min-snr", the value of its paper
    visual_from: Share = 0.0  # L_vis counts between these two shares of the timesteps;
    visual_to: Share = 1.0  # the paper uses all of them
    images: Images = 16  # a folder of the user's own, or how many the base model samples
    pairs: Count = 16  # with a folder: images sampled for each concept, since L_vis needs pairs
    augment: Whole = 0  # flipped, cropped, coloured copies beside each image
    inversion_tokens: Whole = 0  # soft tokens found first, for the name; the release finds 4
    inversion_steps: Whole = 60  # enough for the emoji world; the release: 500 of one image each
    steps: Whole = 35  # the release
    lr: Positive = 6.5e-4  # the release's 2e-6 is for a larger network, tuned for each concept
    lr_scale_for_styles: Positive = 0.8  # at the rate of an object a style's neighbours go too
    batch_size: Count = 4
    decay: Literal["constant", "cosine"] = "constant"  # the release
    # the release's intention: it clips nothing, since its list of parameters is used up
    clip: Positive | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.attention + self.visual == 0:
            raise ValueError("attention is 0 and visual 0: give at least one loss a weight")
        if not self.visual_from < self.visual_to:
            raise ValueError(
                f"visual_from is {self.visual_from} and visual_to {self.visual_to}: "
                "give 0 <= visual_from < visual_to <= 1"
            )


@dataclass(frozen=True)
class Data:
    """What training picks from, one row for each image."""

    x_0: Tensor  # (n, c, h, w), the reference
    x_0_tilde: Tensor  # (n, c, h, w), its counterpart without the concept
    paired: Tensor  # (n,), 1 where there is a counterpart, 0 for a user's own image
    states: Tensor  # (n, tokens, width), of its caption
    mask: Tensor  # (n, tokens), True at the positions whose attention is to fall


@dataclass(frozen=True)
class Pairs:
    """References beside their counterparts; an image that has none stands beside itself."""

    images: Tensor  # (n, 2, 3, H, W)
    paired: Tensor  # (n,), 1 for a true pair
    templates: list[str]  # of each caption
    owners: list[str]  # the concept of each caption

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(
            torch.cat([self.images, other.images]), torch.cat([self.paired, other.paired]),
            [*self.templates, *other.templates], [*self.owners, *other.owners],
        )  # fmt: skip


def own_pairs(world: World, concepts: list[str], images: str | dict[str, str]) -> Pairs:
    """The user's own images of each concept, without counterparts."""
    own, _, owners = own_images(world, concepts, images)
    templates = caption_templates(world, owners)
    return Pairs(torch.stack([own, own], 1), torch.zeros(len(own)), templates, owners)


def sampled_pairs(
    world: World, concepts: list[str], count: int, options: Options, seed: int
) -> Pairs:
    """The base's images of each concept, and the same with its attention set to zero."""
    prompts, owners = captions(world, concepts, count)
    templates = caption_templates(world, owners)
    seeds = training_seeds(seed, len(prompts))
    images = others = base_images(world, prompts, seeds)
    if options.visual:
        end = options.hidden == "end"
        masks = [
            concept_mask(world, [filled(form, c)], c, end=end, templates=[form])[0]
            for form, c in zip(templates, owners, strict=True)
        ]
        hide = [mask.nonzero()[:, 0].tolist() for mask in masks]
        others = base_images(world, prompts, seeds, hide=hide)  # x0_tilde
    paired = torch.full((len(images),), float(bool(options.visual)))
    return Pairs(torch.stack([images, others], 1), paired, templates, owners)


def training_pairs(world: World, concepts: list[str], options: Options, seed: int) -> Pairs:
    """The user's own images, if any, and the base's pairs."""
    if isinstance(options.images, int):
        return sampled_pairs(world, concepts, options.images, options, seed)
    own = own_pairs(world, concepts, options.images)
    if not options.visual:
        return own
    return own + sampled_pairs(world, concepts, options.pairs, options, seed)


def states_and_mask(
    world: World, concepts: list[str], pairs: Pairs, options: Options, seed: int
) -> tuple[Tensor, Tensor]:
    """Text states of each caption, and where its concept's attention is to fall.

    With ``inversion_tokens``, soft tokens stand in for the name. Returns (n, tokens, width) and
    (n, tokens), bool.
    """
    states: dict[int, Tensor] = {}
    mask = torch.zeros(len(pairs.owners), world.text_length, dtype=torch.bool)
    for concept in concepts:
        rows = [i for i, owner in enumerate(pairs.owners) if owner == concept]
        phrase_of = contextlib.nullcontext(concept)
        if options.inversion_tokens:
            soft, _ = invert(
                world, pairs.images[rows, 0], tokens=options.inversion_tokens, start=concept,
                steps=options.inversion_steps, template=TEMPLATES[world.kind(concept)][-1],
                seed=seed, progress=False,
            )  # fmt: skip
            phrase_of = soft_tokens(world, soft)
        with phrase_of as phrase:
            forms = [pairs.templates[i] for i in rows]
            prompts = [filled(form, phrase) for form in forms]
            states |= dict(zip(rows, world.encode(prompts).float(), strict=True))
            end = options.variant == "code"
            mask[rows] = concept_mask(world, prompts, phrase, end=end, templates=forms)
    return torch.stack([states[i] for i in range(len(states))]), mask


def training_data(world: World, concepts: list[str], options: Options, seed: int) -> Data:
    """Everything a step needs, computed once: images sampled, augmented, encoded; captions too."""
    pairs = training_pairs(world, concepts, options, seed)
    states, mask = states_and_mask(world, concepts, pairs, options, seed)
    images = pairs.images
    if options.augment:
        images = torch.cat([images, augmented(images, options.augment, seed=seed)])
    views, on = 1 + options.augment, world.device
    latents = to_latents(world, images.flatten(0, 1)).float()
    x_0, x_0_tilde = latents.unflatten(0, (-1, 2)).unbind(1)  # each (n, c, h, w)
    paired = pairs.paired.repeat(views).to(on)
    return Data(x_0, x_0_tilde, paired, states.repeat(views, 1, 1), mask.repeat(views, 1).to(on))


def visual_weights(alpha_bar: Tensor, options: Options) -> Tensor:
    """The weight of L_vis at each t: zero outside the range, inside it 1 or min(snr_t, gamma).

    An error of the noise counts 1 / snr_t times in x0_hat, 200 times at the noisiest t of Stable
    Diffusion: "min-snr" takes that away. alpha_bar (T,) -> (T,).
    Source: Hang et al., Min-SNR weighting, for a network that predicts x0.
    """
    weights = torch.ones_like(alpha_bar)
    if options.weighting == "min-snr":
        weights = snr(alpha_bar).clamp(max=options.gamma)
    share = torch.arange(len(alpha_bar), device=alpha_bar.device) / len(alpha_bar)
    return weights * ((share >= options.visual_from) & (share < options.visual_to))


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """The chosen parameters trained on L = attention * L_Attn + visual * L_vis."""
    increments = Dense(world, options.group)
    data = training_data(world, concepts, options, seed)
    alpha_bar = world.alpha_bar
    weight = visual_weights(alpha_bar, options)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(data.x_0), (options.batch_size,), generator=generator)
        pick = pick.to(world.device)
        x_t, t, _ = noised(data.x_0[pick], alpha_bar, generator)
        mask = data.mask[pick][:, None, None, :]  # (b, 1, 1, tokens): alike for heads and pixels
        maps: list[Tensor] = []
        collect = AttentionProcessor(lambda A: maps.append(A.float() * mask))
        with processors(world.unet, lambda name: collect):
            eps_hat = predict(world, increments.leaves, x_t, t, data.states[pick])
        values = {"attention": losses.resteering(maps, variant=RESTEERING[options.variant])}
        if options.visual:
            x_0_hat = predict_x0(x_t, eps_hat, t, alpha_bar)
            w = weight[t] * data.paired[pick]
            values["visual"] = losses.visual_denoising(x_0_hat, data.x_0_tilde[pick], w)
        return values

    weights = {"attention": options.attention, "visual": options.visual}
    styles = any(world.kind(concept) == "style" for concept in concepts)
    scale = options.lr_scale_for_styles if styles else 1.0
    schedule = replace(options, lr=options.lr * scale)
    return Problem(increments.leaves, increments.delta, terms, weights, training=schedule)
