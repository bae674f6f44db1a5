"""Notebooks 07 and 08: the stop of an exercise is the loop's, and the panel that erases and restores."""

import pytest
import torch
from answers import stop_step

from helpers import sample, widgets
from helpers.edits import Edit
from helpers.training import Schedule, new_increments, run


@pytest.mark.parametrize(
    ("tau", "momentum", "min_steps"), [(0.0, 0.6, 1), (0.0, 0.9, 2), (-0.2, 0.5, 7), (0.5, 0.9, 1)]
)
def test_the_stop_of_exercise_2_is_the_loops(tau, momentum, min_steps):
    values = [1.0, 0.7, 0.2, -0.4, -0.3, -0.8, -0.5, -0.9]
    x = torch.zeros((), requires_grad=True)
    watched = {"stop_below": {"L": tau}, "momentum": momentum, "min_steps": min_steps}
    schedule = Schedule(steps=len(values), decay="constant", **watched)

    def terms(step, generator, stopped):
        return {"L": values[step] + 0 * x}

    history = run({"x": x}, terms, {"L": 1.0}, schedule, progress=False)
    assert len(history) == stop_step(values, tau, momentum, min_steps)


@pytest.fixture
def edits(tiny_world) -> dict[str, Edit]:
    """Two edits of random numbers, large enough to change every picture."""
    found = {}
    for i, name in enumerate(("Noto", "Twemoji")):
        generator = torch.Generator().manual_seed(i)
        delta = {n: torch.randn(v.shape, generator=generator) for n, v in new_increments(tiny_world.unet, "kv").items()}
        found[name] = Edit(delta, meta={"base": tiny_world.fingerprint()})
    return found


def pictures(figure) -> list[torch.Tensor]:
    return [torch.as_tensor(ax.images[0].get_array().data) for ax in figure.axes]


def test_merged_adds_what_is_named(edits):
    assert widgets.merged(edits, []) is None
    both = widgets.merged(edits, ["Noto", "Twemoji"])
    assert all(torch.equal(both.delta[n], edits["Noto"].delta[n] + edits["Twemoji"].delta[n]) for n in both.delta)
    with pytest.raises(ValueError, match="no edit for church: choose from Noto, Twemoji"):
        widgets.merged(edits, ["Noto", "church"])


def test_the_figure_shows_the_base_and_the_chosen_sum(tiny_world, edits):
    chosen = {"seed": 3, "guidance": 2.0, "steps": 2}
    same = pictures(widgets.erasure_figure(tiny_world, edits, "church", **chosen))
    assert torch.equal(same[0], same[1])
    figure = widgets.erasure_figure(tiny_world, edits, "church", erased=("Twemoji", "Noto"), **chosen)
    assert [ax.get_title() for ax in figure.axes] == ["base", "erased: Twemoji, Noto"]
    base, edited = pictures(figure)
    assert torch.equal(base, same[0]) and not torch.allclose(edited, base, atol=1e-3)
    drawn = sample(tiny_world, ["church"], [3], edits["Twemoji"] + edits["Noto"], 2, 2.0, progress=False)
    assert torch.equal(edited, drawn[0].permute(1, 2, 0))


def test_the_panel_redraws_the_figure_of_the_plain_call(tiny_world, edits):
    panel = widgets.erasure_panel(tiny_world, edits, "church", erased=("Noto",), guidance=2.0, steps=2)
    (noto, twemoji), (words, seeds, scale), said, picture = (getattr(c, "children", c) for c in panel.children)

    def plain(prompt="church", **options) -> bytes:
        return widgets.png(widgets.erasure_figure(tiny_world, edits, prompt, steps=2, **options))

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
