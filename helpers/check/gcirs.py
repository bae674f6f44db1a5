"""Checks of the notebook on G-CiRs: the slope of its loss, its stop, and the factor eta."""

import torch

from helpers import losses
from helpers.check.common import passed, random_predictions, same_shape, untouched


def correlation_slope(mine) -> None:
    """``correlation_slope(base, edited)``, the derivative of L_cor (Eq. 2) by ``edited``."""
    base, edited, other = random_predictions(3)
    answer = mine(base.clone(), edited.clone())
    if untouched(answer, "correlation_slope"):
        return
    same_shape(answer, tuple(base.shape), "correlation_slope")
    assert not torch.allclose(answer, base), (
        "you give the derivative of the sum: Eq. 2 takes the mean"
    )
    assert torch.allclose(mine(base.clone(), other), answer, atol=1e-7), (
        "your slope changes with the edited model: the loss is linear in it, so its slope cannot"
    )
    leaf = edited.clone().requires_grad_()
    (expected,) = torch.autograd.grad(losses.correlation(base, leaf), leaf)
    assert torch.allclose(answer, expected, atol=1e-7), (
        f"autograd finds {expected.flatten()[0].item():.4f} for the first entry, "
        f"you give {answer.flatten()[0].item():.4f}"
    )
    passed(
        "correlation_slope",
        "It does not depend on the edited model: the slope is as steep at zero as at the start.",
    )


def stop_step(mine) -> None:
    """``stop_step(values, tau, momentum, min_steps)``: after how many updates Eq. 4 stops."""
    falling = [1.0, -2.0, -2.0, -2.0, -2.0]  # statistic at momentum 0.8: 1, 0.4, -0.08, ...
    answer = mine(list(falling), 0.0, 0.8, 1)
    if untouched(answer, "stop_step"):
        return
    assert isinstance(answer, int), (
        f"stop_step returns {type(answer).__name__}: expected a whole number"
    )
    assert answer == 3, (
        f"for the values {falling} and momentum 0.8 you stop after {answer} updates: expected 3. "
        "The statistic is 1, 0.4, -0.08: it starts at the first value, keeps 0.8 of itself "
        "at each update, and updates count from 1"
    )
    got = mine(list(falling), 0.5, 0.8, 1)
    assert got == 2, (
        f"with tau 0.5 you stop after {got} updates: expected 2, where the statistic is 0.4"
    )
    got = mine(list(falling), 0.0, 0.8, 5)
    assert got == 5, f"with min_steps 5 you stop after {got} updates: expected 5, no stop before"
    back = [1.0, -2.0, -2.0, 9.0, 1.0, 1.0]
    got = mine(list(back), 0.0, 0.8, 4)
    assert got == len(back), (
        "the statistic falls below tau before min_steps and is above it again by then, "
        f"and you stop after {got} updates: expected all {len(back)}, "
        "since only the present statistic counts"
    )
    got = mine([1.0] * 7, 0.0, 0.9, 1)
    assert got == 7, (
        f"a statistic that never falls below tau stops after {got} updates: expected all 7"
    )
    passed("stop_step", "A smoothed value, tested after each update.")


def eta_gradients(mine) -> None:
    """``eta_gradients(first, second, detach)``, the gradients that Eq. 3's sum gives two losses."""
    answer = mine(3.0, 2.0, True)
    if untouched(answer, "eta_gradients"):
        return
    number = "eta is the number 3 / 2, and multiplies the second gradient only"
    absolute = "eta is a ratio of absolute values: it does not reverse the second loss"
    cancels = "eta L_2 is |L_1|, so L_1 counts twice and L_2 cancels"
    both = "eta L_2 is -|L_1|, which cancels L_1 as well"
    cases = [
        (3.0, 2.0, True, (1.0, 1.5), number),
        (3.0, -2.0, True, (1.0, 1.5), absolute),
        (3.0, 2.0, False, (2.0, 0.0), cancels),
        (3.0, -2.0, False, (0.0, 0.0), both),
    ]
    for first, second, detach, expected, why in cases:
        got = mine(first, second, detach)
        assert isinstance(got, tuple | list) and len(got) == 2, (
            "give the two gradients: (of first, of second)"
        )
        one, two = (float(value) for value in got)
        assert abs(one - expected[0]) < 1e-4 and abs(two - expected[1]) < 1e-4, (
            f"for L_1 = {first:g}, L_2 = {second:g} and detach={detach} you give "
            f"({one:.3g}, {two:.3g}): expected ({expected[0]:g}, {expected[1]:g}); {why}"
        )
    passed(
        "eta_gradients",
        "As printed, only the first concept is trained; detached, all of them are.",
    )
