"""The attacks on a world of random weights: exact where an equation says so, undone when over."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_edit

from helpers import Edit, attacks, sample
from helpers.concepts import TEMPLATES
from helpers.images import base_images
from helpers.parameters import select_parameters
from helpers.seeds import attack_seeds

SHORT = {"steps": 2}


@pytest.fixture
def world(tiny_world, cache):
    tiny_world.judge = scripted([0.0])
    return tiny_world


def scripted(shares: list[float]):
    """A judge that gives these shares of the images to the concept, call after call.

    The last share is given for ever.
    """
    left = list(shares)

    def gives(images, concept):
        share = left.pop(0) if len(left) > 1 else left[0]
        return torch.arange(len(images)) < share * len(images)

    return SimpleNamespace(gives=gives)


def turned(world):
    """Keys and values of turned text states: W' = W R, R orthogonal; c' = R^T c undoes it."""
    R = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    chosen = select_parameters(world, "kv")
    delta = {name: (p.detach() @ R - p.detach()).contiguous() for name, p in chosen.items()}
    return Edit(delta), R


def weights_of(world):
    """A copy of all weights that an edit may touch."""
    return {name: p.detach().clone() for name, p in world.parameters().items()}


def untouched(world, before) -> bool:
    return all(torch.equal(p, before[name]) for name, p in world.parameters().items())


# --- closed form


def test_closed_form_undoes_a_rotation(world):
    edit, R = turned(world)
    c = world.encode(["church"])
    found = attacks.closed_form_states(world, edit, c, gamma=1e-9)
    assert found.shape == c.shape and torch.allclose(found, c @ R, atol=1e-3)
    assert not torch.allclose(found, c, atol=0.1)


def test_closed_form_equals_least_squares(world):
    """The oracle: one stacked system, each row of the ridge a further equation."""
    edit, gamma = random_edit(world), 0.3
    c = world.encode(["dog"]).double()[0]
    kv = select_parameters(world, "kv")
    W = torch.cat([p.detach() for p in kv.values()]).double()
    W_new = torch.cat([p.detach() + edit.delta[name] for name, p in kv.items()]).double()
    ridge = gamma**0.5 * torch.eye(16, dtype=torch.float64)
    right = torch.cat([W @ c.T, torch.zeros(16, len(c), dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([W_new, ridge]), right).solution.T
    found = attacks.closed_form_states(world, edit, c[None].float(), gamma=gamma)
    assert torch.allclose(found[0].double(), expected, atol=1e-4)


def test_closed_form_brings_the_images_back(world):
    """Where keys and values can be undone, c' makes the edited model sample what the base does."""
    edit, _ = turned(world)
    plain = {"steps": 2, "guidance": 1.0}
    done = attacks.closed_form_embedding(
        world, edit, "church", seeds=[3, 4], gamma=1e-9, sampling=plain
    )
    prompts, seeds = ["church"] * 2, [3, 4]
    base, gone = (sample(world, prompts, seeds, e, progress=False, **plain) for e in (None, edit))
    assert (done.images - base).abs().max() < 1e-3 < (gone - base).abs().max()
    assert done.details["residual"] < 1e-3


# --- concept inversion


@pytest.mark.parametrize("concept", ["church", "santa claus"])  # one token, and two
def test_inversion_of_zero_steps_is_the_name_itself(world, concept):
    edit = random_edit(world)
    done = attacks.concept_inversion(
        world, edit, concept, seeds=[5], images=2, steps=0, sampling=SHORT, progress=False,
        before=0.25,
    )  # fmt: skip
    prompt = TEMPLATES[world.kind(concept)][1].format(c=concept)
    assert torch.equal(done.images, sample(world, [prompt], [5], edit, progress=False, **SHORT))
    assert done.before == 0.25 and done.details["training_images"] == 2


def test_inversion_searches_the_edited_model_and_leaves_no_trace(world):
    edit, before = random_edit(world), weights_of(world)
    states = world.encode(["church"])
    options = {"seeds": [0], "images": 2, "steps": 3, "sampling": SHORT, "progress": False}
    a, b = (attacks.concept_inversion(world, edit, "church", **options).found for _ in range(2))
    other = attacks.concept_inversion(world, 0.0 * edit, "church", **options).found
    assert torch.equal(a, b) and not torch.equal(a, other) and a.shape == (1, 16)
    assert torch.equal(states, world.encode(["church"])) and untouched(world, before)


def test_the_attacker_may_bring_images_of_their_own(world):
    """Images given as a tensor are what a count stands for: the attacker's, not the method's."""
    prompts = [TEMPLATES["object"][1].format(c="church")] * 2
    images = base_images(world, prompts, attack_seeds(0, 2))
    options = {"seeds": [0], "steps": 2, "sampling": SHORT, "progress": False}
    given, counted = (
        attacks.concept_inversion(world, random_edit(world), "church", images=i, **options).found
        for i in (images, 2)
    )
    assert torch.equal(given, counted)


# --- relearning


def learn(world, edit, shares, **options):
    world.judge = scripted(shares)
    options = {
        "seeds": [0, 1, 2, 3], "look_every": 2, "steps": 6, "lr": 1e-3, "sampling": SHORT,
        "progress": False, **options,
    }  # fmt: skip
    return attacks.relearn(world, edit, "church", **options)


@pytest.mark.parametrize(
    ("shares", "back", "curve"),
    [
        ([0.0, 0.25, 0.75, 0.0], 4, [(0, 0.0), (2, 0.25), (4, 0.75)]),
        ([0.5, 0.0], 0, [(0, 0.5)]),  # it was never gone; ACC equal to the threshold counts
        ([0.0], None, [(0, 0.0), (2, 0.0), (4, 0.0), (6, 0.0)]),
        ([0.0, 0.0, 0.0, 1.0], 6, [(0, 0.0), (2, 0.0), (4, 0.0), (6, 1.0)]),  # at the very end
    ],
)
def test_relearning_counts_steps(world, shares, back, curve):
    done = learn(world, random_edit(world), shares)
    assert done.details["back_after"] == back and done.details["curve"] == curve
    assert (done.before, done.after, done.n) == (curve[0][1], curve[-1][1], 4)


def test_relearning_looks_once_more_after_its_last_step(world):
    done = learn(world, random_edit(world), [0.0, 0.0, 0.75], steps=3)
    assert done.details["curve"] == [(0, 0.0), (2, 0.0), (3, 0.75)]
    assert done.details["back_after"] == 3


def test_relearning_starts_at_the_edit_and_trains(world):
    edit = random_edit(world)
    still = learn(world, edit, [0.0], steps=0).found
    assert all(torch.equal(still.delta[name], value) for name, value in edit.delta.items())
    assert set(still.delta) == set(select_parameters(world, "xattn"))
    assert not any(value.any() for name, value in still.delta.items() if name not in edit.delta)
    before = weights_of(world)
    moved = learn(world, edit, [0.0]).found
    assert not any(torch.equal(value, still.delta[name]) for name, value in moved.delta.items())
    assert untouched(world, before)


def test_relearning_trains_the_text_encoder_that_an_edit_changed(world):
    edit = random_edit(world, group="text", scale=0.01)
    moved = learn(world, edit, [0.0], steps=2).found
    changed = {name for name, v in edit.delta.items() if not torch.equal(v, moved.delta[name])}
    assert any("self_attn" in name for name in changed)
    assert set(moved.delta) == set(edit.delta) | set(select_parameters(world, "xattn"))


def test_values_are_ready_for_json(world):
    done = learn(world, random_edit(world), [0.25, 1.0])
    values = done.values()
    assert values["before"] == 0.25 and values["after"] == 1.0
    assert values["n"] == 4 and values["back_after"] == 2
    assert values["after_interval"][1] == 1.0 > values["after_interval"][0] > 0.3
    assert not {"images", "found"} & set(values)


# --- what is refused


@pytest.mark.parametrize(
    "attack", [attacks.concept_inversion, attacks.closed_form_embedding, attacks.relearn]
)
@pytest.mark.parametrize(
    ("concept", "options", "said"),
    [("zebra", {}, "zebra"), ("church", {"seeds": []}, "at least one seed")],
)
def test_bad_input(world, attack, concept, options, said):
    with pytest.raises(ValueError, match=said):
        attack(world, random_edit(world), concept, **options)


def test_bad_numbers(world):
    edit = random_edit(world)
    with pytest.raises(ValueError, match="gamma is 0"):
        attacks.closed_form_states(world, edit, world.encode(["church"]), gamma=0.0)
    with pytest.raises(ValueError, match="look_every is 0"):
        attacks.relearn(world, edit, "church", look_every=0)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        attacks.relearn(world, edit, "church", threshold=1.5)
    with pytest.raises(ValueError, match="another model"):
        attacks.relearn(world, Edit({"unet.nothing.weight": torch.zeros(2)}), "church")


def test_an_edit_of_another_base_is_refused(world):
    edit = random_edit(world)
    edit.meta["base"] = {"unet": "0" * 16}
    with pytest.raises(ValueError, match="made for base weights 0000"):
        attacks.closed_form_states(world, edit, world.encode(["church"]))
