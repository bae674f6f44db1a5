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
