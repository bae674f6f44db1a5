"""Are two folders of tables the same? For tables made again:

    mkdir -p build && cp -r data/results build/committed
    make tables
    python data/scales/compare.py data/results build/committed

On a machine like the one that made them every figure is equal. Another kind of CPU rounds sums otherwise, a training takes
another path from there on, and a picture on the edge may tip over. The tolerances: a share within one picture in eight,
a weight change within 2 %, LPIPS and drift within 2 % or in the committed figure's own 95 % interval; nineteen of twenty
figures are, for each metric of each table. Sums and averages follow from the others. ``data/results/README.md`` says how
far figures moved when some were made again with other processor instructions.
"""

import math
import statistics
import sys
from pathlib import Path

from helpers.tables import closes, read_csv

NEAR = 0.02  # of the committed figure
SLACK = 1e-3  # where that is zero
ALLOWED = 0.05  # the share of figures that may lie outside


def inside(made: dict, committed: dict) -> bool | None:
    """Whether one figure is within its tolerance; None for a sum or an average."""
    gap, wanted = abs(float(made["value"]) - float(committed["value"])), abs(float(committed["value"]))
    if "evaluated" in committed and closes(committed):
        return None
    if committed["metric"].startswith(("ACC", "UA", "IRA", "CRA", "collapsed")):
        return gap <= max(1 / float(committed["n"]), 1 / 8) + SLACK
    within = committed["low"] != "" and float(committed["low"]) <= float(made["value"]) <= float(committed["high"])
    return within or gap <= NEAR * wanted + SLACK


def compare(made: list[dict], committed: list[dict]) -> dict[str, dict]:
    """Metric -> figures, how many are equal, mean and greatest difference, how many are outside. ValueError if rows differ."""
    key = list(committed[0])[: list(committed[0]).index("value")]
    ours, theirs = ({tuple(row[k] for k in key): row for row in rows} for rows in (made, committed))
    if ours.keys() != theirs.keys():
        odd = next(iter(ours.keys() ^ theirs.keys()))
        raise ValueError(f"the tables have other rows, {odd} for one: were they made from these options and papers?")
    groups: dict[str, list[tuple[float, bool]]] = {}
    for name, row in theirs.items():
        if (fits := inside(ours[name], row)) is not None:
            gap = abs(float(ours[name]["value"]) - float(row["value"]))
            groups.setdefault(row["metric"], []).append((gap, fits))
    return {
        metric: {
            "figures": len(found),
            "equal": sum(gap == 0 for gap, _ in found),
            "mean": statistics.fmean(gap for gap, _ in found),
            "greatest": max(gap for gap, _ in found),
            "outside": sum(not fits for _, fits in found),
        }
        for metric, found in groups.items()
    }


def main(made: Path, committed: Path) -> int:
    """Print every metric of every table; 1 if one has too many figures outside, or if a table is missing."""
    tables = {folder: {path.name for path in folder.glob("*.csv")} for folder in (made, committed)}
    names = sorted(
        name for name in tables[made] | tables[committed] if name.startswith("sepme-") or name == "methods.csv"
    )
    missing = [f"{folder}/{name}" for folder in tables for name in names if name not in tables[folder]]
    bad = [f"missing: {name}" for name in missing] or ([] if names else [f"no tables in {made}"])
    for name in () if bad else names:
        for metric, f in compare(read_csv(made / name), read_csv(committed / name)).items():
            print(
                f"{Path(name).stem:8s} {metric:24s} {f['equal']:4d} of {f['figures']:4d} equal, {f['outside']:3d} outside; "
                f"difference {f['mean']:.3g} in the mean, {f['greatest']:.3g} at most"
            )
            if f["outside"] > math.ceil(ALLOWED * f["figures"]):
                bad.append(f"{name}: {metric}, {f['outside']} of {f['figures']} figures are outside their tolerances")
    print("\n".join(bad) or "every table is within its tolerances")
    return int(bool(bad))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*map(Path, sys.argv[1:])))
