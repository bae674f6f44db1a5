"""Diffusion, one function for one equation: add noise, remove it, guide, encode and decode images.

``alpha_bar`` is the whole schedule, (T,), as in ``world.alpha_bar``; ``alpha_bar_t`` is one value
of it. The letter x stands for images and for latents: no function here needs to know which.
"""

import torch
from torch import Tensor

from helpers.options import FINITE, ONE_EACH, WHOLE, Above, Between, Dims, Rule, typed
from helpers.reader import checked_images

SHARES = Between(0, 1)
SCHEDULE = Rule("(T,), from 0 to 1", lambda a: a.ndim == 1 and len(a) > 0 and SHARES.holds(a))
LEVEL = Rule("more than 0, and 1 at most", lambda a: (a > 0) & (a <= 1))
BATCH = Rule("with a dimension for the batch, not empty", lambda x: x.ndim > 0 and x.numel() > 0)


@typed(alpha_bar=SCHEDULE, t=WHOLE, like=BATCH)
def coefficient(alpha_bar: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
    """The schedule's value at each timestep, shaped so that it multiplies a batch.

    alpha_bar (T,); t: an int or (n,) integers; like (n, ...). Returns (n, 1, ..., 1), in the
    schedule's precision and on ``like``'s device. ValueError for a timestep outside 0 ... T - 1,
    since a negative index would silently count from the end.
    """
    t = torch.as_tensor(t, device=alpha_bar.device)
    if t.min() < 0 or t.max() >= len(alpha_bar):
        last = len(alpha_bar) - 1
        raise ValueError(f"t is {t.tolist()}: give timesteps from 0 to {last}")
    return alpha_bar[t].to(like.device).reshape(-1, *[1] * (like.ndim - 1))


@typed(same_shape="x_0 noise", same_rows="x_0 t", alpha_bar=SCHEDULE, t=WHOLE, x_0=BATCH)
def add_noise(x_0: Tensor, noise: Tensor, t: Tensor | int, alpha_bar: Tensor) -> Tensor:
    """The forward process in one jump, from the clean image to timestep t.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,  eps ~ N(0, I)

    x_0, noise (n, ...); t: an int or (n,); alpha_bar (T,). Returns (n, ...) in x_0's dtype. The
    square roots are taken in the schedule's precision, since 1 - alpha_bar_t loses digits in fp16.
    ValueError for t outside 0 ... T - 1. Source: Ho et al., DDPM, Eq. 4.
    """
    a = coefficient(alpha_bar, t, x_0)  # (n, 1, ..., 1)
    return (a.sqrt() * x_0 + (1 - a).sqrt() * noise).to(x_0.dtype)


@typed(alpha_bar=SCHEDULE, x_0=FINITE)
def noised(
    x_0: Tensor, alpha_bar: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The start of every training step: each image gets a timestep and noise of its own.

    x_0 (n, ...); alpha_bar (T,). Returns x_t (n, ...), t (n,) uniform over the timesteps, and the
    noise eps (n, ...). Source: Ho et al., DDPM, Algorithm 1.
    """
    noise = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = torch.randint(len(alpha_bar), (len(x_0),), generator=generator).to(x_0.device)
    return add_noise(x_0, noise, t, alpha_bar), t, noise


@typed(same_shape="x_t eps", same_rows="x_t t", alpha_bar=SCHEDULE, t=WHOLE, x_t=BATCH)
def predict_x0(x_t: Tensor, eps: Tensor, t: Tensor | int, alpha_bar: Tensor) -> Tensor:
    """The clean image that a noise prediction implies: ``add_noise`` solved for x_0.

    x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

    x_t, eps (n, ...); t: an int or (n,); alpha_bar (T,). Returns (n, ...) in x_t's dtype.
    ValueError for t outside 0 ... T - 1. Source: Ho et al., DDPM, Eq. 15; Song et al., DDIM, Eq. 9.
    """
    a = coefficient(alpha_bar, t, x_t)  # (n, 1, ..., 1)
    return ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).to(x_t.dtype)


@typed(same_shape="v x_t", same_rows="v t", alpha_bar=SCHEDULE, t=ONE_EACH, v=BATCH)
def noise_of_velocity(v: Tensor, x_t: Tensor, t: Tensor | int | float, alpha_bar: Tensor) -> Tensor:
    """The noise prediction that a velocity prediction implies.

    eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t,
    since v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0

    v, x_t (n, ...); t (n,), or a number for all; alpha_bar (T,). Between two timesteps, where some
    samplers stop, sqrt(1 / alpha_bar - 1) is taken to be linear, as they take it. Returns (n, ...)
    in v's dtype. Source: Salimans and Ho, Progressive distillation, appendix D.
    """
    t = torch.as_tensor(t, device=alpha_bar.device)
    low, high = t.floor().long(), t.ceil().long()
    below, above = (coefficient(alpha_bar, end, v).double() for end in (low, high))
    part = (t - low).to(v.device, torch.float64).reshape(-1, *[1] * (v.ndim - 1))
    sigma = torch.lerp((1 / below - 1).sqrt(), (1 / above - 1).sqrt(), part)
    a = 1 / (1 + sigma**2)  # (n, 1, ..., 1)
    return (a.sqrt() * v + (1 - a).sqrt() * x_t).to(v.dtype)


@typed(alpha_bar=Rule("between 0 and 1, both left out", lambda a: (a > 0) & (a < 1)))
def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio: the variance of the image's part of x_t over that of the noise's part.

    snr_t = alpha_bar_t / (1 - alpha_bar_t)

    alpha_bar: any shape, in (0, 1). Returns the same shape.
    Source: Kingma et al., Variational diffusion models, section 3.
    """
    return alpha_bar / (1 - alpha_bar)


@typed(same_shape="x_t eps", alpha_bar_t=LEVEL, alpha_bar_prev=LEVEL)
def ddim_step(
    x_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float, alpha_bar_prev: Tensor | float
) -> Tensor:
    """One DDIM step: guess the clean image, then add the same noise back at the next, lower level.

    x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps
    x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

    x_t, eps (n, ...); alpha_bar_t, alpha_bar_prev: numbers in (0, 1]. alpha_bar_prev = 1 gives x_0.
    Returns (n, ...). Source: Song et al., DDIM, Eq. 12 with sigma = 0.
    """
    x_0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    return alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev) ** 0.5 * eps


@typed(same_shape="x_t eps noise", alpha_bar_t=LEVEL, alpha_bar_prev=LEVEL)
def ddpm_step(
    x_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float, alpha_bar_prev: Tensor | float,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One DDPM step: the mean of x_prev given x_t and the predicted noise, and fresh noise on top.

    x_prev = (x_t - beta / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha) + sigma z,  z ~ N(0, I)
    alpha = alpha_bar_t / alpha_bar_prev,  beta = 1 - alpha
    sigma^2 = beta (1 - alpha_bar_prev) / (1 - alpha_bar_t)

    x_t, eps, noise (n, ...); alpha_bar_t, alpha_bar_prev: numbers in (0, 1]. Without ``noise``, z
    comes from torch's generator. When steps are skipped, alpha is the product of the skipped ones.
    With alpha_bar_prev = 1 no noise is added. Returns (n, ...).
    Source: Ho et al., DDPM, Eq. 11 (mean), Eq. 7 (variance, the "small" one of section 3.2) and
    Algorithm 2.
    """
    alpha = alpha_bar_t / alpha_bar_prev
    mean = (x_t - (1 - alpha) / (1 - alpha_bar_t) ** 0.5 * eps) / alpha**0.5
    variance = (1 - alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    z = torch.randn_like(x_t) if noise is None else noise
    return mean + variance**0.5 * z


@typed(same_shape="x_t eps noise", alpha_bar_t=LEVEL, alpha_bar_prev=LEVEL, eta=SHARES)
def eta_step(
    x_t: Tensor, eps: Tensor, alpha_bar_t: float, alpha_bar_prev: float, eta: float,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step of a family of samplers: eta = 0 is DDIM, eta = 1 is DDPM.

    x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z,
    sigma^2 = eta^2 (1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev)

    x_t, eps, noise (n, ...); eta in [0, 1]. Without ``noise``, z comes from torch's generator.
    Returns (n, ...). Source: Song et al., DDIM, Eq. 12 and Eq. 16.
    """
    variance = (
        eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    )
    x_0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    z = torch.randn_like(x_t) if noise is None else noise
    return (
        alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev - variance) ** 0.5 * eps + variance**0.5 * z
    )


@typed(same_shape="eps_null eps_c")
def guide(eps_null: Tensor, eps_c: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: go from the unconditional prediction to the prompt's, and beyond.

    eps = eps_null + guidance (eps_c - eps_null)

    eps_null, eps_c (n, ...). guidance 0 ignores the prompt, 1 is the plain conditional model.
    Returns (n, ...).
    Source: Ho and Salimans, Classifier-free diffusion guidance, Eq. 6, with guidance = 1 + w.
    """
    return eps_null + guidance * (eps_c - eps_null)


@typed(same_shape="eps_null eps_c eps_concept")
def steer_away(
    eps_null: Tensor, eps_c: Tensor, eps_concept: Tensor, guidance: float, strength: float
) -> Tensor:
    """Guidance towards a prompt and away from a concept: forgetting without any training.

    eps = eps_null + guidance (eps_c - eps_null) - strength (eps_concept - eps_null)

    All predictions (n, ...), of the same x_t. strength 0 is ``guide``. Returns (n, ...).
    Source: our reading of the NOT operator of Liu et al., Compositional visual generation with
    composable diffusion models.
    """
    return eps_null + guidance * (eps_c - eps_null) - strength * (eps_concept - eps_null)


@typed
@torch.no_grad()
def to_latents(world, images: Tensor) -> Tensor:
    """Encode images: the mean of the VAE's posterior, scaled as the UNet expects it.

    images (n, 3, H, W) in [0, 1] -> (n, c, h, w) on the world's device and in its dtype, 16 at a
    time. The mean rather than a sample, so that one image has one latent. ValueError for what
    is no image in [0, 1].
    Source: Rombach et al., Latent diffusion, section 3.1.
    """
    vae = world.pipe.vae
    latents = []
    for batch in checked_images(images).split(16):
        x = batch.to(world.device, vae.dtype) * 2 - 1
        latents.append(vae.encode(x).latent_dist.mode() * vae.config.scaling_factor)
    return torch.cat(latents)


@typed(latents=Dims(4))
@torch.no_grad()
def to_images(world, latents: Tensor) -> Tensor:
    """Decode latents: the inverse of ``to_latents``, up to the VAE's own error.

    latents (n, c, h, w) -> (n, 3, H, W) in [0, 1], fp32, on the CPU. What is not finite is NaN: to
    clamp it would turn infinity into white. Source: Rombach et al., Latent diffusion, section 3.1.
    """
    vae = world.pipe.vae
    decoded = vae.decode(latents.to(world.device, vae.dtype) / vae.config.scaling_factor).sample
    decoded = decoded.where(decoded.isfinite(), torch.nan)
    return (decoded / 2 + 0.5).clamp(0, 1).float().cpu()


@typed(x=Dims(2), means=Dims(2), alpha_bar_t=LEVEL, std=Above(0))
def mixture_score(x: Tensor, alpha_bar_t: Tensor | float, means: Tensor, std: float) -> Tensor:
    """The exact score of a noised mixture of round Gaussians: where log p_t grows fastest.

    grad log p_t(x)
    p_t = (1 / k) sum_j N(sqrt(alpha_bar_t) m_j, v I),  v = alpha_bar_t std^2 + 1 - alpha_bar_t

    x (n, d); means (k, d), equally likely; std: of each Gaussian. Returns (n, d).
    Source: the change of variables of Ho et al., DDPM, Eq. 4, applied to each Gaussian.
    """
    v = alpha_bar_t * std**2 + 1 - alpha_bar_t
    towards = alpha_bar_t**0.5 * means - x[:, None]  # (n, k, d)
    share = (-towards.pow(2).sum(-1) / (2 * v)).softmax(1)  # (n, k): P(Gaussian j given x)
    return (share[..., None] * towards).sum(1) / v


@typed(same_shape="x score noise")
def reverse_step(
    x: Tensor, score: Tensor, tau: Tensor | float, noise: Tensor | None = None
) -> Tensor:
    """One Euler step back in time: reverse SDE with ``noise``, probability-flow ODE without.

    SDE: x + tau (x / 2 + score) + sqrt(tau) z;  ODE: x + tau (x / 2 + score / 2)

    x, score, noise (n, ...); tau = log(alpha_bar_prev / alpha_bar_t), the integral of beta(t) over
    the step. Returns (n, ...).
    Source: Song et al., Score SDE, Eq. 6 and Eq. 13, for the variance-preserving SDE, Eq. 11.
    """
    if noise is None:
        return x + tau * (x + score) / 2
    return x + tau * (x / 2 + score) + tau**0.5 * noise
