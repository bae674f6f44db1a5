"""Controls over tested functions: each panel redraws one figure, and a plain call draws the same figure without it."""

import functools
import io
import operator
from collections.abc import Sequence

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from helpers import show
from helpers.attention import token_maps
from helpers.edits import Edit
from helpers.sampling import sample
from helpers.worlds import World


def attention_figure(
    image: Tensor, maps: dict[str, list[Tensor]], titles: dict[int, str], *, layer: str, step: int,
    top: float | None = None, relative: bool = False,
) -> Figure:  # fmt: skip
    """The maps of one layer at one step over the finished picture, one for each token position in ``titles``.

    image (3, H, W) in [0, 1]; maps as ``record`` fills them, all columns kept; the last prompt of the batch is drawn,
    which is the conditional one when a single prompt was drawn with guidance. ``step`` counts from 0. ``relative``
    divides each map by its own mean over the pixels: where a word is looked at, whatever its share.
    ValueError for a layer or a step that was not recorded.
    """
    if layer not in maps:
        raise ValueError(f"no maps of the layer {layer!r}: recorded were {', '.join(maps)}")
    if not 0 <= step < len(maps[layer]):
        raise ValueError(f"no maps of step {step}: {len(maps[layer])} were recorded, and they count from 0")
    pictures = token_maps(maps[layer][step].float())[-1, list(titles)]  # (shown tokens, side, side)
    if relative:
        pictures = pictures / pictures.mean((1, 2), keepdim=True)
    figure = show.heat(image, pictures, list(titles.values()), top=top, rows=1 if len(titles) < 8 else 2, size=1.1)
    if relative:
        figure.axes[-1].set_ylabel("times own mean", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, cropped to what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def attention_panel(
    image: Tensor, maps: dict[str, list[Tensor]], titles: dict[int, str], *, layer: str, step: int,
    top: float | None = None, relative: bool = False,
) -> ipywidgets.VBox:  # fmt: skip
    """A slider over steps and a menu of layers above ``attention_figure``; it opens on ``layer`` and ``step``."""
    steps = ipywidgets.IntSlider(
        value=step, min=0, max=len(maps[layer]) - 1, description="step", continuous_update=False
    )
    layers = ipywidgets.Dropdown(
        value=layer, options=list(maps), description="layer", layout=ipywidgets.Layout(width="34em")
    )
    picture = ipywidgets.Image(format="png")

    def redraw(_=None) -> None:
        chosen = {"layer": layers.value, "step": steps.value, "top": top, "relative": relative}
        picture.value = png(attention_figure(image, maps, titles, **chosen))

    for control in (steps, layers):
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([steps, layers]), picture])


def merged(edits: dict[str, Edit], names: Sequence[str]) -> Edit | None:
    """The sum of the named increments; None, which stands for the base, when none is named.

    ValueError for a name without an edit.
    """
    unknown = [name for name in names if name not in edits]
    if unknown:
        raise ValueError(f"there is no edit for {', '.join(unknown)}: choose from {', '.join(edits)}")
    return functools.reduce(operator.add, [edits[name] for name in names]) if names else None


def erasure_figure(
    world: World, edits: dict[str, Edit], prompt: str, *, erased: Sequence[str] = (), seed: int = 0,
    guidance: float = 5.0, steps: int = 25,
) -> Figure:  # fmt: skip
    """One prompt from one noise: drawn by the base, and with the increments of the concepts ``erased``.

    edits: one for each concept, as ``sepme.erase_separably`` returns them.
    ValueError for a concept without an edit, or a prompt that is too long.
    """
    drawing = {"steps": steps, "guidance": guidance, "progress": False}
    images = [sample(world, [prompt], [seed], edit, **drawing) for edit in (None, merged(edits, erased))]
    names = ", ".join(erased) or "nothing"
    return show.grid(torch.cat(images), titles=["base", f"erased: {names}"], size=2.2)


def erasure_panel(
    world: World, edits: dict[str, Edit], prompt: str, *, erased: Sequence[str] = (), seed: int = 0,
    guidance: float = 5.0, steps: int = 25,
) -> ipywidgets.VBox:  # fmt: skip
    """A check box for each concept, the prompt, seed and guidance above ``erasure_figure``; a prompt that fails says why."""
    boxes = {name: ipywidgets.Checkbox(value=name in erased, description=name, indent=False) for name in edits}
    words = ipywidgets.Text(value=prompt, description="prompt", continuous_update=False)
    seeds = ipywidgets.BoundedIntText(value=seed, min=0, max=999_999, description="seed")
    scale = ipywidgets.FloatSlider(
        value=guidance, min=1, max=10, step=0.5, description="guidance", continuous_update=False
    )
    said = ipywidgets.Label()
    picture = ipywidgets.Image(format="png")

    def redraw(_=None) -> None:
        chosen = [name for name, box in boxes.items() if box.value]
        said.value = "drawing ..."
        try:
            figure = erasure_figure(
                world, edits, words.value, erased=chosen, seed=seeds.value, guidance=scale.value, steps=steps
            )
        except ValueError as error:
            said.value = str(error)
            return
        picture.value, said.value = png(figure), ""

    for control in (*boxes.values(), words, seeds, scale):
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox(
        [ipywidgets.HBox(list(boxes.values())), ipywidgets.HBox([words, seeds, scale]), said, picture]
    )


def between(edits: dict[float, Edit], share: float) -> Edit:
    """The edit trained with a share of the visual loss; between two trained shares, the weighted mean of their increments.

    delta = (1 - w) delta_low + w delta_high,  w = (share - low) / (high - low)

    edits: by share, 0 for attention alone and 1 for the visual loss alone. A mean of two edits is not what a training
    with the mean of their losses finds. ValueError for a share outside the trained ones.
    """
    if not edits or not min(edits) <= share <= max(edits):
        trained = ", ".join(f"{s:g}" for s in sorted(edits))
        raise ValueError(f"share {share:g} is outside what was trained ({trained}): choose one in between")
    low, high = max(s for s in edits if s <= share), min(s for s in edits if s >= share)
    if low == high:
        return edits[low]
    w = (share - low) / (high - low)
    return (1 - w) * edits[low] + w * edits[high]


def tradeoff_figure(
    world: World, edits: dict[float, Edit], prompts: list[str], *, share: float, seed: int = 0, guidance: float = 5.0,
    steps: int = 25,
) -> Figure:  # fmt: skip
    """Prompts from one noise, drawn by the base and by the edit at a share of the visual loss: see ``between``."""
    drawing = {"steps": steps, "guidance": guidance, "progress": False}
    images = [sample(world, prompts, [seed] * len(prompts), e, **drawing) for e in (None, between(edits, share))]
    trained = "trained" if share in edits else "in between"
    rows = ["base", f"visual share {share:.2f}\n({trained})"]
    return show.grid(torch.cat(images), columns=len(prompts), titles=prompts, rows=rows, size=1.0)


def tradeoff_panel(
    world: World, edits: dict[float, Edit], prompts: list[str], *, share: float, seed: int = 0, guidance: float = 5.0,
    steps: int = 25,
) -> ipywidgets.VBox:  # fmt: skip
    """A slider over the share of the visual loss, and the seed, above ``tradeoff_figure``."""
    shares = ipywidgets.FloatSlider(
        value=share, min=min(edits), max=max(edits), step=0.125, description="visual share", continuous_update=False
    )
    seeds = ipywidgets.BoundedIntText(value=seed, min=0, max=999_999, description="seed")
    picture = ipywidgets.Image(format="png")

    def redraw(_=None) -> None:
        drawing = {"seed": seeds.value, "guidance": guidance, "steps": steps}
        picture.value = png(tradeoff_figure(world, edits, prompts, share=shares.value, **drawing))

    for control in (shares, seeds):
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([shares, seeds]), picture])
