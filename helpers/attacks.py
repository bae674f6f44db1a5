"""Does it come back? Three attacks on an edited model, each of which runs in seconds.

A concept that is gone from the pictures may still be in the weights. The attacks look for it where the prompt does not:
in other text states (by gradient descent, or in closed form), and in weights a few steps away.
Fidelity: concept inversion is the paper's (plain textual inversion) with fewer steps; the closed form is RECE's
derivation step, drawn from instead of edited away; relearning is our reading, the papers give no protocol for it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers import losses, metrics
from helpers.diffusion import noised
from helpers.edits import Edit
from helpers.inversion import invert, soft_tokens
from helpers.sampling import sample
from helpers.training import (
    TEMPLATES,
    Schedule,
    concept_latents,
    drawn_images,
    folder_images,
    new_increments,
    predict,
    run,
    select_parameters,
    training_seeds,
)
from helpers.worlds import World

SEEN_BY_NONE = 400  # seeds of the attackers' own pictures: far from those that the methods train on by default


@dataclass(frozen=True)
class Attack:
    """What one attack brought back, with what is needed to show it and to repeat it."""

    name: str
    concept: str
    n: int  # pictures behind each share
    before: float  # ACC of the edited model asked by the concept's name
    after: float  # ACC of the edited model under attack, same seeds
    seconds: float
    details: dict  # further figures, ready for JSON
    images: Tensor = field(repr=False)  # the pictures behind ``after``
    found: Tensor | Edit = field(repr=False)  # the soft tokens, the text states, or the relearned edit

    def figures(self) -> dict:
        """The figures alone, with 95 % intervals, ready for JSON."""
        intervals = {f"{at}_interval": metrics.interval(getattr(self, at), self.n) for at in ("before", "after")}
        same = {name: getattr(self, name) for name in ("n", "before", "after", "seconds")}
        return {**same, **intervals, **self.details}


def _share(world: World, edit: Edit, concept: str, seeds: list[int], prompt: str, **options) -> tuple[float, Tensor]:
    """ACC of the edited model's pictures of one prompt, and the pictures."""
    images = sample(world, [prompt] * len(seeds), seeds, edit=edit, progress=False, **options)
    return metrics.accuracy(world, images, concept), images


def _checked(world: World, edit: Edit, concept: str, seeds: list[int]) -> list[int]:
    """Refuse what cannot work before any work is done."""
    world.kind(concept)
    edit.check(world)
    if len(seeds) == 0:
        raise ValueError("an attack is measured on pictures: give at least one seed")
    return list(seeds)


def concept_inversion(
    world: World, edit: Edit, concept: str, *, seeds: list[int] = range(8), images: int | str | Tensor = 16,
    tokens: int | None = None, steps: int = 100, lr: float = 1e-3, batch_size: int = 4, seed: int = 0,
    before: float | None = None, drawing: dict | None = None, progress: bool = True,
) -> Attack:  # fmt: skip
    """Concept inversion: look for a soft token that makes the edited model draw the concept, then draw with it.

    v* = argmin_v E || eps - eps_edited(x_t, c(v), t) ||^2 over pictures x of the concept

    seeds: one picture of the verdict each. images: how many pictures of the concept the base model draws for the
    attacker, a folder of real ones, or the pictures themselves (k, 3, H, W) in [0, 1]. tokens: how many soft tokens;
    None for as many as the concept's name has, and there the search starts. lr: a larger one loses the concept even
    under an edit of zero, the control of this attack. before: ACC by name, if it is known already. drawing: options of
    ``sample``, as {"steps": 25, "guidance": 5.0}. Returns an ``Attack``; ``found`` holds the soft tokens
    (tokens, width).
    ValueError for an unknown concept, an edit of another base, no seeds or no pictures.
    Source: Pham et al., Circumventing concept erasure methods, which inverts for thousands of steps.
    """
    start, seeds = time.time(), _checked(world, edit, concept, seeds)
    drawing = drawing or {}
    if tokens is None:
        tokens = len(world.pipe.tokenizer(concept, add_special_tokens=False).input_ids)
    template = TEMPLATES[world.kind(concept)][1]
    if isinstance(images, int):
        captions = [template.format(c=concept)] * images
        images = drawn_images(world, captions, training_seeds(seed + SEEN_BY_NONE, images))
    elif not isinstance(images, Tensor):
        images = folder_images(images, world.image_size)
    before = _share(world, edit, concept, seeds, concept, **drawing)[0] if before is None else before
    v, history = invert(
        world, images, tokens=tokens, start=concept, template=template, edit=edit, steps=steps, lr=lr,
        batch_size=batch_size, pull=0.0, seed=seed, progress=progress,
    )  # fmt: skip
    with soft_tokens(world, v) as soft:
        after, drawn = _share(world, edit, concept, seeds, template.format(c=soft), **drawing)
    details = {"steps": len(history), "tokens": tokens, "pictures": len(images)}
    return Attack("concept inversion", concept, len(seeds), before, after, _since(start), details, drawn, v)


def keys_and_values(world: World, edit: Edit) -> Iterator[tuple[Tensor, Tensor]]:
    """Each to_k and to_v matrix of the cross-attention, base and edited: (out, width) both, float64 on the CPU."""
    for name, parameter in select_parameters(world.unet, "kv").items():
        W = parameter.detach().double().cpu()
        yield W, W + edit.delta[name].double() if name in edit.delta else W


def closed_form_states(world: World, edit: Edit, states: Tensor, *, gamma: float = 1e-3) -> Tensor:
    """Text states that give the edited keys and values what the base's gave for ``states``, in closed form.

    C' = argmin sum_l || W_l' c' - W_l c ||^2 + gamma || c' ||^2 = (gamma I + sum_l W_l'^T W_l')^-1 (sum_l W_l'^T W_l) c

    for every token's row c; l runs over the matrices to_k and to_v of every cross-attention layer, W base, W' edited.
    states (n, tokens, width) -> the same shape, fp32 on the CPU; solved in float64. gamma > 0 (RECE: 1e-3 for styles
    and hard objects, 0.1 for easy ones). An edit that leaves keys and values alone is answered by states almost
    unchanged. ValueError for gamma <= 0 or an edit of another base. Source: RECE, its derivation of the target
    embedding.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: give a positive number, or the equations may have no unique solution")
    edit.check(world)
    c = states.double().cpu()
    gram = gamma * torch.eye(c.shape[-1], dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for W, W_new in keys_and_values(world, edit):
        gram += W_new.T @ W_new
        cross += W_new.T @ W
    return (c @ torch.linalg.solve(gram, cross).T).float()


def closed_form_embedding(
    world: World, edit: Edit, concept: str, *, seeds: list[int] = range(8), gamma: float = 1e-3,
    before: float | None = None, drawing: dict | None = None,
) -> Attack:  # fmt: skip
    """The closed-form embedding: undo the edit of keys and values in the text states, then draw from those.

    States: ``closed_form_states`` of the concept's name, from the edited model. No training; ``found`` holds the states
    (1, tokens, width), ``details["residual"]`` what the equations leave: || W'c' - W c || / || W c || over all layers.
    Other arguments, result and errors as ``concept_inversion``. Source: RECE, whose next step would erase them too.
    """
    start, seeds = time.time(), _checked(world, edit, concept, seeds)
    drawing = drawing or {}
    before = _share(world, edit, concept, seeds, concept, **drawing)[0] if before is None else before
    states = world.encode([concept]).float().cpu()
    found = closed_form_states(world, edit, states, gamma=gamma)
    given = found.expand(len(seeds), -1, -1)
    after, drawn = _share(world, edit, concept, seeds, concept, states=given, **drawing)
    missed, whole = 0.0, 0.0
    for W, W_new in keys_and_values(world, edit):
        aim = states.double() @ W.T
        missed += (found.double() @ W_new.T - aim).pow(2).sum().item()
        whole += aim.pow(2).sum().item()
    details = {"gamma": gamma, "residual": (missed / whole) ** 0.5}
    return Attack("closed-form embedding", concept, len(seeds), before, after, _since(start), details, drawn, found)


def relearn(
    world: World, edit: Edit, concept: str, *, seeds: list[int] = range(8), images: int | str = 4, steps: int = 60,
    every: int = 10, threshold: float = 0.5, lr: float = 1e-4, batch_size: int = 4, group: str = "xattn", seed: int = 0,
    drawing: dict | None = None, progress: bool = True,
) -> Attack:  # fmt: skip
    """Relearning: fine-tune the edited model on a few pictures of the concept until the judge sees it again.

    L = || eps - eps_{theta + delta}(x_t, c, t) ||^2, delta starting at the edit's

    images: how many the base model draws for the attacker, or a folder. Trained: the ``group`` and what the edit
    changed. ACC is taken every ``every`` steps; the first step with ACC >= threshold is ``details["back_after"]``, None
    if ``steps`` were not enough (0: it was never gone). ``details["curve"]`` holds (step, ACC); ``found`` the relearned
    ``Edit``. Other arguments, result and errors as ``concept_inversion``; also ValueError for every < 1 or threshold
    outside (0, 1]. Source: our reading; steps until the concept is back, as in studies of fine-tuning after unlearning.
    """
    start, seeds = time.time(), _checked(world, edit, concept, seeds)
    if every < 1 or not 0 < threshold <= 1:
        raise ValueError(f"every is {every} and threshold {threshold}: want every >= 1 and a threshold in (0, 1]")
    delta = new_increments(world.unet, group)
    for name, value in edit.delta.items():
        delta[name] = value.clone().to(world.device).requires_grad_(True)
    latents, prompts, _ = concept_latents(world, [concept], images, seed + SEEN_BY_NONE)
    states = world.encode(prompts).float()
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
    curve: list[tuple[int, float]] = []
    last: dict = {}  # what the last look saw

    def look(step: int) -> None:
        now = Edit({name: value.detach().cpu().clone() for name, value in delta.items()}, meta=dict(edit.meta))
        share, drawn = _share(world, now, concept, seeds, concept, **(drawing or {}))
        curve.append((step, share))
        last.update(edit=now, images=drawn)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        if step % every == 0:
            look(step)
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        x_t, t, noise = noised(latents[pick], alpha_bar, generator)
        eps_hat = predict(world.unet, delta, x_t, t, states[pick])
        missing = torch.tensor(1 - curve[-1][1])  # weight 0: watched by the early stop, trains nothing
        return {"reconstruction": losses.reconstruction(eps_hat, noise), "missing": missing}

    schedule = Schedule(
        steps=steps, lr=lr, batch_size=batch_size, decay="constant", momentum=0.0, min_steps=1, seed=seed,
        stop_below={"missing": 1 - threshold + 1e-6},
    )  # fmt: skip
    run(delta, terms, {"reconstruction": 1.0, "missing": 0.0}, schedule, progress=progress)
    if not curve or curve[-1][1] < threshold:
        look(steps)
    back_after = next((step for step, share in curve if share >= threshold), None)
    details = {"back_after": back_after, "threshold": threshold, "curve": curve, "pictures": len(latents)}
    before, after = curve[0][1], curve[-1][1]
    return Attack(
        "relearning", concept, len(seeds), before, after, _since(start), details, last["images"], last["edit"]
    )


def every(
    world: World, edit: Edit, concept: str, *, seeds: list[int] = range(8), before: float | None = None, seed: int = 0,
    drawing: dict | None = None, progress: bool = True,
) -> list[Attack]:  # fmt: skip
    """The three attacks one after the other, with their defaults. Arguments as ``concept_inversion``."""
    same = {"seeds": seeds, "drawing": drawing}
    return [
        closed_form_embedding(world, edit, concept, before=before, **same),
        concept_inversion(world, edit, concept, before=before, seed=seed, progress=progress, **same),
        relearn(world, edit, concept, seed=seed, progress=progress, **same),
    ]


def _since(start: float) -> float:
    return round(time.time() - start, 1)
