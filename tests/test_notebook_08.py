"""Notebook 08: a negative prompt samples what a perfect ESD student would; the plane and the table
say what they show."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from notebook_code import functions
from torch import Tensor

from helpers import show
from helpers.denoise import Sampling, trajectory
from helpers.diffusion import guide, to_images
from helpers.losses import negated_guidance
from helpers.methods import METHODS
from helpers.sampling import initial_noise
from helpers.stats import student_interval

LEFT, DRIFT = ("ACC", "erased"), ("drift", "retained")
KINDS = {"Twemoji": "style", "church": "object", "santa claus": "person"}


def function(name: str, **names):
    """One function of the notebook, with the names that it uses."""
    return functions("08", name, torch=torch, Tensor=Tensor, plt=plt, **names)[name]


@pytest.mark.parametrize(("guidance", "eta"), [(5.0, 1.0), (2.0, 0.5)])
def test_a_negative_prompt_is_a_perfect_esd_student(tiny_world, guidance, eta):
    tiny_world.sampling = Sampling(sampler="ddim")
    draw_between = function(
        "draw_between", world=tiny_world, seeds=[3, 4], STEPS=3, replace=replace,
        trajectory=trajectory, initial_noise=initial_noise, to_images=to_images,
    )  # fmt: skip
    images = draw_between("", "church", 1 + guidance * eta)
    scheduler, x = tiny_world.pipe.scheduler, initial_noise(tiny_world, [3, 4])
    scheduler.set_timesteps(3)
    c, null = (tiny_world.encode([text]).expand(2, -1, -1) for text in ("church", ""))
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps_null, eps_c = (tiny_world.unet(x, t, states).sample for states in (null, c))
            student = negated_guidance(eps_null, eps_c, eta)
            x = scheduler.step(guide(eps_null, student, guidance), t, x).prev_sample
    torch.testing.assert_close(images, to_images(tiny_world, x), atol=1e-4, rtol=1e-3)


def test_a_negative_prompt_is_the_pipeline_s(tiny_world):
    """The notebook's formula is what plain diffusers does with ``negative_prompt``."""
    tiny_world.sampling = Sampling(sampler="ddim")
    draw_between = function(
        "draw_between", world=tiny_world, seeds=[3, 4], STEPS=3, replace=replace,
        trajectory=trajectory, initial_noise=initial_noise, to_images=to_images,
    )  # fmt: skip
    images = draw_between("castle", "church", 4.0)
    plain = tiny_world.pipe(
        ["castle"] * 2, negative_prompt=["church"] * 2, num_inference_steps=3, guidance_scale=4.0,
        latents=initial_noise(tiny_world, [3, 4]), output_type="pt",
    )  # fmt: skip
    torch.testing.assert_close(images, plain.images.float(), atol=1e-4, rtol=1e-3)


def test_the_plane_places_the_targets():
    generator = torch.Generator().manual_seed(0)
    eps_null, right, up = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    up = up - up @ right / (right @ right) * right
    axes = torch.stack([right / right.norm(), up / up.norm()])
    place = function("place", axes=axes, eps_null=eps_null, right=right)
    eps_c = eps_null + right
    anchor = eps_null + 0.3 * right + 0.5 * right.norm() / up.norm() * up
    points = (eps_null, eps_c, negated_guidance(eps_null, eps_c, 0.5), anchor)
    found = torch.tensor([place(point) for point in points])
    expected = torch.tensor([[0, 0], [1, 0], [-0.5, 0], [0.3, 0.5]])
    assert torch.allclose(found, expected, atol=1e-6)


def test_forgotten_and_kept_by_hand():
    """Of 4 images of the concept 1 is still given to it; of 8 others 6 are right."""
    verdicts = {"church": [1, 0, 0, 0], "castle": [1, 1, 1, 0], "dog": [1, 1, 1, 0]}
    judge = SimpleNamespace(gives=lambda images, name: torch.tensor(verdicts[name]).bool())
    found = function(
        "forgotten_and_kept", world=SimpleNamespace(judge=judge),
        CONCEPT="church", NEIGHBOUR="castle", OTHER="dog",
        accuracy_interval=lambda world, images, name: (0.25, 0.05, 0.7),
        wilson_interval=lambda share, n: (share - n, share + n),
    )(dict.fromkeys(verdicts))  # fmt: skip
    assert found == [(0.75, pytest.approx(0.3), 0.95), (0.75, 0.75 - 8, 0.75 + 8)]


def saved_table(rows: list[tuple]) -> dict:
    """The notebook's names for a saved table of (method, concept, what, seed, value)."""
    columns = ["method", "erased", "metric", "evaluated", "seed", "value"]
    frame = pd.DataFrame([(m, c, *what, s, v) for m, c, what, s, v in rows], columns=columns)
    world = SimpleNamespace(kind=KINDS.__getitem__)
    return {"saved": frame, "methods": list(frame["method"].unique()), "world": world}


def test_the_saved_table_is_read_training_by_training():
    values = {
        "Twemoji": [(2, 0.3), (0, 0.1), (1, 0.2)],
        "santa claus": [(0, 0.9), (1, 1.0), (2, 0.8)],
    }
    rows = [("esd", c, LEFT, seed, v) for c, some in values.items() for seed, v in some]
    rows += [("sdd", "Twemoji", LEFT, 0, 0.5), ("esd", "Twemoji", ("LPIPS", "erased"), 0, 9.0)]
    rows += [("esd", "Twemoji", ("ACC", "retained"), 0, 7.0)]
    by_training = function("by_training", **saved_table(rows))
    assert by_training("esd", LEFT, "style").tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert by_training("esd", LEFT).tolist() == pytest.approx([0.5, 0.6, 0.55])
    spread = function("spread")
    found = spread(1 - by_training("esd", LEFT, "style"))
    assert found == pytest.approx((0.8, 0.7, 0.9))
    alone = spread(by_training("sdd", LEFT))
    assert alone == pytest.approx((0.5, 0.5, 0.5))  # one training, no spread


def test_the_scatter_shows_every_method_once():
    points = {
        name: [(i / len(METHODS), 0.0, 1.0), (0.5, 0.4, 0.6)] for i, name in enumerate(METHODS)
    }
    figure, ax = plt.subplots()
    function("scatter", show=show)(points, ax, "church")
    plt.close(figure)
    marks = [line for line in ax.lines if line.get_label() in points]
    assert [line.get_label() for line in marks] == list(points) and ax.get_title() == "church"
    looks = {(line.get_marker(), line.get_color()) for line in marks}
    assert len(looks) == len(points)  # no two alike
    at = torch.tensor([float(line.get_xdata()[0]) for line in marks])
    there = torch.tensor([x[0] for x, _ in points.values()])
    assert (at - there).abs().max() < 0.05 + 0.004 * max(0, len(points) - 10)


def test_pairs_are_told_apart_by_their_trainings():
    """A is below B in each of three trainings by nearly the same; C lies where A lies."""
    means = {"A": [0.10, 0.20, 0.30], "B": [0.41, 0.50, 0.61], "C": [0.30, 0.20, 0.08]}
    rows = [
        (method, concept, DRIFT, seed, value + shift)
        for method, values in means.items()
        for seed, value in enumerate(values)
        for concept, shift in (("Twemoji", -0.05), ("church", 0.05))
    ]
    names = saved_table(rows)
    names |= {"student_interval": student_interval, "combinations": itertools.combinations}
    found = functions(
        "08", "by_training", "told_apart", torch=torch, Tensor=Tensor, plt=plt, **names
    )
    assert found["told_apart"](DRIFT) == [("A", "B")]


def test_the_worst_attack_is_each_concept_s():
    attacks = [("Twemoji", "x", 0.2), ("Twemoji", "y", 0.8), ("church", "x", 0.4)]
    rows = [("A", c, (f"ACC after {name}", "erased"), 0, value) for c, name, value in attacks]
    rows.append(("A", "church", LEFT, 0, 1.0))
    assert function("worst_attack", **saved_table(rows))("A") == "0.60"
