"""Worlds: what loads, what is read off the model, and what bad input says."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import load_world, renders

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def test_loads_offline_in_under_five_seconds():
    """In a fresh process, imports excluded, with the hub switched off."""
    code = "import time; from helpers import load_world; t = time.time(); load_world('emoji'); print(time.time() - t)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 5


def test_stable_diffusion_s_own_parts(world):
    assert type(world.pipe).__name__ == "StableDiffusionPipeline"
    assert [type(getattr(world.pipe, part)).__name__ for part in ("vae", "unet", "text_encoder")] == [
        "AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel",
    ]  # fmt: skip
    scheduler = world.pipe.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert scheduler.prediction_type == "epsilon"
    assert world.latent_shape == (4, 16, 16) and world.image_size == renders.TILE
    assert sum(name.endswith("attn2") for name, _ in world.unet.named_modules()) >= 9


def test_plain_diffusers_loads_the_folder(world):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "data" / "emoji-diffusion").to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a church", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (world.image_size, world.image_size)


def test_names_have_one_two_and_three_tokens(world):
    lengths = {c: len(world.pipe.tokenizer(c, add_special_tokens=False).input_ids) for c in world.concepts}
    assert {1, 2, 3} <= set(lengths.values())
    ids = world.token_ids(["church"])[0]
    tokenizer = world.pipe.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == ids.max() and (ids == ids.max()).sum() == len(ids) - 2


def test_no_known_caption_is_cut(world):
    book = renders.concepts()["captions"]
    templates = [*book["both"], *book["object"], *book["style"], *book["held_out"]]
    things = [*world.objects, *world.people]
    world.encode([t.format(o=o, s=s) for t in templates for o in things for s in world.styles])


def test_encode_is_what_sampling_feeds(world):
    states = world.encode(["a church", ""])
    assert states.shape == (2, world.text_length, world.unet.config.cross_attention_dim)
    assert torch.equal(states[:1], world.pipe.encode_prompt(["a church"], "cpu", 1, False)[0])
    assert torch.allclose(states[0, 0], states[1, 0], atol=1e-5)  # a causal encoder: the first state is always the same
    assert not torch.allclose(states[0, -1], states[1, -1], atol=1e-2)  # the last, pooled one is not


def test_pooling_reads_the_whole_caption(world):
    """The trap of transformers' CLIP: an end mark with id 2 pools at the highest id instead, before the style's name."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(ROOT / "data" / "emoji-diffusion" / "clip").float().eval()
    ids = world.token_ids(["a church in the style of Twemoji", "a church in the style of OpenMoji"])
    with torch.no_grad():
        pooled = clip.get_text_features(input_ids=ids)
    pooled = getattr(pooled, "pooler_output", pooled)
    assert torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:]).item() < 0.9


@pytest.mark.parametrize("name", ["emojis", "SD14"])
def test_unknown_world(name):
    with pytest.raises(ValueError, match=rf"{name}.*'emoji'"):
        load_world(name)


def test_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        load_world(str(tmp_path))


def test_without_network_the_hub_s_model_says_what_is_missing():
    code = "from helpers import load_world; load_world('sd14')"
    start = time.time()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(ROOT / "build" / "no-hub")},
    )  # fmt: skip
    assert run.returncode != 0 and time.time() - start < 120
    last = run.stderr.strip().splitlines()[-1]
    assert "OSError" in last and "stable-diffusion-v1-4" in last and "load_world('emoji')" in last


def test_unknown_concept_suggests(world):
    with pytest.raises(ValueError, match=r"'Twemojy'.*'Twemoji'"):
        world.kind("Twemojy")
    assert [world.kind(c) for c in ("Twemoji", "church", "santa claus")] == ["style", "object", "person"]


def test_prompts_that_are_too_long_or_missing(world):
    with pytest.raises(ValueError, match=rf"tokens.*{world.text_length}"):
        world.encode(["church " * world.text_length])
    with pytest.raises(ValueError, match="at least one"):
        world.encode([])
    with pytest.raises(ValueError, match="list"):
        world.encode("church")


def test_fingerprint_sees_one_changed_weight(tiny_world):
    before = tiny_world.fingerprint()
    parameter = next(tiny_world.unet.parameters())
    with torch.no_grad():
        old = parameter.flatten()[-1].item()
        parameter.view(-1)[-1] += 1e-3
        assert tiny_world.fingerprint() != before
        parameter.view(-1)[-1] = old
    assert tiny_world.fingerprint() == before
