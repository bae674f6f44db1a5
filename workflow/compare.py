"""Are two folders of tables the same? For tables made again:

    mkdir -p build && cp -r data/results build/committed
    make tables
    python -m workflow.compare data/results build/committed

On a machine like the one that made them every value is equal. Another kind of CPU rounds sums
otherwise, a training takes another path from there on, and an image on the edge may tip over. The
tolerances: a share within one image in eight, a weight change within 2 %, LPIPS and drift within
2 % or in the committed value's own 95 % interval; nineteen of twenty values are, for each metric of
each table. Sums and averages follow from the others. ``data/results/README.md`` says how far values
moved when some were made again with other processor instructions.
"""

import math
import sys
from pathlib import Path

import pandas as pd

from helpers.tables import is_aggregate, read_csv

NEAR = 0.02  # of the committed value
SLACK = 1e-3  # where that is zero
ALLOWED = 0.05  # the share of values that may lie outside
SHARES = ("ACC", "UA", "IRA", "CRA", "collapsed", "blank", "something else")
GROUPS = ("erased", "retained", "neighbour")  # what methods.csv evaluates, each for itself


def beside(made: pd.DataFrame, committed: pd.DataFrame) -> pd.DataFrame:
    """The committed rows with the value "made" again beside each. ValueError if rows differ."""
    key = list(committed.columns[: list(committed.columns).index("value")])
    again = made.rename(columns={"value": "made"}).reindex(columns=[*key, "made"])
    both = committed.merge(again, on=key, how="outer", validate="1:1", indicator=True)
    odd = both[both["_merge"] != "both"]
    if len(odd):
        raise ValueError(
            f"the tables have other rows, {tuple(odd.iloc[0][key])} for one: were they made from "
            "these options and papers?"
        )
    return both


def inside(rows: pd.DataFrame, gap: pd.Series) -> pd.Series:
    """Whether each row's value made again is within its tolerance. gap: the absolute difference."""
    of_images = gap <= (1 / rows["n"]).clip(lower=1 / 8) + SLACK
    in_interval = (rows["low"] <= rows["made"]) & (rows["made"] <= rows["high"])  # False if empty
    near = gap <= NEAR * rows["value"].abs() + SLACK
    return of_images.where(rows["metric"].str.startswith(SHARES), in_interval | near)


def compare(made: pd.DataFrame, committed: pd.DataFrame) -> pd.DataFrame:
    """A row for each metric: values, how many are equal, mean and greatest difference, how many are
    outside their tolerance.

    Sums and averages are left out. ValueError if the two have other rows.
    """
    rows = beside(made, committed)
    rows = rows[~is_aggregate(rows)]
    gap = (rows["made"] - rows["value"]).abs()
    group = rows["evaluated"].where(rows["evaluated"].isin(GROUPS), "")
    found = pd.DataFrame(
        {"metric": (rows["metric"] + " " + group).str.strip(), "gap": gap, "equal": gap == 0}
    ).assign(outside=~inside(rows, gap))
    return found.groupby("metric", sort=False).agg(
        values=("gap", "size"), equal=("equal", "sum"), mean=("gap", "mean"),
        greatest=("gap", "max"), outside=("outside", "sum"),
    )  # fmt: skip


def main(made: Path, committed: Path) -> int:
    """Print every metric of every table; 1 if one has too many values outside, or is missing."""
    tables = {folder: {path.name for path in folder.glob("*.csv")} for folder in (made, committed)}
    names = [name for name in sorted(tables[made] | tables[committed]) if is_ours(name)]
    missing = [
        f"{folder}/{name}" for folder in tables for name in names if name not in tables[folder]
    ]
    bad = [f"missing: {name}" for name in missing] or ([] if names else [f"no tables in {made}"])
    for name in () if bad else names:
        found = compare(read_csv(made / name), read_csv(committed / name))
        for metric, f in found.iterrows():
            print(
                f"{Path(name).stem:8s} {metric:28s} {f['equal']:4.0f} of {f['values']:4.0f} equal, "
                f"{f['outside']:3.0f} outside; difference {f['mean']:.3g} in the mean, "
                f"{f['greatest']:.3g} at most"
            )
            if f["outside"] > math.ceil(ALLOWED * f["values"]):
                bad.append(
                    f"{name}: {metric}, {f['outside']:.0f} of {f['values']:.0f} values are outside "
                    "their tolerances"
                )
    print("\n".join(bad) or "every table is within its tolerances")
    return int(bool(bad))


def is_ours(name: str) -> bool:
    """Whether `make tables` makes this file, and makes the same one each time."""
    return name == "methods.csv" or (name.startswith("sepme-") and name.endswith(".csv"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
