"""The tables' plan, the run that makes them (killed and taken up again), and what is collected."""

import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_work
import pandas as pd
import psutil
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from helpers import images, judge_sd, metrics, sample
from helpers.concepts import BARE
from helpers.edits import Edit
from helpers.judge import BLANK, Classifier, Judge
from helpers.methods import METHODS, options_of
from helpers.perceptual import Perceptual, emoji_network
from helpers.seeds import RANGES
from helpers.stats import wilson_interval
from helpers.tables import (
    COLUMNS,
    NAMES,
    RESULTS,
    compare_with_paper,
    load_ours,
    paper_table,
    read_csv,
)
from workflow import jobs, plan

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow/Snakefile")]
PROFILES = ROOT / "workflow/profiles"
LOCAL = [*SNAKEMAKE, "--profile", str(PROFILES / "local"), "-c2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
SCALES = ["small", "emoji", "paper"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Snakemake in a folder of its own, which then holds everything that it makes."""
    command = [*command, "--directory", str(folder)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


# --- the plan


@pytest.mark.parametrize("scale", SCALES)
def test_each_row_of_each_paper_has_a_counterpart(scale):
    work = plan.Plan(scale)
    for table, rows in work.rows.items():
        assert [row["as_printed"] for row in rows] == list(paper_table(table)["as_printed"])
        for row in rows:
            parts = work.weighted_parts(table, row, work.options["seeds"][0])
            for weight, model, counts in parts:
                there = dict(work.cells[work.cell_of[model]].counts)
                assert weight and all(there[concept] >= n > 0 for concept, n in counts.items())
                assert bool(counts) == (row["metric"] != "weight change")
                assert all(edit.split("/")[0] in work.runs for edit in model)
    assert all(edit.count("/") == 1 for cell in work.cells.values() for edit in cell.edits)


@pytest.fixture(scope="module")
def emoji():
    return plan.Plan("emoji")


def options_in(runs: list[plan.Run], name: str) -> list:
    return [json.loads(one.options)[name] for one in runs]


def test_the_protocol_of_the_tables(emoji):
    vg, pc, ce = (emoji.ours[name] for name in plan.STYLES)
    three = "Van Gogh+Cezanne+Picasso"

    def runs(*row):
        return [emoji.runs[edit.split("/")[0]] for edit in emoji.edits_of_row(*row, 0)]

    (joint,) = runs("sepme-2", "G-CiRs", "", three)
    assert joint.concepts == (vg, ce, pc) and options_in([joint], "tau") == [[0, 0, 0]]
    (again,) = runs("sepme-3", "AbConcept", "", "Van Gogh+Picasso")
    assert again.concepts == (vg, pc)  # trained anew for each combination ...
    added = runs("sepme-5", "AbConcept", "xattn", "Van Gogh+Picasso")
    assert [one.concepts for one in added] == [(vg,), (pc,)]  # ... or added
    a, b = emoji.edits_of_row("sepme-3", "SepME", "", "Van Gogh+Picasso", 0)
    assert a.split("/")[0] == b.split("/")[0] and a != b  # one training, two edits

    first, *later = runs("sepme-4", "SepME2", "", three)
    assert first == runs("sepme-1", "G-CiRs", "", "Van Gogh")[0] and first.method == "gcirs"
    assert options_in(later, "known") == [[vg], [vg, ce]]
    separate = runs("sepme-4", "SepME1", "", three)
    assert options_in(separate, "known") == [[ce, pc], [vg, pc], [vg, ce]]
    assert options_in(separate, "tau") == [[0], [pytest.approx(3 * 1.5e-4)], [0]]

    by_tau = runs("sepme-6", "G-CiRs", "tau=-5e-4", "Van Gogh")
    assert by_tau == runs("sepme-1", "G-CiRs", "", "Van Gogh")
    kv = runs("sepme-5", "G-CiRs", "to_k;to_v", "Cezanne")
    assert options_in(kv, "group") == ["kv"] and "group" not in json.loads(separate[0].options)
    for table, erased in (("sepme-5", "Cezanne"), ("sepme-8", "chain saw")):
        assert len(emoji.images_of_row(table, erased, "Others")) == 6
    assert emoji.ours["church"] not in emoji.images_of_row("sepme-7", "church", "Others")
    assert len(emoji.objects) == 9
    assert emoji.edits_of_row("sepme-1", "original", "", "Van Gogh", 0) == ()
    assert emoji.edits_of_row("sepme-3", "SepME", "", "nothing", 0) == ()


@pytest.mark.parametrize("scale", SCALES)
def test_each_run_s_options_are_its_method_s(scale):
    work = plan.Plan(scale)
    for one in work.runs.values():
        given = json.loads(one.options)
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        options = options_of(one.method, settings)  # raises for what it does not know
        if "tau" in settings:
            assert len(options.taus(one.concepts)) == len(one.concepts)
    if work.reports:
        assert {one.method for one in work.reports.values()} == set(METHODS)
    assert set(work.options.get("methods", {})) <= set(METHODS)


def test_the_catalogue_says_what_runs_share_and_how_edits_come_apart():
    one = plan.Run("gcirs", ("church", "dog"), '{"images": 4}', 3)
    assert one.shared_images == "church+dog-4-3" and one.edit_names == ["church+dog"]
    apart = plan.Run("sepme", ("church", "dog"), "{}", 3)
    assert apart.shared_images is None and apart.edit_names == ["church", "dog"]
    settings = '{"images": 4, "variant": "sepme-code"}'
    assert plan.Run("abconcept", ("church",), settings, 0).shared_images == "church-4-0"
    assert plan.Run("abconcept", ("church",), '{"images": 4}', 0).shared_images is None
    assert plan.Run("esd", ("church",), '{"images": 4}', 0).shared_images is None


def test_a_changed_option_makes_new_files(tmp_path):
    work = plan.Plan("small")
    one, other = (work.run("esd", ["church"], {"steps": steps}, 0) for steps in (3, 4))
    assert one.name != other.name
    assert one.name == work.run("esd", ["church"], {"steps": 3}, 0).name
    same = {"edits": (), "counts": (("church", 2),)}
    plain, changed = (plan.Cell(**same, evaluation=how) for how in ("{}", '{"steps": 9}'))
    assert plain.name != changed.name
    known = ", ".join(sorted(path.stem for path in (ROOT / "workflow").glob("*.toml")))
    with pytest.raises(ValueError, match=f"unknown scale 'huge': choose from {known}"):
        plan.Plan("huge")
    shutil.copy(ROOT / "workflow/small.toml", tmp_path / "own.toml")
    assert plan.Plan(tmp_path / "own.toml").scale == "own"


# --- the run


def counted(work: plan.Plan) -> dict[str, int]:
    """How many jobs of some kinds a plan has."""
    return {
        "train": len(work.runs),
        "measure": len(work.cells),
        "table": len(work.rows),
        "sample_base": len(work.base_counts()),
    }


def planned(output: str) -> dict[str, int]:
    """The jobs that Snakemake's dry run lists, and how many of each."""
    return {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", output, re.M)}


def test_dry_run(tmp_path, emoji):
    """Committed tables spare a fresh clone nothing: otherwise nobody could make them again."""
    for name in ("data/results", "figures"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = run([*LOCAL, "-n", "--config", "scale=emoji"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert counted(emoji).items() <= planned(done.stdout).items()


@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_dry_run_on_a_cluster(tmp_path, cluster):
    profile = ["--profile", str(PROFILES / cluster)]
    done = run([*SNAKEMAKE, *profile, "-n", "--config", "scale=paper"], tmp_path)
    assert done.returncode == 0 and "gpu=1" in done.stdout, done.stdout + done.stderr
    assert counted(plan.Plan("paper")).items() <= planned(done.stdout).items()


def kill_after(count: int, command: list[str], folder: Path) -> None:
    """SIGKILL for a run as soon as so many jobs are done; its workers end with it."""
    command, log = [*command, "--directory", str(folder)], folder / "done.log"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen(command, env=ENVIRONMENT, **quiet)
    deadline = time.time() + 120
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.time() < deadline, "the run does not get there"
        time.sleep(0.02)
    workers = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert workers and not psutil.wait_procs(workers, timeout=10)[1], "workers outlive the run"


def test_killed_anywhere_it_goes_on_and_ends_the_same(tmp_path):
    """Jobs that do nothing but write, so that what is tested is the run.

    Refused while another one is at work; SIGKILL twice, then to the end; then nothing to do; then
    other options, which make other files.
    """
    log, own = tmp_path / "done.log", tmp_path / "own.toml"
    text = (ROOT / "workflow/small.toml").read_text()
    own.write_text(text)
    command = [*LOCAL, "--config", f"scale={own}", "work=fake_work"]
    build = tmp_path / "build/tables/own"
    build.mkdir(parents=True)
    with FileLock(build / "run.lock"):
        refused = run(command, tmp_path)
    assert (
        refused.returncode and "another run of the scale 'own'" in refused.stdout + refused.stderr
    )
    assert not log.exists()
    for count in (6, 20):
        kill_after(count, command, tmp_path)
        assert not list(tmp_path.rglob("sepme-1.csv"))
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    finished = log.read_text().splitlines()
    again = len(finished) - len(set(finished))
    assert again <= 2 * 2, "more was done again than the jobs in flight: two at each kill"

    table = build / "results/sepme-1.csv"
    found, before = json.loads(table.read_text()), table.stat().st_mtime_ns
    assert len(found) == len(plan.Plan(own).cells) and all(len(cell) == 3 for cell in found)
    idle = run(command, tmp_path)
    assert "Nothing to be done" in idle.stdout + idle.stderr
    assert table.stat().st_mtime_ns == before and log.read_text().splitlines() == finished

    own.write_text(text.replace("guidance = 5.0\nsampler", "guidance = 4.0\nsampler"))
    other = planned(run([*command, "-n"], tmp_path).stdout)
    assert other["sample_base"] and other["measure"] and "train" not in other


def test_the_jobs_that_do_nothing_are_the_jobs():
    """Every job that the Snakefile asks for exists, and its stand-in takes the same arguments."""
    text = (ROOT / "workflow/Snakefile").read_text()
    names = {*re.findall(r'WORK\.run\("(\w+)"', text), "figure_of_methods", "figure_of_tables"}
    assert len(names) > 10
    for name in names:
        real, fake = (inspect.signature(getattr(module, name)) for module in (jobs, fake_work))
        assert list(real.parameters) == list(fake.parameters), name


def test_what_no_file_s_name_holds_may_not_change(tmp_path):
    options = plan.options_of_scale("paper")
    for _ in range(2):
        jobs.claim(options, str(tmp_path / "scale.json"))
    sampling = options["sampling"] | {"steps": 7}
    for changed in ({"precision": "highest"}, {"sampling": sampling}, {"judge": {"images": 3}}):
        with pytest.raises(ValueError, match="remove that folder"):
            jobs.claim(options | changed, str(tmp_path / "scale.json"))
    jobs.claim(options | {"seeds": [0, 1]}, str(tmp_path / "scale.json"))  # is in names


# --- the work of one job


HOW = {"steps": 2, "guidance": 3.0, "sampler": "ddim"}
OPTIONS = {
    "world": "tiny",
    "sampling": HOW,
    "evaluation": {"named": 3, "others": 2, "lpips_size": 32, **HOW},
    "report": {"n": 2},
}


def random_judge(world) -> Judge:
    styles, things = [BLANK, *world.styles], [BLANK, *world.objects, *world.people]
    torch.manual_seed(0)
    networks = (Classifier(len(names)).eval() for names in (styles, things))
    return Judge(*networks, styles, things)


@pytest.fixture
def world(tiny_world, monkeypatch, cache):
    """A tiny world that brings a judge and an LPIPS network of random weights."""
    judge = random_judge(tiny_world)
    tiny_world.brings = {
        "judge": lambda: judge,
        "lpips": lambda: Perceptual("LPIPS (random)", emoji_network()),
    }
    monkeypatch.setattr(jobs, "world_of", lambda *given: tiny_world)
    return tiny_world


def test_the_base_measured_against_itself(world, tmp_path):
    file, out = str(tmp_path / "base" / "church.safetensors"), tmp_path / "cell.json"
    jobs.sample_base(OPTIONS, "church", [0, 1, 2], file)
    pixels = load_file(file)["images"]
    expected = images.to_bytes(sample(world, ["church"] * 3, [0, 1, 2], **HOW))
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected)
    jobs.measure(OPTIONS, [], {"church": 2}, {"church": file}, str(out))
    cell = json.loads(out.read_text())
    church = cell["concepts"]["church"]
    assert church["lpips"] == [0, 0] and church["hits"] == church["base_hits"]
    assert len(church["hits"]) == 2 and cell["edits"] == []
    assert cell["weight_change"] == 0 and cell["made_with"]["judge"] == world.judge.fingerprint()
    assert [path.name for path in tmp_path.rglob("*.partial")] == []


def test_edits_are_trained_summed_and_measured(world, tmp_path):
    settings = {
        "images": 1, "steps": 1, "batch_size": 1, "tau": [0.0, 0.0], "mode": "joint",
        "known": ["church", "dog", "castle"],
    }  # fmt: skip
    folder, names = tmp_path / "edits" / "sepme", ["church", "dog"]
    jobs.train(OPTIONS, "sepme", names, settings, 0, str(folder), names)
    church, dog = (Edit.load(folder / f"{name}.safetensors") for name in names)
    assert church.meta["protected"] == ["", "dog", "castle"]
    assert dog.meta["protected"] == ["", "church", "castle"]
    assert church.erased == ["church"] and church.meta["made_with"]["seconds"] > 0

    files, out = [str(folder / f"{name}.safetensors") for name in names], tmp_path / "cell.json"
    base = {name: str(tmp_path / f"{name}.safetensors") for name in ("church", "castle")}
    for name, file in base.items():
        jobs.sample_base(OPTIONS, name, [0, 1], file)
    jobs.measure(OPTIONS, files, {"church": 2, "castle": 1}, base, str(out))
    cell, both = json.loads(out.read_text()), church + dog
    assert cell["weight_change"] == pytest.approx(both.norm()) and cell["M"] == church.M
    after = images.as_stored(sample(world, ["castle"], [0], edit=both, **HOW))
    before = load_file(base["castle"])["images"][:1] / 255
    expected = metrics.lpips_distance(world, before, after, size=32)
    assert cell["concepts"]["castle"]["lpips"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(cell["concepts"]["church"]["hits"]) == 2


def test_a_training_makes_one_edit_where_the_method_does(world, tmp_path):
    settings = {"steps": 1, "batch_size": 1, "rollout_steps": 2}
    jobs.train(OPTIONS, "esd", ["church", "dog"], settings, 0, str(tmp_path / "esd"), ["both"])
    edit = Edit.load(tmp_path / "esd" / "both.safetensors")
    assert edit.erased == ["church", "dog"] and edit.meta["options"]["rollout_steps"] == 2


def test_shared_training_images_are_found_by_the_methods(world, tmp_path, monkeypatch):
    jobs.sample_training_images(OPTIONS, ["church", "dog"], 2, 5, str(tmp_path / "done.json"))
    assert json.loads((tmp_path / "done.json").read_text())["images"] == 4
    monkeypatch.setattr(images, "sample", None)  # whoever samples now, fails
    names = ["church", "dog"]
    latents, prompts, _ = images.concept_latents(world, names, 2, 5, templates=BARE)
    assert len(latents) == 4 and prompts == ["church", "church", "dog", "dog"]


def test_a_world_samples_as_its_scale_says(world, monkeypatch, tmp_path):
    """Training images too; and where the scale trains the judge, that one judges, and no people."""
    assert jobs.the_world(OPTIONS).sampling.sampler == "ddim" and world.sampling.steps == 2
    assert world.people and jobs.evaluation_sampling(OPTIONS) == HOW
    trained = random_judge(world)
    monkeypatch.setattr(judge_sd, "load_judge", lambda path: (path, trained))
    scale = OPTIONS | {"judge": {"images": 2}}
    for style in ("Noto", BLANK):
        file = tmp_path / f"{style}.safetensors"
        jobs.sample_judge_images(scale, style, str(file))  # before there is a judge
        seeds = [RANGES["judge"][0] + i for i in range(2)]
        expected = sample(world, ["Noto" if style == "Noto" else ""] * 2, seeds, **HOW)
        assert torch.equal(load_file(file)["images"], images.to_bytes(expected))
    jobs.the_world(scale | {"judge_file": "there"})
    assert world.judge == ("there", trained) and world.people == []


def test_each_process_has_a_gpu_of_its_own(monkeypatch, cache):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"test-{i}")
    )
    taken = [jobs.own_device.__wrapped__() for _ in range(2)]  # as two processes would ask
    assert [device for device, _ in taken] == ["cuda:0", "cuda:1"]
    with pytest.raises(RuntimeError, match="all 2 GPUs are taken"):
        jobs.own_device.__wrapped__()
    assert {path.name for path in cache.iterdir()} == {"gpu-test-0.lock", "gpu-test-1.lock"}
    taken[1][1].release()
    assert jobs.own_device.__wrapped__()[0] == "cuda:1"


@pytest.fixture
def one_gpu(monkeypatch, cache):
    """A machine with one GPU, and the lock of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="U"))
    cache.mkdir()
    return cache / "gpu-U.lock"


@pytest.mark.parametrize("kind", ["link", "hard link", "file", "folder"])
def test_what_is_in_a_lock_s_place_is_never_emptied(one_gpu, tmp_path, kind):
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    if kind == "link":
        one_gpu.symlink_to(victim)
    elif kind == "hard link":
        one_gpu.hardlink_to(victim)
    elif kind == "file":
        victim = victim.rename(one_gpu)
    else:
        one_gpu.mkdir()
    with pytest.warns(UserWarning, match=r"cuda:0 is skipped.*gpu-U\.lock.*LETHE_CACHE"):
        with pytest.raises(RuntimeError, match="GPUs are taken"):
            jobs.own_device.__wrapped__()
    assert victim.read_text() == "years of work"


def test_another_user_s_lock_is_skipped_by_name(one_gpu, monkeypatch):
    def denied(*given, **options):
        raise PermissionError(13, "Permission denied", str(one_gpu))

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"gpu-U\.lock"):
        patch.setattr(os, "open", denied)
        with pytest.raises(RuntimeError, match=r"not yours.*LETHE_CACHE"):
            jobs.own_device.__wrapped__()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="another user's"):
        patch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(RuntimeError, match="not yours"):
            jobs.own_device.__wrapped__()
    assert jobs.own_device.__wrapped__()[0] == "cuda:0"


def test_results_of_other_parts_are_not_put_into_one_table():
    one = {"made_with": {"base": "b", "judge": "j", "base_parts": {"vae": "1"}}}
    other = {"made_with": {"base": "b", "judge": "j", "base_parts": {"vae": "2"}}}
    assert jobs.provenance_of([one, one]) == {"base_model": "b", "judge": "j"}
    with pytest.raises(ValueError, match="different weights"):
        jobs.provenance_of([one, other])


def test_a_result_says_all_that_it_depends_on(world, tmp_path):
    file, out = str(tmp_path / "church.safetensors"), tmp_path / "cell.json"
    jobs.sample_base(OPTIONS, "church", [0, 1], file)
    jobs.measure(OPTIONS, [], {"church": 2}, {"church": file}, str(out))
    made = jobs.load_json(out, "cell", jobs.AGAIN, *jobs.CELL)["made_with"]
    parts = {"unet", "text_encoder", "vae", "scheduler", "tokenizer"}
    assert set(made["base_parts"]) == parts and made["base"] == world.fingerprint()
    assert made["judge"] == world.judge.fingerprint() and made["lpips"] == "LPIPS (random)"
    assert made["evaluation"] == OPTIONS["evaluation"] and made["device"] == "cpu"
    assert set(made["versions"]) == {"torch", "diffusers", "transformers"}


def test_a_scale_without_gpu_jobs_takes_no_gpu(monkeypatch):
    """Two processes of `make tables` on a machine with one GPU: neither may wait for it or fail."""
    monkeypatch.setattr(jobs, "own_device", lambda: ("cuda:0", None))
    monkeypatch.setattr(jobs, "load_world", lambda name, device, dtype: device)
    assert jobs.world_of.__wrapped__("emoji", None, "highest", 0) == "cpu"
    assert jobs.world_of.__wrapped__("sd14", "float32", "high", 1) == "cuda:0"
    torch.set_float32_matmul_precision("highest")


# --- from cells to tables


def test_committed_tables_have_the_one_schema(emoji):
    for name in [*emoji.rows, "methods"]:
        frame = read_csv(RESULTS / f"{name}.csv")
        assert list(frame.columns) == COLUMNS
        assert not frame.duplicated([*NAMES, "seed"]).any()
        assert set(frame["seed"]) == set(emoji.options["seeds"])


@pytest.fixture
def collected(tmp_path, emoji):
    """A table from cells of invented verdicts: a function of its name -> (frame, cells)."""

    def verdicts(i: int, n: int, base: bool) -> dict:
        return {
            "hits": [1] * n if base else [(i + k) % 3 % 2 for k in range(n)],
            "base_hits": [1] * n,
            "lpips": [0.0] * n if base else [(i % 7 + k) / 10 for k in range(n)],
        }

    def make(table: str):
        found = {}
        for i, (name, cell) in enumerate(sorted(emoji.cells.items())):
            base = not cell.edits
            found[name] = {
                "weight_change": 0.0 if base else float(i),
                "M": 5,
                "concepts": {concept: verdicts(i, n, base) for concept, n in cell.counts},
                "made_with": {"base": "b", "judge": "j"},
            }
            (tmp_path / f"{name}.json").write_text(json.dumps(found[name]))
        files = [str(tmp_path / f"{name}.json") for name in emoji.cells_of(table)]
        jobs.collect(emoji, table, files, str(tmp_path / f"{table}.csv"))
        return read_csv(tmp_path / f"{table}.csv"), found

    return make


def row_of(frame: pd.DataFrame, *names, seed: int = 0) -> pd.Series:
    """The one row of these names (``NAMES``) and this training seed."""
    same = (frame[NAMES] == list(names)).all(axis=1) & (frame["seed"] == seed)
    return frame[same].squeeze()


def test_a_collected_value_by_hand(collected, emoji):
    frame, found = collected("sepme-1")
    printed = paper_table("sepme-1")
    assert list(frame.columns) == COLUMNS and len(frame) == 3 * len(printed)
    assert frame[NAMES][::3].values.tolist() == printed[NAMES].values.tolist()
    row = row_of(frame, "ESD", "", "Van Gogh", "Picasso", "ACC", seed=1)
    cell = found[emoji.cell_of[emoji.edits_of_row("sepme-1", "ESD", "", "Van Gogh", 1)]]
    hits = cell["concepts"][emoji.ours["Picasso"]]["hits"]
    share, n = sum(hits) / len(hits), len(hits)
    assert row["value"] == pytest.approx(share) and row["n"] == n and row["base"] == 1
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(share, n), rel=1e-5)
    assert math.isnan(row["M"]) and (row["base_model"], row["judge"]) == ("b", "j")
    change = row_of(frame, "ESD", "", "Cezanne", "", "weight change")
    cell = found[emoji.cell_of[emoji.edits_of_row("sepme-1", "ESD", "", "Cezanne", 0)]]
    assert change["value"] == cell["weight_change"] and change["M"] == 5
    assert math.isnan(change["n"]) and math.isnan(change["low"])


def values_of(table: str, folder: Path) -> dict[tuple, float]:
    """The names of a cell -> our mean over training seeds."""
    frame = load_ours(table, folder)
    return dict(zip(map(tuple, frame[NAMES].values), frame["ours"], strict=True))


def test_a_closing_sum_is_its_cells(collected, tmp_path):
    """As the paper adds them: erased styles minus retained ones."""
    collected("sepme-1")
    ours, styles = values_of("sepme-1", tmp_path), plan.STYLES
    for metric in ("ACC", "LPIPS"):
        by_hand = sum(
            (1 if a == b else -1) * ours["FMN10", "", a, b, metric] for a in styles for b in styles
        )
        closing = ours["FMN10", "", "sum", "erased - kept", metric]
        assert closing == pytest.approx(by_hand, abs=1e-4)


def test_ours_beside_the_paper_s(collected, tmp_path):
    collected("sepme-1")
    both = compare_with_paper("sepme-1", tmp_path)
    assert len(both) == len(paper_table("sepme-1")) and len(both["values"][0]) == 3
    assert list(both["as_printed"]) == list(paper_table("sepme-1")["as_printed"])
    row = both[(both["method"] == "G-CiRs") & (both["value"] == 0.228)].squeeze()
    assert row["difference"] == pytest.approx(row["ours"] - 0.228)
    assert row["ours"] == pytest.approx(sum(row["values"]) / 3)
    with pytest.raises(FileNotFoundError, match="make tables"):
        load_ours("sepme-9", tmp_path)


def test_sums_and_averages_of_the_other_tables(collected, tmp_path):
    collected("sepme-2"), collected("sepme-7")
    two, seven = values_of("sepme-2", tmp_path), values_of("sepme-7", tmp_path)
    three = "Van Gogh+Cezanne+Picasso"
    for metric in ("ACC", "LPIPS"):
        erased = sum(two["FMN20", "", three, name, metric] for name in three.split("+"))
        closing = two["FMN20", "", three, "erased - kept", metric]
        others = two["FMN20", "", three, "Others", metric]
        assert closing == pytest.approx(erased - others, abs=1e-4)
        own = [seven["G-CiRs", "", o, o, metric] for o in plan.OBJECTS]
        average = seven["G-CiRs", "", "average", "average", metric]
        assert len(own) == 9 and average == pytest.approx(sum(own) / 9, abs=1e-4)
    assert seven["original", "", "average", "", "weight change"] == 0
    assert seven["FMN50", "", "average", "", "weight change"] > 0
    assert math.isclose(two["original", "", three, "Others", "ACC"], 1)


def test_results_of_different_weights_are_refused():
    made = [{"made_with": {"base": base, "judge": "j"}} for base in "ab"]
    assert jobs.provenance_of(made[:1]) == {"base_model": "a", "judge": "j"}
    with pytest.raises(ValueError, match="remove the build folder"):
        jobs.provenance_of(made)


def test_the_tables_figure_leaves_closing_lines_out(monkeypatch, tmp_path):
    """A mark for an erased cell and one for a retained cell; none for the sum, the average and the
    unedited model."""
    cells = [
        ("ESD", "Picasso", "Picasso", 0.1), ("ESD", "Picasso", "Others", 0.9),
        ("ESD", "sum", "erased - kept", 0.7), ("ESD", "average", "average", 0.3),
        ("original", "Picasso", "Picasso", 1.0), ("ESD", "Picasso", "Cezanne", None),
    ]  # fmt: skip
    frame = pd.DataFrame(cells, columns=["method", "erased", "evaluated", "value"])
    frame = frame.assign(metric="ACC", ours=0.25)
    monkeypatch.setattr(jobs, "compare_with_paper", lambda table, folder: frame)
    figures = []
    monkeypatch.setattr(jobs, "save_figure", lambda figure, path: figures.append(figure))
    jobs.figure_of_tables({}, ["sepme-2.csv"], str(tmp_path / "tables.png"))
    marks = figures[0].axes[0].collections
    assert [tuple(mark.get_offsets()[0]) for mark in marks] == [(0.1, 0.25), (0.9, 0.25)]
    assert [len(mark.get_facecolors()) for mark in marks] == [1, 0]  # filled, hollow
    jobs.plt.close(figures[0])


def test_publishing(tmp_path):
    """Results go where the scale wants them; those that are there already stay as they are."""
    (tmp_path / "a.csv").write_text("new")
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "b.png").write_text("same place")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.csv").write_text("old")
    options = {"results": str(tmp_path / "out"), "figures": str(tmp_path / "same")}
    files = {"results": [str(tmp_path / "a.csv")], "figures": [str(tmp_path / "same" / "b.png")]}
    jobs.publish(files, options, str(tmp_path / "published.json"))
    assert (tmp_path / "out" / "a.csv").read_text() == "new"
    assert (tmp_path / "same" / "b.png").read_text() == "same place"
    written = json.loads((tmp_path / "published.json").read_text())["written"]
    assert written == [str(tmp_path / "out" / "a.csv"), str(tmp_path / "same" / "b.png")]


def test_costs_are_summed_by_job_method_and_device(tmp_path, world):
    def made(seconds, device="cpu"):
        return {"made_with": {"device": device, "seconds": seconds}}

    for name, content in {"a": made(2.0), "b": made(3.5), "c": made(1.0, "GPU")}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name, seconds in (("one", 4.0), ("two", 5.0)):
        edit = Edit({}, meta={"method": "esd", **made(seconds)})
        edit.save(tmp_path / name / "x.safetensors")
    (tmp_path / "three").mkdir()
    report = {"edit": {"method": "sdd"}, "device": "cpu", "seconds": {"sampling": 1.0, "all": 7.0}}
    (tmp_path / "three" / "report.json").write_text(json.dumps({"made_with": report}))
    files = {
        "images": [str(tmp_path / "a.json")],
        "cells": [str(tmp_path / "b.json"), str(tmp_path / "c.json"), str(tmp_path / "a.json")],
        "edits": [str(tmp_path / "one"), str(tmp_path / "two")],
        "reports": [str(tmp_path / "three")],
    }
    jobs.collect_costs(files, str(tmp_path / "costs.csv"))
    assert (tmp_path / "costs.csv").read_text().splitlines() == [
        "job,method,jobs,seconds,longest,device",
        "measuring,,1,1,1,GPU",
        "measuring,,2,5.5,3.5,cpu",
        "report,sdd,1,7,7,cpu",
        "training,esd,2,9,5,cpu",
        "training images,,1,2,2,cpu",
    ]


def invented_report(concept: str, neighbour: str, attacked: bool) -> dict:
    share = {"value": 0.5, "n": 4, "interval": [0.1, 0.9]}

    def of_name(erased: bool, acc: float) -> dict:
        return {
            "erased": erased, "acc_before": {**share, "value": 1.0},
            "acc_after": {**share, "value": acc},
            "second_before": share, "second_after": {**share, "value": acc / 2},
            "no_concept_before": {"blank": 0.0, "something else": 0.0},
            "no_concept_after": {"blank": 1 - acc, "something else": 0.0},
            "clip_before": 0.3, "clip_after": 0.2, "lpips": 0.1,
        }  # fmt: skip

    def canvas(ua: float) -> dict:
        return {"UA": ua, "IRA": 0.75, "CRA": 1.0, "n_erased": 3, "n_others": 4}

    names = {concept: (True, 0.25), neighbour: (False, 0.5), "pizza": (False, 1.0)}
    return {
        "concepts": {name: of_name(*given) for name, given in names.items()},
        "canvas": {concept: {"before": canvas(0.0), "after": canvas(1.0)}},
        "unnamed": {
            "before": {"value": 6.0, "interval": [5.0, 7.0], "n": 36},
            "after": {"value": 2.5, "interval": [2.0, 3.0], "n": 36},
        },
        "drift": {"value": 0.2, "std": 0.1, "n": 25, "interval": [0.16, 0.24]},
        "fid": {"value": 3.0, "n": 25}, "collapsed": {"retained": share, "erased": share},
        "weight_change": {"value": 7.0, "M": 2},
        "attacks": {concept: {"relearning": {"after": 0.75, "n": 4}}} if attacked else {},
        "made_with": {"base": "b", "judge": "j"},
    }  # fmt: skip


def test_the_methods_table_from_a_report(tmp_path, world, emoji):
    for name, one in emoji.reports.items():
        (concept,) = one.concepts
        report = invented_report(concept, emoji.neighbours[concept], one.seed == 0)
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    file = str(tmp_path / "methods.csv")
    jobs.collect_methods(emoji, [str(tmp_path / name) for name in emoji.reports], file)
    frame = read_csv(file)
    assert list(frame.columns) == COLUMNS and set(frame["method"]) == set(METHODS)
    assert {world.kind(concept) for concept in frame["erased"]} == {"style", "object", "person"}
    assert set(frame["base_model"]) == {"b"} and set(frame["judge"]) == {"j"}

    def one(evaluated: str, metric: str) -> pd.Series:
        return row_of(frame, "sdd", "", "church", evaluated, metric)

    assert tuple(one("erased", "ACC")[["value", "n", "base"]]) == (0.25, 4, 1)
    assert tuple(one("retained", "ACC")[["value", "n"]]) == (0.75, 8)
    assert tuple(one("erased", "ACC of the second judge")[["value", "n", "base"]]) == (
        0.125,
        4,
        0.5,
    )
    assert tuple(one("retained", "blank")[["value", "base"]]) == (0.25, 0)
    assert one("erased", "something else")["value"] == 0
    assert one("neighbour", "ACC")["value"] == 0.5 and one("neighbour", "LPIPS")["base"] == 0
    assert tuple(one("", "weight change")[["value", "M"]]) == (7, 2)
    assert tuple(one("retained", "drift")[["value", "low", "high"]]) == (0.2, 0.16, 0.24)
    assert tuple(one("erased", "UA")[["value", "base", "n"]]) == (1, 0, 3)
    unnamed = one("retained", "diversity of unnamed prompts")
    assert tuple(unnamed[["value", "low", "high", "base", "n"]]) == (2.5, 2, 3, 6, 36)
    assert one("erased", "IRA")["n"] == 4 and one("retained", "FID")["value"] == 3
    assert one("retained", "collapsed")["value"] == one("erased", "collapsed")["value"] == 0.5
    attacked = frame[frame["metric"] == "ACC after relearning"]  # of one training seed only
    assert len(attacked) == 3 * len(METHODS) and set(attacked["base"]) == {1}
    jobs.figure_of_methods(OPTIONS, [file], str(tmp_path / "methods.png"))
    assert (tmp_path / "methods.png").stat().st_size > 10_000
