"""Closed forms on the keys and values of cross-attention: least squares, solved in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor

from helpers.options import FINITE, Positive, typed


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
