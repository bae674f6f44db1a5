"""The one training loop. It knows no method: a ``Problem`` says what is trained, on what, and how.

A method hooks in at three places: its loss ``terms``, what becomes of the ``gradients``, and what
happens ``after_step``.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from helpers.checkpoint import REMEDY, load_checkpoint, moments, restore_moments, save_checkpoint
from helpers.files import shown
from helpers.identity import plain
from helpers.options import (
    AtLeast,
    Below,
    Count,
    File,
    FileName,
    Positive,
    Seed,
    Whole,
    check_options,
    typed,
)
from helpers.seeds import step_generator

Delta = dict[str, Tensor]
SAVE_EVERY = 20  # steps between two checkpoints: it tells no run from another


@dataclass(frozen=True)
class Training:
    """How long and how fast to train: what the ``Options`` of every method begin with.

    Every field is converted and checked by its annotation: one check here serves all methods.
    """

    steps: Whole = 60
    lr: Positive = 1e-4
    batch_size: Count = 4
    decay: Literal["constant", "cosine"] = "cosine"  # "cosine", to a tenth: against overshooting
    clip: Positive | None = 1.0  # largest norm of the gradient; None for no clipping
    accumulate_grads: bool = False  # the releases' missing zero_grad, for study
    checkpoint: FileName | None = None  # a file to write now and then, and to go on from

    def __post_init__(self):
        check_options(self)

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        if self.decay == "constant":
            return self.lr
        share = step / max(1, self.steps)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def backward(terms: dict[str, Tensor], weights: dict[str, float], leaves: Delta) -> Tensor:
    """The plain way: clear the gradients, then differentiate L = sum_k weights[k] * terms[k].

    Cleared gradients are None, so Adam leaves alone what no term trains any more. Returns L.
    """
    for leaf in leaves.values():
        leaf.grad = None
    return accumulated(terms, weights, leaves)


def accumulated(terms: dict[str, Tensor], weights: dict[str, float], leaves: Delta) -> Tensor:
    """The releases' way, which never clears a gradient: each step's is added to those before.

    A leaf to which this step adds nothing gets no gradient: it rests. Returns L.
    """
    loss = total(terms, weights)
    before = [
        (leaf, leaf.grad, leaf.grad._version) for leaf in leaves.values() if leaf.grad is not None
    ]
    loss.backward()
    for leaf, grad, version in before:
        if leaf.grad is grad and grad._version == version:
            leaf.grad = None
    return loss


def total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """L = sum_k weights[k] * terms[k]."""
    return sum(weights[name] * value for name, value in terms.items())


@dataclass
class Problem:
    """What a method trains.

    leaves: what Adam moves, by name. delta: leaves -> increments by full parameter name. terms:
    (step, generator, stopped) -> loss terms by name; weights: of the terms.
    stop_below: a term (or "total") -> tau; it stops once its statistic m is below, with
    m = momentum m + (1 - momentum) L, m_0 the first value, and ``min_steps`` updates done.
    state: tensors besides the leaves that checkpoints keep (an EMA teacher, a discriminator).
    gradients: (terms, weights, leaves) -> L, leaving gradients in the leaves (None: ``backward``).
    after_step: called with the number of updates done; True ends the run.
    parts: concept -> its increments, where a method keeps them apart. training: a schedule other
    than the options'. concepts: whose increments these are, if not all. timings, meta: what the
    method adds to the edit's meta.
    """

    leaves: Delta
    delta: Callable[[], Delta]
    terms: Callable[[int, torch.Generator, frozenset[str]], dict[str, Tensor]]
    weights: dict[str, float]
    stop_below: dict[str, float] = field(default_factory=dict)
    momentum: Annotated[float, AtLeast(0), Below(1)] = 0.9
    min_steps: Whole = 12
    state: dict[str, Tensor] = field(default_factory=dict)
    gradients: Callable[[dict, dict, Delta], Tensor] | None = None
    after_step: Callable[[int], bool | None] = lambda done: None
    parts: dict[str, Callable[[], Delta]] = field(default_factory=dict)
    training: Training | None = None
    concepts: list[str] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    meta: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        check_options(self, "stop_below", "momentum", "min_steps")


@dataclass
class Watch:
    """The statistic of each watched term, and which of them have stopped."""

    problem: Problem
    statistics: dict[str, float] = field(default_factory=dict)
    stopped: frozenset[str] = frozenset()

    @classmethod
    def after(cls, problem: Problem, history: list[dict]) -> "Watch":
        """Where a resumed run stands."""
        if not history:
            return cls(problem)
        return cls(problem, dict(history[-1]["statistics"]), frozenset(history[-1]["stopped"]))

    @property
    def ended(self) -> bool:
        """Whether every watched term has stopped."""
        return bool(self.stopped) and self.stopped == set(self.problem.stop_below)

    def see(self, row: dict[str, float], done: int) -> dict:
        """Take in one step's values, ``done`` updates made; returns the state for the history."""
        taus, a = self.problem.stop_below, self.problem.momentum
        for name in {"total", *taus} & set(row):
            m = self.statistics.get(name, row[name])
            self.statistics[name] = a * m + (1 - a) * row[name]
        if done >= self.problem.min_steps:
            below = {n for n, tau in taus.items() if self.statistics.get(n, math.inf) < tau}
            self.stopped |= below
        return {"statistics": dict(self.statistics), "stopped": sorted(self.stopped)}


@typed
def run(
    problem: Problem, training: Training, *, seed: Seed = 0, identity: dict | None = None,
    checkpoint: File | None = None, save_every: Count | None = None, progress: bool = True,
    last: bool = True,
) -> list[dict]:  # fmt: skip
    """Train the leaves in place by Adam, and return the history: one dict a step.

    The run ends when every watched term has stopped, when ``after_step`` says so, or after
    ``steps``. A term that has stopped is told to ``terms``, which may leave it out; what only it
    trains then rests. The file ``checkpoint`` (default the training's) is written every
    ``save_every`` steps (default ``SAVE_EVERY``) and at the end; a run whose file is there goes on
    from it, bit for bit. At the end it is marked finished, and the same run, asked for again, is
    trained again. last: False for a run that others of the same work follow; its file then stands
    for it until ``finish`` marks it. identity: what else tells this run from others (base, method,
    concepts, options); a checkpoint with another one is refused.
    FloatingPointError names the step at which a term is NaN or infinite; ValueError for a
    checkpoint that is damaged or of another run.
    """
    optimizer = torch.optim.Adam(list(problem.leaves.values()), lr=training.lr)
    name = run_identity(problem, training, seed, identity)
    checkpoint, save_every = checkpoint or training.checkpoint, save_every or SAVE_EVERY
    history, ended = read_checkpoint(checkpoint, problem, optimizer, name)
    if ended:
        return history
    watch = Watch.after(problem, history)
    shown_as = {"desc": "training", "disable": not progress, "leave": False}
    with tqdm(initial=len(history), total=training.steps, **shown_as) as bar:
        for step in range(len(history), training.steps):
            if watch.ended:
                break
            terms = problem.terms(step, step_generator(seed, step), watch.stopped)
            row = finite(step, terms, problem.weights)
            row |= update(problem, training, optimizer, terms, step)
            ended = problem.after_step(step + 1)
            history.append({**row, **watch.see(row, step + 1)})
            bar.update()
            bar.set_postfix(loss=f"{row['total']:.3g}")
            if ended:  # before a checkpoint, which would go on where this run has ended
                break
            if checkpoint and len(history) % save_every == 0:
                write_checkpoint(checkpoint, problem, optimizer, history, name)
    if checkpoint:
        state = "finished" if last else "ended"
        write_checkpoint(checkpoint, problem, optimizer, history, name, state)
    return history


def update(
    problem: Problem, training: Training, optimizer: torch.optim.Optimizer,
    terms: dict[str, Tensor], step: int,
) -> dict[str, float]:  # fmt: skip
    """One update of the leaves: gradients, clipping, Adam. Returns the norm, if it was clipped."""
    gradients = problem.gradients or (accumulated if training.accumulate_grads else backward)
    gradients(terms, problem.weights, problem.leaves)
    row = {}
    if training.clip is not None:
        leaves = list(problem.leaves.values())
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(leaves, training.clip).item()
    for group in optimizer.param_groups:
        group["lr"] = training.rate(step)
    optimizer.step()
    return row


def finite(step: int, terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, float]:
    """The values of one step as numbers; FloatingPointError if one of them is none."""
    values = {name: value.item() for name, value in terms.items()}
    row = {"step": step, **values, "total": total(terms, weights).item()}
    if not all(math.isfinite(value) for value in row.values()):
        raise FloatingPointError(
            f"the loss at step {step} is not finite ({row}): lower the learning rate"
        )
    return row


def run_identity(problem: Problem, training: Training, seed: int, more: dict | None) -> dict:
    """Everything that tells one run from another, as JSON has it; not the checkpoint's own name."""
    schedule = {f.name: getattr(training, f.name) for f in fields(Training)}
    options = {k: v for k, v in asdict(training).items() if k not in schedule}
    schedule.pop("checkpoint")
    stops = {k: getattr(problem, k) for k in ("stop_below", "momentum", "min_steps")}
    found = {**schedule, **stops, "weights": problem.weights, "seed": seed, "options": options}
    return plain({**found, **(more or {})}, "the run")


def write_checkpoint(
    path: str | Path, problem: Problem, optimizer, history: list[dict], name: dict,
    state: str = "under way",
) -> None:  # fmt: skip
    """Write a checkpoint. state: "under way", "ended" (others of the same work follow) or
    "finished"."""
    grads = {n: leaf.grad for n, leaf in problem.leaves.items() if leaf.grad is not None}
    groups = {
        "adam": moments(optimizer), "weight": problem.leaves, "grad": grads, "state": problem.state,
    }  # fmt: skip
    save_checkpoint(path, groups, history=history, run=name, progress=state)


def finish(path: str | Path) -> None:
    """Mark a checkpoint finished, once the whole work that it is a part of is done."""
    groups, metadata = load_checkpoint(path)
    save_checkpoint(path, groups, **{**metadata, "progress": "finished"})


def read_checkpoint(
    path: str | Path | None, problem: Problem, optimizer, name: dict
) -> tuple[list[dict], bool]:
    """Read a checkpoint, if there is one, into the leaves, the state and Adam.

    Returns its history and whether its run has ended. A finished run's gives nothing. ValueError
    names the file if it is damaged, of another run, or no checkpoint of a training.
    """
    if not path or not Path(path).exists():
        return [], False
    groups, metadata = load_checkpoint(path)
    require_run(path, groups, metadata, problem, name)
    if metadata.get("progress") == "finished":
        return [], False
    for group, tensors in (("weight", problem.leaves), ("state", problem.state)):
        for n, value in groups.get(group, {}).items():
            tensors[n].data.copy_(value)
    for n, value in groups.get("grad", {}).items():
        problem.leaves[n].grad = value.to(problem.leaves[n].device)
    restore_moments(optimizer, groups.get("adam", {}))
    return metadata["history"], metadata.get("progress") == "ended"


def require_run(
    path: str | Path, groups: dict, metadata: dict, problem: Problem, name: dict
) -> None:
    """ValueError, with the reason and the remedy, for a checkpoint that this run cannot go on from.

    name: what ``run_identity`` says of this run.
    """
    theirs, history = metadata.get("run"), metadata.get("history")
    if not isinstance(theirs, dict) or not isinstance(history, list):
        raise ValueError(f"{shown(path)} is no checkpoint of a training: {REMEDY}")
    differing = [k for k in name if theirs.get(k) != name[k]]
    ours = {"weight": problem.leaves, "state": problem.state}
    held = {group: groups.get(group, {}) for group in ours}
    strange = [n for group in ours for n in held[group].keys() - ours[group].keys()]
    if differing or strange:
        why = f"its {', '.join(differing)} differ" if differing else f"it holds {strange[0]}"
        raise ValueError(f"{shown(path)} is the checkpoint of another run ({why}): {REMEDY}")
    for group, tensors in ours.items():
        for n, tensor in tensors.items():
            if n not in held[group] or held[group][n].shape != tensor.shape:
                raise ValueError(f"{shown(path)} lacks the {group} {n!r} of this run: {REMEDY}")
    adam = groups.get("adam", {})
    moved = {key.split(".")[0] for key in adam}
    whole = all(f"{i}.{key}" in adam for i in moved for key in ("step", "exp_avg", "exp_avg_sq"))
    known = {str(i) for i in range(len(problem.leaves))}
    if not whole or not moved <= known or (history and not moved):
        raise ValueError(f"{shown(path)} lacks Adam's moments of this run: {REMEDY}")
    if not groups.get("grad", {}).keys() <= problem.leaves.keys():
        raise ValueError(f"{shown(path)} holds gradients of another run: {REMEDY}")
