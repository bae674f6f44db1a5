"""Each loss against a value worked out by hand and against a naive restatement; and its gradients."""

import math

import pytest
import torch

from helpers import losses


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
