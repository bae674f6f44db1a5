"""The judge: on real drawings that it never saw, on blanks, and on bad input."""

import pytest
import torch
from torch.nn import functional as F

from helpers import renders
from helpers.judge import BLANK, load_judge


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_held_out_drawings(judge):
    """The issue's bar: at least 0.98 of real drawings placed as no training batch was."""
    generator = torch.Generator().manual_seed(20_261_122)
    style, thing = (torch.randint(size, (900,), generator=generator) for size in renders.tiles().shape[:2])
    images = renders.compose(renders.tiles()[style, thing], generator)
    styles, things = judge.styles(images), judge.things(images)
    right_style = sum(a == renders.style_names()[b] for a, b in zip(styles, style.tolist(), strict=True))
    right_thing = sum(a == renders.object_names()[b] for a, b in zip(things, thing.tolist(), strict=True))
    assert right_style / 900 >= 0.98 and right_thing / 900 >= 0.98


def test_things_are_told_by_shape(judge):
    """An edit that only recolours or blurs a thing has not forgotten it: exchanged channels, then 16 pixels a side."""
    generator = torch.Generator().manual_seed(3)
    style, thing = (torch.randint(size, (600,), generator=generator) for size in renders.tiles().shape[:2])
    images = renders.compose(renders.tiles()[style, thing], generator)
    soft = F.interpolate(F.interpolate(images, size=16, mode="area"), size=renders.TILE, mode="bilinear")
    for changed, least in ((images[:, [1, 2, 0]], 0.97), (images[:, [2, 1, 0]], 0.97), (soft, 0.9)):
        said = judge.things(changed)
        assert sum(a == renders.object_names()[b] for a, b in zip(said, thing.tolist(), strict=True)) / 600 >= least


def test_blank_pictures_are_blank(judge):
    plain = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(
        -1, -1, renders.TILE, renders.TILE
    )
    assert judge.styles(plain).count(BLANK) >= 15 and judge.things(plain).count(BLANK) >= 15


def test_verdict_does_not_depend_on_the_batch(judge):
    images = renders.references("Twemoji", None, 8)
    alone = torch.cat([judge.probabilities(image[None], "style") for image in images])
    assert torch.allclose(judge.probabilities(images, "style"), alone, atol=1e-4)


def test_gives_agrees_with_names(judge):
    images = renders.references("OpenMoji", "church", 8)
    assert judge.gives(images, "OpenMoji").tolist() == [said == "OpenMoji" for said in judge.styles(images)]
    assert judge.gives(images, "church").tolist() == [said == "church" for said in judge.things(images)]


def test_class_names_come_with_the_weights(judge):
    assert judge.style_names == [*renders.style_names(), BLANK]
    assert judge.thing_names == [*renders.object_names(), BLANK]
    assert not judge.style.training and not judge.thing.training


def test_bad_input(judge, tmp_path):
    with pytest.raises(ValueError, match="zebra"):
        judge.gives(torch.zeros(1, 3, 64, 64), "zebra")
    with pytest.raises(FileNotFoundError, match="git checkout"):
        load_judge(tmp_path / "none.safetensors")
