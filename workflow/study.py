"""What the studies share: results as files that may be made one by one, by several processes."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from helpers.tables import COLUMNS, RESULTS, Row, write_csv
from helpers.worlds import World, load_world
from workflow.plan import options_of_scale


def options_of(method: str) -> dict:
    """The options that the tables give to a method, its threshold the method's own."""
    given = dict(options_of_scale("emoji")["defaults"].get(method, {}))
    given.pop("tau", None)
    return given


def part_of(work: list) -> list:
    """The share of the work that the command line gives to this process: all, or ``--part 0/2``."""
    if "--part" not in sys.argv:
        return work
    first, of = sys.argv[sys.argv.index("--part") + 1].split("/")
    return work[int(first) :: int(of)]


def run(
    build: Path,
    collect: Callable[[], Iterable[Row]],
    work: Callable[[World], list[tuple]],
    make: Callable,
) -> None:
    """Make this process's part of the work, or with ``--collect`` the table RESULTS/BUILD.csv."""
    torch.set_num_threads(1)
    build.mkdir(parents=True, exist_ok=True)
    if "--collect" in sys.argv:
        rows = list(collect())
        if not rows:
            sys.exit(f"{build} holds no whole result: run without --collect first")
        write_csv(RESULTS / f"{build.name}.csv", rows, COLUMNS)
        return
    world = load_world("emoji", dtype=torch.float32)
    for one in part_of(work(world)):
        make(world, *one)
