"""Does it come back? Three attacks on an edited model, each of which runs in seconds.

A concept that is gone from the images may still be in the weights. The attacks look for it where
the prompt does not: in other text states (by gradient descent, or in closed form), and in weights a
few steps away.

Fidelity: concept inversion is the paper's (plain textual inversion) with fewer steps; the closed
form is RECE's derivation step, sampled from instead of edited away; relearning is our reading, the
papers give no protocol for it. The closed form feeds text states past the text encoder, so it
brings back the concept of a text-encoder edit by construction. A guard is no defence against an
attacker who holds the weights, and here it acts on the attacker too.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.closedform import derived_states
from helpers.concepts import TEMPLATES, filled
from helpers.denoise import encode, predict
from helpers.diffusion import noised, to_latents
from helpers.edits import Edit
from helpers.evaluation.scores import accuracy
from helpers.export import dense
from helpers.images import base_images, captions, own_images
from helpers.inversion import Inversion, invert, soft_tokens
from helpers.options import (
    Above,
    Count,
    Images,
    Pictures,
    Positive,
    Seed,
    Share,
    Whole,
    made,
    typed,
)
from helpers.parameters import Dense, Group, select_parameters
from helpers.reader import checked_images
from helpers.sampling import sample, sampling_of
from helpers.seeds import attack_seeds, measured_seeds
from helpers.stats import wilson_interval
from helpers.training import Problem, Training, run
from helpers.worlds import World


@dataclass(frozen=True)
class Attack:
    """What one attack brought back, with what is needed to show it and to repeat it."""

    name: str
    concept: str
    n: int  # images behind each share
    before: float  # ACC of the edited model asked by the concept's name
    after: float  # ACC of the edited model under attack, same seeds
    seconds: float
    details: dict  # further values, ready for JSON
    images: Tensor = field(repr=False)  # the images behind ``after``
    found: Tensor | Edit = field(repr=False)  # soft tokens, text states, or the relearned edit

    def values(self) -> dict:
        """The numbers alone, with 95 % intervals, ready for JSON."""
        shares = ("before", "after")
        intervals = {f"{at}_interval": wilson_interval(getattr(self, at), self.n) for at in shares}
        same = {name: getattr(self, name) for name in ("n", *shares, "seconds")}
        return {**same, **intervals, **self.details}


@dataclass(frozen=True)
class InversionAttack(Inversion):
    """How concept inversion searches, each default with its reason."""

    # how many images of the concept the base model samples for the attacker, a folder of real ones,
    # or the images themselves (k, 3, H, W) in [0, 1]
    images: Images | Pictures = 16
    tokens: Count | None = None  # None: as many as the concept's name has, where the search starts
    steps: Whole = 100  # the paper inverts for thousands
    lr: Positive = 1e-3  # a larger one loses the concept even under an edit of zero, the control
    norm_pull: Share = 0.0


@dataclass(frozen=True)
class Relearning(Training):
    """How the attacker fine-tunes, each default with its reason."""

    images: Images = 4  # how many the base model samples for the attacker, or a folder
    steps: Whole = 60
    look_every: Count = 10  # steps between looks at ACC
    threshold: Annotated[Share, Above(0)] = 0.5  # of ACC: the concept is back
    lr: Positive = 1e-4
    group: Group = "xattn"  # trained, besides what the edit changed
    decay: Literal["constant", "cosine"] = "constant"


def share_of(
    world: World, edit: Edit, concept: str, seeds: list[int], prompt: str, **options
) -> tuple[float, Tensor]:
    """ACC of the edited model's images of one prompt, and the images."""
    images = sample(world, [prompt] * len(seeds), seeds, edit, progress=False, **options)
    return accuracy(world, images, concept), images


def checked(
    world: World, edit: Edit, concept: str, seeds: Iterable[int], sampling: dict | None, seed: int
) -> list[int]:
    """The seeds as a list; ValueError for what cannot work, before any work is done."""
    world.kind(concept)
    edit.require_fit(world)
    sampling_of(world, sampling or {})
    attack_seeds(seed, 0)  # refuses a seed that has no images of its own
    return measured_seeds(seeds, "the seeds of an attack")


def attacker_images(
    world: World, concept: str, images: int | str | dict | Tensor, seed: int, templates: dict
) -> tuple[Tensor, list[str]]:
    """What the attacker trains on, images and captions: none that a method trained on."""
    if isinstance(images, Tensor):
        checked_images(images, size=world.image_size)
        return images, captions(world, [concept], len(images), templates)[0]
    if isinstance(images, int):
        prompts, _ = captions(world, [concept], images, templates)
        return base_images(world, prompts, attack_seeds(seed, images)), prompts
    return own_images(world, [concept], images, templates)[:2]


@typed
def concept_inversion(
    world: World, edit: Edit, concept: str, *, seeds: Iterable[int] = range(8), seed: Seed = 0,
    before: Share | None = None, sampling: dict | None = None, progress: bool = True, **options,
) -> Attack:  # fmt: skip
    """Concept inversion: find a soft token that makes the edited model draw the concept.

    v* = argmin_v E || eps - eps_edited(x_t, c(v), t) ||^2 over images x of the concept

    seeds: one image of the verdict each. before: ACC by name, if it is known already. sampling:
    options of ``sample``, as {"steps": 12}. options: fields of ``InversionAttack``. Returns an
    ``Attack``; ``found`` holds the soft tokens (tokens, width).
    ValueError for an unknown concept, an edit of another base, no seeds or no images.
    Source: Pham et al., Circumventing concept erasure methods.
    """
    start, seeds = time.time(), checked(world, edit, concept, seeds, sampling, seed)
    template, sampling = TEMPLATES[world.kind(concept)][1], sampling or {}
    given = {"start": concept, "template": template, "tokens": None, **options}
    if given["tokens"] is None:
        ids = world.pipe.tokenizer(concept, add_special_tokens=False).input_ids
        given["tokens"] = len(ids)
    chosen = made(InversionAttack, given, "concept_inversion")
    phrased = dict.fromkeys(TEMPLATES, (template,))
    images, _ = attacker_images(world, concept, chosen.images, seed, phrased)
    if before is None:
        before = share_of(world, edit, concept, seeds, concept, **sampling)[0]
    search = {k: getattr(chosen, k) for k in Inversion.__dataclass_fields__}
    v, history = invert(world, images, edit=edit, seed=seed, progress=progress, **search)
    with soft_tokens(world, v) as soft:
        prompt = filled(template, soft)
        after, found = share_of(world, edit, concept, seeds, prompt, **sampling)
    details = {"steps": len(history), "tokens": chosen.tokens, "training_images": len(images)}
    name = "concept inversion"
    return Attack(name, concept, len(seeds), before, after, since(start), details, found, v)


@typed
def keys_and_values(world: World, edit: Edit) -> Iterator[tuple[Tensor, Tensor]]:
    """Each to_k and to_v matrix of the cross-attention, base and edited, float64 on the CPU.

    Both (out, width). Adapters count at full strength.
    """
    increments = dense(edit)
    for name, parameter in select_parameters(world, "kv").items():
        W = parameter.detach().double().cpu()
        yield W, W + increments[name].double() if name in increments else W


@typed
def closed_form_states(
    world: World, edit: Edit, states: Tensor, *, gamma: Positive = 1e-3
) -> Tensor:
    """Text states that give the edited keys and values what the base's gave for ``states``.

    states (n, tokens, width) -> the same shape, fp32 on the CPU: ``closedform.derived_states`` over
    the matrices to_k and to_v of every cross-attention. An edit that leaves keys and values alone
    is answered by states almost unchanged. ValueError for gamma <= 0 or an edit of another base.
    """
    edit.require_fit(world)
    return derived_states(states, keys_and_values(world, edit), gamma=gamma)


@typed
def closed_form_embedding(
    world: World, edit: Edit, concept: str, *, seeds: Iterable[int] = range(8),
    gamma: Positive = 1e-3, before: Share | None = None, sampling: dict | None = None,
) -> Attack:  # fmt: skip
    """The closed-form embedding: undo the edit of keys and values in the text states, then sample.

    States: ``closed_form_states`` of the concept's name, from the edited model. No training;
    ``found`` holds the states (1, tokens, width), ``details["residual"]`` what the equations leave:
    || W'c' - W c || / || W c || over all layers. Other arguments, result and errors as
    ``concept_inversion``. Source: RECE, whose next step would erase them too.
    """
    start, seeds = time.time(), checked(world, edit, concept, seeds, sampling, 0)
    sampling = sampling or {}
    if before is None:
        before = share_of(world, edit, concept, seeds, concept, **sampling)[0]
    states = world.encode([concept]).float().cpu()
    found = closed_form_states(world, edit, states, gamma=gamma)
    given = found.expand(len(seeds), -1, -1)
    after, images = share_of(world, edit, concept, seeds, concept, states=given, **sampling)
    missed, whole = 0.0, 0.0
    for W, W_new in keys_and_values(world, edit):
        aim = states.double() @ W.T
        missed += (found.double() @ W_new.T - aim).pow(2).sum().item()
        whole += aim.pow(2).sum().item()
    details = {"gamma": gamma, "residual": (missed / whole) ** 0.5}
    name = "closed-form embedding"
    return Attack(name, concept, len(seeds), before, after, since(start), details, images, found)


@typed
def relearn(
    world: World, edit: Edit, concept: str, *, seeds: Iterable[int] = range(8), seed: Seed = 0,
    sampling: dict | None = None, progress: bool = True, **options,
) -> Attack:  # fmt: skip
    """Relearning: fine-tune the edited model on a few images until the concept is back.

    L = || eps - eps_{theta + delta}(x_t, c, t) ||^2, delta starting at the edit's

    options: fields of ``Relearning``. ACC is taken every ``look_every`` steps; the first step with
    ACC >= threshold is ``details["back_after"]``, None if ``steps`` were not enough (0: it was
    never gone). ``details["curve"]`` holds (step, ACC); ``found`` the relearned ``Edit``. Other
    arguments, result and errors as ``concept_inversion``.
    Source: our reading; steps until the concept is back, as in studies of fine-tuning after
    unlearning.
    """
    start, seeds = time.time(), checked(world, edit, concept, seeds, sampling, seed)
    chosen, sampling = made(Relearning, options, "relearn"), sampling or {}
    curve: list[tuple[int, float]] = []
    last: dict = {}  # the edit and the images of the last look
    found = relearning(world, edit, concept, chosen, seed)

    def look(step: int) -> bool:
        now = {name: value.detach().cpu().clone() for name, value in found.leaves.items()}
        relearned = replace(edit, delta=now, parts={})
        share, images = share_of(world, relearned, concept, seeds, concept, **sampling)
        curve.append((step, share))
        last.update(edit=relearned, images=images)
        return share >= chosen.threshold

    def look_now(step: int) -> bool:
        return step % chosen.look_every == 0 and look(step)

    found.after_step = look_now
    if not look(0):
        run(found, chosen, seed=seed, progress=progress)
        if curve[-1][0] < chosen.steps and curve[-1][1] < chosen.threshold:
            look(chosen.steps)
    back_after = next((step for step, share in curve if share >= chosen.threshold), None)
    details = {"back_after": back_after, "threshold": chosen.threshold, "curve": curve}
    details["training_images"] = found.meta["images"]["n"]
    before, after, spent = curve[0][1], curve[-1][1], since(start)
    images, relearned = last["images"], last["edit"]
    n = len(seeds)
    return Attack("relearning", concept, n, before, after, spent, details, images, relearned)


def relearning(world: World, edit: Edit, concept: str, options: Relearning, seed: int) -> Problem:
    """The attacker's problem: plain denoising of the concept's images, from the edited weights on.

    Adapters and guards stay in force.
    """
    leaves = Dense(world, options.group).leaves
    for name, value in edit.delta.items():
        leaves[name] = value.clone().to(world.device).requires_grad_(True)
    images, prompts = attacker_images(world, concept, options.images, seed, TEMPLATES)
    latents, states = to_latents(world, images).float(), world.encode(prompts).float()
    read_again = any(name.startswith("text_encoder.") for name in leaves)
    frozen = replace(edit, delta={}, parts={})

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        pick = torch.randint(len(latents), (options.batch_size,), generator=generator)
        x_t, t, noise = noised(latents[pick], world.alpha_bar, generator)
        c = states[pick]
        if read_again:
            c = encode(world, [prompts[i] for i in pick.tolist()], leaves)
        with world.applied(frozen):
            eps_hat = predict(world, leaves, x_t, t, c)
        return {"reconstruction": losses.reconstruction(eps_hat, noise)}

    meta = {"images": {"n": len(latents)}}
    return Problem(leaves, lambda: leaves, terms, {"reconstruction": 1.0}, meta=meta)


@typed
def run_all(
    world: World, edit: Edit, concept: str, *, seeds: Iterable[int] = range(8), seed: Seed = 0,
    before: Share | None = None, sampling: dict | None = None, progress: bool = True,
) -> list[Attack]:  # fmt: skip
    """The three attacks one after the other, with their defaults: see ``concept_inversion``."""
    same = {"seeds": seeds, "sampling": sampling}
    quiet = {"seed": seed, "progress": progress}
    return [
        closed_form_embedding(world, edit, concept, before=before, **same),
        concept_inversion(world, edit, concept, before=before, **quiet, **same),
        relearn(world, edit, concept, **quiet, **same),
    ]


def since(start: float) -> float:
    """Seconds since ``start``, rounded."""
    return round(time.time() - start, 1)
