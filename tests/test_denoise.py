"""Denoising: predictions with increments, text states with increments, and the one trajectory."""

import itertools

import pytest
import torch
from conftest import full_edit, random_edit, randomise

from helpers import Edit, denoise
from helpers.denoise import (
    SAMPLERS,
    Sampling,
    encode,
    guided_pair,
    of_part,
    predict,
    rollout,
    trajectory,
)
from helpers.diffusion import add_noise, ddim_step
from helpers.parameters import Dense

PROMPTS = ["church", "a dog in the style of Noto"]


def noise(world, n=2, seed=0):
    return torch.randn(n, *world.latent_shape, generator=torch.Generator().manual_seed(seed))


# --- predictions and text states


def test_predict_is_the_network_with_the_edit_applied(tiny_world):
    """theta + delta by functional_call against the increments merged into the weights."""
    increments = randomise(Dense(tiny_world).leaves)
    x, t = noise(tiny_world), torch.tensor([10, 700])
    states = tiny_world.encode(["church", ""])
    ours = predict(tiny_world, increments, x, t, states)
    base = tiny_world.unet(x, t, states).sample
    with tiny_world.applied(Edit({name: value.detach() for name, value in increments.items()})):
        assert torch.equal(ours, tiny_world.unet(x, t, states).sample)
    assert torch.equal(base, predict(tiny_world, {}, x, t, states))
    assert not torch.allclose(ours, base)
    ours.sum().backward()
    assert all(value.grad is not None for value in increments.values())
    assert not any(p.requires_grad for p in tiny_world.unet.parameters())


def test_encode_is_the_text_encoder_with_the_edit_applied(tiny_world):
    delta = randomise(Dense(tiny_world, "text").leaves, scale=0.02)
    prompts = ["", "church", "a picture of a santa claus"]
    base = tiny_world.encode(prompts)
    assert torch.equal(encode(tiny_world, prompts), base)
    assert torch.equal(encode(tiny_world, prompts, {}), base)
    ours = encode(tiny_world, prompts, delta)
    with tiny_world.applied(Edit({name: value.detach() for name, value in delta.items()})):
        assert torch.equal(ours, tiny_world.encode(prompts))
        assert torch.equal(encode(tiny_world, prompts), tiny_world.encode(prompts))
    assert torch.equal(tiny_world.encode(prompts), base) and (ours - base).abs().max() > 1e-2
    ours.pow(2).sum().backward()
    moved = {name for name, value in delta.items() if value.grad.abs().max() > 0}
    assert any("token_embedding" in name for name in moved) and any("fc1" in n for n in moved)
    assert not any(p.requires_grad for p in tiny_world.pipe.text_encoder.parameters())
    with pytest.raises(ValueError, match="tokens"):
        encode(tiny_world, ["church " * 40], delta)


def test_each_part_takes_its_own_increments(tiny_world):
    """One dict of full names serves the text encoder and the UNet."""
    delta = {"unet.a": torch.ones(1), "text_encoder.a": torch.zeros(1), "unet.b.c": torch.ones(2)}
    assert list(of_part(delta, "unet")) == ["a", "b.c"] and list(of_part(delta, "vae")) == []
    both = (random_edit(tiny_world) + random_edit(tiny_world, group="text", scale=0.02)).delta
    unet, text = ({n: v for n, v in both.items() if n.startswith(p)} for p in ("unet.", "text_"))
    states = encode(tiny_world, PROMPTS, both)
    assert torch.equal(states, encode(tiny_world, PROMPTS, text))
    x, t = noise(tiny_world), torch.tensor([10, 700])
    ours = predict(tiny_world, both, x, t, states)
    assert torch.equal(ours, predict(tiny_world, unet, x, t, states))


def test_a_guided_pair_is_two_predictions(tiny_world):
    delta = random_edit(tiny_world).delta
    x, t = noise(tiny_world), torch.tensor([10, 700])
    states, null = tiny_world.encode(PROMPTS), tiny_world.encode([""])
    eps_null, eps_c = guided_pair(tiny_world, delta, x, t, states, null)
    alone = predict(tiny_world, delta, x, t, null.expand_as(states))
    assert torch.allclose(eps_null, alone, atol=1e-5)
    assert torch.allclose(eps_c, predict(tiny_world, delta, x, t, states), atol=1e-5)


# --- the trajectory


@pytest.mark.parametrize("guidance", [3.0, 1.0, 0.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trajectory_is_the_scheduler_s_own_steps(tiny_world, sampler, guidance):
    """Every triple: the latents before the step, and the guided prediction there."""
    how = Sampling(4, guidance, sampler)
    states, null = tiny_world.encode(PROMPTS), tiny_world.encode([""])
    triples = list(trajectory(tiny_world, states, noise(tiny_world), how))
    scheduler = how.scheduler(tiny_world)
    assert len(triples) == len(scheduler.timesteps) + 1
    x = noise(tiny_world) * scheduler.init_noise_sigma
    for t, (t_ours, x_ours, eps_ours) in zip(scheduler.timesteps, triples, strict=False):
        assert t_ours == t and torch.allclose(x_ours, x, atol=1e-4, rtol=1e-5)
        fed = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            eps_null, eps_c = (
                tiny_world.unet(fed, t, s).sample for s in (null.expand_as(states), states)
            )
        eps = eps_null + guidance * (eps_c - eps_null)
        assert torch.allclose(eps_ours, eps, atol=1e-4) and not eps_ours.requires_grad
        x = scheduler.step(eps, t, x).prev_sample
    t_end, x_end, eps_end = triples[-1]
    assert t_end is None and eps_end is None and torch.allclose(x_end, x, atol=1e-4, rtol=1e-5)


def test_a_trajectory_is_a_generator_that_may_be_left_and_started_again(tiny_world):
    how, states = Sampling(4, 3.0), tiny_world.encode(PROMPTS)
    first = next(trajectory(tiny_world, states, noise(tiny_world), how))
    whole = [list(trajectory(tiny_world, states, noise(tiny_world), how)) for _ in range(2)]
    assert torch.equal(first[2], whole[0][0][2])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*whole, strict=True))


def test_a_trajectory_takes_increments_and_a_null_of_one_s_own(tiny_world):
    how, states = Sampling(3, 3.0), tiny_world.encode(PROMPTS)
    edit = full_edit(tiny_world)
    edit = Edit({n: v for n, v in edit.delta.items() if n.startswith("unet.")})

    def end(**options):
        return list(trajectory(tiny_world, states, noise(tiny_world), how, **options))[-1][1]

    base, ours = end(), end(delta=edit.delta)
    with tiny_world.applied(edit):
        assert torch.equal(ours, end())
    assert (ours - base).abs().max() > 1e-3
    assert torch.equal(end(null=tiny_world.encode([""])), base)
    assert (end(null=tiny_world.encode(["dog"])) - base).abs().max() > 1e-3


# --- rollouts


@pytest.mark.parametrize("until", [0, 37, 500, 998])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_rollout_lands_on_t(tiny_world, steps, until):
    """One row by hand: DDIM down the grid, the last step cut short so that it ends on t."""
    states, null = tiny_world.encode(["church"]), tiny_world.encode([""])
    x_T, alpha_bar = noise(tiny_world, 1), tiny_world.alpha_bar
    grid = [round(1000 * (1 - k / steps)) - 1 for k in range(steps)]
    levels = [*(t for t in grid if t > until), until]
    x = x_T
    for t, below in itertools.pairwise(levels):
        with torch.no_grad():
            eps_null, eps_c = (tiny_world.unet(x, t, s).sample for s in (null, states))
        x = ddim_step(x, eps_null + 3.0 * (eps_c - eps_null), alpha_bar[t], alpha_bar[below])
    how = {"steps": steps, "guidance": 3.0}
    ours = rollout(tiny_world, {}, x_T, torch.tensor([until]), states, null, **how)
    assert torch.allclose(ours, x, atol=1e-4)


def test_a_rollout_is_the_trajectory_with_an_end(tiny_world):
    """A network that predicts the noise it was given leaves x_t = add_noise(x_0, eps, t) behind."""
    x_0, eps = noise(tiny_world, 3, 1), noise(tiny_world, 3, 2)
    alpha_bar, until = tiny_world.alpha_bar, torch.tensor([0, 400, 999])
    x_T = add_noise(x_0, eps, 999, alpha_bar)
    rows = torch.arange(3.0)[:, None, None].expand(3, 2, 3)  # states that carry their row's number

    class Truth(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        config = tiny_world.unet.config

        def forward(self, x, t, states):
            return type("Output", (), {"sample": eps[states[:, 0, 0].long()]})

    tiny_world.pipe.unet = Truth()
    how = Sampling(5, 1.0, "ddim")
    triples = list(trajectory(tiny_world, rows, x_T, how, null=rows[:1], until=until))
    assert [None if t is None else int(t) for t, _, _ in triples] == [999, 799, 599, 399, 199, None]
    assert [len(e) for _, _, e in triples[:-1]] == [2, 2, 2, 1, 1]  # arrived rows leave the batch
    expected = add_noise(x_0, eps, until, alpha_bar)
    torch.testing.assert_close(triples[-1][1], expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(triples[-1][1][2], x_T[2])  # t = T - 1 is the noise itself
    start = list(trajectory(tiny_world, rows[2:], x_T[2:], how, null=rows[:1], until=until[2:]))
    assert len(start) == 1 and torch.equal(start[0][1], x_T[2:])


def test_only_ddim_lands_on_a_t(tiny_world):
    states = tiny_world.encode(["church"])
    walk = trajectory(
        tiny_world, states, noise(tiny_world, 1), Sampling(4), until=torch.tensor([5])
    )
    with pytest.raises(ValueError, match=r"'dpm\+\+' cannot land on a t: use 'ddim'"):
        next(walk)


# --- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "heun"}, r"unknown sampler 'heun': choose from ddim, dpm\+\+, dpm"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": -3}, "steps is -3"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_sampling(options, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**options)


def test_the_default_sampling():
    assert Sampling() == Sampling(12, 5.0, "dpm++", None)
    assert {"ddim", "dpm++", "euler", "unipc", "pndm"} <= set(SAMPLERS)


def test_a_scheduler_is_fresh_each_time_and_the_world_s_is_left_alone(tiny_world):
    how = Sampling(3, sampler="dpm++")
    a, b = how.scheduler(tiny_world), how.scheduler(tiny_world)
    assert a is not b and len(a.timesteps) == 3
    assert type(tiny_world.pipe.scheduler).__name__ == "DDIMScheduler"
    assert torch.equal(a.alphas_cumprod, tiny_world.alpha_bar)
    assert denoise.Walk(tiny_world, how).scheduler is not a
