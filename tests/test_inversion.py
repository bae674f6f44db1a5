"""Soft tokens, textual inversion and the M-Score on a world of random weights."""

import pytest
import torch
from conftest import random_edit

from helpers import inversion, metrics, sample
from helpers.denoise import encode
from helpers.diffusion import add_noise, to_latents
from helpers.evaluation import memory
from helpers.inversion import Inversion

FAST = {"steps": 3, "batch_size": 2, "progress": False}
SHORT = {"steps": 2, "progress": False}


def rows_of(world, words):
    """The embedding layer's rows of some words."""
    ids = world.pipe.tokenizer(words, add_special_tokens=False).input_ids
    return world.pipe.text_encoder.get_input_embeddings().weight[ids].detach().clone()


def some_edit(world):
    return random_edit(world, group="xattn", scale=0.05)


@pytest.fixture
def images(tiny_world):
    size = tiny_world.image_size
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_path_with_gradients_equals_the_pipelines(tiny_world):
    prompts = ["", "church", "a picture of a santa claus"]
    assert torch.equal(encode(tiny_world, prompts), tiny_world.encode(prompts))


def test_a_words_own_rows_as_soft_tokens_are_the_word(tiny_world):
    rows = rows_of(tiny_world, "santa claus")
    written = ["a picture of a santa claus", "santa claus", "a picture of a church"]
    expected = tiny_world.encode(written)
    with inversion.soft_tokens(tiny_world, rows) as soft:
        prompts = [f"a picture of a {soft}", soft, "a picture of a church"]
        differs = (tiny_world.token_ids(prompts) != tiny_world.token_ids(written)).sum(1)
        assert differs.tolist() == [len(rows), len(rows), 0]
        assert torch.equal(tiny_world.encode(prompts), expected)
        by_rows = sample(tiny_world, [f"a picture of a {soft}"], [3], **SHORT)
    by_word = sample(tiny_world, ["a picture of a santa claus"], [3], **SHORT)
    assert torch.equal(by_rows, by_word)


def test_the_hook_leaves_with_the_block(tiny_world):
    before = tiny_world.encode(["church"])
    table = tiny_world.pipe.text_encoder.get_input_embeddings().weight.clone()
    rows = torch.randn(2, table.shape[1])
    with pytest.raises(KeyError), inversion.soft_tokens(tiny_world, rows) as soft:
        inside = tiny_world.encode([soft])
        raise KeyError
    assert not torch.equal(tiny_world.encode([soft]), inside)  # read as the BOS token again
    assert torch.equal(tiny_world.encode(["church"]), before)
    assert torch.equal(tiny_world.pipe.text_encoder.get_input_embeddings().weight, table)


def test_gradients_reach_every_soft_token_and_respect_the_causal_mask(tiny_world):
    v = rows_of(tiny_world, "santa claus").requires_grad_(True)
    with inversion.soft_tokens(tiny_world, v) as soft:
        states = encode(tiny_world, [f"a picture of a {soft}"])[0]
    (before,) = torch.autograd.grad(states[:5].pow(2).sum(), v, retain_graph=True)
    (last,) = torch.autograd.grad(states[-1].pow(2).sum(), v)
    assert before.abs().max() == 0 and last.abs().sum(1).min() > 0


def test_soft_tokens_refuse_another_width_and_half_a_phrase(tiny_world):
    narrow, right = torch.zeros(2, 5), torch.zeros(2, 16)
    wants = pytest.raises(ValueError, match=r"wants \(n, 16\)")
    with wants, inversion.soft_tokens(tiny_world, narrow):
        pass
    half = pytest.raises(ValueError, match="phrase of 2")
    with inversion.soft_tokens(tiny_world, right), half:
        tiny_world.encode([tiny_world.pipe.tokenizer.bos_token])


def test_norm_control_by_hand():
    v = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    pulled = inversion.pulled_to_norm
    assert torch.allclose(pulled(v, 1.0, 0.5), torch.tensor([[1.8, 2.4], [0.0, 1.0]]))
    assert torch.allclose(pulled(v, 2.0, 1.0).norm(dim=1), torch.tensor([2.0, 2.0]))
    assert torch.allclose(pulled(v, 9.0, 0.0), v)


def test_norm_control_follows_every_step(tiny_world, images):
    """The last one too: with a full pull, what is found has the usual norm."""
    found, _ = inversion.invert(tiny_world, images, tokens=2, norm_pull=1.0, lr=0.1, **FAST)
    usual = inversion.usual_norm(tiny_world)
    assert found.norm(dim=1).tolist() == pytest.approx([usual, usual], rel=1e-5)
    free, _ = inversion.invert(tiny_world, images, tokens=2, norm_pull=0.0, lr=0.1, **FAST)
    assert (free.norm(dim=1) - usual).abs().max() > 1e-2


def test_the_first_guess_is_a_word_then_random_rows_of_usual_length(tiny_world):
    word = rows_of(tiny_world, "dog")
    guess = inversion.first_guess(tiny_world, len(word) + 2, "dog", 0)
    assert torch.equal(guess[: len(word)], word)
    usual = inversion.usual_norm(tiny_world)
    assert guess[len(word) :].norm(dim=1).tolist() == pytest.approx([usual, usual], rel=1e-5)
    first = inversion.first_guess(tiny_world, 1, "santa claus", 0)
    assert torch.equal(first, rows_of(tiny_world, "santa claus")[:1])
    a, b = (inversion.first_guess(tiny_world, 1, None, seed) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_inversion_is_seeded_and_changes_nothing_else(tiny_world, images):
    before = {n: p.clone() for n, p in tiny_world.parameters().items()}
    a, history = inversion.invert(tiny_world, images, tokens=2, **FAST)
    b, _ = inversion.invert(tiny_world, images, tokens=2, **FAST)
    assert a.shape == (2, 16) and torch.equal(a, b) and len(history) == 3
    other, _ = inversion.invert(tiny_world, images, tokens=2, seed=1, **FAST)
    edit = some_edit(tiny_world)
    edited, _ = inversion.invert(tiny_world, images, tokens=2, edit=edit, **FAST)
    assert not torch.equal(a, other) and not torch.equal(a, edited)
    assert all(torch.equal(p, before[n]) for n, p in tiny_world.parameters().items())
    start, history = inversion.invert(tiny_world, images, start="dog", **{**FAST, "steps": 0})
    assert torch.equal(start, rows_of(tiny_world, "dog")[:1]) and history == []
    assert not tiny_world.is_edited


def test_inversion_sees_an_edit_of_the_text_encoder(tiny_world, images):
    edit = random_edit(tiny_world, group="text", scale=0.02)
    a, b = (inversion.invert(tiny_world, images, edit=e, **FAST)[0] for e in (None, edit))
    assert not torch.equal(a, b)


def test_inversion_lowers_the_denoising_loss(tiny_world, images):
    x_0 = to_latents(tiny_world, images).repeat(16, 1, 1, 1)
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.randint(1000, (len(x_0),), generator=generator)
    x_t = add_noise(x_0, noise, t, tiny_world.alpha_bar)

    @torch.no_grad()
    def loss(v):
        with inversion.soft_tokens(tiny_world, v) as soft:
            states = tiny_world.encode([f"a picture of a {soft}"]).expand(len(x_0), -1, -1)
        return (tiny_world.unet(x_t, t, states).sample - noise).pow(2).mean().item()

    first = inversion.first_guess(tiny_world, 2, None, 0)
    options = {"steps": 30, "lr": 5e-2, "batch_size": 8, "norm_pull": 0.0}
    found, _ = inversion.invert(tiny_world, images, tokens=2, progress=False, **options)
    assert loss(found) < loss(first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "tokens is 0: give a whole number, 1 or more"),
        ({"template": "a picture"}, r"lacks \{c\}"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_inversion_refuses(tiny_world, images, options, said):
    with pytest.raises(ValueError, match=said):
        inversion.invert(tiny_world, images, **{**FAST, **options})
    with pytest.raises(ValueError, match=said):
        Inversion(**options)
    with pytest.raises(ValueError, match="at least one"):
        inversion.invert(tiny_world, images[:0], **FAST)
    with pytest.raises(ValueError, match="of shape"):
        inversion.invert(tiny_world, images[..., :5], **FAST)


def test_m_score_of_nothing_changed_is_one_and_another_seed_gives_the_ceiling(
    tiny_world, images, monkeypatch
):
    monkeypatch.setattr(memory, "presence", lambda *args, **options: 0.1)
    options = {**FAST, "lr": 5e-2}
    nothing = 0.0 * some_edit(tiny_world)

    def m_score(edit, **more):
        return metrics.m_score(tiny_world, edit, "church", images, **options, **more)

    assert m_score(nothing, seeds=(0, 1)) == pytest.approx(1, abs=1e-6)
    ceiling = m_score(None, second_seed_offset=1, start="dog")
    assert -1 <= ceiling < 1 - 1e-5
    every = [(0,), (1,), (0, 1)]
    changed = [m_score(some_edit(tiny_world), seeds=seeds, start="dog") for seeds in every]
    mean = (changed[0] + changed[1]) / 2
    assert max(changed) < 1 - 1e-6 and changed[2] == pytest.approx(mean, abs=1e-6)


def test_presence_against_a_naive_restatement(tiny_world, images):
    generator = torch.Generator().manual_seed(4)
    x_0 = to_latents(tiny_world, images).repeat(2, 1, 1, 1)
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.randint(1000, (6,), generator=generator)
    errors = {"in the style of Noto": 0.0, "": 0.0}
    for prompt in errors:
        for i in range(6):
            a = tiny_world.alpha_bar[t[i]]
            x_t = a.sqrt() * x_0[i] + (1 - a).sqrt() * noise[i]
            with torch.no_grad():
                eps_hat = tiny_world.unet(x_t[None], t[i], tiny_world.encode([prompt])).sample[0]
            errors[prompt] += float((eps_hat - noise[i]).pow(2).sum())
    expected = 1 - errors["in the style of Noto"] / errors[""]
    found = metrics.presence(tiny_world, "Noto", images, repeats=2, seed=4)
    assert found == pytest.approx(expected, abs=1e-5)


def test_m_score_refuses(tiny_world, images, monkeypatch):
    with pytest.raises(ValueError, match="at least one"):
        metrics.m_score(tiny_world, None, "church", images[:0], **FAST)
    with pytest.raises(ValueError, match=r"seeds is .*not empty"):
        metrics.m_score(tiny_world, None, "church", images, seeds=(), **FAST)
    with pytest.raises(ValueError, match="zebra"):
        metrics.m_score(tiny_world, None, "zebra", images, **FAST)
    monkeypatch.setattr(memory, "presence", lambda *args, **options: -0.01)
    with pytest.raises(ValueError, match="absent already and M-Score is undefined"):
        metrics.m_score(tiny_world, None, "church", images, **FAST)
