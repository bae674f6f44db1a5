"""What the checks share: their messages, a test of shapes, and inputs that never change."""

import torch
from torch import Tensor


def untouched(answer, name: str) -> bool:
    """Whether a stub still returns nothing; if so, print a friendly line that says it."""
    if answer is not None and answer is not Ellipsis:
        return False
    print(f"{name}: not yet. Replace the ... with your lines, then run this cell again.")
    return True


def passed(name: str, meaning: str) -> None:
    """Print the line that a right answer earns."""
    print(f"{name}: right. {meaning}")


def same_shape(answer, expected: tuple[int, ...], name: str) -> None:
    """AssertionError unless the answer is a tensor of the expected shape."""
    assert isinstance(answer, Tensor), f"{name} returns {type(answer).__name__}: expected a tensor"
    assert tuple(answer.shape) == expected, (
        f"{name} has shape {tuple(answer.shape)}: expected {expected}"
    )


def random_predictions(n: int) -> list[Tensor]:
    """n batches of random numbers, always the same ones: (2, 4, 3, 3) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(n)]


def concept_columns() -> list[Tensor]:
    """A concept's two columns in two layers of different size, always the same ones.

    Returns one (2, heads, pixels, 2) for each layer: 2 heads and 16 pixels, then 4 and 4.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 16), (4, 4))
    return [torch.rand(2, heads, pixels, 2, generator=generator) for heads, pixels in sizes]


def three_steps(answer, right: dict[str, Tensor | float], hints: tuple[str, ...]) -> None:
    """AssertionError unless a dict has every step of a calculation, the first wrong one named.

    right: step -> its value, in order; hints: what to look at, one for each step. Numbers may be
    floats or tensors.
    """
    assert isinstance(answer, dict) and set(answer) == set(right), (
        f"return a dict with {', '.join(map(repr, right))}"
    )
    for k, ((name, wanted), hint) in enumerate(zip(right.items(), hints, strict=True), 1):
        got, wanted = (torch.as_tensor(value).detach() for value in (answer[name], wanted))
        assert got.shape == wanted.shape, (
            f"step {k}, {name!r}, has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}: "
            f"{hint}"
        )
        assert torch.allclose(got.double(), wanted.double(), rtol=1e-4, atol=1e-6), (
            f"step {k}, {name!r}, differs from the formula: {hint}"
        )
