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
        "closes": tables.closes,
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
    """Two methods, two trainings: (method, erased, drawn) -> (paper's, ours). G-CiRs erases its style, B erases nothing."""
    cells = {
        ("G-CiRs", "Van Gogh", "Van Gogh"): (0.1, [0.0, 0.2]),
        ("G-CiRs", "Van Gogh", "Picasso"): (0.9, [0.8, 0.6]),
        ("B", "Van Gogh", "Van Gogh"): (1.0, [0.7, 0.9]),
        ("B", "Van Gogh", "Picasso"): (0.7, [0.4, 0.4]),
        ("B", "nothing", "Van Gogh"): (1.0, [0.8, 0.8]),  # of the unedited model
        ("B", "sum", "erased - kept"): (9.0, [9.0, 9.0]),
    }
    rows = [
        {"method": m, "erased": e, "evaluated": v, "value": paper, "values": ours, "ours": sum(ours) / 2}
        for (m, e, v), (paper, ours) in cells.items()
    ]
    return [
        *rows,
        {"method": "original", "erased": "x", "evaluated": "Van Gogh", "values": [1, 1], "ours": 1, "value": 1.0},
    ]


CLAIMS = ("claims-def", "claims-base", "claims-means", "claims-rivals")


def test_differences_by_hand(three):
    found = space(three, *CLAIMS)
    found["ORI"] = {"Van Gogh": 1.0, "Picasso": 0.95}
    assert found["acc"]("ours", "t", "G-CiRs", True) == pytest.approx([0.0, 0.2])
    assert found["acc"]("ours", "t", "B", False) == pytest.approx([0.4, 0.4])  # neither the sum nor the unedited model
    assert found["loss"]("ours", "t", "G-CiRs") == pytest.approx([0.0, 0.2])
    assert found["loss"]("paper", "t", "G-CiRs") == pytest.approx([0.05])
    assert found["score"]("ours", "t", "G-CiRs") == pytest.approx([0.8, 0.4])
    assert found["rivals"]("t") == ["B"]
    by_method = found["half_gone"]("ours", "t")  # B first: 0.8 / 2 - what it leaves
    assert [d.tolist() for d in by_method] == [pytest.approx([-0.3, -0.5]), pytest.approx([0.4, 0.2])]
    assert [d.tolist() for d in found["half_gone"]("paper", "t")] == [pytest.approx([-0.5]), pytest.approx([0.4])]
    assert found["balance"]("ours", "t", "B", "ACC") == pytest.approx(
        [0.3, 0.5]
    )  # from cells, not from the closing sum
    (lead,) = found["lead"]("ours", "t", found["balance"], "ACC")
    assert lead == pytest.approx([0.3 - (0.0 - 0.8), 0.5 - (0.2 - 0.6)])
    (more,) = found["lead"]("ours", "t", found["balance"], "ACC", sign=1)
    assert more == pytest.approx(-lead)


@pytest.mark.parametrize("d", [[0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.1, 0.1, 0.2], [0.05, 0.06, 0.12, 0.1]])
def test_the_notebook_s_rule_is_the_exercise_s(d):
    numbers, word = space((), "claims-def")["ruled"]([np.array(d)])
    assert word == verdict(d) and numbers.startswith(f"{np.mean(d):+.3g} [")
    assert space((), "claims-def")["ruled"]([np.array([0.3])]) == ("one training seed", "cannot be told here")


def test_a_claim_of_several_parts_is_as_good_as_its_weakest():
    up, down, open_ = (np.array(d) for d in ([0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.5, -0.6, 0.1]))
    ruled = space((), "claims-def")["ruled"]
    assert ruled([up, up + 1]) == ruled([up]) and ruled([up])[1] == "holds"
    assert ruled([up, open_]) == ruled([open_]) and ruled([open_])[1] == "cannot be told here"
    assert ruled([up, open_, down]) == ruled([down]) and ruled([down])[1] == "does not hold"


def test_tau_is_followed_or_not():
    """A curve that falls and weights that grow along falling tau give 1; the reverse gives -1."""
    for direction in (1, -1):
        rows = []
        for style in plan.STYLES:
            for k, tau in enumerate(["tau=1e-3", "tau=-5e-4", "tau=0"]):
                fall, grow = 0.9 - direction * 0.3 * k, 10.0 + direction * k
                same = {"method": "G-CiRs", "erased": style, "setting": tau}
                rows += [
                    {**same, "evaluated": name, "values": [0.5, 0.5], "ours": 0.5, "value": 0.5}
                    for name in [*plan.STYLES, "Others"]
                    if name != style
                ]
                rows.append({**same, "evaluated": style, "values": [fall, fall], "ours": fall, "value": fall})
                weights = {"values": [grow, grow], "ours": grow, "value": grow}
                rows.append({**same, "evaluated": "", "metric": "weight change", **weights})
        found = space(rows, "orders-code", *CLAIMS, "claims-tau")
        for side, n in (("ours", 2), ("paper", 1)):
            assert [d.tolist() for d in found["follows_tau"](side)] == [pytest.approx([direction] * n)] * 2
        leads = found["best_tau"]("ours")  # Van Gogh's is said to be the second, the others' the third of three
        wanted = [0.3 * direction, -0.3 * direction] + [0.6 * direction, 0.3 * direction] * 2
        assert [d.tolist() for d in leads] == [pytest.approx([d, d]) for d in wanted]


def test_means_and_rank_correlation():
    rows = []
    for k, method in enumerate("ABC"):
        same = {"method": method, "erased": "Van Gogh", "value": 0.1 * k}
        rows += [{**same, "evaluated": "Van Gogh", "values": [k], "ours": k**2}]
        rows += [{**same, "evaluated": e, "values": [k], "ours": -k - (e == "Others")} for e in ("Picasso", "Others")]
    found = space(rows, "orders-code")["orders"]("t")
    assert found["ACC, erased"]["r"] == pytest.approx(1) and found["ACC, kept"]["r"] == pytest.approx(-1)
    assert found["ACC, kept"]["pairs"]["C"] == pytest.approx((0.2, -2.5))


def test_sums_and_averages_are_no_method_s_cells():
    rows = [
        {"method": "A", "erased": "x+y", "evaluated": e, "values": [k], "ours": k, "value": k}
        for e, k in (("x", 0.25), ("Others", 0.75), ("erased - kept", -5.0))
    ]
    average = {"method": "A", "erased": "average", "values": [9], "ours": 9, "value": 9}
    rows += [{**average, "evaluated": "average"}, {**average, "evaluated": "", "metric": "weight change"}]
    found = space(rows, "orders-code")["means"]("t", "ours")
    assert found == {("A", "ACC, erased"): 0.25, ("A", "ACC, kept"): 0.75, ("A", "weight change"): 9}


def test_every_claim_about_sepme_s_tables_has_a_difference():
    claims = {claim["id"] for n in range(1, 9) for claim in tables.paper_claims(f"sepme-{n}")}
    (made,) = [n for n in ast.walk(ast.parse(CELLS["claims-differences"])) if isinstance(n, ast.Dict)]
    assert {f"sepme-{key.value}" for key in made.keys} == claims and len(claims) == 17
