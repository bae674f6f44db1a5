"""AbConcept: the concept's caption is taught what the model does for an anchor (Kumari et al.).

x_t is a noised image x of the anchor, c* the anchor's caption, c the same caption with the
concept's name in it; eps_hat(.) = eps_{theta + delta}(x_t, ., t).

``target="model"``:  L = mean || eps_hat(c) - sg[eps_hat(c*)] ||^2
``target="noise"``:  L = mean || eps_hat(c) - eps ||^2, caption and image swapped
Both: + prior * mean || eps_hat(c*) - eps ||^2, which keeps the anchor as it is.

Fidelity: ``variant="paper"`` is these equations (the target from the network as it stands, no
second copy). Left out of the release: its resizing of images, and the detached keys and values of
the first token. ``variant="sepme-code"`` is the baseline inside SepME's release, which differs:
c = "NAME ANCHOR", c* = "ANCHOR" (the release's is "painting"), the target comes from the frozen
model, and the anchor is kept by prior * mean || eps_hat(c*) - eps_theta(x_t, c*, t) ||^2.
That x is an image of the concept, as in that release's other scripts, is our reading.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.concepts import BARE, TEMPLATES, filled, pair_prompt
from helpers.denoise import guided_pair, predict
from helpers.diffusion import noised, to_latents
from helpers.images import base_images, concept_latents
from helpers.options import Count, Positive, Weight, Whole
from helpers.parameters import Dense, Group
from helpers.seeds import training_seeds
from helpers.training import Problem, Training
from helpers.worlds import World

VARIANTS = {  # what a variant sets, unless the user says otherwise
    "sepme-code": {"group": "xattn", "prior": 10.0},
}


@dataclass(frozen=True)
class Options(Training):
    """Options of AbConcept, each default with its reason."""

    # what takes the concept's place; "" is its caption without the concept
    anchor: str | dict[str, str] = ""
    target: Literal["model", "noise"] = "model"  # the paper finds the model-based one better
    variant: Literal["paper", "sepme-code"] = "paper"
    group: Group = "kv"  # keys and values, as in the paper; "sepme-code": all of cross-attention
    prior: Weight = 1.0  # weight of the anchor's own loss: the paper's; "sepme-code": 10
    images: Count = 8  # of the anchor, sampled by the base for each concept; the release has 200
    steps: Whole = 50  # half the release's: enough at this rate
    lr: Positive = 3e-4  # the release's 1.6e-5 is for a network a hundred times as large
    batch_size: Count = 4  # the release's
    decay: Literal["constant", "cosine"] = "cosine"
    clip: Positive | None = 1.0
    accumulate_grads: bool = False  # True: the missing zero_grad of SepME's release, for study

    def __post_init__(self):
        super().__post_init__()
        if self.variant == "sepme-code" and self.target == "noise":
            raise ValueError(
                "SepME's release has no noise-based AbConcept: "
                "use variant='paper' with target='noise'"
            )


def anchor_of(options: Options, concept: str) -> str:
    """The anchor of one concept. ValueError if there is none, or if it is the concept itself."""
    anchor = options.anchor.get(concept) if isinstance(options.anchor, dict) else options.anchor
    if anchor is None or anchor == concept:
        raise ValueError(
            f"the anchor of {concept!r} is {anchor!r}: name another concept, or '' for none at all"
        )
    return anchor


def caption_pairs(world: World, concept: str, anchor: str, n: int) -> list[tuple[str, str]]:
    """n pairs (caption of the concept, caption of the anchor), alike but for the name.

    Objects and people: the world's usual captions. Styles: the bare name, and the world's objects
    in the style. With the anchor "" the phrase that holds the name falls away: "church in the style
    of Noto" has the anchor "church".
    """
    kind = world.kind(concept)
    if kind != "style":
        pairs = [
            (filled(text, concept), filled(text, anchor) if anchor else "")
            for text in TEMPLATES[kind]
        ]
    else:
        styled = [
            (pair_prompt(o, concept), pair_prompt(o, anchor) if anchor else o)
            for o in world.objects
        ]
        pairs = [pair for prompts in styled for pair in ((concept, anchor), prompts)]
    return list(itertools.islice(itertools.cycle(pairs), n))


def training_set(
    world: World, concepts: list[str], options: Options, seed: int
) -> tuple[Tensor, list[str], list[str]]:
    """Latents (n, c, h, w), fp32, and the captions of each one's concept and anchor."""
    anchors = {concept: anchor_of(options, concept) for concept in concepts}
    if options.variant == "sepme-code":
        found = concept_latents(world, concepts, options.images, seed, templates=BARE)
        latents, owners = found[0], [anchors[owner] for owner in found[2]]
        return latents, [f"{o} {a}".strip() for o, a in zip(found[2], owners, strict=True)], owners
    pairs = [p for c in concepts for p in caption_pairs(world, c, anchors[c], options.images)]
    captions, anchor_captions = map(list, zip(*pairs, strict=True))
    images = base_images(world, anchor_captions, training_seeds(seed, len(pairs)))
    return to_latents(world, images).float(), captions, anchor_captions


def problem(world: World, concepts: list[str], options: Options, seed: int) -> Problem:
    """The chosen group trained until the concept's caption does what the anchor's does."""
    increments = Dense(world, options.group)
    delta = increments.leaves
    latents, captions, anchor_captions = training_set(world, concepts, options, seed)
    states, anchor_states = (world.encode(c).float() for c in (captions, anchor_captions))

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator)
        x_t, t, noise = noised(latents[pick], world.alpha_bar, generator)
        c, c_anchor = states[pick], anchor_states[pick]
        eps_anchor, eps_hat = guided_pair(world, delta, x_t, t, c, c_anchor)
        target = noise if options.target == "noise" else eps_anchor
        anchor_target = noise
        if options.variant == "sepme-code":
            with torch.no_grad():
                target = anchor_target = predict(world, {}, x_t, t, c_anchor)
        values = {"alignment": losses.alignment(eps_hat, target)}
        if options.prior:
            values["prior"] = losses.alignment(eps_anchor, anchor_target)
        return values

    return Problem(delta, increments.delta, terms, {"alignment": 1.0, "prior": options.prior})
