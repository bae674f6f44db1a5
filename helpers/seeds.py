"""Every seed of the kit by what it is for: named ranges that never meet, and one generator a step.

An image that trains a method, its attacker or the judge must never be one that a metric is
computed on. So each purpose draws its seeds from a range of its own (``RANGES``).
"""

from collections.abc import Iterable

import torch

from helpers.identity import value_digest
from helpers.options import Seed, Whole, typed

RANGES = {  # purpose -> (first seed, one past the last)
    "evaluation": (0, 400_000),  # notebooks, tables, and reports of the seeds 0 to 39
    "retain": (400_000, 500_000),  # images of the concepts that training must keep
    "training": (
        500_000,
        900_000,
    ),  # the first thousand images of each run; training seeds 0 to 399
    "attack": (900_000, 1_000_000),  # the first thousand images of an attacker; seeds 0 to 99
    "judge": (1_000_000, 2_000_000),  # images that a judge is trained on
    "training beyond": (10_000_000, 500_000_000),  # what exceeds a thousand, a million a run
    "attack beyond": (500_000_000, 600_000_000),
    "evaluation far": (600_000_000, 1_000_000_000),  # reports of the seeds from 40 on
    "training far": (1_000_000_000, 2_000_000_000),  # training seeds from 400 on
}
BLOCK, BEYOND = 1000, 1_000_000  # seeds of one run in the two ranges of its purpose
FAR = 100_000  # seeds of one run in the range "training far"
REPORT = 10_000  # seeds of one report
STRIDE = 1_000_003  # a prime: between the generators of two training seeds
BITS = 2**32  # torch's generator on a CPU reads no more of a seed: 2^32 would be the same as 0


def folded(seed: int) -> int:
    """A seed as the generator can tell it from others: itself below 2^32, else a digest of it.

    Digests lie in 2^31 ... 2^32 - 1, where no range of ``RANGES`` is. Two seeds fall together once
    in two thousand million times.
    """
    if 0 <= seed < BITS:
        return seed
    return BITS // 2 + int(value_digest(seed), 16) % (BITS // 2)


def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU; seeds beyond 32 bits are told apart too (``folded``)."""
    return torch.Generator().manual_seed(folded(seed))


@typed
def step_generator(seed: Seed, step: Whole) -> torch.Generator:
    """The generator of one training step: a resumed run draws what the whole run would have drawn.

    Its seed is  seed * 1 000 003 + step.
    """
    return generator_of(seed * STRIDE + step)


def run_seeds(purpose: str, seed: int, n: int) -> list[int]:
    """The n image seeds of one run for ``purpose`` "training" or "attack": no two runs share one.

    The first thousand lie in the purpose's range, the rest in its range "beyond"; those of a later
    training run all in "training far". ValueError for a run that has no place there.
    """
    first, end = RANGES[purpose]
    runs, most = (end - first) // BLOCK, BLOCK + BEYOND
    begin, stop = RANGES.get(f"{purpose} far", (0, 0))
    last = runs + (stop - begin) // FAR - 1
    if seed >= runs:
        most = FAR
    if seed > last or n > most:
        raise ValueError(
            f"seed {seed} and {n} images for {purpose}: give a seed from 0 to {last} "
            f"and at most {most} images"
        )
    if seed >= runs:
        return [begin + FAR * (seed - runs) + i for i in range(n)]
    far = RANGES[f"{purpose} beyond"][0]
    near = [first + BLOCK * seed + i for i in range(min(n, BLOCK))]
    return near + [far + BEYOND * seed + i for i in range(n - len(near))]


@typed
def training_seeds(seed: Seed, n: Whole) -> list[int]:
    """The seeds of the n training images of a run: see ``run_seeds``."""
    return run_seeds("training", seed, n)


@typed
def attack_seeds(seed: Seed, n: Whole) -> list[int]:
    """The seeds of the n images that an attacker trains on: none that a method trained on."""
    return run_seeds("attack", seed, n)


@typed
def report_seeds(seed: Seed, n: Whole) -> list[int]:
    """The seeds of the n images of one report: 10 000 * seed + i, and from seed 40 on elsewhere.

    No two reports share one, and none is a seed that anything is trained on. ValueError for a
    report that has no place.
    """
    first, end = RANGES["evaluation"]
    begin, stop = RANGES["evaluation far"]
    runs = (end - first) // REPORT
    last = runs + (stop - begin) // REPORT - 1
    if seed > last or n > REPORT:
        raise ValueError(
            f"seed {seed} and {n} images for a report: give a seed from 0 to {last} "
            f"and at most {REPORT} images"
        )
    start = first + REPORT * seed if seed < runs else begin + REPORT * (seed - runs)
    return [start + i for i in range(n)]


@typed
def retain_seeds(n: Whole) -> list[int]:
    """The seeds of the n retain images, the same for every run: they are drawn once and kept."""
    return fixed_seeds("retain", n, "retain images")


@typed
def judge_seeds(n: Whole) -> list[int]:
    """The seeds of the n images that a judge is trained on."""
    return fixed_seeds("judge", n, "images for the judge")


def fixed_seeds(purpose: str, n: int, what: str) -> list[int]:
    """The first n seeds of a range. ValueError for more than it has."""
    first, end = RANGES[purpose]
    if n > end - first:
        raise ValueError(f"{n} {what}: there are seeds for {end - first}, give no more")
    return [first + i for i in range(n)]


@typed
def measured_seeds(seeds: Iterable[Seed], what: str = "seeds") -> list[int]:
    """Seeds to measure on, as a list. ValueError for none, or for one that something trains on."""
    if not seeds:
        raise ValueError(f"{what} is empty: give at least one seed")
    for purpose, (first, end) in RANGES.items():
        taken = [] if purpose.startswith("evaluation") else [s for s in seeds if first <= s < end]
        if taken:
            raise ValueError(
                f"{what} holds {taken[0]}, a seed of {purpose} images: "
                f"give seeds below {RANGES['evaluation'][1]}, which nothing is trained on"
            )
    return seeds
