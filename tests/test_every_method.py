"""Every method of the catalogue, held to the same properties; and a toy method from outside.

A new method is a module and an entry in data/methods.toml: it is tested here by that alone.
"""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_world
from diffusers import StableDiffusionPipeline

from helpers import Edit, attacks, images, metrics, sample, unlearn
from helpers.methods import METHODS, catalogue, module_of, options_of
from helpers.perceptual import Perceptual, emoji_network
from helpers.seeds import step_generator
from helpers.training import Training

ROOT = Path(__file__).resolve().parents[1]
TRAINED = [name for name in METHODS if hasattr(module_of(name), "problem")]
every_method = pytest.mark.parametrize("name", METHODS)
every_trained = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(scope="module")
def world():
    """One for all: a method leaves the world as it was, which is tested."""
    return build_tiny_world()


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return tmp_path_factory.mktemp("sampled")  # shared: the tiny world is always the same


@pytest.fixture(autouse=True)
def shared_cache(sampled, monkeypatch):
    monkeypatch.setattr(images, "CACHE", sampled)


def forget(world, name, concept="church", **options) -> Edit:
    """One short training, by the catalogue's quick options."""
    return unlearn(world, concept, name, progress=False, **{**METHODS[name]["quick"], **options})


def problems(world, name, concepts, **options) -> list:
    """What a method hands to the loop."""
    chosen = options_of(name, {**METHODS[name]["quick"], **options})
    found = module_of(name).problem(world, concepts, chosen, 0)
    return found if isinstance(found, list) else [found]


def same(a: dict, b: dict) -> bool:
    """Whether two sets of increments are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def weights(world) -> dict:
    return {name: p.detach().clone() for name, p in world.parameters().items()}


# --- 1 to 3: seeded to the bit, the world unchanged, zero steps are no edit


@every_method
def test_seeded_to_the_bit_and_the_world_unchanged(world, name):
    before, state = weights(world), torch.random.get_rng_state()
    a, b = forget(world, name, seed=3), forget(world, name, seed=3)
    assert same(a.delta, b.delta) and a.norm() > 0 and a.history == b.history
    assert same(before, weights(world)) and not world.is_edited and not world.guards
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was moved"
    assert all(value.grad is None for value in world.parameters().values())


@every_method
def test_another_seed_is_another_edit(world, name):
    """But where nothing is drawn: a linear solve has one answer."""
    a, b = forget(world, name, seed=3), forget(world, name, seed=4)
    drawn = METHODS[name]["kind"] != "closed form" or "seed plays no part" not in said_of(name)
    assert same(a.delta, b.delta) != drawn


def said_of(name) -> str:
    return module_of(name).solve.__doc__


@every_trained
def test_zero_steps_are_no_edit(world, name):
    edit = forget(world, name, steps=0)
    assert edit.norm() == 0.0 and edit.history == []
    assert torch.equal(draw(world, edit), draw(world, None))


def draw(world, edit, prompts=("church",)):
    return sample(world, list(prompts), [0] * len(prompts), edit, steps=2, progress=False)


# --- 4: resume to the bit after a SIGKILL


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from conftest import build_tiny_world
from helpers import images, methods, training, unlearn
images.CACHE = images.Path(sys.argv[1])
write, run = training.write_checkpoint, training.run
def kill(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
training.write_checkpoint = kill
methods.run = lambda *a, **k: run(*a, **{**k, "save_every": 2})
world, folder = build_tiny_world(), sys.argv[2]
name = sys.argv[3]
options = {**methods.METHODS[name]["quick"], "steps": 5, "batch_size": 1}
unlearn(world, "church", name, progress=False, checkpoint=f"{folder}/{name}", **options)
"""


@every_trained
def test_resumes_to_the_bit_after_a_sigkill(world, name, tmp_path, sampled):
    """The process is killed the moment that its checkpoint is there; another one goes on."""
    command = [sys.executable, "-c", KILLED, str(sampled), str(tmp_path), name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    options = {"steps": 5, "batch_size": 1}
    again = forget(world, name, checkpoint=tmp_path / name, **options)
    whole = forget(world, name, **options)
    assert same(again.delta, whole.delta) and again.history == whole.history


# --- 5 to 7: saves and loads, adds and subtracts, exports


@every_method
def test_saves_and_loads(world, name, tmp_path):
    edit = forget(world, name)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert same(again.delta, edit.delta) and again.history == edit.history
    assert again.concepts == edit.concepts and again.base == edit.base
    assert again.parts.keys() == edit.parts.keys() and again.guards == edit.guards
    assert torch.equal(draw(world, again), draw(world, edit))


@every_method
def test_adds_and_subtracts(world, name):
    a, b = forget(world, name), forget(world, name, "dog")
    back = (a + b) - b
    assert back.erased == ["church"] and (a + b).erased == ["church", "dog"] and (-a).erased == []
    for parameter, value in a.delta.items():  # rounding of one sum and one difference in fp32
        torch.testing.assert_close(back.delta[parameter], value, rtol=1e-5, atol=1e-6)


@every_method
def test_export_round_trip_or_the_reason(world, name, tmp_path):
    """A plain pipeline reads the exported folder and samples what the edit samples here."""
    edit = forget(world, name)
    if METHODS[name]["kind"] == "guard" or any(a.gate != "always" for a in edit.adapters):
        with pytest.raises(ValueError, match="use sample"):
            edit.export(world, tmp_path / "pipeline")
        return
    folder = edit.export(world, tmp_path / "pipeline")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with world.applied(edit):
        loaded = {
            f"{part}.{n}": p
            for part in ("unet", "text_encoder")
            for n, p in getattr(pipe, part).named_parameters()
        }
        assert same({n: p.detach() for n, p in loaded.items()}, weights(world))


# --- 8: each loss term has a gradient where it should


@every_trained
def test_each_term_has_a_gradient(world, name):
    """Of every term that counts, on some leaf; and only leaves are reached."""
    for problem in problems(world, name, ["church"]):
        with torch.no_grad():  # off the start, where a norm's gradient is zero
            generator = torch.Generator().manual_seed(1)
            for leaf in problem.leaves.values():
                leaf += 0.01 * torch.randn(leaf.shape, generator=generator)
        leaves = list(problem.leaves.values())
        terms = problem.terms(0, step_generator(0, 0), frozenset())
        assert set(terms) <= set(problem.weights)
        for term, value in terms.items():
            assert value.shape == () and torch.isfinite(value)
            found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            reached = [g for g in found if g is not None]
            assert reached and any(g.abs().max() > 0 for g in reached), f"{term} trains nothing"
        assert not any(p.requires_grad for p in world.parameters().values())


# --- 9: report and every attack run


class Anyone:
    """A judge that gives every image to whatever is asked, and tells features by colour."""

    def gives(self, images, concept):
        return images.mean((1, 2, 3)) > 0

    def styles(self, images):
        return ["Twemoji"] * len(images)

    def things(self, images):
        return ["church"] * len(images)

    def features(self, images):
        return images.mean((2, 3))

    def fingerprint(self):
        return "anyone"


class Blind(torch.nn.Module):
    """A stand-in for CLIP: the same embedding for all."""

    class config:
        class vision_config:
            image_size = 16

    def forward(self, input_ids, pixel_values):
        n = len(pixel_values)
        one = torch.nn.functional.normalize(torch.ones(n, 4), dim=1)
        return type("Output", (), {"text_embeds": one, "image_embeds": one})


@pytest.fixture(scope="module")
def judged(world):
    """The tiny world with a judge, CLIP and LPIPS that cost nothing."""
    world.brings = {
        "judge": Anyone,
        "clip": Blind,
        "lpips": lambda: Perceptual("LPIPS (random)", emoji_network()),
    }
    return world


@every_method
def test_report_and_every_attack_run(judged, name):
    edit = forget(judged, name)
    options = {"n": 1, "attack": False, "lpips_size": 32, "sampling": {"steps": 1}, "thin": 4}
    found = metrics.report(judged, edit, progress=False, **options)
    assert set(found["concepts"]) >= {"church"} and found["made_with"]["edit"] == edit.meta
    short = {"seeds": [0], "sampling": {"steps": 1}}
    search = {**short, "images": 1, "steps": 2, "progress": False}
    found = [
        attacks.closed_form_embedding(judged, edit, "church", **short),
        attacks.concept_inversion(judged, edit, "church", **search),
        attacks.relearn(judged, edit, "church", look_every=1, **search),
    ]
    assert all(attack.n == 1 and 0 <= attack.after <= 1 and attack.values() for attack in found)


# --- 10: meta is complete


@every_method
def test_meta_is_complete(world, name):
    edit = forget(world, name, seed=5)
    chosen = {f.name for f in fields(module_of(name).Options)}
    assert edit.meta["method"] == name and edit.meta["seed"] == 5
    assert edit.concepts == {"church": 1.0} and edit.erased == ["church"]
    assert set(edit.meta["options"]) == chosen and edit.meta["seconds"] >= 0
    assert edit.base and all(edit.base[part] == world.fingerprint(part) for part in edit.base)
    assert {n.split(".")[0] for n in edit.delta} <= set(edit.base)
    assert edit.meta["versions"]["torch"] == torch.__version__
    if name in TRAINED:
        assert {"preparation", "training"} <= set(edit.meta["timings"])
        assert [row["step"] for row in edit.history][:2] == [0, 1]


# --- 11: several concepts


@every_method
def test_several_concepts(world, name):
    """Both are in the training: each alone gives another edit; parts add up where they are kept."""
    both = forget(world, name, ["church", "dog"])
    assert both.erased == ["church", "dog"]
    assert not same(both.delta, forget(world, name, "church").delta)
    assert not same(both.delta, forget(world, name, "dog").delta)
    if METHODS[name]["separable"]:
        assert list(both.parts) == ["church", "dog"]
        assert (both - both.parts["church"]).erased == ["dog"]
        total = Edit.sum(both.parts.values())
        for parameter, value in both.delta.items():
            torch.testing.assert_close(total.delta[parameter], value)


# --- 12: bad input


BAD = [
    ({"steps": -1}, "steps is -1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"lr": 0.0}, r"lr is 0\.0"),
    ({"decay": "step"}, "decay 'step'.*'constant', 'cosine'"),
    ({"group": "attention"}, "group.*'attention'"),
]


@every_trained
@pytest.mark.parametrize(("options", "said"), BAD, ids=lambda v: str(v)[:20])
def test_bad_training(world, name, options, said):
    with pytest.raises(ValueError, match=said):
        forget(world, name, **options)


@every_method
@pytest.mark.parametrize(
    ("options", "said"), [({"bogus": 1}, "no option bogus"), ({"variant": "draft"}, "variant")]
)
def test_bad_options(world, name, options, said):
    with pytest.raises(ValueError, match=said):
        forget(world, name, **options)


@every_method
def test_bad_concepts(world, name):
    for concepts, said in (
        ("unicorn", "unicorn"), ([], "at least one"), (["dog", "dog"], "different"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            forget(world, name, concepts)


# --- the catalogue


@every_method
def test_the_catalogue_says_what_a_method_is(name):
    entry, module = METHODS[name], module_of(name)
    assert {
        "title", "module", "paper", "year", "equations", "kind", "fidelity", "edits", "needs",
        "bare_names", "separable", "rollouts", "quick",
    } == set(entry)  # fmt: skip
    assert entry["kind"] in ("trained", "closed form", "adapter", "guard")
    assert entry["fidelity"] in ("paper", "code", "our reading")
    assert issubclass(module.Options, Training) == (entry["kind"] == "trained")
    assert hasattr(module, "problem") != hasattr(module, "solve")
    assert module.__doc__ and module.Options.__doc__


def test_the_readme_lists_the_catalogue():
    text = (ROOT / "README.md").read_text()
    for name, m in METHODS.items():
        row = (
            f"| `{name}` | {m['title']} | {m['paper']}, {m['year']} | {m['equations']} | "
            f"{m['kind']} | {m['fidelity']} | {m['edits']} |"
        )
        assert row in text, f"the README's table of methods lacks\n{row}"


TOY = '''
from dataclasses import dataclass
from helpers.denoise import predict
from helpers.parameters import Dense
from helpers.training import Problem, Training
import torch


@dataclass(frozen=True)
class Options(Training):
    """Options of a toy: those of training."""

    group: str = "kv"


def problem(world, concepts, options, seed):
    """Predict nothing at all for the concepts' prompts."""
    increments = Dense(world, options.group)
    states = world.encode(concepts).float()

    def terms(step, generator, stopped):
        x_t = torch.randn(len(states), *world.latent_shape, generator=generator)
        t = torch.randint(len(world.alpha_bar), (len(states),), generator=generator)
        eps_hat = predict(world, increments.leaves, x_t, t, states)
        return {"size": eps_hat.pow(2).mean()}

    return Problem(increments.leaves, increments.delta, terms, {"size": 1.0})
'''
ENTRY = """
[toy]
title = "Toy"
module = "toy_method_from_outside"
quick = { steps = 3 }
"""


def test_a_method_from_outside_is_a_module_and_an_entry(world, tmp_path, monkeypatch):
    (tmp_path / "toy_method_from_outside.py").write_text(textwrap.dedent(TOY))
    (tmp_path / "methods.toml").write_text(ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, entry in catalogue(tmp_path / "methods.toml").items():
        monkeypatch.setitem(METHODS, name, entry)
    edit = forget(world, "toy", ["church", "Noto"])
    assert edit.norm() > 0 and edit.meta["method"] == "toy" and len(edit.history) == 3
    assert edit.erased == ["church", "Noto"] and {n.split(".")[0] for n in edit.delta} == {"unet"}
    assert not torch.equal(draw(world, edit), draw(world, None))
