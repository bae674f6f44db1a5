"""What was forgotten and what was retained: each value of the tables, one function."""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.judge import BLANK, NO_CONCEPT, Judge, load_judge
from helpers.options import FINITE, Count, Pictures, typed
from helpers.reader import checked_images
from helpers.renders import TILE
from helpers.sampling import sample
from helpers.seeds import measured_seeds
from helpers.stats import wilson_interval

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BLANK_BELOW = 0.07  # std of pixels: real emoji have 0.14 or more, a decoded zero latent 0.03
NOISE_ABOVE = 1 / 3  # roughness: real emoji have 0.31 or less, decoded noise 0.36 or more


@typed
def accuracy(world, images: Pictures, concept: str) -> float:
    """ACC: the share of images that the judge gives to a style, object or person.

    images (n, 3, H, W) in [0, 1]. Returns a number in [0, 1]. ValueError for an unknown concept or
    no images. Source: SepME, section 4.1. Of 4 images, 3 given to "church": ACC = 0.75.
    """
    world.kind(concept)
    return world.judge.gives(images, concept).float().mean().item()


@typed
def accuracy_interval(world, images: Pictures, concept: str) -> tuple[float, float, float]:
    """``accuracy`` with the ends of its 95 % interval (Wilson's)."""
    share = accuracy(world, images, concept)
    return share, *wilson_interval(share, len(images))


@typed
def no_concept(world, images: Pictures, concept: str) -> dict[str, float]:
    """Where an image that lost its concept went: the shares that the judge names no concept of.

    images (n, 3, H, W) in [0, 1] -> {"blank": share, "something else": share}, of the verdicts on
    what ``concept`` is, a style or a thing. ValueError for an unknown concept.
    """
    said = world.judge.styles if world.kind(concept) == "style" else world.judge.things
    verdicts = said(images)
    return {name: verdicts.count(name) / len(verdicts) for name in NO_CONCEPT}


@typed
def style_diversity(world, images: Pictures) -> dict:
    """In how many styles images come out: the diversity of what prompts without a style draw.

    D = exp(-sum_s p_s ln p_s),  p_s: the judge's share of style s among the images it gives a style

    So D is 1 if all are of one style, and k if k styles are equally frequent; 0 if no image has a
    style. images (n, 3, H, W) in [0, 1]. Returns value (D), interval (the percentiles 2.5 and 97.5
    of 1000 resamples, fixed seed), n, and shares (of all n) by style.
    Source: Hill 1973, the number of order 1; that an edit narrows it is our measurement.
    """
    said = world.judge.styles(images)
    counts = np.array([said.count(name) for name in world.styles])
    given, n = counts.sum(), len(images)
    interval = (0.0, 0.0)
    if given:
        again = np.random.default_rng(0).multinomial(given, counts / given, 1000)
        low, high = np.percentile([effective_number(row) for row in again], (2.5, 97.5))
        interval = (float(low), float(high))
    shares = {name: count / n for name, count in zip(world.styles, counts.tolist(), strict=True)}
    return {
        "value": effective_number(counts), "interval": interval, "n": n, "shares": shares,
    }  # fmt: skip


def effective_number(counts: np.ndarray) -> float:
    """exp of the Shannon entropy of counts: (5, 5) gives 2, (10, 0) gives 1, nothing gives 0."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


@typed
@torch.no_grad()
def clip_score(world, images: Pictures, prompts: list[str]) -> Tensor:
    """Cosine between an image's and its prompt's CLIP embedding, by the world's own CLIPModel.

    images (n, 3, H, W) in [0, 1], one prompt for each. Returns (n,), in [-1, 1]. ValueError when
    their numbers differ.
    Source: Hessel et al., CLIPScore, without its factor 2.5 and its cut at zero.
    """
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts: give one prompt for each image"
        )
    model = world.clip
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    resized = images.float().cpu()
    if resized.shape[-1] != size:
        resized = F.interpolate(resized, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    ids = world.token_ids(prompts)
    output = model(input_ids=ids, pixel_values=(resized - mean) / std)  # embeddings are normalised
    return (output.text_embeds * output.image_embeds).sum(1)


@typed
def lpips_distance(world, a: Pictures, b: Pictures, *, size: Count | None = None) -> Tensor:
    """LPIPS of each pair of images, by the world's network: (n, 3, H, W) twice -> (n,).

    See ``perceptual.Perceptual.distance``; ``world.lpips.name`` is what to call it.
    """
    return world.lpips.distance(a, b, device=world.device, size=size)


@typed
def drift(
    world, edit, prompts: list[str], seeds: list[int], *, size: Count | None = None,
    progress: bool = True, **sampling,
) -> Tensor:  # fmt: skip
    """Same-seed drift, or model integrity: LPIPS between base's and edited model's images.

    prompts that are to be retained, and seeds, of one length n -> (n,); 0 is perfect. sampling:
    options of ``sample``. An edit of zero scores exactly 0. Published tables show 0.14 to 0.18 for
    concepts that no edit can have touched: their two images come from different base weights
    (probably averaged and plain ones), so that floor is none of the edit's.
    ValueError as ``sample`` and ``lpips_distance``.
    Source: Schioppa et al., Model integrity when unlearning.
    """
    seeds = measured_seeds(seeds)
    before, after = (
        sample(world, prompts, seeds, e, progress=progress, **sampling) for e in (None, edit)
    )
    return lpips_distance(world, before, after, size=size)


@typed
def roughness(images: Pictures) -> Tensor:
    """Mean step between neighbouring pixels over their std, at 64 pixels at most: (n,).

    (mean |x_{i+1,j} - x_ij| + mean |x_{i,j+1} - x_ij|) / (2 std)

    images (n, 3, H, W). 2 / sqrt(pi) = 1.13 for normal noise, 2 for a chess board of single pixels,
    about 0.1 for a drawing, 0 for a plain area. Larger images are reduced first, so that noise of
    the latents' grain is rough at every size.
    """
    x = images.float()
    if x.shape[-1] > 64:
        x = F.interpolate(x, size=64, mode="area")
    steps = x.diff(dim=2).abs().mean((1, 2, 3)) + x.diff(dim=3).abs().mean((1, 2, 3))
    return steps / (2 * x.std((2, 3)).mean(1).clamp_min(1e-6))


def collapsed(images: Tensor, judge=None) -> Tensor:
    """Which images show nothing, because they are blank, noise or not finite: bool (n,).

    images (n, 3, H, W) in [0, 1]. Blank: the standard deviation over pixels is below 0.07 in every
    channel. Noise: ``roughness`` is above 1/3. Both bounds stand between real emoji and what a
    broken model draws (tests hold them there). A plain texture passes both, so what a judge calls
    blank counts as well. judge: the world's; where none is given, images of 64 pixels are shown to
    the emoji world's, and larger ones to nobody. A wrong image of something passes.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        checked_images(images)  # says what is wrong
    broken = ~images.isfinite().flatten(1).all(1).cpu()
    images = checked_images(torch.where(images.isfinite(), images, 0).cpu()).float()
    blank = images.std((2, 3)).amax(1) < BLANK_BELOW
    nothing = blank | (roughness(images) > NOISE_ABOVE) | broken
    if judge is None and images.shape[-1] == TILE:
        judge = emoji_judge()
    if judge is None:
        return nothing
    return nothing | torch.tensor([said == BLANK for said in judge.things(images)])


@cache
def emoji_judge() -> Judge:
    """The emoji world's judge, read once."""
    return load_judge()


@typed
def unlearn_canvas(
    world, images: Pictures, pairs: list[tuple[str, str]], concept: str
) -> dict[str, float]:
    """UA, IRA and CRA of one erased concept, from images of styles crossed with things.

    UA: of images asked for with the concept, the share that the judge does not give to it. IRA,
    CRA: of the other images, the share with the right name in the concept's own domain (styles; or
    objects and people), and in the other.

    images (n, 3, H, W) in [0, 1]; pairs: the (style, thing) of each prompt. Higher is better for
    all three. ValueError for lists of different length, or if either kind of image is missing.
    Source: Zhang et al., UnlearnCanvas; that CRA leaves out the concept's own images is our
    reading.
    Example: a style is erased; 2 images asked for in it, 1 given to it; 4 others, 3 in the right
    style and 4 of the right thing: UA 0.5, IRA 0.75, CRA 1.
    """
    if len(images) != len(pairs):
        raise ValueError(
            f"{len(images)} images and {len(pairs)} pairs: give one (style, thing) for each image"
        )
    domain = 0 if world.kind(concept) == "style" else 1
    verdicts = (world.judge.styles(images), world.judge.things(images))
    mine = [i for i, pair in enumerate(pairs) if pair[domain] == concept]
    others = [i for i, pair in enumerate(pairs) if pair[domain] != concept]
    if not mine or not others:
        raise ValueError(
            f"{len(mine)} images asked for with {concept!r} and {len(others)} without: "
            "want some of each"
        )

    def right(k: int) -> float:
        return sum(verdicts[k][i] == pairs[i][k] for i in others) / len(others)

    return {
        "UA": sum(verdicts[domain][i] != concept for i in mine) / len(mine),
        "IRA": right(domain),
        "CRA": right(1 - domain),
        "n_erased": len(mine),
        "n_others": len(others),
    }


@typed(features_a=FINITE, features_b=FINITE)
def fid(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between two sets of features, as if both were normal.

    | mu_a - mu_b |^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2})

    features (n, d), (m, d), as ``world.judge.features`` gives them ("FID (judge features)");
    float64 inside. Biased upwards when n is not far above d: compare values of equal n only.
    ValueError for different widths, fewer than two rows, or what is not finite.
    Source: Heusel et al., GANs trained by a two time-scale update rule, Eq. 6.
    In one dimension it is (mu_a - mu_b)^2 + (s_a - s_b)^2, s the standard deviations.
    """
    widths = {a.shape[1:] for a in (features_a, features_b)}
    if len(widths) > 1 or features_a.ndim != 2 or min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"features_a has shape {tuple(features_a.shape)} and features_b "
            f"{tuple(features_b.shape)}: give (n, width) and (m, width), two rows or more of each"
        )
    a, b = features_a.double().cpu(), features_b.double().cpu()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity: leave out the images that they are of")
    C_a, C_b = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    values, vectors = torch.linalg.eigh(C_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # C_a^{1/2}
    both = torch.linalg.eigvalsh(root @ C_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).pow(2).sum()
    return max(0.0, (means + C_a.trace() + C_b.trace() - 2 * both).item())
