"""Sliders over tested functions: each panel redraws one figure, and a plain call draws the same figure without it."""

import io

import ipywidgets
from matplotlib.figure import Figure
from torch import Tensor

from helpers import show
from helpers.attention import token_maps


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
