"""Figures: plain functions that return a Matplotlib figure; and a table."""

from collections.abc import Iterable

import matplotlib
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from helpers.options import NOT_EMPTY, Count, Dims, Positive, Rule, typed
from helpers.reader import checked_images

IMAGE = Rule("(3, H, W)", lambda image: image.ndim == 3 and len(image) == 3)
IMAGES = Rule("(n, 3, H, W)", lambda x: x.ndim == 4 and x.shape[1] == 3 and 0 not in x.shape)
NOT_HERE = "Not with these settings"  # how a finding begins that does not hold
INK, ACCENT, QUIET = "#1f2933", "#2f6fb0", "#9aa5b1"
SQUARES = Rule(
    "(side, side) each, all of one size",
    lambda maps: len({m.shape for m in maps}) == 1 and maps[0].ndim == 2 and maps[0].numel() > 0,
)
COLOURS = (QUIET, ACCENT, "#d98032", "#15803d", "#9cc3e8", "#c2410c")  # one for each row compared


def plain_style() -> None:
    """One look for every figure: small, quiet axes, and a resolution that keeps notebooks light."""
    matplotlib.rcParams.update({
        "figure.dpi": 90, "savefig.dpi": 90, "font.size": 10, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "axes.edgecolor": QUIET, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "text.color": INK,
        "image.interpolation": "nearest",
    })  # fmt: skip


@typed(image=IMAGE)
def pixels(image: Tensor):
    """An image (3, H, W) as Matplotlib takes it: an array (H, W, 3), clamped to [0, 1]."""
    return image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()


@typed(images=IMAGES)
def grid(
    images: Tensor, *, columns: Count | None = None, titles: list[str] | None = None,
    rows: list[str] | None = None, size: Positive = 1.0, title: str | None = None,
) -> Figure:  # fmt: skip
    """Images in a grid, read row by row.

    images (n, 3, H, W) in [0, 1]. columns: images in a row (default all of them, at most 10).
    titles: one above each image of the first row, or one above every image if there are n.
    rows: one label to the left of each row. size: inches along one side of an image. Noise beyond
    [0, 1] is clamped; ValueError for too few labels, or what is no image.
    """
    plain_style()
    checked_images(images, noisy=True)
    columns = columns or min(len(images), 10)
    count = -(-len(images) // columns)
    if rows and len(rows) < count:
        raise ValueError(f"rows has {len(rows)} labels: give {count}, one for each row of images")
    lines = [line for label in rows or [] for line in label.split("\n")]
    label = 0.15 + 0.075 * max(map(len, lines), default=0)  # inches to the left of the images
    above = max((t.count("\n") + 1 for t in titles or []), default=0)  # lines of the titles
    head = 0.08 + 0.2 * bool(above) + 0.13 * max(0, above - 1) + 0.25 * bool(title)  # inches
    gap = 0.2 if titles and len(titles) > columns else 0.04  # inches between rows, for titles
    width, height = label + size * columns, head + (size + gap) * count
    figure, axes = plt.subplots(count, columns, figsize=(width, height), squeeze=False)
    margins = {"left": label / width, "bottom": 0.01, "right": 1, "top": 1 - head / height}
    figure.subplots_adjust(**margins, wspace=0.04 / size, hspace=gap / size)
    for i, ax in enumerate(axes.flat):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if i < len(images):
            ax.imshow(pixels(images[i]), interpolation="nearest")
        if titles and i < len(titles):
            ax.set_title(titles[i], fontsize=8, pad=3)
        if rows and i % columns == 0:
            ax.set_ylabel(rows[i // columns], rotation=0, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11, y=1 - 0.05 / height, va="top")
    plt.close(figure)  # the notebook shows the returned figure once, not twice
    return figure


@typed(rows=NOT_EMPTY)
def strips(rows: dict[str, dict[str, Tensor]], *, shown: Count = 3, size: Positive = 0.8) -> Figure:
    """A row for each model, the first few images of each prompt side by side.

    rows: model -> prompt -> images (n, 3, H, W), the same prompts for every model, as
    ``sampling.sample_each`` gives them: then a column is one noise. shown: images of each prompt.
    ValueError for models that have other prompts than the first.
    """
    prompts = list(next(iter(rows.values())))
    for model, images in rows.items():
        if list(images) != prompts:
            raise ValueError(f"{model!r} has images of {list(images)}: sample {prompts} for it too")
    stack = [images[prompt][:shown] for images in rows.values() for prompt in prompts]
    short = [prompt.replace(" in the style of ", ",\n") for prompt in prompts]
    counts = [len(images) for images in stack[: len(prompts)]]
    titles = [
        name if k == 0 else "" for name, n in zip(short, counts, strict=True) for k in range(n)
    ]
    return grid(torch.cat(stack), columns=len(titles), titles=titles, rows=list(rows), size=size)


@typed(image=IMAGE, maps=Dims(3), titles=NOT_EMPTY)
def heat(
    image: Tensor, maps: Tensor, titles: list[str], *,
    size: Positive = 1.3, top: Positive | None = None, rows: Count = 1,
) -> Figure:  # fmt: skip
    """Attention over one image: the image, then each token's map over it, on one colour scale.

    image (3, H, W) in [0, 1]; maps (tokens, h, w), probabilities. ``top`` is the value of the
    brightest colour (default the largest value of the maps).
    """
    plain_style()
    columns = -(-(len(maps) + 1) // rows)
    figsize = (size * columns, size * rows * 1.2)
    figure, axes = plt.subplots(rows, columns, figsize=figsize, squeeze=False)
    shown = pixels(image)
    for ax in axes.flat:
        ax.axis("off")
    axes.flat[0].imshow(shown)
    axes.flat[0].set_title("image", fontsize=8, pad=3)
    look = {
        "cmap": "inferno", "alpha": 0.72, "vmin": 0, "vmax": top or maps.max().item(),
        "extent": (-0.5, shown.shape[1] - 0.5, shown.shape[0] - 0.5, -0.5),
        "interpolation": "bilinear",
    }  # fmt: skip
    for ax, weights, name in zip(axes.flat[1:], maps, titles, strict=False):
        ax.imshow(shown.mean(2), cmap="gray", vmin=-0.3, vmax=1.3)
        overlay = ax.imshow(weights.detach().float().cpu(), **look)
        ax.set_title(name, fontsize=8, pad=3)
    bar = figure.colorbar(overlay, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("attention probability", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    plt.close(figure)
    return figure


@typed(rows=NOT_EMPTY)
def accuracies(
    rows: dict[str, dict[str, tuple[float, float, float]]], *, ylabel: str = "given to the name"
) -> Figure:
    """Shares with their intervals: a group for each name, a colour for each edit.

    rows: edit -> name -> (share, lower end, upper end), as ``metrics.accuracy_interval`` gives
    them; at most six edits, which is how many colours there are. ValueError for more.
    """
    if len(rows) > len(COLOURS) or not all(rows.values()):
        raise ValueError(
            f"rows holds {len(rows)} edits: give 1 to {len(COLOURS)}, with a share or more each"
        )
    plain_style()
    figure, ax = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
    for i, ((label, shares), colour) in enumerate(zip(rows.items(), COLOURS, strict=False)):
        for k, (share, low, high) in enumerate(shares.values()):
            at = k + 0.14 * (i - (len(rows) - 1) / 2)
            ax.vlines(at, low, high, color=colour, linewidth=2)
            ax.plot(at, share, "o", color=colour, label=label if k == 0 else None)
    names = list(next(iter(rows.values())))
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel=ylabel, ylim=(-0.05, 1.05), xlim=(-0.5, len(names) - 0.5))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)
    return figure


@typed(maps=SQUARES)
def coloured(maps: list[Tensor], size: Count) -> Tensor:
    """Maps (side, side) as images for ``grid``: (n, 3, size, size).

    One colour scale runs from zero to their common maximum.
    """
    stack = torch.stack(maps)
    colours = plt.get_cmap("inferno")((stack / stack.max()).numpy())[..., :3]  # (n, side, side, 3)
    return interpolate(torch.from_numpy(colours).permute(0, 3, 1, 2).float(), size)


@typed
def short_name(layer: str) -> str:
    """'up_blocks.2.attentions.1.transformer_blocks.0.attn2' -> 'up 2.1'."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return layer.split("_")[0] + " " + ".".join(numbers[:-1])


@typed
def table(head: list[str], rows: Iterable[Iterable], caption: str = "") -> Markdown:
    """A table: the head, a row for each of ``rows``, and the caption below.

    Cells are written as text, and a bar inside a cell is escaped. ValueError for a row whose number
    of cells is not the head's.
    """
    lines = [
        [str(cell).replace("|", r"\|") for cell in row]
        for row in (head, ["---"] * len(head), *rows)
    ]
    for line in lines:
        if len(line) != len(head):
            raise ValueError(
                f"the row {line} has {len(line)} cells: give {len(head)}, as in the head {head}"
            )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Markdown(text + (f"\n\n{caption}" if caption else ""))


@typed(sentence=NOT_EMPTY)
def finding(sentence: str, holds: bool, figures: dict[str, float | int | str]) -> Markdown:
    """A sentence about a result, with its figures, if it holds; else it says that it does not.

    holds: the condition that makes the sentence true, computed from what was measured. figures:
    what the reader may check it by. So a text cannot outlive the result that it speaks of: such a
    cell of a notebook is tagged ``finding``, and a test wants all of them to hold as committed.
    """
    shown = {name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in figures.items()}
    evidence = ", ".join(f"{name} {value}" for name, value in shown.items())
    opening = "**Found:**" if holds else f"**{NOT_HERE}:**"
    return Markdown(f"{opening} {sentence} ({evidence})")
