"""Tables as data: the papers' own cells, what the papers claim of them, and our rows beside them.

A table of ours is a CSV file of ``Row``; pandas reads and groups it.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from helpers.concepts import DATA
from helpers.files import complete, require_file, shown
from helpers.options import File, check_options, in_words, near, typed
from helpers.worlds import World

PAPERS = DATA / "papers"
RESULTS = DATA / "results"
NAMES = ["method", "setting", "erased", "evaluated", "metric"]  # what names a cell of a table
MARKS = ["base_model", "judge"]  # what a value was made with
OLD_MARKS = {"weights": "base_model"}  # what older results call it


@dataclass(frozen=True)
class Row:
    """One value of ours: the one schema of every table, whoever made it."""

    method: str
    setting: str  # "tau=1e-3", a variant, a set of losses; "" where there is none
    erased: str  # concepts, joined by "+"
    evaluated: str  # a concept, or a group of them: "erased", "retained", "neighbour", "Others"
    metric: str
    seed: int  # of training
    value: float
    n: int | None = None  # images behind it
    low: float | None = None  # 95 % interval over these images
    high: float | None = None
    base: float | None = None  # the same value of the base model
    M: int | None = None  # parameter tensors touched, for a weight change
    base_model: str = ""  # fingerprint of the base's UNet
    judge: str = ""  # fingerprint of the judge

    def __post_init__(self):
        check_options(self)


COLUMNS = [f.name for f in dataclasses.fields(Row)]


@typed
def provenance(world: World) -> dict[str, str]:
    """The columns of a row that say what it was made with: base model and judge."""
    return {"base_model": world.fingerprint(), "judge": world.judge.fingerprint()}


@typed
def write_csv(path: File, rows: Iterable, columns: list[str] | None = None) -> None:
    """Rows (``Row`` or dicts) as CSV, numbers with six digits; renamed when whole.

    columns: which, in order (default those of the first row). None and NaN are empty.
    IsADirectoryError for a folder, ValueError for no row or a value without a column.
    """
    dicts = [as_dict(row) for row in rows]
    if not dicts and columns is None:
        raise ValueError("rows is empty: give a row, or the columns of a table without any")
    columns = columns or list(dicts[0])
    for name in dict.fromkeys(name for row in dicts for name in row if name not in columns):
        raise ValueError(f"rows have {name!r}, and columns has not: give {', '.join(columns)} only")
    with complete(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: as_text(value) for name, value in row.items()} for row in dicts)


def as_dict(row) -> dict:
    """A row as a dict. ValueError for what is neither a dataclass nor a mapping."""
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        return dataclasses.asdict(row)
    if not isinstance(row, Mapping):
        raise ValueError(f"one of the rows is {in_words(row)}: give a Row or a dict")
    return dict(row)


def as_text(value) -> str:
    """One value of a CSV file: a number with six digits, "" for what is not there."""
    if value is None or value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@typed
def read_csv(path: File, text: Iterable[str] = ()) -> pd.DataFrame:
    """A CSV file as a frame: numbers where a column holds nothing else, "" for empty text.

    text: columns that are text, whatever they hold. FileNotFoundError, or ValueError names a file
    that is no whole table, and the remedy.
    """
    known = dict.fromkeys([*NAMES, *MARKS, *OLD_MARKS, *text], str)
    whole = io.StringIO(table_text(path))
    frame = pd.read_csv(whole, dtype=known, keep_default_na=False, na_values=[""])
    numbers = frame.select_dtypes("number")  # pandas 2 and 3 name their types of text otherwise
    texts = [name for name in frame if name in known or name not in numbers]
    return frame.fillna(dict.fromkeys(texts, ""))


def table_text(path: str | Path) -> str:
    """A CSV file's text. ValueError if a line was cut or has other fields than the first one."""
    remedy = "make it again, or take it back (`git checkout -- data/results`)"
    data = require_file(path, "table", remedy).read_bytes()
    try:
        text = data.decode()
        lines = list(csv.reader(io.StringIO(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{shown(path)} is no table of text ({error}): {remedy}") from error
    if not lines or not lines[0]:
        raise ValueError(f"{shown(path)} is empty: {remedy}")
    if len(set(lines[0])) < len(lines[0]) or "\0" in text:
        raise ValueError(f"{shown(path)} is no table (its first line is {lines[0]}): {remedy}")
    for i, line in enumerate(lines):
        if len(line) != len(lines[0]):
            raise ValueError(
                f"{shown(path)} has {len(line)} fields in line {i + 1} and {len(lines[0])} in the "
                f"first (cut short?): {remedy}"
            )
    if not text.endswith("\n"):
        raise ValueError(f"{shown(path)} ends within a line (cut short?): {remedy}")
    return text


def require_columns(frame: pd.DataFrame, path: str | Path, columns: Iterable[str]) -> None:
    """ValueError names the file of a table that lacks a column, or has text for values."""
    lacking = [name for name in columns if name not in frame]
    if lacking:
        raise ValueError(
            f"{shown(path)} has no column {', '.join(lacking)}: it is no table of results"
        )
    if len(frame) and not pd.api.types.is_numeric_dtype(frame["value"]):
        raise ValueError(f"{shown(path)} has values that are no numbers: make it again")


@typed
def load_result(path: File, world: World) -> pd.DataFrame:
    """A saved result of these very weights; an empty frame if there is none.

    Another judge may have counted it: show ``caution`` beside it.
    """
    if not Path(path).exists():
        return pd.DataFrame()
    frame = read_csv(path).rename(columns=OLD_MARKS)
    known = set(MARKS) <= set(frame) and (frame["base_model"] == world.fingerprint()).all()
    return frame if known else pd.DataFrame()


@typed
def caution(frame: pd.DataFrame, world: World) -> str:
    """What must stand beside a result that another judge than the world's counted; "" if none."""
    others = sorted(set(frame.get("judge", ())) - {world.judge.fingerprint()})
    if not others:
        return ""
    return (
        f"Counted by an earlier judge ({', '.join(others)}). It called drawings on grey, dark or "
        "strongly coloured grounds blank, and it had no class for something else. Its shares may "
        f"differ from those of the judge of today ({world.judge.fingerprint()})."
    )


@typed
def paper_table(name: str) -> pd.DataFrame:
    """The cells of one printed table in the order of print: ``data/papers/NAME.csv``.

    value is a number, NaN where the paper prints none; every other column is text (its README has
    the columns). ValueError names the tables for an unknown name.
    Example: paper_table("sepme-6").setting[0] is "tau=1e-3".
    """
    names = sorted(path.stem for path in PAPERS.glob("*-[0-9].csv"))
    if name not in names:
        hint = near(name, names)
        raise ValueError(f"unknown table {name!r}{hint}: choose from {', '.join(names)}")
    frame = pd.read_csv(PAPERS / f"{name}.csv", dtype=str, keep_default_na=False)
    return frame.assign(value=pd.to_numeric(frame["value"]))


def is_aggregate(cells):
    """Whether a cell of a table is a sum or an average of its other cells.

    cells: a frame (a bool for each row), or one row of it (a bool). ValueError for anything else.
    """
    if not hasattr(cells, "__getitem__") or not {*NAMES[2:]} <= {*getattr(cells, "keys", list)()}:
        raise ValueError(f"cells is {in_words(cells)}: give cells with {', '.join(NAMES[2:])}")
    average = (cells["erased"] == "average") & (cells["metric"] != "weight change")
    return (cells["evaluated"] == "erased - kept") | average


@typed
def paper_claims(name: str) -> pd.DataFrame:
    """What the paper says of one table, and whether its own values carry it: ``claims.csv``."""
    paper_table(name)  # an unknown table raises
    frame = pd.read_csv(PAPERS / "claims.csv", dtype=str, keep_default_na=False)
    return frame[frame["table"] == name].reset_index(drop=True)


@typed
def load_ours(name: str, folder: File = RESULTS) -> pd.DataFrame:
    """Our counterpart of one printed table, a row for each cell (``NAMES``), over training seeds.

    values: a list, one for each seed; ours: their mean; spread: their standard deviation (0 for
    one); n: images behind each value; base: the base model's. Names are the paper's;
    ``data/results/README.md`` says what stands for them. FileNotFoundError with the remedy when the
    table was not made yet.
    """
    if Path(name).name != name:
        raise ValueError(f"name is {name!r}: give the name of a table, and its folder as folder=")
    path = Path(folder) / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is not in {str(folder)!r}: run `make tables` "
            "(`make tables SCALE=small` for that scale's folder)"
        )
    frame = read_csv(path)
    require_columns(frame, path, [*NAMES, "value", "n", "base"])
    groups = frame.groupby(NAMES, sort=False)
    found = groups.agg(
        values=("value", list), ours=("value", "mean"), spread=("value", "std"),
        n=("n", "last"), base=("base", "last"),
    )  # fmt: skip
    return found.fillna({"spread": 0.0}).reset_index()


@typed
def compare_with_paper(name: str, folder: File = RESULTS) -> pd.DataFrame:
    """``paper_table`` with ``load_ours`` beside it, and ours minus the paper's as "difference".

    Rows keep the order of print; the difference is NaN where the paper prints none.
    """
    both = paper_table(name).merge(load_ours(name, folder), on=NAMES, how="left", validate="m:1")
    return both.assign(difference=both["ours"] - both["value"])
