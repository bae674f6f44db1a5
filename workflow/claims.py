"""SepME's printed tables beside ours: cells, orders of methods, and what the authors claim.

A claim of ``data/papers/claims.csv`` is a difference d, positive where the claim is right.
``CLAIMS`` writes each down for either side: ``Side(folder)`` has our figures, one for each training
seed, ``Side(folder, printed=True)`` the paper's. ``ruled`` turns d into a verdict. Notebook 19
reads all of it.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from helpers import metrics, tables
from workflow import plan

MARGIN = 0.1  # "comparably" and "almost perfectly": at most this much worse, in ACC
NAMED = {*plan.STYLES, *plan.OBJECTS}
WORDS = ("holds", "does not hold", "cannot be told here")


def with_ours(table: str, folder: Path) -> pd.DataFrame:
    """A printed table with ours beside it; "lost": whether a cell is about what its model lost."""
    rows = tables.compare_with_paper(table, folder)
    pairs = zip(rows["evaluated"], rows["erased"], strict=True)
    return rows.assign(lost=[name in erased.split("+") for name, erased in pairs])


HEAD = ["method", "drawn", "paper", "ours", "difference", "base", "n"]
NOTE = "* flagged: data/papers says why"


def side_by_side(table: str, folder: Path, *, metric: str, erased: str) -> list[tuple]:
    """One metric and one block of a printed table, with ours beside it: lines under ``HEAD``."""
    rows, lines = with_ours(table, folder), []
    wanted = (rows["metric"] == metric) & (rows["erased"] == erased) & rows["value"].notna()
    for row in rows[wanted].to_dict("records"):
        about = f"{row['method']} {row['setting']}", row["evaluated"]
        printed = row["as_printed"] + "*" * bool(row["flag"])
        mine = f"{row['ours']:.3f} ± {row['spread']:.3f}", f"{row['difference']:+.3f}"
        n = int(row["n"]) if row["n"] > 0 else ""
        lines.append((*about, printed, *mine, f"{row['base']:.3f}", n))
    return lines


def spearman(a, b) -> float:
    """The rank correlation; 0 where one side is all equal, which tells no order."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def means(table: str, folder: Path) -> pd.DataFrame:
    """Mean over a table's cells, the paper's ("value") and ours, by metric and method."""
    rows = with_ours(table, folder)
    told = rows["value"].notna() & (rows["method"] != "original") & (rows["erased"] != "nothing")
    rows = rows[told & ~tables.is_aggregate(rows)]
    group = np.where(rows["lost"], ", erased", ", kept")
    what = rows["metric"] + np.where(rows["evaluated"] == "", "", group)
    method = (rows["method"] + " " + rows["setting"]).str.strip()
    keys = [what.rename("what"), method.rename("method")]
    return rows.groupby(keys, sort=False)[["value", "ours"]].mean()


def orders(table: str, folder: Path) -> dict[str, dict]:
    """What was measured -> its pairs (paper, ours) by method, and their rank correlation "r".

    r is NaN for fewer than three methods.
    """
    found = {}
    for what, group in means(table, folder).groupby(level="what", sort=False):
        pairs = group.droplevel("what")
        r = spearman(*pairs.to_numpy().T) if len(pairs) > 2 else float("nan")
        found[what] = {"pairs": pairs, "r": r}
    return found


def interval(differences: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean, low and high (95 %, Student's t over seeds) of the weakest of several differences.

    Where one fails that is the one whose upper end lies lowest, else the one whose lower end does.
    One training seed has an interval without ends.
    """
    alone = [(d.item(), -np.inf, np.inf) for d in differences if len(d) == 1]
    found = alone or [metrics.student_interval(d) for d in differences]
    fails = any(high < 0 for _, _, high in found)
    return min(found, key=lambda one: one[2 if fails else 1])


def ruled(differences: list[np.ndarray]) -> str:
    """The rule's word for all differences of a claim together: one of ``WORDS``.

    It holds if every interval lies above zero, does not hold if one lies below, and else, or with a
    single training seed, cannot be told.
    """
    _, low, high = interval(differences)
    return WORDS[1] if high < 0 else WORDS[0] if low > 0 else WORDS[2]


class Side:
    """One side's figures of every table: ours, an entry for each training seed, or the paper's."""

    def __init__(self, folder: Path, *, printed: bool = False) -> None:
        self.folder, self.printed = folder, printed

    def cells(self, table: str, **wanted) -> list[dict]:
        """Rows with these entries and their values "d", no sums."""
        rows = with_ours(table, self.folder)
        rows = rows[rows["value"].notna() & (rows["evaluated"] != "erased - kept")]
        rows = rows[(rows[list(wanted)] == list(wanted.values())).all(axis=1)].to_dict("records")
        return [{**r, "d": np.array([r["value"]] if self.printed else r["values"])} for r in rows]

    def value(self, table: str, *names: str, setting: str = "") -> np.ndarray:
        """The values of one cell; names: method, erased, evaluated, metric."""
        keys = dict(zip(("method", "erased", "evaluated", "metric"), names, strict=True))
        (row,) = self.cells(table, **keys, setting=setting)
        return row["d"]

    @cached_property
    def originals(self) -> dict[str, float]:
        """The paper's ACC of its unedited model, by what is drawn: Tables 1 and 7."""
        found = {}
        for table in ("sepme-1", "sepme-7"):
            rows = tables.paper_table(table)
            rows = rows[(rows["method"] == "original") & (rows["metric"] == "ACC")]
            found |= dict(zip(rows["evaluated"], rows["value"], strict=True))
        return found

    def base(self, row: dict) -> float:
        """The unedited model's ACC for a cell."""
        return self.originals[row["evaluated"]] if self.printed else row["base"]

    def named(self, table: str, method: str, *, erased: bool) -> list[dict]:
        """The cells of ACC of named concepts that the model has lost, or has not."""
        rows = self.cells(table, method=method, metric="ACC", lost=erased)
        return [row for row in rows if row["evaluated"] in NAMED and row["erased"] != "nothing"]

    def acc(self, table: str, method: str, *, erased: bool) -> np.ndarray:
        """Mean ACC over them."""
        return np.mean([row["d"] for row in self.named(table, method, erased=erased)], axis=0)

    def loss(self, table: str, method: str) -> np.ndarray:
        """How much ACC of what was *not* erased lies below the base's."""
        rows = self.named(table, method, erased=False)
        return np.mean([self.base(row) - row["d"] for row in rows], axis=0)

    def score(self, table: str, method: str) -> np.ndarray:
        """ACC of what is kept minus ACC of what is erased."""
        return self.acc(table, method, erased=False) - self.acc(table, method, erased=True)

    def share(self, table: str, method: str) -> np.ndarray:
        """The share of what was to be erased that is."""
        return 1 - self.acc(table, method, erased=True)

    def change(self, table: str, method: str) -> np.ndarray:
        """The weight change, mean over what is erased."""
        rows = self.cells(table, method=method, metric="weight change")
        return np.mean([row["d"] for row in rows], axis=0)

    def balance(self, table: str, method: str, metric: str) -> np.ndarray:
        """What closes Tables 1 and 2, from their cells: of erased styles minus of kept ones."""
        rows = self.cells(table, method=method, metric=metric)
        signed = [r["d"] if r["lost"] else -r["d"] for r in rows if r["erased"] != "nothing"]
        return np.sum(signed, axis=0)

    def average(self, table: str, method: str) -> np.ndarray:
        """Table 7's last line: ACC of the erased object minus that of the others."""
        own, others = (
            self.value(table, method, "average", on, "ACC") for on in ("average", "Others")
        )
        return own - others

    def lead(self, table: str, measure: Callable, *options, sign: int = -1) -> list[np.ndarray]:
        """How much less (sign -1) or more (1) G-CiRs has than each of the other methods."""
        own = measure(self, table, "G-CiRs", *options)
        return [sign * (own - measure(self, table, name, *options)) for name in rivals(table)]

    def sums(self, table: str) -> list[np.ndarray]:
        """G-CiRs' lead in both of a table's closing sums: ACC is to be low, LPIPS high."""
        low = self.lead(table, Side.balance, "ACC")
        return low + self.lead(table, Side.balance, "LPIPS", sign=1)

    def half_gone(self, table: str) -> list[np.ndarray]:
        """How far each method's ACC of each erased concept stays below half of the base's."""
        methods = [*rivals(table), "G-CiRs"]
        rows = pd.DataFrame([r for m in methods for r in self.named(table, m, erased=True)])
        rows["gap"] = [self.base(row) / 2 - row["d"] for row in rows.to_dict("records")]
        groups = rows.groupby(["method", "evaluated"], sort=False)["gap"].agg(list)
        return [np.mean(gaps, axis=0) for gaps in groups]

    def restored(self, table: str, method: str) -> list[np.ndarray]:
        """By how much less than the margin ACC falls where it was to come back."""
        return [MARGIN - self.loss(table, method)]

    def lost(self, table: str, *methods: str) -> list[np.ndarray]:
        """By how much more than the margin it falls, for each method."""
        return [self.loss(table, method) - MARGIN for method in methods]

    def not_worse(self, table: str, own: str, rival: str, measure: Callable) -> list[np.ndarray]:
        """By how much less than the margin a method lies below another."""
        return [MARGIN + measure(self, table, own) - measure(self, table, rival)]

    def follows_tau(self) -> list[np.ndarray]:
        """Rank correlations along falling tau, mean over styles: of -ACC and of weight change."""
        found = {"ACC": [], "weight change": []}
        for style, settings in thresholds().items():
            for metric, sign, on in (("ACC", -1, style), ("weight change", 1, "")):
                names = "G-CiRs", style, on, metric
                curve = [self.value("sepme-6", *names, setting=tau) for tau in settings]
                order = range(len(settings))
                found[metric].append([sign * spearman(order, one) for one in np.array(curve).T])
        return [np.mean(curves, axis=0) for curves in found.values()]

    def at(self, style: str, tau: str) -> np.ndarray:
        """ACC of what is kept minus ACC of the erased style, at one threshold of Table 6."""
        keys = {"erased": style, "setting": tau, "metric": "ACC", "method": "G-CiRs"}
        rows = self.cells("sepme-6", **keys)
        kept = [row["d"] for row in rows if not row["lost"]]
        (own,) = (row["d"] for row in rows if row["lost"])
        return np.mean(kept, axis=0) - own

    def best_tau(self) -> list[np.ndarray]:
        """How far the tau that the paper calls best leads each other one, by ``at``."""
        best = dict(zip(plan.STYLES, ["tau=-5e-4", "tau=0", "tau=0"], strict=True))
        return [
            self.at(style, best[style]) - self.at(style, tau)
            for style, settings in thresholds().items()
            for tau in settings
            if tau != best[style]
        ]


def rivals(table: str) -> list[str]:
    """A table's methods but for the original and G-CiRs."""
    names = tables.paper_table(table)["method"].unique()
    return [name for name in names if name not in ("original", "G-CiRs")]


def thresholds() -> dict[str, list[str]]:
    """Table 6's settings for each style, the highest tau first."""
    rows = tables.paper_table("sepme-6")
    return {style: list(rows[rows["erased"] == style]["setting"].unique()) for style in plan.STYLES}


CLAIMS = {  # what d is, and each difference that has to be positive
    "1a": ("lead in sums of ACC, LPIPS", lambda s: s.sums("sepme-1")),
    "1b": ("rivals' weight change - G-CiRs'", lambda s: s.lead("sepme-1", Side.change)),
    "2a": ("lead in sums of ACC, LPIPS", lambda s: s.sums("sepme-2")),
    "3a": (
        "share erased, SepME - tuned + 0.1",
        lambda s: [
            *s.not_worse("sepme-3", "SepME", "AbConcept", Side.share),
            *s.not_worse("sepme-3", "SepME", "G-CiRs", Side.share),
        ],
    ),
    "3b": ("0.1 - ACC lost", lambda s: s.restored("sepme-3", "SepME")),
    "4a": ("half of base - ACC of erased", lambda s: s.half_gone("sepme-4")),
    "4b": ("ACC lost - 0.1", lambda s: s.lost("sepme-4", "AbConcept", "G-CiRs")),
    "4c": ("0.1 - ACC lost", lambda s: s.restored("sepme-4", "SepME1")),
    "4d": (
        "kept - erased, 2 - 1 + 0.1",
        lambda s: s.not_worse("sepme-4", "SepME2", "SepME1", Side.score),
    ),
    "6a": ("rank correlations with tau", Side.follows_tau),
    "6b": ("kept - erased, best tau - others", Side.best_tau),
    "7a": ("erased - kept, rivals' - G-CiRs'", lambda s: s.lead("sepme-7", Side.average)),
    "7b": ("rivals' weight change - G-CiRs'", lambda s: s.lead("sepme-7", Side.change)),
    "8a": ("half of base - ACC of erased", lambda s: s.half_gone("sepme-8")),
    "8b": ("ACC lost - 0.1", lambda s: s.lost("sepme-8", "AbConcept")),
    "8c": ("0.1 - ACC lost", lambda s: s.restored("sepme-8", "SepME1")),
    "8d": (
        "kept - erased, 2 - 1 + 0.1",
        lambda s: s.not_worse("sepme-8", "SepME2", "SepME1", Side.score),
    ),
}


def verdicts(made: list[str], folder: Path) -> pd.DataFrame:
    """Every claim about the tables that are made: a row each.

    Columns: id, claim, section, printed (our reading of the authors' own table), what (d in words),
    paper (the least d of their figures), mean, low, high (of ours, see ``interval``; the last two
    are infinite for a single training seed) and here (``ruled``).
    """
    ours, paper, rows = Side(folder), Side(folder, printed=True), []
    for claim in pd.concat([tables.paper_claims(table) for table in made]).to_dict("records"):
        number = claim["id"].removeprefix("sepme-")
        what, difference = CLAIMS[number]
        d = difference(ours)
        mean, low, high = interval(d)
        told = {"paper": min(one.item() for one in difference(paper)), "here": ruled(d)}
        numbers = {"mean": mean, "low": low, "high": high}
        rows.append({**claim, "id": number, "what": what, **told, **numbers})
    return pd.DataFrame(rows)
