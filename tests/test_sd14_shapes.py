"""Stable Diffusion 1.4's exact shapes: one step of every method, timed, with its peak memory.

Minutes and 8 GB, so outside the usual run: `pytest -m slow -s tests/test_sd14_shapes.py`. On a GPU
at 512 pixels, on a CPU with the same 860 million parameters at 8x8 latents.
"""

import contextlib
import resource
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import pipeline
from sd14 import build_text_encoder, build_tokenizer, build_unet, build_vae

from helpers import sample, unlearn
from helpers.concepts import concepts
from helpers.denoise import Sampling
from helpers.methods import METHODS, module_of
from helpers.parameters import select_parameters
from helpers.worlds import World

GPU = torch.cuda.is_available()
LEAST = {  # of the options that a method has: the least that runs its whole path
    "steps": 1, "batch_size": 1, "images": 1, "rollout_steps": 2, "recon_on": "concept",
}  # fmt: skip


def options_for(method: str) -> dict:
    """The catalogue's quick options, and less where a method has the option."""
    known = {field.name for field in fields(module_of(method).Options)}
    least = {name: value for name, value in LEAST.items() if name in known}
    return {**METHODS[method]["quick"], **least}


@pytest.fixture(scope="module")
def world():
    """The parts of CompVis/stable-diffusion-v1-4, fp32; the words are the emoji world's.

    Images take one step: nothing here looks at them.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    unet, vae = build_unet(sample_size=64 if GPU else 8), build_vae()
    pipe = pipeline(vae, build_text_encoder(tokenizer), tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    known = concepts()["stable_diffusion"]
    pipe = pipe.to("cuda" if GPU else "cpu")
    return World("sd14", pipe, **known, sampling=Sampling(steps=1, guidance=7.5))


@contextlib.contextmanager
def peak(found: dict):
    """Seconds and peak memory (GB) of a block: of the GPU, or of this process."""
    status, start = Path("/proc/self/status"), time.perf_counter()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    elif status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    yield
    if GPU:
        torch.cuda.synchronize()
        found["GB"] = torch.cuda.max_memory_allocated() / 1e9
    elif status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found["GB"] = int(line.split()[1]) / 1e6
    else:
        unit = 1e9 if sys.platform == "darwin" else 1e6
        found["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    found["seconds"] = time.perf_counter() - start


@pytest.mark.slow
def test_these_are_stable_diffusion_s_numbers(world):
    assert sum(p.numel() for p in world.unet.parameters()) == 859_520_964
    assert world.text_length == 77 and world.unet.config.cross_attention_dim == 768
    xattn, kv = (select_parameters(world, group) for group in ("xattn", "kv"))
    assert (len(xattn), len(kv)) == (80, 32)  # M in SepME's tables
    assert round(sum(p.numel() for p in xattn.values()) / 1e6, 2) == 43.96


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_step(world, cache, method):
    found, trained = {}, hasattr(module_of(method), "problem")
    with peak(found):  # "church" is one token in this tokenizer too
        edit = unlearn(world, "church", method, progress=False, **options_for(method))
    assert len(edit.history) == trained and (edit.norm() > 0 or edit.guards)
    assert not trained or edit.M > 0
    if METHODS[method]["edits"].endswith("cross-attention"):
        assert edit.M % 16 == 0  # as many of each of the 16 blocks
    place = torch.cuda.get_device_name() if GPU else "CPU, 8x8 latents"
    timings = ", ".join(f"{k} {v:.1f} s" for k, v in edit.meta.get("timings", {}).items())
    print(
        f"\n{method}: {found['seconds']:.1f} s ({timings}), peak {found['GB']:.1f} GB "
        f"({place}, fp32, {torch.get_num_threads()} threads)"
    )
    assert found["GB"] < 40


@pytest.mark.slow
def test_one_image_of_an_edited_model(world, cache):
    edit, found = unlearn(world, "church", "sepme", progress=False, **options_for("sepme")), {}
    with peak(found):
        image = sample(world, ["church"], [0], edit, progress=False)
    assert image.shape == (1, 3, world.image_size, world.image_size)
    assert torch.isfinite(image).all()
    seconds, memory = found["seconds"], found["GB"]
    print(f"\none guided step and the decoder: {seconds:.1f} s, peak {memory:.1f} GB")
