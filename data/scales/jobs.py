"""The work behind the tables: draw the base's pictures, train an edit, measure what it draws, collect the figures.

Each public function is one job of the ``Snakefile``: it reads files and writes one, under a temporary name that is then
renamed, so that a file which is there is whole. What is asked for is decided in ``plan.py``.
"""

import contextlib
import fcntl
import functools
import json
import math
import operator
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file, save_file

from helpers import judge_sd, metrics, show
from helpers.edits import Edit
from helpers.files import complete
from helpers.methods import sepme, unlearn
from helpers.report import report
from helpers.sampling import sample
from helpers.tables import beside, closes, read_csv, write_csv
from helpers.training import BARE, captions, drawn_images, training_seeds
from helpers.worlds import World, load_world

COLUMNS = "method,setting,erased,evaluated,metric,training_seed,value,n,low,high,base,M,weights,judge".split(",")
METHOD_COLUMNS = "method,concept,kind,training_seed,metric,value,n,low,high,base,M,weights,judge".split(",")
COST_COLUMNS = "job,method,jobs,seconds,longest,device".split(",")
HELD: list = []  # locks that this process holds until it ends


def write_json(path: str | Path, value: dict) -> None:
    with complete(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


@functools.cache
def free_device() -> str:
    """A GPU that no other process on this machine has taken in this way, or "cpu" where there is none at all.

    RuntimeError when all are taken: a process keeps its GPU until it ends.
    """
    if not torch.cuda.is_available():
        return "cpu"
    for i in range(torch.cuda.device_count()):
        name = f"lethe-{torch.cuda.get_device_properties(i).uuid}.lock"
        file = open(Path(tempfile.gettempdir()) / name, "w")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            HELD.append(file)
            return f"cuda:{i}"
    raise RuntimeError(
        f"all {torch.cuda.device_count()} GPUs are taken by other jobs: run no more of them at a time (`make tables JOBS=...`)"
    )


@functools.cache
def world_of(name: str, dtype: str | None, precision: str, gpu: int) -> World:
    """A world, loaded once in each process: on a GPU of its own if the scale's jobs ask for one."""
    torch.set_float32_matmul_precision(precision)
    return load_world(name, device=free_device() if gpu else "cpu", dtype=dtype and getattr(torch, dtype))


def the_world(options: dict) -> World:
    """The world of a scale's options; with ``options["judge"]``, once that file is there, its trained judge."""
    world = world_of(options["world"], options.get("dtype"), options.get("precision", "highest"), options.get("gpu", 0))
    if "judge" in options and "judge" not in vars(world) and Path(options["judge"]).exists():
        world.judge = judge_sd.load_judge(options["judge"])
        world.people = []  # it knows no faces
    return world


def drawing(options: dict) -> dict:
    """``sample``'s options of a scale."""
    return {name: options["pictures"][name] for name in ("steps", "guidance")}


def made_with(world: World, start: float) -> dict:
    return {
        "world": world.name,
        "base": world.fingerprint(),
        "device": str(world.device) if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 2),
    }


# --- jobs


def draw(options: dict, prompt: str, seeds: list[int], path: str) -> None:
    """The base model's pictures of one prompt, as 8-bit numbers: (n, 3, H, W)."""
    images = sample(the_world(options), [prompt] * len(seeds), seeds, progress=False, **drawing(options))
    with complete(path) as temporary:
        save_file({"images": (images * 255).round().byte()}, temporary)


def classify(options: dict, files: dict[str, str], path: str) -> None:
    """Train the judge of a world that ships none; files: its pictures of each style."""
    judge_sd.train_styles({name: load_file(file)["images"] for name, file in files.items()}, path)


def prepare(options: dict, concepts: list[str], images: int, seed: int, path: str) -> None:
    """The training pictures that several methods share, put where ``training.drawn_images`` finds them."""
    start, world = time.time(), the_world(options)
    prompts, _ = captions(world, concepts, images, BARE)
    drawn_images(world, prompts, training_seeds(seed, len(prompts)))
    write_json(path, {"pictures": len(prompts), "made_with": made_with(world, start)})


def train(
    options: dict, method: str, concepts: list[str], settings: dict, seed: int, folder: str, names: list[str]
) -> None:
    """One training: its edit, or with SepME one edit for each concept, written to the folder under the given names.

    settings: the method's options; for SepME also "known", the concepts that every increment protects.
    """
    world, settings = the_world(options), {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    start = time.time()
    if method == "sepme":
        known = settings.pop("known", ())
        protected = [sepme.protected_prompts([c for c in known if c != concept]) for concept in concepts]
        edits = sepme.train(world, concepts, protected, sepme.Options(**settings), seed=seed, progress=False)
    else:
        edits = [unlearn(world, concepts, method, seed=seed, progress=False, **settings)]
    with complete(folder) as temporary:
        for edit, name in zip(edits, names, strict=True):
            edit.meta["made_with"] = made_with(world, start)
            edit.save(temporary / f"{name}.safetensors")


def merged(files: list[str]) -> Edit | None:
    """The sum of edits; None for none, the base model."""
    return functools.reduce(operator.add, map(Edit.load, files)) if files else None


def measure(options: dict, files: list[str], counts: dict[str, int], base: dict[str, str], path: str) -> None:
    """One cell: what the sum of some edits draws for bare names, beside the base's pictures from the same seeds.

    counts: pictures of each concept; base: the file of its base pictures. The JSON has, for each concept, whether the
    judge gives it each picture ("hits", and "base_hits" for the base's) and the LPIPS of each pair.
    """
    start, world, edit = time.time(), the_world(options), merged(files)
    size, concepts = options["pictures"].get("lpips_size"), {}
    with world.applied(edit) if edit else contextlib.nullcontext():
        for concept, n in counts.items():
            before = after = load_file(base[concept])["images"][:n].float() / 255
            if edit:
                drawn = sample(world, [concept] * n, list(range(n)), progress=False, **drawing(options))
                after = (drawn * 255).round() / 255  # as the base's were stored
            concepts[concept] = {
                "hits": world.judge.gives(after, concept).int().tolist(),
                "base_hits": world.judge.gives(before, concept).int().tolist(),
                "lpips": [round(d, 6) for d in metrics.lpips_distance(world, before, after, size=size).tolist()],
            }
    result = {
        "edits": [edit.meta] if edit else [],
        "weight_change": edit.norm() if edit else 0.0,
        "M": edit.M if edit else 0,
        "concepts": concepts,
        "made_with": {**made_with(world, start), "judge": world.judge.fingerprint()},
    }
    write_json(path, result)


def describe(options: dict, file: str, attack: bool, folder: str) -> None:
    """Every figure of one edit: ``helpers.report.report``'s JSON and contact sheet, in a folder."""
    wanted = options["report"]
    with complete(folder) as temporary:
        found = report(
            the_world(options), Edit.load(file), n=wanted["n"], attack=attack, drawing=drawing(options), folder=temporary,
            progress=False,
        )  # fmt: skip
    plt.close(found["sheet"])


# --- from cells to tables


def spread_of(values: list[float]) -> tuple[float | str, float | str]:
    """Ends of the 95 % interval of a mean; empty for one value."""
    return metrics.mean_interval(values)[1:] if len(values) > 1 else ("", "")


def atom(cell: dict, metric: str, pictures: dict[str, int]) -> dict:
    """One model's figure for some pictures of its cell, with their number, its interval, and the base's figure."""
    if metric == "weight change":
        return {"value": cell["weight_change"], "n": "", "low": "", "high": "", "base": 0.0, "M": cell["M"]}
    key = {"ACC": "hits", "LPIPS": "lpips"}[metric]
    values = [x for c, n in pictures.items() for x in cell["concepts"][c][key][:n]]
    value, n = statistics.fmean(values), len(values)
    low, high = metrics.interval(value, n) if metric == "ACC" else spread_of(values)
    base = [x for c, k in pictures.items() for x in cell["concepts"][c]["base_hits"][:k]] if metric == "ACC" else [0.0]
    return {"value": value, "n": n, "low": low, "high": high, "base": statistics.fmean(base)}


def fingerprints(results: Iterable[dict]) -> dict[str, str]:
    """The columns that say which base model and which judge some results come from; ValueError if they differ."""
    found = {(result["made_with"]["base"], result["made_with"]["judge"]) for result in results}
    if len(found) > 1:
        raise ValueError(
            f"results of different weights (base, judge) {sorted(found)}: remove the build folder of the tables"
        )
    return dict(zip(("weights", "judge"), *found, strict=True))


def collect(plan, table: str, files: list[str], path: str) -> None:
    """The counterpart of one printed table: its own rows in the order of print, once for each training seed.

    value: ours; n: pictures behind it, in all; low, high: 95 % interval over these pictures (Wilson's for ACC), empty
    for sums, averages and weight changes; base: the same figure of the base model; M: what a weight change was divided by,
    the number of parameter tensors that the edit touches. Names are the paper's: ``plan.ours``
    says what stands for them. plan: a ``plan.Plan``; files: the cells that it names.
    """
    cells = {Path(file).stem: json.loads(Path(file).read_text()) for file in files}
    rows = []
    for row in plan.rows[table]:
        for seed in plan.options["seeds"]:
            parts = [
                (weight, atom(cells[plan.cell_of[model]], row["metric"], pictures))
                for weight, model, pictures in plan.atoms(table, row, seed)
            ]
            figure = parts[0][1]
            if len(parts) > 1:  # a sum or an average
                figure = {key: sum(weight * part[key] for weight, part in parts) for key in ("value", "base")}
                figure["n"] = sum(part["n"] for _, part in parts) if row["metric"] != "weight change" else ""
                figure["M"] = parts[0][1].get("M", "")  # of one method, so alike
            weights = fingerprints(cells[plan.cell_of[model]] for _, model, _ in plan.atoms(table, row, seed))
            rows.append({**{key: row[key] for key in COLUMNS[:5]}, "training_seed": seed, **figure, **weights})
    write_csv(path, rows, COLUMNS)


def method_rows(found: dict, concept: str, neighbour: str | None) -> list[dict]:
    """The figures of one report as lines of ``methods.csv``, without the columns that name the edit."""
    rows = []

    def add(metric: str, value: float, n: int | str = "", low="", high="", base: float | str = "", M="") -> None:
        rows.append({"metric": metric, "value": float(value), "n": n, "low": low, "high": high, "base": base, "M": M})

    def share(metric: str, value: float, n: int, base: float | str = "") -> None:
        add(metric, value, n, *metrics.interval(value, n), base)

    figures = found["concepts"]
    kept = [name for name, f in figures.items() if not f["erased"]]
    groups = {"erased": [concept], "kept": kept, "neighbour": [name for name in kept if name == neighbour]}
    for group, names in groups.items():
        if names:
            mean = {
                key: statistics.fmean(figures[c][key] for c in names) for key in ("clip_before", "clip_after", "lpips")
            }
            acc = {at: statistics.fmean(figures[c][at]["value"] for c in names) for at in ("acc_before", "acc_after")}
            n = sum(figures[c]["acc_after"]["n"] for c in names)
            share(f"ACC {group}", acc["acc_after"], n, acc["acc_before"])
            add(f"CLIP score {group}", mean["clip_after"], n, base=mean["clip_before"])
            add(f"LPIPS {group}", mean["lpips"], n, base=0.0)
    drift, half = found["drift"], 1.96 * found["drift"]["std"] / math.sqrt(found["drift"]["n"])
    add("drift", drift["value"], drift["n"], drift["value"] - half, drift["value"] + half, 0.0)
    before, after = (found["canvas"][concept][at] for at in ("before", "after"))
    for metric, n in (("UA", after["n_erased"]), ("IRA", after["n_others"]), ("CRA", after["n_others"])):
        share(metric, after[metric], n, before[metric])
    add("FID", found["fid"]["value"], found["fid"]["n"], base=0.0)
    for group, f in found["collapsed"].items():
        share(f"collapsed {group}", f["value"], f["n"])
    add("weight change", found["weight_change"]["value"], base=0.0, M=found["weight_change"]["M"])
    for name, f in found["attacks"].get(concept, {}).items():
        share(f"ACC after {name}", f["after"], f["n"], figures[concept]["acc_before"]["value"])
    return rows


def collect_methods(plan, folders: list[str], path: str) -> None:
    """``methods.csv``: every figure of every method on each concept, a line for each training seed.

    base: the base model's figure. drift, FID and "collapsed retained" are over all pictures without the concept, "kept"
    over the bare names beside it, "neighbour" over the nearest of these. ACC after an attack stands where it was run.
    """
    rows = []
    for folder in map(Path, folders):
        run, found = plan.reports[folder.name], json.loads((folder / "report.json").read_text())
        concept = run.concepts[0]
        labels = {"method": run.method, "concept": concept, "kind": plan.kind(concept), "training_seed": run.seed}
        labels |= fingerprints([found])
        rows += [{**labels, **row} for row in method_rows(found, concept, plan.neighbours.get(concept))]
    write_csv(path, rows, METHOD_COLUMNS)


def collect_costs(files: dict[str, list[str]], path: str) -> None:
    """What the run cost: jobs of each kind, their seconds in all and of the longest, on which device.

    files: JSON files of "drawn" pictures and of "cells", folders of "edits" and of "reports". Taken from the jobs' own
    records, so the seconds of a job that was killed and repeated count once.
    """
    jobs = []
    for kind, name in (("drawn", "training pictures"), ("cells", "measuring")):
        jobs += [(name, "", json.loads(Path(file).read_text())["made_with"]) for file in files[kind]]
    for folder in files["edits"]:
        meta = Edit.load(next(Path(folder).glob("*.safetensors"))).meta
        jobs.append(("training", meta["method"], meta["made_with"]))
    for folder in files["reports"]:
        made = json.loads((Path(folder) / "report.json").read_text())["made_with"]
        jobs.append(("report", made["edit"]["method"], {"seconds": made["seconds"]["all"], "device": made["device"]}))
    rows = []
    for kind in sorted({(job, method, made["device"]) for job, method, made in jobs}):
        seconds = [made["seconds"] for job, method, made in jobs if (job, method, made["device"]) == kind]
        rows.append(
            dict(zip(COST_COLUMNS, (*kind[:2], len(seconds), sum(seconds), max(seconds), kind[2]), strict=True))
        )
    write_csv(path, rows, COST_COLUMNS)


def publish(files: dict[str, list[str]], options: dict, path: str) -> None:
    """Copy a run's "results" and "figures" to the folders that its scale names so; the JSON lists what was written."""
    written = []
    for kind, sources in files.items():
        for source in map(Path, sources):
            target = Path(options[kind]) / source.name
            if target.resolve() != source.resolve():
                with complete(target) as temporary:
                    shutil.copyfile(source, temporary)
            written.append(str(target))
    write_json(path, {"written": written})


# --- figures


def _means(rows: list[dict], keys: list[str]) -> dict[tuple, list[float]]:
    """Values over the training seeds, by the named columns."""
    values: dict[tuple, list[float]] = {}
    for row in rows:
        values.setdefault(tuple(row[key] for key in keys), []).append(float(row["value"]))
    return values


def _range(values: list[float]) -> tuple[float, list[list[float]]]:
    """The mean, and how far the least and the greatest value lie from it, as error bars want it."""
    mean = statistics.fmean(values)
    return mean, [[max(0.0, mean - min(values))], [max(0.0, max(values) - mean)]]  # a mean may round beyond its values


def _save(figure, path: str) -> None:
    with complete(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def figure_of_methods(options: dict, files: list[str], path: str) -> None:
    """Forgotten against kept: a panel for each kind of concept, a point for each method, bars from least to greatest seed."""
    show.plain_style()
    rows = read_csv(files[0])
    values = _means(rows, ["kind", "method", "metric"])
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4), sharey=True, squeeze=False)
    for ax, kind in zip(axes[0], kinds, strict=True):
        for i, method in enumerate(methods):
            (x, x_bar), (y, y_bar) = (_range(values[kind, method, metric]) for metric in ("ACC erased", "drift"))
            ax.errorbar(x, y, y_bar, x_bar, fmt="os^D"[i // 10], color=f"C{i % 10}", capsize=2, label=method)
        concept = next(row["concept"] for row in rows if row["kind"] == kind)
        ax.set(title=f"{kind}: {concept}", xlabel="ACC of the erased concept", xlim=(-0.05, 1.05))
    axes[0, 0].set_ylabel(f"drift of the kept pictures\n{metrics.lpips_name(the_world(options))}")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    _save(figure, path)


def figure_of_tables(options: dict, files: list[str], path: str) -> None:
    """ACC in print against ours, a panel for each table: filled for erased concepts, hollow for kept ones."""
    show.plain_style()
    rows, columns = -(-len(files) // 4), min(4, len(files))
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.25 * columns, 3.25 * rows), sharex=True, sharey=True, squeeze=False
    )
    for ax in axes.flat[len(files) :]:
        ax.set_visible(False)
    methods: dict[str, str] = {}  # name -> colour, alike in all panels
    for ax, file in zip(axes.flat, files, strict=False):
        table = Path(file).stem
        ax.plot([0, 1], [0, 1], color="0.8", zorder=0)
        for row in beside(table, Path(file).parent):
            name = row["method"]
            if row["metric"] != "ACC" or name == "original" or row["value"] is None or closes(row):
                continue
            colour = methods.setdefault(name, f"C{len(methods) % 10}")
            erased = row["evaluated"] in row["erased"].split("+")
            ax.scatter(row["value"], row["ours"], 14, colour if erased else "none", edgecolors=colour, linewidths=0.8)
        ax.set_title(table.replace("sepme-", "SepME, Table "), fontsize=10)
    figure.supxlabel("ACC, printed")
    figure.supylabel("ACC, ours (mean over training seeds)")
    marks = {name: (colour, colour) for name, colour in methods.items()}
    marks |= {"\nfilled: erased": ("0.3", "0.3"), "hollow: kept": ("0.3", "none")}
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=c, mfc=fill, label=name) for name, (c, fill) in marks.items()
    ]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout()
    _save(figure, path)
