"""The drawing of the machine: what is said to be touched is coloured, and nothing else."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch

from helpers.schematic import CHANGED, GROUPS, PARTS, READ, schematic


def fills(figure) -> list[str]:
    """The colours of the boxes of PARTS, in order; the frames come first and have none."""
    boxes = [p for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch) and p.get_fill()]
    return [to_hex(box.get_facecolor()) for box in boxes]


def test_only_what_is_named_is_coloured():
    found = dict(zip(PARTS, fills(schematic(["keys"], ["attention"])), strict=True))
    assert found.pop("keys") == CHANGED and found.pop("attention") == READ
    assert set(found.values()) == {"#ffffff"}


def test_a_group_stands_for_its_parts():
    assert fills(schematic(["cross-attention"])).count(CHANGED) == len(GROUPS["cross-attention"])


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="read names 'eyes': choose from prompt"):
        schematic(read=["eyes"])
