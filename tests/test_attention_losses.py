"""AIzheimer's three methods on a world of random weights: what moves, what does not, and what is
refused."""

import pytest
import torch

from helpers import unlearn
from helpers.attention import cross_attentions, find_tokens, record
from helpers.images import retain_latents
from helpers.methods import attention, distraction, random_stimulus, resteering

MODULES = {
    "resteering": resteering, "distraction": distraction, "random_stimulus": random_stimulus,
}  # fmt: skip
FAST = {"images": 2, "steps": 3, "batch_size": 2, "progress": False}

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("name", MODULES)
def test_cross_attention_is_trained_and_the_terms_are_logged(tiny_world, name):
    edit = unlearn(tiny_world, "church", method=name, seed=3, **FAST)
    trained = {n for n in tiny_world.parameters() if n.startswith("unet.") and "attn2." in n}
    assert set(edit.delta) == trained and edit.norm() > 0
    other = unlearn(tiny_world, "church", method=name, seed=4, **FAST)
    assert any(not torch.equal(edit.delta[n], other.delta[n]) for n in edit.delta)
    assert {"attention", "reconstruction", "total", "statistics"} <= set(edit.history[0])
    assert edit.meta["method"] == name and edit.concepts == {"church": 1.0}
    assert edit.meta["seed"] == 3


@pytest.mark.parametrize("name", MODULES)
def test_the_attention_loss_falls(tiny_world, name):
    options = {**FAST, "recon": 0.0, "lam": 1.0, "lr": 1e-2, "steps": 30}
    edit = unlearn(tiny_world, "church", method=name, **options)
    first = edit.history[0]["attention"]
    assert sum(row["attention"] for row in edit.history[-5:]) / 5 < first


def test_skipping_first_and_last_is_by_execution_order(tiny_world):
    layers = list(cross_attentions(tiny_world.unet))
    skip = attention.Options(skip_first_and_last=True)
    assert attention.chosen_layers(tiny_world, skip) == layers[1:-1]
    released = attention.chosen_layers(tiny_world, attention.Options(skip_as_released=True))
    assert layers[-1] in released and not any("mid_block" in name for name in released)
    edit = unlearn(tiny_world, "church", method="distraction", skip_first_and_last=True, **FAST)
    left_out = (f"unet.{layers[0]}.", f"unet.{layers[-1]}.")
    assert edit.delta and not any(name.startswith(left_out) for name in edit.delta)
    counted = {name.removeprefix("unet.").split(".attn2.")[0] + ".attn2" for name in edit.delta}
    assert counted == set(layers[1:-1])


def attention_to(world, concept, edit=None):
    """The mean share of cross-attention that a concept's name gets in its bare prompt."""
    columns = find_tokens(world, [concept], concept)[0]
    x = torch.randn(4, *world.latent_shape, generator=torch.Generator().manual_seed(5))
    t, states = torch.tensor([100, 300, 500, 700]), world.encode([concept]).expand(4, -1, -1)
    with world.applied(edit), record(world.unet, columns=columns) as maps, torch.no_grad():
        world.unet(x, t, states)
    return sum(A.sum(-1).mean().item() for (A,) in maps.values()) / len(maps)


def test_several_concepts_in_one_run(tiny_world):
    """Each of them loses attention, and the others more than in a run for one of them alone."""
    concepts = ["church", "santa claus", "Noto"]
    options = {
        **FAST, "method": "resteering", "recon": 0.0, "lam": 1.0, "lr": 3e-2, "steps": 40,
        "end": False, "batch_size": 6,
    }  # fmt: skip
    together, alone = (unlearn(tiny_world, c, **options) for c in (concepts, concepts[0]))
    assert together.concepts == dict.fromkeys(concepts, 1.0) and together.erased == concepts
    for concept in concepts:
        assert attention_to(tiny_world, concept, together) < 0.1 * attention_to(tiny_world, concept)
    for concept in concepts[1:]:
        others = attention_to(tiny_world, concept, alone)
        assert attention_to(tiny_world, concept, together) < 0.5 * others


def test_each_concept_s_own_tokens_count(tiny_world):
    """The rows of one batch belong to different concepts, at different positions."""
    prompts, owners = ["a picture of a church", "Noto", "santa claus"], ["church", "Noto"]
    owners = [*owners, "santa claus"]
    columns = attention.token_columns(tiny_world, prompts, owners, attention.Options(end=False))
    found = [find_tokens(tiny_world, [p], o)[0] for p, o in zip(prompts, owners, strict=True)]
    assert columns == found and [len(c) for c in columns] == [len(c) for c in found]
    assert columns[0] != columns[1] and len(columns[2]) == 2


def test_which_positions_count(tiny_world):
    prompts, owners = ["a picture of a santa claus"], ["santa claus"]
    name, everything, released = (
        attention.token_columns(tiny_world, prompts, owners, attention.Options(**options))[0]
        for options in ({"end": False}, {}, {"variant": "code"})
    )
    assert len(name) == 2 and released == name[-1:]
    # the name comes last, then EOS and padding
    assert everything == [*name, *range(name[-1] + 1, tiny_world.text_length)]


def test_reconstruction_is_of_the_retain_set_unless_asked(tiny_world, monkeypatch):
    latents, names = retain_latents(tiny_world, ["church", "Noto"])
    assert set(names) == set(tiny_world.concepts) - {"church", "Noto"}
    assert len(latents) == len(names)
    retained = unlearn(tiny_world, "church", method="resteering", **FAST)
    monkeypatch.setattr(attention, "retain_latents", None)  # its own images need no others
    own = unlearn(tiny_world, "church", method="resteering", recon_on="concept", **FAST)
    assert retained.history[0]["reconstruction"] != own.history[0]["reconstruction"]


@pytest.mark.parametrize("name", MODULES)
def test_each_loss_has_its_own_weight(tiny_world, name):
    edit = unlearn(tiny_world, "church", method=name, **{**FAST, "steps": 1})
    row, lam = edit.history[0], MODULES[name].Options().lam
    assert edit.meta["options"]["lam"] == lam > 0
    assert row["total"] == pytest.approx(row["reconstruction"] + lam * row["attention"], rel=1e-5)
    assert len({module.Options().lam for module in MODULES.values()}) == 3


def test_without_reconstruction_nothing_is_logged_for_it(tiny_world):
    edit = unlearn(tiny_world, "church", method="resteering", recon=0.0, variant="code", **FAST)
    assert "reconstruction" not in edit.history[0]


def test_clean_latents_are_fed_if_asked(tiny_world):
    """The paper's Table IV: another input, so other maps, of the same batches."""
    noised, clean = (
        unlearn(tiny_world, "church", method="resteering", add_noise=add, **{**FAST, "steps": 1})
        for add in (True, False)
    )
    assert noised.history[0]["attention"] != clean.history[0]["attention"]


@pytest.mark.parametrize(
    ("concept", "options", "said"),
    [
        ("zebra", {}, "zebra"),
        ([], {}, r"concepts is \[\]: give different names, at least one"),
        (["church", "church"], {}, "different names"),
        ("church", {"lam": -1.0}, r"lam is -1\.0: give a finite number, 0 or more"),
        ("church", {"recon": -0.5}, r"recon is -0\.5: give a finite number, 0 or more"),
        ("church", {"images": 0}, "images is 0: give a whole number, 1 or more"),
        ("church", {"recon_on": "all"}, "unknown recon_on 'all': choose from 'retain', 'concept'"),
        ("church", {"images": "no-such-folder"}, "no-such-folder"),
        ("church", {"lamda": 1.0}, "no option lamda .did you mean 'lam'"),
        ("church", {"group": "nothing"}, "unknown group"),
        ("church", {"variant": "draft"}, "unknown variant 'draft': choose from 'paper', 'code'$"),
        ("church", {"variant": "fmn"}, "unknown variant 'fmn'"),  # re-steering's alone
    ],
)
def test_bad_input(tiny_world, concept, options, said):
    with pytest.raises(ValueError, match=said):
        unlearn(tiny_world, concept, method="distraction", **{**FAST, **options})


def test_variants_of_re_steering():
    choices = ["paper", "code", "fmn"]
    assert [resteering.Options(variant=v).variant for v in choices] == choices


def test_unknown_method(tiny_world):
    with pytest.raises(ValueError, match=r"'forget'.*resteering"):
        unlearn(tiny_world, "church", method="forget")
