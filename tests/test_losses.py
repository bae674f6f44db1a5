"""Each loss against a value worked out by hand and against a naive restatement; and its gradients."""

import math

import pytest
import torch

from helpers import check, diffusion, losses


def maps(b=2, heads=3, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(b, heads, p, n, generator=generator, dtype=torch.float64) for p in (16, 4)]


def test_resteering_by_hand():
    A = [torch.tensor([[[[3.0]]]]), torch.tensor([[[[4.0]]]])]  # two layers, one head, one pixel, one token
    assert losses.resteering(A).item() == 5.0
    assert losses.resteering(A, variant="fmn").item() == 25.0


def test_distraction_by_hand():
    A = [torch.full((1, 1, 4, 1), 0.25)]
    assert losses.distraction(A).item() == 0.0  # uniform over four pixels: 1 / dim = 0.25
    A = [torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)]
    assert math.isclose(losses.distraction(A).item(), math.sqrt(0.5), rel_tol=1e-6)


def test_random_stimulus_by_hand():
    A = [torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)]
    assert losses.random_stimulus(A, noise=[torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)]).item() == 0.0
    assert losses.random_stimulus(A, noise=[torch.tensor([0.0, 0.0]).view(1, 1, 2, 1)]).item() == 1.0


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
                total += math.sqrt(sum(float(v - w) ** 2 for v, w in zip(values, wanted, strict=True)))
    return total / len(A[0])


def test_against_naive_restatements():
    A, R = maps(), maps(seed=1)
    assert math.isclose(losses.resteering(A).item(), naive_resteering(A, False), rel_tol=1e-9)
    assert math.isclose(losses.resteering(A, variant="fmn").item(), naive_resteering(A, True), rel_tol=1e-9)
    uniform = naive_per_head(A, lambda k, i, h, layer: [1 / layer[i, h].numel()] * layer[i, h].numel())
    assert math.isclose(losses.distraction(A).item(), uniform, rel_tol=1e-9)
    noisy = naive_per_head(A, lambda k, i, h, layer: R[k][i, h].flatten())
    assert math.isclose(losses.random_stimulus(A, noise=R).item(), noisy, rel_tol=1e-9)


def test_code_variants_sum_over_layers():
    A, R = maps(), maps(seed=1)
    assert torch.isclose(losses.distraction(A, variant="code"), sum((x - 1 / x.shape[2]).norm() for x in A))
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


# the exercises of notebooks 03 and 04


def rms(maps):
    squares = torch.stack([A.pow(2).mean((1, 2, 3)) for A in maps])  # (layers, b)
    return squares.mean(0).sqrt().mean()


def entropy(A):
    p = A / A.sum(2, keepdim=True)
    return -torch.xlogy(p, p).sum(2) / math.log(A.shape[2])


def length(maps):
    return torch.cat([A.flatten() for A in maps]).norm()


RIGHT = {
    "resteering": losses.resteering,
    "resteering_gradient": lambda maps: [A / length(maps) for A in maps],
    "balanced": rms,
    "distraction": losses.distraction,
    "fair_lam": lambda maps: sum(A.shape[1] for A in maps) ** -0.5,
    "evenness": entropy,
}
WRONG = {
    "resteering": [
        lambda maps: losses.resteering(maps, variant="fmn"),  # squared
        lambda maps: sum(A.flatten(1).norm(dim=1) for A in maps).mean(),  # a norm for each layer
        length,  # over the batch as well
        rms,  # a mean
        lambda maps: losses.resteering(maps[:1]),  # the first layer only
    ],
    "resteering_gradient": [
        lambda maps: [2 * A for A in maps],  # the squared sum's
        lambda maps: [A / A.norm() for A in maps],  # each layer's own norm
        lambda maps: [A / (2 * length(maps)) for A in maps],  # the root's half kept
        lambda maps: [-A / length(maps) for A in maps],  # the step, not the gradient
    ],
    "balanced": [
        losses.resteering,
        lambda maps: torch.cat([A.flatten(1) for A in maps], 1).pow(2).mean(1).sqrt().mean(),  # by entries
        lambda maps: torch.stack([A.pow(2).mean((1, 2, 3)).sqrt() for A in maps]).mean(),  # root first
        lambda maps: torch.stack([A.pow(2).mean((1, 2, 3)) for A in maps]).mean(),  # no root
    ],
    "distraction": [
        lambda maps: losses.distraction(maps, variant="code"),  # over heads and batch together
        lambda maps: sum((A - 1 / A.shape[2]).flatten(2).norm(dim=2).sum(1) for A in maps).mean(),  # 1 / pixels
        lambda maps: sum(
            (A.flatten(2) - 1 / A[0, 0].numel()).norm(dim=2).mean(1) for A in maps
        ).mean(),  # mean of heads
        lambda maps: sum((A.flatten(2) - 1 / A[0, 0].numel()).pow(2).sum((1, 2)) for A in maps).mean(),  # squared
        losses.resteering,
    ],
    "fair_lam": [
        lambda maps: 1 / sum(A.shape[1] for A in maps),  # lengths added up
        lambda maps: sum(A.shape[1] for A in maps) ** 0.5,  # upside down
        lambda maps: len(maps) ** -0.5,  # layers for heads
        lambda maps: 1.0,
    ],
    "evenness": [
        lambda A: -(A * A.log()).sum(2) / math.log(A.shape[2]),  # not normalised, and NaN at zero
        lambda A: entropy(A) * math.log(A.shape[2]),  # in nats
        lambda A: entropy(A.transpose(2, 3)),  # over the tokens
        lambda A: 1 - entropy(A),
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_checks_accept_the_reference_and_greet_an_untouched_stub(name, capsys):
    getattr(check, name)(RIGHT[name])
    assert capsys.readouterr().out.startswith(f"{name}: right")
    for nothing in (None, ...):
        getattr(check, name)(lambda *_, nothing=nothing: nothing)
        assert "not yet" in capsys.readouterr().out


@pytest.mark.parametrize("name, wrong", [(n, w) for n, answers in WRONG.items() for w in answers])
def test_checks_reject_plausible_wrong_answers(name, wrong):
    with pytest.raises(AssertionError, match=r"\w"):
        getattr(check, name)(wrong)


def test_visual_denoising_against_a_naive_restatement():
    generator = torch.Generator().manual_seed(0)
    x_0_hat, x_0_tilde = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    plain, weighted = 0.0, 0.0
    for i in range(3):
        squares = [
            (float(a) - float(b)) ** 2 for a, b in zip(x_0_hat[i].flatten(), x_0_tilde[i].flatten(), strict=True)
        ]
        plain += sum(squares) / len(squares) / 3
        weighted += float(weights[i]) * sum(squares) / len(squares) / 3
    assert math.isclose(losses.visual_denoising(x_0_hat, x_0_tilde).item(), plain, rel_tol=1e-9)
    assert math.isclose(losses.visual_denoising(x_0_hat, x_0_tilde, weights).item(), weighted, rel_tol=1e-9)


def test_visual_denoising_sends_gradients_through_the_guess_alone():
    x_0_hat, x_0_tilde = torch.randn(2, 2, 4, 3, 3).unbind()
    x_0_hat.requires_grad_(True)
    x_0_tilde.requires_grad_(True)
    losses.visual_denoising(x_0_hat, x_0_tilde).backward()
    assert torch.allclose(x_0_hat.grad, 2 * (x_0_hat - x_0_tilde).detach() / x_0_hat.numel())
    assert x_0_tilde.grad is None


@pytest.mark.parametrize("t", [0, 200, 999])
def test_an_error_of_the_noise_counts_more_the_noisier_the_timestep(t):
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    x_0, noise, error = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    x_t = diffusion.add_noise(x_0, noise, t, alpha_bar)
    loss = losses.visual_denoising(diffusion.predict_x0(x_t, noise + error, t, alpha_bar), x_0)
    blow_up = float((1 - alpha_bar[t]) / alpha_bar[t])
    assert math.isclose(loss.item(), blow_up * error.pow(2).mean().item(), rel_tol=1e-6)
    assert blow_up < 1e-3 if t == 0 else blow_up > 200 if t == 999 else blow_up < 1
