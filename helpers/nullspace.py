"""Directions of text space that some prompts do not see: S with A S = 0 (SepME, section 3.2)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from helpers.options import FINITE, Above, AtLeast, Below, Dims, Rule, typed

Tolerance = Annotated[float, AtLeast(0), Below(1)]
ROWS = Dims(2)
MATRIX = Rule("finite, (rows, width)", lambda A: ROWS.holds(A) and FINITE.holds(A))


@dataclass(frozen=True)
class NullSpace:
    """An orthonormal basis of the null space, with what it was computed from."""

    basis: Tensor  # (width, nullity), float64
    rank: int
    residual: float  # max |A S|
    singular_values: Tensor  # of A, descending

    @property
    def nullity(self) -> int:
        """The number of directions: the width less the rank."""
        return self.basis.shape[1]


@typed(A=ROWS)
def null_space_report(
    A: Tensor,
    *,
    tolerance: Tolerance = 1e-6,
    energy: Annotated[float, Above(0), Below(1)] | None = None,
) -> NullSpace:
    """The null space of A's rows, by singular value decomposition in float64.

    A = U diag(s) V^T,  rank r = #{s_i > tolerance * s_1}
    S = the last (width - r) right singular vectors, so that A S = 0

    A (rows, width). ``tolerance`` is relative to the largest singular value. Text states come in
    fp32 or fp16: rows that should be equal differ by rounding, and a test for exact zeros would
    count them twice. ``energy`` in (0, 1) protects only the leading directions that have this share
    of sum s_i^2, for prompts that would fill the whole space; A S is then small rather than zero
    (our addition).
    ValueError when A is no matrix, has a NaN, or spans the whole width (an empty null space).
    Source: SepME, Eq. 9 and below. The release uses row reduction with exact zeros: see
    ``normalised_rref``.
    """
    A = A.detach().cpu().double()
    if not torch.isfinite(A).all():
        raise ValueError("A holds NaN or infinity: check the text states")
    s, Vh = torch.linalg.svd(A, full_matrices=True)[1:]
    rank = int((s > tolerance * s[0]).sum()) if s[0] > 0 else 0
    if energy is not None:
        held = s.pow(2).cumsum(0) / s.pow(2).sum()
        rank = min(rank, int((held < energy).sum()) + 1)
    basis = Vh[rank:].T.contiguous()
    if basis.shape[1] == 0:
        raise ValueError(
            f"the null space is empty: the {len(A)} rows have rank {rank}, which is the whole "
            f"width {A.shape[1]}; protect fewer prompts, prompts that share their first words, "
            "or a share of their energy"
        )
    return NullSpace(basis, rank, (A @ basis).abs().max().item(), s)


@typed(A=ROWS)
def null_space(A: Tensor, *, tolerance: Tolerance = 1e-6) -> Tensor:
    """S with A S = 0 and S^T S = 1: (rows, width) -> (width, width - rank), float64.

    ValueError as ``null_space_report``, which also says how it was computed.
    """
    return null_space_report(A, tolerance=tolerance).basis


@typed(A=MATRIX)
def normalised_rref(A: Tensor, *, tolerance: Tolerance = 1e-6) -> Tensor:
    """The release's basis, for comparison: a solution for each free column of the reduced rows.

    Its columns have length 1. It spans the same space as ``null_space``, but its columns are far
    from orthogonal. A (rows, width) -> (width, width - rank), float64.
    Source: SepME's release, which calls sympy.Matrix.nullspace.
    """
    A = A.detach().cpu().double().clone()
    threshold = tolerance * A.abs().max()
    pivots: list[int] = []
    for column in range(A.shape[1]):
        row = len(pivots)
        if row == len(A):
            break
        best = row + int(A[row:, column].abs().argmax())
        if A[best, column].abs() <= threshold:
            continue
        A[[row, best]] = A[[best, row]]
        A[row] /= A[row, column].clone()
        others = torch.arange(len(A)) != row
        A[others] -= A[others, column, None] * A[row]
        pivots.append(column)
    free = [column for column in range(A.shape[1]) if column not in pivots]
    basis = torch.zeros(A.shape[1], len(free), dtype=torch.float64)
    for k, column in enumerate(free):
        basis[column, k] = 1.0
        basis[pivots, k] = -A[: len(pivots), column]
    return basis / basis.norm(dim=0)
