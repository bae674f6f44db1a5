"""AIzheimer's three methods on a world of random weights: what moves, what does not, and what is refused."""

import pytest
import torch

from helpers import unlearn
from helpers.attention import cross_attentions
from helpers.methods import attention_losses as method
from helpers.training import kept_latents

METHODS = ["resteering", "distraction", "random_stimulus"]
FAST = {"images": 2, "steps": 3, "batch_size": 2, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_edit_and_the_world_is_unchanged(tiny_world, name):
    before = {n: p.detach().clone() for n, p in tiny_world.unet.named_parameters()}
    a, b = (unlearn(tiny_world, "church", method=name, seed=3, **FAST) for _ in range(2))
    assert all(torch.equal(a.delta[n], b.delta[n]) for n in a.delta)
    assert all(torch.equal(p, before[n]) for n, p in tiny_world.unet.named_parameters())
    assert not any(p.requires_grad for p in tiny_world.unet.parameters())
    assert set(a.delta) == {n for n in before if "attn2." in n} and a.norm() > 0
    other = unlearn(tiny_world, "church", method=name, seed=4, **FAST)
    assert any(not torch.equal(a.delta[n], other.delta[n]) for n in a.delta)
    assert {"attention", "reconstruction", "total", "statistics"} <= set(a.history[0])
    assert a.meta["method"] == name and a.meta["concepts"] == ["church"] and a.meta["seed"] == 3


@pytest.mark.parametrize("name", METHODS)
def test_the_attention_loss_falls(tiny_world, name):
    edit = unlearn(tiny_world, "church", method=name, recon=0.0, lam=1.0, lr=1e-2, **{**FAST, "steps": 30})
    first, last = edit.history[0]["attention"], sum(row["attention"] for row in edit.history[-5:]) / 5
    assert last < first


def test_skipping_first_and_last_is_by_execution_order(tiny_world):
    layers = list(cross_attentions(tiny_world.unet))
    assert method.chosen_layers(tiny_world, method.Options(skip_first_and_last=True)) == layers[1:-1]
    released = method.chosen_layers(tiny_world, method.Options(skip_as_released=True))
    assert layers[-1] in released and not any("mid_block" in name for name in released)
    edit = unlearn(tiny_world, "church", method="distraction", skip_first_and_last=True, **FAST)
    assert not any(name.startswith((layers[0], layers[-1])) for name in edit.delta)


def test_several_concepts_in_one_run(tiny_world):
    edit = unlearn(tiny_world, ["church", "santa claus", "Noto"], method="resteering", **FAST)
    assert edit.meta["concepts"] == ["church", "santa claus", "Noto"]


def test_which_positions_count(tiny_world):
    prompts, owners = ["a picture of a santa claus"], ["santa claus"]
    name = method.token_columns(tiny_world, prompts, owners, method.Options(end=False))[0]
    everything = method.token_columns(tiny_world, prompts, owners, method.Options())[0]
    released = method.token_columns(tiny_world, prompts, owners, method.Options(variant="code"))[0]
    assert len(name) == 2 and released == name[-1:]
    assert everything == [
        *name,
        *range(name[-1] + 1, tiny_world.text_length),
    ]  # the name comes last, then end and padding


def test_reconstruction_is_of_what_is_kept_unless_asked(tiny_world, monkeypatch):
    latents, names = kept_latents(tiny_world, ["church", "Noto"])
    assert set(names) == set(tiny_world.concepts) - {"church", "Noto"} and len(latents) == len(names)
    kept = unlearn(tiny_world, "church", method="resteering", **FAST)
    monkeypatch.setattr(method, "kept_latents", None)  # the concept's own pictures need no others
    own = unlearn(tiny_world, "church", method="resteering", recon_on="concept", **FAST)
    assert kept.history[0]["reconstruction"] != own.history[0]["reconstruction"]


def test_each_loss_has_its_own_weight(tiny_world):
    for name in METHODS:
        edit = unlearn(tiny_world, "church", method=name, **{**FAST, "steps": 1})
        row = edit.history[0]
        assert edit.meta["options"]["lam"] == method.LAM[name]
        expected = row["reconstruction"] + method.LAM[name] * row["attention"]
        assert row["total"] == pytest.approx(expected, rel=1e-5)


def test_without_reconstruction_nothing_is_logged_for_it(tiny_world):
    edit = unlearn(tiny_world, "church", method="resteering", recon=0.0, variant="code", **FAST)
    assert "reconstruction" not in edit.history[0]


def test_resume_gives_the_same_edit(tiny_world, tmp_path, monkeypatch):
    options = {**FAST, "steps": 24}
    whole = unlearn(tiny_world, "church", method="resteering", **options)
    file = str(tmp_path / "run.safetensors")
    real = method.losses.reconstruction
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 22:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(method.losses, "reconstruction", dies)
    with pytest.raises(KeyboardInterrupt):
        unlearn(tiny_world, "church", method="resteering", checkpoint=file, **options)
    monkeypatch.setattr(method.losses, "reconstruction", real)
    again = unlearn(tiny_world, "church", method="resteering", checkpoint=file, **options)
    assert all(torch.equal(again.delta[n], whole.delta[n]) for n in whole.delta)


@pytest.mark.parametrize(
    ("concept", "options", "said"),
    [
        ("zebra", {}, "zebra"),
        ([], {}, "empty"),
        ("church", {"lam": -1.0}, r"lam is -1\.0"),
        ("church", {"images": 0}, "images is 0"),
        ("church", {"recon_on": "all"}, "'all'"),
        ("church", {"images": "no-such-folder"}, "no-such-folder"),
        ("church", {"lamda": 1.0}, "no option lamda"),
        ("church", {"group": "nothing"}, "unknown group"),
        ("church", {"variant": "draft"}, "draft"),
    ],
)
def test_bad_input(tiny_world, concept, options, said):
    with pytest.raises(ValueError, match=said):
        unlearn(tiny_world, concept, method="distraction", **{**FAST, **options})


def test_unknown_method(tiny_world):
    with pytest.raises(ValueError, match=r"'forget'.*resteering"):
        unlearn(tiny_world, "church", method="forget")
