"""Checks of the notebook on baselines: ESD's target, SDD's teacher, and the front of methods."""

import torch

from helpers import diffusion, losses
from helpers.check.common import passed, random_predictions, same_shape, untouched


def erasing_target(mine) -> None:
    """``erasing_target(eps_null, eps_c, eta, newer)``, ESD's target with either release's eta."""
    null, c, _ = random_predictions(3)
    answer = mine(null, c, 1.0, False)
    if untouched(answer, "erasing_target"):
        return
    same_shape(answer, tuple(c.shape), "erasing_target")
    assert torch.allclose(mine(null, c, 0.0, False), null, atol=1e-5), (
        "in the paper's sense eta = 0 gives the unconditional prediction"
    )
    zero, two = torch.zeros(1, 1), torch.full((1, 1), 2.0)
    got = mine(zero, two, 1.5, False).item()
    assert abs(got + 3) < 1e-5, (
        f"with eps_null 0, eps_c 2 and the paper's eta 1.5 you give {got:.3g}: "
        "expected -3, 1.5 times 2 on the other side"
    )
    assert torch.allclose(answer, losses.negated_guidance(null, c), atol=1e-5), (
        "compare with eps_null - (eps_c - eps_null)"
    )
    assert torch.allclose(mine(null, c, 0.0, True), c, atol=1e-5), (
        "the newer release counts from eps_c: its eta = 0 leaves the concept as it is"
    )
    got = mine(zero, two, 2.0, True).item()
    assert abs(got + 2) < 1e-5, (
        f"with eps_null 0, eps_c 2 and the newer eta 2 you give {got:.3g}: expected 2 - 2 * 2 = -2"
    )
    for eta in (1.0, 3.0):
        newer, paper = mine(null, c, eta + 1, True), mine(null, c, eta, False)
        assert torch.allclose(newer, paper, atol=1e-5), (
            f"the newer eta = {eta + 1:g} must be the paper's eta = {eta:g}"
        )
    passed("erasing_target", "The same number means two things: say whose eta it is.")


def negative_prompt_scale(mine) -> None:
    """``negative_prompt_scale(guidance, eta)``: a negative prompt that equals a perfect ESD."""
    answer = mine(5.0, 1.0)
    if untouched(answer, "negative_prompt_scale"):
        return
    null, c, _ = random_predictions(3)
    for g, eta in ((5.0, 0.0), (5.0, 1.0), (3.0, 2.0)):
        scale = float(mine(g, eta))
        student = losses.negated_guidance(null, c, eta)  # what a perfect student predicts
        wanted = diffusion.guide(null, student, g)
        weight = ((wanted - null) / (c - null)).mean().item()  # of the base's own difference
        assert torch.allclose(diffusion.guide(c, null, scale), wanted, atol=1e-3), (
            f"for guidance {g:g} and eta {eta:g} you give {scale:.3g}: the student samples with "
            f"eps_null {weight:+g} times (eps_c - eps_null), and guidance of scale {scale:.3g} "
            f"from eps_c to eps_null with {1 - scale:+.3g} times it"
        )
    passed("negative_prompt_scale", "ESD writes a negative prompt into the weights.")


def matching_ema(mine) -> None:
    """``matching_ema(m, theirs, ours)``, the same memory over another number of steps."""
    answer = mine(0.999, 1500, 80)
    if untouched(answer, "matching_ema"):
        return
    left = 0.999**1500
    got = float(answer) ** 80
    assert abs(float(answer) - 1.0) > 1e-6, "with m = 1 the teacher never changes"
    assert abs(got - left) < 1e-3, (
        f"with your m = {float(answer):.4f}, {got:.3f} of the start is left after 80 steps: "
        f"expected what 0.999 leaves after 1500, {left:.3f}"
    )
    assert abs(float(mine(0.5, 2, 4)) - 0.5**0.5) < 1e-6, (
        "0.5 over 2 steps leaves a quarter: over 4 steps take 0.707"
    )
    assert abs(float(mine(0.9, 30, 30)) - 0.9) < 1e-6, "the same number of steps needs the same m"
    passed("matching_ema", "A teacher's memory lasts some number of steps: fewer steps, smaller m.")


def front(mine) -> None:
    """``front(points)``, the indices of the methods that no other one beats in both respects."""
    points = [(0.9, 0.5), (0.5, 0.9), (0.4, 0.8), (0.9, 0.4), (0.2, 0.95), (0.7, 0.7)]
    answer = mine(list(points))
    if untouched(answer, "front"):
        return

    def indices(points: list[tuple[float, float]]) -> list[int]:
        got = mine(list(points))
        assert isinstance(got, list | tuple | set), (
            f"front returns {type(got).__name__}: expected a list of indices"
        )
        assert all(isinstance(i, int) for i in got), (
            f"front returns {got}: expected indices, counted from 0"
        )
        return sorted(got)

    got = indices(points)
    assert 2 not in got, "(0.4, 0.8) is beaten by (0.5, 0.9), which forgets more and keeps more"
    assert 3 not in got, "(0.9, 0.4) is beaten by (0.9, 0.5): it forgets as much and keeps more"
    assert got == [0, 1, 4, 5], f"of {points} you keep {got}: expected [0, 1, 4, 5]"
    assert indices([(0.5, 0.5), (0.5, 0.5)]) == [0, 1], (
        "two equal points do not beat each other: keep both"
    )
    assert indices([(0.3, 0.3)]) == [0], "a single point is beaten by none"
    passed("front", "Methods on the front trade forgetting for keeping; all others are beaten.")
