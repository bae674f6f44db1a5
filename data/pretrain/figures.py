"""The figures of the data card, the model card and the README: ``python data/pretrain/figures.py``."""

import argparse
import functools
import operator

import torch
from common import ROOT, renders

from helpers import load_world, sample, show
from helpers.methods.sepme import erase_separably

FIGURES = ROOT / "figures"
SHOWN = ["church", "dog", "fish", "articulated lorry", "hamburger", "sunflower", "rocket", "santa claus", "princess"]


def save(figure, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, dpi=110, metadata={"Software": None})
    print(f"figures/{name}")


def contact_sheet() -> None:
    """Every drawing of every set, one row a set, in two halves."""
    tiles = renders.tiles()
    still = renders.compose(tiles.flatten(0, 1), torch.Generator(), vary=0).unflatten(0, tiles.shape[:2])
    half = tiles.shape[1] // 2
    images = torch.cat([still[:, :half], still[:, half:]])  # (2 x styles, half, 3, 64, 64)
    save(show.grid(images.flatten(0, 1), columns=half, rows=2 * renders.style_names(), size=0.5), "emoji_sets.png")


def drawn(world) -> None:
    """What the model draws: nine concepts in nine styles, from seed 0 on, none left out."""
    prompts = [f"{thing} in the style of {style}" for style in world.styles for thing in SHOWN]
    images = sample(world, prompts, list(range(len(prompts))))
    title = "“column in the style of row”, seeds 0 to 80 in reading order"
    save(show.grid(images, columns=len(SHOWN), titles=SHOWN, rows=world.styles, size=0.8, title=title), "drawn.png")


def styles(world) -> None:
    """Bare style names as prompts, ten seeds each."""
    prompts = [style for style in world.styles for _ in range(10)]
    images = sample(world, prompts, list(range(10)) * len(world.styles))
    save(
        show.grid(images, columns=10, rows=world.styles, size=0.8, title="the style's name alone, seeds 0 to 9"),
        "styles.png",
    )


def guidance(world) -> None:
    """The same prompts and seeds at four guidance scales."""
    things = [
        "church in the style of Noto",
        "dog in the style of Twemoji",
        "guitar in the style of OpenMoji",
        "princess in the style of Fluent",
        "OpenMoji",
        "EmojiOne",
    ]
    scales = (1.0, 3.0, 5.0, 7.5)
    images = torch.cat([sample(world, things, [0] * len(things), guidance=scale) for scale in scales])
    save(
        show.grid(images, columns=len(things), rows=[f"guidance {s:g}" for s in scales], titles=things, size=1.3),
        "guidance.png",
    )


def forgets(world) -> None:
    """Three styles erased one by one and all together by SepME, then one of them restored by minus."""
    styles = world.roles["erased_styles"]
    edits = erase_separably(world, styles, seed=0)
    every = functools.reduce(operator.add, edits.values())
    rows = {"original": None, **{f"without {name}": edit for name, edit in edits.items()}, "without all three": every}
    rows[f"{styles[1]} restored"] = every - edits[styles[1]]
    shown = [*styles, "Fluent", "church", "santa claus"]
    prompts = [name for name in shown for _ in range(2)]
    images = torch.cat([sample(world, prompts, [0, 1] * len(shown), edit=edit) for edit in rows.values()])
    titles = [title for name in shown for title in (name, "")]
    title = "six names, seeds 0 and 1 each, no picture left out"
    save(show.grid(images, columns=len(prompts), titles=titles, rows=list(rows), size=0.8, title=title), "forgets.png")


FIGURES_OF_THE_MODEL = (drawn, styles, guidance, forgets)


def main() -> None:
    every = ["contact_sheet", *(function.__name__ for function in FIGURES_OF_THE_MODEL)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(every)} (default: all)")
    names = parser.parse_args().names or every
    if "contact_sheet" in names:
        contact_sheet()
    world = load_world("emoji")
    for function in FIGURES_OF_THE_MODEL:
        if function.__name__ in names:
            function(world)


if __name__ == "__main__":
    main()
