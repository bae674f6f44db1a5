"""The claims about SepME's tables, and notebook 19: differences, means and verdicts by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from answers import verdict

from helpers import tables
from workflow import claims, plan

ROW = {"setting": "", "metric": "ACC", "base": 0.8, "value": 0.5, "spread": 0.0}
NOWHERE = Path()


@pytest.fixture
def given(monkeypatch):
    """Let every table's rows be the given ones; returns our side and the paper's."""

    def give(rows) -> tuple[claims.Side, claims.Side]:
        frame = pd.DataFrame([{**ROW, **row} for row in rows])
        monkeypatch.setattr(tables, "compare_with_paper", lambda table, folder: frame)
        monkeypatch.setattr(tables, "paper_table", lambda table: frame)
        return claims.Side(NOWHERE), claims.Side(NOWHERE, printed=True)

    return give


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


def lists(arrays) -> list[list[float]]:
    return [array.tolist() for array in arrays]


def test_differences_by_hand(given, three):
    ours, paper = given(three)
    paper.originals = {"Van Gogh": 1.0, "Picasso": 0.95}
    assert ours.acc("t", "G-CiRs", erased=True) == pytest.approx([0.0, 0.2])
    # neither the sum nor the unedited model
    assert ours.acc("t", "B", erased=False) == pytest.approx([0.4, 0.4])
    assert ours.loss("t", "G-CiRs") == pytest.approx([0.0, 0.2])
    assert paper.loss("t", "G-CiRs") == pytest.approx([0.05])
    assert ours.score("t", "G-CiRs") == pytest.approx([0.8, 0.4])
    assert claims.rivals("t") == ["B"]
    # B first: 0.8 / 2 - what it leaves
    assert lists(ours.half_gone("t")) == [pytest.approx([-0.3, -0.5]), pytest.approx([0.4, 0.2])]
    assert lists(paper.half_gone("t")) == [pytest.approx([-0.5]), pytest.approx([0.4])]
    # from cells, not from the closing sum
    assert ours.balance("t", "B", "ACC") == pytest.approx([0.3, 0.5])
    (lead,) = ours.lead("t", claims.Side.balance, "ACC")
    assert lead == pytest.approx([0.3 - (0.0 - 0.8), 0.5 - (0.2 - 0.6)])
    (more,) = ours.lead("t", claims.Side.balance, "ACC", sign=1)
    assert more == pytest.approx(-lead)


def test_the_originals_are_the_paper_s(given, three):
    assert given(three)[1].originals == {"Van Gogh": 1.0}


@pytest.mark.parametrize(
    "d", [[0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.1, 0.1, 0.2], [0.05, 0.06, 0.12, 0.1]]
)
def test_the_rule_is_the_exercise_s(d):
    assert claims.ruled([np.array(d)]) == claims.WORDS[{1: 0, -1: 1, 0: 2}[verdict(d)["sign"]]]
    mean, low, high = claims.interval([np.array(d)])
    assert mean == pytest.approx(np.mean(d)) and low < mean < high


def test_one_training_seed_tells_nothing():
    alone = [np.array([0.3])]
    assert claims.ruled(alone) == "cannot be told here"
    assert claims.interval(alone) == (0.3, -np.inf, np.inf)


def test_a_claim_of_several_parts_is_as_good_as_its_weakest():
    up, down, open_ = map(np.array, ([0.5, 0.6, 0.55], [-0.5, -0.6, -0.55], [0.5, -0.6, 0.1]))
    ruled, interval = claims.ruled, claims.interval
    assert interval([up, up + 1]) == interval([up]) and ruled([up, up + 1]) == "holds"
    assert interval([up, open_]) == interval([open_])
    assert ruled([up, open_]) == "cannot be told here"
    assert interval([up, open_, down]) == interval([down])
    assert ruled([up, open_, down]) == "does not hold"


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
def test_tau_is_followed_or_not(given, direction):
    """A curve that falls and weights that grow along falling tau give 1; the reverse gives -1."""
    ours, paper = given(tau_rows(direction))
    for side, n in ((ours, 2), (paper, 1)):
        assert lists(side.follows_tau()) == [pytest.approx([direction] * n)] * 2
    # Van Gogh's best is said to be the second, the others' the third of three
    leads = lists(ours.best_tau())
    wanted = [0.3 * direction, -0.3 * direction] + [0.6 * direction, 0.3 * direction] * 2
    assert leads == [pytest.approx([d, d]) for d in wanted]


def test_means_and_rank_correlation(given):
    rows = []
    for k, method in enumerate("ABC"):
        same = {"method": method, "erased": "Van Gogh", "value": 0.1 * k, "values": [k]}
        rows.append({**same, "evaluated": "Van Gogh", "ours": k**2})
        for on in ("Picasso", "Others"):
            rows.append({**same, "evaluated": on, "ours": -k - (on == "Others")})
    given(rows)
    found = claims.orders("t", NOWHERE)
    assert found["ACC, erased"]["r"] == pytest.approx(1)
    assert found["ACC, kept"]["r"] == pytest.approx(-1)
    assert found["ACC, kept"]["pairs"].loc["C"].tolist() == pytest.approx([0.2, -2.5])


def test_sums_and_averages_are_no_method_s_cells(given):
    cells = [("x+y", "x", 0.25), ("x+y", "Others", 0.75), ("x+y", "erased - kept", -5.0)]
    cells += [("average", "average", 9.0)]
    names = ("erased", "evaluated", "ours")
    rows = [{"method": "A", "values": [0], **dict(zip(names, c, strict=True))} for c in cells]
    rows.append({**rows[-1], "evaluated": "", "metric": "weight change"})
    given(rows)
    found = claims.means("t", NOWHERE)["ours"].to_dict()
    assert found == {
        ("ACC, erased", "A"): 0.25,
        ("ACC, kept", "A"): 0.75,
        ("weight change", "A"): 9,
    }


def test_every_claim_about_sepme_s_tables_has_a_difference():
    known = {name for n in range(1, 9) for name in tables.paper_claims(f"sepme-{n}")["id"]}
    assert {f"sepme-{key}" for key in claims.CLAIMS} == known and len(known) == 17


def test_the_verdicts_of_the_committed_tables():
    """Each claim once, with a word of the rule that its own interval carries."""
    told = claims.verdicts([f"sepme-{n}" for n in range(1, 9)], tables.RESULTS)
    assert list(told["id"]) == list(claims.CLAIMS) and set(told["here"]) <= set(claims.WORDS)
    assert ((told["low"] > 0) == (told["here"] == "holds")).all()
    assert ((told["high"] < 0) == (told["here"] == "does not hold")).all()
