"""The attacks on a world of random weights: exact where an equation says so, and undone when they are over."""

from types import SimpleNamespace

import pytest
import torch

from helpers import Edit, attacks, sample
from helpers.training import TEMPLATES, select_parameters

SHORT = {"steps": 2}


@pytest.fixture
def world(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", tmp_path)
    tiny_world.judge = scripted([0.0])
    return tiny_world


def scripted(shares: list[float]):
    """A judge that gives these shares of the pictures to the concept, call after call; the last one for ever."""
    left = list(shares)

    def gives(images, concept):
        share = left.pop(0) if len(left) > 1 else left[0]
        return torch.arange(len(images)) < share * len(images)

    return SimpleNamespace(gives=gives)


def random_edit(world, size=0.1, group="kv"):
    generator = torch.Generator().manual_seed(0)
    chosen = select_parameters(world.unet, group)
    return Edit({name: size * torch.randn(p.shape, generator=generator) for name, p in chosen.items()})


def turned(world):
    """Keys and values that read turned text states: W' = W R with R orthogonal, so that c' = R^T c undoes it."""
    R = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    chosen = select_parameters(world.unet, "kv")
    return Edit({name: (p.detach() @ R - p.detach()).contiguous() for name, p in chosen.items()}), R


def test_closed_form_undoes_a_rotation(world):
    edit, R = turned(world)
    c = world.encode(["church"])
    found = attacks.closed_form_states(world, edit, c, gamma=1e-9)
    assert found.shape == c.shape and torch.allclose(found, c @ R, atol=1e-3) and not torch.allclose(found, c, atol=0.1)


def test_closed_form_equals_least_squares(world):
    """The oracle: one stacked system, each row of the ridge a further equation."""
    edit, gamma = random_edit(world), 0.3
    c = world.encode(["dog"]).double()[0]
    names = list(select_parameters(world.unet, "kv"))
    W = torch.cat([world.unet.get_parameter(name).detach() for name in names]).double()
    W_new = torch.cat([world.unet.get_parameter(name).detach() + edit.delta[name] for name in names]).double()
    ridge = gamma**0.5 * torch.eye(16, dtype=torch.float64)
    right = torch.cat([W @ c.T, torch.zeros(16, len(c), dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([W_new, ridge]), right).solution.T
    found = attacks.closed_form_states(world, edit, c[None].float(), gamma=gamma)
    assert torch.allclose(found[0].double(), expected, atol=1e-4)


def test_closed_form_brings_the_pictures_back(world):
    """Where keys and values can be undone, the edited model draws from c' what the base draws from c (guidance 1)."""
    edit, _ = turned(world)
    plain = {"steps": 2, "guidance": 1.0}
    done = attacks.closed_form_embedding(world, edit, "church", seeds=[3, 4], gamma=1e-9, drawing=plain)
    base = sample(world, ["church"] * 2, [3, 4], progress=False, **plain)
    gone = sample(world, ["church"] * 2, [3, 4], edit=edit, progress=False, **plain)
    assert (done.images - base).abs().max() < 1e-3 < (gone - base).abs().max()
    assert done.details["residual"] < 1e-3


@pytest.mark.parametrize("concept", ["church", "santa claus"])  # one token, and two
def test_inversion_of_zero_steps_is_the_name_itself(world, concept):
    edit = random_edit(world)
    done = attacks.concept_inversion(
        world, edit, concept, seeds=[5], images=2, steps=0, drawing=SHORT, progress=False, before=0.25
    )
    asked = TEMPLATES[world.kind(concept)][1].format(c=concept)
    assert torch.equal(done.images, sample(world, [asked], [5], edit=edit, progress=False, **SHORT))
    assert done.before == 0.25 and done.details["pictures"] == 2


def test_inversion_searches_the_edited_model_and_leaves_no_trace(world):
    edit = random_edit(world)
    before = {name: p.detach().clone() for name, p in world.unet.named_parameters()}
    states = world.encode(["church"])
    options = {"seeds": [0], "images": 2, "steps": 3, "drawing": SHORT, "progress": False}
    a, b = (attacks.concept_inversion(world, edit, "church", **options).found for _ in range(2))
    other = attacks.concept_inversion(world, 0.0 * edit, "church", **options).found
    assert torch.equal(a, b) and not torch.equal(a, other) and a.shape == (1, 16)
    assert torch.equal(states, world.encode(["church"]))
    assert all(torch.equal(p, before[name]) for name, p in world.unet.named_parameters())


def learn(world, edit, shares, **options):
    world.judge = scripted(shares)
    options = {
        "seeds": [0, 1, 2, 3],
        "every": 2,
        "steps": 6,
        "lr": 1e-3,
        "drawing": SHORT,
        "progress": False,
        **options,
    }
    return attacks.relearn(world, edit, "church", **options)


@pytest.mark.parametrize(
    ("shares", "back", "curve"),
    [
        ([0.0, 0.25, 0.75, 0.0], 4, [(0, 0.0), (2, 0.25), (4, 0.75)]),
        ([0.5, 0.0], 0, [(0, 0.5)]),  # it was never gone; ACC equal to the threshold counts
        ([0.0], None, [(0, 0.0), (2, 0.0), (4, 0.0), (6, 0.0)]),
        ([0.0, 0.0, 0.0, 1.0], 6, [(0, 0.0), (2, 0.0), (4, 0.0), (6, 1.0)]),  # back at the very end
    ],
)
def test_relearning_counts_steps(world, shares, back, curve):
    done = learn(world, random_edit(world), shares)
    assert done.details["back_after"] == back and done.details["curve"] == curve
    assert (done.before, done.after, done.n) == (curve[0][1], curve[-1][1], 4)


def test_relearning_starts_at_the_edit_and_trains(world):
    edit = random_edit(world)
    still = learn(world, edit, [0.0], steps=0).found
    assert all(torch.equal(still.delta[name], value) for name, value in edit.delta.items())
    assert set(still.delta) == set(select_parameters(world.unet, "xattn"))
    assert all(value.eq(0).all() for name, value in still.delta.items() if name not in edit.delta)
    before = {name: p.detach().clone() for name, p in world.unet.named_parameters()}
    moved = learn(world, edit, [0.0]).found
    assert all(not torch.equal(moved.delta[name], still.delta[name]) for name in still.delta)
    assert all(torch.equal(p, before[name]) for name, p in world.unet.named_parameters())


def test_figures_are_ready_for_json(world):
    done = learn(world, random_edit(world), [0.25, 1.0])
    figures = done.figures()
    assert figures["before"] == 0.25 and figures["after"] == 1.0 and figures["n"] == 4 and figures["back_after"] == 2
    assert figures["after_interval"][1] == 1.0 > figures["after_interval"][0] > 0.3
    assert not {"images", "found"} & set(figures)


@pytest.mark.parametrize("attack", [attacks.concept_inversion, attacks.closed_form_embedding, attacks.relearn])
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
    with pytest.raises(ValueError, match="every is 0"):
        attacks.relearn(world, edit, "church", every=0)
    with pytest.raises(ValueError, match=r"threshold 1\.5"):
        attacks.relearn(world, edit, "church", threshold=1.5)
    with pytest.raises(ValueError, match="another model"):
        attacks.relearn(world, Edit({"nothing.weight": torch.zeros(2)}), "church")


def test_states_given_to_sample(world):
    """The prompts' own states, given by hand, draw the same pictures; another shape is refused."""
    prompts, seeds = ["church", "dog"], [1, 2]
    plain = sample(world, prompts, seeds, progress=False, **SHORT)
    given = sample(world, ["", ""], seeds, states=world.encode(prompts), batch_size=1, progress=False, **SHORT)
    assert torch.allclose(plain, given, atol=1e-4)
    with pytest.raises(ValueError, match=r"states have shape \(1, "):
        sample(world, prompts, seeds, states=world.encode(["church"]), progress=False, **SHORT)
