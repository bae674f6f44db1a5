"""Checks of the notebook on attention re-steering: the loss, its gradient, and its balance."""

import torch

from helpers import losses
from helpers.check.common import concept_columns, passed, same_shape, untouched


def resteering(mine) -> None:
    """``my_resteering(maps)``, the norm of all attention that a concept's tokens get (Eq. 4)."""
    answer = mine(concept_columns())
    if untouched(answer, "resteering"):
        return
    same_shape(answer, (), "resteering")
    three, four = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.4)
    got = mine([three, four]).item()
    assert abs(got - 0.7) > 1e-5, (
        "0.3 in one layer and 0.4 in another give 0.7: you add norms, but Eq. 4 concatenates first"
    )
    assert abs(got - 0.5) < 1e-5, (
        f"0.3 in one layer and 0.4 in another give {got:.3g}: expected their norm, 0.5"
    )
    wide = mine([torch.full((1, 2, 4, 2), 0.25)]).item()
    assert abs(wide - 1) < 1e-5, (
        f"16 entries of 0.25, over heads, pixels and tokens, give {wide:.3g}: "
        "expected 1, the norm and not the mean"
    )
    pair = mine([torch.cat([three, torch.zeros_like(three)])]).item()
    assert abs(pair - 0.15) < 1e-5, (
        f"two images, one with 0.3 and one with nothing, give {pair:.3g}: "
        "expected the mean of their losses, 0.15"
    )
    passed("resteering", "One norm for each image, over all layers, heads, pixels and tokens.")


def resteering_gradient(mine) -> None:
    """``resteering_gradient(maps)``, the derivative of Eq. 4 for one image, layer by layer."""
    maps = [A[:1] for A in concept_columns()]
    answer = mine([A.clone() for A in maps])
    if untouched(answer, "resteering_gradient"):
        return
    assert isinstance(answer, list | tuple) and len(answer) == len(maps), (
        "give a list with one gradient for each layer"
    )
    for got, A in zip(answer, maps, strict=True):
        same_shape(got, tuple(A.shape), "each gradient")
    length = sum(got.pow(2).sum() for got in answer).sqrt().item()
    assert abs(length - 1) < 1e-4, (
        f"your gradients, put end to end, have length {length:.3g}: "
        "expected 1, however much attention there is"
    )
    leaves = [A.clone().requires_grad_() for A in maps]
    wanted = torch.autograd.grad(losses.resteering(leaves), leaves)
    for got, expected in zip(answer, wanted, strict=True):
        assert torch.allclose(got, expected, atol=1e-5), (
            "autograd finds another gradient: check the sign, and that all layers share one norm"
        )
    passed("resteering_gradient", "It points along the attention itself, and its length is one.")


def balanced(mine) -> None:
    """``balanced(maps)``, re-steering in which every layer counts the same."""
    answer = mine(concept_columns())
    if untouched(answer, "balanced"):
        return
    same_shape(answer, (), "balanced")

    def level(fine: float, coarse: float) -> float:
        return mine([torch.full((1, 2, 16, 2), fine), torch.full((1, 4, 4, 2), coarse)]).item()

    assert abs(level(0.2, 0.2) - 0.2) < 1e-5, (
        "0.2 everywhere must give 0.2, however many entries there are"
    )
    one, other = level(0.1, 0.3), level(0.3, 0.1)
    assert abs(one - other) < 1e-5, (
        f"0.1 in the large layer and 0.3 in the small one give {one:.3g}, "
        f"exchanged {other:.3g}: expected the same"
    )
    assert abs(one - 0.05**0.5) < 1e-5, (
        f"layers of 0.1 and 0.3 give {one:.3g}: expected 0.224; "
        "square, mean over a layer, mean over layers, root last"
    )
    half = torch.cat([torch.full((1, 2, 4, 2), 0.2), torch.zeros(1, 2, 4, 2)])
    pair = mine([half]).item()
    assert abs(pair - 0.1) < 1e-5, (
        f"two images, one with 0.2 and one with nothing, give {pair:.3g}: "
        "expected the mean of their losses, 0.1"
    )
    passed("balanced", "A layer's weight no longer depends on its number of pixels and heads.")
