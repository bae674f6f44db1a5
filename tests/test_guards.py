"""Guards: what wraps the denoiser while sampling, and changes no weight."""

import operator
from dataclasses import dataclass

import pytest
import torch
from conftest import full_edit, random_edit

from helpers import Edit, guards, sample
from helpers.denoise import Sampling, guided_pair, predict, trajectory
from helpers.diffusion import steer_away
from helpers.guards import Guard, NegativePrompt, guard_from

FAST = {"steps": 3, "progress": False}
PROMPTS = ["church", "a dog in the style of Noto"]


def noise(world, n=2):
    return torch.randn(n, *world.latent_shape, generator=torch.Generator().manual_seed(0))


def walk(world, edit, sampling, x_T, prompts=PROMPTS):
    """All triples of a trajectory under an edit."""
    with world.applied(edit):
        return list(trajectory(world, world.encode(prompts), x_T, sampling, prompts=prompts))


@pytest.fixture
def toy(monkeypatch):
    """A guard that uses all three places, and writes down where it was called."""
    monkeypatch.setattr(guards, "GUARDS", dict(guards.GUARDS))
    calls = []

    @dataclass(frozen=True)
    class Toy(Guard):
        shift: float = 1.0

        def states(self, world, prompts, states):
            calls.append(("states", list(prompts)))
            return states + self.shift

        def latents(self, world, x_t, t, states):
            calls.append(("latents", int(t)))
            return 0.5 * x_t

        def eps(self, world, x_t, t, eps_null, eps_c, eps):
            calls.append(("eps", t.tolist()))
            return 2.0 * eps

    Toy.calls = calls
    return Toy


@pytest.mark.parametrize("guidance", [5.0, 1.0, 0.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_negative_prompt_is_steer_away_restated(tiny_world, guidance, sampler):
    """The trajectory with the guard against the same steps with ``diffusion.steer_away``."""
    how = Sampling(4, guidance, sampler)
    edit = Edit({}, guards=(NegativePrompt("church", 2.0),))
    steps = walk(tiny_world, edit, how, noise(tiny_world))
    states = tiny_world.encode(PROMPTS)
    null, concept = (tiny_world.encode([p]).expand_as(states) for p in ("", "church"))
    scheduler = how.scheduler(tiny_world)
    x_t = noise(tiny_world) * scheduler.init_noise_sigma
    for t, (_, ours, eps_ours) in zip(scheduler.timesteps, steps, strict=False):
        fed = scheduler.scale_model_input(x_t, t)
        with torch.no_grad():
            predictions = [tiny_world.unet(fed, t, s).sample for s in (null, states, concept)]
        eps = steer_away(*predictions, guidance, 2.0)
        assert torch.allclose(ours, x_t, atol=1e-4) and torch.allclose(eps_ours, eps, atol=1e-4)
        x_t = scheduler.step(eps, t, x_t).prev_sample
    assert torch.allclose(steps[-1][1], x_t, atol=1e-4)


def test_a_negative_prompt_of_no_strength_changes_nothing(tiny_world):
    base = sample(tiny_world, PROMPTS, [0, 1], **FAST)
    none = Edit({}, guards=(NegativePrompt("church", 0.0),))
    some = Edit({}, guards=(NegativePrompt("church", 2.0),))
    assert torch.equal(sample(tiny_world, PROMPTS, [0, 1], none, **FAST), base)
    assert (sample(tiny_world, PROMPTS, [0, 1], some, **FAST) - base).abs().max() > 1e-3
    assert torch.equal(sample(tiny_world, PROMPTS, [0, 1], **FAST), base)


def test_a_guard_acts_on_states_latents_and_noise(tiny_world, toy):
    how = Sampling(2, 3.0, "ddim")
    steps = walk(tiny_world, Edit({}, guards=(toy(1.0),)), how, noise(tiny_world))
    times = how.scheduler(tiny_world).timesteps.tolist()
    assert toy.calls == [
        ("states", PROMPTS),
        *(call for t in times for call in (("latents", t), ("eps", [t, t]))),
    ]
    (t, x_t, eps), *_ = steps
    assert torch.equal(x_t, 0.5 * noise(tiny_world))
    states, null = tiny_world.encode(PROMPTS) + 1.0, tiny_world.encode([""])
    with torch.no_grad():
        eps_null, eps_c = guided_pair(tiny_world, {}, x_t, t.expand(2), states, null)
    assert torch.allclose(eps, 2.0 * (eps_null + 3.0 * (eps_c - eps_null)), atol=1e-5)
    stepped = how.scheduler(tiny_world).step(eps, t, x_t).prev_sample  # from what the guard left
    assert torch.allclose(steps[1][1], 0.5 * stepped, atol=1e-6)


def test_guards_act_in_turn(tiny_world, toy):
    both = Edit({}, guards=(toy(1.0), NegativePrompt("church", 2.0)))
    x_T, how = noise(tiny_world), Sampling(1, 3.0, "ddim")
    (_, x_t, eps), _ = walk(tiny_world, both, how, x_T)
    (_, _, doubled), _ = walk(tiny_world, Edit({}, guards=(toy(1.0),)), how, x_T)
    t = how.scheduler(tiny_world).timesteps.expand(2)
    eps_concept, eps_null = (
        predict(tiny_world, {}, x_t, t, tiny_world.encode([p]).expand(2, -1, -1))
        for p in ("church", "")
    )
    assert torch.allclose(eps, doubled - 2.0 * (eps_concept - eps_null), atol=1e-4)


def test_a_plain_guard_changes_nothing(tiny_world):
    base = sample(tiny_world, PROMPTS, [0, 1], **FAST)
    plain = Edit({}, guards=(Guard(),))
    assert torch.equal(sample(tiny_world, PROMPTS, [0, 1], plain, **FAST), base)


def test_the_algebra_of_guards(tiny_world):
    a = random_edit(tiny_world)
    g = Edit({}, guards=(NegativePrompt("dog", 2.0),), meta={"concepts": ["dog"]})
    both = a + g
    assert both.guards == g.guards and both.erased == ["church", "dog"]
    back = both - g
    assert back.guards == () and back.erased == ["church"]
    assert all(torch.equal(back.delta[n], a.delta[n]) for n in a.delta)
    assert (g + g).guards == 2 * g.guards and (g + g - g).guards == g.guards
    with pytest.raises(ValueError, match=r"no NegativePrompt\(phrase='dog'.* to take away"):
        a - g
    stronger = Edit({}, guards=(NegativePrompt("dog", 3.0),))
    with pytest.raises(ValueError, match="to take away"):
        both - stronger
    for factor in (2.0, 0.0, -1.0):
        with pytest.raises(ValueError, match=r"guard has no .*strength"):
            factor * both
    assert (1.0 * both).guards == g.guards
    with pytest.raises(ValueError, match="guard has no -1-fold"):
        operator.neg(g)


def test_hiding_and_guards_do_not_go_together(tiny_world):
    """A guard's own passes have other batches than the one that hides tokens."""
    edit = full_edit(tiny_world)
    with pytest.raises(ValueError, match=r"NegativePrompt.*hide="):
        sample(tiny_world, ["church"], [0], edit, hide="church", **FAST)
    assert tiny_world.guards == () and not tiny_world.is_edited


def test_guards_are_described_by_name_and_options(toy):
    guard = NegativePrompt("dog", 3.0)
    options = {"phrase": "dog", "strength": 3.0}
    assert guard.described() == {"name": "NegativePrompt", "options": options}
    assert guard_from(guard.described()) == guard
    assert guard_from(toy(2.0).described()) == toy(2.0)
    with pytest.raises(ValueError, match="unknown guard 'Nothing': choose from NegativePrompt"):
        guard_from({"name": "Nothing"})
