"""The null space against sympy, by hand, and on what the pipeline's encoder really gives."""

import pytest
import sympy
import torch

from helpers.nullspace import normalised_rref, null_space, null_space_report


def random(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def test_by_hand():
    """x + y = 0 and z = 0: one direction, (1, -1, 0) / sqrt 2."""
    S = null_space(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert S.shape == (3, 1)
    expected = torch.tensor([0.5**0.5, 0.5**0.5, 0.0], dtype=torch.float64)
    assert torch.allclose(S.abs().flatten(), expected)
    assert S[0, 0] * S[1, 0] < 0


@pytest.mark.parametrize("basis", [null_space, normalised_rref])
def test_spans_what_sympy_finds(basis):
    A = torch.randint(-3, 4, (4, 9), generator=torch.Generator().manual_seed(1)).double()
    A[3] = A[0] - 2 * A[1]  # rank 3
    solutions = sympy.Matrix(A.int().tolist()).nullspace()
    columns = [[float(v) for v in column] for column in solutions]
    theirs = torch.tensor(columns, dtype=torch.float64).T
    ours = basis(A)
    assert ours.shape == theirs.shape == (9, 6)
    assert (A @ ours).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(torch.cat([ours, theirs], 1)) == 6  # the same space


def test_orthonormal_and_small_residual():
    report = null_space_report(random(40, 64))
    S = report.basis
    assert torch.allclose(S.T @ S, torch.eye(24, dtype=torch.float64), atol=1e-12)
    assert report.rank == 40 and report.nullity == 24 and report.residual < 1e-12


def test_rows_equal_up_to_rounding_count_once():
    A = random(10, 32).float()
    noisy = torch.cat([A, A * (1 + 1e-7)])
    assert null_space_report(noisy).rank == 10


def test_an_increment_in_the_null_space_leaves_protected_states_alone():
    A = random(20, 32)
    S = null_space(A)
    delta = random(8, S.shape[1], seed=2) @ S.T  # (d_out, width)
    assert (A @ delta.T).abs().max() < 1e-12
    assert (random(1, 32, seed=3) @ delta.T).abs().max() > 0.1


def test_real_text_states_share_their_first_row(tiny_world):
    """Causal encoding: BOS has the same state in all prompts, so the rank grows by less than the
    text length for each prompt."""
    length = tiny_world.text_length
    A = tiny_world.encode(["", "church"])
    assert torch.allclose(A[0, 0], A[1, 0], atol=1e-6)
    rank = torch.linalg.matrix_rank(A.flatten(0, 1).double(), rtol=1e-6)
    assert rank <= min(2 * length - 1, A.shape[-1])


@pytest.mark.parametrize(
    ("A", "said"),
    [
        (torch.eye(5), "rank 5.*whole width 5"),
        (torch.zeros(3), "shape"),
        (torch.full((2, 4), float("nan")), "NaN"),
    ],
)
def test_bad_input(A, said):
    with pytest.raises(ValueError, match=said):
        null_space(A)
