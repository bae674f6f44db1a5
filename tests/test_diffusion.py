"""helpers/diffusion.py against diffusers' schedulers, hand values and invariants."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from diffusers.image_processor import VaeImageProcessor

from helpers import diffusion

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def ddpm(steps: int = 1000) -> DDPMScheduler:
    scheduler = DDPMScheduler(**SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def ddim(steps: int = 25) -> DDIMScheduler:
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    return scheduler


def double(scheduler):
    """The same scheduler in float64, where two orders of operations agree to about 1e-13."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.betas = scheduler.betas.double()
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def alpha_bar() -> torch.Tensor:
    return ddpm().alphas_cumprod


# add_noise and predict_x0


def test_add_noise_equals_diffusers(alpha_bar):
    x_0, noise = random(5, 4, 3, 3), random(5, 4, 3, 3, seed=1)
    t = torch.tensor([0, 1, 250, 700, 999])
    # the same four operations in the same order: equal to the last bit
    theirs = ddpm().add_noise(x_0, noise, t)
    assert torch.equal(diffusion.add_noise(x_0, noise, t, alpha_bar), theirs)


def test_add_noise_by_hand():
    alpha_bar = torch.tensor([1.0, 0.64])
    x_t = diffusion.add_noise(
        torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1]), alpha_bar
    )
    assert torch.allclose(x_t, torch.tensor([[2.0], [0.8 * 2 + 0.6 * 1]]))


def test_predict_x0_undoes_add_noise(alpha_bar):
    x_0, noise = (random(4, 2, 3, 3, seed=seed, dtype=torch.float64) for seed in (0, 1))
    t = torch.tensor([0, 10, 500, 999])
    x_t = diffusion.add_noise(x_0, noise, t, alpha_bar.double())
    # dividing by sqrt(alpha_bar_999), about 0.07, magnifies rounding of 1e-16 some fifteen times
    assert torch.allclose(diffusion.predict_x0(x_t, noise, t, alpha_bar.double()), x_0, atol=1e-13)


def test_an_int_serves_the_whole_batch(alpha_bar):
    x_0, noise = random(3, 2, 2, 2), random(3, 2, 2, 2, seed=1)
    every = diffusion.add_noise(x_0, noise, torch.tensor([7, 7, 7]), alpha_bar)
    assert torch.equal(diffusion.add_noise(x_0, noise, 7, alpha_bar), every)
    assert torch.equal(diffusion.add_noise(x_0, noise, torch.tensor(7), alpha_bar), every)


def test_noised_is_add_noise_with_the_generators_numbers(alpha_bar):
    for x_0 in (random(6, 4, 3, 3), random(6, 2, dtype=torch.float64), random(6, 4, 3, 3).half()):
        x_t, t, noise = diffusion.noised(x_0, alpha_bar, torch.Generator().manual_seed(4))
        generator = torch.Generator().manual_seed(4)
        first = torch.randn(x_0.shape, generator=generator).to(x_0.dtype)  # the noise first
        assert torch.equal(noise, first)
        assert torch.equal(t, torch.randint(1000, (6,), generator=generator))
        assert torch.equal(x_t, diffusion.add_noise(x_0, noise, t, alpha_bar))
        assert x_t.shape == noise.shape == x_0.shape and t.shape == (6,)
        assert x_t.dtype == noise.dtype == x_0.dtype and t.dtype == torch.int64
        assert x_t.device == noise.device == t.device == x_0.device


def test_noised_samples_every_timestep_equally_often(alpha_bar):
    generator = torch.Generator().manual_seed(0)
    _, t, noise = diffusion.noised(torch.zeros(20_000, 1), alpha_bar, generator)
    assert 0 <= t.min() < 10 and 989 < t.max() <= 999
    # counts of a tenth each: four standard deviations of sqrt(20000 * 0.1 * 0.9), about 42
    assert (torch.bincount(t // 100, minlength=10) - 2000).abs().max() < 170
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    generator.manual_seed(0)
    _, t, _ = diffusion.noised(torch.zeros(200, 1), alpha_bar[:3], generator)
    assert t.unique().tolist() == [0, 1, 2]  # of the schedule that is given, the last one too


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 5), (3, 4, 2, 2)])
def test_any_number_of_axes(alpha_bar, shape):
    x_0, noise, t = random(*shape), random(*shape, seed=1), torch.tensor([1, 2, 3])
    alone = [
        diffusion.add_noise(x_0[i : i + 1], noise[i : i + 1], t[i], alpha_bar) for i in range(3)
    ]
    assert torch.equal(diffusion.add_noise(x_0, noise, t, alpha_bar), torch.cat(alone))


def test_half_precision_keeps_its_dtype_and_the_noise_of_early_steps(alpha_bar):
    zero = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    noise = torch.ones_like(zero)
    x_t = diffusion.add_noise(zero, noise, 0, alpha_bar)
    assert x_t.dtype == torch.float16
    # fp16 has 11 bits, a relative step of 2^-11; 1 - alpha_bar taken in fp16 would put it 7 % off
    assert x_t[0, 0, 0, 0].item() == pytest.approx(0.00085**0.5, rel=2**-10)


@pytest.mark.parametrize("t", [-1, 1000, [0, -1], [5, 1000]])
def test_timesteps_outside_the_schedule_raise(alpha_bar, t):
    x = random(2, 1, 2, 2)
    with pytest.raises(ValueError, match="0 to 999"):
        diffusion.add_noise(x, x, torch.tensor(t), alpha_bar)
    with pytest.raises(ValueError, match="0 to 999"):
        diffusion.predict_x0(x, x, torch.tensor(t), alpha_bar)


def test_variance_is_preserved(alpha_bar):
    x_0, noise = random(100_000, 1), random(100_000, 1, seed=1)
    for t in (0, 500, 999):
        # four standard errors of a variance from 1e5 samples: sqrt(2 / 1e5), about 0.0045
        variance = diffusion.add_noise(x_0, noise, t, alpha_bar).var().item()
        assert variance == pytest.approx(1, abs=0.018)


# the steps


@pytest.mark.parametrize("t", [961, 481, 41, 1])
def test_ddim_step_equals_diffusers(t):
    scheduler, x, eps = ddim(), random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    theirs = scheduler.step(eps, t, x).prev_sample
    now = scheduler.alphas_cumprod[t]
    prev = scheduler.alphas_cumprod[max(t - 40, 0)]  # final_alpha_cumprod is the first
    # the same operations in the same order
    assert torch.equal(diffusion.ddim_step(x, eps, now, prev), theirs)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.98, 1.0])
def test_ddpm_step_equals_diffusers(steps, part):
    scheduler = double(ddpm(steps))
    t = scheduler.timesteps[round(part * (steps - 1))].item()
    x, eps = (random(2, 4, 3, 3, seed=seed, dtype=torch.float64) for seed in (0, 1))
    theirs = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
    z = random(2, 4, 3, 3, seed=5, dtype=torch.float64)  # what diffusers drew
    now = scheduler.alphas_cumprod[t]
    prev = scheduler.alphas_cumprod[t - 1000 // steps] if t >= 1000 // steps else scheduler.one
    # we take the mean from DDPM's Eq. 11 and diffusers from Eq. 7: equal on paper, so float64
    # leaves rounding only. diffusers floors the variance at 1e-20 and adds no noise at t = 0;
    # ours is 0 there by itself.
    assert torch.allclose(diffusion.ddpm_step(x, eps, now, prev, z), theirs, rtol=0, atol=1e-9)


def test_ddpm_step_in_single_precision():
    scheduler, x, eps = ddpm(), random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    for t in (999, 500, 1):
        theirs = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        a = scheduler.alphas_cumprod
        # 1 - alpha loses up to three of fp32's seven digits where alpha is 0.999:
        # 1e-4 of a share of about 0.03
        assert torch.allclose(
            diffusion.ddpm_step(x, eps, a[t], a[t - 1], random(2, 4, 3, 3, seed=5)),
            theirs,
            atol=2e-5,
        )


def test_a_ddim_step_with_the_true_noise_stays_on_the_forward_path(alpha_bar):
    x_0, noise = random(2, 1, 3, 3), random(2, 1, 3, 3, seed=1)
    x_t, x_s = (diffusion.add_noise(x_0, noise, t, alpha_bar) for t in (600, 200))
    down = diffusion.ddim_step(x_t, noise, alpha_bar[600], alpha_bar[200])
    up = diffusion.ddim_step(x_s, noise, alpha_bar[200], alpha_bar[600])
    assert torch.allclose(down, x_s, atol=1e-5) and torch.allclose(up, x_t, atol=1e-5)


def test_last_steps_give_x0(alpha_bar):
    x_t, eps = random(2, 1, 3, 3), random(2, 1, 3, 3, seed=1)
    x_0 = diffusion.predict_x0(x_t, eps, 3, alpha_bar)
    assert torch.allclose(diffusion.ddim_step(x_t, eps, alpha_bar[3], 1.0), x_0, atol=1e-5)
    last = diffusion.ddpm_step(x_t, eps, alpha_bar[3], 1.0)  # no noise: variance 0
    assert torch.allclose(last, x_0, atol=1e-5)


def test_ddpm_step_samples_its_own_noise():
    x = torch.zeros(1, 1, 100, 100)
    torch.manual_seed(3)
    first = diffusion.ddpm_step(x, x, 0.3, 0.6)
    torch.manual_seed(3)
    assert torch.equal(diffusion.ddpm_step(x, x, 0.3, 0.6), first)
    # sigma^2 = (0.4 / 0.7) (1 - 0.3 / 0.6) from 1e4 samples: four standard errors are
    # 4 sqrt(2 / 1e4), about 6 %
    assert first.var().item() == pytest.approx(0.4 / 0.7 * 0.5, rel=0.06)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_step_equals_diffusers(eta):
    scheduler = ddim()
    x, eps, z = (random(2, 4, 3, 3, seed=seed) for seed in range(3))
    theirs = scheduler.step(eps, 481, x, eta=eta, variance_noise=z).prev_sample
    now, prev = scheduler.alphas_cumprod[481], scheduler.alphas_cumprod[441]
    # sums of three terms of order one in fp32, 6e-8 each, in another order
    assert torch.allclose(diffusion.eta_step(x, eps, now, prev, eta, z), theirs, atol=1e-6)


def test_eta_step_holds_ddim_and_ddpm():
    x, eps, z = (random(2, 4, 3, 3, seed=seed, dtype=torch.float64) for seed in range(3))
    for now, prev in ((0.005, 0.01), (0.3, 0.6), (0.99, 1.0)):
        zero, one = (diffusion.eta_step(x, eps, now, prev, eta, z) for eta in (0.0, 1.0))
        assert torch.allclose(zero, diffusion.ddim_step(x, eps, now, prev), atol=1e-12)
        assert torch.allclose(one, diffusion.ddpm_step(x, eps, now, prev, z), atol=1e-12)


# guidance


def test_guide():
    null, c = random(2, 3), random(2, 3, seed=1)
    assert torch.equal(diffusion.guide(null, c, 0.0), null)
    assert torch.allclose(diffusion.guide(null, c, 1.0), c, atol=1e-6)
    w = 6.5  # Ho and Salimans write (1 + w) eps_c - w eps_null
    assert torch.allclose(diffusion.guide(null, c, 1 + w), (1 + w) * c - w * null, atol=1e-5)


def test_steer_away():
    null, c, concept = (random(2, 3, seed=seed) for seed in range(3))
    guided = diffusion.guide(null, c, 5.0)
    assert torch.equal(diffusion.steer_away(null, c, concept, 5.0, 0.0), guided)
    assert torch.equal(diffusion.steer_away(null, c, null, 5.0, 3.0), guided)


def test_snr_crosses_one_where_the_shares_are_equal(alpha_bar):
    ratio = diffusion.snr(alpha_bar)
    t = int((ratio > 1).sum())
    assert alpha_bar[t - 1] > 0.5 > alpha_bar[t]
    assert (ratio.diff() < 0).all()


# latents


def test_latents_follow_the_pipelines_conventions(tiny_world):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vae: AutoencoderKL = tiny_world.pipe.vae
    vae.register_to_config(scaling_factor=0.5)
    latents = diffusion.to_latents(tiny_world, images)
    assert latents.shape == (2, *tiny_world.latent_shape)
    assert torch.allclose(latents, vae.encode(images * 2 - 1).latent_dist.mean * 0.5)
    decoded = vae.decode(latents / 0.5).sample
    theirs = VaeImageProcessor().postprocess(decoded, output_type="pt")
    assert torch.equal(diffusion.to_images(tiny_world, latents), theirs)


# continuous time


def test_mixture_score_is_the_gradient_of_the_log_density():
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
    std, a = 0.2, 0.4
    x = random(6, 2, dtype=torch.float64).requires_grad_()
    v = a * std**2 + 1 - a
    squares = (x[:, None] - a**0.5 * means).pow(2).sum(-1)
    (gradient,) = torch.autograd.grad(torch.logsumexp(-squares / (2 * v), 1).sum(), x)
    assert torch.allclose(diffusion.mixture_score(x.detach(), a, means, std), gradient, atol=1e-12)


def test_one_standard_gaussian_has_score_minus_x_and_stays_put():
    x, z = random(50_000, 2), random(50_000, 2, seed=1)
    score = diffusion.mixture_score(x, 0.3, torch.zeros(1, 2), 1.0)
    assert torch.allclose(score, -x, atol=1e-6)
    # the ODE does not move it at all
    assert torch.allclose(diffusion.reverse_step(x, score, 0.1), x, atol=1e-6)
    # the SDE keeps its variance up to (tau / 2)^2 and the four standard errors of 1e5 samples
    variance = diffusion.reverse_step(x, score, 0.1, z).var().item()
    assert variance == pytest.approx(1, abs=0.0025 + 0.018)


def test_a_small_ddim_step_is_a_step_of_the_probability_flow():
    x, eps, now = random(5, 2, dtype=torch.float64), random(5, 2, seed=1, dtype=torch.float64), 0.5
    errors = []
    for tau in (1e-2, 1e-3):
        prev = now * torch.exp(torch.tensor(tau, dtype=torch.float64))
        ours = diffusion.reverse_step(x, -eps / (1 - now) ** 0.5, tau)
        errors.append((diffusion.ddim_step(x, eps, now, prev) - ours).abs().max().item())
    # a first-order method: a tenth of the step, a hundredth of the error
    assert errors[1] < 0.02 * errors[0]


def test_reverse_steps_return_to_the_data(alpha_bar):
    means, std, n = torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 0.1, 2000
    levels = torch.cat([torch.ones(1), alpha_bar])[range(0, 1001, 5)].flip(0)
    for noisy in (False, True):
        x, generator = random(n, 2, seed=1), torch.Generator().manual_seed(2)
        for now, prev in itertools.pairwise(levels):
            z = torch.randn(n, 2, generator=generator) if noisy else None
            score = diffusion.mixture_score(x, now, means, std)
            x = diffusion.reverse_step(x, score, torch.log(prev / now), z)
        nearest = torch.cdist(x, means).min(1)
        # sqrt(pi / 2) std is 0.125; the coarse steps add some
        assert nearest.values.mean().item() < 0.25
        # four standard errors: 0.045
        assert nearest.indices.float().mean().item() == pytest.approx(0.5, abs=0.05)
