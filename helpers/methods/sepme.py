"""SepME: one increment for each concept, under which the other concepts' keys and values stay.

Increment of each to_k and to_v: delta = w (beta S)^T with A S = 0, A the text states of the
protected prompts (SepME, Eq. 8-10); w is trained on G-CiRs' correlation plus lam ||W||_1 / M (Eq.
11). So increments add, and one is taken back by -.

Fidelity: S is an orthonormal basis from a singular value decomposition, where the release reduces
rows: the same space, other coordinates for Adam and for the norm of w. ``variant="code-jan"`` and
``"code-head"`` are the release's two states, for study (``VARIANTS``). January's joint training
also copies a concept's w when its term stops, while the live one moves on: here it rests, which
comes to the same, since no other concept's prompts see it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from helpers import losses
from helpers.concepts import filled
from helpers.edits import Edit
from helpers.methods import gcirs, options_of, unlearn
from helpers.nullspace import null_space_report
from helpers.options import Above, Below, Names, Positive, Prompt, Seed, typed
from helpers.parameters import NullSpace
from helpers.training import Problem
from helpers.worlds import World

VARIANTS = {  # what the release does otherwise than the paper says, unless the user says otherwise
    "code-jan": {"accumulate_grads": True, "penalty": "w-mean", "mean_of_active": True},
    "code-head": {"accumulate_grads": True, "penalty": "delta"},
}


@dataclass(frozen=True)
class Options(gcirs.Options):
    """G-CiRs' options, and SepME's own, each default with its reason."""

    tau: float | tuple[float, ...] = 0.0  # the paper's default, which is enough here
    # only keys and values read the text alone, so only they can be protected for every image
    group: Literal["kv"] = "kv"
    lr: Positive = 1e-3  # a step of Adam moves increments by lr * beta; the paper's product is 1e-6
    beta: Positive = 1.0  # scale of S; at the paper's 1e-4 gradients come near Adam's epsilon
    known: Names = ()  # concepts protected besides those that are erased together
    # templates ("a church in the style of {c}") or whole prompts, protected too
    protect: tuple[Prompt, ...] = ()
    # share of A's energy to protect if prompts fill the space; None: all
    energy: Annotated[float, Above(0), Below(1)] | None = None
    # ||w||_1 / M (paper); the sum of mean |w| (January); ||delta||_1 / M (later)
    penalty: Literal["w", "w-mean", "delta"] = "w"
    mean_of_active: bool = False  # divide the loss by the number of active concepts (January)
    # all at once (Table 3); one after another (SepME1); each protecting those before it (SepME2)
    mode: Literal["joint", "separate", "iterative"] = "separate"
    first: dict = field(default_factory=dict)  # G-CiRs' options for the first of "iterative"

    def __post_init__(self):
        super().__post_init__()
        first = options_of("gcirs", self.first)  # a wrong one is refused now
        converted = {name: getattr(first, name) for name in self.first}
        object.__setattr__(self, "first", converted)


def protected_prompts(concepts: list[str], templates: tuple[str, ...] = ()) -> list[str]:
    """The prompts whose keys and values must not move: "", bare names, every template."""
    prompts = ["", *concepts]
    for template in templates:
        prompts += [filled(template, concept, whole=True) for concept in concepts]
    return list(dict.fromkeys(prompts))


def free_directions(world: World, prompts: list[str], options: Options) -> Tensor:
    """beta S: directions of text space that the prompts do not see, (width, nullity), fp32."""
    A = world.encode(prompts).flatten(0, 1)  # every position, padding too: what sampling feeds
    S = null_space_report(A, energy=options.energy).basis
    return (options.beta * S).float().to(world.device)


def penalised(increments: NullSpace, penalty: str) -> Tensor:
    """The norm of one concept's increments that the loss counts: a scalar."""
    if penalty == "w-mean":
        return sum(w.abs().mean() for w in increments.w.values())
    return losses.mean_l1(increments.w if penalty == "w" else increments.delta())


def one_run(
    world: World, concepts: list[str], protected: list[list[str]], taus: tuple[float, ...],
    options: Options, seed: int,
) -> Problem:  # fmt: skip
    """An increment for each concept, which leaves its list of protected prompts as they are."""
    each = {
        concept: NullSpace(world, free_directions(world, prompts, options), f"{i}.")
        for i, (concept, prompts) in enumerate(zip(concepts, protected, strict=True))
    }
    correlations = gcirs.Correlations(world, concepts, options, seed)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        values = correlations(generator, stopped, lambda concept: each[concept].delta())
        active = [part for concept, part in each.items() if gcirs.term(concept) not in stopped]
        values["norm"] = sum(penalised(part, options.penalty) for part in active)
        if not options.mean_of_active:
            return values
        n = len(active)
        return {name: v.detach() + (v - v.detach()) / n for name, v in values.items()}

    leaves = {name: w for part in each.values() for name, w in part.leaves.items()}
    weights = {**{gcirs.term(concept): 1.0 for concept in concepts}, "norm": options.lam}
    meta = {
        concept: {"protected": prompts, "free_directions": each[concept].S.shape[1]}
        for concept, prompts in zip(concepts, protected, strict=True)
    }
    return Problem(
        leaves, lambda: {}, terms, weights, concepts=concepts, meta=meta,
        parts={concept: part.delta for concept, part in each.items()},
        **gcirs.stops(concepts, taus, options),
    )  # fmt: skip


def problem(world: World, concepts: list[str], options: Options, seed: int) -> list[Problem]:
    """One run for all concepts (mode "joint"), or one for each, trained in turn.

    Each protects the other concepts, and ``known``; with mode "iterative" those before it and
    ``known``, and the very first is G-CiRs' on all of cross-attention, which protects nothing.
    """
    taus = dict(zip(concepts, options.taus(concepts), strict=True))
    for name in options.known:
        world.kind(name)
    problems = []
    for group in [concepts] if options.mode == "joint" else [[concept] for concept in concepts]:
        before = concepts[: concepts.index(group[0])]
        if options.mode == "iterative" and not before and not options.known:
            first = options_of("gcirs", {"tau": taus[group[0]], **options.first})
            one = gcirs.problem(world, group, first, seed)
            problems.append(replace(one, concepts=group, training=first))
            continue
        others = before if options.mode == "iterative" else concepts
        known = list(dict.fromkeys([*others, *options.known]))
        protected = [
            protected_prompts([o for o in known if o != c], options.protect) for c in group
        ]
        here = tuple(taus[c] for c in group)
        problems.append(one_run(world, group, protected, here, options, seed))
    return problems


@typed
def erase_separably(
    world: World, concepts: list[str], *, seed: Seed = 0, progress: bool = True,
    folder: str | Path | None = None, **options,
) -> dict[str, Edit]:  # fmt: skip
    """One edit for each concept: ``unlearn(world, concepts, method="sepme", ...).parts``.

    folder: where checkpoints are kept, so that a killed run goes on.
    ValueError for one name in place of a list, and as ``unlearn``.
    """
    whole = unlearn(
        world, concepts, "sepme", seed=seed, progress=progress, checkpoint=folder, **options
    )
    return whole.parts
