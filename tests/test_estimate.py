"""What the papers' setting would cost: the counting, on one training whose passes are known."""

import estimate
import plan
import pytest


def test_passes_of_one_step():
    """G-CiRs asks the frozen and the edited network for concept and null: 2 rows without a gradient, 2 with one."""
    world = estimate.small_world()
    run = plan.Run("gcirs", ("Van Gogh",), '{"batch_size": 1, "images": 1000, "tau": [0.0]}', 0)
    assert estimate.passes_a_step(world, run) == 2 + 3 * 2
    run = plan.Run("gcirs", ("Van Gogh", "Picasso"), '{"batch_size": 3, "images": 1000, "tau": [0.0, 0.0]}', 0)
    assert estimate.passes_a_step(world, run) == 2 * 3 * (2 + 3 * 2)


def test_operations_are_stable_diffusion_s():
    found = estimate.operations()
    assert found["unet"] == pytest.approx(0.80e12, rel=0.01)  # 0.4e12 multiply-adds at 512 pixels, as others count too
    assert found["decoder"] > found["unet"]
