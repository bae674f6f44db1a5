"""Draw the nine emoji sets of the emoji world: SVG from npm packages -> one sprite sheet (PNG, RGBA) a set.

    python data/build_emoji.py            # needs npm and `pip install -e .[data]`; nobody needs it to use the kit

The packages and the renderer are pinned, tiles are drawn in the order of ``concepts.toml``, and PNGs are written
without metadata: the same bytes come out every time (``tests/test_data.py`` compares digests).
"""

import hashlib
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
}


def fetch(folder: Path) -> Path:
    """Install the pinned packages into ``folder`` with npm and return the folder that holds them."""
    wanted = [f"@iconify-json/{name}@{version}" for name, version in PACKAGES.items()]
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *wanted]
    subprocess.run(command, check=True)
    return folder / "node_modules" / "@iconify-json"


def svg_of(icons: dict, name: str) -> str:
    """The SVG of ``name``, following aliases; an alias that also turns or mirrors the drawing is refused."""
    while name not in icons["icons"]:
        if name not in icons.get("aliases", {}):
            raise KeyError(f"{icons['prefix']} holds no icon {name!r}: choose one that all nine sets hold")
        alias = icons["aliases"][name]
        if {"rotate", "hFlip", "vFlip"} & set(alias):
            raise ValueError(f"{icons['prefix']}:{name} is an alias with a transform, which the builder does not draw")
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"].replace("currentColor", "#222")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{TILE}" height="{TILE}">{body}</svg>'
    )


def draw(svg: str) -> Image.Image:
    """Render at four times the size and reduce with Lanczos: cleaner edges than drawing at 64 pixels directly."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * TILE, height=4 * TILE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((TILE, TILE), Image.LANCZOS)


def sheet(icons: dict, names: list[str]) -> Image.Image:
    """One set's sprite sheet, ``COLUMNS`` tiles a row, in the order of ``names``."""
    rows = -(-len(names) // COLUMNS)
    out = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    for i, name in enumerate(names):
        out.paste(draw(svg_of(icons, name)), (i % COLUMNS * TILE, i // COLUMNS * TILE))
    return out


def main(target: Path = DATA / "emoji") -> None:
    concepts = tomllib.loads((DATA / "concepts.toml").read_text())
    rows = [(icon, name, category, more) for category, entries in concepts["categories"].items()
            for icon, name, *more in entries]  # fmt: skip
    target.mkdir(exist_ok=True, parents=True)
    table = ["index,name,icon,category,synonyms"]
    table += [f"{i},{name},{icon},{category},{'|'.join(more)}" for i, (icon, name, category, more) in enumerate(rows)]
    (target / "objects.csv").write_text("\n".join(table) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        packages = fetch(Path(folder))
        for style in concepts["styles"]:
            icons = json.loads((packages / style["set"] / "icons.json").read_text())
            path = target / f"{style['set']}.png"
            sheet(icons, [icon for icon, *_ in rows]).save(path, optimize=True)
            print(
                f"{path.name:36s} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}  {path.stat().st_size:7d} bytes"
            )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
