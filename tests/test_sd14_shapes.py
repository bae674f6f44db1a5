"""Stable Diffusion 1.4's exact shapes with random weights: one step of every method, timed, with its peak memory.

Minutes and 8 GB, so outside the usual run: `pytest -m slow -s tests/test_sd14_shapes.py`. On a GPU at 512 pixels, on a CPU with
the same 860 million parameters at 8x8 latents.
"""

import contextlib
import functools
import resource
import sys
import time
from pathlib import Path

import estimate
import pytest
import torch
from conftest import pipeline
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers import renders, sample, training, unlearn
from helpers.methods import METHODS, abconcept, fmn
from helpers.worlds import EMOJI, World

GPU = torch.cuda.is_available()
ONE = {"steps": 1, "batch_size": 1}
OPTIONS = {  # the least that runs each method's whole path
    "resteering": {"images": 1, "recon_on": "concept"},
    "distraction": {"images": 1, "recon_on": "concept"},
    "random_stimulus": {"images": 1, "recon_on": "concept"},
    "fmn": {"images": 1},
    "gcirs": {"images": 1},
    "sepme": {"images": 1},
    "esd": {"rollout_steps": 2},
    "sdd": {"rollout_steps": 2},
    "abconcept": {"images": 1},
    "fmn_sepme": {"images": 1},
}


@pytest.fixture(scope="module")
def world():
    """The parts of CompVis/stable-diffusion-v1-4 by their published configurations, fp32; the words are the emoji world's."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(**estimate.UNET | {"sample_size": 64 if GPU else 8})
    vae = AutoencoderKL(**estimate.VAE)
    pipe = pipeline(vae, text_encoder, tokenizer, unet).to("cuda" if GPU else "cpu")
    pipe.set_progress_bar_config(disable=True)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()
    return World("sd14", pipe, **renders.concepts()["stable_diffusion"])


@contextlib.contextmanager
def peak(found: dict):
    """Seconds and peak memory (GB) of a block: of the GPU, or of this process where the system can tell."""
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
        found["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    found["seconds"] = time.perf_counter() - start


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """Training pictures drawn in one step: nothing here looks at them."""
    monkeypatch.setattr(training, "CACHE", tmp_path / "cache")
    for module in (training, fmn, abconcept):
        monkeypatch.setattr(module, "drawn_images", functools.partial(training.drawn_images, steps=1))


@pytest.mark.slow
def test_these_are_stable_diffusion_s_numbers(world):
    assert sum(p.numel() for p in world.unet.parameters()) == 859_520_964
    assert world.text_length == 77 and world.unet.config.cross_attention_dim == 768
    xattn, kv = (training.select_parameters(world.unet, group) for group in ("xattn", "kv"))
    assert (len(xattn), len(kv)) == (80, 32)  # M in SepME's tables
    assert round(sum(p.numel() for p in xattn.values()) / 1e6, 2) == 43.96


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_step(world, few_steps, method):
    options, found = {**ONE, **OPTIONS[method]}, {}
    concept = "church"  # one token in this tokenizer too
    with peak(found):
        edit = unlearn(world, concept, method, progress=False, **options)
    assert len(edit.history) == 1 and edit.norm() > 0 and edit.M in (32, 80)
    place = torch.cuda.get_device_name() if GPU else "CPU, 8x8 latents"
    print(
        f"\n{method}: {found['seconds']:.1f} s, peak {found['GB']:.1f} GB ({place}, fp32, {torch.get_num_threads()} threads)"
    )
    assert found["GB"] < 40


@pytest.mark.slow
def test_one_picture_of_an_edited_model(world, few_steps):
    edit, found = unlearn(world, "church", "sepme", progress=False, **ONE, images=1), {}
    with peak(found):
        picture = sample(world, ["church"], [0], edit=edit, steps=1, progress=False)
    assert picture.shape == (1, 3, world.image_size, world.image_size) and torch.isfinite(picture).all()
    print(f"\none guided step and the decoder: {found['seconds']:.1f} s, peak {found['GB']:.1f} GB")
