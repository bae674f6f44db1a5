"""The work behind the tables: sample base images, train an edit, measure it, collect the values.

Each public function of the first half is one job of the ``Snakefile``: it reads files and writes
one, renamed when it is whole. What is asked for is decided in ``plan.py``.
"""

import contextlib
import functools
import os
import shutil
import stat
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from matplotlib import pyplot as plt

from helpers import images, judge_sd, show
from helpers.checked import load_json, save_json
from helpers.concepts import BARE
from helpers.denoise import Sampling
from helpers.edits import Edit
from helpers.evaluation.report import report as evaluate
from helpers.evaluation.scores import lpips_distance
from helpers.files import complete, shown
from helpers.judge import BLANK
from helpers.methods import METHODS, unlearn
from helpers.provenance import base_parts, device_of, versions
from helpers.sampling import sample
from helpers.seeds import judge_seeds, training_seeds
from helpers.stats import student_interval, wilson_interval
from helpers.tables import (
    COLUMNS,
    NAMES,
    Row,
    compare_with_paper,
    is_aggregate,
    read_csv,
    write_csv,
)
from helpers.worlds import World, load_world

COST_COLUMNS = ["job", "method", "jobs", "seconds", "longest", "device"]
IN_NO_NAME = ("world", "dtype", "precision", "sampling", "judge")  # options that no file's name has


CELL = ("concepts", "weight_change", "M", "made_with")  # what a cell's JSON has
REPORT = ("concepts", "drift", "canvas", "unnamed", "fid", "collapsed", "weight_change", "attacks")
AGAIN = "remove it, and `make tables` makes it again"


# --- the world of a process


@functools.cache
def own_device() -> tuple[str, FileLock | None]:
    """A GPU that no other process of this user has, and the lock that holds it; or the CPU.

    The lock lies in the kit's cache, ``images.CACHE`` (one for several clones: LETHE_CACHE). The
    process keeps its GPU until it ends, by a signal or not. A GPU whose lock is not this user's own
    is skipped, with a warning that names the lock. RuntimeError when no GPU is left.
    """
    if not torch.cuda.is_available():
        return "cpu", None
    folder, count = images.cache_folder(), torch.cuda.device_count()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        uuid = torch.cuda.get_device_properties(i).uuid
        path = folder / f"gpu-{uuid}.lock"
        try:
            require_own(path)
            lock = FileLock(path)
            lock.acquire(timeout=0)
        except Timeout:
            continue
        except OSError as error:
            warnings.warn(
                f"cuda:{i} is skipped, since its lock {shown(path)} cannot be taken ({error}): "
                "remove the file, or set LETHE_CACHE to a folder of your own",
                stacklevel=2,
            )
            continue
        return f"cuda:{i}", lock
    raise RuntimeError(
        f"all {count} GPUs are taken by other jobs, or their locks in {shown(folder)} are not "
        "yours: run fewer jobs at a time (`make tables JOBS=...`), or set LETHE_CACHE"
    )


def require_own(path: Path) -> None:
    """PermissionError for a lock that is a link, or no empty file of this user's own.

    To open a lock empties it, and what it links to. Made here if it is not there.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if path.is_symlink():
        raise PermissionError("it is a link")
    with contextlib.closing(os.fdopen(os.open(path, flags, 0o600))) as file:
        found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size:
        raise PermissionError("it is no empty file of its own")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise PermissionError("it is another user's")


@functools.cache
def world_of(name: str, dtype: str | None, precision: str, gpu: int) -> World:
    """A world, loaded once in each process: on a GPU of its own if the scale's jobs ask for one."""
    torch.set_float32_matmul_precision(precision)
    device = own_device()[0] if gpu else "cpu"
    return load_world(name, device=device, dtype=dtype and getattr(torch, dtype))


def the_world(options: dict) -> World:
    """The world of a scale's options, which samples as they say.

    options["judge"]: the scale trains a judge, and that one knows no faces; options["judge_file"]:
    where it lies. A world that brings a judge needs neither.
    """
    world = world_of(
        options["world"], options.get("dtype"), options.get("precision", "highest"),
        options.get("gpu", 0),
    )  # fmt: skip
    world.sampling = Sampling(**options["sampling"])
    if "judge" in options:
        world.people = []
    if "judge_file" in options:
        world.brings["judge"] = functools.partial(judge_sd.load_judge, options["judge_file"])
    return world


def evaluation_sampling(options: dict) -> dict:
    """``sample``'s options for the images that a scale measures."""
    return {name: options["evaluation"][name] for name in ("steps", "guidance", "sampler")}


def made_with(world: World, start: float, **more) -> dict:
    """What a result was made with, and in how many seconds."""
    return {
        "world": world.name,
        "base": world.fingerprint(),
        "base_parts": base_parts(world),
        "device": device_of(world),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
        "seconds": round(time.time() - start, 2),
        **more,
    }


# --- jobs


def claim(options: dict, path: str) -> None:
    """Say in a build folder which options its files were made with that are in no file's name.

    ValueError if they were made with others.
    """
    ours = {name: options.get(name) for name in IN_NO_NAME}
    if Path(path).exists() and (theirs := load_json(path, "record of options", AGAIN)) != ours:
        raise ValueError(
            f"{Path(path).parent} was made with {theirs}, not with {ours}: remove that folder, or "
            "take the options back"
        )
    save_json(path, ours)


def sample_base(options: dict, prompt: str, seeds: list[int], path: str) -> None:
    """The base model's images of one prompt, to measure, as 8-bit numbers: (n, 3, H, W)."""
    world = the_world(options)
    prompts, how = [prompt] * len(seeds), evaluation_sampling(options)
    pixels = sample(world, prompts, seeds, progress=False, **how)
    asked = {"prompt": prompt, "seeds": list(seeds), "sampling": how, "parts": base_parts(world)}
    images.save_pictures(path, pixels, asked)


def sample_judge_images(options: dict, style: str, path: str) -> None:
    """Images to train the judge on, of one style or of ``BLANK``, the empty prompt."""
    prompt = "" if style == BLANK else style
    sample_base(options, prompt, judge_seeds(options["judge"]["images"]), path)


def train_judge(options: dict, files: dict[str, str], path: str) -> None:
    """Train the judge of a world that brings none; files: its images of each style."""
    judge_sd.train_styles({name: images.load_pictures(f) for name, f in files.items()}, path)


def sample_training_images(
    options: dict, concepts: list[str], count: int, seed: int, path: str
) -> None:
    """The training images that several methods share, put where ``base_images`` finds them."""
    start, world = time.time(), the_world(options)
    prompts, _ = images.captions(world, concepts, count, BARE)
    images.base_images(world, prompts, training_seeds(seed, len(prompts)))
    save_json(path, {"images": len(prompts), "made_with": made_with(world, start)})


def train(
    options: dict, method: str, concepts: list[str], settings: dict, seed: int, folder: str,
    names: list[str],
) -> None:  # fmt: skip
    """One training: its edit, or one for each concept where the method keeps them apart.

    settings: the method's options; names: of the edits' files in the folder.
    """
    start, world = time.time(), the_world(options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}  # as JSON had
    edit = unlearn(world, concepts, method, seed=seed, progress=False, **given)
    edits = [edit.parts[c] for c in concepts] if METHODS[method]["separable"] else [edit]
    with complete(folder) as temporary:
        for part, name in zip(edits, names, strict=True):
            part.meta["made_with"] = made_with(world, start)
            part.save(temporary / f"{name}.safetensors")


def measure(
    options: dict, files: list[str], counts: dict[str, int], base: dict[str, str], path: str
) -> None:
    """One cell: what the sum of some edits samples for bare names, beside the base's images.

    counts: images of each concept, from the same seeds as the base's; base: the files of these. The
    JSON has, for each concept, whether the judge gives it each image ("hits", and "base_hits" for
    the base's) and the LPIPS of each pair.
    """
    start, world, edit = time.time(), the_world(options), Edit.sum(map(Edit.load, files))
    size, concepts = options["evaluation"].get("lpips_size"), {}
    with world.applied(edit):
        for concept, n in counts.items():
            before = after = images.load_pictures(base[concept], n)[:n].float() / 255
            if edit is not None:
                prompts, how = [concept] * n, evaluation_sampling(options)
                after = images.as_stored(sample(world, prompts, range(n), progress=False, **how))
            distance = lpips_distance(world, before, after, size=size)
            concepts[concept] = {
                "hits": world.judge.gives(after, concept).int().tolist(),
                "base_hits": world.judge.gives(before, concept).int().tolist(),
                "lpips": [round(d, 6) for d in distance.tolist()],
            }
    result = {
        "edits": [] if edit is None else [edit.meta],
        "weight_change": 0.0 if edit is None else edit.norm(),
        "M": 0 if edit is None else edit.M,
        "concepts": concepts,
        "made_with": made_with(
            world,
            start,
            judge=world.judge.fingerprint(),
            evaluation=options["evaluation"],
            lpips=world.lpips.name,
        ),
    }
    save_json(path, result)


def evaluate_edit(options: dict, file: str, attack: bool, folder: str) -> None:
    """Every value of one edit: ``report``'s JSON and contact sheet, in a folder."""
    with complete(folder) as temporary:
        found = evaluate(
            the_world(options), Edit.load(file), n=options["report"]["n"], attack=attack,
            sampling=evaluation_sampling(options), folder=temporary, progress=False,
        )  # fmt: skip
    plt.close(found["sheet"])


# --- from cells to tables


def provenance_of(results: Iterable[dict]) -> dict[str, str]:
    """The columns that say which base model and which judge some results come from.

    ValueError if they differ.
    """
    made = [result["made_with"] for result in results]
    found = {(one["base"], one["judge"]) for one in made}
    others = {str(one.get("base_parts")) for one in made}  # VAE, text encoder, scheduler, words
    if len(found) > 1 or len(others) > 1:
        raise ValueError(
            f"results of different weights (base, judge) {sorted(found)}, {sorted(others)}: "
            "remove the build folder of the tables"
        )
    return dict(zip(("base_model", "judge"), *found, strict=True))


def value_of(cell: dict, metric: str, counts: dict[str, int]) -> dict:
    """One model's value over some images of its cell, as columns of a ``Row``."""
    if metric == "weight change":
        return {"value": cell["weight_change"], "base": 0.0, "M": cell["M"]}
    key = {"ACC": "hits", "LPIPS": "lpips"}[metric]
    values = [x for c, n in counts.items() for x in cell["concepts"][c][key][:n]]
    value, n = statistics.fmean(values), len(values)
    if metric == "LPIPS":
        low, high = student_interval(values)[1:] if n > 1 else (None, None)
        return {"value": value, "n": n, "low": low, "high": high, "base": 0.0}
    low, high = wilson_interval(value, n)
    base = [x for c, k in counts.items() for x in cell["concepts"][c]["base_hits"][:k]]
    return {"value": value, "n": n, "low": low, "high": high, "base": statistics.fmean(base)}


def weighted_sum(parts: list[tuple[float, dict]]) -> dict:
    """A sum or an average of values, as columns of a ``Row``: it has no interval."""
    total = {k: sum(weight * part[k] for weight, part in parts) for k in ("value", "base")}
    first = parts[0][1]  # all are of one method and one metric
    if "n" in first:
        total["n"] = sum(part["n"] for _, part in parts)
    return {**total, "M": first.get("M")}


def collect(plan, table: str, files: list[str], path: str) -> None:
    """The counterpart of one printed table: its own rows in the order of print, for each seed.

    value: ours; n: images behind it, in all; low, high: 95 % interval over these images (Wilson's
    for ACC, Student's for LPIPS), empty for sums, averages and weight changes; base: the base
    model's value; M: what a weight change was divided by, the number of parameter tensors touched.
    Names are the paper's: ``plan.ours`` says what stands for them. plan: a ``plan.Plan``; files:
    the cells that it names.
    """
    cells = {Path(file).stem: load_json(file, "cell", AGAIN, *CELL) for file in files}
    rows = []
    for row in plan.rows[table]:
        for seed in plan.options["seeds"]:
            parts, used = [], []
            for weight, model, counts in plan.weighted_parts(table, row, seed):
                used.append(cells[plan.cell_of[model]])
                parts.append((weight, value_of(used[-1], row["metric"], counts)))
            value = parts[0][1] if len(parts) == 1 else weighted_sum(parts)
            names = {name: row[name] for name in NAMES}
            rows.append(Row(**names, seed=seed, **value, **provenance_of(used)))
    write_csv(path, rows, COLUMNS)


def report_of(folder: Path, *keys: str) -> dict:
    """The values of a report in a folder. ValueError names a file that is damaged or lacks some."""
    return load_json(folder / "report.json", "report", AGAIN, "made_with", *keys)


def rows_of_names(report: dict, concept: str, neighbour: str | None, about: dict) -> list[Row]:
    """A report's values of bare names: of the erased one, the mean of the others, the neighbour."""
    values, rows = report["concepts"], []
    retained = [name for name, v in values.items() if not v["erased"]]
    groups = {"erased": [concept], "retained": retained}
    groups["neighbour"] = [name for name in retained if name == neighbour]
    for group, names in groups.items():
        if not names:
            continue
        of = [values[name] for name in names]
        n = sum(v["acc_after"]["n"] for v in of)
        before, after = (
            statistics.fmean(v[at]["value"] for v in of) for at in ("acc_before", "acc_after")
        )
        clip_before, clip_after, lpips = (
            statistics.fmean(v[key] for v in of) for key in ("clip_before", "clip_after", "lpips")
        )
        low, high = wilson_interval(after, n)
        same = {**about, "evaluated": group, "n": n}
        rows += [
            Row(metric="ACC", value=after, low=low, high=high, base=before, **same),
            *rows_beside_acc(of, same),
            Row(metric="CLIP score", value=clip_after, base=clip_before, **same),
            Row(metric="LPIPS", value=lpips, base=0.0, **same),
        ]
    return rows


def rows_beside_acc(values: list[dict], same: dict) -> list[Row]:
    """The second judge's ACC, and the judge's shares of "blank" and "something else"."""
    found = {}  # metric -> (before, after) for each name
    for v in values:
        if "second_after" in v:
            pair = v["second_before"]["value"], v["second_after"]["value"]
            found.setdefault("ACC of the second judge", []).append(pair)
        for name, after in v["no_concept_after"].items():
            found.setdefault(name, []).append((v["no_concept_before"][name], after))
    rows = []
    for metric, pairs in found.items():
        before, after = (statistics.fmean(side) for side in zip(*pairs, strict=True))
        low, high = wilson_interval(after, same["n"])
        rows.append(Row(metric=metric, value=after, low=low, high=high, base=before, **same))
    return rows


def rows_of_report(report: dict, concept: str, neighbour: str | None, about: dict) -> list[Row]:
    """Every value of one report. about: the columns that all of its rows have in common."""
    rows = rows_of_names(report, concept, neighbour, about)

    def share(metric: str, group: str, value: float, n: int, base: float | None = None) -> None:
        low, high = wilson_interval(value, n)
        same = {"metric": metric, "evaluated": group, "value": float(value), "n": n}
        rows.append(Row(**same, low=low, high=high, base=base, **about))

    retained = {"evaluated": "retained", "base": 0.0, **about}
    drift, fid, change = report["drift"], report["fid"], report["weight_change"]
    low, high = drift["interval"]
    rows.append(
        Row(metric="drift", value=drift["value"], n=drift["n"], low=low, high=high, **retained)
    )
    before, after = (report["canvas"][concept][at] for at in ("before", "after"))
    for metric, n in (
        ("UA", after["n_erased"]),
        ("IRA", after["n_others"]),
        ("CRA", after["n_others"]),
    ):
        share(metric, "erased", after[metric], n, before[metric])
    rows.append(Row(metric="FID", value=float(fid["value"]), n=fid["n"], **retained))
    if unnamed := report["unnamed"]:
        before, after = unnamed["before"], unnamed["after"]
        low, high = after["interval"]
        values = {"value": after["value"], "n": after["n"], "low": low, "high": high}
        same = {"evaluated": "retained", "base": before["value"], **about}
        rows.append(Row(metric="diversity of unnamed prompts", **values, **same))
    for group, found in report["collapsed"].items():
        share("collapsed", group, found["value"], found["n"])
    change = {"value": change["value"], "M": change["M"], "base": 0.0}
    rows.append(Row(metric="weight change", evaluated="", **change, **about))
    base = report["concepts"][concept]["acc_before"]["value"]
    for name, found in report["attacks"].get(concept, {}).items():
        share(f"ACC after {name}", "erased", found["after"], found["n"], base)
    return rows


def collect_methods(plan, folders: list[str], path: str) -> None:
    """``methods.csv``: every value of every method on each concept, a row for each training seed.

    evaluated: "erased" (for UA, IRA, CRA and ACC after an attack too), "retained" (the other bare
    names; for drift, FID and "collapsed" all images without the concept), "neighbour" (the nearest
    of the bare names). base: the base model's value. ACC after an attack stands where it was run.
    """
    rows = []
    for folder in map(Path, folders):
        run, report = plan.reports[folder.name], report_of(folder, *REPORT)
        (concept,) = run.concepts
        about = {"method": run.method, "setting": "", "erased": concept, "seed": run.seed}
        about |= provenance_of([report])
        rows += rows_of_report(report, concept, plan.neighbours.get(concept), about)
    write_csv(path, rows, COLUMNS)


def collect_costs(files: dict[str, list[str]], path: str) -> None:
    """What the run cost: jobs of each kind, their seconds in all and of the longest, by device.

    files: JSON files of "images" to train on and of "cells", folders of "edits" and of "reports".
    Taken from the jobs' own records: the seconds of a job that was killed and repeated count once.
    """
    jobs = []
    for kind, name in (("images", "training images"), ("cells", "measuring")):
        made = [
            load_json(file, "record of a job", AGAIN, "made_with")["made_with"]
            for file in files[kind]
        ]
        jobs += [(name, "", one["device"], one["seconds"]) for one in made]
    for folder in files["edits"]:
        meta = Edit.load(next(Path(folder).glob("*.safetensors"))).meta
        made = meta["made_with"]
        jobs.append(("training", meta["method"], made["device"], made["seconds"]))
    for folder in files["reports"]:
        made = report_of(Path(folder))["made_with"]
        jobs.append(("report", made["edit"]["method"], made["device"], made["seconds"]["all"]))
    groups = pd.DataFrame(jobs, columns=["job", "method", "device", "seconds"]).groupby(
        ["job", "method", "device"]
    )
    costs = groups.seconds.agg(jobs="count", seconds="sum", longest="max").reset_index()
    write_csv(path, costs.to_dict("records"), COST_COLUMNS)


def publish(files: dict[str, list[str]], options: dict, path: str) -> None:
    """Copy a run's "results" and "figures" to the folders that its scale names for them.

    The JSON lists what was written.
    """
    written = []
    for kind, sources in files.items():
        for source in map(Path, sources):
            target = Path(options[kind]) / source.name
            if target.resolve() != source.resolve():
                with complete(target) as temporary:
                    shutil.copyfile(source, temporary)
            written.append(str(target))
    save_json(path, {"written": written})


# --- figures


def save_figure(figure, path: str) -> None:
    """A figure as PNG, without what differs from run to run."""
    with complete(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None}
        )
    plt.close(figure)


def with_bars(values: pd.Series) -> tuple[float, list[list[float]]]:
    """The mean, and how far the least and the greatest value lie from it, as error bars want it."""
    mean = values.mean()
    below, above = mean - values.min(), values.max() - mean
    return mean, [[max(0.0, below)], [max(0.0, above)]]  # a mean may round beyond its values


def figure_of_methods(options: dict, files: list[str], path: str) -> None:
    """Forgotten against retained: a panel for each concept, a point for each method.

    Bars run from the least to the greatest training seed.
    """
    show.plain_style()
    world, frame = the_world(options), read_csv(files[0])
    groups = frame.groupby(["erased", "method", "metric", "evaluated"]).value
    concepts, methods = frame.erased.unique(), frame.method.unique()
    width = 4.2 * len(concepts)
    figure, axes = plt.subplots(1, len(concepts), figsize=(width, 4), sharey=True, squeeze=False)
    for ax, concept in zip(axes[0], concepts, strict=True):
        for i, method in enumerate(methods):
            x, x_bar = with_bars(groups.get_group((concept, method, "ACC", "erased")))
            y, y_bar = with_bars(groups.get_group((concept, method, "drift", "retained")))
            look = {"fmt": "os^Dv"[i // 10 % 5], "color": f"C{i % 10}"}
            ax.errorbar(x, y, y_bar, x_bar, capsize=2, label=method, **look)
        ax.set(xlabel="ACC of the erased concept", xlim=(-0.05, 1.05))
        ax.set_title(f"{world.kind(concept)}: {concept}")
    axes[0, 0].set_ylabel(f"drift of the retained images\n{world.lpips.name}")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(figure, path)


def cells_to_compare(table: str, folder: Path) -> pd.DataFrame:
    """The ACC of a table that is printed and ours, with whether the evaluated name was erased."""
    frame = compare_with_paper(table, folder)
    single = (frame.metric == "ACC") & (frame.method != "original") & ~is_aggregate(frame)
    frame = frame[single & frame.value.notna()]
    lost = [on in names.split("+") for on, names in zip(frame.evaluated, frame.erased, strict=True)]
    return frame.assign(lost=lost)


def figure_of_tables(options: dict, files: list[str], path: str) -> None:
    """ACC in print against ours, a panel for each table.

    Filled marks are of erased concepts, hollow ones of retained concepts.
    """
    show.plain_style()
    rows, columns = -(-len(files) // 4), min(4, len(files))
    size = (3.25 * columns, 3.25 * rows)
    same = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(rows, columns, figsize=size, **same)
    for ax in axes.flat[len(files) :]:
        ax.set_visible(False)
    colours: dict[str, str] = {}  # alike in all panels
    for ax, file in zip(axes.flat, map(Path, files), strict=False):
        ax.plot([0, 1], [0, 1], color="0.8", zorder=0)
        for row in cells_to_compare(file.stem, file.parent).itertuples():
            colour = colours.setdefault(row.method, f"C{len(colours) % 10}")
            fill = colour if row.lost else "none"
            ax.scatter(row.value, row.ours, 14, fill, edgecolors=colour, linewidths=0.8)
        ax.set_title(file.stem.replace("sepme-", "SepME, Table "), fontsize=10)
    figure.supxlabel("ACC, printed")
    figure.supylabel("ACC, ours (mean over training seeds)")
    marks = {name: (colour, colour) for name, colour in colours.items()}
    marks |= {"\nfilled: erased": ("0.3", "0.3"), "hollow: retained": ("0.3", "none")}
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=c, mfc=fill, label=name)
        for name, (c, fill) in marks.items()
    ]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
