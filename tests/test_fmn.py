"""Forget-Me-Not on a world of random weights: its losses restated, its masks, its pairs, and what is refused."""

import functools
import math

import pytest
import torch
from torchvision.utils import save_image

from helpers import losses, sample, unlearn
from helpers.attention import record, token_roles
from helpers.methods import fmn
from helpers.training import augmented, drawn_images, generator_of, predict

FAST = {"images": 2, "steps": 2, "batch_size": 2, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", tmp_path / "cache")
    monkeypatch.setattr(fmn, "drawn_images", functools.partial(fmn.drawn_images, steps=2))  # instead of 25


def folder_of(images, path):
    path.mkdir()
    for i, image in enumerate(images):
        save_image(image, path / f"{i}.png")
    return str(path)


def test_same_seed_same_edit_and_the_world_is_unchanged(tiny_world):
    before = {n: p.detach().clone() for n, p in tiny_world.unet.named_parameters()}
    a, b = (unlearn(tiny_world, "church", method="fmn", seed=3, **FAST) for _ in range(2))
    assert all(torch.equal(a.delta[n], b.delta[n]) for n in a.delta)
    assert all(torch.equal(p, before[n]) for n, p in tiny_world.unet.named_parameters())
    assert set(a.delta) == {n for n in before if "attn2.to_k" in n or "attn2.to_v" in n} and a.norm() > 0
    assert {"attention", "visual", "total"} <= set(a.history[0])
    whole = unlearn(tiny_world, "church", method="fmn", group="unet", **FAST)
    assert set(whole.delta) == set(before)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_first_step_is_the_papers_equations(tiny_world, variant):
    world, concepts = tiny_world, ["church", "santa claus"]
    options = fmn.Options(variant=variant, attention=0.5, visual=2.0, weighting="none", images=2, steps=1, batch_size=3)
    row = fmn.unlearn(world, concepts, "fmn", options, seed=1, progress=False).history[0]
    data = fmn.training_data(world, concepts, options, 1)
    generator = generator_of(1, 0)
    pick = torch.randint(4, (3,), generator=generator)
    noise = torch.randn(3, *world.latent_shape, generator=generator)
    t = torch.randint(1000, (3,), generator=generator)
    squares, errors = [], []
    for i, eps, step in zip(pick.tolist(), noise, t.tolist(), strict=True):
        a = float(world.pipe.scheduler.alphas_cumprod[step])
        x_t = math.sqrt(a) * data.x_0[i] + math.sqrt(1 - a) * eps
        with torch.no_grad(), record(world.unet) as maps:
            eps_hat = world.unet(x_t[None], step, data.states[i : i + 1]).sample[0]
        columns = [j for j in range(world.text_length) if data.mask[i, j]]
        squares.append(sum(float(A[0][..., j].pow(2).sum()) for (A,) in maps.values() for j in columns))
        x_0_hat = (x_t - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
        errors.append(float((x_0_hat - data.x_0_tilde[i]).pow(2).mean()))
    attention = sum(squares if variant == "paper" else map(math.sqrt, squares)) / 3
    assert row["attention"] == pytest.approx(attention, rel=1e-4)
    assert row["visual"] == pytest.approx(sum(errors) / 3, rel=1e-3)
    assert row["total"] == pytest.approx(0.5 * row["attention"] + 2.0 * row["visual"], rel=1e-5)


def test_a_style_has_a_pace_of_its_own(tiny_world):
    def moved(concept: str, pace: float) -> float:
        options = {**FAST, "steps": 1, "clip": None, "style_pace": pace}
        return unlearn(tiny_world, concept, method="fmn", **options).norm()

    assert moved("Noto", 3.0) == pytest.approx(3 * moved("Noto", 1.0), rel=1e-3)  # Adam's first step is the rate itself
    assert moved("church", 3.0) == moved("church", 1.0)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_attention_loss_falls(tiny_world, variant):
    options = {**FAST, "steps": 30}
    edit = unlearn(tiny_world, "church", method="fmn", variant=variant, visual=0.0, lr=1e-2, **options)
    assert sum(row["attention"] for row in edit.history[-5:]) / 5 < 0.9 * edit.history[0]["attention"]
    assert "visual" not in edit.history[0]


def test_the_visual_loss_falls(tiny_world):
    options = {**FAST, "steps": 20, "batch_size": 8, "group": "unet", "weighting": "min-snr", "lr": 1e-2}
    values = [row["visual"] for row in unlearn(tiny_world, "church", method="fmn", attention=0.0, **options).history]
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_each_picture_has_its_own_mask_and_the_releases_tiling_is_wrong(tiny_world):
    prompts, concepts = ["a picture of a church", "a picture of a santa claus"], ["church", "santa claus"]
    mask = torch.cat([fmn.concept_mask(tiny_world, [p], c, end=False) for p, c in zip(prompts, concepts, strict=True)])
    assert mask.sum(1).tolist() == [len(tiny_world.pipe.tokenizer(c).input_ids) - 2 for c in concepts]
    x_t, t, states = torch.randn(2, *tiny_world.latent_shape), torch.tensor([10, 700]), tiny_world.encode(prompts)
    with torch.no_grad(), record(tiny_world.unet) as kept:
        predict(tiny_world.unet, {}, x_t, t, states)
    maps = [A for (A,) in kept.values()]  # (2, heads, pixels, tokens)
    ours = losses.resteering([A * mask[:, None, None, :] for A in maps], variant="fmn")
    alone = []
    for i in range(2):
        with torch.no_grad(), record(tiny_world.unet) as kept:
            predict(tiny_world.unet, {}, x_t[i : i + 1], t[i : i + 1], states[i : i + 1])
        alone.append(losses.resteering([A[..., mask[i].nonzero()[:, 0]] for (A,) in kept.values()], variant="fmn"))
    assert torch.isclose(ours, torch.stack(alone).mean(), rtol=1e-4)

    def released(repeat):  # heads folded into the batch, picture by picture, as in the release
        return sum((A.flatten(0, 1) * repeat(mask[:, None, :], A.shape[1])).pow(2).sum() for A in maps) / 2

    tiled = released(lambda rows, heads: rows.repeat(heads, 1, 1))
    assert not torch.isclose(ours, tiled, rtol=1e-2)
    assert torch.isclose(ours, released(lambda rows, heads: rows.repeat_interleave(heads, 0)), rtol=1e-5)


def test_the_released_mask_holds_the_end_and_all_padding(tiny_world):
    prompt = "a picture of a church"
    roles = token_roles(tiny_world, prompt)
    span = fmn.concept_mask(tiny_world, [prompt], "church", end=False)[0]
    more = fmn.concept_mask(tiny_world, [prompt], "church", end=True)[0] & ~span
    assert [roles[i] for i in more.nonzero()[:, 0]] == [role for role in roles if role in ("end", "padding")]
    assert "end" not in [roles[i] for i in span.nonzero()[:, 0]] and span.any()


def test_counterparts_are_the_pictures_without_the_concepts_attention_and_are_drawn_once(tiny_world, monkeypatch):
    prompts, seeds = ["church", "a picture of a church"], [7, 8]
    columns = [m.nonzero()[:, 0].tolist() for m in fmn.concept_mask(tiny_world, prompts, "church", end=False)]
    drawn = fmn.drawn_images(tiny_world, prompts, seeds, hidden=columns)
    expected = sample(tiny_world, prompts, seeds, steps=2, zero="church", progress=False)
    assert (drawn - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert not torch.equal(drawn, drawn_images(tiny_world, prompts, seeds, steps=2))
    monkeypatch.setattr("helpers.training.draw_batch", None)  # a second drawing would fail
    assert torch.equal(fmn.drawn_images(tiny_world, prompts, seeds, hidden=columns), drawn)


def test_a_folders_pictures_have_no_counterpart_and_drawn_pairs_stand_beside_them(tiny_world, tmp_path, monkeypatch):
    size = tiny_world.image_size
    folder = folder_of(torch.rand(3, 3, size, size), tmp_path / "mine")
    options = fmn.Options(images=folder, pairs=2)
    pairs, paired, prompts, owners = fmn.picture_pairs(tiny_world, ["church", "Noto"], options, 0)
    assert pairs.shape == (10, 2, 3, size, size) and len(prompts) == 10
    assert paired.tolist() == [0.0] * 6 + [1.0] * 4
    assert owners == ["church"] * 3 + ["Noto"] * 3 + ["church"] * 2 + ["Noto"] * 2
    assert all(owner in prompt for owner, prompt in zip(owners, prompts, strict=True))
    edit = unlearn(tiny_world, ["church", "Noto"], method="fmn", pairs=2, **{**FAST, "images": folder})
    assert edit.norm() > 0
    monkeypatch.setattr(fmn, "drawn_images", None)  # without the visual loss nothing is drawn
    unlearn(tiny_world, "church", method="fmn", visual=0.0, **{**FAST, "images": folder})


def test_without_the_visual_loss_no_counterpart_is_drawn(tiny_world, monkeypatch):
    monkeypatch.setattr("helpers.training.draw_batch", None)
    unlearn(tiny_world, "church", method="fmn", visual=0.0, **FAST)


def test_weights_over_timesteps(tiny_world):
    alpha_bar = tiny_world.pipe.scheduler.alphas_cumprod
    assert torch.equal(fmn.visual_weights(alpha_bar, fmn.Options(weighting="none")), torch.ones(1000))
    options = fmn.Options(weighting="min-snr", gamma=5.0, visual_from=0.1, visual_to=0.6)
    weights = fmn.visual_weights(alpha_bar, options).tolist()
    for t in range(1000):
        a = float(alpha_bar[t])
        expected = min(a / (1 - a), 5.0) if 100 <= t < 600 else 0.0
        assert weights[t] == pytest.approx(expected, rel=1e-3)


def test_augmented_views_are_seeded_and_change_a_pair_alike():
    images = torch.rand(3, 3, 16, 16)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    views = augmented(torch.stack([images, images], 1), 4, seed=2)
    assert torch.equal(torch.rand(1), expected)  # the global generator is as it was
    assert views.shape == (12, 2, 3, 16, 16) and views.min() >= 0 and views.max() <= 1
    assert torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(views, augmented(torch.stack([images, images], 1), 4, seed=2))
    assert not torch.equal(views, augmented(torch.stack([images, images], 1), 4, seed=3))
    flips = augmented(images, 8, crop=1.0, colour=0.0).unflatten(0, (8, 3))
    same, mirrored = ((flips - other).abs().amax((2, 3, 4)) < 1e-5 for other in (images, images.flip(-1)))
    assert (same ^ mirrored).all() and same.any() and mirrored.any()
    with pytest.raises(ValueError, match="copies is 0"):
        augmented(images, 0)


def test_augmented_copies_join_the_data(tiny_world):
    plain, more = (
        fmn.training_data(tiny_world, ["church"], fmn.Options(images=2, augment=k), 0, progress=False) for k in (0, 2)
    )
    assert len(plain.x_0) == 2 and len(more.x_0) == len(more.states) == len(more.mask) == len(more.paired) == 6
    assert torch.allclose(more.x_0[:2], plain.x_0, atol=1e-5) and torch.equal(more.states[2:4], plain.states)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_inversion_first(tiny_world, variant):
    options = fmn.Options(images=2, visual=0.0, inversion_tokens=2, inversion_steps=2, variant=variant)
    data = fmn.training_data(tiny_world, ["church", "Noto"], options, 0, progress=False)
    named = fmn.training_data(
        tiny_world, ["church", "Noto"], fmn.Options(images=2, visual=0.0, variant=variant), 0, progress=False
    )
    if variant == "paper":
        assert data.mask.sum(1).tolist() == [2] * 4
    assert not data.mask[:, 0].any() and not torch.equal(data.states, named.states)
    fast = {**FAST, "inversion_tokens": 2, "inversion_steps": 2}
    assert unlearn(tiny_world, ["church", "Noto"], method="fmn", variant=variant, **fast).norm() > 0


@pytest.mark.parametrize(
    ("concept", "options", "said"),
    [
        ("zebra", {}, "zebra"),
        ([], {}, "empty"),
        ("church", {"attention": -1.0}, r"attention is -1\.0"),
        ("church", {"attention": 0.0, "visual": 0.0}, "not both 0"),
        ("church", {"variant": "draft"}, "unknown variant 'draft'"),
        ("church", {"weighting": "snr"}, "unknown weighting 'snr'"),
        ("church", {"hidden": "all"}, "unknown hidden 'all'"),
        ("church", {"visual_from": 0.5, "visual_to": 0.5}, r"visual_to 0\.5"),
        ("church", {"style_pace": 0.0}, r"style_pace is 0\.0"),
        ("church", {"images": 0}, "images is 0"),
        ("church", {"images": "no-such-folder"}, "no-such-folder"),
        ("church", {"augment": -1}, "augment is -1"),
        ("church", {"inversion_tokens": -2}, "inversion_tokens -2"),
        ("church", {"group": "nothing"}, "unknown group"),
        ("church", {"lam": 1.0}, "no option lam"),
    ],
)
def test_bad_input(tiny_world, concept, options, said):
    with pytest.raises(ValueError, match=said):
        unlearn(tiny_world, concept, method="fmn", **{**FAST, **options})
