"""The tables' plan, the run that makes them (killed and taken up again), and the figures collected from it."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import plan
import psutil
import pytest
import torch
from safetensors.torch import load_file

from helpers import metrics, sample, training
from helpers.edits import Edit
from helpers.judge import BLANK, Classifier, Judge
from helpers.methods import METHODS
from helpers.tables import NAMES, beside, our_table, paper_table

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
LOCAL = ["--profile", str(ROOT / "data/scales/profiles/local")]


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Snakemake in a folder of its own, which then holds everything that it makes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [*SNAKEMAKE, *LOCAL, "--directory", str(folder), "-c2", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# --- the plan


@pytest.mark.parametrize("scale", ["small", "emoji", "paper"])
def test_each_row_of_each_paper_has_a_counterpart(scale):
    made = plan.Plan(scale)
    for table, rows in made.rows.items():
        assert [row["as_printed"] for row in rows] == [row["as_printed"] for row in paper_table(table)]
        for row in rows:
            for weight, model, pictures in made.atoms(table, row, made.options["seeds"][0]):
                cell = made.cells[made.cell_of[model]]
                assert weight and all(dict(cell.counts)[concept] >= n > 0 for concept, n in pictures.items())
                assert bool(pictures) == (row["metric"] != "weight change")
                assert all(edit.split("/")[0] in made.runs for edit in model)
    assert all(edit.count("/") == 1 for cell in made.cells.values() for edit in cell.edits)


def test_the_protocol_of_the_tables():
    made = plan.Plan("emoji")
    vg, pc, ce = (made.ours[name] for name in plan.STYLES)

    def runs(*row):
        return [made.runs[edit.split("/")[0]] for edit in made.model(*row, 0)]

    (joint,) = runs("sepme-2", "G-CiRs", "", "Van Gogh+Cezanne+Picasso")
    assert joint.concepts == (vg, ce, pc)
    (again,) = runs("sepme-3", "AbConcept", "", "Van Gogh+Picasso")  # trained anew for each combination ...
    assert again.concepts == (vg, pc)
    assert [run.concepts for run in runs("sepme-5", "AbConcept", "xattn", "Van Gogh+Picasso")] == [
        (vg,),
        (pc,),
    ]  # ... or added
    a, b = made.model("sepme-3", "SepME", "", "Van Gogh+Picasso", 0)
    assert a.split("/")[0] == b.split("/")[0] and a != b  # one training, two edits

    first, *later = runs("sepme-4", "SepME2", "", "Van Gogh+Cezanne+Picasso")
    assert first == runs("sepme-1", "G-CiRs", "", "Van Gogh")[0] and first.method == "gcirs"
    assert [json.loads(run.options)["known"] for run in later] == [[vg], [vg, ce]]
    separate = runs("sepme-4", "SepME1", "", "Van Gogh+Cezanne+Picasso")
    assert [json.loads(run.options)["known"] for run in separate] == [[ce, pc], [vg, pc], [vg, ce]]

    assert runs("sepme-6", "G-CiRs", "tau=-5e-4", "Van Gogh") == runs("sepme-1", "G-CiRs", "", "Van Gogh")
    kv = runs("sepme-5", "G-CiRs", "to_k;to_v", "Cezanne")[0]
    assert json.loads(kv.options)["group"] == "kv" and "group" not in json.loads(separate[0].options)
    assert (
        len(made.pictures("sepme-5", "Cezanne", "Others")) == len(made.pictures("sepme-8", "chain saw", "Others")) == 6
    )
    assert made.ours["church"] not in made.pictures("sepme-7", "church", "Others") and len(made.objects) == 9
    assert (
        made.model("sepme-1", "original", "", "Van Gogh", 0) == made.model("sepme-3", "SepME", "", "nothing", 0) == ()
    )


@pytest.mark.parametrize("scale", ["small", "emoji", "paper"])
def test_each_run_s_options_are_its_method_s(scale):
    made = plan.Plan(scale)
    for run in made.runs.values():
        settings = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(run.options).items() if k != "known"
        }
        options = METHODS[run.method].Options(**settings)  # raises for what it does not know
        if "tau" in settings:
            assert len(options.taus(run.concepts)) == len(run.concepts)
    assert set(made.options.get("methods", METHODS)) == set(METHODS)


def test_a_changed_option_makes_new_files():
    made = plan.Plan("small")
    one, other = (made.run("esd", ["church"], {"steps": steps}, 0) for steps in (3, 4))
    assert one.name != other.name and one.name == made.run("esd", ["church"], {"steps": 3}, 0).name
    same = {"edits": (), "counts": (("church", 2),)}
    assert plan.Cell(**same, pictures="{}").name != plan.Cell(**same, pictures='{"steps": 9}').name
    with pytest.raises(ValueError, match=r"unknown scale 'huge': choose from emoji, paper, small"):
        plan.Plan("huge")


# --- the run


@pytest.mark.parametrize("scale", ["small", "emoji", "paper"])
def test_dry_run(tmp_path, scale):
    """Tables that are committed spare a fresh clone nothing: otherwise nobody could make them again."""
    for name in ("data/results", "figures"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = snakemake(tmp_path, "-n", "--config", f"scale={scale}")
    assert done.returncode == 0, done.stdout + done.stderr
    made = plan.Plan(scale)
    jobs = dict(
        line.split() for line in done.stdout.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit()
    )
    counts = {
        "train": len(made.runs),
        "measure": len(made.cells),
        "table": len(made.rows),
        "draw": len(made.base_counts()),
    }
    assert {name: int(jobs[name]) for name in counts} == counts


@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_dry_run_on_a_cluster(tmp_path, cluster):
    profile = str(ROOT / "data/scales/profiles" / cluster)
    command = [*SNAKEMAKE, "--profile", profile, "--directory", str(tmp_path), "-n", "--config", "scale=paper"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "gpu=1" in done.stdout, done.stdout + done.stderr


def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path):
    """Jobs that do nothing but write, so that what is tested is the run: SIGKILL twice, then to the end, then once more."""
    log, work = tmp_path / "done.log", ["--config", "scale=small", "work=fake_work"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [*SNAKEMAKE, *LOCAL, "--directory", str(tmp_path), "-c2", *work]
    for count in (6, 20):
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while (not log.exists() or len(log.read_text().splitlines()) < count) and time.time() < deadline:
            time.sleep(0.02)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert workers and not psutil.wait_procs(workers, timeout=10)[1], "workers outlive the run"
        assert not list(tmp_path.rglob("sepme-1.csv"))
    done = snakemake(tmp_path, *work)
    assert done.returncode == 0, done.stdout + done.stderr
    finished = log.read_text().splitlines()
    assert len(finished) <= len(set(finished)) + 2 * 2, "more was done again than the jobs in flight: two at each kill"

    table = tmp_path / "build/tables/small/results/sepme-1.csv"
    found, before = json.loads(table.read_text()), table.stat().st_mtime_ns
    assert len(found) == 16 and all(len(cell) == 3 for cell in found)
    again = snakemake(tmp_path, *work)
    assert "Nothing to be done" in again.stdout + again.stderr and table.stat().st_mtime_ns == before
    assert len(log.read_text().splitlines()) == len(finished)


def test_other_options_make_other_files(tmp_path):
    """How pictures are drawn is in their folder's name; what no name holds is refused."""
    for name in ("Snakefile", "data/scales", "data/papers", "data/concepts.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    options, work = tmp_path / "data/scales/small.toml", ["--config", "scale=small", "work=fake_work"]
    text = options.read_text()

    def run(new: str, *more: str) -> str:
        options.write_text(new)
        done = snakemake(tmp_path, "--snakefile", str(tmp_path / "Snakefile"), *more, *work)
        return done.stdout + done.stderr

    assert "steps (100%) done" in run(text) and "Nothing to be done" in run(text)
    planned = run(text.replace("guidance = 5.0", "guidance = 4.0"), "-n")
    assert all(re.search(rf"^{job} +[1-9]", planned, re.M) for job in ("draw", "measure")) and "\ntrain " not in planned
    assert "remove that folder" in run(text.replace("seeds = [0]", 'seeds = [0, 1]\nprecision = "high"'))


# --- the work of one job


OPTIONS = {
    "world": "tiny",
    "pictures": {"named": 3, "others": 2, "steps": 2, "guidance": 3.0, "lpips_size": 32},
    "report": {"n": 2},
}


@pytest.fixture
def world(tiny_world, monkeypatch, tmp_path):
    """A tiny world under the name of the emoji world, whose LPIPS it takes, with a judge of random weights."""
    things = [BLANK, *tiny_world.objects, *tiny_world.people]
    styles = [BLANK, *tiny_world.styles]
    torch.manual_seed(0)
    tiny_world.judge = Judge(Classifier(len(styles)).eval(), Classifier(len(things)).eval(), styles, things)
    tiny_world.name = "emoji"
    monkeypatch.setattr(jobs, "the_world", lambda options: tiny_world)
    monkeypatch.setattr(training, "CACHE", tmp_path / "cache")
    return tiny_world


def test_the_base_measured_against_itself(world, tmp_path):
    file, out = str(tmp_path / "base" / "church.safetensors"), tmp_path / "cell.json"
    jobs.draw(OPTIONS, "church", [0, 1, 2], file)
    images = load_file(file)["images"]
    assert images.dtype == torch.uint8 and len(images) == 3
    assert torch.equal(images, (sample(world, ["church"] * 3, [0, 1, 2], steps=2, guidance=3.0) * 255).round().byte())
    jobs.measure(OPTIONS, [], {"church": 2}, {"church": file}, str(out))
    cell = json.loads(out.read_text())
    church = cell["concepts"]["church"]
    assert church["lpips"] == [0, 0] and church["hits"] == church["base_hits"] and len(church["hits"]) == 2
    assert cell["weight_change"] == 0 and cell["made_with"]["judge"] == world.judge.fingerprint()
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == []


def test_edits_are_trained_summed_and_measured(world, tmp_path):
    settings = {
        "images": 1,
        "steps": 1,
        "batch_size": 1,
        "tau": [0.0, 0.0],
        "mode": "joint",
        "known": ["church", "dog"],
    }
    folder = tmp_path / "edits" / "sepme"
    jobs.train(OPTIONS, "sepme", ["church", "dog"], settings, 0, str(folder), ["church", "dog"])
    church, dog = (Edit.load(folder / f"{name}.safetensors") for name in ("church", "dog"))
    assert church.meta["protected"] == ["", "dog"] and dog.meta["protected"] == ["", "church"]
    assert church.meta["made_with"]["seconds"] > 0

    files, out = [str(folder / f"{name}.safetensors") for name in ("church", "dog")], tmp_path / "cell.json"
    base = {name: str(tmp_path / f"{name}.safetensors") for name in ("church", "castle")}
    for name, file in base.items():
        jobs.draw(OPTIONS, name, [0, 1], file)
    jobs.measure(OPTIONS, files, {"church": 2, "castle": 1}, base, str(out))
    cell = json.loads(out.read_text())
    assert cell["weight_change"] == pytest.approx((church + dog).norm()) and cell["M"] == church.M
    drawn = sample(world, ["castle"], [0], edit=church + dog, steps=2, guidance=3.0)
    expected = metrics.lpips_distance(
        world, load_file(base["castle"])["images"][:1] / 255, (drawn * 255).round() / 255, size=32
    )
    assert cell["concepts"]["castle"]["lpips"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(cell["concepts"]["church"]["hits"]) == 2


def test_shared_training_pictures_are_found_by_the_methods(world, tmp_path, monkeypatch):
    jobs.prepare(OPTIONS, ["church", "dog"], 2, 5, str(tmp_path / "drawn.json"))
    assert json.loads((tmp_path / "drawn.json").read_text())["pictures"] == 4
    monkeypatch.setattr(training, "sample", None)  # whoever draws now, fails
    latents, prompts, _ = training.concept_latents(world, ["church", "dog"], 2, 5, templates=training.BARE)
    assert len(latents) == 4 and prompts == ["church", "church", "dog", "dog"]


def test_each_process_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"test-{tmp_path.name}-{i}")
    )
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    taken = [jobs.free_device.__wrapped__() for _ in range(2)]  # as two processes would ask
    assert taken == ["cuda:0", "cuda:1"]
    with pytest.raises(RuntimeError, match="all 2 GPUs are taken"):
        jobs.free_device.__wrapped__()


def test_a_scale_without_gpu_jobs_takes_no_gpu(monkeypatch):
    """Two processes of `make tables` on a machine with one GPU: neither may wait for it, or fail for want of it."""
    monkeypatch.setattr(jobs, "free_device", lambda: "cuda:0")
    monkeypatch.setattr(jobs, "load_world", lambda name, device, dtype: device)
    assert jobs.world_of.__wrapped__("emoji", None, "highest", 0) == "cpu"
    assert jobs.world_of.__wrapped__("sd14", "float32", "high", 1) == "cuda:0"
    torch.set_float32_matmul_precision("highest")


# --- from cells to tables


@pytest.fixture
def collected(tmp_path):
    """A table 1, 2 or 7 from cells of invented verdicts: a function of table and scale -> (rows, plan, cells)."""

    def make(table: str):
        made = plan.Plan("emoji")
        found = {}
        for i, (name, cell) in enumerate(sorted(made.cells.items())):
            base = not cell.edits
            found[name] = {
                "weight_change": 0.0 if base else float(i),
                "M": 5,
                "concepts": {
                    c: {
                        "hits": [1] * n if base else [(i + k) % 3 % 2 for k in range(n)],
                        "base_hits": [1] * n,
                        "lpips": [0.0] * n if base else [(i % 7 + k) / 10 for k in range(n)],
                    }
                    for c, n in cell.counts
                },
                "made_with": {"base": "b", "judge": "j"},
            }
            (tmp_path / f"{name}.json").write_text(json.dumps(found[name]))
        files = [str(tmp_path / f"{name}.json") for name in made.cells_of(table)]
        jobs.collect(made, table, files, str(tmp_path / f"{table}.csv"))
        with open(tmp_path / f"{table}.csv", newline="") as file:
            return list(csv.DictReader(file)), made, found

    return make


def test_a_collected_figure_by_hand(collected, tmp_path):
    rows, made, found = collected("sepme-1")
    assert len(rows) == 138 * 3 and list(rows[0]) == jobs.COLUMNS
    assert [tuple(row[key] for key in NAMES) for row in rows[::3]] == [
        tuple(row[key] for key in NAMES) for row in paper_table("sepme-1")
    ]
    wanted = ("ESD", "", "Van Gogh", "Picasso", "ACC")
    row = next(r for r in rows if tuple(r[key] for key in NAMES) == wanted and r["training_seed"] == "1")
    cell = found[made.cell_of[made.model("sepme-1", "ESD", "", "Van Gogh", 1)]]
    hits = cell["concepts"][made.ours["Picasso"]]["hits"]
    assert float(row["value"]) == pytest.approx(sum(hits) / len(hits)) and int(row["n"]) == len(hits)
    low, high = metrics.interval(sum(hits) / len(hits), len(hits))
    assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high), rel=1e-5) and row["base"] == "1"
    change = next(
        r for r in rows if r["method"] == "ESD" and r["metric"] == "weight change" and r["training_seed"] == "0"
    )
    first = made.cell_of[made.model("sepme-1", "ESD", "", change["erased"], 0)]
    assert float(change["value"]) == found[first]["weight_change"] and change["n"] == change["low"] == ""
    assert change["M"] == "5" and row["M"] == ""

    ours = our_table("sepme-1", tmp_path)
    for metric in ("ACC", "LPIPS"):  # the sum that closes the table, from its own cells, as the paper adds them
        by_hand = sum(
            (1 if erased == kept else -1) * ours["FMN10", "", erased, kept, metric]["mean"]
            for erased in ("Van Gogh", "Picasso", "Cezanne")
            for kept in ("Van Gogh", "Picasso", "Cezanne")
        )
        assert ours["FMN10", "", "sum", "erased - kept", metric]["mean"] == pytest.approx(by_hand, abs=1e-4)
    beside_it = beside("sepme-1", tmp_path)
    assert len(beside_it) == 138 and len(beside_it[0]["values"]) == 3
    row = next(r for r in beside_it if r["method"] == "G-CiRs" and r["value"] == 0.228)
    assert row["difference"] == pytest.approx(row["ours"] - 0.228)
    with pytest.raises(FileNotFoundError, match="make tables"):
        our_table("sepme-9", tmp_path)


def test_sums_and_averages_of_the_other_tables(collected, tmp_path):
    collected("sepme-2"), collected("sepme-7")
    two, seven = our_table("sepme-2", tmp_path), our_table("sepme-7", tmp_path)
    three = "Van Gogh+Cezanne+Picasso"
    for metric in ("ACC", "LPIPS"):
        erased = sum(two["FMN20", "", three, name, metric]["mean"] for name in three.split("+"))
        closing = two["FMN20", "", three, "erased - kept", metric]["mean"]
        assert closing == pytest.approx(erased - two["FMN20", "", three, "Others", metric]["mean"], abs=1e-4)
        objects = [key[2] for key in seven if key[0] == "original" and key[4] == metric and key[2] != "average"]
        own = [seven["G-CiRs", "", o, o, metric]["mean"] for o in objects]
        assert len(own) == 9 and seven["G-CiRs", "", "average", "average", metric]["mean"] == pytest.approx(
            sum(own) / 9, abs=1e-4
        )
    assert (
        seven["original", "", "average", "", "weight change"]["mean"]
        == 0
        < seven["FMN50", "", "average", "", "weight change"]["mean"]
    )
    assert math.isclose(two["original", "", three, "Others", "ACC"]["mean"], 1)


def test_the_tables_figure_leaves_closing_lines_out(monkeypatch, tmp_path):
    """A mark for a cell that was erased, one for a kept cell; none for the sum, the average and the unedited model."""
    rows = [
        {"method": method, "metric": "ACC", "erased": erased, "evaluated": evaluated, "value": value, "ours": 0.25}
        for method, erased, evaluated, value in [
            ("ESD", "Picasso", "Picasso", 0.1), ("ESD", "Picasso", "Others", 0.9), ("ESD", "sum", "erased - kept", 0.7),
            ("ESD", "average", "average", 0.3), ("original", "Picasso", "Picasso", 1.0),
        ]
    ]  # fmt: skip
    monkeypatch.setattr(jobs, "beside", lambda table, folder: rows)
    drawn = []
    monkeypatch.setattr(jobs, "_save", lambda figure, path: drawn.append(figure))
    jobs.figure_of_tables({}, ["sepme-2.csv"], str(tmp_path / "tables.png"))
    marks = drawn[0].axes[0].collections
    assert [tuple(mark.get_offsets()[0]) for mark in marks] == [(0.1, 0.25), (0.9, 0.25)]
    assert [len(mark.get_facecolors()) for mark in marks] == [1, 0]  # filled, hollow
    jobs.plt.close(drawn[0])


def test_publishing(tmp_path):
    """Results go where the scale wants them; those that are there already stay as they are."""
    (tmp_path / "a.csv").write_text("new")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "b.png").write_text("same place")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.csv").write_text("old")
    options = {"results": str(tmp_path / "out"), "figures": str(tmp_path / "kept")}
    files = {"results": [str(tmp_path / "a.csv")], "figures": [str(tmp_path / "kept" / "b.png")]}
    jobs.publish(files, options, str(tmp_path / "published.json"))
    assert (tmp_path / "out" / "a.csv").read_text() == "new"
    assert (tmp_path / "kept" / "b.png").read_text() == "same place"
    written = json.loads((tmp_path / "published.json").read_text())["written"]
    assert written == [str(tmp_path / "out" / "a.csv"), str(tmp_path / "kept" / "b.png")]


def test_the_methods_table_from_a_report(tmp_path):
    made = plan.Plan("emoji")
    share = {"value": 0.5, "n": 4, "interval": [0.1, 0.9]}

    def figures(erased, acc):
        return {
            "erased": erased,
            "acc_before": {**share, "value": 1.0},
            "acc_after": {**share, "value": acc},
            "clip_before": 0.3,
            "clip_after": 0.2,
            "lpips": 0.1,
        }

    def canvas(ua):
        return {"UA": ua, "IRA": 0.75, "CRA": 1.0, "n_erased": 3, "n_others": 4}

    for name, run in made.reports.items():
        (concept,) = run.concepts
        found = {
            "concepts": {concept: figures(True, 0.25), made.neighbours[concept]: figures(False, 0.5), "pizza": figures(False, 1.0)},
            "canvas": {concept: {"before": canvas(0.0), "after": canvas(1.0)}},
            "drift": {"value": 0.2, "std": 0.1, "n": 25}, "fid": {"value": 3.0, "n": 25},
            "collapsed": {"retained": share, "erased": share}, "weight_change": {"value": 7.0, "M": 2},
            "attacks": {concept: {"relearning": {"after": 0.75, "n": 4}}} if run.seed == 0 else {},
            "made_with": {"base": "b", "judge": "j"},
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(found))
    jobs.collect_methods(made, [str(tmp_path / name) for name in made.reports], str(tmp_path / "methods.csv"))
    with open(tmp_path / "methods.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == jobs.METHOD_COLUMNS
    assert {row["kind"] for row in rows} == {"style", "object", "person"} and len({row["method"] for row in rows}) == 10
    one = {r["metric"]: r for r in rows if (r["method"], r["kind"], r["training_seed"]) == ("sdd", "object", "0")}
    assert (one["ACC erased"]["value"], one["ACC erased"]["n"], one["ACC erased"]["base"]) == ("0.25", "4", "1")
    assert (one["ACC kept"]["value"], one["ACC kept"]["n"]) == ("0.75", "8") and one["ACC neighbour"]["value"] == "0.5"
    assert (one["weight change"]["value"], one["weight change"]["M"]) == ("7", "2")
    assert float(one["drift"]["high"]) == pytest.approx(0.2 + 1.96 * 0.1 / 5, rel=1e-5)
    assert (one["UA"]["value"], one["UA"]["base"], one["UA"]["n"], one["IRA"]["n"]) == ("1", "0", "3", "4")
    assert one["ACC after relearning"]["base"] == "1" and {(row["weights"], row["judge"]) for row in rows} == {
        ("b", "j")
    }
    assert sum(row["metric"] == "ACC after relearning" for row in rows) == 30  # of one training seed only
    jobs.figure_of_methods(made.options, [str(tmp_path / "methods.csv")], str(tmp_path / "methods.png"))
    assert (tmp_path / "methods.png").stat().st_size > 10_000
