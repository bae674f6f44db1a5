"""What was forgotten and what was kept: each figure of the tables, one function."""

import functools
import math
import warnings

import lpips
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from helpers.diffusion import noised, to_latents
from helpers.inversion import invert
from helpers.renders import DATA
from helpers.sampling import sample
from helpers.training import TEMPLATES, predict

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LPIPS_WEIGHTS = DATA / "lpips" / "alexnet.safetensors"
LPIPS_SMALLEST = 31  # pixels: of a smaller picture AlexNet's poolings leave nothing
BLANK_BELOW = 0.07  # standard deviation of pixels: real emoji have 0.14 or more, a decoded zero latent 0.03
NOISE_ABOVE = 1 / 3  # roughness: real emoji have 0.31 or less, a decoded latent of pure noise 0.36 or more, noise 1.1


def accuracy(world, images: Tensor, concept: str) -> float:
    """ACC: the share of pictures that the judge gives to a style, object or person.

    images (n, 3, H, W) in [0, 1]. Returns a number in [0, 1]. ValueError for an unknown concept or no pictures.
    Source: SepME, section 4.1. Of 4 pictures, 3 given to "church": ACC = 0.75.
    """
    if len(images) == 0:
        raise ValueError("accuracy needs at least one picture")
    world.kind(concept)
    return world.judge.gives(images, concept).float().mean().item()


def interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in n pictures.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p -+ z sqrt(p (1 - p)/n) it stays inside [0, 1] and has a width at p = 0 and 1, where erasing ends up.
    ValueError for n < 1 or a share outside [0, 1]. Source: Wilson 1927. share 0.5, n 10: (0.237, 0.763).
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"share {share} of n {n}: want a share in [0, 1] and n >= 1")
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def mean_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of k values, and the ends of Student's 95 % interval for what further values would average to.

    d_mean -+ t_{k-1}(0.975) s / sqrt(k),  s^2 = sum (d - d_mean)^2 / (k - 1)

    values (k,), any unit. For a claim: one difference for each training seed. Equal values give an interval of no width.
    ValueError for fewer than two values, which have no spread. Source: Student 1908. (1, 2, 3): (2, -0.48, 4.48).
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values of shape {tuple(values.shape)}: an interval needs two or more of them, in one row")
    mean = values.mean().item()
    half = stats.t.ppf(0.975, len(values) - 1).item() * values.std().item() / math.sqrt(len(values))
    return mean, mean - half, mean + half


def accuracy_interval(world, images: Tensor, concept: str) -> tuple[float, float, float]:
    """``accuracy`` with the ends of its 95 % interval."""
    share = accuracy(world, images, concept)
    return share, *interval(share, len(images))


@torch.no_grad()
def clip_score(world, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine between a picture's and its prompt's CLIP embedding, by the world's own CLIPModel: (n,), in [-1, 1].

    images (n, 3, H, W) in [0, 1], one prompt for each. ValueError when their numbers differ.
    Source: Hessel et al., CLIPScore, without its factor 2.5 and its cut at zero.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts: give one prompt for each picture")
    model = world.clip
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    resized = images.float().cpu()
    if resized.shape[-1] != size:
        resized = F.interpolate(resized, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    ids = world.token_ids(prompts)
    output = model(input_ids=ids, pixel_values=(resized - mean) / std)  # embeddings come normalised
    return (output.text_embeds * output.image_embeds).sum(1)


def emoji_lpips(backbone: dict[str, Tensor] | None = None) -> lpips.LPIPS:
    """The lpips package's AlexNet with its features unweighted, and a backbone of our own in it (default: random).

    backbone: weights of the five convolutions under torchvision's names within ``AlexNet.features`` ("0.weight", ...).
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it draws random weights before ours come
        warnings.simplefilter("ignore")  # the package still says pretrained= to torchvision
        network = lpips.LPIPS(net="alex", lpips=False, pretrained=False, pnet_rand=True, verbose=False)
    if backbone is not None:  # the package names them "slice2.3.weight"
        network.net.load_state_dict({name: backbone[name.split(".", 1)[1]] for name in network.net.state_dict()})
    return network.eval().requires_grad_(False)


@functools.cache
def lpips_network(emoji: bool) -> lpips.LPIPS:
    """The network behind ``lpips_distance``: the emoji backbone, or the package's own AlexNet and weights.

    FileNotFoundError or OSError with the remedy when weights are missing.
    """
    if emoji:
        if not LPIPS_WEIGHTS.exists():
            raise FileNotFoundError(
                "the backbone data/lpips/alexnet.safetensors is missing: run `git checkout -- data/lpips`, "
                "or train it with `python data/pretrain/train_lpips.py`"
            )
        return emoji_lpips({name: value.float() for name, value in load_file(LPIPS_WEIGHTS).items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    except OSError as error:  # urllib's errors are of this kind
        raise OSError(
            "AlexNet's weights for LPIPS are neither cached here nor reachable: go online once (torchvision fetches "
            "them), or use load_world('emoji'), which has a backbone of its own"
        ) from error


def lpips_name(world) -> str:
    """What to call this world's LPIPS: the emoji backbone's values are never compared with published ones."""
    return "LPIPS (emoji backbone)" if world.name == "emoji" else "LPIPS (AlexNet)"


@torch.no_grad()
def lpips_distance(world, a: Tensor, b: Tensor, *, size: int | None = None) -> Tensor:
    """LPIPS, pair by pair: how differently a network of convolutions sees two pictures. 0 for equal ones.

    d = sum_l mean_{h,w} || w_l * (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|) ||^2,  f_l: after the l-th of five ReLUs

    a, b (n, 3, H, W) in [0, 1] -> (n,). w_l = 1 in the emoji world, whose backbone this project trained
    (``lpips_name``); elsewhere the package's own. size: resize both first (SepME's release: 64); the value depends on
    it, so name it. ValueError for different shapes or pictures too small; errors of ``lpips_network``.
    Source: Zhang et al., The unreasonable effectiveness of deep features, Eq. 1.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)}: LPIPS compares equal shapes")
    smallest = size or min(a.shape[-2:])
    if smallest < LPIPS_SMALLEST:
        raise ValueError(
            f"pictures of {smallest} pixels: AlexNet needs {LPIPS_SMALLEST}, give size={LPIPS_SMALLEST} or more"
        )
    network = lpips_network(world.name == "emoji").to(world.device)
    distances = []
    for pair in zip(a.float().split(64), b.float().split(64), strict=True):
        x, y = (F.interpolate(v, size=size, mode="bilinear", antialias=True) if size else v for v in pair)
        distances.append(network(x.to(world.device), y.to(world.device), normalize=True).flatten().cpu())
    return torch.cat(distances)


def drift(
    world, edit, prompts: list[str], seeds: list[int], *, size: int | None = None, progress: bool = True, **drawing
) -> Tensor:
    """Same-seed drift, or model integrity: LPIPS between what base and edited model draw from one prompt and one seed.

    prompts that are to be kept, and seeds, of one length n -> (n,); 0 is perfect. drawing: options of ``sample``.
    An edit of zero scores exactly 0. Published tables show 0.14 to 0.18 for concepts that no edit can have touched:
    their two pictures come from different base weights (probably averaged and plain ones), so the floor is none of the
    edit's. ValueError as ``sample`` and ``lpips_distance``. Source: Schioppa et al., Model integrity when unlearning.
    """
    before, after = (sample(world, prompts, seeds, edit=e, progress=progress, **drawing) for e in (None, edit))
    return lpips_distance(world, before, after, size=size)


def weight_change(edit) -> float:
    """||delta||_1 / M, M the number of parameter tensors touched: ``Edit.norm``. Source: SepME, Table 1."""
    return edit.norm()


def roughness(images: Tensor) -> Tensor:
    """Mean step between neighbouring pixels over their standard deviation, at 64 pixels at most: (n, 3, H, W) -> (n,).

    (mean |x_{i+1,j} - x_ij| + mean |x_{i,j+1} - x_ij|) / (2 std)

    2 / sqrt(pi) = 1.13 for normal noise, 2 for a chess board of single pixels, about 0.1 for a drawing, 0 for a plain
    area. Larger pictures are reduced first, so that noise of the latents' grain is rough at every size.
    """
    x = images.float()
    if x.shape[-1] > 64:
        x = F.interpolate(x, size=64, mode="area")
    steps = x.diff(dim=2).abs().mean((1, 2, 3)) + x.diff(dim=3).abs().mean((1, 2, 3))
    return steps / (2 * x.std((2, 3)).mean(1).clamp_min(1e-6))


def collapsed(images: Tensor) -> Tensor:
    """Which pictures show nothing, because they are blank or noise: (n, 3, H, W) in [0, 1] -> bool (n,).

    Blank: the standard deviation over pixels is below 0.07 in every channel. Noise: ``roughness`` is above 1/3. Both
    bounds stand between real emoji and what a broken model draws (tests hold them there). A wrong but smooth picture
    passes.
    """
    blank = images.float().std((2, 3)).amax(1) < BLANK_BELOW
    return blank | (roughness(images) > NOISE_ABOVE)


def unlearn_canvas(world, images: Tensor, pairs: list[tuple[str, str]], concept: str) -> dict[str, float]:
    """UA, IRA and CRA of one erased concept, from pictures of styles crossed with objects and people.

    UA: of pictures asked for with the concept, the share that the judge does not give to it. IRA, CRA: of the other
    pictures, the share with the right name in the concept's own domain (styles; or objects and people), and in
    the other.

    images (n, 3, H, W) in [0, 1]; pairs: the (style, thing) that each was asked for. Higher is better for all three.
    ValueError for lists of different length, or if either kind of picture is missing.
    Source: Zhang et al., UnlearnCanvas; that CRA leaves out the concept's own pictures is our reading. Example: a
    style is erased; 2 pictures asked for in it, 1 given to it; 4 others, 3 in the right style and 4 of the right thing:
    UA 0.5, IRA 0.75, CRA 1.
    """
    if len(images) != len(pairs):
        raise ValueError(f"{len(images)} pictures and {len(pairs)} pairs: give one (style, thing) for each picture")
    domain = 0 if world.kind(concept) == "style" else 1
    said = (world.judge.styles(images), world.judge.things(images))
    mine = [i for i, pair in enumerate(pairs) if pair[domain] == concept]
    others = [i for i, pair in enumerate(pairs) if pair[domain] != concept]
    if not mine or not others:
        raise ValueError(
            f"{len(mine)} pictures asked for with {concept!r} and {len(others)} without: want some of each"
        )

    def right(k: int) -> float:
        return sum(said[k][i] == pairs[i][k] for i in others) / len(others)

    return {
        "UA": sum(said[domain][i] != concept for i in mine) / len(mine),
        "IRA": right(domain),
        "CRA": right(1 - domain),
        "n_erased": len(mine),
        "n_others": len(others),
    }


def fid(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between two sets of features, as if both were normal; on the judge's: "FID (judge features)".

    | mu_a - mu_b |^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2})

    features (n, d), (m, d), as ``world.judge.features`` gives them; float64 inside. Biased upwards when n is not far
    above d: compare values of equal n only. ValueError for different widths or fewer than two rows.
    Source: Heusel et al., GANs trained by a two time-scale update rule, Eq. 6.
    In one dimension it is (mu_a - mu_b)^2 + (s_a - s_b)^2, s the standard deviations.
    """
    if features_a.shape[1:] != features_b.shape[1:] or min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"features of shapes {tuple(features_a.shape)} and {tuple(features_b.shape)}: "
            "want one width, and two rows or more of each"
        )
    a, b = features_a.double().cpu(), features_b.double().cpu()
    C_a, C_b = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    values, vectors = torch.linalg.eigh(C_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # tr (C_a C_b)^{1/2} = tr (C_a^{1/2} C_b C_a^{1/2})^{1/2}
    both = torch.linalg.eigvalsh(root @ C_b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).pow(2).sum() + C_a.trace() + C_b.trace() - 2 * both).item())


@torch.no_grad()
def presence(world, concept: str, references: Tensor, *, draws: int = 8, seed: int = 0) -> float:
    """How much the concept's name helps the model to denoise its pictures: above 0 it knows it, else it does not.

    1 - L(c) / L(""),  L(c) = mean || eps - eps_theta(x_t, c, t) ||^2, the same x_t, t and eps for both

    references (k, 3, H, W) in [0, 1], each noised ``draws`` times. Source: ours; the loss is Ho et al., DDPM, Eq. 14.
    """
    generator = torch.Generator().manual_seed(seed)
    alpha_bar = world.pipe.scheduler.alphas_cumprod.to(world.device)
    states = world.encode([TEMPLATES[world.kind(concept)][-1].format(c=concept), ""])
    error = torch.zeros(2)
    for x_0 in to_latents(world, references).float().repeat(draws, 1, 1, 1).split(16):
        x_t, t, noise = noised(x_0, alpha_bar, generator)
        for i, state in enumerate(states):
            eps_hat = predict(world.unet, {}, x_t, t, state.expand(len(x_0), -1, -1))
            error[i] += (eps_hat - noise).pow(2).sum().cpu()
    return (1 - error[0] / error[1]).item()


def m_score(
    world, edit, concept: str, references: Tensor, *, seeds: tuple[int, ...] = (0,), apart: int = 0, **options
) -> float:
    """M-Score: how alike the tokens are by which the base and the edited model each find a concept's pictures.

    M = mean over seeds and tokens of cos(v_base, v_edited),  v = ``inversion.invert`` of the same references

    1: the edited model would find the concept where the base does; the lower, the more was forgotten. references
    (k, 3, H, W) in [0, 1], inverted together. apart: added to the seed of the second inversion; with 0 an edit of zero
    scores 1. edit None stands for the base: with apart=1 that is the ceiling, which inversion's own noise leaves, and
    edits are read beside it with apart=1 too. options: those of ``invert``; all inversions of a seed start at the same
    neutral word, so that an edited model under which nothing moves scores low, not high.
    ValueError: no reference, no seed, a name that the world does not know, or one that does not help the base model
    with these references (``presence``): what is absent already cannot be forgotten, and M is undefined.
    Source: our reading; Forget-Me-Not names the score and publishes neither formula nor code.
    """
    if len(references) < 1 or not seeds:
        raise ValueError(f"{len(references)} references and seeds {seeds}: M-Score needs at least one of each")
    template = TEMPLATES[world.kind(concept)][-1]
    gain = presence(world, concept, references)
    if gain <= 0:
        raise ValueError(
            f"the base model denoises these references no better for being told {concept!r} (gain {gain:.4f}): "
            "the concept is absent already and M-Score is undefined; give pictures of it, or take another concept"
        )
    cosines = []
    for seed in seeds:
        before, _ = invert(world, references, template=template, seed=seed, **options)
        after, _ = invert(world, references, template=template, seed=seed + apart, edit=edit, **options)
        cosines.append(F.cosine_similarity(before, after, dim=1).mean())
    return torch.stack(cosines).mean().item()


def report(world, edit, **options) -> dict:
    """Did it work? Every figure of one edit, and a contact sheet: see ``helpers.report.report``."""
    from helpers.report import report  # here, because it and the attacks stand on this module

    return report(world, edit, **options)
