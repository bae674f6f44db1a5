"""The judge: on real drawings that it never saw, on blanks, and on bad input."""

import pytest
import torch
from torch.nn import functional as F

from helpers import concepts, renders
from helpers.judge import BLANK, load_judge


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def placed(n: int, seed: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """n drawings placed at random, and the name of each one's style and thing."""
    generator = torch.Generator().manual_seed(seed)
    sizes = renders.tiles().shape[:2]
    style, thing = (torch.randint(size, (n,), generator=generator) for size in sizes)
    images = renders.compose(renders.tiles()[style, thing], generator)
    styles, things = concepts.style_names(), concepts.object_names()
    return images, [styles[i] for i in style], [things[i] for i in thing]


def agreement(said: list[str], shown: list[str]) -> float:
    """The share of verdicts that are right."""
    return sum(a == b for a, b in zip(said, shown, strict=True)) / len(shown)


def test_held_out_drawings(judge):
    """The issue's bar: at least 0.98 of real drawings placed as no training batch was."""
    images, styles, things = placed(900, 20_261_122)
    assert agreement(judge.styles(images), styles) >= 0.98
    assert agreement(judge.things(images), things) >= 0.98


def test_things_are_told_by_shape(judge):
    """An edit that only recolours or blurs a thing has not forgotten it.

    Recoloured: the colour channels are exchanged. Blurred: 16 pixels a side.
    """
    images, _, things = placed(600, 3)
    small = F.interpolate(images, size=16, mode="area")
    soft = F.interpolate(small, size=renders.TILE, mode="bilinear")
    for changed, least in ((images[:, [1, 2, 0]], 0.97), (images[:, [2, 1, 0]], 0.97), (soft, 0.9)):
        assert agreement(judge.things(changed), things) >= least


def test_blank_images_are_blank(judge):
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
    assert judge.gives(images, "OpenMoji").tolist() == [
        said == "OpenMoji" for said in judge.styles(images)
    ]
    assert judge.gives(images, "church").tolist() == [
        said == "church" for said in judge.things(images)
    ]


def test_class_names_come_with_the_weights(judge):
    assert judge.style_names == [*concepts.style_names(), BLANK]
    assert judge.thing_names == [*concepts.object_names(), BLANK]
    assert not judge.style.training and not judge.thing.training


def test_bad_input(judge, tmp_path):
    with pytest.raises(ValueError, match="zebra"):
        judge.gives(torch.zeros(1, 3, 64, 64), "zebra")
    with pytest.raises(FileNotFoundError, match="git checkout"):
        load_judge(tmp_path / "none.safetensors")
