"""Does it come back? The three attacks on every method, with their control: one training each.

    python -m workflow.attacked             # seven concepts x every method; may be killed
    python -m workflow.attacked --part 0/2  # every second of them, beside another process
    python -m workflow.attacked --collect   # data/results/attacked.csv from what there is

Each edit is one JSON file in build/attacked: its three attacks at their defaults, on IMAGES images
of the concept's name. The control is an edit of zero, the base model itself: what an attack does to
a model that has forgotten nothing. The options of a method are those of the tables (emoji.toml).
"""

from collections import Counter
from pathlib import Path

from helpers import attacks
from helpers.checked import load_json, save_json
from helpers.methods import METHODS, unlearn
from helpers.stats import wilson_interval
from helpers.tables import Row, provenance
from helpers.worlds import World
from workflow import study
from workflow.closed_forms import SHOWN
from workflow.plan import slug

BUILD = Path("build/attacked")
IMAGES = 12
SEED = 0
CONTROL = "nothing"  # the edit of zero
AGAIN = "remove it, and run `python -m workflow.attacked` again"


def file_of(method: str, concept: str) -> Path:
    return BUILD / f"{method}-{slug(concept)}.json"


def make(world: World, method: str, concept: str) -> None:
    """One edit under three attacks, as one file; nothing if it is there."""
    path = file_of(method, concept)
    if path.exists():
        return
    control = method == CONTROL
    options = study.options_of("uce" if control else method)
    edit = unlearn(
        world, concept, "uce" if control else method, seed=SEED, progress=False, **options
    )
    edit = 0 * edit if control else edit
    found = attacks.run_all(world, edit, concept, seeds=range(IMAGES), progress=False)
    values = {attack.name: attack.values() for attack in found}
    about = {"method": method, "concept": concept, "options": options}
    save_json(path, {**about, "attacks": values, "made_with": provenance(world)})
    shares = {name: (one["before"], one["after"]) for name, one in values.items()}
    print(f"{path.name}: {shares}", flush=True)


def collect() -> list[Row]:
    """Of each edit: ACC by name and after each attack, and what the closed form leaves unsolved.

    A method counts when all concepts have been attacked, so that methods compare.
    """
    rows = []
    found = [load_json(path, "study", AGAIN) for path in sorted(BUILD.glob("*.json"))]
    made = Counter(one["method"] for one in found)
    for one in found:
        if made[one["method"]] < len(SHOWN):
            continue
        same = {
            "method": one["method"], "setting": "", "erased": one["concept"],
            "evaluated": one["concept"], "seed": SEED, **one["made_with"],
        }  # fmt: skip
        by_name = next(iter(one["attacks"].values()))
        shares = {"ACC": (by_name["before"], by_name["n"])}
        for name, attack in one["attacks"].items():
            shares[f"ACC after {name}"] = attack["after"], attack["n"]
        for metric, (value, n) in shares.items():
            low, high = wilson_interval(value, n)
            rows.append(Row(metric=metric, value=value, n=n, low=low, high=high, **same))
        residual = one["attacks"]["closed-form embedding"]["residual"]
        rows.append(Row(metric="residual of closed-form embedding", value=residual, **same))
    return rows


def work(world: World) -> list[tuple]:
    """Every method and concept: the control first, then the closed forms, which take seconds."""
    order = sorted(METHODS, key=lambda name: METHODS[name]["kind"] != "closed form")
    return [(method, concept) for method in (CONTROL, *order) for concept in SHOWN]


if __name__ == "__main__":
    study.run(BUILD, collect, work, make)
