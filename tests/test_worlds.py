"""Worlds: what loads, what is read off the model, and what bad input says."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_world, random_edit
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from helpers import Edit, concepts, load_world, renders, sample, worlds
from helpers.denoise import Sampling

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


@pytest.fixture(scope="module")
def of_type(world):
    """The emoji world in three types."""
    narrow = {n: load_world("emoji", dtype=t) for n, t in TYPES.items() if n != "fp32"}
    return {"fp32": world, **narrow}


def test_loads_offline_in_under_four_seconds():
    """In a fresh process, imports excluded, with the hub switched off; the better of two tries."""
    code = (
        "import time; from helpers import load_world; t = time.time(); load_world('emoji'); "
        "print(time.time() - t)"
    )
    seconds = []
    for _ in range(2):  # a busy machine may slow one down
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        seconds.append(float(run.stdout.split()[-1]))
        if seconds[-1] < 4:
            break
    assert min(seconds) < 4


def test_stable_diffusion_s_own_parts(world):
    assert type(world.pipe).__name__ == "StableDiffusionPipeline"
    parts = ("vae", "unet", "text_encoder")
    assert [type(getattr(world.pipe, part)).__name__ for part in parts] == [
        "AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel",
    ]  # fmt: skip
    scheduler = world.pipe.scheduler.config
    betas = (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule)
    assert betas == (0.00085, 0.012, "scaled_linear")
    assert scheduler.prediction_type == "epsilon"
    assert torch.equal(world.alpha_bar, world.pipe.scheduler.alphas_cumprod)
    assert world.latent_shape == (4, 16, 16) and world.image_size == renders.TILE
    assert sum(name.endswith("attn2") for name, _ in world.unet.named_modules()) >= 9


def test_plain_diffusers_loads_the_folder(world):
    folder = ROOT / "data" / "emoji-diffusion"
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a church", num_inference_steps=2, generator=generator).images[0]
    assert image.size == (world.image_size, world.image_size)


def test_names_have_one_two_and_three_tokens(world):
    tokenizer = world.pipe.tokenizer
    rows = {c: tokenizer(c, add_special_tokens=False).input_ids for c in world.concepts}
    assert {1, 2, 3} <= {len(row) for row in rows.values()}
    ids = world.token_ids(["church"])[0]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == ids.max()
    assert (ids == ids.max()).sum() == len(ids) - 2


def test_no_known_caption_is_cut(world):
    book = concepts.concepts()["captions"]
    templates = [*book["both"], *book["object"], *book["style"], *book["held_out"]]
    things = [*world.objects, *world.people]
    prompts = [t.format(o=o, s=s) for t in templates for o in things for s in world.styles]
    assert world.token_ids(prompts).shape == (len(prompts), world.text_length)  # raises for a cut


def test_encode_is_what_sampling_feeds(world):
    states = world.encode(["a church", ""])
    assert states.shape == (2, world.text_length, world.unet.config.cross_attention_dim)
    assert torch.equal(states[:1], world.pipe.encode_prompt(["a church"], "cpu", 1, False)[0])
    # a causal encoder: the first state is always the same; the last, pooled one is not
    assert torch.allclose(states[0, 0], states[1, 0], atol=1e-5)
    assert not torch.allclose(states[0, -1], states[1, -1], atol=1e-2)


def test_pooling_reads_the_whole_caption(world):
    """The trap of transformers' CLIP: with an EOS token of id 2 it pools at the highest id instead,
    before the style's name."""
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
    kinds = [world.kind(c) for c in ("Twemoji", "church", "santa claus")]
    assert kinds == ["style", "object", "person"]


def test_prompts_that_are_too_long_or_missing(world):
    with pytest.raises(ValueError, match=rf"tokens.*{world.text_length}"):
        world.encode(["church " * world.text_length])
    with pytest.raises(ValueError, match="not empty"):
        world.encode([])
    with pytest.raises(ValueError, match="list"):
        world.encode("church")


def test_what_a_world_lacks_says_how_to_bring_it(tiny_world):
    for what in ("judge", "clip", "lpips"):
        with pytest.raises(ValueError, match=f"'tiny' has no {what}: use .*load_world"):
            getattr(tiny_world, what)
    with pytest.raises(ValueError, match="unknown part 'vae': choose from unet, text_encoder"):
        tiny_world.part("vae")


def test_a_judge_of_one_s_own(world):
    mine = object()
    assert load_world("emoji", judge=mine).judge is mine and world.judge is not mine


def test_parameters_have_full_names(tiny_world):
    parameters = tiny_world.parameters()
    assert {name.split(".")[0] for name in parameters} == {"unet", "text_encoder"}
    bias = tiny_world.unet.conv_in.bias
    assert parameters["unet.conv_in.bias"] is bias
    rest = len(list(tiny_world.unet.parameters()))
    assert len(parameters) == rest + len(list(tiny_world.pipe.text_encoder.parameters()))


# --- fingerprints


@pytest.mark.parametrize("part", worlds.PARTS)
def test_fingerprint_sees_one_changed_weight(part):
    def fingerprint(change=0.0):
        world = build_tiny_world()
        list(world.part(part).parameters())[-1].data.view(-1)[-1] += change
        return world.fingerprint(part)

    assert fingerprint() == fingerprint() != fingerprint(1e-3)


def test_parts_have_fingerprints_of_their_own(tiny_world):
    unet, text = (tiny_world.fingerprint(part) for part in worlds.PARTS)
    assert unet != text and tiny_world.fingerprint() == unet
    with pytest.raises(ValueError, match="unknown part 'vae'"):
        tiny_world.fingerprint("vae")


def test_fingerprints_of_the_first_version_stay_valid(world):
    """It hashed the weights as loaded; the committed ones are stored in half precision."""
    digest = hashlib.sha256()
    for name, value in sorted(world.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    assert world.fingerprint() == digest.hexdigest()[:16]


def test_a_world_put_together_in_half_precision_has_the_same_fingerprints(tiny_world):
    """Its weights are those of the fp32 world, rounded; and so is what the digest reads there."""
    narrow = build_tiny_world()
    narrow.pipe.to(torch.float16)
    assert not torch.equal(narrow.unet.conv_in.weight.float(), tiny_world.unet.conv_in.weight)
    for part in worlds.PARTS:
        assert narrow.fingerprint(part) == tiny_world.fingerprint(part)


def test_one_edit_fits_the_world_in_every_type(of_type):
    for part in worlds.PARTS:
        assert len({w.fingerprint(part) for w in of_type.values()}) == 1
    edit = random_edit(of_type["fp32"]) + random_edit(of_type["fp32"], group="text")
    assert set(edit.base) == set(worlds.PARTS)
    for name, found in of_type.items():
        assert found.unet.dtype == found.pipe.text_encoder.dtype == TYPES[name]
        before = {n: p.detach().clone() for n, p in found.parameters().items()}
        with found.applied(edit):
            for n, p in found.parameters().items():
                theta = before[n].float() + edit.delta.get(n, 0.0)  # in fp32, cast last
                assert torch.equal(p, theta.to(TYPES[name])) and p.dtype == TYPES[name]
        assert all(torch.equal(p, before[n]) for n, p in found.parameters().items())


def test_another_base_refuses_the_edit_but_for_a_transfer(world, tmp_path):
    edit = random_edit(world)
    other = load_world(str(edit.export(world, tmp_path / "fine-tuned")))
    assert other.fingerprint() != world.fingerprint()
    assert other.fingerprint("text_encoder") == world.fingerprint("text_encoder")
    both = rf"{world.fingerprint()}.*{other.fingerprint()}"
    with pytest.raises(ValueError, match=both), other.applied(edit):
        pass
    with other.applied(edit, transfer=True):
        assert other.is_edited
    mine = random_edit(other)
    with pytest.raises(ValueError, match="transfer=True"), world.applied(mine):
        pass
    assert other.sampling == worlds.USUAL and other.name == str(tmp_path / "fine-tuned")


def test_the_fingerprint_is_computed_once_at_load(world, of_type, monkeypatch):
    """Applying and sampling hash nothing: at Stable Diffusion's size that would take seconds."""
    edit = random_edit(world) + random_edit(world, group="text")

    def hashes(module):
        raise AssertionError("a network is hashed")

    monkeypatch.setattr(worlds, "digest", hashes)
    for found in of_type.values():
        with found.applied(edit), found.applied(edit):
            assert found.fingerprint() == world.fingerprint()  # the base's
            assert found.fingerprint("text_encoder") == world.fingerprint("text_encoder")
    sample(world, ["church"], [0], edit=edit, steps=1, progress=False)


def test_a_fingerprint_is_not_taken_of_an_edited_network(tiny_world):
    """Of a world put together by hand, whose digests are taken when they are asked for."""
    before = build_tiny_world().fingerprint()
    unlabelled = Edit(random_edit(build_tiny_world()).delta)
    with tiny_world.applied(unlabelled), pytest.raises(RuntimeError, match="an edit is applied"):
        tiny_world.fingerprint()
    assert tiny_world.fingerprint() == before


def test_each_world_brings_its_sampling(world):
    assert world.sampling == Sampling(12, 5.0, "dpm++")
    assert (worlds.USUAL.steps, worlds.USUAL.guidance) == (25, 7.5)
    assert worlds.knowledge("sd14")["sampling"] == worlds.USUAL


# --- edits of the text encoder


def test_text_encoder_edits_change_what_encode_gives(world):
    edit = random_edit(world, group="text", scale=0.02)
    assert set(edit.base) == {"text_encoder"}
    before = world.encode(["church", ""])
    with world.applied(edit):
        inside = world.encode(["church", ""])
    assert (inside - before).abs().amax((1, 2)).min() > 1e-2
    assert torch.equal(world.encode(["church", ""]), before)


def test_text_encoder_edits_reach_the_images(world):
    edit = random_edit(world, group="text", scale=0.02)
    base, edited, again = (
        sample(world, ["church"], [0], e, steps=2, progress=False) for e in (None, edit, None)
    )
    assert (edited - base).abs().max() > 1e-2 and torch.equal(again, base)
    with world.applied(edit):  # states of the edited encoder, fed to the base's UNet
        states, null = world.encode(["church"]), world.encode([""])
    assert not torch.equal(null, world.encode([""]))
    by_states = sample(world, ["church"], [0], states=states, guidance=1.0, steps=2, progress=False)
    whole = sample(world, ["church"], [0], edit, guidance=1.0, steps=2, progress=False)
    assert torch.equal(by_states, whole)
