"""Notebooks 09 and 10: the stop of an exercise, what is merged, and the panel that erases."""

from collections.abc import Sequence

import pytest
import torch
from answers import stop_step
from conftest import random_edit
from notebook_code import definitions

from helpers import sample, widgets
from helpers.edits import Edit
from helpers.training import Problem, Training, run


@pytest.mark.parametrize(
    ("tau", "momentum", "min_steps"), [(0.0, 0.6, 1), (0.0, 0.9, 2), (-0.2, 0.5, 7), (0.5, 0.9, 1)]
)
def test_the_stop_of_exercise_2_is_the_loops(tau, momentum, min_steps):
    values = [1.0, 0.7, 0.2, -0.4, -0.3, -0.8, -0.5, -0.9]
    x = torch.zeros((), requires_grad=True)

    def terms(step, generator, stopped):
        return {"L": values[step] + 0 * x}

    problem = Problem(
        {"x": x}, dict, terms, {"L": 1.0}, stop_below={"L": tau}, momentum=momentum,
        min_steps=min_steps,
    )  # fmt: skip
    history = run(problem, Training(steps=len(values), decay="constant"), progress=False)
    assert len(history) == stop_step(values, tau, momentum, min_steps)


@pytest.fixture
def edits(tiny_world) -> dict[str, Edit]:
    """Two edits of random numbers, large enough to change every image."""
    return {
        name: random_edit(tiny_world, scale=1.0, seed=i, concepts=[name])
        for i, name in enumerate(("Noto", "Twemoji"))
    }


def pictures(figure) -> list[torch.Tensor]:
    return [torch.as_tensor(ax.images[0].get_array().data) for ax in figure.axes]


def test_chosen_adds_what_is_named(edits):
    assert widgets.chosen(edits, []) is None
    both = widgets.chosen(edits, ["Noto", "Twemoji"])
    for name, value in both.delta.items():
        assert torch.equal(value, edits["Noto"].delta[name] + edits["Twemoji"].delta[name])
    with pytest.raises(ValueError, match="no edit for church: choose from Noto, Twemoji"):
        widgets.chosen(edits, ["Noto", "church"])


def test_the_notebooks_sum_is_the_helpers(edits):
    merged = definitions("10", "def-merged", Edit=Edit, Sequence=Sequence)["merged"]
    for names in ([], ["Twemoji"], ["Noto", "Twemoji"]):
        mine, theirs = merged(edits, names), widgets.chosen(edits, names)
        assert (mine is None) == (theirs is None) == (not names)
        for name in mine.delta if mine else ():
            assert torch.equal(mine.delta[name], theirs.delta[name])


def test_the_figure_shows_the_base_and_the_chosen_sum(tiny_world, edits):
    sampling = {"guidance": 2.0, "steps": 2}
    same = pictures(widgets.erasure_figure(tiny_world, edits, "church", seed=3, **sampling))
    assert torch.equal(same[0], same[1])
    names = ("Twemoji", "Noto")
    figure = widgets.erasure_figure(tiny_world, edits, "church", erased=names, seed=3, **sampling)
    assert [ax.get_title() for ax in figure.axes] == ["base", "erased: Twemoji, Noto"]
    base, edited = pictures(figure)
    assert torch.equal(base, same[0]) and not torch.allclose(edited, base, atol=1e-3)
    both = edits["Twemoji"] + edits["Noto"]
    expected = sample(tiny_world, ["church"], [3], both, progress=False, **sampling)
    assert torch.equal(edited, expected[0].permute(1, 2, 0))


def test_the_panel_redraws_the_figure_of_the_plain_call(tiny_world, edits):
    panel = widgets.erasure_panel(
        tiny_world, edits, "church", erased=("Noto",), guidance=2.0, steps=2
    )
    rows = (getattr(control, "children", control) for control in panel.children)
    (noto, twemoji), (words, seeds, scale), said, picture = rows

    def plain(prompt="church", **options) -> bytes:
        figure = widgets.erasure_figure(tiny_world, edits, prompt, steps=2, **options)
        return widgets.png(figure)

    assert noto.value and not twemoji.value and said.value == ""
    assert picture.value == plain(erased=["Noto"], guidance=2.0)
    noto.value = False
    assert picture.value == plain(guidance=2.0)
    twemoji.value = True
    seeds.value = 5
    scale.value = 3.0
    words.value = "dog"
    shown = picture.value
    assert shown == plain("dog", erased=["Twemoji"], seed=5, guidance=3.0)
    words.value = "dog " * 40  # longer than the text length
    assert "shorten it" in said.value and picture.value == shown
    words.value = "dog"
    assert said.value == "" and picture.value == shown
