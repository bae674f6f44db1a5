"""Right answers to every exercise, and plausible wrong ones, by the name of the check."""

import math

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F

from helpers import diffusion, losses, nullspace
from helpers.attention import token_maps

# --- diffusion basics -----------------------------------------------------------------------------


def eta_without_discount(x_t, eps, now, prev, eta, noise=None):
    """Forgets that the fresh noise replaces some of the old."""
    sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)) ** 0.5
    return diffusion.ddim_step(x_t, eps, now, prev) + sigma * noise


def eta_linear_variance(x_t, eps, now, prev, eta, noise=None):
    """Takes eta for a factor of the variance."""
    return diffusion.eta_step(x_t, eps, now, prev, eta**0.5, noise)


def eta_large_variance(x_t, eps, now, prev, eta, noise=None):
    """Uses beta as the variance."""
    sigma2 = eta**2 * (1 - now / prev)
    x_0 = (x_t - (1 - now) ** 0.5 * eps) / now**0.5
    return prev**0.5 * x_0 + max(0.0, 1 - prev - sigma2) ** 0.5 * eps + sigma2**0.5 * noise


# --- attention hooks ------------------------------------------------------------------------------


def word_map(passes, column, size):
    maps = [token_maps(A)[-1:, column : column + 1] for A in passes]
    return torch.cat([F.interpolate(m, size=(size, size), mode="bilinear") for m in maps]).mean(
        (0, 1)
    )


def word_map_by_pixels(passes, column, size):
    maps = [word_map([A], column, size) * A.shape[2] for A in passes]
    return sum(maps) / sum(A.shape[2] for A in passes)


def hide_weight(columns, tokens):
    weight = torch.ones(len(columns), tokens)
    for row, positions in zip(weight, columns, strict=True):
        row[positions] = 0.0
    return torch.cat([torch.ones_like(weight), weight])


def hide_swapped_halves(columns, tokens):
    weight = hide_weight(columns, tokens)
    return torch.cat([weight[len(columns) :], weight[: len(columns)]])


def hide_interleaved(columns, tokens):
    weight = hide_weight(columns, tokens)
    return torch.stack([weight[: len(columns)], weight[len(columns) :]], 1).flatten(0, 1)


def share_nothing(A, weight):
    return A * weight[:, None, None, :]


def share_out(A, weight):
    kept = share_nothing(A, weight)
    return kept / kept.sum(-1, keepdim=True)


def share_over_pixels(A, weight):
    kept = share_nothing(A, weight)
    return kept / kept.sum(2, keepdim=True)


def share_in_place(A, weight):
    A *= weight[:, None, None, :]
    A /= A.sum(-1, keepdim=True)
    return A


# --- re-steering ----------------------------------------------------------------------------------


def length(maps):
    return torch.cat([A.flatten() for A in maps]).norm()


def rms(maps):
    squares = torch.stack([A.pow(2).mean((1, 2, 3)) for A in maps])  # (layers, b)
    return squares.mean(0).sqrt().mean()


# --- distraction ----------------------------------------------------------------------------------


def from_even(maps):
    return [A.flatten(2) - 1 / A[0, 0].numel() for A in maps]


def entropy(A):
    p = A / A.sum(2, keepdim=True)
    return -torch.xlogy(p, p).sum(2) / math.log(A.shape[2])


# --- random stimulus ------------------------------------------------------------------------------


def stimulus(maps, noise):
    return losses.random_stimulus(maps, noise=noise)


def misses(maps, noise):
    return [A - R for A, R in zip(maps, noise, strict=True)]


def paired(a, b):
    return (a - b).mean().item(), stats.sem((a - b).numpy()).item()


# --- Forget-Me-Not --------------------------------------------------------------------------------


def fold_mask(mask, heads):
    return mask.repeat_interleave(heads, dim=0)[:, None, :]


def guess(x_t, eps_hat, a):
    a = a[:, None, None, None]
    return (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()


def memory(before, after):
    return F.cosine_similarity(before, after, dim=-1).mean().item()


# --- G-CiRs ---------------------------------------------------------------------------------------


def stop_step(values, tau=0.0, momentum=0.9, min_steps=12):
    m = values[0]
    for n, value in enumerate(values, start=1):
        m = momentum * m + (1 - momentum) * value
        if n >= min_steps and m < tau:
            return n
    return len(values)


def stop_step_sticky(values, tau, momentum, min_steps):
    """Remembers that it was below tau once."""
    return max(min_steps, stop_step(values, tau, momentum, 1))


def eta_gradients(first, second, detach, signed=False):
    L_1, L_2 = (torch.tensor(value, requires_grad=True) for value in (first, second))
    eta = L_1 / L_2 if signed else L_1.abs() / L_2.abs()
    (L_1 + (eta.detach() if detach else eta) * L_2).backward()
    return L_1.grad.item(), L_2.grad.item()


# --- SepME ----------------------------------------------------------------------------------------


def svd(A):
    return torch.linalg.svd(A.double(), full_matrices=True)


def rank(A, tolerance):
    _, s, _ = svd(A)
    return int((s > tolerance * s[0]).sum())


def null_space(A, tolerance=1e-6):
    return svd(A)[2][rank(A, tolerance) :].T


# --- measuring forgetting -------------------------------------------------------------------------


def pictures_needed(top, z=1.96):
    return math.ceil(z * z * (1 - top) / top)


def layer_distance(f_a, f_b):
    return (F.normalize(f_a, dim=1) - F.normalize(f_b, dim=1)).pow(2).sum(1).mean((1, 2))


def canvas(asked, said, concept, domain):
    pairs = list(zip(asked, said, strict=True))
    mine = [(a, s) for a, s in pairs if a[domain] == concept]
    others = [(a, s) for a, s in pairs if a[domain] != concept]
    return (
        sum(s[domain] != concept for _, s in mine) / len(mine),
        sum(s[domain] == a[domain] for a, s in others) / len(others),
        sum(s[1 - domain] == a[1 - domain] for a, s in others) / len(others),
    )


def canvas_of_all(asked, said, concept, domain):
    """Counts the erased concept's own images among the retained."""
    pairs = list(zip(asked, said, strict=True))
    shares = [sum(s[k] == a[k] for a, s in pairs) / len(pairs) for k in (domain, 1 - domain)]
    return canvas(asked, said, concept, domain)[0], *shares


# --- baselines ------------------------------------------------------------------------------------


def erasing_target(eps_null, eps_c, eta, newer):
    return (eps_c if newer else eps_null) - eta * (eps_c - eps_null)


def front(points, beats=lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b):
    return [i for i, b in enumerate(points) if not any(beats(a, b) for a in points)]


# --- the papers' tables ---------------------------------------------------------------------------


def verdict(d, t=stats.t.ppf, ddof=1, root=True):
    mean = np.mean(d)
    if len(d) < 2:
        return {"mean": mean, "half": math.inf, "sign": 0}
    half = t(0.975, len(d) - 1) * np.std(d, ddof=ddof) / (len(d) ** 0.5 if root else 1)
    return {"mean": mean, "half": half, "sign": int(mean > half) - int(mean < -half)}


# --- in three steps -------------------------------------------------------------------------------


def both_steps(x_t, eps, z, now, prev, fresh=True):
    x_0 = (x_t - (1 - now) ** 0.5 * eps) / now**0.5
    alpha = now / prev
    mean = (x_t - (1 - alpha) / (1 - now) ** 0.5 * eps) / alpha**0.5
    sigma = ((1 - alpha) * ((1 - prev) / (1 - now) if fresh else 1)) ** 0.5
    return {
        "x_0": x_0, "ddim": prev**0.5 * x_0 + (1 - prev) ** 0.5 * eps, "ddpm": mean + sigma * z
    }  # fmt: skip


def attend(h, C, W_q, W_k, W_v, heads, scale=None, axis=-1):
    q, k, v = (
        x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (h @ W_q.T, C @ W_k.T, C @ W_v.T)
    )
    A = (q @ k.mT / (scale or q.shape[-1]) ** 0.5).softmax(axis)
    return {"q": q, "A": A, "out": (A @ v).transpose(0, 1).flatten(1)}


def look_away(q, C, W, delta, column, lr, power=1, sign=-1):
    delta.requires_grad_()
    A = (q @ (C @ (W + delta).T).T / q.shape[1] ** 0.5).softmax(-1)
    loss = A[:, column].norm() ** power
    (slope,) = torch.autograd.grad(loss, delta)
    return {"A": A, "loss": loss, "delta": delta + sign * lr * slope}


def even_pull(A, entries=None):
    target = 1 / (entries or A[0].numel())
    gap = A - target
    distances = gap.flatten(1).norm(dim=1)
    return {
        "target": target, "distances": distances, "gradient": gap / distances[:, None, None]
    }  # fmt: skip


def floors(entries, width, columns, softmax=None):
    gap = max(0.0, width / 2 - 1 / columns)
    return {
        "none": width * (entries / 3) ** 0.5,
        "floor": width * (entries / 12) ** 0.5,
        "softmax": softmax or (entries * (width**2 / 12 + gap**2)) ** 0.5,
    }


def two_losses(A, mask, x_t, eps_hat, x_0_tilde, a, detach=True, norm=2):
    a = a[:, None, None, None]
    x_0 = (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
    target = x_0_tilde.detach() if detach else x_0_tilde
    attention = (A.abs() ** norm * mask[:, None, None]).sum((1, 2, 3)).mean()
    return {"attention": attention, "x_0": x_0, "visual": F.mse_loss(x_0, target)}


def erase_step(W, delta, c, null, eta, lr, frozen=True):
    delta.requires_grad_()
    model = W if frozen else (W + delta).detach()
    target = model @ null - eta * (model @ c - model @ null)
    loss = ((W + delta) @ c - target).pow(2).mean()
    (slope,) = torch.autograd.grad(loss, delta)
    return {"target": target, "loss": loss, "delta": delta - lr * slope}


def irrelevant(base, edited, m, momentum):
    adds = torch.stack([base[1] - base[0], edited[1] - edited[0]])
    loss = adds.prod(0).mean()
    return {"adds": adds, "loss": loss, "m": momentum * m + (1 - momentum) * loss}


def unseen_increment(A, w, transposed=False):
    P = torch.linalg.pinv(A) @ A
    P = P if transposed else torch.eye(A.shape[1], dtype=A.dtype) - P
    delta = w @ P
    return {"P": P, "delta": delta, "moved": A @ delta.T}


def closed_form(old, new, kept, lam, swap=False, left=False):
    shared = lam * torch.eye(old.shape[1], dtype=old.dtype) + kept.T @ kept
    gram = shared + old.T @ old
    right = shared + (old.T @ new if swap else new.T @ old)
    return {"gram": gram, "right": right, "T": torch.linalg.solve(gram, right, left=left)}


def dragged(c, c_star, k, lam):
    return k + (c_star - c) * (c @ k) / (lam + c @ c)


def most_moved(T, which=0):
    return torch.linalg.svd(T - torch.eye(len(T), dtype=T.dtype))[2][which]


def undone(old, new, states, gamma, swap=False, left=None, rows=True):
    edge = gamma * torch.eye(states.shape[-1], dtype=states.dtype)
    gram = edge + sum(V.T @ V for V in (left or new))
    cross = sum((W.T @ V if swap else V.T @ W) for V, W in zip(new, old, strict=True))
    back = torch.linalg.solve(gram, cross)
    return {"gram": gram, "cross": cross, "states": states @ (back.T if rows else back)}


RIGHT = {
    # in three steps
    "both_steps": [both_steps],
    "attend": [attend],
    "look_away": [look_away],
    "even_pull": [even_pull],
    "floors": [floors],
    "two_losses": [two_losses],
    "erase_step": [erase_step],
    "irrelevant": [irrelevant],
    "unseen_increment": [unseen_increment],
    "undone": [undone],
    "closed_form": [closed_form],
    # closed forms
    "dragged": [dragged],
    "most_moved": [most_moved, lambda T: -most_moved(T)],
    "verdict": [verdict],
    # diffusion basics
    "snr": [diffusion.snr],
    "steer_away": [diffusion.steer_away],
    "eta_step": [diffusion.eta_step],
    "reverse_drift": [lambda x, score, beta: -beta * x / 2 - beta * score],
    # attention hooks
    "word_map": [word_map],
    "hide_weight": [hide_weight],
    "share_out": [share_out],
    # re-steering
    "resteering": [losses.resteering],
    "resteering_gradient": [lambda maps: [A / length(maps) for A in maps]],
    "balanced": [rms],
    # distraction
    "distraction": [losses.distraction],
    "fair_lam": [lambda maps: sum(A.shape[1] for A in maps) ** -0.5],
    "evenness": [entropy],
    # random stimulus
    "stimulus": [stimulus],
    "paired": [paired],
    # Forget-Me-Not
    "fold_mask": [
        fold_mask,
        lambda mask, heads: mask[:, None, None].expand(-1, heads, 1, -1).flatten(0, 1),
    ],
    "min_snr": [lambda alpha_bar, gamma: diffusion.snr(alpha_bar).clamp(max=gamma)],
    "memory": [memory],
    # G-CiRs
    "correlation_slope": [lambda base, edited: base / base.numel()],
    "stop_step": [stop_step],
    "eta_gradients": [eta_gradients],
    # SepME
    "null_space": [lambda A, tolerance: nullspace.null_space(A, tolerance=tolerance), null_space],
    "capacity": [lambda width, length: (width - 2) // (length - 1)],
    # measuring forgetting
    "pictures_needed": [pictures_needed],
    "layer_distance": [layer_distance],
    "canvas": [canvas],
    # baselines
    "erasing_target": [erasing_target],
    "negative_prompt_scale": [lambda guidance, eta: 1 + guidance * eta],
    "matching_ema": [lambda m, theirs, ours: m ** (theirs / ours)],
    "front": [front, lambda points: set(front(points))],
    # the papers' tables
    "rank_correlation": [lambda a, b: stats.spearmanr(a, b).statistic],
}

WRONG = {
    # diffusion basics
    "snr": [
        lambda a: a.sqrt() / (1 - a).sqrt(),  # amplitudes
        lambda a: (1 - a) / a,  # upside down
        lambda a: torch.log(a / (1 - a)),  # its logarithm
        lambda a: (a / (1 - a)).mean(),  # one number for all
    ],
    "steer_away": [
        lambda n, c, k, g, s: n + g * (c - n) + s * (k - n),  # towards the concept
        # away from the prediction, not from the direction
        lambda n, c, k, g, s: n + g * (c - n) - s * k,
        lambda n, c, k, g, s: n + g * (c - n) - s * (k - c),  # measured from the prompt
        lambda n, c, k, g, s: k + g * (c - k),  # a negative prompt, without a dial
    ],
    "reverse_drift": [
        lambda x, score, beta: beta * x / 2 - score,  # as printed
        lambda x, score, beta: beta * x / 2 - beta * score,  # one of the two errors
        lambda x, score, beta: -beta * x / 2 - score,  # the other
        lambda x, score, beta: -beta * x / 2 - beta * score / 2,  # the probability-flow ODE's
    ],
    "eta_step": [eta_without_discount, eta_linear_variance, eta_large_variance],
    # attention hooks
    "word_map": [
        lambda passes, column, size: word_map(passes, column, size) * len(passes),  # sums
        # the unconditional half
        lambda passes, column, size: word_map([A[:1] for A in passes], column, size),
        lambda passes, column, size: word_map(passes, column, size).T,
        lambda passes, column, size: word_map([A[:, :1] for A in passes], column, size),  # one head
        word_map_by_pixels,
    ],
    "hide_weight": [
        # in both halves
        lambda columns, tokens: hide_weight(columns, tokens)[len(columns) :].repeat(2, 1),
        lambda columns, tokens: hide_weight(columns, tokens).flip(0),  # in the first half
        hide_swapped_halves,
        hide_interleaved,
        # for all
        lambda columns, tokens: hide_weight(
            [[p for c in columns for p in c]] * len(columns), tokens
        ),
    ],
    "share_out": [
        share_nothing,
        lambda A, weight: share_nothing(A, weight).softmax(-1),
        share_over_pixels,
        # the first prompt's weight for all
        lambda A, weight: share_out(A, weight[:1].expand_as(weight)),
        share_in_place,
    ],
    # re-steering
    "resteering": [
        lambda maps: losses.resteering(maps, variant="fmn"),  # squared
        lambda maps: sum(A.flatten(1).norm(dim=1) for A in maps).mean(),  # a norm for each layer
        length,  # over the batch as well
        rms,  # a mean
        lambda maps: losses.resteering(maps[:1]),  # the first layer only
    ],
    "resteering_gradient": [
        lambda maps: [2 * A for A in maps],  # the squared sum's
        lambda maps: [A / A.norm() for A in maps],  # each layer's own norm
        lambda maps: [A / (2 * length(maps)) for A in maps],  # the root's half kept
        lambda maps: [-A / length(maps) for A in maps],  # the step, not the gradient
    ],
    "balanced": [
        losses.resteering,
        # by entries
        lambda maps: torch.cat([A.flatten(1) for A in maps], 1).pow(2).mean(1).sqrt().mean(),
        # root first
        lambda maps: torch.stack([A.pow(2).mean((1, 2, 3)).sqrt() for A in maps]).mean(),
        lambda maps: torch.stack([A.pow(2).mean((1, 2, 3)) for A in maps]).mean(),  # no root
    ],
    # distraction
    "distraction": [
        lambda maps: losses.distraction(maps, variant="code"),  # over heads and batch together
        # 1 / pixels
        lambda maps: sum((A - 1 / A.shape[2]).flatten(2).norm(dim=2).sum(1) for A in maps).mean(),
        # the mean of heads
        lambda maps: sum(miss.norm(dim=2).mean(1) for miss in from_even(maps)).mean(),
        lambda maps: sum(miss.pow(2).sum((1, 2)) for miss in from_even(maps)).mean(),  # squared
        losses.resteering,
    ],
    "fair_lam": [
        lambda maps: 1 / sum(A.shape[1] for A in maps),  # lengths added up
        lambda maps: sum(A.shape[1] for A in maps) ** 0.5,  # upside down
        lambda maps: len(maps) ** -0.5,  # layers for heads
        lambda maps: 1.0,
    ],
    "evenness": [
        lambda A: -(A * A.log()).sum(2) / math.log(A.shape[2]),  # not normalised, and NaN at zero
        lambda A: entropy(A) * math.log(A.shape[2]),  # in nats
        lambda A: entropy(A.transpose(2, 3)),  # over the tokens
        lambda A: 1 - entropy(A),
    ],
    # random stimulus
    "stimulus": [
        lambda maps, noise: sum(miss.norm() for miss in misses(maps, noise)),  # layers, not heads
        lambda maps, noise: stimulus(maps, noise) ** 2,
        lambda maps, noise: sum(miss.flatten(2).norm(dim=2).mean() for miss in misses(maps, noise)),
        # tokens apart
        lambda maps, noise: sum(
            miss.norm(dim=2).sum((1, 2)) for miss in misses(maps, noise)
        ).mean(),
        lambda maps, noise: stimulus(maps, noise) * len(maps[0]),  # the sum over images
        lambda maps, noise: losses.random_stimulus(maps),  # noise of its own
        lambda maps, noise: losses.resteering(misses(maps, noise)),
    ],
    "paired": [
        # as if seeds were not shared
        lambda a, b: ((a - b).mean(), (a.var() / len(a) + b.var() / len(b)).sqrt()),
        lambda a, b: ((a - b).mean(), (a - b).std()),
        lambda a, b: ((a - b).mean(), (a - b).std(correction=0) / len(a) ** 0.5),
        lambda a, b: ((b - a).mean(), (a - b).std() / len(a) ** 0.5),
        lambda a, b: (a - b).mean(),
    ],
    # Forget-Me-Not
    "fold_mask": [
        lambda mask, heads: mask[:, None].repeat(heads, 1, 1),  # the release's
        # everybody's columns for all
        lambda mask, heads: mask.any(0).expand(heads * len(mask), 1, -1),
        lambda mask, heads: mask[:1].expand(heads * len(mask), -1)[:, None],  # the first image's
        lambda mask, heads: ~fold_mask(mask, heads),
        lambda mask, heads: fold_mask(mask, heads)[:, 0],
    ],
    "min_snr": [
        lambda alpha_bar, gamma: diffusion.snr(alpha_bar),  # no largest weight
        lambda alpha_bar, gamma: (1 / diffusion.snr(alpha_bar)).clamp(max=gamma),  # upside down
        # for a network that predicts noise
        lambda alpha_bar, gamma: (gamma / diffusion.snr(alpha_bar)).clamp(max=1),
        lambda alpha_bar, gamma: diffusion.snr(alpha_bar).sqrt().clamp(max=gamma),
        lambda alpha_bar, gamma: diffusion.snr(alpha_bar).clamp(max=5.0),  # gamma ignored
    ],
    "memory": [
        # tokens averaged first
        lambda before, after: memory(before.mean(1), after.mean(1)),
        # one long vector
        lambda before, after: F.cosine_similarity(before.flatten(), after.flatten(), dim=0),
        lambda before, after: (before * after).sum(-1).mean(),  # not divided by the lengths
        lambda before, after: 1 - memory(before, after),
        lambda before, after: abs(memory(before, after)),
        lambda before, after: F.cosine_similarity(before, after, dim=1).mean(),  # along the tokens
    ],
    # G-CiRs
    "correlation_slope": [
        lambda base, edited: base,  # the sum's
        lambda base, edited: edited / base.numel(),  # with respect to the base
        lambda base, edited: (base + edited) / base.numel(),
        lambda base, edited: 2 * (base * edited).mean() * base / base.numel(),  # the square's
        lambda base, edited: base / len(base),
    ],
    "stop_step": [
        # m starts at zero
        lambda values, tau, momentum, n: stop_step([0.0, *values], tau, momentum, n + 1) - 1,
        lambda values, tau, momentum, n: stop_step(values, tau, 0.0, n),  # not smoothed
        lambda values, tau, momentum, n: stop_step(values, tau, 1 - momentum, n),  # shares swapped
        lambda values, tau, momentum, n: stop_step(values, tau, momentum, 1),  # min_steps forgotten
        # counted from zero
        lambda values, tau, momentum, n: stop_step(values, tau, momentum, n) - 1,
        stop_step_sticky,
    ],
    "eta_gradients": [
        lambda first, second, detach: eta_gradients(first, second, True),  # always detached
        lambda first, second, detach: eta_gradients(first, second, False),  # never
        lambda first, second, detach: eta_gradients(second, first, detach)[::-1],  # upside down
        # the wrong way round
        lambda first, second, detach: eta_gradients(first, second, detach)[::-1],
        lambda first, second, detach: eta_gradients(first, second, detach, signed=True),
    ],
    # SepME
    "null_space": [
        lambda A, tolerance: svd(A)[2][len(A) :].T,  # rows counted, not the rank
        lambda A, tolerance: svd(A)[2][:, rank(A, tolerance) :],  # columns of Vh
        # an absolute tolerance
        lambda A, tolerance: svd(A)[2][int((svd(A)[1] > tolerance).sum()) :].T,
        lambda A, tolerance: null_space(A, 0.0),  # exact zeros
        lambda A, tolerance: 2 * null_space(A, tolerance),
        lambda A, tolerance: null_space(A, tolerance).T,
        lambda A, tolerance: torch.linalg.svd(A)[2][rank(A, tolerance) :].T,  # in fp32
        lambda A, tolerance: nullspace.normalised_rref(A),  # the same space, not perpendicular
    ],
    "capacity": [
        lambda width, length: width // length,
        lambda width, length: (width - 1) // (length - 1),  # the space is empty
        lambda width, length: (width - 1) / (length - 1),
        lambda width, length: width // (length - 1),
    ],
    # measuring forgetting
    "pictures_needed": [
        lambda top: math.ceil(3 / top),  # the rule of three, for another interval
        lambda top: math.ceil(1.96**2 / top),  # without the z^2 below
        lambda top: pictures_needed(top) - 1,  # rounded down
        lambda top: 2 * pictures_needed(top),  # enough, and not the fewest
        lambda top: 1.96**2 * (1 - top) / top,
    ],
    "layer_distance": [
        lambda a, b: (a - b).pow(2).sum(1).mean((1, 2)),  # not normalised
        lambda a, b: layer_distance(a, b).sqrt(),
        lambda a, b: layer_distance(a, b) * a.shape[2] * a.shape[3],  # summed over places
        lambda a, b: layer_distance(a, b) / a.shape[1],  # averaged over channels
        lambda a, b: layer_distance(a, b).mean(),  # one number for all images
        # normalised along rows of places
        lambda a, b: layer_distance(a.transpose(1, 2), b.transpose(1, 2)),
        # all at once
        lambda a, b: (
            (F.normalize(a.flatten(1), dim=1) - F.normalize(b.flatten(1), dim=1)).pow(2).sum(1)
        ),
        lambda a, b: (
            (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True))
            .pow(2)
            .sum(1)
            .mean((1, 2))
        ),
    ],
    "canvas": [
        # what is left, not what is gone
        lambda *given: (1 - canvas(*given)[0], *canvas(*given)[1:]),
        lambda *given: (canvas(*given)[0], *canvas(*given)[:0:-1]),  # IRA and CRA swapped
        canvas_of_all,
        # retained: always by style
        lambda *given: (canvas(*given)[0], *canvas(*given[:2], given[0][0][0], 0)[1:]),
    ],
    # baselines
    "erasing_target": [
        lambda null, c, eta, newer: null - eta * (c - null),  # one sense for both
        lambda null, c, eta, newer: c - eta * (c - null),
        lambda null, c, eta, newer: erasing_target(null, c, eta, not newer),  # swapped
        lambda null, c, eta, newer: erasing_target(null, c, -eta, newer),  # towards the concept
        # the wrong way round
        lambda null, c, eta, newer: erasing_target(null, c, eta + newer, False),
        lambda null, c, eta, newer: (
            (1 - eta) * null + eta * c if not newer else c - eta * (c - null)
        ),
    ],
    "negative_prompt_scale": [
        lambda guidance, eta: guidance * eta,  # counted from eps_c
        lambda guidance, eta: 1 - guidance * eta,  # the weight, not the scale
        lambda guidance, eta: (1 + guidance) * eta,
        lambda guidance, eta: guidance + eta,
        lambda guidance, eta: guidance,  # eta forgotten
    ],
    "matching_ema": [
        lambda m, theirs, ours: m,
        lambda m, theirs, ours: m ** (ours / theirs),
        lambda m, theirs, ours: 1 - (1 - m) * theirs / ours,  # to first order
        lambda m, theirs, ours: m * ours / theirs,
        lambda m, theirs, ours: 1.0,
    ],
    "front": [
        lambda points: front(points, lambda a, b: a[0] > b[0] and a[1] > b[1]),  # more in both
        lambda points: front(points, lambda a, b: a[0] > b[0] and a[1] >= b[1]),  # one-sided
        lambda points: [max(range(len(points)), key=lambda i: sum(points[i]))],  # the best sum
        lambda points: [points[i] for i in front(points)],  # points, not indices
        lambda points: [i for i in range(len(points)) if i not in front(points)],  # the beaten
        lambda points: front(list(dict.fromkeys(points))),  # equal points once
    ],
    # the papers' tables
    "rank_correlation": [
        lambda a, b: np.corrcoef(a, b)[0, 1],  # of the values
        lambda a, b: np.corrcoef(np.argsort(a), np.argsort(b))[0, 1],  # positions, not ranks
        # equal values apart
        lambda a, b: np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1],
        lambda a, b: stats.kendalltau(a, b).statistic,
        lambda a, b: abs(stats.spearmanr(a, b).statistic),
    ],
    # in three steps
    "both_steps": [
        lambda *a: {**both_steps(*a), "x_0": a[0]},  # no guess
        lambda x, eps, z, now, prev: {
            **both_steps(x, eps, z, now, prev),
            "ddim": both_steps(x, z, z, now, prev)["ddim"],  # fresh noise
        },
        lambda *a: both_steps(*a, fresh=False),  # beta for the variance
    ],
    "attend": [
        lambda *a: attend(*a, scale=6),  # the whole width's root
        lambda *a: attend(*a, axis=-2),  # over the pixels
        lambda *a: attend(*a)["A"],  # one of the three
    ],
    "look_away": [
        lambda *a: look_away(*a, power=2),  # squared
        lambda *a: look_away(*a, sign=1),  # uphill
        lambda *a: {**look_away(*a), "A": look_away(*a)["A"].T},
    ],
    "even_pull": [
        lambda A: even_pull(A, entries=A.shape[1]),  # pixels alone
        lambda A: even_pull(A, entries=A.numel()),  # of all heads
        lambda A: {**even_pull(A), "gradient": A - even_pull(A)["target"]},  # of the square
    ],
    "floors": [
        lambda *a: floors(*a, softmax=floors(*a)["floor"]),  # as if it could be reached
        lambda d, w, n: {**floors(d, w, n), "none": w * d**0.5 / 2},  # the mean, not the square's
        lambda d, w, n: {k: v**2 for k, v in floors(d, w, n).items()},  # squares
    ],
    "two_losses": [
        lambda *a: two_losses(*a, norm=1),
        lambda *a: two_losses(*a, detach=False),
        lambda A, mask, *a: two_losses(A, mask.any(0).expand_as(mask), *a),  # all columns
    ],
    "erase_step": [
        lambda *a: erase_step(*a, frozen=False),  # the target moves
        lambda W, d, c, null, eta, lr: erase_step(W, d, c, null, -eta, lr),  # towards the concept
        lambda W, d, c, null, eta, lr: erase_step(W, d, c, null, eta - 1, lr),  # the newer eta
    ],
    "irrelevant": [
        lambda base, edited, m, k: irrelevant(base[::-1], edited, m, k),
        lambda base, edited, m, k: irrelevant(base, edited, m, 1 - k),
        lambda *a: {**irrelevant(*a), "loss": irrelevant(*a)["loss"].abs()},
    ],
    "unseen_increment": [
        lambda A, w: unseen_increment(A, w, transposed=True),  # what A sees
        lambda A, w: {**unseen_increment(A, w), "delta": w},
        lambda A, w: {**unseen_increment(A, w), "moved": A @ w.T},
    ],
    "closed_form": [
        lambda *a: closed_form(*a, swap=True),  # transposed
        lambda *a: closed_form(*a, left=True),  # from the wrong side
        lambda old, new, kept, lam: closed_form(old, new, kept[:0], lam),  # nothing held
    ],
    "dragged": [
        lambda c, c_star, k, lam: k + (c_star - c) * (c @ k) / (c @ c),  # no lam
        lambda c, c_star, k, lam: k + c_star * (c @ k) / (lam + c @ c),  # c is not taken away
        lambda c, c_star, k, lam: k,
    ],
    "most_moved": [
        lambda T: most_moved(T, -1),  # the least
        lambda T: torch.linalg.svd(T - torch.eye(len(T), dtype=T.dtype))[0][:, 0],  # where it goes
        lambda T: torch.linalg.svd(T)[2][0],  # of T itself
        lambda T: 2 * most_moved(T),
    ],
    "undone": [
        lambda *a: undone(*a, swap=True),  # the base's transposed
        lambda old, new, *a: undone(old, new, *a, left=old),  # the base's on the left
        lambda *a: undone(*a, rows=False),  # states are rows
        lambda old, new, states, gamma: undone(old, new, states, 0.0),  # no gamma
    ],
    "verdict": [
        lambda d: {**verdict(d), "sign": int(np.sign(np.mean(d)))},  # the sign alone
        lambda d: verdict(d, t=lambda p, k: 1.96),  # the normal's
        lambda d: verdict(d, ddof=0),
        lambda d: verdict(d, root=False),  # of one training, not of the mean
        lambda d: {**verdict(d), "sign": -verdict(d)["sign"]},
    ],
}
