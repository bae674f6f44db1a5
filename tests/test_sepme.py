"""SepME: protected prompts keep their keys and values, increments add and come off, all modes."""

import pytest
import torch

from helpers import unlearn
from helpers.methods import options_of, sepme
from helpers.methods.sepme import Options, erase_separably, protected_prompts
from helpers.parameters import NullSpace, select_parameters

MODES = ("joint", "separate", "iterative")
CONCEPTS = ["Twemoji", "OpenMoji", "Noto"]
# two prompts of 16 tokens fill the tiny text width of 16: a share of the energy leaves room
FAST = {
    "images": 2, "steps": 4, "batch_size": 2, "tau": -1e9, "energy": 0.9, "progress": False,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("cache")


def shorten(world, rows):
    """Let the prompts span few directions, so that the null space is exact and not empty.

    Only two positions of a prompt still use every direction.
    """
    real = world.encode

    def encode(prompts):
        states = real(prompts)
        states[..., rows:] *= (torch.arange(states.shape[1]) < 2)[None, :, None]
        return states

    world.encode = encode


def same(a, b):
    """Whether two edits are the same to the bit."""
    return a.delta.keys() == b.delta.keys() and all(
        torch.equal(value, b.delta[name]) for name, value in a.delta.items()
    )


def test_protected_prompts_keep_their_keys_and_values_in_every_layer(tiny_world):
    shorten(tiny_world, 4)
    edits = erase_separably(tiny_world, CONCEPTS, **{**FAST, "energy": None, "lr": 1.0})
    layers = set(select_parameters(tiny_world, "kv"))
    for concept, edit in edits.items():
        assert set(edit.delta) == layers
        for prompt in protected_prompts([c for c in CONCEPTS if c != concept]):
            states = tiny_world.encode([prompt])[0]
            for name, delta in edit.delta.items():
                change = (states @ delta.T).abs().max()
                scale = (states.abs() @ delta.abs().T).max()
                rounding = 1e-5 * scale  # fp32, a sum of 16 terms
                assert change <= rounding, (concept, prompt, name)
        own = tiny_world.encode([concept])[0]  # it does move its own
        assert max((own @ delta.T).abs().max() for delta in edit.delta.values()) > 1e-3


def test_known_concepts_and_templates_are_protected_too(tiny_world):
    shorten(tiny_world, 4)
    options = {**FAST, "energy": None, "lr": 1.0, "known": ("church",), "protect": ("a {c}",)}
    edit = erase_separably(tiny_world, ["Noto"], **options)["Noto"]
    assert edit.meta["protected"] == ["", "church", "a church"]
    for prompt in edit.meta["protected"]:
        states = tiny_world.encode([prompt])[0]
        for delta in edit.delta.values():
            scale = (states.abs() @ delta.abs().T).max()
            assert (states @ delta.T).abs().max() <= 1e-5 * scale


def test_increments_add_and_come_off_again(tiny_world):
    edits = erase_separably(tiny_world, CONCEPTS, **FAST)
    whole = edits["Twemoji"] + edits["OpenMoji"] + edits["Noto"]
    rest = whole - edits["OpenMoji"]
    for name, value in rest.delta.items():
        wanted = edits["Twemoji"].delta[name] + edits["Noto"].delta[name]
        assert torch.allclose(value, wanted, atol=1e-6)
    assert whole.erased == CONCEPTS and rest.erased == ["Twemoji", "Noto"]
    through_the_door = unlearn(tiny_world, CONCEPTS, method="sepme", **FAST)
    assert same(through_the_door, whole) and list(through_the_door.parts) == CONCEPTS
    assert all(same(part, edits[c]) for c, part in through_the_door.parts.items())


@pytest.mark.parametrize("mode", MODES)
def test_modes(tiny_world, mode):
    first = {"images": 2, "steps": 3, "batch_size": 2}
    edits = erase_separably(tiny_world, CONCEPTS, mode=mode, first=first, **FAST)
    keys, first = set(select_parameters(tiny_world, "kv")), edits["Twemoji"]
    assert list(edits) == CONCEPTS
    if mode == "iterative":
        assert len(first.history) == 3 and set(first.delta) > keys
        assert "protected" not in first.meta  # G-CiRs' own
        # what comes later is not known yet
        assert edits["OpenMoji"].meta["protected"] == ["", "Twemoji"]
        assert edits["Noto"].meta["protected"] == ["", "Twemoji", "OpenMoji"]
    else:
        assert set(first.delta) == keys
        assert first.meta["protected"] == ["", "OpenMoji", "Noto"]
    assert all(edit.erased == [concept] for concept, edit in edits.items())


@pytest.mark.parametrize("mode", MODES)
def test_one_concept_has_its_part_too(tiny_world, mode):
    first = {"images": 2, "steps": 3, "batch_size": 2}
    whole = unlearn(tiny_world, ["Noto"], "sepme", mode=mode, first=first, **FAST)
    assert list(whole.parts) == ["Noto"] and same(whole.parts["Noto"], whole)
    assert not any(value.any() for value in (whole - whole.parts["Noto"]).delta.values())


def test_the_first_of_the_iterative_mode_is_g_cirs(tiny_world):
    first = {"images": 2, "steps": 3, "batch_size": 2, "tau": -1e9}
    edits = erase_separably(tiny_world, CONCEPTS[:2], mode="iterative", first=first, **FAST)
    plain = unlearn(tiny_world, CONCEPTS[0], "gcirs", progress=False, **first)
    assert same(edits[CONCEPTS[0]], plain)


@pytest.mark.parametrize("variant", sepme.VARIANTS)
def test_a_stopped_concept_rests_in_joint_training(tiny_world, variant):
    """Also where gradients are never cleared: the release copies w here, its live w moves on."""
    fast = {**FAST, "mode": "joint", "variant": variant}
    stopping = {**fast, "steps": 16, "tau": (1e9, -1e9, -1e9)}
    joint = erase_separably(tiny_world, CONCEPTS, **stopping)
    short = erase_separably(tiny_world, CONCEPTS, **{**fast, "steps": 12})
    assert same(joint["Twemoji"], short["Twemoji"])
    assert not same(joint["Noto"], short["Noto"])


def test_what_the_release_does_otherwise(tiny_world):
    jan, head = (options_of("sepme", {"variant": f"code-{when}"}) for when in ("jan", "head"))
    assert jan.accumulate_grads and jan.penalty == "w-mean" and jan.mean_of_active
    assert head.accumulate_grads and head.penalty == "delta" and not head.mean_of_active
    told = options_of("sepme", {"variant": "code-jan", "penalty": "w", "accumulate_grads": False})
    assert told.penalty == "w" and not told.accumulate_grads and told.mean_of_active
    part = NullSpace(tiny_world, torch.eye(16)[:, :3])
    for w in part.w.values():
        w.data += 2.0
    entries, M = sum(w.numel() for w in part.w.values()), len(part.w)
    assert sepme.penalised(part, "w").item() == pytest.approx(2 * entries / M)
    # the sum of each matrix's mean, no division
    assert sepme.penalised(part, "w-mean").item() == pytest.approx(2 * M)
    # directions are the first three axes: the same entries
    assert sepme.penalised(part, "delta").item() == pytest.approx(2 * entries / M)


def test_the_loss_may_be_divided_by_the_number_of_active_concepts(tiny_world):
    fast = {**FAST, "mode": "joint", "steps": 1, "lam": 0.0, "clip": 1e9}
    whole, mean = (
        unlearn(tiny_world, CONCEPTS[:2], "sepme", **fast, mean_of_active=m).history[0]
        for m in (False, True)
    )
    assert whole["grad_norm"] > 0
    assert mean["grad_norm"] == pytest.approx(whole["grad_norm"] / 2, rel=1e-4)


def test_templates_protect_more_and_leave_less_room(tiny_world):
    few = protected_prompts(["Noto"])
    more = protected_prompts(["Noto"], ("a church in the style of {c}", "a dog"))
    assert more == ["", "Noto", "a church in the style of Noto", "a dog"]
    wide = sepme.free_directions(tiny_world, few, Options(energy=0.5))
    narrow = sepme.free_directions(tiny_world, more, Options(energy=0.99))
    assert narrow.shape[1] < wide.shape[1]


def test_an_empty_null_space_is_counted_by_rank(tiny_world):
    real = tiny_world.encode
    tiny_world.encode = lambda prompts: real(prompts) + torch.eye(16)  # rows span every direction
    with pytest.raises(ValueError, match="rank 16, which is the whole width 16"):
        erase_separably(tiny_world, CONCEPTS, **{**FAST, "energy": None})


def test_a_run_killed_in_its_second_concept_goes_on_there(tiny_world, tmp_path):
    options = {**FAST, "steps": 24}
    whole = erase_separably(tiny_world, CONCEPTS[:2], **options)
    passes = []

    def dies(module, given):
        passes.append(1)
        if len(passes) > 2 * (24 + 22):  # base and edited network in each step
            raise KeyboardInterrupt

    hook = tiny_world.unet.register_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        erase_separably(tiny_world, CONCEPTS[:2], folder=tmp_path / "run", **options)
    hook.remove()
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["0.safetensors", "1.safetensors"]
    again = erase_separably(tiny_world, CONCEPTS[:2], folder=tmp_path / "run", **options)
    assert all(same(edit, again[concept]) for concept, edit in whole.items())


@pytest.mark.parametrize(
    ("concepts", "options", "said"),
    [
        ("Noto", {}, "give a list of text, as in"),
        (["Noto"], {"known": ("zebra",)}, "zebra"),
        (["Noto"], {"mode": "all"}, "unknown mode 'all'"),
        (["Noto"], {"group": "xattn"}, "unknown group 'xattn'"),
        (["Noto"], {"penalty": "l2"}, "unknown penalty 'l2'"),
        (["Noto"], {"energy": 1.5}, "energy is 1.5"),
        (["Noto"], {"tau": (0.0, 0.0)}, "2 values of tau"),
        (["Noto"], {"first": {"taus": 1}, "mode": "iterative"}, "gcirs has no option taus"),
    ],
)
def test_bad_input(tiny_world, concepts, options, said):
    with pytest.raises(ValueError, match=said):
        erase_separably(tiny_world, concepts, **{**FAST, **options})
