"""Closed forms on the keys and values of cross-attention: least squares, solved in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor


def derived_states(
    states: Tensor, matrices: Iterable[tuple[Tensor, Tensor]], *, gamma: float = 1e-3
) -> Tensor:
    """Text states that give the edited matrices what the base's gave for ``states``.

    C' = argmin sum_l || W_l' c' - W_l c ||^2 + gamma || c' ||^2
       = (gamma I + sum_l W_l'^T W_l')^-1 (sum_l W_l'^T W_l) c,  for every token's row c

    states (n, tokens, width); matrices: pairs (W base, W' edited), each (out, width). Returns the
    shape of ``states``, fp32 on the CPU; solved in float64. gamma > 0 (RECE: 1e-3 for styles and
    hard objects, 0.1 for easy ones). ValueError for gamma <= 0. Source: RECE, its derivation of
    the target embedding.
    """
    if gamma <= 0:
        raise ValueError(
            f"gamma is {gamma}: give a positive number, "
            "or the equations may have no unique solution"
        )
    c = states.double().cpu()
    gram = gamma * torch.eye(c.shape[-1], dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for W, W_new in matrices:
        gram += W_new.T @ W_new
        cross += W_new.T @ W
    return (c @ torch.linalg.solve(gram, cross).T).float()
