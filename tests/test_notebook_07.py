"""Notebook 07: its tables on rows made by hand, its M-Score, and the dial between two losses."""

import pytest
import torch
from conftest import random_edit
from IPython.display import Markdown
from notebook_code import definitions
from torch import Tensor
from torch.nn import functional as F

from helpers import Edit, sample, show, tables, widgets
from helpers.evaluation import memory
from helpers.inversion import invert

RUNS = ("both losses", "attention alone", "visual alone")
REPORT = {  # our concept -> the report's
    "cat": "Cat", "princess": "Jingyi Ju", "sunflower": "Flower", "house": "House",
    "whale": "Ocean",
}  # fmt: skip


def defined(*cells: str) -> dict:
    """What these cells of the notebook define."""
    names = {"RUNS": RUNS, "REPORT": REPORT, "show": show, "tables": tables, "Markdown": Markdown}
    return definitions("07", *cells, torch=torch, F=F, Tensor=Tensor, **names)


def made_records(trainings: int) -> list[dict]:
    """Two concepts; a training's number moves the edits' measures, never the base's."""
    names = ("accuracy", "kept", "to_target", "clip", "clip_without", "collapsed", "m_score")
    return [
        {
            "concept": concept, "run": run, "training_seed": seed, "base": "x",
            **{name: 0.5 + 0.1 * i + 0.1 * seed * (run != "base") for name in names},
        }
        for seed in range(trainings)
        for i, concept in enumerate(("cat", "house"))
        for run in ("base", *RUNS)
    ]  # fmt: skip


def test_spread_is_the_mean_and_the_deviation_of_trainings():
    spread = defined("table-def")["spread"]
    assert spread(made_records(1), "clip", run="base") == "0.55"
    assert spread(made_records(3), "clip", run="visual alone") == "0.65 ± 0.10"
    house = spread(made_records(3), "clip", concept="house", run="base", digits=3)
    assert house == "0.600 ± 0.000"


def test_the_ablation_has_a_row_for_each_set_of_losses():
    lines = defined("table-def")["ablation"](made_records(1)).data.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["base", *RUNS]
    assert {line.count("|") for line in lines} == {9}
    assert lines[2].endswith("| 0.55 | 0.55 |")


def test_table_one_puts_the_reports_figures_beside_ours():
    table_one = defined("table-def", "table-show")["table_one"]
    lines = table_one(made_records(2)).data.splitlines()
    ours = " | ".join(["0.50 ± 0.00 → 0.55 ± 0.07"] * 4)
    assert lines[2] == f"| cat | {ours} | Cat | 0.456 → 0.321 | 0.920 → 0.785 |"
    assert lines[3].endswith("| House | 0.410 → 0.325 | 0.935 → 0.800 |")
    assert set(tables.paper_table("fmn-report-1").erased) == set(REPORT.values())


def test_the_notebooks_m_score_is_the_helpers(tiny_world, monkeypatch):
    monkeypatch.setattr(memory, "presence", lambda *args, **options: 0.1)
    size, generator = tiny_world.image_size, torch.Generator().manual_seed(1)
    references = torch.rand(2, 3, size, size, generator=generator)
    alike = defined("mscore-def")["alike"]
    options = {"steps": 2, "lr": 5e-2, "batch_size": 2, "tokens": 2, "progress": False}
    before, after = (
        invert(tiny_world, references, template="a picture of a {c}", seed=seed, **options)[0]
        for seed in (3, 4)
    )
    expected = memory.m_score(
        tiny_world, None, "church", references, seeds=(3,), second_seed_offset=1, **options
    )
    assert alike(before, after) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def mixes(tiny_world) -> dict[float, Edit]:
    """Three edits of random numbers, by the share of the visual loss."""
    shares = (0.0, 0.5, 1.0)
    return {s: random_edit(tiny_world, scale=1.0, seed=i) for i, s in enumerate(shares)}


def test_between_is_what_was_trained_or_the_weighted_mean(mixes):
    assert widgets.between(mixes, 0.5) is mixes[0.5]
    mixed = widgets.between(mixes, 0.6)
    for name, value in mixed.delta.items():
        expected = 0.8 * mixes[0.5].delta[name] + 0.2 * mixes[1.0].delta[name]
        assert torch.allclose(value, expected, atol=1e-6)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"outside what was trained \(0, 0.5, 1\)"):
            widgets.between(mixes, share)
    with pytest.raises(ValueError, match="outside what was trained"):
        widgets.between({}, 0.5)


def test_the_figure_shows_the_base_and_the_mean_of_two_edits(tiny_world, mixes):
    prompts, sampling = ["church", "Noto"], {"guidance": 2.0, "steps": 2}
    figure = widgets.tradeoff_figure(tiny_world, mixes, prompts, share=0.25, seed=3, **sampling)
    shown = [torch.as_tensor(ax.images[0].get_array().data) for ax in figure.axes]
    mixed = widgets.between(mixes, 0.25)
    expected = sample(tiny_world, prompts, [3, 3], mixed, progress=False, **sampling)
    assert torch.equal(shown[2], expected[0].permute(1, 2, 0))
    assert not torch.allclose(shown[0], shown[2], atol=1e-3)
    assert [ax.get_title() for ax in figure.axes[:2]] == prompts
    assert "in between" in figure.axes[2].get_ylabel()


def test_the_panel_shows_the_figure_of_the_plain_call(tiny_world, mixes):
    prompts, sampling = ["church", "Noto"], {"guidance": 2.0, "steps": 2}
    panel = widgets.tradeoff_panel(tiny_world, mixes, prompts, share=0.5, **sampling)
    (share, seed), picture = panel.children[0].children, panel.children[1]

    def plain(share: float, seed: int) -> bytes:
        chosen = {"share": share, "seed": seed, **sampling}
        return widgets.png(widgets.tradeoff_figure(tiny_world, mixes, prompts, **chosen))

    assert picture.value == plain(0.5, 0)
    share.value = 0.25
    assert picture.value == plain(0.25, 0)
    seed.value = 3
    assert picture.value == plain(0.25, 3)
