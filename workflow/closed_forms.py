"""The closed forms measured: which settings, chosen where, and what they leave and keep.

    python -m workflow.closed_forms choose    # settings, on concepts that the table does not show
    python -m workflow.closed_forms measure   # the table, at the defaults

The rule: for one style, one object and one person that no table shows, H is the harmonic mean of
1 - (mean of what is left of the bare name and of its pairs) and the share of other names that is
kept. What is left of the bare name counts above what the empty prompt draws of itself from the same
seeds, for these prompts are moved to it. Settings within 0.01 of the best mean H, which is less
than one picture, are equal; of these the one that comes last in ``SETTINGS``, which holds most.

The rule as first written had neither the subtraction nor the tolerance, and preferred the first EOS
to all rows from the name on, 0.976 to 0.956. Both were added when that was seen (the empty prompt
drew a third of "Fluent"), before the table was made; now it is 0.987 to 0.984. Writes
``data/results/closed_forms_*.csv``.
"""

import sys
import time

import pandas as pd

from helpers import load_world, metrics, sample, unlearn
from helpers.concepts import pair_prompt
from helpers.edits import Edit
from helpers.tables import RESULTS, provenance, write_csv
from helpers.worlds import World

TUNING = ("Fluent", "guitar", "detective")
SHOWN = ("Twemoji", "OpenMoji", "Blob", "church", "dog", "fish", "santa claus")
METHODS = ("uce", "rece", "speed", "trce", "realera")
SETTINGS = {
    "uce": [
        {"tokens": tokens, "prompts": prompts}
        for prompts in ("names", "templates", "pairs")
        for tokens in ("last", "end", "after")
    ],
    "speed": [
        *({"filtered": True, "augmented": copies} for copies in (0, 2)),
        *({"energy": energy} for energy in (0.9, 0.99, 0.999, 0.9999)),
    ],
}
PICTURES, STEPS = 16, 12


def share(world: World, prompts: list[str], concepts: list[str], first: int, edit) -> float:
    """The share of pictures, one for each prompt, that the judge gives to its concept."""
    seeds = range(first, first + len(prompts))
    images = sample(world, prompts, seeds, edit, steps=STEPS, progress=False)
    right = [metrics.accuracy(world, x[None], c) for x, c in zip(images, concepts, strict=True)]
    return sum(right) / len(right)


def measured(world: World, concept: str, edit: Edit | None) -> dict[str, float]:
    """What is left of the bare name and of its pairs, and what is kept of all other names."""
    if world.kind(concept) == "style":
        pairs = [pair_prompt(thing, concept) for thing in (*world.objects, *world.people)[::3]]
    else:
        pairs = [pair_prompt(concept, style) for style in world.styles for _ in range(2)]
    others = [name for name in world.concepts if name != concept]
    return {
        "left": share(world, [concept] * PICTURES, [concept] * PICTURES, 0, edit),
        "pairs": share(world, pairs, [concept] * len(pairs), 100, edit),
        "kept": share(world, others, others, 1000, edit),
    }


def record(world: World, concept: str, method: str, **options) -> dict:
    """One edit, its seconds with encoding, and what it does."""
    start = time.perf_counter()
    edit = unlearn(world, concept, method, progress=False, **options)
    seconds = round(time.perf_counter() - start, 2)
    about = {"method": method, "setting": " ".join(map(str, options.values())), "concept": concept}
    return {**about, **measured(world, concept, edit), "seconds": seconds}


def balance(row: pd.Series) -> float:
    """H: the harmonic mean of what is forgotten and what is kept."""
    gone = 1 - (max(0.0, row["left"] - row["chance"]) + row["pairs"]) / 2
    return 2 * gone * row["kept"] / max(gone + row["kept"], 1e-9)


def choose(world: World) -> pd.DataFrame:
    """Every setting on the tuning concepts, with its H."""
    rows = [
        record(world, concept, method, **options)
        for method, some in SETTINGS.items()
        for options in some
        for concept in TUNING
    ]
    frame = pd.DataFrame(rows)
    frame["chance"] = frame["concept"].map({c: chance(world, c) for c in TUNING})
    return frame.assign(H=frame.apply(balance, axis=1))


def chance(world: World, concept: str) -> float:
    """The share of the empty prompt's pictures that the judge gives to a concept."""
    return share(world, [""] * PICTURES, [concept] * PICTURES, 0, None)


def measure(world: World) -> pd.DataFrame:
    """The methods at their defaults on the concepts shown, the base, and the empty prompt."""
    rows = [
        {"method": "base", "setting": "", "concept": c, **measured(world, c, None)} for c in SHOWN
    ]
    for concept in SHOWN:
        left = chance(world, concept)
        rows.append({"method": "empty prompt", "concept": concept, "left": left})
        rows += [record(world, concept, method) for method in METHODS]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in ("choose", "measure"):
        sys.exit("say choose or measure")
    emoji = load_world("emoji")
    made = (choose if what == "choose" else measure)(emoji).assign(**provenance(emoji))
    write_csv(RESULTS / f"closed_forms_{what}.csv", made.to_dict("records"))
    by = ["method", "setting"]
    print(made.groupby(by, sort=False).mean(numeric_only=True).round(3).to_string())
