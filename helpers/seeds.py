"""Every seed of the kit by what it is for: named ranges that never meet, and one generator a step.

An image that trains a method, its attacker or the judge must never be one that a metric is
computed on. So each purpose draws its seeds from a range of its own (``RANGES``).
"""

import torch

RANGES = {  # purpose -> (first seed, one past the last)
    "evaluation": (0, 400_000),  # reports, tables, notebooks: anything that is measured
    "retain": (400_000, 500_000),  # images of the concepts that training must keep
    "training": (
        500_000,
        900_000,
    ),  # the first thousand images of each run; training seeds 0 to 399
    "attack": (900_000, 1_000_000),  # the first thousand images of an attacker; seeds 0 to 99
    "judge": (1_000_000, 2_000_000),  # images that a judge is trained on
    "training beyond": (10_000_000, 500_000_000),  # what exceeds a thousand, a million a run
    "attack beyond": (500_000_000, 600_000_000),
}
BLOCK, BEYOND = 1000, 1_000_000  # seeds of one run in the two ranges of its purpose
STRIDE = 1_000_003  # a prime: between the generators of two training seeds


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one training step: a resumed run draws what the whole run would have drawn.

    Its seed is  seed * 1 000 003 + step.
    """
    return torch.Generator().manual_seed(seed * STRIDE + step)


def run_seeds(purpose: str, seed: int, n: int) -> list[int]:
    """The n image seeds of one run for ``purpose`` "training" or "attack": no two runs share one.

    The first thousand lie in the purpose's range, the rest in its range "beyond". ValueError for a
    run that has no place there.
    """
    first, end = RANGES[purpose]
    far = RANGES[f"{purpose} beyond"][0]
    runs = (end - first) // BLOCK
    if not 0 <= seed < runs or not 0 <= n <= BLOCK + BEYOND:
        raise ValueError(
            f"seed {seed} and {n} images for {purpose}: want a seed from 0 to {runs - 1} "
            f"and at most {BLOCK + BEYOND} images"
        )
    near = [first + BLOCK * seed + i for i in range(min(n, BLOCK))]
    return near + [far + BEYOND * seed + i for i in range(n - len(near))]


def training_seeds(seed: int, n: int) -> list[int]:
    """The seeds of the n training images of a run: see ``run_seeds``."""
    return run_seeds("training", seed, n)


def attack_seeds(seed: int, n: int) -> list[int]:
    """The seeds of the n images that an attacker trains on: none that a method trained on."""
    return run_seeds("attack", seed, n)


def retain_seeds(n: int) -> list[int]:
    """The seeds of the n retain images, the same for every run: they are drawn once and kept."""
    first, end = RANGES["retain"]
    if n > end - first:
        raise ValueError(f"{n} retain images: there are seeds for {end - first}")
    return [first + i for i in range(n)]


def judge_seeds(n: int) -> list[int]:
    """The seeds of the n images that a judge is trained on."""
    first, end = RANGES["judge"]
    if n > end - first:
        raise ValueError(f"{n} images for the judge: there are seeds for {end - first}")
    return [first + i for i in range(n)]
