"""The null space at Stable Diffusion 1.4's shape: ours against sympy, which the release uses.

make bench                   one prompt, 77 x 768: sympy takes one to two minutes
pytest tests/benchmarks -m slow --benchmark-only
                             two prompts, 154 x 768: a quarter of an hour and more
"""

import pytest
import sympy
import torch

from helpers.nullspace import null_space_report

SHAPES = [
    pytest.param(77, id="77 x 768"),
    pytest.param(154, id="154 x 768", marks=pytest.mark.slow),
]


def rows(n: int) -> torch.Tensor:
    """Random rows of text states' shape, fp32, as the release hands them over."""
    return torch.randn(n, 768, generator=torch.Generator().manual_seed(0))


def by_sympy(A: torch.Tensor) -> torch.Tensor:
    columns = sympy.Matrix(A.numpy()).nullspace()
    return torch.tensor([[float(v) for v in column] for column in columns]).T


@pytest.mark.benchmark(group="null space")
@pytest.mark.parametrize("n", SHAPES)
def test_ours(benchmark, n):
    report = benchmark.pedantic(null_space_report, args=(rows(n),), rounds=5, warmup_rounds=1)
    assert report.nullity == 768 - n and report.residual < 1e-10


@pytest.mark.benchmark(group="null space")
@pytest.mark.parametrize("n", SHAPES)
def test_sympy(benchmark, n):
    solutions = benchmark.pedantic(by_sympy, args=(rows(n),), rounds=1)
    assert solutions.shape[1] == 768 - n
