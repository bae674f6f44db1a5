"""Checks of the notebook on distraction: the loss, its weight, and how even a map is."""

import torch

from helpers import losses
from helpers.check.common import concept_columns, passed, same_shape, untouched


def distraction(mine) -> None:
    """``my_distraction(maps)``, each head's distance from an even map (Eq. 5)."""
    answer = mine(concept_columns())
    if untouched(answer, "distraction"):
        return
    same_shape(answer, (), "distraction")
    even, none = torch.full((1, 1, 4, 1), 0.25), torch.zeros(1, 1, 4, 1)
    assert abs(mine([even]).item()) < 1e-5, (
        "0.25 at each of 4 pixels is what Eq. 5 asks for: expected 0"
    )
    got = mine([none]).item()
    assert abs(got - 0.5) < 1e-5, (
        f"no attention at 4 pixels gives {got:.3g}: expected the norm of four 0.25s, 0.5"
    )
    assert abs(mine([torch.full((1, 1, 2, 2), 0.25)]).item()) < 1e-5, (
        "2 pixels and 2 tokens make 4 entries of the flattened A_i: "
        "dim(A_i) counts all four, so 0.25 is even"
    )
    heads = mine([none.expand(1, 4, 4, 1)]).item()
    assert abs(heads - 2) < 1e-5, (
        f"4 heads at distance 0.5 give {heads:.3g}: expected 2, the sum of their norms"
    )
    layers = mine([none, none]).item()
    assert abs(layers - 1) < 1e-5, (
        f"2 layers of one head at distance 0.5 give {layers:.3g}: expected 1, their sum"
    )
    pair = mine([torch.cat([even, none])]).item()
    assert abs(pair - 0.25) < 1e-5, (
        f"two images, one even and one without attention, give {pair:.3g}: "
        "expected the mean of 0 and 0.5"
    )
    passed("distraction", "Each head of each layer has its own distance, and they add up.")


def pull(loss, maps: list[torch.Tensor]) -> float:
    """The length of a loss's gradient with respect to all maps together."""
    leaves = [A.clone().requires_grad_() for A in maps]
    gradients = torch.autograd.grad(loss(leaves), leaves)
    return sum(g.pow(2).sum() for g in gradients).sqrt().item()


def fair_lam(mine) -> None:
    """``fair_lam(maps)``, the weight that makes distraction pull as hard as re-steering."""
    for shown in (slice(0, 2), slice(0, 1)):  # 6 heads in two layers, then 2 heads in one
        maps = [A[:1] for A in concept_columns()[shown]]
        answer = mine([A.clone() for A in maps])
        if untouched(answer, "fair_lam"):
            return
        steering, distracting = (pull(f, maps) for f in (losses.resteering, losses.distraction))
        value, heads = float(answer), sum(A.shape[1] for A in maps)
        assert abs(value * heads - 1) > 1e-4, (
            f"you give one over {heads} heads. The heads' gradients share no entry, "
            "so they are perpendicular, and their lengths add as squares"
        )
        assert abs(value - steering / distracting) < 1e-4, (
            f"with {heads} heads you give {value:.3g}: the gradients have lengths "
            f"{steering:.3g} (re-steering) and {distracting:.3g} (distraction), "
            "and the weight has to make them equal"
        )
    passed("fair_lam", "The same weight means a stronger pull when there are more heads.")


def evenness(mine) -> None:
    """``evenness(A)``, the entropy of each head's map of each token: 1 if even, 0 for one pixel."""
    A = torch.full((2, 3, 4, 2), 0.1)
    A[1, 2, :, 1] = torch.tensor([0.0, 0.5, 0.0, 0.0])
    A[0, 1, :, 0] = torch.tensor([0.0, 0.3, 0.3, 0.0])
    answer = mine(A.clone())
    if untouched(answer, "evenness"):
        return
    same_shape(answer, (2, 3, 2), "evenness")
    assert not torch.isnan(answer).any(), (
        "a pixel without attention gives NaN: 0 log 0 counts as 0 (torch.xlogy)"
    )
    assert abs(answer[0, 0, 0].item() - 1) < 1e-5, (
        f"0.1 at every pixel gives {answer[0, 0, 0].item():.3g}: expected 1; "
        "divide by the sum over pixels first"
    )
    assert abs(answer[1, 2, 1].item()) < 1e-5, "all attention at one pixel must give 0"
    assert abs(answer[0, 1, 0].item() - 0.5) < 1e-5, (
        f"two of four pixels give {answer[0, 1, 0].item():.3g}: expected log 2 / log 4 = 0.5"
    )
    passed("evenness", "It measures where a token gets attention, not how much.")
