"""The one loop: its updates against plain Adam, early stop, clipping, resume; and the pictures that it reads."""

import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import randomise
from PIL import Image

from helpers import training
from helpers.edits import Edit
from helpers.methods import METHODS
from helpers.training import Schedule, drawn_images, folder_images, new_increments, predict, run, select_parameters


def problem(n=6):
    """A least-squares problem with noise drawn from the step's generator."""
    w = torch.zeros(n, requires_grad=True)

    def terms(step, generator, stopped):
        target = torch.arange(n) + 0.1 * torch.randn(n, generator=generator)
        return {"fit": (w - target).pow(2).mean(), "size": w.pow(2).mean()}

    return {"w": w}, terms


def test_equals_plain_adam():
    parameters, terms = problem()
    run(
        parameters,
        terms,
        {"fit": 1.0, "size": 0.5},
        Schedule(steps=5, lr=0.1, decay="constant", clip=None),
        progress=False,
    )
    w, other = problem()
    optimizer = torch.optim.Adam([w["w"]], lr=0.1)
    for step in range(5):
        values = other(step, torch.Generator().manual_seed(step), frozenset())
        optimizer.zero_grad()
        (values["fit"] + 0.5 * values["size"]).backward()
        optimizer.step()
    assert torch.equal(parameters["w"], w["w"])


def test_history_logs_terms_apart_and_the_statistic():
    parameters, terms = problem()
    history = run(parameters, terms, {"fit": 1.0, "size": 0.5}, Schedule(steps=4, lr=0.1), progress=False)
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    m = history[0]["total"]
    for row in history[1:]:
        m = 0.9 * m + 0.1 * row["total"]
        assert math.isclose(row["statistics"]["total"], m, rel_tol=1e-6)
    assert all(math.isclose(row["total"], row["fit"] + 0.5 * row["size"], rel_tol=1e-5) for row in history)


def test_zero_steps_change_nothing():
    parameters, terms = problem()
    assert run(parameters, terms, {"fit": 1.0, "size": 1.0}, Schedule(steps=0), progress=False) == []
    assert torch.equal(parameters["w"], torch.zeros(6))


def test_early_stop_counts_updates():
    parameters, terms = problem()
    schedule = Schedule(steps=50, lr=0.5, stop_below={"fit": 1e9}, min_steps=7)
    assert len(run(parameters, terms, {"fit": 1.0, "size": 0.0}, schedule, progress=False)) == 7


def test_a_stopped_term_rests_while_another_goes_on():
    """Two terms, each with its own weights: the first stops at once, the second never does."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def terms(step, generator, stopped):
        every = {"a": a.pow(2).mean(), "b": b.pow(2).mean()}
        return {name: value for name, value in every.items() if name not in stopped}

    schedule = Schedule(steps=10, lr=0.01, stop_below={"a": 1e9, "b": -1.0}, min_steps=3, decay="constant")
    history = run({"a": a, "b": b}, terms, {"a": 1.0, "b": 1.0}, schedule, progress=False)
    assert len(history) == 10 and history[-1]["stopped"] == ["a"] and "a" not in history[3]
    assert a[0].item() == pytest.approx(0.97, abs=1e-4) and b[0].item() == pytest.approx(
        0.90, abs=1e-3
    )  # Adam: lr a step


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    parameters, terms = problem()
    weights, path = {"fit": 1.0, "size": 0.1}, tmp_path / "c.safetensors"
    schedule = Schedule(steps=2, checkpoint=str(path))
    history = run(parameters, terms, weights, schedule, save_every=2, progress=False)
    with pytest.raises(ValueError, match="seed differ"):
        run(parameters, terms, weights, replace(schedule, seed=1), progress=False)
    moved = path.rename(tmp_path / "moved.safetensors")  # under another name it is still this run's
    assert run(parameters, terms, weights, replace(schedule, checkpoint=str(moved)), progress=False) == history


def test_clipping_clips():
    moved = {}
    for clip in (None, 1e-12):  # Adam forgets a gradient's scale but for its epsilon, 1e-8: a tiny one moves nothing
        parameters, terms = problem()
        run(parameters, terms, {"fit": 1.0, "size": 0.0}, Schedule(steps=1, lr=0.1, clip=clip), progress=False)
        moved[clip] = parameters["w"].abs().sum().item()
    assert moved[1e-12] < 0.01 * moved[None]


def test_gradients_do_not_pile_up_unless_asked():
    seen = {}
    for accumulate in (False, True):
        w = torch.zeros(1, requires_grad=True)
        grads = seen.setdefault(accumulate, [])
        w.register_post_accumulate_grad_hook(lambda p, grads=grads: grads.append(p.grad.item()))
        schedule = Schedule(steps=3, lr=1e-9, clip=None, accumulate_grads=accumulate)
        run({"w": w}, lambda step, g, stopped, w=w: {"a": w.sum()}, {"a": 1.0}, schedule, progress=False)
    assert seen == {False: [1.0, 1.0, 1.0], True: [1.0, 2.0, 3.0]}


@pytest.mark.parametrize("accumulate", [False, True])
def test_resume_is_bit_exact(tmp_path, accumulate):
    """Killed after step 4 (last checkpoint at 4), continued: the same bits as ten steps without a stop."""
    weights = {"fit": 1.0, "size": 0.1}
    schedule = Schedule(steps=10, lr=0.1, accumulate_grads=accumulate)
    kept = replace(schedule, checkpoint=str(tmp_path / "c.safetensors"))
    whole, terms = problem()
    expected = run(whole, terms, weights, schedule, progress=False)

    part, terms = problem()

    def dies(step, generator, stopped):
        if step == 5:
            raise KeyboardInterrupt
        return terms(step, generator, stopped)

    with pytest.raises(KeyboardInterrupt):
        run(part, dies, weights, kept, save_every=2, progress=False)
    again, terms = problem()
    history = run(again, terms, weights, kept, save_every=2, progress=False)
    assert torch.equal(again["w"], whole["w"]) and history == expected


def test_nan_stops_with_the_step():
    w = torch.zeros(1, requires_grad=True)
    terms = lambda step, g, stopped: {"a": w.sum() * (float("nan") if step == 2 else 1.0)}  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 2"):
        run({"w": w}, terms, {"a": 1.0}, Schedule(steps=5), progress=False)


def test_select_parameters(tiny_world):
    unet = tiny_world.unet
    every = {name for name, _ in unet.named_parameters()}
    assert set(select_parameters(unet, "xattn")) == {name for name in every if "attn2." in name}
    assert set(select_parameters(unet, "kv")) == {n for n in every if "attn2.to_k" in n or "attn2.to_v" in n}
    assert set(select_parameters(unet, "unet")) == every
    with pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(unet, "kv", within=["conv_in"])
    with pytest.raises(ValueError, match="unknown group"):
        select_parameters(unet, "cross")


@pytest.mark.parametrize("bad", [{"steps": -1}, {"batch_size": 0}, {"lr": 0.0}, {"decay": "step"}])
def test_bad_schedule(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Schedule(**bad)


def test_a_schedule_carries_every_training_option():
    given = {"steps": 7, "lr": 0.2, "batch_size": 3, "decay": "constant", "clip": None, "accumulate_grads": True}
    options = training.Training(**given, checkpoint="c.safetensors")
    assert all(getattr(options, field.name) != field.default for field in fields(options))  # each one is told apart
    assert options.schedule(5) == Schedule(**asdict(options), seed=5)
    stops = {"stop_below": {"fit": 0.5}, "momentum": 0.8, "min_steps": 3}
    assert options.schedule(5, **stops) == Schedule(**asdict(options), seed=5, **stops)


@pytest.mark.parametrize("module", dict.fromkeys(METHODS.values()), ids=lambda module: module.__name__)
def test_the_options_of_every_method_begin_with_those_of_training(module):
    options = module.Options(steps=7, lr=0.2, checkpoint="c.safetensors")
    schedule = options.schedule(3)
    assert all(getattr(schedule, field.name) == getattr(options, field.name) for field in fields(training.Training))
    assert (schedule.steps, schedule.lr, schedule.checkpoint, schedule.seed) == (7, 0.2, "c.safetensors", 3)
    with pytest.raises(ValueError, match="steps -1"):
        module.Options(steps=-1)


def test_captions_take_the_templates_of_each_kind_in_turn(tiny_world):
    assert training.captions(tiny_world, ["Noto", "church"], 3) == (
        ["Noto", "in the style of Noto", "Noto", "church", "a picture of a church", "church"],
        ["Noto"] * 3 + ["church"] * 3,
    )
    assert training.captions(tiny_world, ["old man", "church"], 2, training.BARE) == (
        ["old man", "old man", "church", "church"],
        ["old man", "old man", "church", "church"],
    )
    assert training.captions(tiny_world, ["Noto"], 0) == ([], [])
    with pytest.raises(ValueError, match="unicorn"):
        training.captions(tiny_world, ["unicorn"], 1)


def test_training_seeds_of_two_runs_are_apart():
    assert training.training_seeds(0, 3) == [500_000, 500_001, 500_002] and training.training_seeds(2, 1) == [502_000]
    assert not set(training.training_seeds(0, 1000)) & set(training.training_seeds(1, 1000))


def test_drawn_images_are_kept(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.training.CACHE", tmp_path)
    first = drawn_images(tiny_world, ["church"], [1], steps=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr("helpers.training.sample", None)  # a second drawing would fail
    assert torch.equal(first, drawn_images(tiny_world, ["church"], [1], steps=2))
    with pytest.raises(TypeError):
        drawn_images(tiny_world, ["church"], [2], steps=2)


def test_folder_images(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (16, 32), 128).save(tmp_path / "a.jpg")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        images = folder_images(tmp_path, 16)
    assert images.shape == (2, 3, 16, 16)
    assert images[1, 0].min() > 0.99 and images[1, 1].max() < 0.01  # sorted by name: the red one is second


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="no readable picture"):
        folder_images(tmp_path, 16)
    with pytest.raises(ValueError, match="nowhere"):
        folder_images(tmp_path / "nowhere", 16)
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="broken"), pytest.raises(ValueError, match="no readable picture"):
        folder_images(tmp_path, 16)


def test_predict_is_the_network_with_the_edit_applied(tiny_world):
    """theta + delta by functional_call against the increments merged into the weights: the same numbers."""
    increments = randomise(new_increments(tiny_world.unet))
    x = torch.randn(2, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))
    t, states = torch.tensor([10, 700]), tiny_world.encode(["church", ""])
    ours = predict(tiny_world.unet, increments, x, t, states)
    base = tiny_world.unet(x, t, states).sample
    with tiny_world.applied(Edit({name: value.detach() for name, value in increments.items()})):
        assert torch.equal(ours, tiny_world.unet(x, t, states).sample)
    assert torch.equal(base, predict(tiny_world.unet, {}, x, t, states)) and not torch.allclose(ours, base)
    ours.sum().backward()
    assert all(value.grad is not None for value in increments.values())
    assert not any(p.requires_grad for p in tiny_world.unet.parameters())
