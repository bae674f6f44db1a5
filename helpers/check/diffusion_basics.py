"""Checks of the notebook on diffusion basics: the schedule, guidance, and samplers."""

import torch

from helpers import diffusion
from helpers.check.common import passed, random_predictions, same_shape, untouched


def snr(mine) -> None:
    """``snr(alpha_bar)``, the signal-to-noise ratio of a schedule."""
    answer = mine(torch.tensor([0.5, 0.9, 0.2]))
    if untouched(answer, "snr"):
        return
    same_shape(answer, (3,), "snr")
    assert abs(answer[0].item() - 1) < 1e-5, (
        "at alpha_bar = 0.5 image and noise are equally strong: the ratio is 1"
    )
    assert abs(answer[1].item() - 9) < 1e-4, (
        f"at alpha_bar = 0.9 you give {answer[1].item():.3g}: expected 0.9 / 0.1 = 9, "
        "a ratio of variances, signal on top"
    )
    assert abs(answer[2].item() - 0.25) < 1e-5, "at alpha_bar = 0.2 expected 0.2 / 0.8 = 0.25"
    passed("snr", "Above 1 the image is stronger than the noise, below 1 the noise is.")


def steer_away(mine) -> None:
    """``steer_away(eps_null, eps_c, eps_concept, guidance, strength)``: guidance with two texts.

    It leads towards a prompt and away from a concept.
    """
    null, c, concept = random_predictions(3)
    answer = mine(null, c, concept, 5.0, 2.0)
    if untouched(answer, "steer_away"):
        return
    same_shape(answer, tuple(c.shape), "steer_away")
    plain = diffusion.guide(null, c, 5.0)
    assert torch.allclose(mine(null, c, concept, 5.0, 0.0), plain, atol=1e-5), (
        "with strength 0 it must be plain guidance"
    )
    one = torch.ones(1, 1)
    assert torch.allclose(mine(one, one, one, 5.0, 2.0), one), (
        "when the three predictions agree, the result must be that prediction: "
        "there is no direction to steer in"
    )
    got = mine(0 * one, 2 * one, 3 * one, 5.0, 2.0).item()
    assert abs(got - 4) < 1e-5, (
        f"with eps_null 0, eps_c 2 and eps_concept 3 you give {got:.3g}: expected 4, "
        "five times 2 towards the prompt and two times 3 away from the concept"
    )
    assert torch.allclose(mine(null, c, c, 5.0, 5.0), null, atol=1e-5), (
        "towards and away from the same text, equally strongly, must cancel: only eps_null is left"
    )
    passed("steer_away", "Towards the prompt and away from the concept, both from eps_null.")


def eta_step(mine) -> None:
    """``eta_step(x_t, eps, alpha_bar_t, alpha_bar_prev, eta, noise)``, from DDIM to DDPM."""
    x, eps, z = random_predictions(3)
    now, prev = 0.3, 0.6
    answer = mine(x, eps, now, prev, 0.0, z)
    if untouched(answer, "eta_step"):
        return
    same_shape(answer, tuple(x.shape), "eta_step")
    assert torch.allclose(answer, diffusion.ddim_step(x, eps, now, prev), atol=1e-5), (
        "at eta = 0 no noise is added, and the step must equal ddim_step"
    )
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    full, half = (mine(zero, zero, now, prev, eta, one).item() for eta in (1.0, 0.5))
    assert abs(full**2 - 0.4 / 0.7 * 0.5) < 1e-4, (
        f"with x_t = eps = 0 only sigma z is left, and you give sigma^2 = {full**2:.3g}: "
        "from 0.3 to 0.6 at eta = 1 expected (0.4 / 0.7) (1 - 0.3 / 0.6) = 0.286"
    )
    assert abs(half - full / 2) < 1e-5, (
        "sigma is proportional to eta, so sigma^2 is proportional to eta^2"
    )
    ddpm = diffusion.ddpm_step(x, eps, now, prev, z)
    assert torch.allclose(mine(x, eps, now, prev, 1.0, z), ddpm, atol=1e-5), (
        "at eta = 1 it must equal ddpm_step: take the variance of z off the variance of eps"
    )
    passed("eta_step", "One dial: DDIM at 0, DDPM at 1.")


def reverse_drift(mine) -> None:
    """``reverse_drift(x, score, beta)``, the drift of the reverse SDE, of time running forwards."""
    x, beta = torch.tensor([-2.0, 0.0, 1.0]), 0.4
    answer = mine(x.clone(), -x, beta)
    if untouched(answer, "reverse_drift"):
        return
    same_shape(answer, (3,), "reverse_drift")
    # N(0, 1) has the score -x and stays as it is in both directions, so the drift is +x beta/2
    assert torch.allclose(answer, beta * x / 2, atol=1e-6), (
        f"for a standard Gaussian, whose score is -x, you give {answer.tolist()} at "
        f"{x.tolist()}: expected {(beta * x / 2).tolist()}. Noising leaves N(0, 1) as it is, and "
        "so must the way back. Does the score stand with its beta? Which sign has x?"
    )
    flat = mine(x.clone(), torch.zeros(3), beta)
    assert torch.allclose(flat, -beta * x / 2, atol=1e-6), (
        "where the score is zero the drift is the forward one, -x beta/2"
    )
    passed("reverse_drift", "Eq. 2 as printed has the other sign of x, and no beta at the score.")
