"""One pure function for each equation of the course: tensors in, a scalar out.

Attention maps come as a list with one tensor for each layer, (b, heads, pixels, n), with only the
columns of the n tokens to forget. The papers do not say how to treat a batch: here each image has
its own loss, and the mean is taken.
"""

import torch
from torch import Tensor

from helpers.options import NOT_EMPTY, Dims, Rule, typed


def are_maps(maps: list[Tensor]) -> bool:
    """Whether a list holds maps of one batch, (b, heads, pixels, n) each."""
    return all(A.ndim == 4 for A in maps) and len({len(A) for A in maps}) <= 1


MAPS = Rule("(b, heads, pixels, n) each, all of one batch", are_maps)


@typed(maps=MAPS)
def flat_maps(maps: list[Tensor]) -> list[Tensor]:
    """Each layer's maps flattened for each image and head: (b, heads, pixels * n).

    ValueError for an empty list.
    """
    if not maps:
        raise ValueError(
            "no attention maps: record at least one layer "
            "(did the forward pass use the recording processor?)"
        )
    return [A.flatten(2) for A in maps]


@typed(maps=MAPS)
def resteering(maps: list[Tensor], *, variant: str = "paper") -> Tensor:
    """Attention re-steering: the norm of all attention that the concept's tokens get.

    "paper":  L = || concat(A_0, ..., A_n) ||_2
              (AIzheimer, Eq. 4; its release and Forget-Me-Not's compute the same)
    "fmn":    L = sum_i || A_i ||_2^2
              (Forget-Me-Not, Algorithm 1: squared)

    maps: probabilities, one (b, heads, pixels, n) for each layer. Returns a scalar.
    ValueError for no maps or an unknown variant.
    """
    squared = sum(A.pow(2).sum((1, 2)) for A in flat_maps(maps))  # (b,)
    if variant == "fmn":
        return squared.mean()
    if variant == "paper":
        return squared.clamp_min(1e-20).sqrt().mean()  # clamped: finite gradient at zero attention
    raise ValueError(f"unknown variant {variant!r} of re-steering: choose 'paper' or 'fmn'")


@typed(maps=MAPS)
def distraction(maps: list[Tensor], *, variant: str = "paper") -> Tensor:
    """Distraction: pull the concept's attention towards a uniform map.

    "paper":  L = sum_i || A_i - 1 / dim(A_i) ||_2, i over the heads of every layer
              (AIzheimer, Eq. 5)
    "code":   L = sum_l || A_l - 1 / pixels ||_2, l over layers, heads and batch in one norm
              (its release)

    maps: probabilities, one (b, heads, pixels, n) for each layer. dim(A_i) = pixels * n.
    Returns a scalar. ValueError for no maps or an unknown variant.
    """
    flat = flat_maps(maps)
    if variant == "paper":
        return sum((A - 1 / A.shape[2]).norm(dim=2).sum(1) for A in flat).mean()
    if variant == "code":
        return sum((A - 1 / A.shape[2]).norm() for A in maps)
    raise ValueError(f"unknown variant {variant!r} of distraction: choose 'paper' or 'code'")


@typed(maps=MAPS, same_shape="maps noise")
def random_stimulus(
    maps: list[Tensor], *, variant: str = "paper", noise: list[Tensor] | None = None
) -> Tensor:
    """Random stimulus: pull the concept's attention towards noise, sampled anew at every step.

    "paper":  L = sum_i || A_i - R_i ||_2, i over the heads of every layer, R_i uniform in [0, 1]
              (AIzheimer, Eq. 6)
    "code":   L = sum_l || A_l - R_l ||_2, l over layers, R_l uniform in [0, 1 / pixels]
              (its release)

    The paper calls R "a random vector" and gives no distribution. Our reading is [0, 1], the range
    of a probability. noise: uniform numbers in [0, 1] of the maps' shapes, sampled here by default.
    Returns a scalar. ValueError for no maps or an unknown variant.
    """
    flat = flat_maps(maps)
    noise = [torch.rand_like(A) for A in maps] if noise is None else noise
    if variant == "paper":
        return sum(
            (A - R.flatten(2)).norm(dim=2).sum(1) for A, R in zip(flat, noise, strict=True)
        ).mean()
    if variant == "code":
        return sum((A - R / A.shape[2]).norm() for A, R in zip(maps, noise, strict=True))
    raise ValueError(f"unknown variant {variant!r} of random stimulus: choose 'paper' or 'code'")


@typed(same_shape="eps_hat noise")
def reconstruction(eps_hat: Tensor, noise: Tensor) -> Tensor:
    """The denoiser's own training loss.

    L_recon = mean || eps - eps_hat ||^2

    eps_hat, noise (b, c, h, w). Returns a scalar. Source: Ho et al., DDPM, Eq. 14.
    """
    return (eps_hat - noise).pow(2).mean()


@typed(same_shape="base edited")
def correlation(base: Tensor, edited: Tensor) -> Tensor:
    """How much the edited network's change for a concept agrees with the base network's.

    L_cor = mean(Delta_eps(c, theta) * Delta_eps(c, theta + delta))
    Delta_eps(c, .) = eps(x_t, c, t) - eps(x_t, null, t)

    It has a sign: it is zero for unrelated changes and has no lower bound. base, edited: Delta_eps
    of the two networks, (b, c, h, w). Returns a scalar. Source: SepME, Eq. 2.
    """
    return (base * edited).mean()


@typed(same_shape="first product")
def balance(first: Tensor, product: Tensor, *, variant: str = "tensor-norm") -> Tensor:
    """The factor eta_i that gives every concept's correlation the weight of the first one.

    "tensor-norm":  eta_i = ||P_1||_2 / ||P_i||_2     (SepME's release)
    "scalar":       eta_i = |mean P_1| / |mean P_i|   (SepME, below Eq. 3)
    P_i = Delta_eps(c_i, theta) * Delta_eps(c_i, theta + delta)

    eta_i is detached: it carries no gradient. With a gradient, the printed ratio makes eta_i L_i
    equal to |L_1| or -|L_1|, so that concepts 2 to N are not trained at all.
    first, product: P_1 and P_i, (b, c, h, w). Returns a scalar. ValueError for an unknown variant.
    """
    if variant == "tensor-norm":
        return (first.norm() / product.norm().clamp_min(1e-12)).detach()
    if variant == "scalar":
        return (first.mean().abs() / product.mean().abs().clamp_min(1e-12)).detach()
    raise ValueError(f"unknown variant {variant!r} of eta: choose 'tensor-norm' or 'scalar'")


@typed(tensors=NOT_EMPTY)
def mean_l1(tensors: dict[str, Tensor]) -> Tensor:
    """The sum of all absolute values, divided by the number of tensors.

    ||delta||_1 / M

    Returns a scalar. Source: SepME, Eq. 3, with the norm of Table 1.
    """
    return sum(value.abs().sum() for value in tensors.values()) / len(tensors)


@typed(same_shape="eps_null eps_c")
def negated_guidance(eps_null: Tensor, eps_c: Tensor, eta: float = 1.0) -> Tensor:
    """ESD's target: guidance with its sign reversed, which leads away from the concept.

    eps_target = eps_null - eta (eps_c - eps_null)

    eta = 0 gives the unconditional prediction, eta = -1 the concept's own. ESD's newer release
    counts from eps_c instead: its eta = 2 is eta = 1 here.
    eps_null, eps_c (b, c, h, w), of the frozen model. Returns (b, c, h, w).
    Source: Gandikota et al., Erasing concepts (ESD), its objective; SepME, the unnumbered equation
    after Eq. 1.
    """
    return eps_null - eta * (eps_c - eps_null)


@typed(same_shape="eps_hat eps_target")
def alignment(eps_hat: Tensor, eps_target: Tensor) -> Tensor:
    """Targeted erasure: the concept's prediction is trained towards a target without gradient.

    L = mean || eps_hat - sg[eps_target] ||^2

    ESD, SDD and AbConcept differ in their targets only. eps_hat, eps_target (b, c, h, w).
    Returns a scalar. Source: SepME, Eq. 1.
    """
    return (eps_hat - eps_target.detach()).pow(2).mean()


@typed(differences=MAPS)
def logit_difference(differences: list[Tensor]) -> Tensor:
    """Forget-Me-Not as SepME's release has it: attention logits with and without the concept.

    L = sum_l mean (Z_l(c) - Z_l(c'))^2
    Z_l = q k^T / sqrt(d) before the softmax, c' the prompt without the concept

    differences: one Z_l(c) - Z_l(c') for each layer, (b, heads, pixels, tokens). Returns a scalar.
    ValueError for an empty list. Source: the release of SepME (train-scripts/FMN.py).
    """
    return sum(A.pow(2).mean() for A in flat_maps(differences))


@typed(same_shape="x_0_hat x_0_tilde", same_rows="x_0_hat weights", weights=Dims(1))
def visual_denoising(x_0_hat: Tensor, x_0_tilde: Tensor, weights: Tensor | None = None) -> Tensor:
    """Visual denoising: pull the clean image that the model guesses to one without the concept.

    L_vis = mean_i w_i MSE(x_0_hat_i, x_0_tilde_i)
    x_0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t), ``diffusion.predict_x0``

    Gradients flow through x_0_hat only. An error of eps_hat counts (1 - alpha_bar_t) / alpha_bar_t
    times here, so noisy timesteps dominate unless weighted. x_0_hat, x_0_tilde: (b, c, h, w),
    latents in this kit; weights (b,), by default 1 as printed. Returns a scalar.
    Source: Forget-Me-Not, visual denoising loss (section 3.3 of the report); the weights are ours.
    """
    error = (x_0_hat - x_0_tilde.detach()).pow(2).flatten(1).mean(1)  # (b,)
    return (error if weights is None else weights * error).mean()
