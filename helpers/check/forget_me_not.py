"""Checks of the notebook on Forget-Me-Not: masks, visual denoising, and the M-Score."""

import torch

from helpers.check.common import passed, same_shape, untouched


def fold_mask(mine) -> None:
    """``fold_mask(mask, heads)``, each image's own columns where heads are part of the batch."""
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    answer = mine(mask.clone(), 3)
    if untouched(answer, "fold_mask"):
        return
    same_shape(answer, (6, 1, 4), "fold_mask of 2 images, 3 heads and 4 tokens")
    folded = [[int(v) for v in row] for row in answer[:, 0]]
    assert folded != mask.repeat(3, 1).int().tolist(), (
        "your rows go image 0, 1, 0, 1, 0, 1, as the release tiles them. "
        "The maps go 0, 0, 0, 1, 1, 1: all heads of one image before the next"
    )
    A = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # (b, heads, pixels, n)
    expected = (A * mask[:, None, None, :]).flatten(0, 1)
    assert torch.equal(A.flatten(0, 1) * answer, expected), (
        f"for masks {mask.int().tolist()} and 3 heads your rows are {folded}: expected the first "
        "image's mask three times, then the second's, and nothing but zeros and ones"
    )
    passed("fold_mask", "With one image in the batch both orders agree, which hid the bug.")


def min_snr(mine) -> None:
    """``min_snr(alpha_bar, gamma)``, weights that count no error of the noise more than once."""
    alpha_bar = torch.tensor([0.99, 0.5, 0.2, 0.01])
    answer = mine(alpha_bar.clone(), 5.0)
    if untouched(answer, "min_snr"):
        return
    same_shape(answer, (4,), "min_snr")
    gain = (1 - alpha_bar) / alpha_bar
    counted = answer * gain
    assert counted.max() <= 1 + 1e-4, (
        f"with your weights errors of the noise count {[round(v, 2) for v in counted.tolist()]} "
        "times: expected at most 1 (the weight has to shrink where 1 / alpha_bar grows)"
    )
    assert torch.allclose(answer[1:], 1 / gain[1:], atol=1e-4), (
        "where the signal-to-noise ratio is below gamma the weight is that ratio, "
        "so that an error counts exactly once"
    )
    assert abs(answer[0].item() - 5) < 1e-4, (
        f"at alpha_bar 0.99 you give {answer[0].item():.3g}: expected gamma, 5"
    )
    assert abs(mine(alpha_bar, 2.0)[0].item() - 2) < 1e-4, "with gamma 2 the largest weight is 2"
    passed("min_snr", "Noisy timesteps have lost their advantage, and clean ones gain none.")


def memory(mine) -> None:
    """``memory(before, after)``, our M-Score of inverted tokens, (seeds, tokens, width) each."""
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 3, 2, 8, generator=generator)
    answer = mine(before.clone(), after.clone())
    if untouched(answer, "memory"):
        return
    value = float(answer)
    same = float(mine(before, before))
    assert abs(same - 1) < 1e-4, f"the same tokens before and after give {same:.3g}: expected 1"
    lengths = torch.tensor([0.1, 10.0])[:, None]
    longer = float(mine(before, lengths * after))
    assert abs(longer - value) < 1e-4, (
        "a token's length changes your score: each token has its own cosine, taken before any mean"
    )
    opposite = float(mine(before, -before))
    assert abs(opposite + 1) < 1e-4, f"opposite tokens give {opposite:.3g}: expected -1"
    pairs = zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
    cosines = [(b @ a / (b.norm() * a.norm())).item() for b, a in pairs]
    expected = sum(cosines) / len(cosines)
    assert abs(value - expected) < 1e-4, (
        f"random tokens give {value:.4f}: expected {expected:.4f}, the mean of {len(cosines)} "
        "cosines, each of one token of one seed with its counterpart"
    )
    passed("memory", "A low score may mean forgotten or moved: it cannot tell which.")
