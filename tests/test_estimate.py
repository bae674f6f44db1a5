"""What the papers' setting would cost: the counting, on trainings whose passes are known."""

import pytest

from helpers.methods import METHODS
from workflow import estimate
from workflow.plan import Plan, Run


def test_passes_of_one_step():
    """G-CiRs asks the frozen and the edited network for concept and null.

    That is two rows without a gradient and two with one, for each concept and image.
    """
    world = estimate.small_world()
    options = '{"batch_size": 1, "images": 1000, "tau": [0.0]}'
    one = Run("gcirs", ("Van Gogh",), options, 0)
    assert estimate.passes_a_step(world, one) == 2 + 3 * 2
    options = '{"batch_size": 3, "images": 1000, "tau": [0.0, 0.0]}'
    two = Run("gcirs", ("Van Gogh", "Picasso"), options, 0)
    assert estimate.passes_a_step(world, two) == 2 * 3 * (2 + 3 * 2)


def test_operations_are_stable_diffusion_s():
    found = estimate.operations()
    # 0.4e12 multiply-adds at 512 pixels, as others count too
    assert found["unet"] == pytest.approx(0.80e12, rel=0.01)
    assert found["decoder"] > found["unet"]


def test_the_lines_of_the_estimate(monkeypatch):
    """Every table, what they share counted once, a total; hours are operations over the rate."""
    monkeypatch.setattr(estimate, "passes_a_step", lambda world, run: 8.0)
    monkeypatch.setattr(estimate, "small_world", lambda: None)
    monkeypatch.setattr(estimate, "operations", lambda: {"unet": 1e12, "decoder": 2e12})
    lines, plan = {line["what"]: line for line in estimate.estimate()}, Plan("paper")
    assert [*lines][: len(plan.rows)] == list(plan.rows) and [*lines][-1] == "all"
    assert lines["methods"]["trainings"] == len(plan.reports) == 2 * len(METHODS)
    base = lines["the base's pictures"]
    guided = (2 * plan.options["evaluation"]["steps"] * 1e12 + 2e12) / estimate.RATE / 3600
    assert base["pictures"] == 250 * len(plan.base_counts()) and base["trainings"] == 0
    assert base["hours"] == base["drawing_hours"] == pytest.approx(base["pictures"] * guided)
    rest = [line for what, line in lines.items() if what not in (*plan.rows, "all")]
    for column in ("trainings", "pictures", "hours"):
        assert lines["all"][column] == pytest.approx(sum(line[column] for line in rest))
