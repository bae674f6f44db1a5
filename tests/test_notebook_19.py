"""Notebook 19: its differences, means and verdicts on tables made up by hand."""

import ast
from functools import cache
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from answers import verdict
from notebook_code import cells_of, definitions
from scipy import stats

from helpers import metrics, tables
from workflow import plan

ROW = {"setting": "", "metric": "ACC", "base": 0.8, "value": 0.5, "spread": 0.0}


def space(rows=(), *cells: str) -> dict:
    """What the definitions of some cells make, where every table's rows are the given ones."""
    frame = pd.DataFrame([{**ROW, **row} for row in rows])
    fake = {
        "compare_with_paper": lambda table, folder: frame,
        "paper_table": lambda table: frame,
        "is_aggregate": tables.is_aggregate,
    }
    names = {"np": np, "pd": pd, "stats": stats, "plan": plan, "plt": plt, "metrics": metrics}
    names |= {"cache": cache, "folder": None, "TABLE": "t", "tables": SimpleNamespace(**fake)}
    return definitions("19", "result-scatter", *cells, **names)


@pytest.fixture
def three():
    """Two methods, two trainings: (method, erased, evaluated) -> (paper's, ours).

    G-CiRs erases its style, B erases nothing.
    """
    cells = {
        ("G-CiRs", "Van Gogh", "Van Gogh"): (0.1, [0.0, 0.2]),
        ("G-CiRs", "Van Gogh", "Picasso"): (0.9, [0.8, 0.6]),
        ("B", "Van Gogh", "Van Gogh"): (1.0, [0.7, 0.9]),
        ("B", "Van Gogh", "Picasso"): (0.7, [0.4, 0.4]),
        ("B", "nothing", "Van Gogh"): (1.0, [0.8, 0.8]),  # of the unedited model
        ("B", "sum", "erased - kept"): (9.0, [9.0, 9.0]),
        ("original", "x", "Van Gogh"): (1.0, [1, 1]),
    }
    names = ("method", "erased", "evaluated")
    return [
        {
            **dict(zip(names, cell, strict=True)),
            "value": paper,
            "values": ours,
            "ours": sum(ours) / 2,
        }
        for cell, (paper, ours) in cells.items()
    ]


CLAIMS = ("claims-def", "claims-base", "claims-means", "claims-rivals")


def lists(arrays) -> list[list[float]]:
    return [array.tolist() for array in arrays]


def test_differences_by_hand(three):
    found = space(three, *CLAIMS)
    found["ORI"] = {"Van Gogh": 1.0, "Picasso": 0.95}
    assert found["acc"]("ours", "t", "G-CiRs", True) == pytest.approx([0.0, 0.2])
    # neither the sum nor the unedited model
    assert found["acc"]("ours", "t", "B", False) == pytest.approx([0.4, 0.4])
    assert found["loss"]("ours", "t", "G-CiRs") == pytest.approx([0.0, 0.2])
    assert found["loss"]("paper", "t", "G-CiRs") == pytest.approx([0.05])
    assert found["score"]("ours", "t", "G-CiRs") == pytest.approx([0.8, 0.4])
    assert found["rivals"]("t") == ["B"]
    # B first: 0.8 / 2 - what it leaves
    by_method = lists(found["half_gone"]("ours", "t"))
    assert by_method == [pytest.approx([-0.3, -0.5]), pytest.approx([0.4, 0.2])]
    printed = lists(found["half_gone"]("paper", "t"))
    assert printed == [pytest.approx([-0.5]), pytest.approx([0.4])]
    # from cells, not from the closing sum
    assert found["balance"]("ours", "t", "B", "ACC") == pytest.approx([0.3, 0.5])
    (lead,) = found["lead"]("ours", "t", found["balance"], "ACC")
    assert lead == pytest.approx([0.3 - (0.0 - 0.8), 0.5 - (0.2 - 0.6)])
    (more,) = found["lead"]("ours", "t", found["balance"], "ACC", sign=1)
    assert more == pytest.approx(-lead)


def test_the_originals_are_the_paper_s(three):
    assert space(three, *CLAIMS)["ORI"] == {"Van Gogh": 1.0}


@pytest.mark.parametrize(
    "d", [[0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.1, 0.1, 0.2], [0.05, 0.06, 0.12, 0.1]]
)
def test_the_notebook_s_rule_is_the_exercise_s(d):
    numbers, word = space((), "claims-def")["ruled"]([np.array(d)])
    assert word == verdict(d) and numbers.startswith(f"{np.mean(d):+.3g} [")
    alone = space((), "claims-def")["ruled"]([np.array([0.3])])
    assert alone == ("one training seed", "cannot be told here")


def test_a_claim_of_several_parts_is_as_good_as_its_weakest():
    up, down, open_ = map(np.array, ([0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.5, -0.6, 0.1]))
    ruled = space((), "claims-def")["ruled"]
    assert ruled([up, up + 1]) == ruled([up]) and ruled([up])[1] == "holds"
    assert ruled([up, open_]) == ruled([open_]) and ruled([open_])[1] == "cannot be told here"
    assert ruled([up, open_, down]) == ruled([down]) and ruled([down])[1] == "does not hold"


def tau_rows(direction: int) -> list[dict]:
    """Table 6 made up: along falling tau, ACC falls and weights grow; reversed for -1."""
    rows = []
    for style in plan.STYLES:
        for k, tau in enumerate(["tau=1e-3", "tau=-5e-4", "tau=0"]):
            fall, grow = 0.9 - direction * 0.3 * k, 10.0 + direction * k
            kept = dict.fromkeys([*plan.STYLES, "Others"], 0.5)
            cells = [(name, "ACC", v) for name, v in {**kept, style: fall}.items()]
            rows += [
                {
                    "method": "G-CiRs", "erased": style, "setting": tau, "evaluated": on,
                    "metric": metric, "values": [v, v], "ours": v, "value": v,
                }
                for on, metric, v in [*cells, ("", "weight change", grow)]
            ]  # fmt: skip
    return rows


@pytest.mark.parametrize("direction", [1, -1])
def test_tau_is_followed_or_not(direction):
    """A curve that falls and weights that grow along falling tau give 1; the reverse gives -1."""
    found = space(tau_rows(direction), "orders-code", *CLAIMS, "claims-tau")
    for side, n in (("ours", 2), ("paper", 1)):
        assert lists(found["follows_tau"](side)) == [pytest.approx([direction] * n)] * 2
    # Van Gogh's best is said to be the second, the others' the third of three
    leads = lists(found["best_tau"]("ours"))
    wanted = [0.3 * direction, -0.3 * direction] + [0.6 * direction, 0.3 * direction] * 2
    assert leads == [pytest.approx([d, d]) for d in wanted]


def test_means_and_rank_correlation():
    rows = []
    for k, method in enumerate("ABC"):
        same = {"method": method, "erased": "Van Gogh", "value": 0.1 * k, "values": [k]}
        rows.append({**same, "evaluated": "Van Gogh", "ours": k**2})
        for on in ("Picasso", "Others"):
            rows.append({**same, "evaluated": on, "ours": -k - (on == "Others")})
    found = space(rows, "orders-code")["orders"]("t")
    assert found["ACC, erased"]["r"] == pytest.approx(1)
    assert found["ACC, kept"]["r"] == pytest.approx(-1)
    assert found["ACC, kept"]["pairs"].loc["C"].tolist() == pytest.approx([0.2, -2.5])


def test_sums_and_averages_are_no_method_s_cells():
    cells = [("x+y", "x", 0.25), ("x+y", "Others", 0.75), ("x+y", "erased - kept", -5.0)]
    cells += [("average", "average", 9.0)]
    names = ("erased", "evaluated", "ours")
    rows = [{"method": "A", "values": [0], **dict(zip(names, c, strict=True))} for c in cells]
    rows.append({**rows[-1], "evaluated": "", "metric": "weight change"})
    found = space(rows, "orders-code")["means"]("t")["ours"].to_dict()
    assert found == {
        ("ACC, erased", "A"): 0.25,
        ("ACC, kept", "A"): 0.75,
        ("weight change", "A"): 9,
    }


def test_every_claim_about_sepme_s_tables_has_a_difference():
    claims = {name for n in range(1, 9) for name in tables.paper_claims(f"sepme-{n}")["id"]}
    tree = ast.parse(cells_of("19")["claims-differences"])
    (made,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    assert {f"sepme-{key.value}" for key in made.keys} == claims and len(claims) == 17
