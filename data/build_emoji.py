"""Render the emoji world's nine emoji sets: SVG from npm packages -> one sprite sheet (PNG) a set.

    python data/build_emoji.py
    python data/build_emoji.py --others build/pretrain/others

The second command renders what the judges are taught to call "something else": the icons that
``others.csv`` lists for training, of the nine sets and of one that the world does not know. The
first also writes the sheets of those that are held out, which the tests need.
It needs npm and `pip install -e .[data]`; nobody needs it to use the kit. The packages and the
renderer are pinned, tiles are rendered in the order of ``concepts.toml``, and PNGs are written
without metadata. So the same bytes come out every time (``tests/test_data.py`` compares digests).
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import resvg_py
from PIL import Image

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from helpers.identity import file_digest  # noqa: E402

TILE, COLUMNS = 64, 10
PACKAGES = {  # npm package @iconify-json/<set> -> pinned version
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-high-contrast": "1.2.6",
    "emojione": "1.2.3",
    "emojione-v1": "1.2.3",
    "emojione-monotone": "1.2.1",
    "fxemoji": "1.2.2",  # two sets that the world does not know: one for training the judges,
    "streamline-emojis": "1.2.4",  # one for testing them
}


def fetch(folder: Path) -> Path:
    """Install the pinned packages into ``folder`` with npm; returns the folder that holds them."""
    wanted = [f"@iconify-json/{name}@{version}" for name, version in PACKAGES.items()]
    options = ["--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run(["npm", "install", *options, *wanted], check=True)
    return folder / "node_modules" / "@iconify-json"


def svg_of(icons: dict, name: str) -> str:
    """The SVG of ``name``, following aliases.

    KeyError for a name that the set lacks; ValueError for an alias that also turns or mirrors the
    drawing.
    """
    prefix = icons["prefix"]
    while name not in icons["icons"]:
        if name not in icons.get("aliases", {}):
            raise KeyError(f"{prefix} holds no icon {name!r}: choose one that all nine sets hold")
        alias = icons["aliases"][name]
        if {"rotate", "hFlip", "vFlip"} & set(alias):
            raise ValueError(f"{prefix}:{name} is an alias with a transform: choose another icon")
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"].replace("currentColor", "#222")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{TILE}" height="{TILE}">{body}</svg>'
    )


def render(svg: str) -> Image.Image:
    """One tile, rendered at four times the size and reduced with Lanczos: the edges are cleaner."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * TILE, height=4 * TILE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((TILE, TILE), Image.LANCZOS)


def sheet(icons: dict, names: list[str]) -> Image.Image:
    """One set's sprite sheet, ``COLUMNS`` tiles a row, in the order of ``names``."""
    rows = -(-len(names) // COLUMNS)
    out = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for i, name in enumerate(names):
        out.paste(render(svg_of(icons, name)), (i % COLUMNS * TILE, i // COLUMNS * TILE))
    return out


def write_table(categories: dict, path: Path) -> list[str]:
    """Write objects.csv (index, name, icon, category, synonyms); returns the icons in its order."""
    rows = [
        (icon, name, category, "|".join(synonyms))
        for category, entries in categories.items()
        for icon, name, *synonyms in entries
    ]
    lines = ["index,name,icon,category,synonyms"]
    lines += [
        f"{i},{name},{icon},{category},{synonyms}"
        for i, (icon, name, category, synonyms) in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return [icon for icon, *_ in rows]


def other_icons(use: str, styles: list[dict]) -> dict[str, list[str]]:
    """The icons of ``others.csv`` for "training" or "held out": set -> names, in its order."""
    chosen: dict[str, list[str]] = {}
    with open(DATA / "emoji" / "others.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["use"] == use:
                known = [style["set"] for style in styles]
                for name in known if row["sets"] == "nine" else [row["sets"]]:
                    chosen.setdefault(name, []).append(row["icon"])
    return chosen


def write(packages: Path, chosen: dict[str, list[str]], target: Path, ending: str) -> None:
    """One sheet a set, without loss, and its digest on the screen."""
    target.mkdir(exist_ok=True, parents=True)
    how = {"png": {"optimize": True}, "webp": {"lossless": True, "quality": 100, "method": 6}}
    for name, icons in chosen.items():
        drawn = json.loads((packages / name / "icons.json").read_text())
        path = target / f"{name}.{ending}"
        sheet(drawn, icons).save(path, **how[ending])
        digest = file_digest(path)[:16]
        print(f"{path.name:36s} {digest}  {path.stat().st_size:7d} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, nargs="?", default=DATA / "emoji")
    parser.add_argument("--others", type=Path, help="only what the judges are trained on, here")
    args = parser.parse_args()
    concepts = tomllib.loads((DATA / "concepts.toml").read_text())
    styles = concepts["styles"]
    with tempfile.TemporaryDirectory() as folder:
        packages = fetch(Path(folder))
        if args.others:
            write(packages, other_icons("training", styles), args.others, "webp")
            return
        args.target.mkdir(exist_ok=True, parents=True)
        names = write_table(concepts["categories"], args.target / "objects.csv")
        write(packages, {style["set"]: names for style in styles}, args.target, "png")
        held_out = other_icons("held out", styles)
        write(packages, held_out, args.target / "others", "webp")


if __name__ == "__main__":
    main()
