"""LPIPS: how differently a network of convolutions sees two images."""

import functools
import warnings
from dataclasses import dataclass

import lpips
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.checked import load_tensors, require_finite
from helpers.concepts import DATA
from helpers.files import shown
from helpers.identity import verify_manifest

WEIGHTS = DATA / "lpips" / "alexnet.safetensors"
SMALLEST = 31  # pixels: of a smaller image AlexNet's poolings leave nothing


@dataclass(frozen=True)
class Perceptual:
    """An LPIPS network and its name: values of differently named ones are never compared."""

    name: str
    network: lpips.LPIPS

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor, *, device=None, size: int | None = None) -> Tensor:
        """LPIPS of each pair of images; 0 for equal ones.

        d = sum_l mean_{h,w} || w_l * (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|) ||^2,
        f_l: after the l-th of five ReLUs

        a, b (n, 3, H, W) in [0, 1] -> (n,). size: resize both first (SepME's release: 64); the
        value depends on it, so name it. ValueError for different shapes or images too small.
        Source: Zhang et al., The unreasonable effectiveness of deep features, Eq. 1.
        """
        if a.shape != b.shape:
            raise ValueError(
                f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}: "
                "LPIPS compares equal shapes"
            )
        smallest = size or min(a.shape[-2:])
        if smallest < SMALLEST:
            raise ValueError(
                f"images of {smallest} pixels: AlexNet needs {SMALLEST}, "
                f"give size={SMALLEST} or more"
            )
        network = self.network.to(device or "cpu")
        distances = []
        for x, y in zip(a.float().split(64), b.float().split(64), strict=True):
            if size:
                x, y = (
                    F.interpolate(v, size=size, mode="bilinear", antialias=True) for v in (x, y)
                )
            d = network(x.to(device or "cpu"), y.to(device or "cpu"), normalize=True)
            distances.append(d.flatten().cpu())
        return torch.cat(distances)


def emoji_network(backbone: dict[str, Tensor] | None = None) -> lpips.LPIPS:
    """The lpips package's AlexNet, its features unweighted, with a backbone of our own.

    backbone: weights of the five convolutions under torchvision's names within
    ``AlexNet.features`` ("0.weight", ...); random by default.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it draws random weights
        warnings.simplefilter("ignore")  # the package still says pretrained= to torchvision
        network = lpips.LPIPS(
            net="alex", lpips=False, pretrained=False, pnet_rand=True, verbose=False
        )
    if backbone is not None:  # the package names them "slice2.3.weight"
        ours = {name: backbone[name.split(".", 1)[1]] for name in network.net.state_dict()}
        network.net.load_state_dict(ours)
    return network.eval().requires_grad_(False)


@functools.cache
def load_emoji_lpips() -> Perceptual:
    """The emoji world's LPIPS. FileNotFoundError with the remedy when its weights are missing,
    ValueError when they are damaged or others than its manifest says."""
    remedy = "run `git checkout -- data/lpips`, or train it: `python data/pretrain/train_lpips.py`"
    tensors, _ = load_tensors(WEIGHTS, "backbone of LPIPS", remedy)
    if WEIGHTS.is_relative_to(DATA):
        verify_manifest(WEIGHTS.parent, [WEIGHTS.name])
    require_finite(tensors, WEIGHTS, remedy)
    try:
        network = emoji_network({name: value.float() for name, value in tensors.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{shown(WEIGHTS)} holds no backbone ({error}): {remedy}") from error
    return Perceptual("LPIPS (emoji backbone)", network)


@functools.cache
def load_alexnet_lpips() -> Perceptual:
    """The package's own LPIPS. OSError with the remedy when its weights cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    except OSError as error:  # urllib's errors are of this kind
        raise OSError(
            "AlexNet's weights for LPIPS are neither cached here nor reachable: go online once "
            "(torchvision fetches them), or use load_world('emoji'), which has its own backbone"
        ) from error
    return Perceptual("LPIPS (AlexNet)", network)
