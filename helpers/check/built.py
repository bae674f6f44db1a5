"""Checks of the exercises in which the heart of a notebook is written, in three steps each."""

import torch
from torch import Tensor

from helpers import diffusion
from helpers.check.common import passed, three_steps, untouched


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of these shapes, always the same numbers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def both_steps(mine) -> None:
    """``both_steps(x_t, eps, z, now, prev)``: the guess, DDIM's step from it, and DDPM's."""
    x_t, eps, z = normal(*[(2, 4, 3, 3)] * 3)
    now, prev = 0.3, 0.5
    answer = mine(x_t.clone(), eps.clone(), z.clone(), now, prev)
    if untouched(answer, "both_steps"):
        return
    right = {
        "x_0": (x_t - (1 - now) ** 0.5 * eps) / now**0.5,
        "ddim": diffusion.ddim_step(x_t, eps, now, prev),
        "ddpm": diffusion.ddpm_step(x_t, eps, now, prev, z),
    }
    hints = (
        "solve x_t = sqrt(now) x_0 + sqrt(1 - now) eps for x_0",
        "the guess and the *same* eps, with the square roots of prev and 1 - prev",
        "alpha = now / prev, beta = 1 - alpha, and z times the root of beta (1 - prev) / (1 - now)",
    )
    three_steps(answer, right, hints)
    passed("both_steps", "All that a scheduler does, in a few lines.")


def attend(mine) -> None:
    """``attend(h, C, W_q, W_k, W_v, heads)``: queries by head, probabilities, and the output."""
    heads, d = 2, 3
    h, C, W_q, W_k, W_v = normal((5, 4), (7, 8), (6, 4), (6, 8), (6, 8))
    answer = mine(h.clone(), C.clone(), W_q.clone(), W_k.clone(), W_v.clone(), heads)
    if untouched(answer, "attend"):
        return
    q, k, v = (
        (x @ W.T).reshape(len(x), heads, d).transpose(0, 1)
        for x, W in ((h, W_q), (C, W_k), (C, W_v))
    )
    A = (q @ k.transpose(1, 2) / d**0.5).softmax(-1)
    right = {"q": q, "A": A, "out": (A @ v).transpose(0, 1).reshape(5, 6)}
    hints = (
        "h @ W_q.T, its width cut into heads of d numbers: (heads, pixels, d)",
        "the softmax over the text positions, of q k^T over the root of d (of one head's width)",
        "A @ v for each head, the heads side by side again: (pixels, heads * d)",
    )
    three_steps(answer, right, hints)
    passed("attend", "A whole cross-attention layer but for its last linear map.")


def look_away(mine) -> None:
    """``look_away(h, C, W, delta, column, lr)``: one update of re-steering on one head's keys."""
    q, C, W, delta = normal((5, 3), (7, 4), (3, 4), (3, 4))
    column, lr = 2, 0.5
    answer = mine(q.clone(), C.clone(), W.clone(), 0.1 * delta, column, lr)
    if untouched(answer, "look_away"):
        return
    leaf = (0.1 * delta).requires_grad_()
    A = (q @ (C @ (W + leaf).T).T / 3**0.5).softmax(-1)
    loss = A[:, column].norm()
    (slope,) = torch.autograd.grad(loss, leaf)
    right = {"A": A.detach(), "loss": loss.detach(), "delta": leaf.detach() - lr * slope}
    hints = (
        "the keys are C @ (W + delta).T, and the softmax runs over the text positions",
        "the norm of the concept's column, not squared, over all pixels",
        "delta minus lr times the gradient of the loss by delta (torch.autograd.grad); W stays",
    )
    three_steps(answer, right, hints)
    passed("look_away", "W never moved: what training makes is the increment.")


def even_pull(mine) -> None:
    """``even_pull(A)``: Eq. 5's target for one layer, each head's distance, and its pull."""
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(3, 8, 2, generator=generator)
    answer = mine(A.clone())
    if untouched(answer, "even_pull"):
        return
    gap = A - 1 / 16
    distances = gap.flatten(1).norm(dim=1)
    right = {"target": 1 / 16, "distances": distances, "gradient": gap / distances[:, None, None]}
    hints = (
        "1 / dim(A_i): one head's entries are counted, pixels times columns",
        "one norm for each head, over its pixels and columns",
        "the derivative of a norm: the difference over its own length, of each head",
    )
    three_steps(answer, right, hints)
    passed("even_pull", "Every head pulls with length one, however near its target is.")


def floors(mine) -> None:
    """``floors(entries, width, columns)``: the length of A - R without attention, at best, and as
    near as a softmax comes."""
    for entries, width, columns in ((192, 1.0, 12), (48, 0.25, 4)):
        answer = mine(entries, width, columns)
        if untouched(answer, "floors"):
            return
        noise, mean = width**2 / 12, width / 2
        best = min(mean, 1 / columns)
        right = {
            "none": (entries * width**2 / 3) ** 0.5,
            "floor": (entries * noise) ** 0.5,
            "softmax": (entries * (noise + (mean - best) ** 2)) ** 0.5,
        }
        hints = (
            "the mean of R^2 for R uniform in [0, width], for every entry, and the root of the sum",
            "A sits at the mean of R, so the variance of one entry is left, width^2 / 12",
            "a mean entry is at most 1 / columns: its distance from width / 2, squared, comes on "
            "top of the variance (and is nothing where 1 / columns is more than width / 2)",
        )
        three_steps(answer, right, hints)
    passed("floors", "The second is the floor on paper, the third the one that a run can reach.")


def two_losses(mine) -> None:
    """``two_losses(A, mask, x_t, eps_hat, x_0_tilde, alpha_bar)``: its two losses, and x_0."""
    x_t, eps_hat, x_0_tilde = normal(*[(2, 4, 3, 3)] * 3)
    A = normal((2, 3, 9, 7))[0].softmax(-1)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 2], mask[1, 3:5] = True, True
    a = torch.tensor([0.9, 0.2])
    answer = mine(A.clone(), mask.clone(), x_t.clone(), eps_hat.clone(), x_0_tilde.clone(), a)
    if untouched(answer, "two_losses"):
        return
    a = a[:, None, None, None]
    x_0 = (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
    attention = (A.pow(2) * mask[:, None, None]).sum((1, 2, 3)).mean()
    right = {"attention": attention, "x_0": x_0, "visual": (x_0 - x_0_tilde).pow(2).mean()}
    hints = (
        "squares, summed over heads, pixels and each picture's *own* marked columns; then the mean "
        "over pictures",
        "each picture has its own alpha_bar",
        "the mean of all squared differences from x_0_tilde",
    )
    three_steps(answer, right, hints)
    leaves = [eps_hat.clone().requires_grad_(), x_0_tilde.clone().requires_grad_()]
    mine(A, mask, x_t, *leaves, a.flatten())["visual"].backward()
    assert leaves[0].grad is not None, "no gradient reaches eps_hat: then nothing is trained"
    assert leaves[1].grad is None, (
        "a gradient reaches the target: only x_0 may change (detach x_0_tilde)"
    )
    passed("two_losses", "One loss says where not to look, the other what to see instead.")


def erase_step(mine) -> None:
    """``erase_step(W, delta, c, null, eta, lr)``: one update of ESD on the smallest of networks,
    eps(s) = (W + delta) s."""
    W, delta, c, null = normal((3, 4), (3, 4), (4,), (4,))
    eta, lr = 1.5, 0.1
    answer = mine(W.clone(), 0.1 * delta, c.clone(), null.clone(), eta, lr)
    if untouched(answer, "erase_step"):
        return
    delta = 0.1 * delta
    target = W @ null - eta * (W @ c - W @ null)
    gap = (W + delta) @ c - target
    right = {
        "target": target,
        "loss": gap.pow(2).mean(),
        "delta": delta - lr * 2 / len(gap) * torch.outer(gap, c),
    }
    hints = (
        "the *frozen* network's predictions, W @ null and W @ c: what the prompt adds, reversed",
        "the mean squared difference of the edited network's (W + delta) @ c from the target",
        "delta minus lr times the gradient of the loss by delta; no gradient through the target",
    )
    three_steps(answer, right, hints)
    passed("erase_step", "SDD and AbConcept change the first line, and nothing else.")


def irrelevant(mine) -> None:
    """``irrelevant(base, edited, m, momentum)``: G-CiRs' loss from two pairs of predictions, and
    its smoothed statistic."""
    null, c, null_2, c_2 = normal(*[(2, 4, 3, 3)] * 4)
    answer = mine((null.clone(), c.clone()), (null_2.clone(), c_2.clone()), 0.4, 0.9)
    if untouched(answer, "irrelevant"):
        return
    added = torch.stack([c - null, c_2 - null_2])
    loss = (added[0] * added[1]).mean()
    right = {"adds": added, "loss": loss, "m": 0.9 * 0.4 + 0.1 * loss}
    hints = (
        "what the prompt adds for each network, c minus null, stacked: the base's first",
        "the mean of the product of the two: no absolute value, no square",
        "momentum times the old value, plus (1 - momentum) times the new loss",
    )
    three_steps(answer, right, hints)
    passed("irrelevant", "The loss has a sign, and the run ends where its average changes it.")


def unseen_increment(mine) -> None:
    """``unseen_increment(A, w)``: the part of w that the rows of A do not see, and the proof."""
    A, w = normal((3, 6), (2, 6), dtype=torch.float64)
    answer = mine(A.clone(), w.clone())
    if untouched(answer, "unseen_increment"):
        return
    P = torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(A) @ A
    right = {"P": P, "delta": w @ P, "moved": torch.zeros(3, 2, dtype=torch.float64)}
    hints = (
        "S @ S.T projects on the null space, (width, width): S are the rows of Vh after the rank, "
        "as columns",
        "each row of w, projected",
        "the keys of the protected rows move by A @ delta.T: (rows of A, rows of w), all zero",
    )
    three_steps(answer, right, hints)
    passed("unseen_increment", "Whatever w is, the protected rows never notice.")


def closed_form(mine) -> None:
    """``closed_form(old, new, kept, lam)``: the two matrices of UCE's equation, and the map."""
    old, new, kept = normal((3, 5), (3, 5), (4, 5), dtype=torch.float64)
    answer = mine(old.clone(), new.clone(), kept.clone(), 0.5)
    if untouched(answer, "closed_form"):
        return
    shared = 0.5 * torch.eye(5, dtype=torch.float64) + kept.T @ kept
    gram, right = shared + old.T @ old, shared + new.T @ old
    right = {"gram": gram, "right": right, "T": right @ torch.linalg.inv(gram)}
    hints = (
        "lam on the diagonal, plus c c^T of the states to move and k k^T of those to hold; with "
        "states as rows a sum of c c^T is old.T @ old",
        "the same, but c* c^T in place of c c^T: new.T @ old, in this order",
        "T gram = right: torch.linalg.solve(gram, right, left=False), or solve its transpose",
    )
    three_steps(answer, right, hints)
    passed("closed_form", "One solve of text space's size, however many layers there are.")


def undone(mine) -> None:
    """``undone(old, new, states, gamma)``, the text states that undo an edit, in closed form."""
    W, V = normal((8, 4), (8, 4), dtype=torch.float64)
    V = W + 0.3 * V
    (states,) = normal((2, 4), dtype=torch.float64)
    layers = [list(x.split((5, 3))) for x in (W, V)]
    gamma = 0.5
    answer = mine(*([x.clone() for x in some] for some in layers), states.clone(), gamma)
    if untouched(answer, "undone"):
        return
    # a sum over layers is one product of stacked rows
    gram, cross = V.T @ V + gamma * torch.eye(4, dtype=V.dtype), V.T @ W
    right = {
        "gram": gram,
        "cross": cross,
        "states": (torch.linalg.inv(gram) @ cross @ states.T).T,
    }
    hints = (
        "the *edited* weights on both sides, summed over the layers, and gamma on the diagonal",
        "the edited weights transposed times the base's, in this order, summed over the layers",
        "each state is a row: solve for the columns of states.T, or transpose the solution",
    )
    three_steps(answer, right, hints)
    passed("undone", "One linear system gives the text that the edited layers read as before.")


def verdict(mine) -> None:
    """``verdict(d)``: mean, half-width and sign of a claim, from one difference for each seed."""
    cases = {
        (0.5, 0.6, 0.55): (0.55, 0.1242069, 1),
        (-0.5, -0.6, -0.55): (-0.55, 0.1242069, -1),
        (0.1, 0.1, 0.2): (0.4 / 3, 0.1434218, 0),
        (0.6,): (0.6, float("inf"), 0),
        (0.2, 0.2, 0.2): (0.2, 0.0, 1),
        (0.05, 0.06, 0.12, 0.1): (0.0825, 0.0525746, 1),
        (0.02, 0.03, 0.07): (0.04, 0.0657241, 0),
    }
    for d, numbers in cases.items():
        answer = mine(list(d))
        if untouched(answer, "verdict"):
            return
        hints = (
            f"the mean of d, for d = {list(d)}",
            f"t_(k-1) times the deviation with k - 1, over the root of k, for d = {list(d)}; a "
            "single seed has no spread, so its interval has no ends: infinity",
            f"1 if the interval lies above zero, -1 if below, else 0, for d = {list(d)}",
        )
        three_steps(answer, dict(zip(("mean", "half", "sign"), numbers, strict=True)), hints)
    passed("verdict", "A claim needs a sign that the next training would repeat.")
