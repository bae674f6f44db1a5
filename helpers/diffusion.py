"""Diffusion, one function for one equation: noise in, noise out, guidance, latents, and the continuous-time view.

``alpha_bar`` is the whole schedule, (T,), as ``world.pipe.scheduler.alphas_cumprod`` holds it; ``alpha_bar_t`` is one
value of it. Pictures and latents share the letter x: nothing here knows which of the two it is given.
"""

import torch
from torch import Tensor


def coefficient(alpha_bar: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
    """The schedule's value at each timestep, shaped so that it multiplies a batch.

    alpha_bar (T,); t: an int or (n,) integers; like (n, ...). Returns (n, 1, ..., 1), in the schedule's precision and on
    ``like``'s device. ValueError for a timestep outside 0 ... T - 1, which indexing would wrap around without a word.
    """
    t = torch.as_tensor(t, device=alpha_bar.device)
    if t.min() < 0 or t.max() >= len(alpha_bar):
        raise ValueError(f"timesteps run from 0 to {len(alpha_bar) - 1}, and t is {t.tolist()}")
    return alpha_bar[t].to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, noise: Tensor, t: Tensor | int, alpha_bar: Tensor) -> Tensor:
    """The forward process in one jump, from the clean picture to timestep t.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,  eps ~ N(0, I)

    x_0, noise (n, ...); t: an int or (n,); alpha_bar (T,). Returns (n, ...) in x_0's dtype; the square roots are taken in
    the schedule's precision, since 1 - alpha_bar_t loses its digits in fp16. ValueError for t outside 0 ... T - 1.
    Source: Ho et al., DDPM, Eq. 4.
    """
    a = coefficient(alpha_bar, t, x_0)  # (n, 1, ..., 1)
    return (a.sqrt() * x_0 + (1 - a).sqrt() * noise).to(x_0.dtype)


def noised(x_0: Tensor, alpha_bar: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What every training step starts from: each picture at a timestep of its own, with noise of its own.

    x_0 (n, ...); alpha_bar (T,). Returns x_t (n, ...), t (n,) uniform over the timesteps, and the noise eps (n, ...).
    Source: Ho et al., DDPM, Algorithm 1.
    """
    noise = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = torch.randint(len(alpha_bar), (len(x_0),), generator=generator).to(x_0.device)
    return add_noise(x_0, noise, t, alpha_bar), t, noise


def predict_x0(x_t: Tensor, eps: Tensor, t: Tensor | int, alpha_bar: Tensor) -> Tensor:
    """The clean picture that a noise prediction amounts to: ``add_noise`` solved for x_0.

    x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

    x_t, eps (n, ...); t: an int or (n,); alpha_bar (T,). Returns (n, ...) in x_t's dtype.
    ValueError for t outside 0 ... T - 1. Source: Ho et al., DDPM, Eq. 15; Song et al., DDIM, Eq. 9.
    """
    a = coefficient(alpha_bar, t, x_t)  # (n, 1, ..., 1)
    return ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).to(x_t.dtype)


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio: the variance of the picture's share of x_t over that of the noise's share.

    snr_t = alpha_bar_t / (1 - alpha_bar_t)

    alpha_bar: any shape, in (0, 1); returns the same shape. Source: Kingma et al., Variational diffusion models, section 3.
    """
    return alpha_bar / (1 - alpha_bar)


def ddim_step(x_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float, alpha_bar_prev: Tensor | float) -> Tensor:
    """One DDIM step without noise: guess the clean picture, then add the same noise back at the next, lower level.

    x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps,  x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

    x_t, eps (n, ...); alpha_bar_t, alpha_bar_prev: numbers in (0, 1], alpha_bar_prev = 1 gives x_0 itself. Returns (n, ...).
    Source: Song et al., DDIM, Eq. 12 with sigma = 0.
    """
    x_0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    return alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev) ** 0.5 * eps


def ddpm_step(
    x_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float, alpha_bar_prev: Tensor | float, noise: Tensor | None = None
) -> Tensor:
    """One DDPM step: the mean of x_prev given x_t and the predicted noise, and fresh noise on top.

    x_prev = (x_t - beta / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha) + sigma z,  alpha = alpha_bar_t / alpha_bar_prev,
    beta = 1 - alpha,  sigma^2 = beta (1 - alpha_bar_prev) / (1 - alpha_bar_t),  z ~ N(0, I)

    x_t, eps, noise (n, ...); noise None draws z from torch's generator; alpha_bar_t, alpha_bar_prev: numbers in (0, 1]. When
    steps are skipped, alpha is the product of those skipped. With alpha_bar_prev = 1 no noise is added. Returns (n, ...).
    Source: Ho et al., DDPM, Eq. 11 (mean) and Eq. 7 (variance, the "small" one of section 3.2); Algorithm 2.
    """
    alpha = alpha_bar_t / alpha_bar_prev
    mean = (x_t - (1 - alpha) / (1 - alpha_bar_t) ** 0.5 * eps) / alpha**0.5
    variance = (1 - alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    z = torch.randn_like(x_t) if noise is None else noise
    return mean + variance**0.5 * z


def eta_step(
    x_t: Tensor, eps: Tensor, alpha_bar_t: float, alpha_bar_prev: float, eta: float, noise: Tensor | None = None
) -> Tensor:
    """The family of samplers that holds both: eta = 0 is DDIM, eta = 1 is DDPM.

    x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z,
    sigma^2 = eta^2 (1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev)

    x_t, eps, noise (n, ...); noise None draws z from torch's generator; eta in [0, 1]. Returns (n, ...).
    Source: Song et al., DDIM, Eq. 12 and Eq. 16.
    """
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    x_0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    z = torch.randn_like(x_t) if noise is None else noise
    return alpha_bar_prev**0.5 * x_0 + (1 - alpha_bar_prev - variance) ** 0.5 * eps + variance**0.5 * z


def guide(eps_null: Tensor, eps_c: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: walk from the prediction without the prompt through the one with it, and beyond.

    eps = eps_null + guidance (eps_c - eps_null)

    eps_null, eps_c (n, ...); guidance 0 ignores the prompt, 1 is the plain conditional model. Returns (n, ...).
    Source: Ho and Salimans, Classifier-free diffusion guidance, Eq. 6, with guidance = 1 + w.
    """
    return eps_null + guidance * (eps_c - eps_null)


def steer_away(eps_null: Tensor, eps_c: Tensor, eps_concept: Tensor, guidance: float, strength: float) -> Tensor:
    """Guidance towards a prompt and, at the same time, away from a concept: forgetting at drawing time, no weight changed.

    eps = eps_null + guidance (eps_c - eps_null) - strength (eps_concept - eps_null)

    All predictions (n, ...), of the same x_t. strength 0 is ``guide``. Returns (n, ...).
    Source: our reading of the NOT operator of Liu et al., Compositional visual generation with composable diffusion models.
    """
    return eps_null + guidance * (eps_c - eps_null) - strength * (eps_concept - eps_null)


@torch.no_grad()
def to_latents(world, images: Tensor) -> Tensor:
    """Encode pictures: the mean of the VAE's posterior, scaled as the UNet expects it.

    images (n, 3, H, W) in [0, 1] -> (n, c, h, w) on the world's device and in its dtype. The mean rather than a draw, so that
    one picture has one latent. Source: Rombach et al., Latent diffusion, section 3.1.
    """
    vae = world.pipe.vae
    x = images.to(world.device, vae.dtype) * 2 - 1
    return vae.encode(x).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def to_images(world, latents: Tensor) -> Tensor:
    """Decode latents: the inverse of ``to_latents``, as good as the VAE is.

    latents (n, c, h, w) -> (n, 3, H, W) in [0, 1], fp32, on the CPU. Source: Rombach et al., Latent diffusion, section 3.1.
    """
    vae = world.pipe.vae
    decoded = vae.decode(latents.to(world.device, vae.dtype) / vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1).float().cpu()


def mixture_score(x: Tensor, alpha_bar_t: Tensor | float, means: Tensor, std: float) -> Tensor:
    """The exact score of a noised mixture of round Gaussians: which way the probability of x_t grows fastest.

    grad log p_t(x),  p_t = (1 / k) sum_j N(sqrt(alpha_bar_t) m_j, v I),  v = alpha_bar_t std^2 + 1 - alpha_bar_t

    x (n, d); means (k, d), equally likely; std of each Gaussian. Returns (n, d).
    Source: the change of variables of Ho et al., DDPM, Eq. 4, applied to each Gaussian.
    """
    v = alpha_bar_t * std**2 + 1 - alpha_bar_t
    towards = alpha_bar_t**0.5 * means - x[:, None]  # (n, k, d)
    share = (-towards.pow(2).sum(-1) / (2 * v)).softmax(1)  # (n, k): which Gaussian did x come from?
    return (share[..., None] * towards).sum(1) / v


def reverse_step(x: Tensor, score: Tensor, h: Tensor | float, noise: Tensor | None = None) -> Tensor:
    """One Euler step back in time: of the reverse SDE with ``noise``, of the probability-flow ODE without.

    SDE: x + h (x / 2 + score) + sqrt(h) z;  ODE: x + h (x / 2 + score / 2)

    x, score, noise (n, ...); h = log(alpha_bar_prev / alpha_bar_t), the integral of beta(t) over the step. Returns (n, ...).
    Source: Song et al., Score SDE, Eq. 6 and Eq. 13, for the variance-preserving SDE, Eq. 11.
    """
    if noise is None:
        return x + h * (x + score) / 2
    return x + h * (x / 2 + score) + h**0.5 * noise
