"""Checks of the notebook on SepME: the null space, and how many prompts it can protect."""

import torch
from torch import Tensor

from helpers.check.common import passed, same_shape, untouched


def null_space(mine) -> None:
    """``my_null_space(A, tolerance)``, an orthonormal basis of all x with A x = 0, as columns."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    A[3] = A[0] - 2 * A[1]  # rank 3
    answer = mine(A.clone(), 1e-6)
    if untouched(answer, "my_null_space"):
        return
    assert isinstance(answer, Tensor), (
        f"my_null_space returns {type(answer).__name__}: expected a tensor"
    )
    assert tuple(answer.shape) != (9, 5), (
        "5 columns: one of the 4 rows is a combination of others, so the rank is 3. "
        "Count the singular values above tolerance * the largest, not the rows"
    )
    same_shape(answer, (9, 6), "my_null_space")
    answer = answer.double()
    assert torch.allclose(answer.T @ answer, torch.eye(6, dtype=torch.float64), atol=1e-5), (
        "the columns must have length 1 and be perpendicular (are they rows of Vh, transposed?)"
    )
    assert (A @ answer).abs().max() < 1e-5, (
        "A S is not zero: the directions that A does not see are the last rows of Vh, "
        "those after the rank"
    )
    noise = torch.randn(A.shape, generator=generator, dtype=A.dtype)
    nearly = torch.cat([A, A + 1e-9 * noise])
    rounded = "my_null_space of rows that are equal but for rounding"
    same_shape(mine(nearly, 1e-6), (9, 6), rounded)
    same_shape(mine(1e6 * nearly, 1e-6), (9, 6), f"{rounded}, times 1e6 (is tolerance relative?)")
    rows = A[:3].float()  # independent, so that nothing but the arithmetic is tested
    assert (rows.double() @ mine(rows, 1e-6).double()).abs().max() < 1e-10, (
        "given float32 rows, A S is only as small as float32 can make it: turn A into float64 first"
    )
    passed("my_null_space", "These are all the directions that A does not see.")


def capacity(mine) -> None:
    """``capacity(width, length)``, how many prompts can be protected with one direction left."""
    answer = mine(768, 77)
    if untouched(answer, "capacity"):
        return
    assert isinstance(answer, int), (
        f"capacity returns {type(answer).__name__}: expected a whole number"
    )
    assert answer != 9, (
        "9 for Stable Diffusion 1.4: all prompts share the row of the BOS token, count it once"
    )
    assert answer == 10, (
        f"{answer} for 77 tokens of width 768: expected 10, which have rank 1 + 76 * 10 = 761"
    )
    got = mine(256, 16)
    assert got == 16, (
        f"{got} for 16 tokens of width 256: expected 16; "
        "17 prompts would have rank 1 + 15 * 17 = 256, the whole width"
    )
    assert mine(1024, 77) == 13 and mine(100, 12) == 8, (
        "try 77 tokens of width 1024 (13) and 12 of width 100 (8)"
    )
    passed("capacity", "At least one direction is left, or there is nothing to train.")
