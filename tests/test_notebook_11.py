"""Notebook 11: its differences, means and verdicts on tables made up by hand."""

import ast
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import plan
import pytest
from answers import verdict
from scipy import stats

from helpers import metrics, tables

NOTEBOOK = nbformat.read(Path(__file__).resolve().parents[1] / "notebooks" / "11_papers_tables.ipynb", 4)
CELLS = {cell.id: cell.source for cell in NOTEBOOK.cells}
ROW = {"setting": "", "metric": "ACC", "base": 0.8, "value": 0.5}


def space(rows=(), *cells: str) -> dict:
    """What the definitions of some cells make, where every table's rows are the given ones."""
    rows = [{"spread": 0.0, **ROW, **row} for row in rows]
    fake = {
        "beside": lambda table, folder: rows,
        "paper_table": lambda table: rows,
        "our_table": lambda table, folder: {tuple(row[key] for key in tables.NAMES): row for row in rows},
    }
    names = {"np": np, "stats": stats, "plan": plan, "plt": plt, "metrics": metrics}
    names |= {"folder": None, "TABLE": "t", "tables": SimpleNamespace(**fake)}
    for cell in ("result-scatter", *cells):
        body = [node for node in ast.parse(CELLS[cell]).body if not isinstance(node, ast.Expr)]  # shows nothing
        exec(compile(ast.Module(body, []), cell, "exec"), names)
    return names


@pytest.fixture
def three():
    """Two methods, two trainings: (erased, drawn) -> ours; A erases its style and keeps the other, B neither."""
    cells = {
        ("A", "Van Gogh", "Van Gogh"): [0.0, 0.2],
        ("A", "Van Gogh", "Picasso"): [0.8, 0.6],
        ("B", "Van Gogh", "Van Gogh"): [0.7, 0.9],
        ("B", "Van Gogh", "Picasso"): [0.4, 0.4],
        ("B", "nothing", "Van Gogh"): [0.8, 0.8],  # of the unedited model
        ("B", "sum", "erased - kept"): [9.0, 9.0],
    }
    return [
        {"method": m, "erased": e, "evaluated": v, "values": ours, "ours": sum(ours) / 2}
        for (m, e, v), ours in cells.items()
    ]


def test_differences_by_hand(three):
    found = space(three, "claims-def", "claims-means")
    assert found["acc"]("t", "A", True) == pytest.approx([0.0, 0.2])
    assert found["acc"]("t", "B", False) == pytest.approx([0.4, 0.4])  # neither the sum nor the unedited model
    assert found["loss"]("t", "A") == pytest.approx([0.0, 0.2]) and found["loss"]("t", "B") == pytest.approx([0.4, 0.4])
    assert found["half_gone"]("t") == pytest.approx([0.4 - 0.7, 0.4 - 0.9])  # B leaves most
    assert found["score"]("t", "A") == pytest.approx([0.8, 0.4])


def test_the_lead_of_one_method_is_over_the_best_of_the_others():
    sums = {"original": 0.0, "G-CiRs": 1.0, "ESD": 1.5, "FMN10": 3.0}
    rows = [{"method": m, "erased": "sum", "evaluated": "x", "values": [v], "ours": v} for m, v in sums.items()]
    assert space(rows, "claims-def")["lead"]("t", "sum", "x", "ACC") == pytest.approx([0.5])


@pytest.mark.parametrize("d", [[0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.1, 0.1, 0.2], [0.05, 0.06, 0.12, 0.1]])
def test_the_notebook_s_rule_is_the_exercise_s(d):
    numbers, word = space((), "claims-def")["ruled"](np.array(d))
    assert word == verdict(d) and numbers.startswith(f"{np.mean(d):+.3g} [")
    assert space((), "claims-def")["ruled"](np.array([0.3])) == ("one training seed", "cannot be told here")


def test_tau_is_followed_or_not():
    """A curve that falls and weights that grow along falling tau give 1; the reverse gives -1."""
    for direction in (1, -1):
        rows = []
        for style in plan.STYLES:
            for k, tau in enumerate(["tau=1e-3", "tau=0", "tau=-1e-3"]):
                fall, grow = 0.9 - direction * 0.3 * k, 10.0 + direction * k
                same = {"method": "G-CiRs", "erased": style, "setting": tau}
                rows.append({**same, "evaluated": style, "values": [fall, fall], "ours": fall})
                rows.append({**same, "evaluated": "", "metric": "weight change", "values": [grow, grow], "ours": grow})
        found = space(rows, "orders-code", "claims-def", "claims-tau")["follows_tau"]()
        assert found == pytest.approx([direction, direction])


def test_means_and_rank_correlation():
    rows = []
    for k, method in enumerate("ABC"):
        same = {"method": method, "erased": "Van Gogh", "value": 0.1 * k}
        rows += [{**same, "evaluated": "Van Gogh", "values": [k], "ours": k**2}]
        rows += [{**same, "evaluated": e, "values": [k], "ours": -k - (e == "Others")} for e in ("Picasso", "Others")]
    found = space(rows, "orders-code")["orders"]("t")
    assert found["ACC, erased"]["r"] == pytest.approx(1) and found["ACC, kept"]["r"] == pytest.approx(-1)
    assert found["ACC, kept"]["pairs"]["C"] == pytest.approx((0.2, -2.5))


def test_every_claim_about_sepme_s_tables_has_a_difference():
    claims = {claim["id"] for n in range(1, 9) for claim in tables.paper_claims(f"sepme-{n}")}
    (made,) = [n for n in ast.walk(ast.parse(CELLS["claims-differences"])) if isinstance(n, ast.Dict)]
    assert {key.value for key in made.keys} == claims and len(claims) == 17
