"""Methods: each turns a world and a concept into an ``Edit``. ``unlearn`` is the one door to them.

A method is a module with ``Options`` and either ``problem(world, concepts, options, seed)``, which
returns what to train (or several problems, trained in turn, each an edit of its own), or
``solve(world, concepts, options, seed)``, which returns an ``Edit``; and an entry in
``data/methods.toml``. Nothing else lists methods.
"""

import functools
import importlib
import time
import tomllib
import unicodedata
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType

from helpers.concepts import DATA
from helpers.edits import Edit
from helpers.options import File, Seed, made, near, typed
from helpers.parameters import parts_of
from helpers.provenance import base_parts, device_of, pictures_digest, versions
from helpers.training import Delta, Problem, Training, finish, run
from helpers.worlds import World


@typed
def catalogue(path: File = DATA / "methods.toml") -> dict[str, dict]:
    """A catalogue of methods: name -> what its file says of it, in the file's order.

    FileNotFoundError for a file that is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no catalogue {str(path)!r}: give a TOML file of methods")
    return tomllib.loads(Path(path).read_text())


METHODS: dict[str, dict] = catalogue()
NFC = functools.partial(unicodedata.normalize, "NFC")


def module_of(method: str) -> ModuleType:
    """The module of a method, imported when it is asked for. ValueError for an unknown name."""
    if not isinstance(method, str) or method not in METHODS:
        hint = near(method, METHODS)
        raise ValueError(f"unknown method {method!r}{hint}: choose from {', '.join(METHODS)}")
    return importlib.import_module(METHODS[method]["module"])


@typed
def options_of(method: str, given: dict) -> Training:
    """A method's options: its defaults, then the variant's presets, and the user's word last.

    ValueError for an option that the method does not have, or a value that it does not take.
    """
    module, variant = module_of(method), given.get("variant")
    presets = getattr(module, "VARIANTS", {})
    chosen = presets.get(variant, {}) if isinstance(variant, str) else {}
    return made(module.Options, {**chosen, **given}, method)


@typed
def concepts_of(world: World, concept: str | list[str]) -> list[str]:
    """The concepts asked for. ValueError for none, one named twice, or an unknown one.

    Two names are one where they differ in the encoding of an accent only, or in outer spaces.
    """
    concepts = [concept] if isinstance(concept, str) else list(concept)
    if not concepts or len({NFC(name).strip() for name in concepts}) < len(concepts):
        raise ValueError(f"concepts is {concepts!r}: give different names, at least one")
    for name in concepts:
        world.kind(name)
    return concepts


@typed
def unlearn(
    world: World, concept: str | list[str], method: str, *, seed: Seed = 0, progress: bool = True,
    **options,
) -> Edit:  # fmt: skip
    """Make the world forget one concept, or several at once; the world itself is unchanged.

    concept: a style, object or person of the world, or a list of them. options: fields of the
    method's ``Options``. Returns the ``Edit``. The same seed gives the same edit, to the bit on a
    CPU. ValueError names an unknown concept, method or option; RuntimeError inside
    ``world.applied(...)``, where an edited model would be taken for the base.
    """
    module, chosen = module_of(method), options_of(method, options)
    concepts = concepts_of(world, concept)
    if world.is_edited:
        raise RuntimeError("an edit is applied: leave the `with world.applied(...)` block first")
    start, made = time.time(), {"method": method, "options": asdict(chosen), "seed": seed}
    made |= {"versions": versions(), "world": standing(world)}
    if pictures := pictures_digest(made["options"].get("images", 0)):
        made["pictures"] = pictures
    if hasattr(module, "solve"):
        edit = module.solve(world, concepts, chosen, seed)
        edit.meta = {**made, "concepts": dict.fromkeys(concepts, 1.0), **edit.meta}
        touched = [*edit.delta, *(name for a in edit.adapters for name in a.down)]
        edit.meta["base"] = bases(world, touched)
    else:
        problem = module.problem(world, concepts, chosen, seed)
        prepared = time.time() - start
        edit = train(world, problem, concepts, chosen, made, progress=progress)
        edit.meta["timings"] = {"preparation": round(prepared, 2), **edit.meta["timings"]}
    edit.meta["seconds"] = round(time.time() - start, 1)
    return edit


def standing(world: World) -> dict:
    """What a training depends on in its world, as it stands now: parts, sampling, device."""
    return {
        "parts": base_parts(world),
        "sampling": asdict(world.sampling),
        "device": device_of(world),
    }


def bases(world: World, names) -> dict[str, str]:
    """The fingerprints of the parts that parameters of these full names belong to."""
    return {part: world.fingerprint(part) for part in parts_of(names)}


def train(
    world: World, problem: Problem | list[Problem], concepts: list[str], options: Training,
    made: dict, *, progress: bool,
) -> Edit:  # fmt: skip
    """Train a problem, or several in turn, whose edits then add up and stay apart as ``parts``.

    Several problems keep their checkpoints in a folder of that name, each until all are done.
    """
    how = {"options": options, "made": made, "progress": progress}
    if not isinstance(problem, list):
        return train_one(world, problem, concepts, options.checkpoint, **how)
    edits, paths = [], []
    for i, one in enumerate(problem):
        path = options.checkpoint and str(Path(options.checkpoint) / f"{i}.safetensors")
        paths += [path] if path else []
        edits.append(train_one(world, one, one.concepts or concepts, path, last=False, **how))
    for path in paths:
        finish(path)
    if len(edits) == 1:
        only = edits[0]
        return only if only.parts else replace(only, parts={only.erased[0]: only})
    whole = Edit.sum(edits)
    whole.history = [row for edit in edits for row in edit.history]
    timings = {
        k: sum(e.meta["timings"].get(k, 0.0) for e in edits) for k in edits[0].meta["timings"]
    }
    whole.meta = {**made, "concepts": whole.concepts, "base": whole.base, "timings": timings}
    return whole


def identity(made: dict, concepts: list[str]) -> dict:
    """What tells one training from another, besides its schedule and seed."""
    known = {f.name for f in fields(Training)}
    options = {name: value for name, value in made["options"].items() if name not in known}
    base, sampling = (made["world"][key] for key in ("parts", "sampling"))
    return {
        "base": base, "sampling": sampling, "method": made["method"], "concepts": concepts,
        "options": options, "pictures": made.get("pictures"),
    }  # fmt: skip


def train_one(
    world: World, problem: Problem, concepts: list[str], checkpoint: str | None, *,
    options: Training, made: dict, progress: bool, last: bool = True,
) -> Edit:  # fmt: skip
    """Run one problem; its edit, with a part for each concept where the problem has some.

    last: False if others of the same work follow (see ``training.run``).
    """
    start = time.time()
    history = run(
        problem, problem.training or options, seed=made["seed"], identity=identity(made, concepts),
        checkpoint=checkpoint, progress=progress, last=last,
    )  # fmt: skip
    spent = time.time() - start - sum(problem.timings.values())
    timings = {**{k: round(v, 2) for k, v in problem.timings.items()}, "training": round(spent, 2)}

    def edit(delta: Delta, names: list[str]) -> Edit:
        values = {name: value.detach().float().cpu() for name, value in delta.items()}
        meta = {
            **made, "concepts": dict.fromkeys(names, 1.0), "base": bases(world, values),
            "timings": timings,
        }  # fmt: skip
        more = problem.meta.get(names[0], {}) if len(names) == 1 else {}
        return Edit(values, history, {**meta, **more})

    if not problem.parts:
        return edit(problem.delta(), concepts)
    parts = {name: edit(delta(), [name]) for name, delta in problem.parts.items()}
    whole = Edit.sum([replace(part, history=history) for part in parts.values()])
    whole.history, whole.parts = history, parts
    whole.meta = {**made, "concepts": whole.concepts, "base": whole.base, "timings": timings}
    return whole
