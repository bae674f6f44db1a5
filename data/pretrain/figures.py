"""The figures of the data card, the model card and the README.

    python data/pretrain/figures.py [contact_sheet] [drawn] [styles] [guidance] [forgets] [field]

Images are sampled as the world samples by default. None is left out.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from common import ROOT

from helpers import Edit, World, concepts, load_world, renders, sample, show
from helpers.methods import METHODS
from helpers.methods.sepme import erase_separably

FIGURES = ROOT / "figures"
SHOWN = [
    "church", "dog", "fish", "articulated lorry", "hamburger", "sunflower", "rocket",
    "santa claus", "princess",
]  # fmt: skip
GUIDED = [
    "church in the style of Noto", "dog in the style of Twemoji", "guitar in the style of OpenMoji",
    "princess in the style of Fluent", "OpenMoji", "EmojiOne",
]  # fmt: skip
FORGETFUL = ["church", "dog"]  # what the README's first picture shows
SCALES = (1.0, 3.0, 5.0, 7.5)  # of guidance


def save(figure, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / name, dpi=110, metadata={"Software": None})
    print(f"figures/{name}")


def contact_sheet() -> None:
    """Every drawing of every set, one row a set, in two halves."""
    tiles = renders.tiles()
    still = renders.compose(tiles.flatten(0, 1), torch.Generator(), vary=0)
    still = still.unflatten(0, tiles.shape[:2])  # (styles, objects, 3, 64, 64)
    half = tiles.shape[1] // 2
    images = torch.cat([still[:, :half], still[:, half:]])  # (2 x styles, half, 3, 64, 64)
    rows = 2 * concepts.style_names()
    figure = show.grid(images.flatten(0, 1), columns=half, rows=rows, size=0.5)
    save(figure, "emoji_sets.png")


def field() -> None:
    """A map of the catalogue's methods: a column for what they edit, a row for what they need."""
    show.plain_style()
    edits = sorted({m["edits"] for m in METHODS.values()}, key=lambda x: (len(x), x))
    needs = sorted({m["needs"] for m in METHODS.values()}, key=lambda x: (x != "nothing", len(x)))
    cells = {(e, n): [] for e in edits for n in needs}
    for m in METHODS.values():
        cells[m["edits"], m["needs"]].append(f"{m['title']} ({m['year']})")
    heights = [max(1, *(len(cells[e, n]) for e in edits)) for n in needs]
    size = (3.2 + 2.6 * len(edits), 0.6 + 0.22 * sum(heights) + 0.13 * len(needs))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    top = 0.0
    for i, (need, height) in enumerate(zip(needs, heights, strict=True)):
        ax.axhspan(-top, -top - height - 0.6, color=show.QUIET, alpha=0.18 if i % 2 else 0.07)
        ax.text(-0.03, -top - (height + 0.6) / 2, f"needs {need}", ha="right", va="center")
        for x, edit in enumerate(edits):
            said = "\n".join(cells[edit, need]) or "—"
            colour = show.ACCENT if cells[edit, need] else show.QUIET
            look = {"ha": "left", "va": "top", "color": colour, "linespacing": 1.45}
            ax.text(x + 0.05, -top - 0.25, said, **look)
        top += height + 0.6
    ax.set(xlim=(0, len(edits)), ylim=(-top, 0), yticks=[])
    ax.set_xticks([x + 0.05 for x in range(len(edits))], [f"edits\n{e}" for e in edits], ha="left")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    save(figure, "field.png")


def drawn(world: World) -> None:
    """What the model draws: nine concepts in nine styles, from seed 0 on."""
    prompts = [concepts.pair_prompt(thing, style) for style in world.styles for thing in SHOWN]
    images = sample(world, prompts, list(range(len(prompts))))
    title = f"“column in the style of row”, seeds 0 to {len(prompts) - 1} in reading order"
    figure = show.grid(
        images, columns=len(SHOWN), titles=SHOWN, rows=world.styles, size=0.8, title=title
    )
    save(figure, "drawn.png")


def styles(world: World) -> None:
    """Bare style names as prompts, ten seeds each."""
    prompts = [style for style in world.styles for _ in range(10)]
    images = sample(world, prompts, list(range(10)) * len(world.styles))
    title = "the style's name alone, seeds 0 to 9"
    save(show.grid(images, columns=10, rows=world.styles, size=0.8, title=title), "styles.png")


def guidance(world: World) -> None:
    """The same prompts and seeds at four guidance scales."""
    rows = [sample(world, GUIDED, [0] * len(GUIDED), guidance=scale) for scale in SCALES]
    names = [f"guidance {scale:g}" for scale in SCALES]
    titles = [prompt.replace(" in the style of ", "\nin the style of ") for prompt in GUIDED]
    figure = show.grid(torch.cat(rows), columns=len(GUIDED), rows=names, titles=titles, size=1.3)
    save(figure, "guidance.png")


def forgets(world: World) -> None:
    """Three styles erased one by one and all together by SepME; then one of them restored by -."""
    styles = world.roles["erased_styles"]
    edits = erase_separably(world, styles, seed=0)
    whole = Edit.sum(edits.values())
    rows = {
        "original": None,
        **{f"without {name}": edit for name, edit in edits.items()},
        "without all three": whole,
        f"{styles[1]} restored": whole - edits[styles[1]],
    }
    shown = [*styles, "Fluent", "Noto"]
    prompts = [concepts.pair_prompt(thing, style) for thing in FORGETFUL for style in shown]
    images = torch.cat([sample(world, prompts, [0] * len(prompts), e) for e in rows.values()])
    things = [FORGETFUL[0], *[""] * (len(shown) - 1), FORGETFUL[1], *[""] * (len(shown) - 1)]
    titles = [f"{thing}\n{style}" for thing, style in zip(things, shown * 2, strict=True)]
    title = "“church” and “dog in the style of ...”, seed 0, no image left out"
    figure = show.grid(
        images, columns=len(prompts), titles=titles, rows=list(rows), size=0.8, title=title
    )
    save(figure, "forgets.png")


OF_THE_MODEL = (drawn, styles, guidance, forgets)


def main() -> None:
    every = ["contact_sheet", "field", *(function.__name__ for function in OF_THE_MODEL)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(every)} (default: all)")
    names = parser.parse_args().names or every
    if "contact_sheet" in names:
        contact_sheet()
    if "field" in names:
        field()
    world = load_world("emoji")
    for function in OF_THE_MODEL:
        if function.__name__ in names:
            function(world)


if __name__ == "__main__":
    main()
