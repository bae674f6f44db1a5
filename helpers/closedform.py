"""Closed forms on the keys and values of cross-attention: least squares, solved in float64.

Every solution here is one map T of text space: each key and value matrix W becomes W' = W T. Text
states are rows, so an edited layer reads c as the base's would read c T^T.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from helpers.nullspace import null_space_report
from helpers.options import FINITE, Above, AtLeast, Below, Dims, Positive, Rule, typed

Weights = Annotated[float, AtLeast(0)] | Tensor
ROWS = Rule("finite, (n, width)", lambda x: x.ndim == 2 and bool(x.isfinite().all()))
SQUARE = Dims(2)


def weighted(weights: float | Tensor, rows: Tensor) -> Tensor:
    """A weight for each row, (n, 1), float64. ValueError for another number of weights."""
    weights = torch.as_tensor(weights, dtype=torch.float64).cpu()
    if weights.ndim and weights.shape != rows.shape[:1]:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for {len(rows)} rows: give one number, or "
            "one for each row"
        )
    if not (weights >= 0).all():
        raise ValueError("a weight is negative or not a number: give weights of zero or more")
    return weights.expand(len(rows))[:, None]


@typed(old=ROWS, new=ROWS, kept=ROWS, same_shape="old new")
def text_map(
    old: Tensor, new: Tensor, kept: Tensor, *, lam: Annotated[float, AtLeast(0)] = 0.5,
    erase: Weights = 1.0, preserve: Weights = 1.0,
) -> Tensor:  # fmt: skip
    """The map that moves some text states to others, holds a list of states, and stays near 1.

    W' = argmin sum_i e_i ||W' c_i - W c*_i||^2 + sum_j p_j ||W' k_j - W k_j||^2 + lam ||W' - W||^2
    W' = W T,  T = (lam I + sum e c* c^T + sum p k k^T)(lam I + sum e c c^T + sum p k k^T)^-1

    old c, new c* (n, width), kept k (m, width), text states as rows; m may be 0. erase e and
    preserve p: a number, or one for each row. Returns T (width, width), float64, the same for every
    matrix W. ValueError for a singular system (lam 0 and fewer independent rows than the width),
    rows of different width, or weights that fit no row.
    Source: UCE, its closed form. width 1, c = 1, c* = 0, lam 0.5: T = 1/3.
    """
    old, new, kept = (x.double().cpu() for x in (old, new, kept))
    width = old.shape[1]
    if kept.shape[1] != width:
        raise ValueError(f"kept has width {kept.shape[1]}, the others {width}: give one width")
    left, held = weighted(erase, old) * old, weighted(preserve, kept) * kept
    shared = lam * torch.eye(width, dtype=torch.float64) + held.T @ kept
    gram = shared + left.T @ old
    rank = int(torch.linalg.matrix_rank(gram, hermitian=True))
    if rank < width:
        raise ValueError(
            f"the closed form is singular: its rows have rank {rank} of width {width}, and lam is "
            f"{lam:g}; give lam > 0, or more rows"
        )
    return torch.linalg.solve(gram, shared + new.T @ left, left=False)


@typed(rows=ROWS)
def retaining_projector(
    rows: Tensor, *, energy: Annotated[float, Above(0), Below(1)] | None = None
) -> Tensor:
    """The projector on what the rows of a retain set do not see: P = S S^T with R S = 0.

    rows R (n, width). energy: the share of sum s_i^2 of R that is held, if not all: its weakest
    directions are given up, and R P is small rather than zero. Returns (width, width), float64.
    ValueError when the rows fill the whole width. Source: SPEED, its null space; SepME, Eq. 9.
    """
    S = null_space_report(rows, energy=energy).basis
    return S @ S.T


@typed(old=ROWS, new=ROWS, fixed=ROWS, projector=SQUARE, same_shape="old new")
def projected_map(old: Tensor, new: Tensor, fixed: Tensor, projector: Tensor) -> Tensor:
    """SPEED's map: as near to the new states as a projected increment comes, some rows held.

    Delta = argmin ||(W + Delta P) C - W C*||^2 + ||Delta P||^2  subject to  Delta P F = 0
    T = 1 + (C* C^T - C C^T) P Q M
    M = (C C^T P + 1)^-1,  Q = 1 - M F (F^T P M F)^-1 F^T P

    old C, new C* (n, width), fixed F (m, width), all as rows here (the equation has columns);
    projector P (width, width), see ``retaining_projector``. Rows of F that P has no room for are
    held by P already. Returns T (width, width), float64: (T - 1) r = 0 for every r with P r = 0,
    and for every row of F. ValueError for rows of different width.
    Source: SPEED, its closed form with invariant rows.
    """
    C, new, F, P = (x.double().cpu() for x in (old, new, fixed, projector))
    width = C.shape[1]
    if not F.shape[1] == P.shape[0] == P.shape[1] == width:
        raise ValueError(
            f"states of width {width}, fixed rows of {F.shape[1]}, a projector {tuple(P.shape)}: "
            "give one width"
        )
    one = torch.eye(width, dtype=torch.float64)
    gram = C.T @ C
    M = torch.linalg.inv(gram @ P + one)
    F = P @ F.T  # what of the fixed rows the projector would let move, (width, m)
    room = torch.linalg.pinv(F.T @ M @ F, rtol=1e-10, hermitian=False)
    Q = one - M @ F @ room @ F.T
    return one + (new.T @ C - gram) @ P @ Q @ M


@typed(states=FINITE)
def derived_states(
    states: Tensor, matrices: Iterable[tuple[Tensor, Tensor]], *, gamma: Positive = 1e-3
) -> Tensor:
    """Text states that give the edited matrices what the base's gave for ``states``.

    C' = argmin sum_l || W_l' c' - W_l c ||^2 + gamma || c' ||^2
       = (gamma I + sum_l W_l'^T W_l')^-1 (sum_l W_l'^T W_l) c,  for every token's row c

    states (n, tokens, width); matrices: pairs (W base, W' edited), each (out, width). Returns the
    shape of ``states``, fp32 on the CPU; solved in float64. gamma > 0 (RECE: 1e-3 for styles and
    hard objects, 0.1 for easy ones). ValueError for gamma <= 0. Source: RECE, its derivation of
    the target embedding.
    """
    c = states.double().cpu()
    gram = gamma * torch.eye(c.shape[-1], dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for W, W_new in matrices:
        if W.shape != W_new.shape or W.ndim != 2 or W.shape[1] != c.shape[-1]:
            raise ValueError(
                f"matrices of shapes {tuple(W.shape)} and {tuple(W_new.shape)}: "
                f"give pairs of one shape (out, {c.shape[-1]}), the width of the states"
            )
        W, W_new = W.double(), W_new.double()
        gram += W_new.T @ W_new
        cross += W_new.T @ W
    return (c @ torch.linalg.solve(gram, cross).T).float()
