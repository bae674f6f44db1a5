"""Intervals: how far a share or a mean may be from what more data would give."""

import math

import torch
from scipy import stats
from torch import Tensor

from helpers.options import FINITE, AtLeast, Between, typed


@typed(share=Between(0, 1), n=AtLeast(1), z=AtLeast(0))
def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n images.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p -+ z sqrt(p (1 - p)/n) it stays inside [0, 1] and has a width at p = 0 and 1, where
    erasing ends up. ValueError for n < 1 or a share outside [0, 1].
    Source: Wilson 1927. share 0.5, n 10: (0.237, 0.763).
    """
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@typed(values=FINITE)
def student_interval(values: Tensor | list[float]) -> tuple[float, float, float]:
    """Mean of k values, and the ends of Student's 95 % interval of that mean.

    d_mean -+ t_{k-1}(0.975) s / sqrt(k),  s^2 = sum (d - d_mean)^2 / (k - 1)

    values (k,), any unit: for a claim, one difference for each training seed. Equal values give an
    interval of no width. ValueError for fewer than two values, which have no spread.
    Source: Student 1908. (1, 2, 3): (2, -0.48, 4.48).
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values of shape {tuple(values.shape)}: give two or more, in one row")
    k, mean = len(values), values.mean().item()
    half = stats.t.ppf(0.975, k - 1).item() * values.std().item() / math.sqrt(k)
    return mean, mean - half, mean + half
