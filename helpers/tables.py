"""Tables as data: the papers' own figures, cell by cell, what the papers say of them, and ours beside them."""

import csv
import statistics
from pathlib import Path

from helpers.files import complete
from helpers.renders import DATA
from helpers.worlds import World

PAPERS = DATA / "papers"
RESULTS = DATA / "results"
NAMES = ("method", "setting", "erased", "evaluated", "metric")  # what names a figure of a table


def stamp(world: World) -> dict[str, str]:
    """The columns of a result that say what it was made with: fingerprints of the base model and of the judge."""
    return {"weights": world.fingerprint(), "judge": world.judge.fingerprint()}


def write_csv(path: str | Path, rows: list[dict], columns: list[str] | None = None) -> None:
    """Rows under their columns (default: the first row's), numbers with six digits; renamed when whole."""
    with complete(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def saved_rows(path: str | Path, world: World) -> list[dict]:
    """Rows of a saved result, numbers as floats; none if the file is missing or was made with other weights or judge.

    The file has the columns of ``stamp``.
    """

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    made_with = stamp(world)
    rows = read_csv(path) if Path(path).exists() else []
    if any(row.get(name) != mark for row in rows for name, mark in made_with.items()):
        return []
    return [{k: v if k in made_with else value(v) for k, v in row.items()} for row in rows]


def read_csv(path: str | Path) -> list[dict]:
    """Rows of a CSV file, all text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_table(name: str) -> list[dict]:
    """The cells of one printed table in the order of print: the rows of ``data/papers/NAME.csv``, whose README has the columns.

    value is a float, or None where the paper prints no figure; every other column is text. ValueError names the tables
    for an unknown name. Example: paper_table("sepme-6")[0]["setting"] is "tau=1e-3".
    """
    names = sorted(path.stem for path in PAPERS.glob("*-[0-9].csv"))
    if name not in names:
        raise ValueError(f"unknown table {name!r}: choose from {', '.join(names)}")
    return [{**row, "value": float(row["value"]) if row["value"] else None} for row in read_csv(PAPERS / f"{name}.csv")]


def closes(row: dict) -> bool:
    """Whether a figure of a table is a sum or an average of its other figures."""
    return row["evaluated"] == "erased - kept" or (row["erased"] == "average" and row["metric"] != "weight change")


def paper_claims(name: str) -> list[dict]:
    """What the paper says of one table, and whether its own figures carry it: rows of ``data/papers/claims.csv``."""
    paper_table(name)  # an unknown table raises
    return [row for row in read_csv(PAPERS / "claims.csv") if row["table"] == name]


def our_table(name: str, folder: str | Path = RESULTS) -> dict[tuple, dict]:
    """Our counterpart of one printed table: (method, setting, erased, evaluated, metric) -> figures over training seeds.

    values: one for each seed; mean; spread: their standard deviation (0 for one seed); n: pictures behind each value;
    base: the unedited model's figure. Names are the paper's; ``data/results/README.md`` says what stands for them.
    FileNotFoundError with the remedy when the table was not made yet.
    """
    path = Path(folder) / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is not in {str(folder)!r}: run `make tables` (`make tables SCALE=small` for that scale's folder)"
        )
    found: dict[tuple, dict] = {}
    for row in read_csv(path):
        entry = found.setdefault(tuple(row[key] for key in NAMES), {"values": []})
        entry["values"].append(float(row["value"]))
        entry |= {"n": int(row["n"]) if row["n"] else None, "base": float(row["base"])}
    for entry in found.values():
        entry["mean"] = statistics.fmean(entry["values"])
        entry["spread"] = statistics.stdev(entry["values"]) if len(entry["values"]) > 1 else 0.0
    return found


def beside(name: str, folder: str | Path = RESULTS) -> list[dict]:
    """The rows of ``paper_table`` with ours: "ours" (a mean over training seeds), "difference", and ``our_table``'s columns.

    difference: ours minus the paper's, None where it prints none. Rows keep the order of print.
    """
    ours, rows = our_table(name, folder), []
    for row in paper_table(name):
        found = ours[tuple(row[key] for key in NAMES)]
        difference = None if row["value"] is None else found["mean"] - row["value"]
        rows.append({**row, **found, "ours": found["mean"], "difference": difference})
    return rows
