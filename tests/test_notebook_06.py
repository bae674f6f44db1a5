"""Notebook 06: its tables on records made by hand, its M-Score against the helper's, and the dial between two losses."""

from pathlib import Path

import nbformat
import pytest
import torch
from IPython.display import Markdown
from torch.nn import functional as F

from helpers import Edit, metrics, sample, show, tables, widgets
from helpers.inversion import invert
from helpers.training import new_increments

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "06_forget_me_not.ipynb"
RUNS = ("both losses", "attention alone", "visual alone")
REPORT = {"cat": "Cat", "princess": "Jingyi Ju", "sunflower": "Flower", "house": "House", "whale": "Ocean"}


def definitions(*names: str) -> dict:
    """Cells of the notebook that define functions, by id, run in a namespace of their own."""
    space = {"torch": torch, "Tensor": torch.Tensor, "F": F, "Path": Path, "tables": tables}
    space |= {"RUNS": RUNS, "REPORT": REPORT, "show": show, "Markdown": Markdown}
    shown = ("ablation(records)", "table_one(records)")
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, 4).cells}
    for name in names:
        exec("\n".join(line for line in cells[name].splitlines() if line not in shown), space)
    return space


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
    spread = definitions("table-def")["spread"]
    assert spread(made_records(1), "clip", run="base") == "0.55"
    assert spread(made_records(3), "clip", run="visual alone") == "0.65 ± 0.10"
    assert spread(made_records(3), "clip", concept="house", run="base", digits=3) == "0.600 ± 0.000"


def test_the_ablation_has_a_row_for_each_set_of_losses():
    lines = definitions("table-def")["ablation"](made_records(1)).data.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["base", *RUNS]
    assert {line.count("|") for line in lines} == {9}
    assert lines[2].endswith("| 0.55 | 0.55 |")


def test_table_one_puts_the_reports_figures_beside_ours():
    lines = definitions("table-def", "table-show")["table_one"](made_records(2)).data.splitlines()
    ours = " | ".join(["0.50 ± 0.00 → 0.55 ± 0.07"] * 4)
    assert lines[2] == f"| cat | {ours} | Cat | 0.456 → 0.321 | 0.920 → 0.785 |"
    assert lines[3].endswith("| House | 0.410 → 0.325 | 0.935 → 0.800 |")
    assert {r["erased"] for r in tables.paper_table("fmn-report-1")} == set(REPORT.values())


def test_the_notebooks_m_score_is_the_helpers(tiny_world, monkeypatch):
    monkeypatch.setattr(metrics, "presence", lambda *args, **options: 0.1)
    size = tiny_world.image_size
    references = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    alike = definitions("mscore-def")["alike"]
    options = {"steps": 2, "lr": 5e-2, "batch_size": 2, "tokens": 2, "progress": False}
    before, after = (
        invert(tiny_world, references, template="a picture of a {c}", seed=s, **options)[0] for s in (3, 4)
    )
    expected = metrics.m_score(tiny_world, None, "church", references, seeds=(3,), apart=1, **options)
    assert alike(before, after) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def mixes(tiny_world) -> dict[float, Edit]:
    """Three edits of random numbers, by the share of the visual loss."""
    found = {}
    for i, share in enumerate((0.0, 0.5, 1.0)):
        generator = torch.Generator().manual_seed(i)
        delta = {n: torch.randn(v.shape, generator=generator) for n, v in new_increments(tiny_world.unet, "kv").items()}
        found[share] = Edit(delta, meta={"base": tiny_world.fingerprint()})
    return found


def test_between_is_what_was_trained_or_the_weighted_mean(mixes):
    assert widgets.between(mixes, 0.5) is mixes[0.5]
    mixed = widgets.between(mixes, 0.6)
    for name, value in mixed.delta.items():
        assert torch.allclose(value, 0.8 * mixes[0.5].delta[name] + 0.2 * mixes[1.0].delta[name], atol=1e-6)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"outside what was trained \(0, 0.5, 1\)"):
            widgets.between(mixes, share)
    with pytest.raises(ValueError, match="outside what was trained"):
        widgets.between({}, 0.5)


def test_the_panel_draws_the_figure_of_the_plain_call(tiny_world, mixes):
    prompts, drawing = ["church", "Noto"], {"guidance": 2.0, "steps": 2}
    figure = widgets.tradeoff_figure(tiny_world, mixes, prompts, share=0.25, seed=3, **drawing)
    shown = [torch.as_tensor(ax.images[0].get_array().data) for ax in figure.axes]
    expected = sample(tiny_world, prompts, [3, 3], widgets.between(mixes, 0.25), 2, 2.0, progress=False)
    assert torch.equal(shown[2], expected[0].permute(1, 2, 0)) and not torch.allclose(shown[0], shown[2], atol=1e-3)
    assert [ax.get_title() for ax in figure.axes[:2]] == prompts and "in between" in figure.axes[2].get_ylabel()

    panel = widgets.tradeoff_panel(tiny_world, mixes, prompts, share=0.5, **drawing)
    (share, seed), picture = panel.children[0].children, panel.children[1]

    def plain(share: float, seed: int) -> bytes:
        return widgets.png(widgets.tradeoff_figure(tiny_world, mixes, prompts, share=share, seed=seed, **drawing))

    assert picture.value == plain(0.5, 0)
    share.value = 0.25
    assert picture.value == plain(0.25, 0)
    seed.value = 3
    assert picture.value == plain(0.25, 3)
