"""Methods that edit the text encoder, against their equations: few-shot unlearning, AdvUnlearn."""

import pytest
import torch
from conftest import build_tiny_world

from helpers import images, losses, unlearn
from helpers.denoise import encode, guided_pair, predict
from helpers.diffusion import noised
from helpers.images import concept_latents
from helpers.inversion import first_guess
from helpers.methods import advunlearn, fewshot
from helpers.parameters import TEXT_PARTS, text_names
from helpers.seeds import step_generator


@pytest.fixture(scope="module")
def world():
    return build_tiny_world()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(images, "CACHE", tmp_path_factory.getbasetemp() / "sampled")


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- which parameters


def test_parts_are_chosen_by_position(world):
    last = max(int(n.split(".layers.")[1][0]) for n in text_names(world) if ".layers." in n)
    chosen = text_names(world, "few-shot")
    assert set(text_names(world, "feed-forward")) < set(chosen)
    heads = set(chosen) - set(text_names(world, "feed-forward"))
    assert heads and all(f".layers.{last}.self_attn." in name for name in heads)
    assert text_names(world, "self-attention", last) == sorted(heads, key=text_names(world).index)
    assert set(text_names(world, "all")) == {n for n in world.parameters() if n[:4] == "text"}


@pytest.mark.parametrize(
    ("part", "block", "said"),
    [
        ("all", 9, "has blocks 0 to"), ("embeddings", 0, "nothing in block 0"),
        ("heads", None, "choose from"),
    ],
)  # fmt: skip
def test_parts_that_are_not_there(world, part, block, said):
    with pytest.raises(ValueError, match=said):
        text_names(world, part, block)


@pytest.mark.parametrize("part", TEXT_PARTS)
@pytest.mark.parametrize("method", ["fewshot", "advunlearn"])
def test_only_that_part_of_the_encoder_is_edited(world, method, part):
    quick = {"fewshot": {"images": 2}, "advunlearn": {"warm_up": 1, "rollout_steps": 2}}[method]
    edit = unlearn(world, "church", method, group=part, steps=1, progress=False, **quick)
    assert set(edit.delta) == set(text_names(world, part))


# --- few-shot unlearning


def test_ascent_is_minus_the_loss_of_textual_inversion(world):
    eps, noise = torch.randn(2, 3, 4, 4, 4, generator=generator()).unbind(0)
    assert fewshot.ascent(eps, noise, None) == pytest.approx(-losses.reconstruction(eps, noise))


def test_a_bound_leaves_alone_what_has_gone_far_enough():
    """Errors 1 and 4, bound 3: mean of 2 and 0; only the first still has a gradient."""
    eps = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 2.0)]).requires_grad_()
    loss = fewshot.ascent(eps, torch.zeros(2, 1, 2, 2), 3.0)
    loss.backward()
    assert loss.item() == 1.0 and eps.grad[0].abs().min() > 0 and eps.grad[1].abs().max() == 0


def test_a_step_raises_the_error_of_the_prompt(world):
    edit = unlearn(world, "church", "fewshot", steps=3, lr=1e-3, images=2, progress=False)
    latents, prompts, _ = concept_latents(world, ["church"], 2, 0)
    x_t, t, noise = noised(latents[[0, 1] * 8], world.alpha_bar, generator())

    def error(delta):
        with torch.no_grad():
            states = encode(world, prompts * 8, delta)
            return losses.reconstruction(predict(world, {}, x_t, t, states), noise).item()

    assert error(edit.delta) > error({})


def test_fewer_steps_are_the_earlier_encoder(world, monkeypatch):
    """So that epochs can be compared without a file for each: as four steps had it after two."""
    seen, plain = {}, fewshot.problem

    def watched(*given):
        found = plain(*given)

        def look(done: int) -> None:
            seen[done] = {name: leaf.detach().clone() for name, leaf in found.leaves.items()}

        found.after_step = look
        return found

    monkeypatch.setattr(fewshot, "problem", watched)
    unlearn(world, "church", "fewshot", steps=4, images=2, progress=False)
    middle = seen[2]
    short = unlearn(world, "church", "fewshot", steps=2, images=2, progress=False)
    assert all(torch.equal(short.delta[name], value) for name, value in middle.items())
    assert fewshot.Options().steps == 5 * 4 // 2  # epochs x images / batch


# --- AdvUnlearn


def defender(world, **options) -> advunlearn.Defender:
    return advunlearn.Defender(world, ["church"], advunlearn.Options(rollout_steps=2, **options))


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_before_training_both_losses_are_known(world, eta):
    """Retain 0, erase (1 + eta)^2 mean || eps_c - eps_null ||^2."""
    made = defender(world, eta=eta, warm_up=1)
    _, x_t, t = made.drawn(generator(1))
    states = made.states.expand(2, -1, -1)
    null, c = guided_pair(world, {}, x_t, t, states, made.null)
    erase = made.erase(0, generator(1)).item()
    assert erase == pytest.approx((1 + eta) ** 2 * (c - null).square().mean().item(), rel=1e-3)
    assert made.hold(generator(2)).item() == pytest.approx(0, abs=1e-9)


def test_without_an_attack_it_is_esd_on_the_encoder(world):
    plain = defender(world, attack_steps=0, warm_up=0).erase(5, generator(3))
    warming = defender(world, warm_up=9).erase(5, generator(3))
    assert plain.item() == warming.item()


def test_the_attack_lowers_its_loss_and_keeps_the_length(world):
    made = defender(world, attack_steps=8, attack_lr=0.05)
    attacker, (_, x_t, t) = made.attacker, made.drawn(generator(4))
    prompts, states = ["church", "church"], made.states.expand(2, -1, -1)
    # an encoder that has unlearnt something, so that there is something to find
    leaves = {n: leaf + 0.05 * torch.randn(leaf.shape, generator=generator(5)) for n, leaf in
              made.leaves.items()}  # fmt: skip
    eps_c = guided_pair(world, {}, x_t, t, states, made.null)[1].detach()
    first = first_guess(world, 1, None, 7)
    found = attacker.search(prompts, leaves, x_t, t, eps_c, 7)
    before, after = (attacker.loss(prompts, d, leaves, x_t, t, eps_c) for d in (first, found))
    assert after < before
    assert attacker.reads(prompts, found, leaves).shape == states.shape


def test_signed_steps_are_of_one_length(world):
    made = defender(world, attack="sign", attack_steps=1, attack_lr=0.05)
    _, x_t, t = made.drawn(generator(4))
    eps_c = torch.zeros_like(x_t)
    found = made.attacker.search(["church"] * 2, made.leaves, x_t, t, eps_c, 7)
    moved = (found - first_guess(world, 1, None, 7)).abs()
    assert moved.allclose(torch.full_like(moved, 0.05), rtol=1e-3)


def test_in_turn_or_together(world):
    how = {"steps": 2, "warm_up": 9, "rollout_steps": 2, "progress": False}
    turns = unlearn(world, "church", "advunlearn", mode="iter", **how).history
    assert ["alignment" in row for row in turns] == [True, False]
    together = unlearn(world, "church", "advunlearn", **how).history
    assert all({"alignment", "retain"} <= row.keys() for row in together)


def test_the_attacker_s_seed_is_the_step_s(world):
    made = defender(world, attack_steps=1, warm_up=0)
    a, b = (made.erase(0, step_generator(0, 0)).item() for _ in range(2))
    assert a == b
