"""Forget-Me-Not: attention re-steering as in its Algorithm 1, the visual denoising loss, and both together.

Objective: L = attention * L_Attn + visual * L_vis. Fidelity: ``variant="paper"`` is Algorithm 1, the squared attention
of the concept's own tokens; ``variant="code"`` is what the release computes, one un-squared norm over all layers, of
the concept's tokens and of every end and padding token. L_vis is the paper's equation, which no release holds; our
reading is that x0_tilde is compared in latent space, and that the concept's attention is also what goes to the end and
padding tokens: the causal text encoder fills their states with the concept, so it stays in view when only its own
tokens are hidden.
"""

import contextlib
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers import losses
from helpers.attention import AttentionProcessor, concept_mask, processors
from helpers.diffusion import noised, predict_x0, snr, to_latents
from helpers.edits import Edit
from helpers.inversion import invert, soft_tokens
from helpers.training import (
    TEMPLATES,
    Training,
    augmented,
    captions,
    drawn_images,
    finished,
    folder_images,
    new_increments,
    predict,
    run,
    training_seeds,
)
from helpers.worlds import World

RESTEERING = {"paper": "fmn", "code": "paper"}  # our variant -> that of ``losses.resteering``


@dataclass(frozen=True)
class Options(Training):
    """Options of Forget-Me-Not, each default with its reason."""

    attention: float = 1.0  # weight of re-steering; the paper gives none
    visual: float = 1.0  # weight of the visual denoising loss; the paper gives none, the release has no such loss (0)
    variant: str = "paper"  # "paper" (Algorithm 1) or "code" (un-squared, end and padding tokens too)
    hidden: str = "end"  # x0_tilde is blind to the "concept"'s tokens, or to "end" and padding too: these carry it on
    # keys and values of cross-attention, the paper's target: with queries and outputs too ("xattn") no one rate was found
    # for a style, an object and a person; the release's default is the whole network, "unet"
    group: str = "kv"
    weighting: str = "min-snr"  # of L_vis over t, so that noisy t do not rule; "none" is as printed
    gamma: float = 5.0  # largest weight of "min-snr", the value of its paper
    visual_from: float = 0.0  # L_vis counts between these two shares of the timesteps; the paper uses all of them
    visual_to: float = 1.0
    images: str | int = 16  # a folder of the user's pictures, or how many the base model draws for each concept
    pairs: int = 16  # with a folder: pictures drawn for each concept, since L_vis needs pairs
    augment: int = 0  # flipped, cropped, coloured copies beside each picture
    inversion_tokens: int = 0  # soft tokens found first, in place of the name; the release finds 4
    inversion_steps: int = 60  # enough in the emoji world; the release takes 500 of one picture each
    steps: int = 35  # the release
    lr: float = 6.5e-4  # for the emoji world; the release takes 2e-6, and asks to tune it for each concept
    style_pace: float = 0.8  # the rate of a style is so many times lr: at that of an object its neighbours go too
    batch_size: int = 4
    decay: str = "constant"  # the release
    clip: float | None = 1.0  # the release's intention: it clips nothing, since its list of parameters is used up

    def __post_init__(self):
        super().__post_init__()
        if self.style_pace <= 0:
            raise ValueError(f"style_pace is {self.style_pace}: a factor of the learning rate is above 0")
        if self.attention < 0 or self.visual < 0 or self.attention + self.visual == 0:
            raise ValueError(
                f"attention is {self.attention} and visual {self.visual}: weights are not negative, and not both 0"
            )
        for name, choices in (
            ("variant", ("paper", "code")), ("hidden", ("concept", "end")), ("weighting", ("none", "min-snr")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")
        if not 0 <= self.visual_from < self.visual_to <= 1:
            raise ValueError(
                f"visual_from is {self.visual_from} and visual_to {self.visual_to}: "
                "want 0 <= visual_from < visual_to <= 1"
            )
        if (isinstance(self.images, int) and self.images < 1) or self.pairs < 1:
            raise ValueError(f"images is {self.images} and pairs {self.pairs}: training needs at least one picture")
        if self.augment < 0 or self.inversion_tokens < 0:
            raise ValueError(
                f"augment is {self.augment} and inversion_tokens {self.inversion_tokens}: want 0 for none, or more"
            )


@dataclass(frozen=True)
class Data:
    """What training draws from, one row for each picture."""

    x_0: Tensor  # (n, c, h, w), the reference
    x_0_tilde: Tensor  # (n, c, h, w), its counterpart without the concept
    paired: Tensor  # (n,), 1 where there is a counterpart, 0 for a user's own picture
    states: Tensor  # (n, tokens, width), of its caption
    mask: Tensor  # (n, tokens), True at the positions whose attention is to fall


def picture_pairs(
    world: World, concepts: list[str], options: Options, seed: int
) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """References beside their counterparts: (n, 2, 3, H, W), (n,) 1 for a true pair, captions, and their concepts.

    A picture that has no counterpart stands beside itself and counts 0.
    """
    pairs, paired, prompts, owners = [], [], [], []

    def add(images: Tensor, others: Tensor, true: bool, their_prompts: list[str], their_owners: list[str]) -> None:
        pairs.append(torch.stack([images, others], 1))
        paired.append(torch.full((len(images),), float(true)))
        prompts.extend(their_prompts)
        owners.extend(their_owners)

    count = options.images
    if not isinstance(options.images, int):
        folder = folder_images(options.images, world.image_size)
        own = folder.repeat(len(concepts), 1, 1, 1)
        add(own, own, False, *captions(world, concepts, len(folder)))
        count = options.pairs if options.visual else 0
    if count:
        drawn_prompts, drawn_owners = captions(world, concepts, count)
        seeds = training_seeds(seed, len(drawn_prompts))
        images = others = drawn_images(world, drawn_prompts, seeds)
        if options.visual:
            end = options.hidden == "end"
            masks = [concept_mask(world, [p], c, end=end)[0] for p, c in zip(drawn_prompts, drawn_owners, strict=True)]
            hidden = [mask.nonzero()[:, 0].tolist() for mask in masks]
            others = drawn_images(world, drawn_prompts, seeds, hidden=hidden)  # x0_tilde
        add(images, others, bool(options.visual), drawn_prompts, drawn_owners)
    return torch.cat(pairs), torch.cat(paired), prompts, owners


def training_data(world: World, concepts: list[str], options: Options, seed: int, *, progress: bool = True) -> Data:
    """Everything that a step needs, computed once: pictures drawn, augmented, encoded; captions encoded and masked."""
    pairs, paired, prompts, owners = picture_pairs(world, concepts, options, seed)
    states: list[Tensor] = [None] * len(prompts)
    mask = torch.zeros(len(prompts), world.text_length, dtype=torch.bool)
    for concept in concepts:
        rows = [i for i, owner in enumerate(owners) if owner == concept]
        use = contextlib.nullcontext(concept)
        if options.inversion_tokens:
            soft, _ = invert(
                world, pairs[rows, 0], tokens=options.inversion_tokens, start=concept, steps=options.inversion_steps,
                template=TEMPLATES[world.kind(concept)][-1], seed=seed, progress=progress,
            )  # fmt: skip
            use = soft_tokens(world, soft)
        with use as phrase:
            said = [prompts[i].replace(concept, phrase) for i in rows]
            for i, state in zip(rows, world.encode(said).float(), strict=True):
                states[i] = state
            mask[rows] = concept_mask(world, said, phrase, end=options.variant == "code")
    if options.augment:
        pairs = torch.cat([pairs, augmented(pairs, options.augment, seed=seed)])
    views = 1 + options.augment
    latents = torch.cat([to_latents(world, part) for part in pairs.flatten(0, 1).split(16)]).float()
    x_0, x_0_tilde = latents.unflatten(0, (-1, 2)).unbind(1)  # each (n, c, h, w)
    on = world.device
    return Data(
        x_0, x_0_tilde, paired.repeat(views).to(on), torch.stack(states).repeat(views, 1, 1),
        mask.repeat(views, 1).to(on),
    )  # fmt: skip


def visual_weights(alpha_bar: Tensor, options: Options) -> Tensor:
    """The weight of L_vis at each timestep: zero outside the options' range; inside it 1, or min(snr_t, gamma).

    An error of the noise counts 1 / snr_t times in x0_hat, 200 times at the noisiest t of Stable Diffusion: "min-snr"
    takes that away. alpha_bar (T,) -> (T,). Source: Hang et al., Min-SNR weighting, for a network that predicts x0.
    """
    weights = snr(alpha_bar).clamp(max=options.gamma) if options.weighting == "min-snr" else torch.ones_like(alpha_bar)
    share = torch.arange(len(alpha_bar), device=alpha_bar.device) / len(alpha_bar)
    return weights * ((share >= options.visual_from) & (share < options.visual_to))


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train the chosen parameters on L = attention * L_Attn + visual * L_vis and return the increments."""
    start = time.time()
    delta = new_increments(world.unet, options.group)
    data = training_data(world, concepts, options, seed, progress=progress)
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
    weight = visual_weights(alpha_bar, options)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(data.x_0), (options.batch_size,), generator=generator).to(world.device)
        x_t, t, _ = noised(data.x_0[pick], alpha_bar, generator)
        mask = data.mask[pick][:, None, None, :]  # (b, 1, 1, tokens): each picture's own, alike for heads and pixels
        maps: list[Tensor] = []
        with processors(world.unet, lambda name: AttentionProcessor(lambda A: maps.append(A.float() * mask))):
            eps_hat = predict(world.unet, delta, x_t, t, data.states[pick])
        values = {"attention": losses.resteering(maps, variant=RESTEERING[options.variant])}
        if options.visual:
            x_0_hat = predict_x0(x_t, eps_hat, t, alpha_bar)
            values["visual"] = losses.visual_denoising(x_0_hat, data.x_0_tilde[pick], weight[t] * data.paired[pick])
        return values

    weights = {"attention": options.attention, "visual": options.visual}
    pace = options.style_pace if any(world.kind(concept) == "style" for concept in concepts) else 1.0
    schedule = replace(options.schedule(seed), lr=options.lr * pace)
    history = run(delta, terms, weights, schedule, progress=progress)
    return finished(world, delta, history, method=method, concepts=concepts, options=options, seed=seed, start=start)
