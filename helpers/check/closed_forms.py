"""Checks of the notebook on closed forms: a case by hand, and the direction that moves most."""

import torch

from helpers.check.common import passed, same_shape, untouched


def dragged(mine) -> None:
    """``dragged(c, c_star, k, lam)``: where one moved state takes another, which nobody named."""
    generator = torch.Generator().manual_seed(0)
    c, c_star, k = torch.randn(3, 2, generator=generator)
    answer = mine(c.clone(), c_star.clone(), k.clone(), 0.5)
    if untouched(answer, "dragged"):
        return
    same_shape(answer, (2,), "dragged")
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    got = mine(one, 0 * one, two, 0.5)
    assert torch.allclose(got, two, atol=1e-5), (
        f"a state at right angles to c becomes {got.tolist()}: expected {two.tolist()}, unmoved"
    )
    got = mine(one, 0 * one, one, 0.5)
    assert torch.allclose(got, one / 3, atol=1e-5), (
        f"c = (1, 0) itself, moved to zero with lam 0.5, becomes {got.tolist()}: expected 1/3 of it"
    )
    gram = 0.5 * torch.eye(2) + torch.outer(c, c)
    T = (0.5 * torch.eye(2) + torch.outer(c_star, c)) @ torch.linalg.inv(gram)
    assert torch.allclose(answer, T @ k, atol=1e-4), (
        "compare with k + (c* - c) times the inner product of c and k, over lam + |c|^2"
    )
    passed("dragged", "A neighbour pays in proportion to its inner product with the concept.")


def most_moved(mine) -> None:
    """``most_moved(T)``: the unit state that the map moves furthest."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    T = torch.eye(5, dtype=torch.float64) + step
    answer = mine(T.clone())
    if untouched(answer, "most_moved"):
        return
    same_shape(answer, (5,), "most_moved")
    answer = answer.double()
    assert abs(answer.norm().item() - 1) < 1e-4, (
        f"your state has length {answer.norm():.3g}: expected 1"
    )
    far = torch.linalg.matrix_norm(step, 2).item()
    got = (step @ answer).norm().item()
    assert got > far * (1 - 1e-4), (
        f"your state moves by {got:.3g}, and one of length 1 moves by {far:.3g}. A state c, as a "
        "column, becomes T c: which singular vector of T - 1 does that stretch most?"
    )
    passed("most_moved", "Whatever is kept, this direction is where the edit lives.")
