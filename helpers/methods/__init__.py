"""Methods: each turns a world and a concept into an ``Edit``. ``unlearn`` is the one door to all of them."""

import dataclasses
from types import ModuleType

from helpers.edits import Edit
from helpers.methods import abconcept, attention_losses, esd, fmn, fmn_sepme, gcirs, sdd, sepme
from helpers.worlds import World

METHODS: dict[str, ModuleType] = {
    "resteering": attention_losses,
    "distraction": attention_losses,
    "random_stimulus": attention_losses,
    "gcirs": gcirs,
    "sepme": sepme,
    "esd": esd,
    "sdd": sdd,
    "abconcept": abconcept,
    "fmn_sepme": fmn_sepme,
    "fmn": fmn,
}


def unlearn(
    world: World, concept: str | list[str], method: str, *, seed: int = 0, progress: bool = True, **options
) -> Edit:
    """Make the world forget one concept, or several at once, and return the edit that does it; the world is unchanged.

    concept: a style, object or person of the world, or a list of them. options: fields of the method's ``Options``.
    The same seed gives the same edit, to the bit on a CPU. ValueError names an unknown concept, method or option.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    concepts = [concept] if isinstance(concept, str) else list(concept)
    if not concepts:
        raise ValueError("the list of concepts is empty: name at least one")
    for name in concepts:
        world.kind(name)
    module = METHODS[method]
    known = [f.name for f in dataclasses.fields(module.Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}: choose from {', '.join(known)}")
    return module.unlearn(world, concepts, method, module.Options(**options), seed=seed, progress=progress)
