"""Every metric by hand, against a library, and on bad input."""

import functools
import json
import math
import sys
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from conftest import random_edit
from diffusers import AutoencoderKL
from scipy.linalg import sqrtm
from torch.nn import functional as F
from torchvision.models import alexnet
from torchvision.transforms import functional as TF
from transformers import CLIPConfig, CLIPModel

from helpers import Edit, load_world, metrics, perceptual, renders
from helpers.checked import load_json
from helpers.concepts import DATA, concepts, style_names
from helpers.diffusion import to_images
from helpers.evaluation import attacks, report
from helpers.judge import BLANK, Classifier, Judge
from helpers.worlds import EMOJI, World, knowledge

CONVOLUTIONS = {
    f"{i}.{part}": size if part == "weight" else size[:1]
    for i, size in {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }.items()
    for part in ("weight", "bias")
}
not_trained = pytest.mark.skipif(not perceptual.WEIGHTS.exists(), reason="not trained yet")
BACKBONES = ["random", pytest.param("shipped", marks=not_trained)]


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


@pytest.fixture
def fresh_networks():
    """LPIPS networks are loaded anew in this test, and again after it."""
    loaders = (perceptual.load_emoji_lpips, perceptual.load_alexnet_lpips)
    for load in loaders:
        load.cache_clear()
    yield
    for load in loaders:
        load.cache_clear()


# --- ACC and CLIP score


def test_accuracy_counts_the_judge_s_verdicts(world):
    church, dog = (
        renders.references("Twemoji", name, n, vary=0.3)
        for name, n in {"church": 3, "dog": 1}.items()
    )
    images = torch.cat([church, dog])
    assert metrics.accuracy(world, images, "church") == 0.75
    assert metrics.accuracy(world, images, "Twemoji") == 1.0
    assert metrics.accuracy_interval(world, images, "church")[0] == 0.75


def test_clip_score_prefers_the_right_caption(world):
    things, styles = ["church", "dog", "banana"], ["Twemoji", "OpenMoji", "Fluent"]
    images = torch.cat([renders.references(s, o, 1) for s, o in zip(styles, things, strict=True)])

    def score(names):
        captions = [f"a {o} in the style of {s}" for s, o in zip(styles, names, strict=True)]
        return metrics.clip_score(world, images, captions)

    right, wrong = score(things), score(things[1:] + things[:1])
    assert right.shape == (3,) and (right > wrong + 0.1).all() and right.abs().max() <= 1


def test_bad_input(world):
    one = torch.zeros(1, 3, world.image_size, world.image_size)
    with pytest.raises(ValueError, match="at least one image"):
        metrics.accuracy(world, one[:0], "church")
    with pytest.raises(ValueError, match="zebra"):
        metrics.accuracy(world, one, "zebra")
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        metrics.clip_score(world, one, ["a", "b"])


# --- LPIPS


def give_lpips(world, weights="random"):
    """The emoji backbone, or random weights where a test is about the arithmetic; these weights."""
    torch.manual_seed(0)
    random = {name: 0.05 * torch.randn(shape) for name, shape in CONVOLUTIONS.items()}
    world.lpips = perceptual.load_emoji_lpips()
    if weights == "random":
        world.lpips = perceptual.Perceptual("LPIPS (random)", perceptual.emoji_network(random))
    return random


def emoji(n=6):
    return renders.references(None, None, n, seed=3, vary=0.5)


def blurred(images, sigma):
    return TF.gaussian_blur(images, [13, 13], [sigma, sigma])


def noisy(images, strength):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + strength * noise).clamp(0, 1)


def shifted(images, pixels):
    return images.roll(int(pixels), dims=3)


@pytest.mark.parametrize("weights", BACKBONES)
def test_lpips_is_zero_for_equal_images_and_symmetric(tiny_world, weights):
    give_lpips(tiny_world, weights)
    a, b = emoji(), emoji().flip(0)
    assert torch.equal(metrics.lpips_distance(tiny_world, a, a), torch.zeros(len(a)))
    there, back = (metrics.lpips_distance(tiny_world, *pair) for pair in ((a, b), (b, a)))
    assert there.shape == (len(a),) and there.min() > 0 and torch.allclose(there, back, rtol=1e-4)


@pytest.mark.parametrize("weights", BACKBONES)
@pytest.mark.parametrize(
    ("change", "strengths"),
    [(blurred, (0.5, 1.0, 3.0)), (noisy, (0.02, 0.1, 0.3)), (shifted, (1, 3, 8))],
)
def test_lpips_grows_with_the_change(tiny_world, weights, change, strengths):
    give_lpips(tiny_world, weights)
    a = emoji()
    values = [metrics.lpips_distance(tiny_world, a, change(a, s)).mean().item() for s in strengths]
    assert 0 < values[0] < values[1] < values[2]


def test_lpips_equals_its_equation(tiny_world):
    """The oracle: torchvision's own layers with the same weights, and the sum written out."""
    weights = give_lpips(tiny_world)
    features = alexnet().features[:12].eval()
    features.load_state_dict(weights)
    a, b = emoji(3), emoji(3).flip(0)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((v * 2 - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for v in (a, b))
    expected = torch.zeros(3)
    with torch.no_grad():
        for layer in features:
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
                expected += difference.pow(2).sum(1).mean((1, 2))
    assert torch.allclose(metrics.lpips_distance(tiny_world, a, b), expected, rtol=1e-4)


def test_lpips_size_matters_and_bad_images_are_refused(tiny_world):
    give_lpips(tiny_world)
    a, b = emoji(2), noisy(emoji(2), 0.1)
    whole, small = (metrics.lpips_distance(tiny_world, a, b, size=size) for size in (None, 32))
    assert not torch.allclose(whole, small)
    with pytest.raises(ValueError, match="images of 16 pixels"):
        metrics.lpips_distance(tiny_world, a[..., :16], b[..., :16])
    with pytest.raises(ValueError, match="compares equal shapes"):
        metrics.lpips_distance(tiny_world, a, b[:1])


def test_lpips_says_what_is_missing(tiny_world, tmp_path, monkeypatch, fresh_networks):
    monkeypatch.setattr(perceptual, "WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"train_lpips\.py"):
        perceptual.load_emoji_lpips()

    def offline(**_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(perceptual.lpips, "LPIPS", offline)
    with pytest.raises(OSError, match="go online once"):
        perceptual.load_alexnet_lpips()
    with pytest.raises(ValueError, match="the world 'tiny' has no lpips"):
        metrics.lpips_distance(tiny_world, emoji(1), emoji(1))


def test_lpips_is_named_by_its_backbone(world, monkeypatch, fresh_networks):
    assert world.lpips.name == "LPIPS (emoji backbone)"
    bring = knowledge("sd14")["brings"]["lpips"]
    monkeypatch.setattr(perceptual.lpips, "LPIPS", lambda **_: torch.nn.Identity())
    assert bring().name == "LPIPS (AlexNet)"


# --- drift, images that show nothing


def test_drift_of_nothing_is_nothing(tiny_world):
    give_lpips(tiny_world)
    prompts, seeds = ["dog", "castle", "Noto"], [0, 1, 2]
    none, little, much = (
        metrics.drift(
            tiny_world, random_edit(tiny_world, scale=scale), prompts, seeds, size=64, steps=2,
            progress=False,
        )
        for scale in (0.0, 0.1, 1.0)
    )  # fmt: skip
    assert torch.equal(none, torch.zeros(3))
    assert (little > 0).all() and much.mean() > little.mean()


def test_roughness_by_hand():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    halves = (torch.arange(64) >= 32).expand(64, 64)
    images = torch.stack([board, halves]).float()[:, None].expand(-1, 3, -1, -1)
    assert metrics.roughness(images).tolist() == pytest.approx([2.0, 1 / 63], rel=1e-3)
    normal = 0.5 + 0.1 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted = 2 / math.pi**0.5
    assert metrics.roughness(normal).mean().item() == pytest.approx(wanted, rel=0.02)


def test_collapsed_tells_drawings_from_nothing(tiny_world):
    generator = torch.Generator().manual_seed(0)
    real = renders.compose(renders.tiles().flatten(0, 1), generator)
    large = F.interpolate(real[:20], size=512)
    for drawings in (real, large, blurred(real[::10], 1.0)):
        assert not metrics.collapsed(drawings).any()
    plain = torch.rand(8, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    noise = torch.rand(8, 3, 64, 64, generator=generator)
    for nothing in (plain, noisy(plain, 0.02), noise, (0.5 + 0.2 * (noise - 0.5))):
        assert metrics.collapsed(nothing).all()
    tiny_world.pipe.vae = AutoencoderKL.from_pretrained(EMOJI / "vae").float()
    latents = torch.randn(8, 4, 16, 16, generator=generator)
    assert metrics.collapsed(to_images(tiny_world, latents)).all()
    assert metrics.collapsed(to_images(tiny_world, 0.0 * latents)).all()


# --- UnlearnCanvas and FID


def test_unlearn_canvas_by_hand(tiny_world):
    others = [("Noto", "church"), ("OpenMoji", "dog")] * 2
    pairs = [("Twemoji", "church"), ("Twemoji", "dog"), *others]
    styles = ["Twemoji", "blank", "Noto", "OpenMoji", "Noto", "Noto"]
    things = ["dog", "dog", "church", "dog", "church", "dog"]
    tiny_world.judge = SimpleNamespace(styles=lambda images: styles, things=lambda images: things)
    images = torch.zeros(6, 3, 16, 16)
    by_style = {"UA": 0.5, "IRA": 0.75, "CRA": 1.0, "n_erased": 2, "n_others": 4}
    assert metrics.unlearn_canvas(tiny_world, images, pairs, "Twemoji") == by_style
    by_thing = {"UA": 1 / 3, "IRA": 1.0, "CRA": 1 / 3, "n_erased": 3, "n_others": 3}
    found = metrics.unlearn_canvas(tiny_world, images, pairs, "church")
    assert found == pytest.approx(by_thing)
    with pytest.raises(ValueError, match="6 images and 5 pairs"):
        metrics.unlearn_canvas(tiny_world, images, pairs[:5], "church")
    with pytest.raises(ValueError, match="0 images asked for with 'castle'"):
        metrics.unlearn_canvas(tiny_world, images, pairs, "castle")


def test_fid_equals_scipy():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 7, generator=generator)
    b = torch.randn(60, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 0.5
    C_a, C_b = (v.double().T.cov().numpy() for v in (a, b))
    mean = (a.double().mean(0) - b.double().mean(0)).pow(2).sum().item()
    expected = mean + (C_a + C_b - 2 * sqrtm(C_a @ C_b).real).trace()
    assert metrics.fid(a, b) == pytest.approx(expected, rel=1e-8)
    few = a[:5]  # fewer rows than columns: a singular covariance
    assert metrics.fid(few, few) == pytest.approx(0, abs=1e-5)


def test_fid_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])
    wanted = 12**2 + 8  # means 1 and 13, deviations sqrt 2 and sqrt 18
    assert metrics.fid(a, b) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="two rows"):
        metrics.fid(a, b[:1])
    with pytest.raises(ValueError, match=r"give \(n, width\)"):
        metrics.fid(a, torch.zeros(4, 2))


# --- the report


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (["a"] * 8, 1.0),
        (["a", "b"] * 4, 2.0),
        (["a", "b", "c", BLANK], 3.0),  # what has no style does not count
        ([BLANK] * 4, 0.0),
        (["a", "a", "b", "b", "c", "c", "c", "c"], 2 * 2**0.5),  # exp of 1.5 ln 2
    ],
)
def test_the_effective_number_of_styles_by_hand(said, value):
    judge = SimpleNamespace(styles=lambda images: said)
    world = SimpleNamespace(styles=["a", "b", "c"], judge=judge)
    found = metrics.style_diversity(world, torch.zeros(len(said), 3, 8, 8))
    low, high = found["interval"]
    assert found["value"] == pytest.approx(value) and found["n"] == len(said)
    assert low <= found["value"] <= high + 1e-9 and found["shares"]["a"] == said.count("a") / len(
        said
    )


def measured(world):
    """A tiny world with a judge, a CLIPModel and an LPIPS of random weights."""
    give_lpips(world)
    torch.manual_seed(0)
    styles, things = [*world.styles, BLANK], [*world.objects, *world.people, BLANK]
    networks = [Classifier(len(names)).eval() for names in (styles, things)]
    world.judge = world.second_judge = Judge(*networks, styles, things)
    tokenizer = world.pipe.tokenizer
    size = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = {
        "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": world.text_length,
        "vocab_size": len(tokenizer),
    }  # fmt: skip
    image = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=size | text, vision_config=size | image, projection_dim=8)
    world.clip = CLIPModel(config).eval()
    return world


@pytest.fixture
def short_attacks(monkeypatch):
    """One step for each attack that trains."""
    for name in ("concept_inversion", "relearn"):
        short = functools.partial(getattr(attacks, name), steps=1, images=1)
        monkeypatch.setattr(attacks, name, short)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_report_holds_every_value(tiny_world, tmp_path, cache, short_attacks, scale):
    world, edit = measured(tiny_world), random_edit(tiny_world, scale=scale)
    options = {"n": 2, "lpips_size": 64, "sampling": {"steps": 1}, "progress": False}
    result = metrics.report(world, edit, folder=tmp_path / "out", **options)
    sheet = result.pop("sheet")
    assert sheet.get_axes() and (tmp_path / "out" / "sheet.png").stat().st_size > 1000
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["report.json", "sheet.png"]
    stored = load_json(tmp_path / "out" / "report.json", "report", "report again", "made_with")
    assert stored == json.loads(json.dumps(result))
    values = stored["concepts"]
    assert len(values) > 2 and [name for name, v in values.items() if v["erased"]] == ["church"]
    assert next(iter(values)) == "church"
    unnamed = stored["unnamed"]
    assert unnamed["prompts"] == ["castle", "dog"], "the erased church is not among them"
    for at in ("before", "after"):
        found = unnamed[at]
        low, high = found["interval"]
        assert found["n"] == 36 and 0 <= low <= high <= len(world.styles)
    if scale == 0:
        assert unnamed["before"] == unnamed["after"]
    for v in values.values():  # every ACC stands with the second judge's, and what else is shown
        assert v["second_after"]["n"] == 2 and set(v["no_concept_before"]) == {
            "blank",
            "something else",
        }
    castle = values["castle"]["acc_after"]
    assert castle["n"] == 2 and len(castle["interval"]) == 2
    attacked = {"closed-form embedding", "concept inversion", "relearning"}
    assert set(stored["attacks"]["church"]) == attacked
    assert stored["canvas"]["church"]["after"]["n_erased"] == 3
    assert stored["weight_change"] == {"value": edit.norm(), "M": edit.M}
    drift = stored["drift"]
    assert drift["name"] == "LPIPS (random)" and drift["size"] == 64 and drift["n"] > 4
    low, high = drift["interval"]
    assert low <= drift["value"] <= high
    made = stored["made_with"]
    assert made["judge"] == world.judge.fingerprint() and made["edit"]["concepts"] == {"church": 1}
    assert made["sampling"]["steps"] == 1 and made["sampling"]["sampler"] == world.sampling.sampler
    for name, v in values.items():
        assert (v["lpips"] == 0) == (scale == 0), name
        assert scale or v["acc_before"] == v["acc_after"]
    assert (drift["value"] == 0) == (scale == 0)
    assert (stored["fid"]["value"] < 1e-4) == (scale == 0)


def test_report_refuses_what_it_cannot_measure(tiny_world):
    world, edit = measured(tiny_world), random_edit(tiny_world)
    for nothing in (Edit(edit.delta), -1.0 * edit):
        with pytest.raises(ValueError, match="erases nothing"):
            metrics.report(world, nothing)
    with pytest.raises(ValueError, match="n is 0"):
        metrics.report(world, edit, n=0)
    with pytest.raises(ValueError, match="thin is 0"):
        metrics.report(world, edit, thin=0)
    with pytest.raises(ValueError, match="zebra"):
        metrics.report(world, edit, probe_concepts=["zebra"])


def names_only():
    """The emoji world's names and roles without a model."""
    roles = concepts()["roles"]
    objects = [*roles["nine_objects"], "castle"]
    return World("emoji", None, style_names(), objects, ["old man", "santa claus"], roles)


def test_probes_begin_with_the_neighbour():
    world = names_only()
    of_style = ["EmojiOne", "Noto", "Blob", "hammer", "santa claus"]
    assert report.probes(world, ["Twemoji"]) == of_style
    of_thing = report.probes(world, ["church"])
    assert of_thing[0] == "castle" and "church" not in of_thing


@pytest.mark.parametrize("thin", [1, 3, 9])
def test_canvas_pairs_are_even(thin):
    world = names_only()
    pairs = report.canvas_pairs(world, ["Twemoji"], thin)
    assert len(set(pairs)) == len(pairs) and sum(s == "Twemoji" for s, _ in pairs) == 9
    others = [pair for pair in pairs if pair[0] != "Twemoji"]
    for part in (0, 1):
        names = [pair[part] for pair in others]
        counts = [names.count(name) for name in set(names)]
        assert max(counts) - min(counts) <= 1
    of_person = report.canvas_pairs(world, ["santa claus"])
    assert sum(o == "santa claus" for _, o in of_person) == len(world.styles)


# --- the backbone's training


@pytest.fixture
def train_lpips(monkeypatch):
    """The training script, imported as it is run: from its own folder."""
    monkeypatch.syspath_prepend(str(DATA / "pretrain"))
    import train_lpips

    yield train_lpips
    for name in ("common", "train_judge", "train_lpips"):
        sys.modules.pop(name, None)


def test_training_the_backbone(tmp_path, monkeypatch, train_lpips, fresh_networks):
    """Two steps: the weights move, a finished run is not trained again, LPIPS reads the file."""
    model, again = (train_lpips.train(2, 4, tmp_path / "c.safetensors") for _ in range(2))
    torch.manual_seed(0)
    start = train_lpips.Backbone().features.get_parameter("0.weight")
    names = dict(model.features.named_parameters())
    assert names.keys() == CONVOLUTIONS.keys()
    for name, value in names.items():
        assert torch.equal(value, again.features.get_parameter(name))
    assert not torch.equal(names["0.weight"], start)
    train_lpips.save(model, tmp_path / "alexnet.safetensors", steps=2)
    assert set(train_lpips.held_out(model, 8)) == {"style", "thing"}
    monkeypatch.setattr(perceptual, "WEIGHTS", tmp_path / "alexnet.safetensors")
    network = perceptual.load_emoji_lpips().network
    loaded = network.net.state_dict()["slice2.3.weight"]
    assert torch.allclose(loaded, names["3.weight"], atol=1e-3)
