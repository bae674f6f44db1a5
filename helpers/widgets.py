"""Controls over tested functions: each panel redraws one figure; a plain call draws it as well."""

import io
from collections.abc import Sequence

import ipywidgets
import torch
from ipywidgets import Dropdown, FloatSlider, HBox, IntSlider, VBox
from matplotlib.figure import Figure
from torch import Tensor

from helpers import show
from helpers.attention import token_maps
from helpers.edits import Edit
from helpers.options import NOT_EMPTY, Seed, Share, Whole, typed
from helpers.sampling import sample
from helpers.worlds import World


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, without empty margins."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def seed_box(seed: int) -> ipywidgets.BoundedIntText:
    """A field for a seed."""
    return ipywidgets.BoundedIntText(value=seed, min=0, max=999_999, description="seed")


@typed(titles=NOT_EMPTY)
def attention_figure(
    image: Tensor, maps: dict[str, list[Tensor]], titles: dict[int, str], *,
    layer: str, step: Whole, top: float | None = None, relative: bool = False,
) -> Figure:  # fmt: skip
    """One layer's maps at one step over the finished image, one for each position in ``titles``.

    image (3, H, W) in [0, 1]. maps: as ``record`` fills them, with all columns. Shown is the last
    prompt of the batch, which is the conditional one when a single prompt was sampled with
    guidance. ``step`` counts from 0. ``relative`` divides each map by its own mean over the pixels:
    it shows where a word gets attention, whatever the amount.
    ValueError for a layer or a step that was not recorded.
    """
    require_recorded(maps, layer, step)
    shown = token_maps(maps[layer][step].float())[-1, list(titles)]  # (tokens, side, side)
    if relative:
        shown = shown / shown.mean((1, 2), keepdim=True)
    rows = 1 if len(titles) < 8 else 2
    figure = show.heat(image, shown, list(titles.values()), top=top, rows=rows, size=1.4)
    if relative:
        figure.axes[-1].set_ylabel("times own mean", fontsize=8)
    return figure


def require_recorded(maps: dict[str, list[Tensor]], layer: str, step: int) -> None:
    """ValueError for a layer or a step of which there are no maps."""
    if layer not in maps:
        raise ValueError(
            f"no maps of the layer {layer!r}: choose from what was recorded, {', '.join(maps)}"
        )
    if step >= len(maps[layer]):
        raise ValueError(
            f"no maps of step {step}: {len(maps[layer])} were recorded, give 0 to the last of them"
        )


@typed(titles=NOT_EMPTY)
def attention_panel(
    image: Tensor, maps: dict[str, list[Tensor]], titles: dict[int, str], *,
    layer: str, step: Whole, **options,
) -> VBox:  # fmt: skip
    """A slider over steps and a menu of layers above ``attention_figure``.

    It opens on ``layer`` and ``step``. options: ``top`` and ``relative`` of ``attention_figure``.
    """
    require_recorded(maps, layer, step)
    last = len(maps[layer]) - 1
    steps = IntSlider(value=step, min=0, max=last, description="step", continuous_update=False)
    wide = ipywidgets.Layout(width="34em")
    layers = Dropdown(value=layer, options=list(maps), description="layer", layout=wide)
    picture = ipywidgets.Image(format="png")

    def redraw(_=None) -> None:
        now = {"layer": layers.value, "step": steps.value}
        picture.value = png(attention_figure(image, maps, titles, **now, **options))

    for control in (steps, layers):
        control.observe(redraw, names="value")
    redraw()
    return VBox([HBox([steps, layers]), picture])


def chosen(edits: dict[str, Edit], names: Sequence[str]) -> Edit | None:
    """The sum of the named edits; None, which stands for the base, for no name.

    ValueError for a name without an edit.
    """
    unknown = [name for name in names if name not in edits]
    if unknown:
        raise ValueError(
            f"there is no edit for {', '.join(unknown)}: choose from {', '.join(edits)}"
        )
    return Edit.sum(edits[name] for name in names)


@typed
def erasure_figure(
    world: World, edits: dict[str, Edit], prompt: str, *,
    erased: Sequence[str] = (), seed: Seed = 0, **sampling,
) -> Figure:  # fmt: skip
    """One prompt and one seed: sampled by the base, and with the edits of the concepts ``erased``.

    edits: one for each concept, as ``sepme.erase_separably`` returns them. sampling: options of
    ``sample``. ValueError for a concept without an edit, or a prompt that is too long.
    """
    images = [
        sample(world, [prompt], [seed], edit, progress=False, **sampling)
        for edit in (None, chosen(edits, erased))
    ]
    names = ", ".join(erased) or "nothing"
    return show.grid(torch.cat(images), titles=["base", f"erased: {names}"], size=2.2)


@typed
def erasure_panel(
    world: World, edits: dict[str, Edit], prompt: str, *,
    erased: Sequence[str] = (), seed: Seed = 0, **sampling,
) -> VBox:  # fmt: skip
    """A check box for each concept, the prompt, seed and guidance above ``erasure_figure``.

    sampling: options of ``sample``; the slider of the guidance starts at theirs, or at the world's.
    A prompt that cannot be sampled shows its error.
    """
    boxes = {
        name: ipywidgets.Checkbox(value=name in erased, description=name, indent=False)
        for name in edits
    }
    words = ipywidgets.Text(value=prompt, description="prompt", continuous_update=False)
    seeds = seed_box(seed)
    scale = FloatSlider(
        value=sampling.get("guidance", world.sampling.guidance),
        min=1, max=10, step=0.5, description="guidance", continuous_update=False,
    )  # fmt: skip
    said = ipywidgets.Label()
    picture = ipywidgets.Image(format="png")

    def redraw(_=None) -> None:
        names = [name for name, box in boxes.items() if box.value]
        now = {"erased": names, "seed": seeds.value, "guidance": scale.value}
        said.value = "sampling ..."
        try:
            figure = erasure_figure(world, edits, words.value, **{**sampling, **now})
        except ValueError as error:
            said.value = str(error)
            return
        picture.value, said.value = png(figure), ""

    for control in (*boxes.values(), words, seeds, scale):
        control.observe(redraw, names="value")
    redraw()
    return VBox([HBox(list(boxes.values())), HBox([words, seeds, scale]), said, picture])


def between(edits: dict[float, Edit], share: float) -> Edit:
    """The edit for a share of the visual loss: a trained one, or a weighted mean of two.

    delta = (1 - w) delta_low + w delta_high,  w = (share - low) / (high - low)

    edits: by share, 0 for attention alone and 1 for the visual loss alone. The mean of two edits is
    not the edit that training with the mean of their losses would find.
    ValueError for a share outside the trained ones.
    """
    if not edits or not min(edits) <= share <= max(edits):
        trained = ", ".join(f"{s:g}" for s in sorted(edits))
        raise ValueError(
            f"share {share:g} is outside what was trained ({trained}): choose one in between"
        )
    low, high = max(s for s in edits if s <= share), min(s for s in edits if s >= share)
    if low == high:
        return edits[low]
    w = (share - low) / (high - low)
    return (1 - w) * edits[low] + w * edits[high]


@typed(edits=NOT_EMPTY)
def tradeoff_figure(
    world: World, edits: dict[float, Edit], prompts: list[str], *,
    share: Share, seed: Seed = 0, **sampling,
) -> Figure:  # fmt: skip
    """Prompts from one seed, sampled by the base and by the edit at a share of the visual loss.

    edits: by share, see ``between``. sampling: options of ``sample``.
    """
    seeds = [seed] * len(prompts)
    images = [
        sample(world, prompts, seeds, edit, progress=False, **sampling)
        for edit in (None, between(edits, share))
    ]
    trained = "trained" if share in edits else "in between"
    rows = ["base", f"visual share {share:.2f}\n({trained})"]
    return show.grid(torch.cat(images), columns=len(prompts), titles=prompts, rows=rows, size=1.0)


@typed(edits=NOT_EMPTY)
def tradeoff_panel(
    world: World, edits: dict[float, Edit], prompts: list[str], *,
    share: Share, seed: Seed = 0, **sampling,
) -> VBox:  # fmt: skip
    """A slider over the share of the visual loss, and the seed, above ``tradeoff_figure``."""
    shares = FloatSlider(
        value=share, min=min(edits), max=max(edits), step=0.125,
        description="visual share", continuous_update=False,
    )  # fmt: skip
    seeds = seed_box(seed)
    picture = ipywidgets.Image(format="png")

    def redraw(_=None) -> None:
        now = {"share": shares.value, "seed": seeds.value}
        picture.value = png(tradeoff_figure(world, edits, prompts, **now, **sampling))

    for control in (shares, seeds):
        control.observe(redraw, names="value")
    redraw()
    return VBox([HBox([shares, seeds]), picture])
