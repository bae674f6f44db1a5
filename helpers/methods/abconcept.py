"""AbConcept: ablating concepts, the concept's caption taught what the model does for an anchor (Kumari et al.).

x_t is a noised picture x of the anchor, c* the anchor's caption, c the same caption with the concept's name in it.
``target="model"``:  L = mean || eps_{theta + delta}(x_t, c, t) - sg[eps_{theta + delta}(x_t, c*, t)] ||^2
``target="noise"``:  L = mean || eps_{theta + delta}(x_t, c, t) - eps ||^2, the pair of caption and picture swapped
Both: + prior * mean || eps_{theta + delta}(x_t, c*, t) - eps ||^2, which keeps the anchor as it is.

Fidelity: ``variant="paper"`` is these equations (the target from the network as it stands, no second copy). Left out
of the release: its resizing of pictures, and the detached keys and values of the first token.
``variant="sepme-code"`` is the baseline inside SepME's release, which differs: c = "NAME ANCHOR", c* = "ANCHOR"
(the release's is "painting"), the target comes from the frozen model, and the anchor is kept by
prior * mean || eps_{theta + delta}(x_t, c*, t) - eps_theta(x_t, c*, t) ||^2. That x is a picture of the concept, as in
that release's other scripts, is our reading.
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import losses
from helpers.diffusion import noised, to_latents
from helpers.edits import Edit
from helpers.rollouts import branches, timed
from helpers.training import (
    BARE,
    TEMPLATES,
    Training,
    concept_latents,
    drawn_images,
    finished,
    new_increments,
    predict,
    run,
    training_seeds,
)
from helpers.worlds import World

VARIANTS = {  # what a variant trains, and how much it cares for the anchor, unless told otherwise
    "paper": {"group": "kv", "prior": 1.0},
    "sepme-code": {"group": "xattn", "prior": 10.0},
}


@dataclass(frozen=True)
class Options(Training):
    """Options of AbConcept, each default with its reason."""

    anchor: str | dict[str, str] = ""  # what takes the concept's place; "" is its caption without the concept
    target: str = "model"  # "model" or "noise"; the paper finds the model-based one better
    variant: str = "paper"  # "paper" or "sepme-code"
    group: str | None = None  # None: the variant's own, keys and values or all of cross-attention
    prior: float | None = None  # weight of the anchor's own loss; None: the variant's own, 1 or 10
    images: int = 8  # pictures of the anchor that the base model draws for each concept; the release draws 200
    steps: int = 50  # half the release's: enough at this rate
    lr: float = 3e-4  # the release's 1.6e-5 is for a network a hundred times as large
    batch_size: int = 4  # the release's
    decay: str = "cosine"
    clip: float | None = 1.0
    accumulate_grads: bool = False  # True: the missing zero_grad of SepME's release, for study

    def __post_init__(self):
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r} of AbConcept: choose from {', '.join(VARIANTS)}")
        if self.target not in ("model", "noise"):
            raise ValueError(f"unknown target {self.target!r} of AbConcept: choose 'model' or 'noise'")
        if self.variant == "sepme-code" and self.target == "noise":
            raise ValueError("SepME's release has no noise-based AbConcept: use variant='paper' with target='noise'")
        if self.prior is not None and self.prior < 0:
            raise ValueError(f"prior is {self.prior}: the weight of a loss term is not negative")
        if self.images < 1:
            raise ValueError(f"images is {self.images}: training needs at least one picture")


def anchor_of(options: Options, concept: str) -> str:
    """The anchor of one concept. ValueError if there is none for it, or if it is the concept itself."""
    anchor = options.anchor.get(concept) if isinstance(options.anchor, dict) else options.anchor
    if anchor is None or anchor == concept:
        raise ValueError(f"the anchor of {concept!r} is {anchor!r}: name another concept, or '' for none at all")
    return anchor


def caption_pairs(world: World, concept: str, anchor: str, n: int) -> list[tuple[str, str]]:
    """n pairs (caption of the concept, caption of the anchor), alike but for the name.

    Objects and people: the world's usual captions. Styles: the bare name, and the world's objects in the style. With
    the anchor "" the phrase that holds the name falls away: "church in the style of Noto" has the anchor "church".
    """
    if world.kind(concept) != "style":
        captions = TEMPLATES[world.kind(concept)]
        pairs = [(text.format(c=concept), text.format(c=anchor) if anchor else "") for text in captions]
    else:
        phrase = "{} in the style of {}"
        styled = [(phrase.format(o, concept), phrase.format(o, anchor) if anchor else o) for o in world.objects]
        pairs = [pair for drawing in styled for pair in ((concept, anchor), drawing)]
    return list(itertools.islice(itertools.cycle(pairs), n))


def training_pictures(
    world: World, concepts: list[str], options: Options, seed: int
) -> tuple[Tensor, list[str], list[str]]:
    """Latents (n, c, h, w), fp32, and for each the caption of its concept and that of its anchor."""
    anchors = {concept: anchor_of(options, concept) for concept in concepts}
    if options.variant == "sepme-code":
        latents, _, owners = concept_latents(world, concepts, options.images, seed, templates=BARE)
        return latents, [f"{owner} {anchors[owner]}".strip() for owner in owners], [anchors[owner] for owner in owners]
    pairs = [pair for c in concepts for pair in caption_pairs(world, c, anchors[c], options.images)]
    captions, anchor_captions = map(list, zip(*pairs, strict=True))
    pictures = drawn_images(world, anchor_captions, training_seeds(seed, len(pairs)))
    latents = torch.cat([to_latents(world, part) for part in pictures.split(16)]).float()
    return latents, captions, anchor_captions


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """Train the chosen group and return the increments; meta["parts"] has the seconds by part."""
    start = time.time()
    given = {name: value for name, value in VARIANTS[options.variant].items() if getattr(options, name) is None}
    options = dataclasses.replace(options, **given)  # the edit's meta records what was used
    delta = new_increments(world.unet, options.group)
    parts: dict[str, float] = {}
    with timed(parts, "pictures"):
        latents, captions, anchor_captions = training_pictures(world, concepts, options, seed)
    states, anchor_states = world.encode(captions).float(), world.encode(anchor_captions).float()
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator)
        x_t, t, noise = noised(latents[pick], alpha_bar, generator)
        eps_anchor, eps_hat = branches(world.unet, delta, x_t, t, states[pick], anchor_states[pick])
        target, kept = noise if options.target == "noise" else eps_anchor, noise
        if options.variant == "sepme-code":
            with torch.no_grad():
                target = kept = predict(world.unet, {}, x_t, t, anchor_states[pick])
        values = {"alignment": losses.alignment(eps_hat, target)}
        if options.prior:
            values["prior"] = losses.alignment(eps_anchor, kept)
        return values

    weights = {"alignment": 1.0, "prior": options.prior}
    with timed(parts, "training"):
        history = run(delta, terms, weights, options.schedule(seed), progress=progress)
    return finished(
        world, delta, history, method=method, concepts=concepts, options=options, seed=seed, start=start, parts=parts
    )
