"""What the figures of the kit show: the arrays in their axes, their titles and labels."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from helpers import show


def images(n: int, *, height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def shown(ax) -> np.ndarray:
    """The array of an axis that holds one image."""
    (image,) = ax.images
    return np.asarray(image.get_array())


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


# --- grid -----------------------------------------------------------------------------------------


def test_grid_reads_row_by_row_and_leaves_the_rest_empty():
    five = images(5)
    figure = show.grid(five, columns=3, titles=["a", "b", "c"], rows=["first", "second"], title="T")
    assert len(figure.axes) == 6
    for ax, image in zip(figure.axes[:5], five, strict=True):
        np.testing.assert_array_equal(shown(ax), as_array(image))
    assert not figure.axes[5].images
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "", "", "second", "", ""]
    assert figure.get_suptitle() == "T"
    assert all(len(ax.get_xticks()) == len(ax.get_yticks()) == 0 for ax in figure.axes)


def test_grid_takes_one_title_for_each_image():
    figure = show.grid(images(4), columns=2, titles=["a", "b", "c", "d"])
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "d"]
    assert figure.get_suptitle() == ""


@pytest.mark.parametrize(
    ("n", "columns", "axes"), [(1, 1, 1), (7, 7, 7), (10, 10, 10), (11, 10, 20)]
)
def test_grid_has_at_most_ten_columns_by_default(n, columns, axes):
    figure = show.grid(images(n))
    assert len(figure.axes) == axes
    assert figure.axes[0].get_gridspec().ncols == columns


def test_grid_clamps_and_detaches_what_it_is_given():
    outside = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    figure = show.grid(outside.clone().requires_grad_())
    np.testing.assert_array_equal(shown(figure.axes[0])[0, 0], [0.0, 0.5, 1.0])
    half = show.grid(images(1).half())
    np.testing.assert_array_equal(shown(half.axes[0]), as_array(images(1).half().float()[0]))


def test_size_is_that_of_an_image_and_labels_get_room():
    small, large = (show.grid(images(2), size=size) for size in (1.0, 2.0))
    one, two = (figure.get_size_inches() for figure in (small, large))
    assert two[0] - one[0] == pytest.approx(2) and two[1] - one[1] == pytest.approx(1)
    labelled = show.grid(images(2), rows=["a long label"])
    assert labelled.get_size_inches()[0] > one[0]
    wrapped = show.grid(images(2), rows=["a long\nlabel"])  # as wide as its longest line
    assert one[0] < wrapped.get_size_inches()[0] < labelled.get_size_inches()[0]


def test_figures_are_closed_so_that_a_notebook_shows_them_once():
    before = plt.get_fignums()
    show.grid(images(1))
    show.heat(images(1)[0], torch.rand(1, 2, 2), ["a"])
    show.accuracies({"base": {"church": (0.5, 0.2, 0.8)}})
    assert plt.get_fignums() == before


# --- heat -----------------------------------------------------------------------------------------


def test_heat_lays_each_map_over_the_grey_image_on_one_scale():
    (image,) = images(1, height=4, width=6)
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.0], [0.0, 0.8]]])
    figure = show.heat(image, maps, ["a", "church"])
    first, *others, bar = figure.axes
    assert [ax.get_title() for ax in (first, *others)] == ["image", "a", "church"]
    np.testing.assert_array_equal(shown(first), as_array(image))
    for ax, weights in zip(others, maps, strict=True):
        grey, overlay = ax.images
        np.testing.assert_array_equal(np.asarray(grey.get_array()), as_array(image).mean(2))
        np.testing.assert_array_equal(np.asarray(overlay.get_array()), weights.numpy())
        assert overlay.get_clim() == (0, pytest.approx(0.8))  # the largest value of all maps
        assert tuple(overlay.get_extent()) == (-0.5, 5.5, 3.5, -0.5)  # all of the image
    assert bar.get_ylabel() == "attention probability"


def test_heat_takes_a_top_and_several_rows():
    maps = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1))
    figure = show.heat(images(1)[0], maps, list("abcd"), top=3.0, rows=2)
    *axes, _bar = figure.axes
    assert len(axes) == 6  # two rows of three: the image, four maps, one empty
    assert [ax.get_title() for ax in axes] == ["image", *"abcd", ""]
    assert not axes[-1].images
    assert all(ax.images[1].get_clim() == (0, 3.0) for ax in axes[1:5])


# --- accuracies -----------------------------------------------------------------------------------


def test_accuracies_place_edits_beside_each_other_in_every_group():
    rows = {
        "before": {"church": (1.0, 0.7, 1.0), "dog": (0.5, 0.2, 0.8)},
        "after": {"church": (0.0, 0.0, 0.3), "dog": (0.25, 0.1, 0.6)},
    }
    figure = show.accuracies(rows, ylabel="share")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["church", "dog"]
    assert list(ax.get_xticks()) == [0, 1] and ax.get_ylabel() == "share"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "after"]
    points = [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines]
    assert points == [
        (pytest.approx(x), y) for x, y in ((-0.07, 1.0), (0.93, 0.5), (0.07, 0.0), (1.07, 0.25))
    ]
    assert [line.get_color() for line in ax.lines] == [c for c in show.COLOURS[:2] for _ in "xx"]
    for line, bar, ends in zip(
        ax.lines, ax.collections, [(0.7, 1.0), (0.2, 0.8), (0.0, 0.3), (0.1, 0.6)], strict=True
    ):
        (segment,) = bar.get_segments()
        assert segment[:, 0].tolist() == pytest.approx([line.get_xdata()[0]] * 2)
        assert tuple(segment[:, 1]) == ends
        assert to_hex(bar.get_color()[0]) == line.get_color()


def test_one_edit_stands_in_the_middle_of_each_group():
    (ax,) = show.accuracies({"base": {"church": (0.5, 0.2, 0.8)}}).axes
    assert ax.lines[0].get_xdata()[0] == 0 and ax.get_ylabel() == "given to the name"
    assert ax.get_ylim() == (-0.05, 1.05)


# --- the rest -------------------------------------------------------------------------------------


def test_coloured_maps_share_one_scale_from_zero():
    dark, bright = torch.zeros(2, 2), torch.tensor([[0.0, 0.5], [0.25, 0.5]])
    made = show.coloured([dark, bright], 4)
    assert made.shape == (2, 3, 4, 4)
    ends = torch.tensor([plt.get_cmap("inferno")(x)[:3] for x in (0.0, 0.5, 1.0)])
    torch.testing.assert_close(made[0], ends[0].view(3, 1, 1).expand(3, 4, 4).float())
    torch.testing.assert_close(made[1, :, 0, 0], ends[0].float())
    torch.testing.assert_close(made[1, :, 0, 3], ends[2].float())  # the common maximum
    torch.testing.assert_close(made[1, :, 3, 0], ends[1].float())


def test_short_names_of_layers():
    long = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    assert show.short_name(long) == "up 2.1"
    assert show.short_name("mid_block.attentions.0.transformer_blocks.0.attn2") == "mid 0"


def test_a_table_keeps_its_columns():
    made = show.table(["what", "|w|"], [("a", 1.5), ("sum of |w|", "")], "two rows")
    assert made.data.splitlines() == [
        r"| what | \|w\| |",
        "| --- | --- |",
        "| a | 1.5 |",
        r"| sum of \|w\| |  |",
        "",
        "two rows",
    ]
    with pytest.raises(ValueError, match="has 1 cells: give 2"):
        show.table(["a", "b"], [("only one",)])


def test_a_finding_says_what_holds_and_what_does_not():
    figures = {"church": 0.125, "of": 24, "judge": "the second"}
    said = show.finding("The church is gone.", torch.tensor(True), figures).data
    assert said == "**Found:** The church is gone. (church 0.125, of 24, judge the second)"
    said = show.finding("The church is gone.", np.bool_(False), figures).data
    assert said.startswith("**Not with these settings:** The church is gone. (church 0.125")
    for wrong in (None, 0.5, "yes"):
        with pytest.raises(ValueError, match=r"holds is .*: give True or False"):
            show.finding("The church is gone.", wrong, figures)
