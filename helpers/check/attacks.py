"""Check of the notebook on attacks: the text states that undo an edit of keys and values."""

import torch

from helpers.check.common import passed, untouched


def undone(mine) -> None:
    """``undone(old, new, states, gamma)``, the closed form in three steps, each checked."""
    generator = torch.Generator().manual_seed(0)
    same = {"generator": generator, "dtype": torch.float64}
    old = [torch.randn(rows, 4, **same) for rows in (5, 3)]
    new = [W + 0.3 * torch.randn(W.shape, **same) for W in old]
    states, gamma = torch.randn(2, 4, **same), 0.5
    answer = mine([W.clone() for W in old], [W.clone() for W in new], states.clone(), gamma)
    if untouched(answer, "undone"):
        return
    steps = "gram", "cross", "states"
    assert isinstance(answer, dict) and set(answer) == set(steps), (
        f"undone returns a dict of {', '.join(steps)}"
    )
    V, W = torch.cat(new), torch.cat(old)  # a sum over layers is one product of stacked rows
    gram, cross = V.T @ V + gamma * torch.eye(4, dtype=V.dtype), V.T @ W
    right = gram, cross, (torch.linalg.inv(gram) @ cross @ states.T).T
    hints = (
        "the *edited* weights on both sides, summed over the layers, and gamma on the diagonal",
        "the edited weights transposed times the base's, in this order, summed over the layers",
        "each state is a row: solve for the columns of states.T, or transpose the solution",
    )
    for k, (name, wanted, hint) in enumerate(zip(steps, right, hints, strict=True), 1):
        got = answer[name]
        assert isinstance(got, torch.Tensor) and got.shape == wanted.shape, (
            f"step {k}, {name}: expected a tensor {tuple(wanted.shape)}: {hint}"
        )
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-8), (
            f"step {k}, {name}, differs from the formula: {hint}"
        )
    passed("undone", "One linear system gives the text that the edited layers read as before.")
