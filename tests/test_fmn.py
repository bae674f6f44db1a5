"""Forget-Me-Not on a world of random weights: its losses restated, its masks, its pairs."""

import math

import pytest
import torch
from torchvision.utils import save_image

from helpers import images, losses, sample, unlearn
from helpers.attention import concept_mask, record, token_roles
from helpers.concepts import TEMPLATES
from helpers.denoise import Sampling, predict
from helpers.images import augmented, base_images
from helpers.inversion import soft_tokens
from helpers.methods import fmn, options_of
from helpers.parameters import select_parameters
from helpers.seeds import step_generator

FAST = {"images": 2, "steps": 2, "batch_size": 2}


@pytest.fixture
def world(tiny_world, cache):
    """A tiny world whose training images take two steps."""
    tiny_world.sampling = Sampling(steps=2)
    return tiny_world


@pytest.fixture
def no_sampling(monkeypatch):
    """Nothing can be sampled in this test but what is in the cache."""
    monkeypatch.setattr(images, "sample", None)


def forget(world, concept="church", **options):
    return unlearn(world, concept, "fmn", progress=False, **{**FAST, **options})


def folder_of(images, path):
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        save_image(image, path / f"{i}.png")
    return str(path)


def test_what_is_trained(world):
    edit = forget(world)
    assert set(edit.delta) == set(select_parameters(world, "kv")) and edit.norm() > 0
    assert {"attention", "visual", "total"} <= set(edit.history[0])
    assert set(forget(world, group="unet").delta) == set(select_parameters(world, "unet"))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_first_step_is_the_papers_equations(world, variant):
    concepts, given = ["church", "santa claus"], {"attention": 0.5, "visual": 2.0}
    given |= {"variant": variant, "weighting": "none", "images": 2, "batch_size": 3}
    options = options_of("fmn", given)
    problem = fmn.problem(world, concepts, options, 1)
    values = problem.terms(0, step_generator(1, 0), frozenset())
    data = fmn.training_data(world, concepts, options, 1)
    generator = step_generator(1, 0)
    pick = torch.randint(4, (3,), generator=generator)
    noise = torch.randn(3, *world.latent_shape, generator=generator)
    t = torch.randint(1000, (3,), generator=generator)
    squares, errors = [], []
    for i, eps, step in zip(pick.tolist(), noise, t.tolist(), strict=True):
        a = float(world.alpha_bar[step])
        x_t = math.sqrt(a) * data.x_0[i] + math.sqrt(1 - a) * eps
        with torch.no_grad(), record(world.unet) as maps:
            eps_hat = world.unet(x_t[None], step, data.states[i : i + 1]).sample[0]
        columns = [j for j in range(world.text_length) if data.mask[i, j]]
        of_layers = [A[0][..., j].pow(2).sum() for (A,) in maps.values() for j in columns]
        squares.append(float(sum(of_layers)))
        x_0_hat = (x_t - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
        errors.append(float((x_0_hat - data.x_0_tilde[i]).pow(2).mean()))
    attention = sum(squares if variant == "paper" else map(math.sqrt, squares)) / 3
    assert values["attention"].item() == pytest.approx(attention, rel=1e-4)
    assert values["visual"].item() == pytest.approx(sum(errors) / 3, rel=1e-3)
    assert problem.weights == {"attention": 0.5, "visual": 2.0}


def test_styles_have_a_rate_of_their_own(world):
    def moved(concept: str, scale: float) -> float:
        return forget(world, concept, steps=1, clip=None, lr_scale_for_styles=scale).norm()

    # Adam's first step is the rate itself
    assert moved("Noto", 3.0) == pytest.approx(3 * moved("Noto", 1.0), rel=1e-3)
    assert moved("church", 3.0) == moved("church", 1.0)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_attention_loss_falls(world, variant):
    rows = forget(world, variant=variant, visual=0.0, lr=1e-2, steps=30).history
    assert sum(row["attention"] for row in rows[-5:]) / 5 < 0.9 * rows[0]["attention"]
    assert "visual" not in rows[0]


def test_the_visual_loss_falls(world):
    options = {"steps": 20, "batch_size": 8, "group": "unet", "weighting": "min-snr", "lr": 1e-2}
    values = [row["visual"] for row in forget(world, attention=0.0, **options).history]
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_each_image_has_its_own_mask_and_the_releases_tiling_is_wrong(world):
    prompts, concepts = (
        ["a picture of a church", "a picture of a santa claus"], ["church", "santa claus"],
    )  # fmt: skip
    rows = zip(prompts, concepts, strict=True)
    mask = torch.cat([concept_mask(world, [p], c, end=False) for p, c in rows])
    lengths = [len(world.pipe.tokenizer(c).input_ids) - 2 for c in concepts]
    assert mask.sum(1).tolist() == lengths
    x_t, t = torch.randn(2, *world.latent_shape), torch.tensor([10, 700])
    states = world.encode(prompts)
    with torch.no_grad(), record(world.unet) as found:
        predict(world, {}, x_t, t, states)
    maps = [A for (A,) in found.values()]  # (2, heads, pixels, tokens)
    ours = losses.resteering([A * mask[:, None, None, :] for A in maps], variant="fmn")
    alone = []
    for i in range(2):
        with torch.no_grad(), record(world.unet) as found:
            predict(world, {}, x_t[i : i + 1], t[i : i + 1], states[i : i + 1])
        columns = mask[i].nonzero()[:, 0]
        layers = [A[..., columns] for (A,) in found.values()]
        alone.append(losses.resteering(layers, variant="fmn"))
    assert torch.isclose(ours, torch.stack(alone).mean(), rtol=1e-4)

    def released(repeat):  # heads folded into the batch, image by image, as in the release
        folded = [A.flatten(0, 1) * repeat(mask[:, None, :], A.shape[1]) for A in maps]
        return sum(A.pow(2).sum() for A in folded) / 2

    tiled = released(lambda rows, heads: rows.repeat(heads, 1, 1))
    right = released(lambda rows, heads: rows.repeat_interleave(heads, 0))
    assert not torch.isclose(ours, tiled, rtol=1e-2) and torch.isclose(ours, right, rtol=1e-5)


def test_the_released_mask_holds_eos_and_all_padding(world):
    prompt = "a picture of a church"
    roles = token_roles(world, prompt)
    span = concept_mask(world, [prompt], "church", end=False)[0]
    more = concept_mask(world, [prompt], "church", end=True)[0] & ~span
    after = [role for role in roles if role in ("EOS", "padding")]
    assert [roles[i] for i in more.nonzero()[:, 0]] == after
    assert span.any() and "EOS" not in [roles[i] for i in span.nonzero()[:, 0]]
    masks = {}
    for variant in ("paper", "code"):
        options = options_of("fmn", {"variant": variant, "images": 2, "visual": 0.0})
        masks[variant] = fmn.training_data(world, ["church"], options, 0).mask[1]
    assert torch.equal(masks["paper"], span) and torch.equal(masks["code"], span | more)


def test_counterparts_lack_the_concepts_attention_and_are_sampled_once(world, monkeypatch):
    prompts, seeds = ["church", "a picture of a church"], [7, 8]
    masks = concept_mask(world, prompts, "church", end=False)
    columns = [mask.nonzero()[:, 0].tolist() for mask in masks]
    hidden = base_images(world, prompts, seeds, hide=columns)
    expected = sample(world, prompts, seeds, hide="church", progress=False)
    assert (hidden - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert not torch.equal(hidden, base_images(world, prompts, seeds))
    monkeypatch.setattr(images, "sample", None)  # sampling a second time would fail
    assert torch.equal(base_images(world, prompts, seeds, hide=columns), hidden)


def test_a_folders_images_have_no_counterpart_and_pairs_stand_beside_them(world, tmp_path):
    size = world.image_size
    folder_of(torch.rand(3, 3, size, size), tmp_path / "mine" / "church")
    folder_of(torch.rand(2, 3, size, size), tmp_path / "mine" / "noto")
    folder = str(tmp_path / "mine")
    options = options_of("fmn", {"images": folder, "pairs": 2})
    found = fmn.training_pairs(world, ["church", "Noto"], options, 0)
    assert found.images.shape == (9, 2, 3, size, size)
    assert found.paired.tolist() == [0.0] * 5 + [1.0] * 4
    assert torch.equal(found.images[:5, 0], found.images[:5, 1])
    assert not any(torch.equal(*pair) for pair in found.images[5:])
    assert found.owners == ["church"] * 3 + ["Noto"] * 2 + ["church"] * 2 + ["Noto"] * 2
    thing, style = (TEMPLATES[kind] for kind in ("object", "style"))
    assert found.templates == [*thing, thing[0], *style, *thing, *style]
    assert forget(world, ["church", "Noto"], pairs=2, images=folder).norm() > 0


def test_without_the_visual_loss_a_folder_needs_no_sampling(world, tmp_path, no_sampling):
    folder = folder_of(torch.rand(3, 3, world.image_size, world.image_size), tmp_path / "mine")
    assert forget(world, visual=0.0, images=folder).norm() > 0


def test_without_the_visual_loss_no_counterpart_is_sampled(world, cache):
    forget(world, visual=0.0)
    assert len(list(cache.iterdir())) == 1
    forget(world)
    assert len(list(cache.iterdir())) == 2


def test_weights_over_timesteps(tiny_world):
    alpha_bar = tiny_world.alpha_bar
    plain = fmn.visual_weights(alpha_bar, fmn.Options(weighting="none"))
    assert torch.equal(plain, torch.ones(1000))
    options = fmn.Options(weighting="min-snr", gamma=5.0, visual_from=0.1, visual_to=0.6)
    weights = fmn.visual_weights(alpha_bar, options).tolist()
    for t in range(1000):
        a = float(alpha_bar[t])
        expected = min(a / (1 - a), 5.0) if 100 <= t < 600 else 0.0
        assert weights[t] == pytest.approx(expected, rel=1e-3)


def test_augmented_views_are_seeded_and_change_a_pair_alike():
    originals = torch.rand(3, 3, 16, 16)
    pairs = torch.stack([originals, originals], 1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    views = augmented(pairs, 4, seed=2)
    assert torch.equal(torch.rand(1), expected)  # the global generator is as it was
    assert views.shape == (12, 2, 3, 16, 16) and views.min() >= 0 and views.max() <= 1
    assert torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(views, augmented(pairs, 4, seed=2))
    assert not torch.equal(views, augmented(pairs, 4, seed=3))
    flips = augmented(originals, 8, crop=1.0, colour=0.0).unflatten(0, (8, 3))
    same, mirrored = (
        (flips - other).abs().amax((2, 3, 4)) < 1e-5 for other in (originals, originals.flip(-1))
    )
    assert (same ^ mirrored).all() and same.any() and mirrored.any()
    with pytest.raises(ValueError, match="copies is 0"):
        augmented(originals, 0)


def test_augmented_copies_join_the_data(world):
    plain, more = (
        fmn.training_data(world, ["church"], fmn.Options(images=2, augment=k), 0) for k in (0, 2)
    )
    assert len(plain.x_0) == 2
    assert len(more.x_0) == len(more.states) == len(more.mask) == len(more.paired) == 6
    assert torch.allclose(more.x_0[:2], plain.x_0, atol=1e-5)
    assert torch.equal(more.states[2:4], plain.states)


@pytest.mark.parametrize("concept", ["picture", "pic", "a", "{c}"])
def test_soft_tokens_stand_where_the_name_stood(world, cache, concept):
    """The template's own words stay, whatever letters the name has."""
    world.objects.append(concept)
    given = {"images": 2, "visual": 0.0, "inversion_tokens": 1, "inversion_steps": 1}
    data = fmn.training_data(world, [concept], options_of("fmn", given), 0)
    assert [mask.nonzero().flatten().tolist() for mask in data.mask] == [[1], [5]]
    with soft_tokens(world, torch.zeros(1, 16)) as phrase:
        pair = world.encode([phrase, f"a picture of a {phrase}"])
    alike = (data.states - pair).abs().amax(2) < 1e-5  # before the soft token: the template's words
    assert alike[1, :5].all() and not alike[1, 5] and not alike[0, 1]


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_inversion_first(world, variant):
    concepts, given = ["church", "Noto"], {"images": 2, "visual": 0.0, "variant": variant}
    soft = {"inversion_tokens": 2, "inversion_steps": 2}
    data, named = (
        fmn.training_data(world, concepts, options_of("fmn", {**given, **more}), 0)
        for more in (soft, {})
    )
    if variant == "paper":
        assert data.mask.sum(1).tolist() == [2] * 4
    assert not data.mask[:, 0].any() and not torch.equal(data.states, named.states)
    assert forget(world, concepts, variant=variant, **soft).norm() > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": -1.0}, r"attention is -1\.0"),
        ({"attention": 0.0, "visual": 0.0}, "attention is 0 and visual 0"),
        ({"weighting": "snr"}, "unknown weighting 'snr'"),
        ({"hidden": "all"}, "unknown hidden 'all'"),
        ({"visual_from": 0.5, "visual_to": 0.5}, r"visual_to 0\.5"),
        ({"lr_scale_for_styles": 0.0}, r"lr_scale_for_styles is 0\.0"),
        ({"images": 0}, "images is 0"),
        ({"pairs": 0}, "pairs is 0"),
        ({"images": "no-such-folder"}, "no-such-folder"),
        ({"augment": -1}, "augment is -1"),
        ({"inversion_tokens": -2}, "inversion_tokens is -2"),
    ],
)
def test_bad_input(world, options, said):
    with pytest.raises(ValueError, match=said):
        forget(world, **options)
