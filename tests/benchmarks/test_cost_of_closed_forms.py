"""A closed form at Stable Diffusion 1.4's shapes, random states: one map for all layers, or each.

Plain: the equation as printed, solved for every one of the 32 key and value matrices. Ours: one map
of text space, then a product for each matrix. Peak memory is taken beside it, in another process
(``-s`` and ``--benchmark-json`` show it).
"""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from helpers.closedform import text_map

SHAPES = [(320, 768)] * 10 + [(640, 768)] * 10 + [(1280, 768)] * 12  # out and in of to_k and to_v
CONCEPTS = (1, 100)
ROWS, KEPT = 70, 1000  # rows of a concept's prompt from its name on; rows to hold


def states(concepts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [(concepts * ROWS, 768)] * 2 + [(KEPT, 768)]
    return tuple(torch.randn(shape, generator=draw) for shape in made)


def matrices() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw) / 28 for shape in SHAPES]


def ours(old, new, kept, weights) -> list[torch.Tensor]:
    T = text_map(old, new, kept)
    return [(W.double() @ T).float() for W in weights]


def plain(old, new, kept, weights) -> list[torch.Tensor]:
    found, old, new, kept = [], old.double(), new.double(), kept.double()
    for W in (W.double() for W in weights):
        shared = 0.5 * torch.eye(768, dtype=torch.float64) + kept.T @ kept
        left = 0.5 * W + (W @ new.T) @ old + (W @ kept.T) @ kept
        found.append(torch.linalg.solve(shared + old.T @ old, left, left=False).float())
    return found


def megabytes() -> float:
    """The most that this process has held so far; ``ru_maxrss`` would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def peak(way, concepts: int) -> tuple[float, float]:
    """Megabytes that states and matrices take, and what the solve needs beyond them."""
    torch.set_num_threads(1)
    torch.linalg.solve(torch.eye(2), torch.eye(2))  # the library itself is loaded before
    empty = megabytes()
    given = (*states(concepts), matrices())
    before = megabytes()
    way(*given)
    return before - empty, megabytes() - before


@pytest.mark.parametrize("concepts", CONCEPTS)
@pytest.mark.parametrize("way", [ours, plain], ids=["ours", "plain"])
def test_cost(benchmark, way, concepts):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        held, more = pool.submit(peak, way, concepts).result()
    benchmark.extra_info |= {"MB given": round(held), "MB more": round(more)}
    print(f"{way.__name__}, {concepts}: {held:.0f} MB given, {more:.0f} MB more")
    given = (*states(concepts), matrices())
    benchmark.pedantic(way, given, rounds=1)


def test_the_same_numbers():
    given = (*states(1), matrices()[:2])
    for a, b in zip(ours(*given), plain(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
