"""Every metric by hand, against a library, and on bad input."""

import functools
import json
import math
import sys
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from scipy.linalg import sqrtm
from scipy.stats import binomtest, ttest_1samp
from torch.nn import functional as F
from torchvision.models import alexnet
from torchvision.transforms import functional as TF
from transformers import CLIPConfig, CLIPModel

from helpers import Edit, attacks, load_world, metrics, renders, report
from helpers.diffusion import to_images
from helpers.judge import BLANK, Classifier, Judge
from helpers.worlds import EMOJI, World


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def test_accuracy_counts_the_judge_s_verdicts(world):
    images = torch.cat(
        [renders.references("Twemoji", "church", 3, vary=0.3), renders.references("Twemoji", "dog", 1, vary=0.3)]
    )
    assert metrics.accuracy(world, images, "church") == 0.75
    assert metrics.accuracy(world, images, "Twemoji") == 1.0


@pytest.mark.parametrize("values", [[1.0, 2, 3], [-0.3, 0.5], [0.05, 0.06, 0.12, 0.1, -4]])
def test_mean_interval_equals_scipy(values):
    wanted = ttest_1samp(values, 0).confidence_interval(0.95)
    assert metrics.mean_interval(values) == pytest.approx((sum(values) / len(values), *wanted), rel=1e-12)


def test_mean_interval_of_equal_values_and_of_too_few():
    assert metrics.mean_interval(torch.full((3,), 0.25)) == (0.25, 0.25, 0.25)
    for values in ([0.5], [], [[0.1, 0.2], [0.3, 0.4]]):
        with pytest.raises(ValueError, match="two or more"):
            metrics.mean_interval(values)


@pytest.mark.parametrize(("k", "n"), [(5, 10), (0, 50), (50, 50), (1, 250)])
def test_interval_equals_scipy(k, n):
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert metrics.interval(k / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_interval_by_hand():
    assert metrics.interval(0.5, 10) == pytest.approx((0.237, 0.763), abs=5e-4)


def test_clip_score_prefers_the_right_caption(world):
    things, styles = ["church", "dog", "banana"], ["Twemoji", "OpenMoji", "Fluent"]
    images = torch.cat([renders.references(s, o, 1) for s, o in zip(styles, things, strict=True)])
    right = metrics.clip_score(
        world, images, [f"a {o} in the style of {s}" for s, o in zip(styles, things, strict=True)]
    )
    wrong = metrics.clip_score(
        world, images, [f"a {o} in the style of {s}" for s, o in zip(styles, things[1:] + things[:1], strict=True)]
    )
    assert right.shape == (3,) and (right > wrong + 0.1).all() and right.abs().max() <= 1


def test_bad_input(world):
    one = torch.zeros(1, 3, world.image_size, world.image_size)
    with pytest.raises(ValueError, match="at least one picture"):
        metrics.accuracy(world, one[:0], "church")
    with pytest.raises(ValueError, match="zebra"):
        metrics.accuracy(world, one, "zebra")
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        metrics.clip_score(world, one, ["a", "b"])
    with pytest.raises(ValueError, match="share 2"):
        metrics.interval(2.0, 10)


def with_alexnet(monkeypatch, weights):
    """LPIPS on the emoji backbone, or on random weights where a test is about the arithmetic."""
    torch.manual_seed(0)
    random = {name: 0.05 * torch.randn(shape) for name, shape in CONVOLUTIONS.items()}
    network = metrics.emoji_lpips(random) if weights == "random" else metrics.lpips_network(True)
    monkeypatch.setattr(metrics, "lpips_network", lambda emoji: network)
    return random


CONVOLUTIONS = {
    f"{i}.{part}": size if part == "weight" else size[:1]
    for i, size in {
        0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)
    }.items()
    for part in ("weight", "bias")
}  # fmt: skip
BACKBONES = [
    "random",
    pytest.param("shipped", marks=pytest.mark.skipif(not metrics.LPIPS_WEIGHTS.exists(), reason="not trained yet")),
]


def emoji(n=6):
    return renders.references(None, None, n, seed=3, vary=0.5)


def blurred(images, sigma):
    return TF.gaussian_blur(images, [13, 13], [sigma, sigma])


def noisy(images, strength):
    return (images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def shifted(images, pixels):
    return images.roll(int(pixels), dims=3)


@pytest.mark.parametrize("weights", BACKBONES)
def test_lpips_is_zero_for_equal_pictures_and_symmetric(tiny_world, monkeypatch, weights):
    with_alexnet(monkeypatch, weights)
    a, b = emoji(), emoji().flip(0)
    assert torch.equal(metrics.lpips_distance(tiny_world, a, a), torch.zeros(len(a)))
    there, back = metrics.lpips_distance(tiny_world, a, b), metrics.lpips_distance(tiny_world, b, a)
    assert there.shape == (len(a),) and there.min() > 0 and torch.allclose(there, back, rtol=1e-4)


@pytest.mark.parametrize("weights", BACKBONES)
@pytest.mark.parametrize(
    ("change", "strengths"), [(blurred, (0.5, 1.0, 3.0)), (noisy, (0.02, 0.1, 0.3)), (shifted, (1, 3, 8))]
)
def test_lpips_grows_with_the_change(tiny_world, monkeypatch, weights, change, strengths):
    with_alexnet(monkeypatch, weights)
    a = emoji()
    values = [metrics.lpips_distance(tiny_world, a, change(a, s)).mean().item() for s in strengths]
    assert 0 < values[0] < values[1] < values[2]


def test_lpips_equals_its_equation(tiny_world, monkeypatch):
    """The oracle: torchvision's own layers with the same weights, and the sum written out."""
    weights = with_alexnet(monkeypatch, "random")
    features = alexnet().features[:12].eval()
    features.load_state_dict(weights)
    a, b = emoji(3), emoji(3).flip(0)
    x, y = (
        (v * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for v in (a, b)
    )
    expected = torch.zeros(3)
    with torch.no_grad():
        for layer in features:
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                expected += (F.normalize(x, dim=1) - F.normalize(y, dim=1)).pow(2).sum(1).mean((1, 2))
    assert torch.allclose(metrics.lpips_distance(tiny_world, a, b), expected, rtol=1e-4)


def test_lpips_size_matters_and_bad_pictures_are_refused(tiny_world, monkeypatch):
    with_alexnet(monkeypatch, "random")
    a, b = emoji(2), noisy(emoji(2), 0.1)
    assert not torch.allclose(
        metrics.lpips_distance(tiny_world, a, b), metrics.lpips_distance(tiny_world, a, b, size=32)
    )
    with pytest.raises(ValueError, match="pictures of 16 pixels"):
        metrics.lpips_distance(tiny_world, a[..., :16], b[..., :16])
    with pytest.raises(ValueError, match="compares equal shapes"):
        metrics.lpips_distance(tiny_world, a, b[:1])


def test_lpips_says_what_is_missing(tmp_path, monkeypatch):
    metrics.lpips_network.cache_clear()
    monkeypatch.setattr(metrics, "LPIPS_WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"train_lpips\.py"):
        metrics.lpips_network(True)

    def offline(**_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(metrics.lpips, "LPIPS", offline)
    with pytest.raises(OSError, match="go online once"):
        metrics.lpips_network(False)


def test_lpips_is_named_by_its_backbone(tiny_world):
    assert metrics.lpips_name(tiny_world) == "LPIPS (AlexNet)"
    tiny_world.name = "emoji"
    assert metrics.lpips_name(tiny_world) == "LPIPS (emoji backbone)"


def small_edit(world, size):
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _ in world.unet.named_parameters() if "attn2.to_v" in name]
    delta = {name: size * torch.randn(world.unet.get_parameter(name).shape, generator=generator) for name in names}
    return Edit(delta, meta={"base": world.fingerprint(), "concepts": ["church"]})


def test_drift_of_nothing_is_nothing(tiny_world, monkeypatch):
    with_alexnet(monkeypatch, "random")
    asked = (["dog", "castle", "Noto"], [0, 1, 2])
    options = {"size": 64, "steps": 2, "progress": False}
    assert torch.equal(metrics.drift(tiny_world, 0.0 * small_edit(tiny_world, 1.0), *asked, **options), torch.zeros(3))
    little, much = (metrics.drift(tiny_world, small_edit(tiny_world, s), *asked, **options) for s in (0.1, 1.0))
    assert (little > 0).all() and much.mean() > little.mean()


def test_weight_change_by_hand():
    edit = Edit({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])})
    assert metrics.weight_change(edit) == 3.0  # (1 + 2 + 3) / 2 tensors


def test_roughness_by_hand():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    halves = (torch.arange(64) >= 32).expand(64, 64)
    images = torch.stack([board, halves]).float()[:, None].expand(-1, 3, -1, -1)
    assert metrics.roughness(images).tolist() == pytest.approx([2.0, 1 / 63], rel=1e-3)
    normal = 0.5 + 0.1 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.roughness(normal).mean().item() == pytest.approx(2 / math.pi**0.5, rel=0.02)


def test_collapsed_tells_drawings_from_nothing(tiny_world):
    generator = torch.Generator().manual_seed(0)
    real = renders.compose(renders.tiles().flatten(0, 1), generator)
    assert not metrics.collapsed(real).any() and not metrics.collapsed(F.interpolate(real[:20], size=512)).any()
    assert not metrics.collapsed(blurred(real[::10], 1.0)).any()
    plain = torch.rand(8, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64)
    noise = torch.rand(8, 3, 64, 64, generator=generator)
    for nothing in (plain, noisy(plain, 0.02), noise, (0.5 + 0.2 * (noise - 0.5))):
        assert metrics.collapsed(nothing).all()
    tiny_world.pipe.vae = AutoencoderKL.from_pretrained(EMOJI / "vae").float()
    latents = torch.randn(8, 4, 16, 16, generator=generator)
    assert metrics.collapsed(to_images(tiny_world, latents)).all()
    assert metrics.collapsed(to_images(tiny_world, 0.0 * latents)).all()


def test_unlearn_canvas_by_hand(tiny_world):
    pairs = [("Twemoji", "church"), ("Twemoji", "dog"), *[("Noto", "church"), ("OpenMoji", "dog")] * 2]
    styles = ["Twemoji", "blank", "Noto", "OpenMoji", "Noto", "Noto"]
    things = ["dog", "dog", "church", "dog", "church", "dog"]
    tiny_world.judge = SimpleNamespace(styles=lambda images: styles, things=lambda images: things)
    images = torch.zeros(6, 3, 16, 16)
    by_style = {"UA": 0.5, "IRA": 0.75, "CRA": 1.0, "n_erased": 2, "n_others": 4}
    assert metrics.unlearn_canvas(tiny_world, images, pairs, "Twemoji") == by_style
    by_thing = {"UA": 1 / 3, "IRA": 1.0, "CRA": 1 / 3, "n_erased": 3, "n_others": 3}
    assert metrics.unlearn_canvas(tiny_world, images, pairs, "church") == pytest.approx(by_thing)
    with pytest.raises(ValueError, match="6 pictures and 5 pairs"):
        metrics.unlearn_canvas(tiny_world, images, pairs[:5], "church")
    with pytest.raises(ValueError, match="0 pictures asked for with 'castle'"):
        metrics.unlearn_canvas(tiny_world, images, pairs, "castle")


def test_fid_equals_scipy():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 7, generator=generator)
    b = 0.5 + torch.randn(60, 7, generator=generator) @ torch.randn(7, 7, generator=generator)
    C_a, C_b = (v.double().T.cov().numpy() for v in (a, b))
    mean = (a.double().mean(0) - b.double().mean(0)).pow(2).sum().item()
    expected = mean + (C_a + C_b - 2 * sqrtm(C_a @ C_b).real).trace()
    assert metrics.fid(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.fid(a[:5], a[:5]) == pytest.approx(0, abs=1e-5)  # fewer rows than columns: a singular covariance


def test_fid_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])  # means 1 and 13, deviations sqrt 2 and sqrt 18
    assert metrics.fid(a, b) == pytest.approx(12**2 + 8)
    with pytest.raises(ValueError, match="two rows"):
        metrics.fid(a, b[:1])
    with pytest.raises(ValueError, match="one width"):
        metrics.fid(a, torch.zeros(4, 2))


def measured(world):
    """A tiny world with a judge and a CLIPModel of random weights."""
    torch.manual_seed(0)
    styles, things = [*world.styles, BLANK], [*world.objects, *world.people, BLANK]
    world.judge = Judge(Classifier(len(styles)).eval(), Classifier(len(things)).eval(), styles, things)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = world.pipe.tokenizer
    marks = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": world.text_length}
    world.clip = CLIPModel(
        CLIPConfig(
            text_config={**text, **marks, "vocab_size": len(tokenizer)},
            vision_config={**text, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    return world


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_report_holds_every_figure(tiny_world, tmp_path, monkeypatch, size):
    with_alexnet(monkeypatch, "random")
    monkeypatch.setattr("helpers.training.CACHE", tmp_path / "cache")
    for name, options in (("concept_inversion", {"steps": 1, "images": 1}), ("relearn", {"steps": 1, "images": 1})):
        monkeypatch.setattr(attacks, name, functools.partial(getattr(attacks, name), **options))
    world, edit = measured(tiny_world), small_edit(tiny_world, size)
    options = {"n": 2, "size": 64, "drawing": {"steps": 1}, "progress": False}
    result = metrics.report(world, edit, folder=tmp_path / "out", **options)
    sheet = result.pop("sheet")
    assert sheet.get_axes() and (tmp_path / "out" / "sheet.png").stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "sheet.png"]
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept == json.loads(json.dumps(result))
    assert next(iter(kept["concepts"])) == "church" and kept["concepts"]["church"]["erased"]
    assert len(kept["concepts"]) > 2 and not any(v["erased"] for k, v in kept["concepts"].items() if k != "church")
    assert (
        kept["concepts"]["castle"]["acc_after"]["n"] == 2
        and len(kept["concepts"]["castle"]["acc_after"]["interval"]) == 2
    )
    assert set(kept["attacks"]["church"]) == {"closed-form embedding", "concept inversion", "relearning"}
    assert kept["canvas"]["church"]["after"]["n_erased"] == 3
    assert kept["weight_change"] == {"value": edit.norm(), "M": edit.M}
    assert kept["drift"]["name"] == "LPIPS (AlexNet)" and kept["drift"]["size"] == 64 and kept["drift"]["n"] > 4
    assert kept["made_with"]["judge"] == world.judge.fingerprint() and kept["made_with"]["edit"]["concepts"] == [
        "church"
    ]
    for name, figures in kept["concepts"].items():
        assert (figures["lpips"] == 0) == (size == 0), name
        assert size or figures["acc_before"] == figures["acc_after"]
    assert (kept["drift"]["value"] == 0) == (size == 0) and (kept["fid"]["value"] < 1e-4) == (size == 0)


def test_report_refuses_what_it_cannot_measure(tiny_world, monkeypatch):
    with_alexnet(monkeypatch, "random")
    world, edit = measured(tiny_world), small_edit(tiny_world, 0.1)
    with pytest.raises(ValueError, match="meta"):
        metrics.report(world, Edit(edit.delta))
    with pytest.raises(ValueError, match="n 0"):
        metrics.report(world, edit, n=0)
    with pytest.raises(ValueError, match="every 0"):
        metrics.report(world, edit, every=0)
    with pytest.raises(ValueError, match="zebra"):
        metrics.report(world, edit, kept=["zebra"])


def test_panel_puts_the_neighbour_first():
    world = names_only()
    assert report.panel(world, ["Twemoji"]) == ["EmojiOne", "Noto", "Blob", "hammer", "santa claus"]
    assert report.panel(world, ["church"])[0] == "castle" and "church" not in report.panel(world, ["church"])


@pytest.mark.parametrize("every", [1, 3, 9])
def test_canvas_pairs_are_even(every):
    world = names_only()
    pairs = report.canvas_pairs(world, ["Twemoji"], every)
    assert len(set(pairs)) == len(pairs) and sum(s == "Twemoji" for s, _ in pairs) == 9
    others = [pair for pair in pairs if pair[0] != "Twemoji"]
    for part in (0, 1):
        counts = [sum(pair[part] == name for pair in others) for name in {pair[part] for pair in others}]
        assert max(counts) - min(counts) <= 1
    assert sum(o == "santa claus" for _, o in report.canvas_pairs(world, ["santa claus"])) == len(world.styles)


def names_only():
    """The emoji world's names and roles without a model."""
    roles = renders.concepts()["roles"]
    objects = [*roles["nine_objects"], "castle"]
    return World("emoji", None, renders.style_names(), objects, ["old man", "santa claus"], roles)


def test_training_the_backbone(tmp_path, monkeypatch):
    """Two steps on a few drawings: the weights move, a finished run is not trained again, and LPIPS reads the file."""
    monkeypatch.syspath_prepend(str(renders.DATA / "pretrain"))
    import train_lpips

    try:
        model = train_lpips.train(2, 4, tmp_path / "c.safetensors")
        again = train_lpips.train(2, 4, tmp_path / "c.safetensors")
        torch.manual_seed(0)
        start = train_lpips.Backbone()
        names = dict(model.features.named_parameters())
        assert names.keys() == CONVOLUTIONS.keys()
        assert all(torch.equal(value, again.features.get_parameter(name)) for name, value in names.items())
        assert not torch.equal(names["0.weight"], start.features.get_parameter("0.weight"))
        train_lpips.save(model, tmp_path / "alexnet.safetensors", steps=2)
        assert set(train_lpips.held_out(model, 8)) == {"style", "thing"}
    finally:
        for name in ("common", "train_judge", "train_lpips"):
            sys.modules.pop(name, None)
    monkeypatch.setattr(metrics, "LPIPS_WEIGHTS", tmp_path / "alexnet.safetensors")
    metrics.lpips_network.cache_clear()
    loaded = metrics.lpips_network(True).net.state_dict()["slice2.3.weight"]
    metrics.lpips_network.cache_clear()
    assert torch.allclose(loaded, names["3.weight"], atol=1e-3)
