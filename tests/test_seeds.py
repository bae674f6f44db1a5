"""Seeds: no image that trains anything is one that a metric is computed on."""

import itertools

import pytest
import torch

from helpers import seeds
from helpers.seeds import (
    RANGES,
    STRIDE,
    attack_seeds,
    judge_seeds,
    retain_seeds,
    step_generator,
    training_seeds,
)


def test_ranges_never_meet():
    for (name, (first, end)), (other, (begin, stop)) in itertools.combinations(RANGES.items(), 2):
        assert end <= begin or stop <= first, f"{name} meets {other}"
    assert all(first < end for first, end in RANGES.values())
    assert max(end for _, end in RANGES.values()) < 2**31  # fits wherever a seed is kept


def inside(found, *purposes):
    """Whether all seeds lie in the ranges of these purposes."""
    return all(any(a <= s < b for a, b in (RANGES[p] for p in purposes)) for s in found)


@pytest.mark.parametrize("seed", range(21))
def test_the_first_thousand_are_what_they_were(seed):
    """Cached images and the papers' tables were made with these."""
    assert training_seeds(seed, 1000) == [500_000 + 1000 * seed + i for i in range(1000)]
    assert attack_seeds(seed, 1000) == [900_000 + 1000 * seed + i for i in range(1000)]
    assert training_seeds(seed, 3) == training_seeds(seed, 3000)[:3]


def test_purposes_that_are_the_same_for_every_run():
    assert retain_seeds(3) == [400_000, 400_001, 400_002]
    assert judge_seeds(3) == [1_000_000, 1_000_001, 1_000_002]


@pytest.mark.parametrize(("runs", "n"), [(3, 3000), (21, 1000), (21, 10_000)])
def test_training_seeds_of_two_runs_never_meet(runs, n):
    """At paper scale too: three concepts of a thousand images each."""
    found = [s for seed in range(runs) for s in training_seeds(seed, n)]
    assert len(set(found)) == runs * n
    assert inside(found, "training", "training beyond")


@pytest.mark.parametrize("n", [1000, 3000, 10_000])
def test_what_trains_meets_neither_attack_nor_retain_nor_judge_nor_evaluation(n):
    training = {s for seed in range(21) for s in training_seeds(seed, n)}
    attack = {s for seed in range(21) for s in attack_seeds(seed, n)}
    assert len(attack) == 21 * n and inside(attack, "attack", "attack beyond")
    others = (attack, set(retain_seeds(n)), set(judge_seeds(n)), set(range(*RANGES["evaluation"])))
    for a, b in itertools.combinations((training, *others), 2):
        assert not a & b


def test_the_last_run_still_fits():
    first, end = RANGES["training"]
    last = (end - first) // seeds.BLOCK - 1
    most = seeds.BLOCK + seeds.BEYOND
    assert inside([training_seeds(last, most)[i] for i in (0, 999)], "training")
    assert inside([training_seeds(last, most)[i] for i in (1000, -1)], "training beyond")
    assert inside([attack_seeds(99, most)[i] for i in (1000, -1)], "attack beyond")


@pytest.mark.parametrize(
    ("draw", "arguments", "said"),
    [
        (training_seeds, (-1, 5), "seed is -1: give a whole number, 0 to"),
        (training_seeds, (10_400, 5), "seed 10400 .*training: give a seed from 0 to 10399"),
        (training_seeds, (0, 1_001_001), "1001001 images.*at most 1001000"),
        (training_seeds, (0, -1), "n is -1: give a whole number, 0 or more"),
        (attack_seeds, (100, 5), "seed 100 .*attack: give a seed from 0 to 99"),
        (retain_seeds, (100_001,), "100001 retain images: there are seeds for 100000"),
        (judge_seeds, (1_000_001,), "1000001 images for the judge"),
    ],
)
def test_runs_that_have_no_place(draw, arguments, said):
    with pytest.raises(ValueError, match=said):
        draw(*arguments)


def test_none_are_none():
    assert training_seeds(0, 0) == attack_seeds(0, 0) == retain_seeds(0) == judge_seeds(0) == []


def test_one_generator_a_step():
    """The stream of a step is its own: a resumed run draws what the whole run would have drawn."""
    ours, theirs = step_generator(2, 7), torch.Generator().manual_seed(2 * STRIDE + 7)
    assert torch.equal(torch.randn(4, generator=ours), torch.randn(4, generator=theirs))
    first = {step_generator(s, i).initial_seed() for s in range(20) for i in range(1000)}
    assert len(first) == 20_000
