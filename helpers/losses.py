"""One pure function for each equation of the course: tensors in, a scalar out.

Attention maps come as a list with one tensor for each layer, (b, heads, pixels, n), holding only the columns of the n
tokens to forget. The papers leave the batch open; here each picture has its own loss and the mean is taken.
"""

import torch
from torch import Tensor


def _flat(maps: list[Tensor]) -> list[Tensor]:
    """Each layer's maps flattened for each picture and head: (b, heads, pixels * n). ValueError for an empty list."""
    if not maps:
        raise ValueError(
            "no attention maps: record at least one layer (did the forward pass use the recording processor?)"
        )
    return [A.flatten(2) for A in maps]


def resteering(maps: list[Tensor], *, variant: str = "paper") -> Tensor:
    """Attention re-steering: the norm of all attention that the concept's tokens get.

    "paper":  L = || concat(A_0, ..., A_n) ||_2            (AIzheimer, Eq. 4; its release and Forget-Me-Not's do the same)
    "fmn":    L = sum_i || A_i ||_2^2                      (Forget-Me-Not, Algorithm 1: squared)

    maps: one (b, heads, pixels, n) for each layer, probabilities. Returns a scalar. ValueError: no maps, unknown variant.
    """
    squared = sum(A.pow(2).sum((1, 2)) for A in _flat(maps))  # (b,)
    if variant == "fmn":
        return squared.mean()
    if variant == "paper":
        return squared.clamp_min(1e-20).sqrt().mean()  # the clamp keeps the gradient finite at zero attention
    raise ValueError(f"unknown variant {variant!r} of re-steering: choose 'paper' or 'fmn'")


def distraction(maps: list[Tensor], *, variant: str = "paper") -> Tensor:
    """Distraction: pull the concept's attention towards a uniform map.

    "paper":  L = sum_i || A_i - 1 / dim(A_i) ||_2, i over the heads of every layer      (AIzheimer, Eq. 5)
    "code":   L = sum_l || A_l - 1 / pixels ||_2, l over layers, heads and batch together  (its release)

    maps: one (b, heads, pixels, n) for each layer. dim(A_i) = pixels * n. Returns a scalar.
    """
    if variant == "paper":
        return sum((A - 1 / A.shape[2]).norm(dim=2).sum(1) for A in _flat(maps)).mean()
    if variant == "code":
        _flat(maps)
        return sum((A - 1 / A.shape[2]).norm() for A in maps)
    raise ValueError(f"unknown variant {variant!r} of distraction: choose 'paper' or 'code'")


def random_stimulus(maps: list[Tensor], *, variant: str = "paper", noise: list[Tensor] | None = None) -> Tensor:
    """Random stimulus: pull the concept's attention towards noise, drawn anew at every step.

    "paper":  L = sum_i || A_i - R_i ||_2, i over the heads of every layer, R_i uniform in [0, 1]      (AIzheimer, Eq. 6)
    "code":   L = sum_l || A_l - R_l ||_2, l over layers, R_l uniform in [0, 1 / pixels]               (its release)

    The paper calls R "a random vector" and gives no distribution: [0, 1], the range of a probability, is our reading.
    noise: uniform numbers in [0, 1] of the maps' shapes (default: drawn here). Returns a scalar.
    """
    flat = _flat(maps)
    noise = [torch.rand_like(A) for A in maps] if noise is None else noise
    if variant == "paper":
        return sum((A - R.flatten(2)).norm(dim=2).sum(1) for A, R in zip(flat, noise, strict=True)).mean()
    if variant == "code":
        return sum((A - R / A.shape[2]).norm() for A, R in zip(maps, noise, strict=True))
    raise ValueError(f"unknown variant {variant!r} of random stimulus: choose 'paper' or 'code'")


def reconstruction(eps_hat: Tensor, noise: Tensor) -> Tensor:
    """L_recon = mean ||eps - eps_hat||^2: the denoiser's own training loss (Ho et al., DDPM, Eq. 14).

    eps_hat, noise (b, c, h, w). Returns a scalar.
    """
    return (eps_hat - noise).pow(2).mean()
