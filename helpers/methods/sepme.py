"""SepME: one increment for each concept, built so that the other concepts' keys and values cannot change.

Increment of each to_k and to_v: delta = w (beta S)^T with A S = 0, A the text states of the protected prompts (SepME, Eq. 8-10);
w is trained on G-CiRs' correlation plus lam ||W||_1 / M (Eq. 11). So increments add, and one is taken back by -.
Fidelity: S is an orthonormal basis from a singular value decomposition, where the release reduces rows: the same space, other
coordinates for Adam and for the norm of w. ``variant="code-jan"`` and ``"code-head"`` are the release's two states, for
study (``VARIANTS``). January's joint training also copies a concept's w when its term stops, while the live one moves on:
here it rests, which comes to the same, since no other concept's prompts see it.
"""

import functools
import operator
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from helpers import losses
from helpers.edits import Edit
from helpers.methods import gcirs
from helpers.nullspace import null_space_report
from helpers.training import finished, run, select_parameters
from helpers.worlds import World

MODES = ("joint", "separate", "iterative")
VARIANTS = {  # what the release does otherwise than the paper says: fields of the options
    "paper": {},
    "code-jan": {"accumulate_grads": True, "penalty": "w-mean", "mean_of_active": True},
    "code-head": {"accumulate_grads": True, "penalty": "delta"},
}


@dataclass(frozen=True)
class Options(gcirs.Options):
    """G-CiRs' options, and SepME's own, each default with its reason."""

    variants: ClassVar[dict[str, dict]] = VARIANTS

    tau: float | tuple[float, ...] = 0.0  # the paper's default, which is enough here
    group: str = "kv"  # only keys and values read the text alone, so only they can be protected for every picture
    lr: float = 1e-3  # one Adam step moves an increment by lr * beta along each direction; the paper's product is 1e-6
    beta: float = 1.0  # scale of S; the paper's 1e-4 takes gradients near Adam's epsilon, and else only rescales lr
    protect: tuple[str, ...] = ()  # templates ("a church in the style of {c}") or whole prompts, protected besides
    energy: float | None = None  # share of A's energy to protect if whole prompts fill the space; None: all
    penalty: str = "w"  # ||w||_1 / M (paper); "w-mean": the sum of mean |w| (January); "delta": ||delta||_1 / M (later)
    mean_of_active: bool = False  # divide the loss by the number of concepts that have not stopped (January)
    mode: str = "separate"  # "joint" (Table 3), "separate" (SepME1), "iterative" (SepME2)

    def __post_init__(self):
        super().__post_init__()
        if self.group != "kv":
            raise ValueError(f"group is {self.group!r}: SepME protects keys and values, so it trains 'kv' only")
        if self.penalty not in ("w", "w-mean", "delta"):
            raise ValueError(f"unknown penalty {self.penalty!r}: choose 'w', 'w-mean' or 'delta'")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}: choose from {', '.join(MODES)}")


def protected_prompts(concepts: list[str], templates: tuple[str, ...] = ()) -> list[str]:
    """The prompts whose keys and values must not move: the empty one, the bare names, and every template of each."""
    prompts = ["", *concepts]
    for template in templates:
        prompts += [template.format(c=concept) for concept in concepts] if "{c}" in template else [template]
    return list(dict.fromkeys(prompts))


def free_directions(world: World, prompts: list[str], options: Options) -> Tensor:
    """beta S: directions of text space that the prompts do not see, (width, nullity), fp32."""
    A = world.encode(prompts).flatten(0, 1)  # every position, padding too: what sampling feeds
    return (options.beta * null_space_report(A, energy=options.energy).basis).float().to(world.device)


class Increments:
    """One concept's increments: the weights w that are trained, and what they make of the free directions."""

    def __init__(self, world: World, S: Tensor, prefix: str = ""):
        self.S = S
        shapes = {name: p.shape for name, p in select_parameters(world.unet, "kv").items()}
        self.w = {
            n: torch.zeros(shape[0], S.shape[1], device=S.device, requires_grad=True) for n, shape in shapes.items()
        }
        self.prefix = prefix

    def delta(self) -> dict[str, Tensor]:
        """w (beta S)^T for every layer: (d_out, d_in)."""
        return {name: w @ self.S.T for name, w in self.w.items()}

    def trained(self) -> dict[str, Tensor]:
        return {self.prefix + name: w for name, w in self.w.items()}


def penalised(part: Increments, penalty: str) -> Tensor:
    """The norm of one concept's increments that the loss counts, as the option ``penalty`` has it: a scalar."""
    if penalty == "w-mean":
        return sum(w.abs().mean() for w in part.w.values())
    return losses.mean_l1(part.w if penalty == "w" else part.delta())


def train(
    world: World, concepts: list[str], protected: list[list[str]], options: Options, *, seed: int, progress: bool
) -> list[Edit]:
    """One edit for each concept, which leaves its list of protected prompts as they are; all trained in one run."""
    start = time.time()
    schedule = options.until_forgotten(concepts, seed)
    parts = {
        concept: Increments(world, free_directions(world, prompts, options), f"{i}.")
        for i, (concept, prompts) in enumerate(zip(concepts, protected, strict=True))
    }
    correlations = gcirs.Correlations(world, concepts, options, seed)

    def terms(step: int, generator: torch.Generator, stopped: frozenset) -> dict[str, Tensor]:
        values = correlations(generator, stopped, lambda concept: parts[concept].delta())
        active = [part for concept, part in parts.items() if gcirs.term(concept) not in stopped]
        values["norm"] = sum(penalised(part, options.penalty) for part in active)
        if not options.mean_of_active:
            return values
        return {name: value.detach() + (value - value.detach()) / len(active) for name, value in values.items()}

    weights = {**{gcirs.term(concept): 1.0 for concept in concepts}, "norm": options.lam}
    parameters = {name: w for part in parts.values() for name, w in part.trained().items()}
    history = run(parameters, terms, weights, schedule, progress=progress)
    edits = []
    for (concept, part), prompts in zip(parts.items(), protected, strict=True):
        edit = finished(
            world, part.delta(), history, method="sepme", concepts=[concept], options=options, seed=seed, start=start
        )
        edit.meta |= {"protected": prompts, "free_directions": part.S.shape[1]}
        edits.append(edit)
    return edits


def erase_separably(
    world: World, concepts: list[str], *, mode: str = "separate", seed: int = 0, progress: bool = True,
    first: gcirs.Options | None = None, folder: str | Path | None = None, **options,
) -> dict[str, Edit]:  # fmt: skip
    """One edit for each concept: any subset adds up, and each is taken back by -.

    "joint": all at once, each protecting the others (SepME, Table 3). "separate": the same one after another (SepME1).
    "iterative": the first by G-CiRs on all of cross-attention (options ``first``), each later one protecting those before
    it (SepME2). folder: where checkpoints are kept, so that a killed run goes on. options: fields of ``Options``.
    ValueError for no concept, one named twice, an unknown concept or mode, or a null space that is empty.
    """
    chosen = Options(mode=mode, **options)
    if not concepts or isinstance(concepts, str) or len(set(concepts)) < len(concepts):
        raise ValueError(f"concepts is {concepts!r}: give a list of different names, at least one")
    for concept in concepts:
        world.kind(concept)
    taus = chosen.taus(concepts)
    edits: dict[str, Edit] = {}
    for group in [concepts] if mode == "joint" else [[concept] for concept in concepts]:
        checkpoint = str(Path(folder) / f"{concepts.index(group[0])}.safetensors") if folder else None
        if mode == "iterative" and not edits:
            plain = replace(first or gcirs.Options(tau=taus[0]), checkpoint=checkpoint)
            found = [gcirs.unlearn(world, group, "gcirs", plain, seed=seed, progress=progress)]
        else:
            others = list(edits) if mode == "iterative" else concepts
            protected = [protected_prompts([o for o in others if o != c], chosen.protect) for c in group]
            here = replace(chosen, tau=tuple(taus[concepts.index(c)] for c in group), checkpoint=checkpoint)
            found = train(world, group, protected, here, seed=seed, progress=progress)
        edits |= dict(zip(group, found, strict=True))
    return edits


def unlearn(world: World, concepts: list[str], method: str, options: Options, *, seed: int, progress: bool) -> Edit:
    """The sum of ``erase_separably``'s edits: what all of them erase together."""
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    edits = erase_separably(world, concepts, seed=seed, progress=progress, folder=chosen.pop("checkpoint"), **chosen)
    return functools.reduce(operator.add, edits.values())
