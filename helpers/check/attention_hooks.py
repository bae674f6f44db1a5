"""Checks of the notebook on attention hooks: maps of a token, and tokens that are hidden."""

import torch

from helpers.check.common import passed, same_shape, untouched


def layers_of_two_sizes() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of a 4x4 layer with 2 heads and a 2x2 layer with 4: (2, heads, pixels, 5)."""
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (torch.rand(2, h, p, 5, generator=generator) for h, p in ((2, 16), (4, 4)))
    return fine, coarse


def word_map(mine) -> None:
    """``word_map(passes, column, size)``, one token's map over several layers and steps."""
    fine, coarse = layers_of_two_sizes()
    answer = mine([fine.clone(), coarse.clone()], 3, 8)
    if untouched(answer, "word_map"):
        return
    same_shape(answer, (8, 8), "word_map")
    assert_layers_count_once(mine)
    other = [fine.clone(), coarse.clone()]
    for A in other:
        A[0] = 0.0
    assert torch.allclose(mine(other, 3, 8), answer), (
        "the map changed with row 0: that is the unconditional half, take the last row"
    )
    for A in other:
        A[..., :3] = A[..., 4:] = 0.0
    assert torch.allclose(mine(other, 3, 8), answer), "the map changed with another token's column"
    first_head, swapped = fine.clone(), fine.flip(1)
    first_head[:, 1:] = 0.0
    assert torch.allclose(mine([swapped], 3, 8), mine([fine], 3, 8), atol=1e-6), (
        "every head counts the same"
    )
    assert not torch.allclose(mine([first_head], 3, 8), mine([fine], 3, 8)), (
        "average over all heads, not the first only"
    )
    corner = torch.zeros_like(fine)
    corner[:, :, 3, 3] = 1.0  # row 0, column 3: the upper right corner
    spot = mine([corner], 3, 8)
    assert spot[:2, 6:].mean() > max(0.5, 4 * spot[6:, :2].mean()), (
        "pixel 3 of a 4x4 map is its upper right corner: pixels run row by row"
    )
    passed("word_map", "One image from layers of every size, each counted once.")


def assert_layers_count_once(answer) -> None:
    """The part of ``word_map`` with layers that are constant."""

    def level(*values: float) -> float:
        layers = zip(layers_of_two_sizes(), values, strict=True)
        return answer([torch.full_like(A, value) for A, value in layers], 3, 8).mean().item()

    assert abs(level(0.2, 0.2) - 0.2) < 1e-5, (
        "layers with 0.2 everywhere must give 0.2: take means, not sums"
    )
    assert abs(level(0.1, 0.3) - 0.2) < 1e-5, (
        "each layer counts once, however many pixels it has: resize, then average"
    )


def hide_weight(mine) -> None:
    """``hide_weight(columns, tokens)``, the weights that hide columns in a guided batch.

    One row for each prompt and half, with 0 at the columns of this prompt.
    """
    columns, tokens = [[2], [4, 5], [1, 2]], 7
    answer = mine([list(c) for c in columns], tokens)
    if untouched(answer, "hide_weight"):
        return
    n = len(columns)
    same_shape(answer, (2 * n, tokens), "hide_weight")
    answer = answer.float()
    assert ((answer == 0) | (answer == 1)).all(), "a column is either kept (1) or hidden (0)"
    assert answer.sum() < answer.numel(), "nothing is hidden yet"
    hidden = [sorted((row == 0).nonzero().flatten().tolist()) for row in answer]
    assert hidden[:n] != columns, (
        "the hidden columns are in the first half: guidance puts the unconditional half first"
    )
    assert not any(hidden[:n]), "the first half is the unconditional one: keep all of it"
    for i in range(n):
        assert hidden[n + i] == columns[i], (
            f"row {n + i} belongs to prompt {i} and hides {hidden[n + i]}: expected {columns[i]}"
        )
    passed("hide_weight", "Each prompt hides its own columns, the unconditional half hides none.")


def share_out(mine) -> None:
    """``share_out(A, weight)``, hiding columns so that a pixel's probabilities still sum to 1."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 3, 4, 6, generator=generator)
    weight = torch.ones(2, 6)
    weight[0, [1, 2]], weight[1, 4] = 0.0, 0.0
    A = scores.softmax(-1)
    given = A.clone()
    answer = mine(given, weight.clone())
    if untouched(answer, "share_out"):
        return
    same_shape(answer, tuple(A.shape), "share_out")
    assert torch.equal(given, A), "A itself was changed: make a new tensor"
    hidden = (weight == 0)[:, None, None, :].expand_as(A)
    assert (answer[hidden] == 0).all(), (
        "a hidden column still gets attention (is each row of weight used for its prompt?)"
    )
    assert torch.allclose(answer.sum(-1), torch.ones(2, 3, 4), atol=1e-5), (
        "every pixel's probabilities must sum to one"
    )
    first, last = slice(0, 1), slice(5, 6)  # two tokens that are hidden in neither prompt
    assert torch.allclose(
        answer[..., first] * A[..., last], answer[..., last] * A[..., first], atol=1e-6
    ), "the tokens that stay must keep their proportions"
    masked = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    assert torch.allclose(answer, masked, atol=1e-5), (
        "compare with a softmax whose hidden scores are minus infinity"
    )
    passed("share_out", "It equals a softmax whose hidden scores are minus infinity.")
