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


# --- 03 · re-steering -------------------------------------------------------------------------------------------------


def concept_columns() -> list[Tensor]:
    """A concept's two columns in two layers of different size, always the same: (2, heads, pixels, 2) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, heads, pixels, 2, generator=generator) for heads, pixels in ((2, 16), (4, 4))]


def resteering(mine) -> None:
    """Notebook 03: ``my_resteering(maps)``, the norm of all attention that the concept's tokens get (Eq. 4)."""
    answer = mine(concept_columns())
    if untouched(answer, "resteering"):
        return
    same_shape(answer, (), "resteering")
    three, four = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.4)
    got = mine([three, four]).item()
    assert abs(got - 0.7) > 1e-5, (
        "0.3 in one layer and 0.4 in another give 0.7: you add norms, Eq. 4 concatenates first"
    )
    assert abs(got - 0.5) < 1e-5, f"0.3 in one layer and 0.4 in another give {got:.3g}: expected their norm, 0.5"
    wide = mine([torch.full((1, 2, 4, 2), 0.25)]).item()
    assert abs(wide - 1) < 1e-5, (
        f"16 entries of 0.25, over heads, pixels and tokens, give {wide:.3g}: expected 1, a norm and no mean"
    )
    pair = mine([torch.cat([three, torch.zeros_like(three)])]).item()
    assert abs(pair - 0.15) < 1e-5, (
        f"two pictures, one with 0.3 and one with nothing, give {pair:.3g}: expected the mean of their losses, 0.15"
    )
    passed("resteering", "One norm for each picture, over all layers, heads, pixels and tokens.")


def resteering_gradient(mine) -> None:
    """Notebook 03: ``resteering_gradient(maps)``, the derivative of Eq. 4 for one picture, layer by layer."""
    from helpers.losses import resteering as loss

    maps = [A[:1] for A in concept_columns()]
    answer = mine([A.clone() for A in maps])
    if untouched(answer, "resteering_gradient"):
        return
    assert isinstance(answer, list | tuple) and len(answer) == len(maps), "give a list with one gradient for each layer"
    for got, A in zip(answer, maps, strict=True):
        same_shape(got, tuple(A.shape), "each gradient")
    length = sum(got.pow(2).sum() for got in answer).sqrt().item()
    assert abs(length - 1) < 1e-4, (
        f"your gradients, put end to end, have length {length:.3g}: expected 1, however much attention there is"
    )
    leaves = [A.clone().requires_grad_() for A in maps]
    for got, expected in zip(answer, torch.autograd.grad(loss(leaves), leaves), strict=True):
        assert torch.allclose(got, expected, atol=1e-5), (
            "autograd finds another gradient: mind the sign, and that all layers share one norm"
        )
    passed("resteering_gradient", "It points along the attention itself, and its length is one.")


def balanced(mine) -> None:
    """Notebook 03: ``balanced(maps)``, re-steering in which every layer counts the same."""
    answer = mine(concept_columns())
    if untouched(answer, "balanced"):
        return
    same_shape(answer, (), "balanced")

    def level(fine: float, coarse: float) -> float:
        return mine([torch.full((1, 2, 16, 2), fine), torch.full((1, 4, 4, 2), coarse)]).item()

    assert abs(level(0.2, 0.2) - 0.2) < 1e-5, "0.2 everywhere must give 0.2, however many entries there are"
    one, other = level(0.1, 0.3), level(0.3, 0.1)
    assert abs(one - other) < 1e-5, (
        f"0.1 in the large layer and 0.3 in the small one give {one:.3g}, exchanged {other:.3g}: expected the same"
    )
    assert abs(one - 0.05**0.5) < 1e-5, (
        f"layers of 0.1 and 0.3 give {one:.3g}: expected 0.224; square, mean over a layer, mean over layers, root last"
    )
    pair = mine([torch.cat([torch.full((1, 2, 4, 2), 0.2), torch.zeros(1, 2, 4, 2)])]).item()
    assert abs(pair - 0.1) < 1e-5, (
        f"two pictures, one with 0.2 and one with nothing, give {pair:.3g}: expected the mean of their losses, 0.1"
    )
    passed("balanced", "A layer's vote no longer depends on its number of pixels and heads.")


# --- 04 · distraction -------------------------------------------------------------------------------------------------


def distraction(mine) -> None:
    """Notebook 04: ``my_distraction(maps)``, each head's distance from an even map (Eq. 5)."""
    answer = mine(concept_columns())
    if untouched(answer, "distraction"):
        return
    same_shape(answer, (), "distraction")
    even, none = torch.full((1, 1, 4, 1), 0.25), torch.zeros(1, 1, 4, 1)
    assert abs(mine([even]).item()) < 1e-5, "0.25 at each of 4 pixels is what Eq. 5 asks for: expected 0"
    got = mine([none]).item()
    assert abs(got - 0.5) < 1e-5, f"no attention at 4 pixels gives {got:.3g}: expected the norm of four 0.25s, 0.5"
    assert abs(mine([torch.full((1, 1, 2, 2), 0.25)]).item()) < 1e-5, (
        "2 pixels and 2 tokens make 4 entries of the flattened A_i: dim(A_i) counts them all, and 0.25 is even"
    )
    heads = mine([none.expand(1, 4, 4, 1)]).item()
    assert abs(heads - 2) < 1e-5, f"4 heads at distance 0.5 give {heads:.3g}: expected 2, the sum of their norms"
    layers = mine([none, none]).item()
    assert abs(layers - 1) < 1e-5, f"2 layers of one head at distance 0.5 give {layers:.3g}: expected 1, their sum"
    pair = mine([torch.cat([even, none])]).item()
    assert abs(pair - 0.25) < 1e-5, (
        f"two pictures, one even and one without attention, give {pair:.3g}: expected the mean of 0 and 0.5"
    )
    passed("distraction", "Each head of each layer has its own distance, and they add up.")


def fair_lam(mine) -> None:
    """Notebook 04: ``fair_lam(maps)``, the weight at which distraction pulls on the maps as hard as re-steering."""
    from helpers import losses

    for kept in (slice(0, 2), slice(0, 1)):  # 6 heads in two layers, then 2 heads in one
        maps = [A[:1] for A in concept_columns()[kept]]
        answer = mine([A.clone() for A in maps])
        if untouched(answer, "fair_lam"):
            return
        pulls = []
        for loss in (losses.resteering, losses.distraction):
            leaves = [A.clone().requires_grad_() for A in maps]
            pulls.append(sum(g.pow(2).sum() for g in torch.autograd.grad(loss(leaves), leaves)).sqrt().item())
        value, heads = float(answer), sum(A.shape[1] for A in maps)
        assert abs(value * heads - 1) > 1e-4, (
            f"one over {heads} heads: their gradients share no entry, so they are perpendicular; lengths add as squares"
        )
        assert abs(value - pulls[0] / pulls[1]) < 1e-4, (
            f"with {heads} heads you give {value:.3g}: the gradients have lengths {pulls[0]:.3g} (re-steering) and "
            f"{pulls[1]:.3g} (distraction), and the weight has to make them equal"
        )
    passed("fair_lam", "The same weight means a harder pull when there are more heads.")


def evenness(mine) -> None:
    """Notebook 04: ``evenness(A)``, the entropy of each head's map of each token: 1 when even, 0 for one pixel."""
    A = torch.full((2, 3, 4, 2), 0.1)
    A[1, 2, :, 1] = torch.tensor([0.0, 0.5, 0.0, 0.0])
    A[0, 1, :, 0] = torch.tensor([0.0, 0.3, 0.3, 0.0])
    answer = mine(A.clone())
    if untouched(answer, "evenness"):
        return
    same_shape(answer, (2, 3, 2), "evenness")
    assert not torch.isnan(answer).any(), "a pixel without attention gives NaN: 0 log 0 counts as 0 (torch.xlogy)"
    assert abs(answer[0, 0, 0].item() - 1) < 1e-5, (
        f"0.1 at every pixel gives {answer[0, 0, 0].item():.3g}: expected 1; divide by the sum over pixels first"
    )
    assert abs(answer[1, 2, 1].item()) < 1e-5, "all attention at one pixel must give 0"
    assert abs(answer[0, 1, 0].item() - 0.5) < 1e-5, (
        f"two of four pixels give {answer[0, 1, 0].item():.3g}: expected log 2 / log 4 = 0.5"
    )
    passed("evenness", "It reads where a token is looked at, and not how much.")


# --- 05 · random stimulus ---------------------------------------------------------------------------------------------


def stimulus(mine) -> None:
    """Notebook 05: ``stimulus(maps, noise)``, Eq. 6 on attention maps (b, heads, pixels, n), one for each layer."""
    from helpers import losses

    zero, one = torch.zeros(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    answer = mine([zero.clone()], [one.clone()])
    if untouched(answer, "stimulus"):
        return
    same_shape(answer, (), "stimulus")
    got = answer.item()
    assert abs(got - 2) < 1e-5, (
        f"four entries that each miss by 1 give {got:.3g}: expected their norm, 2, neither squared nor averaged"
    )
    shape = (1, 1, 2, 2)
    got = mine([torch.zeros(shape)], [torch.ones(shape)]).item()
    assert abs(got - 2) < 1e-5, f"2 pixels and 2 tokens give {got:.3g}: expected one norm over all 4 entries of a head"
    got = mine([zero.expand(1, 4, 4, 1)], [one.expand(1, 4, 4, 1)]).item()
    assert abs(got - 8) < 1e-5, f"4 heads at distance 2 give {got:.3g}: expected 8, the sum of their norms"
    got = mine([zero, zero], [one, one]).item()
    assert abs(got - 4) < 1e-5, f"2 layers of one head at distance 2 give {got:.3g}: expected 4, their sum"
    got = mine([torch.cat([zero, one])], [torch.cat([one, one])]).item()
    assert abs(got - 1) < 1e-5, f"two pictures with losses 2 and 0 give {got:.3g}: expected their mean, 1"
    generator = torch.Generator().manual_seed(0)
    maps, noise = ([torch.rand(2, h, p, 2, generator=generator) for h, p in ((2, 16), (4, 4))] for _ in range(2))
    assert torch.allclose(mine(maps, noise), losses.random_stimulus(maps, noise=noise)), (
        "random maps do not give Eq. 6: is each R used for the map of its own layer?"
    )
    passed("stimulus", "One distance for each head, and the noise is the only thing that is random.")


def irreducible(mine) -> None:
    """Notebook 05: ``irreducible(entries, width)``, what noise from [0, width] leaves of the loss at its mean."""
    generator = torch.Generator().manual_seed(0)
    for entries, width in ((192, 1.0), (192, 0.25), (48, 1.0)):
        answer = mine(entries, width)
        if untouched(answer, "irreducible"):
            return
        value = float(answer)
        R = width * torch.rand(4000, entries, generator=generator)
        drawn = (R - width / 2).norm(dim=1).mean().item()
        said = f"{entries} entries from [0, {width:g}] give {value:.3g}"
        assert abs(value - R.norm(dim=1).mean().item()) > 0.02 * drawn, (
            f"{said}: that is the distance from A = 0; the best A is the mean of R"
        )
        assert abs(value - drawn**2) > 0.02 * drawn or abs(drawn - 1) < 0.1, (
            f"{said}: that is the length squared, take the root"
        )
        assert abs(value - drawn) < 0.01 * drawn, f"{said}, and 4000 draws are {drawn:.3g} from their mean on average"
    passed("irreducible", "No training goes below it, however long.")


def paired(mine) -> None:
    """Notebook 05: ``paired(a, b)``, the mean of same-seed differences and the standard error of that mean."""
    generator = torch.Generator().manual_seed(0)
    b = 10 * torch.randn(5, generator=generator)  # seeds differ far more than the two settings do
    a = b + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    answer = mine(a.clone(), b.clone())
    if untouched(answer, "paired"):
        return
    assert isinstance(answer, tuple | list) and len(answer) == 2, "paired returns two numbers: the mean and its error"
    mean, error = (float(x) for x in answer)
    assert abs(mean - 3) < 1e-4, f"differences 1, 2, 3, 4, 5 give the mean {mean:.3g}: expected 3, a minus b"
    assert error < 2, f"the error is {error:.3g}, as large as for separate seeds: take the differences first"
    assert abs(error - 2.5**0.5) > 1e-3, "that is the spread of the differences: the error of their mean is smaller"
    assert abs(error - (2.5 / 5) ** 0.5) < 1e-4, (
        f"the error is {error:.3g}: expected the root of 2.5 / 5, the variance (with n - 1) over the number of seeds"
    )
    passed("paired", "What the seeds share has dropped out.")


# --- 06 · Forget-Me-Not -----------------------------------------------------------------------------------------------


def fold_mask(mine) -> None:
    """Notebook 06: ``fold_mask(mask, heads)``, each picture's own columns where heads are folded into the batch."""
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    answer = mine(mask.clone(), 3)
    if untouched(answer, "fold_mask"):
        return
    same_shape(answer, (6, 1, 4), "fold_mask of 2 pictures, 3 heads and 4 tokens")
    folded = [[int(v) for v in row] for row in answer[:, 0]]
    assert folded != mask.repeat(3, 1).int().tolist(), (
        "your rows go picture 0, 1, 0, 1, 0, 1, which is the release's tiling: the maps go 0, 0, 0, 1, 1, 1, all heads of "
        "one picture before the next"
    )
    A = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # (b, heads, pixels, tokens)
    expected = (A * mask[:, None, None, :]).flatten(0, 1)
    assert torch.equal(A.flatten(0, 1) * answer, expected), (
        f"for masks {mask.int().tolist()} and 3 heads your rows are {folded}: expected the first picture's mask three "
        "times, then the second's, and nothing but zeros and ones"
    )
    passed("fold_mask", "With one picture in the batch both orders are the same, which is how the bug stayed unseen.")


def visual_loss(mine) -> None:
    """Notebook 06: ``visual_loss(x_t, eps_hat, x_0_tilde, a)``, the report's L_vis; a (b,) holds each alpha_bar_t."""
    x_t, eps_hat, x_0_tilde = random_predictions(3)
    a = torch.tensor([0.9, 0.04])
    answer = mine(x_t.clone(), eps_hat.clone(), x_0_tilde.clone(), a.clone())
    if untouched(answer, "visual_loss"):
        return
    same_shape(answer, (), "visual_loss")
    one = torch.ones(1, 1, 1, 1)
    got = mine(one, 0 * one, 0 * one, torch.tensor([0.25])).item()
    assert abs(got - 4) < 1e-4, (
        f"x_t 1, no noise predicted, alpha_bar 0.25 and a target of 0 give {got:.3g}: expected 4, the square of 1 / sqrt(0.25)"
    )
    got = mine(0 * one, one, 0 * one, torch.tensor([0.25])).item()
    assert abs(got - 3) < 1e-4, (
        f"x_t 0, predicted noise 1 and alpha_bar 0.25 give {got:.3g}: expected 0.75 / 0.25 = 3, the noise's share squared"
    )
    from helpers.diffusion import predict_x0

    x_0_hat = predict_x0(x_t, eps_hat, torch.arange(2), a)
    expected = (x_0_hat - x_0_tilde).pow(2).mean()
    assert torch.isclose(answer, expected, rtol=1e-4), (
        f"two pictures with different alpha_bar give {answer.item():.4g}: expected {expected.item():.4g}, each with its own "
        "alpha_bar, and the mean over all entries"
    )
    leaves = [eps_hat.clone().requires_grad_(), x_0_tilde.clone().requires_grad_()]
    mine(x_t, *leaves, a).backward()
    assert leaves[0].grad is not None, "no gradient reaches eps_hat: then nothing is trained"
    assert leaves[1].grad is None, "a gradient reaches the target: it is given, only x_0_hat may move (detach it)"
    passed("visual_loss", "The guess moves, the target stays.")


def min_snr(mine) -> None:
    """Notebook 06: ``min_snr(alpha_bar, gamma)``, the weights under which no error of the noise counts more than once."""
    alpha_bar = torch.tensor([0.99, 0.5, 0.2, 0.01])
    answer = mine(alpha_bar.clone(), 5.0)
    if untouched(answer, "min_snr"):
        return
    same_shape(answer, (4,), "min_snr")
    gain = (1 - alpha_bar) / alpha_bar
    assert (answer * gain).max() <= 1 + 1e-4, (
        f"under your weights errors of the noise count {[round(v, 2) for v in (answer * gain).tolist()]} times: expected at "
        "most 1 (the weight has to shrink where 1 / alpha_bar grows)"
    )
    assert torch.allclose(answer[1:], 1 / gain[1:], atol=1e-4), (
        "where the signal-to-noise ratio is below gamma the weight is that ratio, so that an error counts exactly once"
    )
    assert abs(answer[0].item() - 5) < 1e-4, f"at alpha_bar 0.99 you give {answer[0].item():.3g}: expected gamma, 5"
    assert abs(mine(alpha_bar, 2.0)[0].item() - 2) < 1e-4, "with gamma 2 the largest weight is 2"
    passed("min_snr", "Noisy timesteps have lost their advantage, and clean ones gain none.")


def memory(mine) -> None:
    """Notebook 06: ``memory(before, after)``, our M-Score of inverted tokens, (seeds, tokens, width) each."""
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
    cosines = [
        (b @ a / (b.norm() * a.norm())).item() for b, a in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
    ]
    expected = sum(cosines) / len(cosines)
    assert abs(value - expected) < 1e-4, (
        f"random tokens give {value:.4f}: expected {expected:.4f}, the mean of {len(cosines)} cosines, each of one token of "
        "one seed with its counterpart"
    )
    passed("memory", "Whether a low score means forgotten or only elsewhere, it cannot tell.")


# --- 07 · G-CiRs ------------------------------------------------------------------------------------------------------


def correlation_slope(mine) -> None:
    """Notebook 07: ``correlation_slope(base, edited)``, the derivative of L_cor (Eq. 2) with respect to ``edited``."""
    from helpers.losses import correlation

    base, edited, other = random_predictions(3)
    answer = mine(base.clone(), edited.clone())
    if untouched(answer, "correlation_slope"):
        return
    same_shape(answer, tuple(base.shape), "correlation_slope")
    assert not torch.allclose(answer, base), "you give the derivative of the sum: Eq. 2 takes the mean"
    assert torch.allclose(mine(base.clone(), other), answer, atol=1e-7), (
        "your slope changes with the edited model: the loss is linear in it, so its slope cannot"
    )
    leaf = edited.clone().requires_grad_()
    (expected,) = torch.autograd.grad(correlation(base, leaf), leaf)
    assert torch.allclose(answer, expected, atol=1e-7), (
        f"autograd finds {expected.flatten()[0].item():.4f} for the first entry, you give {answer.flatten()[0].item():.4f}"
    )
    passed("correlation_slope", "The edited model is nowhere in it: the slope is as steep at zero as at the start.")


def stop_step(mine) -> None:
    """Notebook 07: ``stop_step(values, tau, momentum, min_steps)``, after how many updates the run ends (Eq. 4)."""
    falling = [1.0, -2.0, -2.0, -2.0, -2.0]  # statistic at momentum 0.8: 1, 0.4, -0.08, ...
    answer = mine(list(falling), 0.0, 0.8, 1)
    if untouched(answer, "stop_step"):
        return
    assert isinstance(answer, int), f"stop_step returns {type(answer).__name__}: expected a whole number"
    assert answer == 3, (
        f"for the values {falling} and momentum 0.8 you stop after {answer} updates: expected 3. The statistic is 1, 0.4, "
        "-0.08: it starts at the first value, keeps 0.8 of itself at each update, and updates count from 1"
    )
    got = mine(list(falling), 0.5, 0.8, 1)
    assert got == 2, f"with tau 0.5 you stop after {got} updates: expected 2, where the statistic is 0.4"
    got = mine(list(falling), 0.0, 0.8, 5)
    assert got == 5, f"with min_steps 5 you stop after {got} updates: expected 5, no stop before"
    back = [1.0, -2.0, -2.0, 9.0, 1.0, 1.0]
    got = mine(list(back), 0.0, 0.8, 4)
    assert got == len(back), (
        f"the statistic dips below tau before min_steps and is back above it by then, and you stop after {got} updates: "
        f"expected all {len(back)}, for only the present statistic counts"
    )
    got = mine([1.0] * 7, 0.0, 0.9, 1)
    assert got == 7, f"a statistic that never falls below tau ends the run after {got} updates: expected all 7"
    passed("stop_step", "A smoothed value, tested after each update.")


def eta_gradients(mine) -> None:
    """Notebook 07: ``eta_gradients(first, second, detach)``, what reaches two concepts' losses through Eq. 3's sum."""
    answer = mine(3.0, 2.0, True)
    if untouched(answer, "eta_gradients"):
        return

    def pair(first: float, second: float, detach: bool) -> list[float]:
        got = mine(first, second, detach)
        assert isinstance(got, tuple | list) and len(got) == 2, "give the two gradients: (of first, of second)"
        return [float(value) for value in got]

    cases = [
        (3.0, 2.0, True, (1.0, 1.5), "eta is the number 3 / 2, and only multiplies the second gradient"),
        (3.0, -2.0, True, (1.0, 1.5), "eta is a ratio of absolute values: it does not turn the second loss round"),
        (3.0, 2.0, False, (2.0, 0.0), "eta L_2 is |L_1|, so L_1 counts twice and L_2 cancels"),
        (3.0, -2.0, False, (0.0, 0.0), "eta L_2 is -|L_1|, which cancels L_1 as well"),
    ]
    for first, second, detach, expected, why in cases:
        got = pair(first, second, detach)
        assert all(abs(a - b) < 1e-4 for a, b in zip(got, expected, strict=True)), (
            f"for L_1 = {first:g}, L_2 = {second:g} and detach={detach} you give ({got[0]:.3g}, {got[1]:.3g}): "
            f"expected ({expected[0]:g}, {expected[1]:g}); {why}"
        )
    passed("eta_gradients", "As printed, no concept but the first is trained; detached, all of them are.")


# --- 08 · SepME -------------------------------------------------------------------------------------------------------


def null_space(mine) -> None:
    """Notebook 08: ``my_null_space(A, tolerance)``, an orthonormal basis of all x with A x = 0, as columns."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    A[3] = A[0] - 2 * A[1]  # rank 3
    answer = mine(A.clone(), 1e-6)
    if untouched(answer, "my_null_space"):
        return
    assert isinstance(answer, Tensor), f"my_null_space returns {type(answer).__name__}: expected a tensor"
    assert tuple(answer.shape) != (9, 5), (
        "5 columns: one of the 4 rows is a combination of others, so the rank is 3; count the singular values above "
        "tolerance * the largest, not the rows"
    )
    same_shape(answer, (9, 6), "my_null_space")
    answer = answer.double()
    assert torch.allclose(answer.T @ answer, torch.eye(6, dtype=torch.float64), atol=1e-5), (
        "the columns must have length 1 and be perpendicular (are they rows of Vh, transposed?)"
    )
    assert (A @ answer).abs().max() < 1e-5, (
        "A S is not zero: the directions that A does not see are the last rows of Vh, those after the rank"
    )
    nearly = torch.cat([A, A + 1e-9 * torch.randn(A.shape, generator=generator, dtype=A.dtype)])
    same_shape(mine(nearly, 1e-6), (9, 6), "my_null_space of rows that are equal but for rounding")
    same_shape(mine(1e6 * nearly, 1e-6), (9, 6), "my_null_space of these rows times a million (is tolerance relative?)")
    rows = A[:3].float()  # independent, so that nothing but the arithmetic is tested
    assert (rows.double() @ mine(rows, 1e-6).double()).abs().max() < 1e-10, (
        "given float32 rows, A S is only as small as float32 can make it: turn A into float64 first"
    )
    passed("my_null_space", "A does not see these directions, and nothing else escapes it.")


def capacity(mine) -> None:
    """Notebook 08: ``capacity(width, length)``, how many prompts can be protected before no direction is left."""
    answer = mine(768, 77)
    if untouched(answer, "capacity"):
        return
    assert isinstance(answer, int), f"capacity returns {type(answer).__name__}: expected a whole number"
    assert answer != 9, "9 for Stable Diffusion 1.4: the start mark's row is shared by all prompts, count it once"
    assert answer == 10, f"{answer} for 77 tokens of width 768: expected 10, which have rank 1 + 76 * 10 = 761"
    got = mine(256, 16)
    assert got == 16, (
        f"{got} for 16 tokens of width 256: expected 16; 17 prompts would have rank 1 + 15 * 17 = 256, the whole width"
    )
    assert mine(1024, 77) == 13 and mine(100, 12) == 8, "try 77 tokens of width 1024 (13) and 12 of width 100 (8)"
    passed("capacity", "At least one direction is left, or there is nothing to train.")


# --- 09 · measuring forgetting ----------------------------------------------------------------------------------------


def pictures_needed(mine) -> None:
    """Notebook 09: ``pictures_needed(top)``, so many pictures without a hit bring the interval's upper end to top."""
    from helpers.metrics import interval

    for top in (0.05, 0.25, 0.01):
        answer = mine(top)
        if untouched(answer, "pictures_needed"):
            return
        assert isinstance(answer, int) and answer > 1, f"for top {top} you give {answer!r}: expected a whole number"
        end, before = interval(0.0, answer)[1], interval(0.0, answer - 1)[1]
        assert end <= top, f"0 of {answer} pictures leave the upper end at {end:.4f}, still above {top}: take more"
        assert before > top, f"{answer} pictures are enough for {top}, but {answer - 1} would do: give the fewest"
    passed("pictures_needed", "So many clean pictures stand behind each 'at most' of a table.")


def layer_distance(mine) -> None:
    """Notebook 09: ``layer_distance(f_a, f_b)``, one layer's part of LPIPS: (n, channels, h, w) twice -> (n,)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 5, 4, 4, generator=generator)  # as after a ReLU: nothing is negative
    answer = mine(a.clone(), b.clone())
    if untouched(answer, "layer_distance"):
        return
    same_shape(answer, (3,), "layer_distance")
    assert torch.allclose(mine(a, a), torch.zeros(3), atol=1e-6), "equal features are no distance apart: expected 0"
    red, green = (torch.eye(5)[i].view(1, 5, 1, 1).expand(1, 5, 4, 4) for i in (0, 1))
    got = mine(red, green).item()
    assert abs(got - 2) < 1e-5, (
        f"at every place one unit vector against another, perpendicular one: {got:.3g}, and expected |(1, -1)|^2 = 2. "
        "Sum over channels, average over places, take no root"
    )
    corner = green.clone()
    corner[..., 1:, :], corner[..., 1:] = red[..., 1:, :], red[..., 1:]
    got = mine(red, corner).item()
    assert abs(got - 2 / 16) < 1e-5, f"a difference at one of 16 places gives {got:.3g}: expected 2 / 16"
    light = 0.1 + torch.rand(3, 1, 4, 4, generator=generator)
    assert torch.allclose(mine(light * a, b), answer, atol=1e-5), (
        "features made stronger at some places changed the distance: each place's vector of channels has length one first"
    )
    dark = mine(torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 4, 4))
    assert not torch.isnan(dark).any(), "where a ReLU leaves only zeros the length is zero: do not divide by it"
    passed("layer_distance", "Directions of features are compared, place by place; how strong they are does not count.")


def canvas(mine) -> None:
    """Notebook 09: ``canvas(asked, said, concept, domain)``, UA, IRA and CRA; pairs are (style, thing)."""
    asked = [("Twemoji", "church"), ("Twemoji", "dog"), *[("Noto", "church"), ("OpenMoji", "dog")] * 2]
    styles = ("Twemoji", "blank", "Noto", "OpenMoji", "Noto", "Noto")
    said = list(zip(styles, ("dog", "dog", "church", "dog", "dog", "dog"), strict=True))
    expected = {("Twemoji", 0): (1 / 2, 3 / 4, 3 / 4), ("church", 1): (2 / 3, 1.0, 1 / 3)}
    for (concept, domain), wanted in expected.items():
        answer = mine(list(asked), list(said), concept, domain)
        if untouched(answer, "canvas"):
            return
        assert isinstance(answer, tuple | list) and len(answer) == 3, "canvas returns three numbers: (UA, IRA, CRA)"
        for name, got, right in zip(("UA", "IRA", "CRA"), answer, wanted, strict=True):
            assert abs(float(got) - right) < 1e-6, (
                f"{concept} erased: your {name} is {float(got):.3g}, expected {right:.3g}. UA looks at the pictures that "
                "were asked for with the concept; IRA and CRA at all others, and at nothing else"
            )
    passed("canvas", "What should be gone, what should be kept beside it, and what the other domain noticed.")


# --- 10 · baselines ---------------------------------------------------------------------------------------------------


def erasing_target(mine) -> None:
    """Notebook 10: ``erasing_target(eps_null, eps_c, eta, newer)``, ESD's target in either release's sense of eta."""
    from helpers.losses import negated_guidance

    null, c, _ = random_predictions(3)
    answer = mine(null, c, 1.0, False)
    if untouched(answer, "erasing_target"):
        return
    same_shape(answer, tuple(c.shape), "erasing_target")
    assert torch.allclose(mine(null, c, 0.0, False), null, atol=1e-5), (
        "in the paper's sense eta = 0 asks for nothing but the unconditional prediction"
    )
    zero, two = torch.zeros(1, 1), torch.full((1, 1), 2.0)
    got = mine(zero, two, 1.5, False).item()
    assert abs(got + 3) < 1e-5, (
        f"with eps_null 0, eps_c 2 and the paper's eta 1.5 you give {got:.3g}: expected -3, 1.5 times 2 on the other side"
    )
    assert torch.allclose(answer, negated_guidance(null, c), atol=1e-5), "compare with eps_null - (eps_c - eps_null)"
    assert torch.allclose(mine(null, c, 0.0, True), c, atol=1e-5), (
        "the newer release counts from eps_c: its eta = 0 leaves the concept as it is"
    )
    got = mine(zero, two, 2.0, True).item()
    assert abs(got + 2) < 1e-5, (
        f"with eps_null 0, eps_c 2 and the newer eta 2 you give {got:.3g}: expected 2 - 2 * 2 = -2"
    )
    for eta in (1.0, 3.0):
        assert torch.allclose(mine(null, c, eta + 1, True), mine(null, c, eta, False), atol=1e-5), (
            f"the newer eta = {eta + 1:g} must be the paper's eta = {eta:g}"
        )
    passed("erasing_target", "The same number means two things: say which release an eta comes from.")


def negative_prompt_scale(mine) -> None:
    """Notebook 10: ``negative_prompt_scale(guidance, eta)``, with which a negative prompt draws as a perfect ESD student."""
    from helpers.diffusion import guide
    from helpers.losses import negated_guidance

    answer = mine(5.0, 1.0)
    if untouched(answer, "negative_prompt_scale"):
        return
    null, c, _ = random_predictions(3)
    for g, eta in ((5.0, 0.0), (5.0, 1.0), (3.0, 2.0)):
        scale = float(mine(g, eta))
        wanted = guide(null, negated_guidance(null, c, eta), g)  # the student's drawing, its prompt leading away
        weight = ((wanted - null) / (c - null)).mean().item()  # of the base's own difference
        assert torch.allclose(guide(c, null, scale), wanted, atol=1e-3), (
            f"for guidance {g:g} and eta {eta:g} you give {scale:.3g}: the student draws with eps_null {weight:+g} times "
            f"(eps_c - eps_null), and guidance of scale {scale:.3g} from eps_c to eps_null with {1 - scale:+.3g} times it"
        )
    passed("negative_prompt_scale", "ESD writes a negative prompt into the weights.")


def matching_ema(mine) -> None:
    """Notebook 10: ``matching_ema(m, theirs, ours)``, the teacher that remembers as much in other many steps."""
    answer = mine(0.999, 1500, 80)
    if untouched(answer, "matching_ema"):
        return
    left = 0.999**1500
    got = float(answer) ** 80
    assert abs(float(answer) - 1.0) > 1e-6, "with m = 1 the teacher never moves"
    assert abs(got - left) < 1e-3, (
        f"with your m = {float(answer):.4f}, {got:.3f} of the start is left after 80 steps: expected what 0.999 leaves "
        f"after 1500, {left:.3f}"
    )
    assert abs(float(mine(0.5, 2, 4)) - 0.5**0.5) < 1e-6, "0.5 over 2 steps leaves a quarter: over 4 steps take 0.707"
    assert abs(float(mine(0.9, 30, 30)) - 0.9) < 1e-6, "as many steps, the same m"
    passed("matching_ema", "A memory is counted in steps: who shortens the training shortens it too.")


def front(mine) -> None:
    """Notebook 10: ``front(points)``, the indices of the methods that no other one beats in both respects."""
    points = [(0.9, 0.5), (0.5, 0.9), (0.4, 0.8), (0.9, 0.4), (0.2, 0.95), (0.7, 0.7)]
    answer = mine(list(points))
    if untouched(answer, "front"):
        return

    def indices(points: list[tuple[float, float]]) -> list[int]:
        got = mine(list(points))
        assert isinstance(got, list | tuple | set), f"front returns {type(got).__name__}: expected a list of indices"
        assert all(isinstance(i, int) for i in got), f"front returns {got}: expected indices, counted from 0"
        return sorted(got)

    got = indices(points)
    assert 2 not in got, "(0.4, 0.8) is beaten by (0.5, 0.9), which forgets more and keeps more"
    assert 3 not in got, "(0.9, 0.4) is beaten by (0.9, 0.5): as forgetful, and it keeps more"
    assert got == [0, 1, 4, 5], f"of {points} you keep {got}: expected [0, 1, 4, 5]"
    assert indices([(0.5, 0.5), (0.5, 0.5)]) == [0, 1], "two equal points do not beat each other: keep both"
    assert indices([(0.3, 0.3)]) == [0], "who stands alone is beaten by nobody"
    passed("front", "Methods on the front trade one good for the other; only off it is one simply worse.")


# --- 11 · the papers' tables ------------------------------------------------------------------------------------------


def rank_correlation(mine) -> None:
    """Notebook 11: ``rank_correlation(a, b)``, Spearman's."""
    answer = mine([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 40.0, 3.0])
    if untouched(answer, "rank_correlation"):
        return

    def close(got: float, expected: float, why: str) -> None:
        assert abs(float(got) - expected) < 1e-6, f"you give {float(got):.3f}: expected {expected:.3f}, {why}"

    close(answer, 0.8, "two neighbours have changed places; how large the largest value is does not matter to ranks")
    close(mine([1.0, 2.0, 3.0], [9.0, 4.0, 1.0]), -1.0, "for the reverse order")
    close(mine([5.0, 1.0, 3.0], [2.0, 7.0, 1.0]), -0.5, "for values that are not sorted")
    close(mine([3.0, 5.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0]), 0.9486832980505138, "where equal values share their rank")
    passed("rank_correlation", "Only the order counts, and equal values stand beside each other.")


def verdict(mine) -> None:
    """Notebook 11: ``verdict(d)``, what follows for a claim from one difference for each training seed."""
    answer = mine([0.1, 0.1, 0.2])
    if untouched(answer, "verdict"):
        return
    words = {"holds", "does not hold", "cannot be told here"}
    cases = {
        (0.5, 0.6, 0.55): ("holds", "the mean is far above its half-width"),
        (-0.5, -0.6, -0.55): ("does not hold", "the interval lies below zero"),
        (0.1, 0.1, 0.2): ("cannot be told here", "all are positive, and t for two degrees of freedom is 4.3"),
        (0.3, -0.3, 0.01): ("cannot be told here", "the seeds do not agree"),
        (0.6,): ("cannot be told here", "one seed has no spread"),
        (0.2, 0.2, 0.2): ("holds", "three equal differences have an interval of no width"),
        (0.05, 0.06, 0.12, 0.1): ("holds", "with four seeds t is 3.2: divide by k - 1, and the root of k"),
        (0.02, 0.03, 0.07): ("cannot be told here", "the spread is too large for three seeds"),
    }
    for d, (word, why) in cases.items():
        got = mine(list(d))
        assert got in words, f"you answer {got!r}: expected one of {', '.join(sorted(words))}"
        assert got == word, f"for d = {list(d)} you say {got!r}: expected {word!r}, {why}"
    passed("verdict", "A claim needs more than a sign: it needs a sign that the next training would repeat.")
