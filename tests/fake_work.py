"""The jobs of the tables without their work: each writes what it was asked for, and logs it.

The standard library alone, so that a worker starts at once.
"""

import json
import runpy
import time
from pathlib import Path

FILES = Path(__file__).resolve().parents[1] / "helpers" / "files.py"
complete = runpy.run_path(str(FILES))["complete"]  # without ``helpers``, which imports torch
LOG = Path("done.log")


def _finish(path: str, content, *, folder: bool = False) -> None:
    time.sleep(0.05)
    with complete(path) as temporary:
        if folder:
            temporary.mkdir()
        (temporary / "report.json" if folder else temporary).write_text(json.dumps(content))
    with open(LOG, "a") as file:
        file.write(f"{path}\n")


def claim(options, path):
    Path(path).write_text(json.dumps(options["sampling"]))


def sample_base(options, prompt, seeds, path):
    _finish(path, [prompt, seeds])


def sample_judge_images(options, style, path):
    _finish(path, style)


def train_judge(options, files, path):
    _finish(path, files)


def sample_training_images(options, concepts, count, seed, path):
    _finish(path, [concepts, count, seed])


def train(options, method, concepts, settings, seed, folder, names):
    _finish(folder, [method, concepts, settings, seed], folder=True)


def measure(options, files, counts, base, path):
    parts = [json.loads((Path(file).parent / "report.json").read_text()) for file in files]
    before = {concept: json.loads(Path(file).read_text()) for concept, file in base.items()}
    _finish(path, [parts, counts, before])


def evaluate_edit(options, file, attack, folder):
    _finish(folder, [file, attack], folder=True)


def collect(plan, table, files, path):
    _finish(path, [json.loads(Path(file).read_text()) for file in files])


def collect_methods(plan, folders, path):
    _finish(path, sorted(plan.reports))


def collect_costs(files, path):
    _finish(path, {kind: len(some) for kind, some in files.items()})


def publish(files, options, path):
    _finish(path, [options["results"], files])


def figure_of_tables(options, files, path):
    _finish(path, [Path(file).read_text() for file in files])


figure_of_methods = figure_of_tables
