"""What styles do prompts come out in that name none, after a style's *name* was erased?

    python -m workflow.unnamed             # all styles x all methods x three seeds; may be killed
    python -m workflow.unnamed --part 0/2  # every second of them, beside another process
    python -m workflow.unnamed --collect   # data/results/unnamed.csv from what there is

Each training is one JSON file in build/unnamed: counts of the judge's styles over IMAGES images of
the nine objects' bare names. The options of a method are those of the tables (emoji.toml). All
trainings of one seed come before the next seed's, so that an early end leaves whole seeds.
"""

import time
from collections import Counter
from pathlib import Path

from helpers.checked import load_json, save_json
from helpers.evaluation.scores import style_diversity
from helpers.methods import METHODS, unlearn
from helpers.sampling import sample
from helpers.seeds import report_seeds
from helpers.stats import wilson_interval
from helpers.tables import Row, provenance
from helpers.worlds import World
from workflow import study
from workflow.plan import slug

BUILD = Path("build/unnamed")
IMAGES = 36  # of each model: four of each of the nine objects
FIRST = 5000  # of the report's seeds: the same images as ``metrics.report`` makes
SEEDS = (0, 1, 2)
SEED_SETS = 10  # of the base's images: the first is the edits' own
CONTROL = "nothing"  # the base model
AGAIN = "remove it, and run `python -m workflow.unnamed` again"


def styles_of(world: World, edit, seed_set: int = 0) -> dict:
    """The judge's styles of the images of nine bare names by one model.

    seed_set: 0 is the report's, and all edits'; the others say how far chance alone moves the base.
    """
    names = world.roles["nine_objects"]
    prompts = names * (IMAGES // len(names))
    first = FIRST + IMAGES * seed_set
    seeds = report_seeds(0, first + IMAGES)[first:]
    return style_diversity(world, sample(world, prompts, seeds, edit, progress=False))


def file_of(method: str, style: str, seed: int) -> Path:
    return BUILD / f"{method}-{slug(style)}-{seed}.json"


def make(world: World, method: str, style: str, seed: int) -> None:
    """One training and its images, as one file; nothing if it is there."""
    path = file_of(method, style, seed)
    if path.exists():
        return
    start, edit = time.time(), None
    if method != CONTROL:
        given = study.options_of(method)
        edit = unlearn(world, style, method, seed=seed, progress=False, **given)
    found = styles_of(world, edit, seed if method == CONTROL else 0)
    asked = {"method": method, "style": style, "seed": seed, "options": study.options_of(method)}
    about = {"made_with": provenance(world), "seconds": round(time.time() - start, 1)}
    save_json(path, {**asked, **found, **about})
    print(f"{path.name}: D {found['value']:.2f}, {style} {found['shares'].get(style)}", flush=True)


def row_of_base(one: dict) -> Row:
    """The base's diversity over one set of seeds, which stands in the column of the seed."""
    low, high = one["interval"]
    return Row(
        method="base", setting="", erased="nothing", evaluated="retained", seed=one["seed"],
        metric="diversity of unnamed prompts", value=one["value"], n=one["n"], low=low, high=high,
        **one["made_with"],
    )  # fmt: skip


def collect() -> list[Row]:
    """A row for each training and figure: the diversity D, and the erased style's own share.

    A style of a seed counts when every method has erased it, so that methods compare. First come
    the base's rows, one for each set of seeds.
    """
    base = load_json(file_of(CONTROL, CONTROL, 0), "study", AGAIN)
    found = [load_json(path, "study", AGAIN) for path in sorted(BUILD.glob("*.json"))]
    made = Counter((one["style"], one["seed"]) for one in found if one["method"] != CONTROL)
    rows = [row_of_base(one) for one in found if one["method"] == CONTROL]
    for one in found:
        if made[one["style"], one["seed"]] < max(made.values()):
            continue
        same = {
            "method": one["method"], "setting": "", "erased": one["style"], "seed": one["seed"],
            "n": one["n"], **one["made_with"],
        }  # fmt: skip
        low, high = one["interval"]
        rows.append(
            Row(
                evaluated="retained", metric="diversity of unnamed prompts", value=one["value"],
                low=low, high=high, base=base["value"], **same,
            )
        )  # fmt: skip
        share = one["shares"][one["style"]]
        low, high = wilson_interval(share, one["n"])
        rows.append(
            Row(
                evaluated="erased", metric="share among unnamed prompts", value=share,
                low=low, high=high, base=base["shares"][one["style"]], **same,
            )
        )  # fmt: skip
    return rows


def work(world: World) -> list[tuple]:
    """The base's sets of seeds, then every training: method, style, seed."""
    base = [(CONTROL, CONTROL, seed_set) for seed_set in range(SEED_SETS)]
    return base + [(m, style, seed) for seed in SEEDS for style in world.styles for m in METHODS]


if __name__ == "__main__":
    study.run(BUILD, collect, work, make)
