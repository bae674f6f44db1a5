"""A drawing of the whole machine, and of what a method touches in it."""

from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from helpers.options import typed
from helpers.show import ACCENT, INK, QUIET, plain_style

CHANGED, READ = "#9cc3e8", "#f7c88b"  # the fill of what is trained, and of what a loss looks at


@dataclass(frozen=True)
class Part:
    """A box of the drawing: its label, its left lower corner and its size, in inches."""

    label: str
    x: float
    y: float
    width: float = 0.95
    height: float = 0.5


PARTS = {
    "prompt": Part('"church"', 0.1, 2.5, 0.85),
    "text encoder": Part("text\nencoder", 1.35, 2.5),
    "latent": Part("$x_t$", 0.1, 0.5, 0.85),
    "convolutions": Part("convolu-\ntions", 2.85, 0.5, 0.95),
    "self-attention": Part("self-\nattention", 4.2, 0.5, 0.9),
    "queries": Part("$W_q$", 5.75, 0.5, 0.6),
    "keys": Part("$W_k$", 5.75, 1.5, 0.6),
    "values": Part("$W_v$", 5.75, 2.5, 0.6),
    "attention": Part("attention\nmaps $A$", 6.75, 1.0, 0.95),
    "output": Part("$W_o$", 7.2, 2.5, 0.6),
    "prediction": Part(r"$\epsilon$", 8.6, 0.5, 0.6),
    "sampler": Part("sampler", 9.6, 0.5),
    "decoder": Part("decoder", 9.6, 1.5),
    "picture": Part("picture", 9.6, 2.5),
}
GROUPS = {"cross-attention": ("queries", "keys", "values", "output")}
GROUPS["U-Net"] = (*GROUPS["cross-attention"], "convolutions", "self-attention")
NAMES = (*PARTS, *GROUPS)
ARROWS = (  # from and to, each a point in inches
    ((0.95, 2.75), (1.35, 2.75)), ((2.3, 2.75), (5.75, 2.75)), ((5.35, 2.75), (5.75, 1.75)),
    ((0.95, 0.75), (2.85, 0.75)), ((3.8, 0.75), (4.2, 0.75)), ((5.1, 0.75), (5.75, 0.75)),
    ((6.35, 0.75), (6.75, 1.15)), ((6.35, 1.75), (6.75, 1.35)), ((6.35, 2.75), (7.2, 2.75)),
    ((7.3, 1.5), (7.45, 2.5)), ((7.8, 2.65), (8.6, 0.85)), ((9.2, 0.75), (9.6, 0.75)),
    ((10.08, 1.0), (10.08, 1.5)), ((10.08, 2.0), (10.08, 2.5)),
)  # fmt: skip


def expanded(names: Iterable[str], argument: str) -> set[str]:
    """Parts of these names, groups replaced by theirs. ValueError for a name that is neither."""
    found = set()
    for name in names:
        if name not in NAMES:
            raise ValueError(f"{argument} names {name!r}: choose from {', '.join(NAMES)}")
        found.update(GROUPS.get(name, (name,)))
    return found


def box(ax: Axes, place: tuple[float, float], size: tuple[float, float], **look) -> None:
    """A rounded box with its left lower corner at a place, in inches."""
    ax.add_patch(FancyBboxPatch(place, *size, "round,pad=0,rounding_size=0.1", **look))


def draw_connections(ax: Axes) -> None:
    """The frames of the U-Net and of one cross-attention, the arrows, and the sampler's loop."""
    quiet = {"fontsize": 8, "color": QUIET}
    box(ax, (2.6, 0.15), (5.75, 3.15), fill=False, edgecolor=QUIET)
    box(ax, (5.5, 0.3), (2.6, 2.75), fill=False, edgecolor=QUIET)
    ax.text(2.7, 3.2, "U-Net: many such blocks", va="top", **quiet)
    ax.text(6.8, 0.36, "cross-attention", ha="center", **quiet)
    arrow = {"arrowstyle": "->", "color": INK, "lw": 0.8}
    for start, end in ARROWS:
        ax.annotate("", end, start, arrowprops=arrow)
    loop = {**arrow, "connectionstyle": "bar,fraction=-0.03"}
    ax.annotate("", (0.5, 0.48), (10.08, 0.48), arrowprops=loop)
    labels = ((3.6, 2.83, "text states $C$"), (5.18, 0.83, "$h$"))
    for x, y, label in (*labels, (5.0, -0.08, "$x_{t-1}$, the next step")):
        ax.text(x, y, label, fontsize=8, color=INK)


@typed
def schematic(changed: Iterable[str] = (), read: Iterable[str] = ()) -> Figure:
    """Text encoder, U-Net with one cross-attention, sampler and decoder, as they follow each other.

    changed: parts that a method trains or replaces (blue); read: parts that its loss looks at
    (orange). Names: the keys of PARTS, or "cross-attention" and "U-Net" for several at once.
    ValueError for another name.
    """
    plain_style()
    fills = dict.fromkeys(expanded(read, "read"), READ)
    fills |= dict.fromkeys(expanded(changed, "changed"), CHANGED)
    figure = plt.figure(figsize=(8.6, 2.75))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 10.7), ylim=(-0.1, 3.4), aspect="equal")
    ax.axis("off")
    draw_connections(ax)
    for name, part in PARTS.items():
        look = {"facecolor": fills.get(name, "white"), "edgecolor": ACCENT}
        if name not in fills:
            look["edgecolor"] = QUIET
        box(ax, (part.x, part.y), (part.width, part.height), **look)
        middle = part.x + part.width / 2, part.y + part.height / 2
        ax.text(*middle, part.label, ha="center", va="center", fontsize=8.5, linespacing=0.95)
    shown = [(CHANGED, "changed")] * bool(changed) + [(READ, "looked at")] * bool(read)
    for k, (colour, label) in enumerate(shown):
        look = {"facecolor": colour, "edgecolor": QUIET, "boxstyle": "round,pad=0.3"}
        ax.text(0.2, 1.95 - 0.4 * k, label, fontsize=8, bbox=look)
    plt.close(figure)
    return figure
