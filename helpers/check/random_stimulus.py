"""Checks of the notebook on random stimulus: the loss, its smallest value, and paired seeds."""

import torch

from helpers import losses
from helpers.check.common import passed, same_shape, untouched


def stimulus(mine) -> None:
    """``stimulus(maps, noise)``, Eq. 6 on maps (b, heads, pixels, n), one for each layer."""
    zero, one = torch.zeros(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    answer = mine([zero.clone()], [one.clone()])
    if untouched(answer, "stimulus"):
        return
    same_shape(answer, (), "stimulus")
    got = answer.item()
    assert abs(got - 2) < 1e-5, (
        f"four entries that each differ by 1 give {got:.3g}: "
        "expected their norm, 2, neither squared nor averaged"
    )
    got = mine([zero.view(1, 1, 2, 2)], [one.view(1, 1, 2, 2)]).item()
    assert abs(got - 2) < 1e-5, (
        f"2 pixels and 2 tokens give {got:.3g}: expected one norm over all 4 entries of a head"
    )
    got = mine([zero.expand(1, 4, 4, 1)], [one.expand(1, 4, 4, 1)]).item()
    assert abs(got - 8) < 1e-5, (
        f"4 heads at distance 2 give {got:.3g}: expected 8, the sum of their norms"
    )
    got = mine([zero, zero], [one, one]).item()
    assert abs(got - 4) < 1e-5, (
        f"2 layers of one head at distance 2 give {got:.3g}: expected 4, their sum"
    )
    got = mine([torch.cat([zero, one])], [torch.cat([one, one])]).item()
    assert abs(got - 1) < 1e-5, (
        f"two images with losses 2 and 0 give {got:.3g}: expected their mean, 1"
    )
    generator, sizes = torch.Generator().manual_seed(0), ((2, 16), (4, 4))
    maps, noise = (
        [torch.rand(2, h, p, 2, generator=generator) for h, p in sizes] for _ in range(2)
    )
    assert torch.allclose(mine(maps, noise), losses.random_stimulus(maps, noise=noise)), (
        "random maps do not give Eq. 6: is each R used for the map of its own layer?"
    )
    passed("stimulus", "One distance for each head, and only the noise is random.")


def paired(mine) -> None:
    """``paired(a, b)``, the mean of same-seed differences and the standard error of that mean."""
    generator = torch.Generator().manual_seed(0)
    b = 10 * torch.randn(5, generator=generator)  # seeds differ far more than the two settings do
    a = b + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    answer = mine(a.clone(), b.clone())
    if untouched(answer, "paired"):
        return
    assert isinstance(answer, tuple | list) and len(answer) == 2, (
        "paired returns two numbers: the mean and its error"
    )
    mean, error = (float(x) for x in answer)
    assert abs(mean - 3) < 1e-4, (
        f"differences 1, 2, 3, 4, 5 give the mean {mean:.3g}: expected 3, a minus b"
    )
    assert error < 2, (
        f"the error is {error:.3g}, as large as for separate seeds: take the differences first"
    )
    assert abs(error - 2.5**0.5) > 1e-3, (
        "that is the spread of the differences: the error of their mean is smaller"
    )
    assert abs(error - (2.5 / 5) ** 0.5) < 1e-4, (
        f"the error is {error:.3g}: expected the root of 2.5 / 5, "
        "the variance (with n - 1) over the number of seeds"
    )
    passed("paired", "What the two settings share through the seed cancels.")
