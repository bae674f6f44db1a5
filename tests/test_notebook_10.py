"""Notebook 10: a negative prompt draws what a perfect ESD student would, and the plane and the table say what they show."""

import ast
import itertools
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from helpers import show
from helpers.diffusion import guide, to_images
from helpers.losses import negated_guidance
from helpers.metrics import mean_interval
from helpers.sampling import initial_noise

NOTEBOOK = nbformat.read(Path(__file__).resolve().parents[1] / "notebooks" / "10_baselines.ipynb", 4)


def function(cell: str, name: str, **names):
    """A function out of one of the notebook's cells, with the names that it uses."""
    source = next(c.source for c in NOTEBOOK.cells if c.id == cell)
    definition = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    space = {"torch": torch, "Tensor": torch.Tensor, **names}
    exec(compile(ast.Module([definition], []), cell, "exec"), space)
    return space[name]


@pytest.mark.parametrize(("guidance", "eta"), [(5.0, 1.0), (2.0, 0.5)])
def test_a_negative_prompt_is_a_perfect_esd_student(tiny_world, guidance, eta):
    options = {"world": tiny_world, "seeds": [3, 4], "STEPS": 3, "initial_noise": initial_noise}
    drawn = function("limits", "draw_between", **options)("", "church", 1 + guidance * eta)
    scheduler, x = tiny_world.pipe.scheduler, initial_noise(tiny_world, [3, 4])
    scheduler.set_timesteps(3)
    c, null = (tiny_world.encode([text]).expand(2, -1, -1) for text in ("church", ""))
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps_null, eps_c = (tiny_world.unet(x, t, states).sample for states in (null, c))
            student = negated_guidance(eps_null, eps_c, eta)
            x = scheduler.step(guide(eps_null, student, guidance), t, x).prev_sample
    torch.testing.assert_close(drawn, to_images(tiny_world, x), atol=1e-4, rtol=1e-3)


def test_the_plane_places_the_targets():
    eps_null, right, up = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up = up - up @ right / (right @ right) * right
    axes = torch.stack([right / right.norm(), up / up.norm()])
    place = function("plane", "place", axes=axes, eps_null=eps_null, right=right)
    eps_c = eps_null + right
    anchor = eps_null + 0.3 * right + 0.5 * right.norm() / up.norm() * up
    found = [place(p) for p in (eps_null, eps_c, negated_guidance(eps_null, eps_c, 0.5), anchor)]
    assert torch.allclose(torch.tensor(found), torch.tensor([[0, 0], [1, 0], [-0.5, 0], [0.3, 0.5]]), atol=1e-6)


def test_forgotten_and_kept_by_hand():
    """Of 4 pictures of the concept 1 is still given to it; of 8 others 6 are right."""
    verdicts = {"church": [1, 0, 0, 0], "castle": [1, 1, 1, 0], "dog": [1, 1, 1, 0]}
    judge = SimpleNamespace(gives=lambda images, name: torch.tensor(verdicts[name]).bool())
    asked = {"CONCEPT": "church", "NEIGHBOUR": "castle", "OTHER": "dog"}
    found = function(
        "scatter-live", "forgotten_and_kept", world=SimpleNamespace(judge=judge), **asked,
        accuracy_interval=lambda world, images, name: (0.25, 0.05, 0.7), interval=lambda share, n: (share - n, share + n),
    )(dict.fromkeys(verdicts))  # fmt: skip
    assert found == [(0.75, pytest.approx(0.3), 0.95), (0.75, 0.75 - 8, 0.75 + 8)]


def test_the_saved_table_is_read_training_by_training():
    def row(method, seed, metric, value, kind="style"):
        return {"method": method, "kind": kind, "training_seed": seed, "metric": metric, "value": value}

    erased = [row("esd", seed, "ACC erased", value) for seed, value in [(2, 0.3), (0, 0.1), (1, 0.2)]]
    person = [row("esd", seed, "ACC erased", value, "person") for seed, value in [(0, 0.9), (1, 1.0), (2, 0.8)]]
    others = [row("sdd", 0, "ACC erased", 0.5), row("esd", 0, "LPIPS", 9.0)]
    by_training = function("saved", "by_training", saved=[*erased, *others, *person])
    assert by_training("esd", "ACC erased", "style").tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert by_training("esd", "ACC erased").tolist() == pytest.approx([0.5, 0.6, 0.55])
    spread = function("saved", "spread")
    assert spread(1 - by_training("esd", "ACC erased", "style")) == pytest.approx((0.8, 0.7, 0.9))
    assert spread(by_training("sdd", "ACC erased")) == pytest.approx((0.5, 0.5, 0.5))  # one training, no spread


def test_the_scatter_shows_every_method_once():
    from matplotlib import pyplot as plt

    points = {f"method {i}": [(i / 10, 0.0, 1.0), (0.5, 0.4, 0.6)] for i in range(10)}
    figure, ax = plt.subplots()
    function("scatter-def", "scatter", plt=plt, show=show)(points, ax, "church")
    plt.close(figure)
    marks = [line for line in ax.lines if line.get_label() in points]
    assert [line.get_label() for line in marks] == list(points) and ax.get_title() == "church"
    looks = {(line.get_marker(), line.get_color()) for line in marks}
    assert len(looks) == len(points)  # no two alike
    at = torch.tensor([float(line.get_xdata()[0]) for line in marks])
    assert (at - torch.arange(10) / 10).abs().max() < 0.05


def test_pairs_are_told_apart_by_their_trainings():
    """A is below B in each of three trainings by nearly the same; C lies where A lies, now above, now below."""
    means = {"A": [0.10, 0.20, 0.30], "B": [0.41, 0.50, 0.61], "C": [0.30, 0.20, 0.08]}
    saved = [
        {"method": method, "kind": kind, "metric": "drift", "training_seed": seed, "value": value + shift}
        for method, values in means.items()
        for seed, value in enumerate(values)
        for kind, shift in (("style", -0.05), ("object", 0.05))
    ]
    names = {"saved": saved, "by_training": function("saved", "by_training", saved=saved)}
    names |= {"mean_interval": mean_interval, "combinations": itertools.combinations}
    assert function("saved-pairs", "told_apart", **names)("drift") == [("A", "B")]
    attacks = [
        {"method": "A", "kind": kind, "metric": f"ACC after {name}", "value": value}
        for kind, name, value in [("style", "x", 0.2), ("style", "y", 0.8), ("object", "x", 0.4)]
    ]
    assert function("saved-table", "worst_attack", saved=attacks)("A") == "0.60"
