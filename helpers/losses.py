"""One pure function for each equation of the course: tensors in, a scalar out.

Attention maps come as a list with one tensor for each layer, (b, heads, pixels, n), holding only the columns of the n
tokens to forget. The papers leave the batch open; here each picture has its own loss and the mean is taken.
"""

import torch
from torch import Tensor


def flat_maps(maps: list[Tensor]) -> list[Tensor]:
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
    squared = sum(A.pow(2).sum((1, 2)) for A in flat_maps(maps))  # (b,)
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
    flat = flat_maps(maps)
    if variant == "paper":
        return sum((A - 1 / A.shape[2]).norm(dim=2).sum(1) for A in flat).mean()
    if variant == "code":
        return sum((A - 1 / A.shape[2]).norm() for A in maps)
    raise ValueError(f"unknown variant {variant!r} of distraction: choose 'paper' or 'code'")


def random_stimulus(maps: list[Tensor], *, variant: str = "paper", noise: list[Tensor] | None = None) -> Tensor:
    """Random stimulus: pull the concept's attention towards noise, drawn anew at every step.

    "paper":  L = sum_i || A_i - R_i ||_2, i over the heads of every layer, R_i uniform in [0, 1]      (AIzheimer, Eq. 6)
    "code":   L = sum_l || A_l - R_l ||_2, l over layers, R_l uniform in [0, 1 / pixels]               (its release)

    The paper calls R "a random vector" and gives no distribution: [0, 1], the range of a probability, is our reading.
    noise: uniform numbers in [0, 1] of the maps' shapes (default: drawn here). Returns a scalar.
    """
    flat = flat_maps(maps)
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


def correlation(base: Tensor, edited: Tensor) -> Tensor:
    """L_cor = mean(Delta_eps(c, theta) * Delta_eps(c, theta + delta)): signed, zero when unrelated, unbounded below.

    Delta_eps(c, .) = eps(x_t, c, t) - eps(x_t, null, t), of the base and of the edited network; (b, c, h, w) both.
    Returns a scalar. Source: SepME, Eq. 2.
    """
    return (base * edited).mean()


def balance(first: Tensor, product: Tensor, *, variant: str = "tensor-norm") -> Tensor:
    """eta_i, which gives every concept's correlation the weight of the first one; it carries no gradient.

    "tensor-norm":  eta_i = ||P_1||_2 / ||P_i||_2, P_i = Delta_eps(c_i, theta) * Delta_eps(c_i, theta + delta)    (SepME's release)
    "scalar":       eta_i = |mean P_1| / |mean P_i|                                              (SepME, below Eq. 3)

    Un-detached, the printed ratio makes eta_i L_i = +-|L_1|, and concepts 2..N get no gradient at all.
    first, product (b, c, h, w). Returns a scalar. ValueError for an unknown variant.
    """
    if variant == "tensor-norm":
        return (first.norm() / product.norm().clamp_min(1e-12)).detach()
    if variant == "scalar":
        return (first.mean().abs() / product.mean().abs().clamp_min(1e-12)).detach()
    raise ValueError(f"unknown variant {variant!r} of eta: choose 'tensor-norm' or 'scalar'")


def mean_l1(tensors: dict[str, Tensor]) -> Tensor:
    """||delta||_1 / M: absolute values summed, over the number of tensors (SepME, Eq. 3, with Table 1's norm)."""
    return sum(value.abs().sum() for value in tensors.values()) / len(tensors)


def negated_guidance(eps_null: Tensor, eps_c: Tensor, eta: float = 1.0) -> Tensor:
    """ESD's target: guidance turned round, so that the concept's prompt leads away from the concept.

    eps_target = eps_null - eta (eps_c - eps_null)

    eta 0 is the unconditional prediction, -1 the concept's own. ESD's newer release counts from eps_c instead: its
    eta = 2 is eta = 1 here. eps_null, eps_c (b, c, h, w), of the frozen model. Returns (b, c, h, w).
    Source: Gandikota et al., Erasing concepts (ESD), its objective; SepME, the unnumbered equation after Eq. 1.
    """
    return eps_null - eta * (eps_c - eps_null)


def alignment(eps_hat: Tensor, eps_target: Tensor) -> Tensor:
    """Targeted erasure: the concept's prediction is taught a target, in which no gradient flows.

    L = mean || eps_hat - sg[eps_target] ||^2

    The target is what tells ESD, SDD and AbConcept apart. eps_hat, eps_target (b, c, h, w). Returns a scalar.
    Source: SepME, Eq. 1.
    """
    return (eps_hat - eps_target.detach()).pow(2).mean()


def logit_difference(differences: list[Tensor]) -> Tensor:
    """Attention's logits with the concept's prompt drawn to those without: Forget-Me-Not as SepME's release has it.

    L = sum_l mean (Z_l(c) - Z_l(c'))^2,  Z_l = q k^T / sqrt(d) before the softmax, c' the prompt without the concept

    differences: one Z_l(c) - Z_l(c') for each layer, (b, heads, pixels, tokens). Returns a scalar.
    ValueError for an empty list. Source: the release of SepME (train-scripts/FMN.py).
    """
    return sum(A.pow(2).mean() for A in flat_maps(differences))


def visual_denoising(x_0_hat: Tensor, x_0_tilde: Tensor, weights: Tensor | None = None) -> Tensor:
    """Visual denoising: the clean picture that the model guesses is pulled to one that lacks the concept.

    L_vis = mean_i w_i MSE(x_0_hat_i, x_0_tilde_i),  x_0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)

    x_0_hat is ``diffusion.predict_x0``; gradients flow through it alone. An error of eps_hat counts
    (1 - alpha_bar_t) / alpha_bar_t times here, so noisy timesteps rule unless weighted. x_0_hat, x_0_tilde
    (b, c, h, w), latents in this kit; weights (b,), by default 1 as printed. Returns a scalar.
    Source: Forget-Me-Not, visual denoising loss (section 3.3 of the report); the weights are our addition.
    """
    error = (x_0_hat - x_0_tilde.detach()).pow(2).flatten(1).mean(1)  # (b,)
    return (error if weights is None else weights * error).mean()
