"""What ``data/concepts.toml`` says: names of concepts, their kinds, and their captions."""

import csv
import tomllib
from functools import cache
from pathlib import Path

from helpers.identity import verify_manifest
from helpers.options import check_template

DATA = Path(__file__).resolve().parent.parent / "data"


@cache
def concepts() -> dict:
    """``data/concepts.toml`` as a dict: styles, categories, roles, captions."""
    return tomllib.loads((DATA / "concepts.toml").read_text())


@cache
def object_table() -> list[dict]:
    """Rows of ``data/emoji/objects.csv``: index, name, icon, category, synonyms (a list).

    ValueError for a file that is not the one that was committed.
    """
    verify_manifest(DATA / "emoji", ["objects.csv"])
    with open(DATA / "emoji" / "objects.csv", newline="") as file:
        return [
            {**row, "synonyms": [s for s in row["synonyms"].split("|") if s]}
            for row in csv.DictReader(file)
        ]


def style_names() -> list[str]:
    """Names of the emoji world's nine styles."""
    return [style["name"] for style in concepts()["styles"]]


def object_names(*, people: bool | None = None) -> list[str]:
    """Names of objects and people in the table's order; ``people`` True or False: only those."""
    rows = object_table()
    return [r["name"] for r in rows if people is None or (r["category"] == "person") == people]


def filled(template: str, concept: str, *, whole: bool = False) -> str:
    """A template with the concept's name wherever {c} stands; the name may hold any letters.

    ValueError for a template that ``check_template`` refuses; whole: as there.
    """
    return check_template(template, whole=whole).replace("{c}", concept)


def pair_prompt(thing: str, style: str) -> str:
    """The prompt for an object or person in a style: "church in the style of Twemoji"."""
    return concepts()["captions"]["both"][0].format(o=thing, s=style)


# captions of training images by kind: the bare name, and the phrases that people use
TEMPLATES = {kind: tuple(forms) for kind, forms in concepts()["training_captions"].items()}
BARE = dict.fromkeys(TEMPLATES, ("{c}",))  # for the papers that train on the name alone
