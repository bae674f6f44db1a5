"""The jobs of the tables without their work: each writes what it was asked for, and a line to a log when it is done."""

import json
import os
import time
from pathlib import Path

LOG = Path("done.log")


def _finish(path: str, content, *, folder: bool = False) -> None:
    time.sleep(0.05)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        temporary.mkdir()
        (temporary / "report.json").write_text(json.dumps(content))
    else:
        temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
    with open(LOG, "a") as file:
        file.write(f"{path}\n")


def draw(options, prompt, seeds, path):
    _finish(path, [prompt, seeds])


def prepare(options, concepts, images, seed, path):
    _finish(path, [concepts, images, seed])


def train(options, method, concepts, settings, seed, folder, names):
    _finish(folder, [method, concepts, settings, seed], folder=True)


def measure(options, files, counts, base, path):
    parts = [json.loads((Path(file).parent / "report.json").read_text()) for file in files]
    _finish(path, [parts, counts, {c: json.loads(Path(file).read_text()) for c, file in base.items()}])


def describe(options, file, attack, folder):
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
