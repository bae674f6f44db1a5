"""Every metric by hand, against a library, and on bad input."""

import pytest
import torch
from scipy.stats import binomtest

from helpers import load_world, metrics, renders


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def test_accuracy_counts_the_judge_s_verdicts(world):
    images = torch.cat(
        [renders.references("Twemoji", "church", 3, vary=0.3), renders.references("Twemoji", "dog", 1, vary=0.3)]
    )
    assert metrics.accuracy(world, images, "church") == 0.75
    assert metrics.accuracy(world, images, "Twemoji") == 1.0


@pytest.mark.parametrize(("k", "n"), [(5, 10), (0, 50), (50, 50), (1, 250)])
def test_interval_equals_scipy(k, n):
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert metrics.interval(k / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_interval_by_hand():
    assert metrics.interval(0.5, 10) == pytest.approx((0.237, 0.763), abs=5e-4)


def test_clip_score_prefers_the_right_caption(world):
    things, styles = ["church", "dog", "banana"], ["Twemoji", "OpenMoji", "Fluent"]
    images = torch.cat([renders.references(s, o, 1) for s, o in zip(styles, things, strict=True)])
    right = metrics.clip_score(
        world, images, [f"a {o} in the style of {s}" for s, o in zip(styles, things, strict=True)]
    )
    wrong = metrics.clip_score(
        world, images, [f"a {o} in the style of {s}" for s, o in zip(styles, things[1:] + things[:1], strict=True)]
    )
    assert right.shape == (3,) and (right > wrong + 0.1).all() and right.abs().max() <= 1


def test_bad_input(world):
    one = torch.zeros(1, 3, world.image_size, world.image_size)
    with pytest.raises(ValueError, match="at least one picture"):
        metrics.accuracy(world, one[:0], "church")
    with pytest.raises(ValueError, match="zebra"):
        metrics.accuracy(world, one, "zebra")
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        metrics.clip_score(world, one, ["a", "b"])
    with pytest.raises(ValueError, match="share 2"):
        metrics.interval(2.0, 10)
