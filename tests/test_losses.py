"""Each loss against a value computed by hand and a naive restatement; and its gradients."""

import math

import pytest
import torch
from answers import floors

from helpers import diffusion, losses


def maps(b=2, heads=3, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(b, heads, p, n, generator=generator, dtype=torch.float64) for p in (16, 4)]


def test_resteering_by_hand():
    # two layers, one head, one pixel, one token
    A = [torch.tensor([[[[3.0]]]]), torch.tensor([[[[4.0]]]])]
    assert losses.resteering(A).item() == 5.0
    assert losses.resteering(A, variant="fmn").item() == 25.0


def test_distraction_by_hand():
    A = [torch.full((1, 1, 4, 1), 0.25)]
    assert losses.distraction(A).item() == 0.0  # uniform over four pixels: 1 / dim = 0.25
    A = [torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)]
    assert math.isclose(losses.distraction(A).item(), math.sqrt(0.5), rel_tol=1e-6)


def test_random_stimulus_by_hand():
    A = [torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)]
    none = [torch.zeros(1, 1, 2, 1)]
    assert losses.random_stimulus(A, noise=A).item() == 0.0
    assert losses.random_stimulus(A, noise=none).item() == 1.0


def naive_resteering(A, squared):
    total = 0.0
    for i in range(len(A[0])):
        s = sum(float(v) ** 2 for layer in A for v in layer[i].flatten())
        total += s if squared else math.sqrt(s)
    return total / len(A[0])


def naive_per_head(A, target):
    total = 0.0
    for i in range(len(A[0])):
        for number, layer in enumerate(A):
            for h in range(layer.shape[1]):
                values, wanted = layer[i, h].flatten(), target(number, i, h, layer)
                squares = [float(v - w) ** 2 for v, w in zip(values, wanted, strict=True)]
                total += math.sqrt(sum(squares))
    return total / len(A[0])


def test_against_naive_restatements():
    A, R = maps(), maps(seed=1)
    assert math.isclose(losses.resteering(A).item(), naive_resteering(A, False), rel_tol=1e-9)
    squared = losses.resteering(A, variant="fmn").item()
    assert math.isclose(squared, naive_resteering(A, True), rel_tol=1e-9)
    uniform = naive_per_head(
        A, lambda k, i, h, layer: [1 / layer[i, h].numel()] * layer[i, h].numel()
    )
    assert math.isclose(losses.distraction(A).item(), uniform, rel_tol=1e-9)
    noisy = naive_per_head(A, lambda k, i, h, layer: R[k][i, h].flatten())
    assert math.isclose(losses.random_stimulus(A, noise=R).item(), noisy, rel_tol=1e-9)


def test_code_variants_sum_over_layers():
    A, R = maps(), maps(seed=1)
    theirs = sum((x - 1 / x.shape[2]).norm() for x in A)
    assert torch.isclose(losses.distraction(A, variant="code"), theirs)
    theirs = sum((x - r / x.shape[2]).norm() for x, r in zip(A, R, strict=True))
    assert torch.isclose(losses.random_stimulus(A, variant="code", noise=R), theirs)


@pytest.mark.parametrize("loss", [losses.resteering, losses.distraction, losses.random_stimulus])
def test_gradients_reach_every_layer_and_bad_input_is_refused(loss):
    A = [a.requires_grad_() for a in maps()]
    loss(A).backward()
    assert all(a.grad.abs().min() > 0 for a in A)
    with pytest.raises(ValueError, match="no attention maps"):
        loss([])
    with pytest.raises(ValueError, match="'other'"):
        loss(maps(), variant="other")


def test_resteering_is_finite_at_zero_attention():
    A = [torch.zeros(1, 1, 4, 1, requires_grad=True)]
    losses.resteering(A).backward()
    assert torch.isfinite(A[0].grad).all()


def test_reconstruction():
    assert losses.reconstruction(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0])).item() == 5.0


@pytest.mark.parametrize(("variant", "width"), [("paper", 1.0), ("code", 1 / 256)])
def test_random_stimulus_is_least_at_the_mean_of_the_noise_and_twice_that_at_zero(variant, width):
    torch.manual_seed(0)

    def mean_loss(level: float) -> float:
        A = [torch.full((1, 1, 256, 2), level)]
        return sum(losses.random_stimulus(A, variant=variant).item() for _ in range(100)) / 100

    floor = floors(512, width, 1)["floor"]
    assert mean_loss(width / 2) == pytest.approx(floor, rel=0.01)
    assert mean_loss(0.0) == pytest.approx(2 * floor, rel=0.01)
    assert mean_loss(width / 2) < min(mean_loss(0.4 * width), mean_loss(0.6 * width))


def test_visual_denoising_against_a_naive_restatement():
    generator = torch.Generator().manual_seed(0)
    x_0_hat, x_0_tilde = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    plain, weighted = 0.0, 0.0
    for i in range(3):
        squares = [
            (float(a) - float(b)) ** 2
            for a, b in zip(x_0_hat[i].flatten(), x_0_tilde[i].flatten(), strict=True)
        ]
        plain += sum(squares) / len(squares) / 3
        weighted += float(weights[i]) * sum(squares) / len(squares) / 3
    assert math.isclose(losses.visual_denoising(x_0_hat, x_0_tilde).item(), plain, rel_tol=1e-9)
    ours = losses.visual_denoising(x_0_hat, x_0_tilde, weights).item()
    assert math.isclose(ours, weighted, rel_tol=1e-9)


def test_visual_denoising_sends_gradients_through_the_guess_alone():
    x_0_hat, x_0_tilde = torch.randn(2, 2, 4, 3, 3).unbind()
    x_0_hat.requires_grad_(True)
    x_0_tilde.requires_grad_(True)
    losses.visual_denoising(x_0_hat, x_0_tilde).backward()
    assert torch.allclose(x_0_hat.grad, 2 * (x_0_hat - x_0_tilde).detach() / x_0_hat.numel())
    assert x_0_tilde.grad is None


@pytest.mark.parametrize("t", [0, 200, 999])
def test_an_error_of_the_noise_counts_more_the_noisier_the_timestep(t):
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)
    x_0, noise, error = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    x_t = diffusion.add_noise(x_0, noise, t, alpha_bar)
    loss = losses.visual_denoising(diffusion.predict_x0(x_t, noise + error, t, alpha_bar), x_0)
    blow_up = float((1 - alpha_bar[t]) / alpha_bar[t])
    assert math.isclose(loss.item(), blow_up * error.pow(2).mean().item(), rel_tol=1e-6)
    assert blow_up < 1e-3 if t == 0 else blow_up > 200 if t == 999 else blow_up < 1
