"""Tables as data: the papers' own figures, cell by cell, and what the papers say of them."""

import csv
from pathlib import Path

from helpers.renders import DATA

PAPERS = DATA / "papers"


def _rows(path: Path) -> list[dict]:
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
    return [{**row, "value": float(row["value"]) if row["value"] else None} for row in _rows(PAPERS / f"{name}.csv")]


def paper_claims(name: str) -> list[dict]:
    """What the paper says of one table, and whether its own figures carry it: rows of ``data/papers/claims.csv``."""
    paper_table(name)  # an unknown table raises
    return [row for row in _rows(PAPERS / "claims.csv") if row["table"] == name]
