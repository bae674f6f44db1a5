"""SepME: protected prompts keep their keys and values, increments add and come off, all three modes."""

import pytest
import torch

from helpers import unlearn
from helpers.methods import gcirs, sepme
from helpers.methods.sepme import Options, erase_separably, protected_prompts

CONCEPTS = ["Twemoji", "OpenMoji", "Noto"]
# the tiny text width of 16 is filled by two prompts of 16 tokens: a share of the energy leaves room
FAST = {"images": 2, "steps": 4, "batch_size": 2, "tau": -1e9, "energy": 0.9, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", tmp_path)


def shorten(world, rows):
    """Let the prompts span few directions, so that the tiny world's null space is exact and not empty."""
    real = world.encode

    def encode(prompts):
        states = real(prompts)
        states[..., rows:] *= (torch.arange(states.shape[1]) < 2)[
            None, :, None
        ]  # only two positions use every direction
        return states

    world.encode = encode


def test_protected_prompts_keep_their_keys_and_values_in_every_layer(tiny_world):
    shorten(tiny_world, 4)
    edits = erase_separably(tiny_world, CONCEPTS, **{**FAST, "energy": None, "lr": 1.0})
    layers = {n: p for n, p in tiny_world.unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
    for concept, edit in edits.items():
        assert set(edit.delta) == set(layers)
        for prompt in protected_prompts([c for c in CONCEPTS if c != concept]):
            states = tiny_world.encode([prompt])[0]
            for name, delta in edit.delta.items():
                change = (states @ delta.T).abs().max()
                scale = (states.abs() @ delta.abs().T).max()
                assert change <= 1e-5 * scale, (concept, prompt, name)  # fp32 rounding of a sum of 16 terms
        own = tiny_world.encode([concept])[0]
        assert max((own @ delta.T).abs().max() for delta in edit.delta.values()) > 1e-3  # it does move its own


def test_increments_add_and_come_off_again(tiny_world):
    edits = erase_separably(tiny_world, CONCEPTS, **FAST)
    whole = edits["Twemoji"] + edits["OpenMoji"] + edits["Noto"]
    rest = whole - edits["OpenMoji"]
    name = next(iter(whole.delta))
    assert torch.allclose(rest.delta[name], edits["Twemoji"].delta[name] + edits["Noto"].delta[name], atol=1e-6)
    assert whole.meta["concepts"] == CONCEPTS
    through_the_door = unlearn(tiny_world, CONCEPTS, method="sepme", **FAST)
    assert all(torch.equal(through_the_door.delta[n], whole.delta[n]) for n in whole.delta)


@pytest.mark.parametrize("mode", sepme.MODES)
def test_modes(tiny_world, mode):
    first = gcirs.Options(images=2, steps=3, batch_size=2)
    edits = erase_separably(tiny_world, CONCEPTS, mode=mode, first=first, **FAST)
    assert list(edits) == CONCEPTS
    keys = {n for n, _ in tiny_world.unet.named_parameters() if "attn2.to_k" in n or "attn2.to_v" in n}
    first = edits["Twemoji"]
    if mode == "iterative":
        assert first.meta["method"] == "gcirs" and set(first.delta) > keys
        assert edits["OpenMoji"].meta["protected"] == ["", "Twemoji"]  # what comes later is not known yet
        assert edits["Noto"].meta["protected"] == ["", "Twemoji", "OpenMoji"]
    else:
        assert set(first.delta) == keys and first.meta["protected"] == ["", "OpenMoji", "Noto"]
    assert all(edit.meta["concepts"] == [concept] for concept, edit in edits.items())


@pytest.mark.parametrize("variant", sepme.VARIANTS)
def test_a_stopped_concept_rests_in_joint_training(tiny_world, variant):
    """Also where gradients are never cleared: the release copies w at this point, and its live w moves on."""
    fast = {**FAST, "mode": "joint", "variant": variant}
    joint = erase_separably(tiny_world, CONCEPTS, **{**fast, "steps": 16, "tau": (1e9, -1e9, -1e9)})
    short = erase_separably(tiny_world, CONCEPTS, **{**fast, "steps": 12})
    assert all(torch.equal(joint["Twemoji"].delta[n], short["Twemoji"].delta[n]) for n in joint["Twemoji"].delta)
    assert any(not torch.equal(joint["Noto"].delta[n], short["Noto"].delta[n]) for n in joint["Noto"].delta)


def test_what_the_release_does_otherwise(tiny_world):
    jan, head = (Options(variant=f"code-{when}") for when in ("jan", "head"))
    assert jan.accumulate_grads and jan.penalty == "w-mean" and jan.mean_of_active
    assert head.accumulate_grads and head.penalty == "delta" and not head.mean_of_active
    assert gcirs.Options(variant="code-jan").accumulate_grads and not gcirs.Options().accumulate_grads
    part = sepme.Increments(tiny_world, torch.eye(16)[:, :3])
    for w in part.w.values():
        w.data += 2.0
    entries = sum(w.numel() for w in part.w.values())
    assert sepme.penalised(part, "w").item() == pytest.approx(2 * entries / len(part.w))
    assert sepme.penalised(part, "w-mean").item() == pytest.approx(2 * len(part.w))  # means of matrices, no division
    delta = sepme.penalised(part, "delta").item()
    assert delta == pytest.approx(2 * entries / len(part.w))  # directions are the first three axes: the same entries


def test_the_loss_may_be_divided_by_the_number_of_active_concepts(tiny_world):
    fast = {**FAST, "mode": "joint", "steps": 1, "lam": 0.0, "clip": 1e9}
    whole, mean = (
        erase_separably(tiny_world, CONCEPTS[:2], **fast, mean_of_active=m)["Twemoji"] for m in (False, True)
    )
    length = whole.history[0]["grad_norm"]
    assert mean.history[0]["grad_norm"] == pytest.approx(length / 2, rel=1e-4) and length > 0


def test_templates_protect_more_and_leave_less_room(tiny_world):
    few = sepme.free_directions(tiny_world, protected_prompts(["Noto"]), Options(energy=0.5))
    prompts = protected_prompts(["Noto"], ("a church in the style of {c}", "a dog"))
    assert prompts == ["", "Noto", "a church in the style of Noto", "a dog"]
    assert sepme.free_directions(tiny_world, prompts, Options(energy=0.99)).shape[1] < few.shape[1]


def test_an_empty_null_space_is_counted_by_rank(tiny_world):
    real = tiny_world.encode
    tiny_world.encode = lambda prompts: real(prompts) + torch.eye(16)  # rows that span every direction
    with pytest.raises(ValueError, match="rank 16, which is the whole width 16"):
        erase_separably(tiny_world, CONCEPTS, **{**FAST, "energy": None})


def test_resume_is_bit_exact(tiny_world, tmp_path, monkeypatch):
    options = {**FAST, "steps": 24}
    whole = erase_separably(tiny_world, CONCEPTS[:2], **options)
    real, calls = sepme.losses.mean_l1, []

    def dies(tensors):
        calls.append(1)
        if len(calls) == 24 + 22:
            raise KeyboardInterrupt
        return real(tensors)

    monkeypatch.setattr(sepme.losses, "mean_l1", dies)
    with pytest.raises(KeyboardInterrupt):
        erase_separably(tiny_world, CONCEPTS[:2], folder=tmp_path / "run", **options)
    monkeypatch.setattr(sepme.losses, "mean_l1", real)
    again = erase_separably(tiny_world, CONCEPTS[:2], folder=tmp_path / "run", **options)
    for concept, edit in whole.items():
        assert all(torch.equal(edit.delta[n], again[concept].delta[n]) for n in edit.delta)


@pytest.mark.parametrize(
    ("concepts", "options", "said"),
    [
        ([], {}, "at least one"),
        (["Noto", "Noto"], {}, "different names"),
        (["zebra"], {}, "zebra"),
        (["Noto"], {"mode": "all"}, "'all'"),
        (["Noto"], {"group": "xattn"}, "'xattn'"),
        (["Noto"], {"penalty": "l2"}, "'l2'"),
        (["Noto"], {"variant": "code-may"}, "'code-may'"),
        (["Noto"], {"energy": 1.5}, "energy is 1.5"),
    ],
)
def test_bad_input(tiny_world, concepts, options, said):
    with pytest.raises(ValueError, match=said):
        erase_separably(tiny_world, concepts, **{**FAST, **options})
