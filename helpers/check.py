"""Checks of the notebooks' exercises: what an answer must satisfy, never the answer itself.

Each takes the reader's function, prints one line when it is right or still untouched, and raises AssertionError with a
hint when it is wrong.
"""

import torch
from torch import Tensor


def untouched(answer, name: str) -> bool:
    """Whether a stub still returns nothing, and if so a friendly line that says it."""
    if answer is not None and answer is not Ellipsis:
        return False
    print(f"{name}: not yet. Replace the ... with your lines, then run this cell again.")
    return True


def passed(name: str, meaning: str) -> None:
    """The line that a right answer earns."""
    print(f"{name}: right. {meaning}")


def same_shape(answer, expected: tuple[int, ...], name: str) -> None:
    """AssertionError unless the answer is a tensor of the expected shape."""
    assert isinstance(answer, Tensor), f"{name} returns {type(answer).__name__}: expected a tensor"
    assert tuple(answer.shape) == expected, f"{name} has shape {tuple(answer.shape)}: expected {expected}"


# --- 01 · diffusion basics --------------------------------------------------------------------------------------------


def random_predictions(n: int) -> list[Tensor]:
    """n batches of random numbers, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(n)]


def snr(mine) -> None:
    """Notebook 01: ``snr(alpha_bar)``, the signal-to-noise ratio of a schedule."""
    answer = mine(torch.tensor([0.5, 0.9, 0.2]))
    if untouched(answer, "snr"):
        return
    same_shape(answer, (3,), "snr")
    assert abs(answer[0].item() - 1) < 1e-5, "at alpha_bar = 0.5 picture and noise are equally strong: the ratio is 1"
    assert abs(answer[1].item() - 9) < 1e-4, (
        f"at alpha_bar = 0.9 you give {answer[1].item():.3g}: expected 0.9 / 0.1 = 9, a ratio of variances, signal on top"
    )
    assert abs(answer[2].item() - 0.25) < 1e-5, "at alpha_bar = 0.2 expected 0.2 / 0.8 = 0.25"
    passed("snr", "Above 1 the picture is louder than the noise, below 1 the noise is.")


def steer_away(mine) -> None:
    """Notebook 01: ``steer_away(eps_null, eps_c, eps_concept, guidance, strength)``, towards a prompt, away from a concept."""
    from helpers.diffusion import guide

    null, c, concept = random_predictions(3)
    answer = mine(null, c, concept, 5.0, 2.0)
    if untouched(answer, "steer_away"):
        return
    same_shape(answer, tuple(c.shape), "steer_away")
    assert torch.allclose(mine(null, c, concept, 5.0, 0.0), guide(null, c, 5.0), atol=1e-5), (
        "with strength 0 it must be plain guidance"
    )
    one = torch.ones(1, 1)
    assert torch.allclose(mine(one, one, one, 5.0, 2.0), one), (
        "when the three predictions agree there is nowhere to steer: the result must be that prediction"
    )
    got = mine(0 * one, 2 * one, 3 * one, 5.0, 2.0).item()
    assert abs(got - 4) < 1e-5, (
        f"with eps_null 0, eps_c 2 and eps_concept 3 you give {got:.3g}: expected 4, "
        "five times 2 towards the prompt and two times 3 away from the concept"
    )
    assert torch.allclose(mine(null, c, c, 5.0, 5.0), null, atol=1e-5), (
        "towards and away from one and the same text, equally strongly, must cancel: only eps_null is left"
    )
    passed("steer_away", "Towards the prompt and away from the concept, both measured from eps_null.")


def eta_step(mine) -> None:
    """Notebook 01: ``eta_step(x_t, eps, alpha_bar_t, alpha_bar_prev, eta, noise)``, one sampler from DDIM to DDPM."""
    from helpers.diffusion import ddim_step, ddpm_step

    x, eps, z = random_predictions(3)
    now, prev = 0.3, 0.6
    answer = mine(x, eps, now, prev, 0.0, z)
    if untouched(answer, "eta_step"):
        return
    same_shape(answer, tuple(x.shape), "eta_step")
    assert torch.allclose(answer, ddim_step(x, eps, now, prev), atol=1e-5), (
        "at eta = 0 no noise is added, and the step must equal ddim_step"
    )
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    full, half = (mine(zero, zero, now, prev, eta, one).item() for eta in (1.0, 0.5))
    assert abs(full**2 - 0.4 / 0.7 * 0.5) < 1e-4, (
        f"with x_t = eps = 0 only sigma z is left, and you give sigma^2 = {full**2:.3g}: "
        "from 0.3 to 0.6 at eta = 1 expected (0.4 / 0.7) (1 - 0.3 / 0.6) = 0.286"
    )
    assert abs(half - full / 2) < 1e-5, "sigma is proportional to eta, so sigma^2 is proportional to eta^2"
    assert torch.allclose(mine(x, eps, now, prev, 1.0, z), ddpm_step(x, eps, now, prev, z), atol=1e-5), (
        "at eta = 1 it must equal ddpm_step: the variance that z brings has to be taken off the old noise's"
    )
    passed("eta_step", "One dial: DDIM at 0, DDPM at 1.")


# --- 02 · attention hooks ---------------------------------------------------------------------------------------------


def word_map(mine) -> None:
    """Notebook 02: ``word_map(passes, column, size)``, one token's map over several layers and steps."""
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (torch.rand(2, heads, pixels, 5, generator=generator) for heads, pixels in ((2, 16), (4, 4)))
    answer = mine([fine.clone(), coarse.clone()], 3, 8)
    if untouched(answer, "word_map"):
        return
    same_shape(answer, (8, 8), "word_map")

    def level(*values: float) -> float:
        """The mean of the answer for layers whose probabilities are one constant each."""
        layers = [torch.full_like(A, value) for A, value in zip((fine, coarse), values, strict=True)]
        return mine(layers, 3, 8).mean().item()

    assert abs(level(0.2, 0.2) - 0.2) < 1e-5, "layers that hold 0.2 everywhere must give 0.2: take means, not sums"
    assert abs(level(0.1, 0.3) - 0.2) < 1e-5, "each layer counts once, however many pixels it has: resize, then average"
    other = [fine.clone(), coarse.clone()]
    for A in other:
        A[0] = 0.0
    assert torch.allclose(mine(other, 3, 8), answer), (
        "the map moved with row 0: that is the unconditional half, take the last row"
    )
    for A in other:
        A[..., :3] = A[..., 4:] = 0.0
    assert torch.allclose(mine(other, 3, 8), answer), "the map moved with another token's column"
    first_head, swapped = fine.clone(), fine.flip(1)
    first_head[:, 1:] = 0.0
    assert torch.allclose(mine([swapped], 3, 8), mine([fine], 3, 8), atol=1e-6), "every head counts the same"
    assert not torch.allclose(mine([first_head], 3, 8), mine([fine], 3, 8)), (
        "average over all heads, not the first only"
    )
    corner = torch.zeros_like(fine)
    corner[:, :, 3, 3] = 1.0  # row 0, column 3: the upper right corner
    spot = mine([corner], 3, 8)
    assert spot[:2, 6:].mean() > 4 * spot[6:, :2].mean() and spot[:2, 6:].mean() > 0.5, (
        "pixel 3 of a 4x4 map is its upper right corner: pixels run row by row"
    )
    passed("word_map", "One picture from layers of every size, each counted once.")


def hide_weight(mine) -> None:
    """Notebook 02: ``hide_weight(columns, tokens)``, the rows that zero each prompt's columns in a guided batch."""
    columns, tokens = [[2], [4, 5], [1, 2]], 7
    answer = mine([list(c) for c in columns], tokens)
    if untouched(answer, "hide_weight"):
        return
    n = len(columns)
    same_shape(answer, (2 * n, tokens), "hide_weight")
    answer = answer.float()
    assert ((answer == 0) | (answer == 1)).all(), "a column is either kept (1) or hidden (0)"
    assert answer.sum() < answer.numel(), "nothing is hidden yet"
    hidden = [sorted((row == 0).nonzero().flatten().tolist()) for row in answer]
    assert hidden[:n] != columns, (
        "the hidden columns stand in the first half: guidance puts the unconditional half first"
    )
    assert not any(hidden[:n]), "the first half is the unconditional one: keep all of it"
    for i in range(n):
        assert hidden[n + i] == columns[i], (
            f"row {n + i} belongs to prompt {i} and hides {hidden[n + i]}: expected {columns[i]}"
        )
    passed("hide_weight", "Each prompt hides its own columns, and the unconditional half hides none.")


def share_out(mine) -> None:
    """Notebook 02: ``share_out(A, weight)``, hiding columns so that every pixel's probabilities still sum to one."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, 3, 4, 6, generator=generator)
    weight = torch.ones(2, 6)
    weight[0, [1, 2]], weight[1, 4] = 0.0, 0.0
    A = scores.softmax(-1)
    given = A.clone()
    answer = mine(given, weight.clone())
    if untouched(answer, "share_out"):
        return
    same_shape(answer, tuple(A.shape), "share_out")
    assert torch.equal(given, A), "A itself was changed: make a new tensor"
    hidden = (weight == 0)[:, None, None, :].expand_as(A)
    assert (answer[hidden] == 0).all(), (
        "a hidden column still gets attention (is each row of weight used for its prompt?)"
    )
    assert torch.allclose(answer.sum(-1), torch.ones(2, 3, 4), atol=1e-5), "every pixel's probabilities must sum to one"
    assert torch.allclose(answer[..., :1] * A[..., 5:], answer[..., 5:] * A[..., :1], atol=1e-6), (
        "the tokens that stay must keep their proportions"
    )
    masked = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    assert torch.allclose(answer, masked, atol=1e-5), "compare with a softmax whose hidden scores are minus infinity"
    passed("share_out", "It equals a softmax whose hidden scores are minus infinity.")
