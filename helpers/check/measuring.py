"""Checks of the notebook on measuring forgetting: intervals, LPIPS, and UnlearnCanvas's scores."""

import torch

from helpers import stats
from helpers.check.common import passed, same_shape, untouched


def pictures_needed(mine) -> None:
    """``pictures_needed(top)``, how many images without a hit bring the upper end to top."""
    for top in (0.05, 0.25, 0.01):
        answer = mine(top)
        if untouched(answer, "pictures_needed"):
            return
        assert isinstance(answer, int) and answer > 1, (
            f"for top {top} you give {answer!r}: expected a whole number"
        )
        end, before = (stats.wilson_interval(0.0, n)[1] for n in (answer, answer - 1))
        assert end <= top, (
            f"0 of {answer} images leave the upper end at {end:.4f}, still above {top}: take more"
        )
        assert before > top, (
            f"{answer} images are enough for {top}, but {answer - 1} would do: give the fewest"
        )
    passed("pictures_needed", "Each 'at most' of a table needs this many images without a hit.")


def layer_distance(mine) -> None:
    """``layer_distance(f_a, f_b)``, one layer's part of LPIPS: two (n, channels, h, w) -> (n,)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 5, 4, 4, generator=generator)  # as after a ReLU: nothing is negative
    answer = mine(a.clone(), b.clone())
    if untouched(answer, "layer_distance"):
        return
    same_shape(answer, (3,), "layer_distance")
    assert torch.allclose(mine(a, a), torch.zeros(3), atol=1e-6), (
        "equal features have no distance: expected 0"
    )
    red, green = (torch.eye(5)[i].view(1, 5, 1, 1).expand(1, 5, 4, 4) for i in (0, 1))
    got = mine(red, green).item()
    assert abs(got - 2) < 1e-5, (
        f"perpendicular unit vectors at every place give {got:.3g}: expected |(1, -1)|^2 = 2. "
        "Sum over channels, average over places, take no root"
    )
    corner = green.clone()
    corner[..., 1:, :], corner[..., 1:] = red[..., 1:, :], red[..., 1:]
    got = mine(red, corner).item()
    assert abs(got - 2 / 16) < 1e-5, (
        f"a difference at one of 16 places gives {got:.3g}: expected 2 / 16"
    )
    light = 0.1 + torch.rand(3, 1, 4, 4, generator=generator)
    assert torch.allclose(mine(light * a, b), answer, atol=1e-5), (
        "features made stronger at some places changed the distance: "
        "first scale each place's vector of channels to length one"
    )
    dark = mine(torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 4, 4))
    assert not torch.isnan(dark).any(), (
        "where a ReLU leaves only zeros the length is zero: do not divide by it"
    )
    passed("layer_distance", "It compares directions of features at each place, not strengths.")


def canvas(mine) -> None:
    """``canvas(asked, said, concept, domain)``, UA, IRA and CRA; pairs are (style, thing)."""
    asked = [
        ("Twemoji", "church"),
        ("Twemoji", "dog"),
        *[("Noto", "church"), ("OpenMoji", "dog")] * 2,
    ]
    styles = ("Twemoji", "blank", "Noto", "OpenMoji", "Noto", "Noto")
    said = list(zip(styles, ("dog", "dog", "church", "dog", "dog", "dog"), strict=True))
    expected = {("Twemoji", 0): (1 / 2, 3 / 4, 3 / 4), ("church", 1): (2 / 3, 1.0, 1 / 3)}
    for (concept, domain), wanted in expected.items():
        answer = mine(list(asked), list(said), concept, domain)
        if untouched(answer, "canvas"):
            return
        assert isinstance(answer, tuple | list) and len(answer) == 3, (
            "canvas returns three numbers: (UA, IRA, CRA)"
        )
        for name, got, right in zip(("UA", "IRA", "CRA"), answer, wanted, strict=True):
            assert abs(float(got) - right) < 1e-6, (
                f"{concept} erased: your {name} is {float(got):.3g}, expected {right:.3g}. "
                "UA counts the images whose prompt has the concept; "
                "IRA and CRA count all others, and nothing else"
            )
    passed("canvas", "What is erased, what is retained in its domain, and in the other domain.")
