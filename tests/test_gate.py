"""The gate: what ``load_world`` is given is made right, or refused with what to do."""

import json
import shutil
import threading
import time

import pytest
import torch
from conftest import build_tiny_world, full_edit, random_edit
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from helpers import load_world, sample, unlearn
from helpers.attention import AttentionProcessor, concept_mask, find_tokens
from helpers.denoise import predict
from helpers.diffusion import noise_of_velocity
from helpers.gate import place_of, source_of, unwrapped
from helpers.undo import surely, undoing

STEP = {"steps": 1, "batch_size": 1, "progress": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny pipeline's folder, never changed: tests copy it."""
    folder = tmp_path_factory.mktemp("gate") / "pipeline"
    build_tiny_world().pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


def change(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def weights(folder, part="unet"):
    (path,) = (folder / part).glob("*.safetensors")
    return path


# --- velocity


def velocity_world(folder):
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    return load_world(folder)


def test_a_velocity_is_the_noise_that_it_implies():
    """x_0 = 2, eps = -1, alpha_bar 0.36: v = 0.6 eps - 0.8 x_0, x_t = 0.6 x_0 + 0.8 eps."""
    x_0, eps = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    v, x_t = 0.6 * eps - 0.8 * x_0, 0.6 * x_0 + 0.8 * eps
    alpha_bar = torch.tensor([0.9, 0.36])
    assert noise_of_velocity(v, x_t, torch.tensor([1]), alpha_bar).item() == pytest.approx(-1.0)


def test_a_velocity_model_draws_what_diffusers_draws(folder):
    world = velocity_world(folder)
    pipe, scheduler = world.pipe, world.pipe.scheduler
    scheduler.set_timesteps(4)
    x = torch.randn(1, *world.latent_shape, generator=torch.Generator().manual_seed(0))
    states = world.encode(["church"])
    ours = theirs = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = predict(world, {}, ours, t[None], states)
            a = scheduler.alphas_cumprod[t]
            before = t - 250
            b = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
            x_0 = (ours - (1 - a).sqrt() * eps) / a.sqrt()
            ours = b.sqrt() * x_0 + (1 - b).sqrt() * eps
            theirs = scheduler.step(pipe.unet(theirs, t, states).sample, t, theirs).prev_sample
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # two orders of rounding


def test_a_method_trains_a_velocity_model(folder, cache):
    """What the network gives is read otherwise, so its increments are others."""
    plain = unlearn(load_world(folder), "church", "esd", **STEP)
    twin = unlearn(velocity_world(folder), "church", "esd", **STEP)
    assert plain.delta.keys() == twin.delta.keys()
    assert any(not torch.equal(plain.delta[name], twin.delta[name]) for name in plain.delta)


# --- refused


def scheduler(**fields):
    return lambda folder: change(folder / "scheduler" / "scheduler_config.json", **fields)


def unet(**fields):
    return lambda folder: change(folder / "unet" / "config.json", **fields)


def index(**fields):
    return lambda folder: change(folder / "model_index.json", **fields)


def cut(folder):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder):
    weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def pickled(folder):
    weights(folder).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def emptied(folder):
    for path in (folder / "tokenizer").glob("*"):
        if path.name != "tokenizer_config.json":
            path.unlink()


def without_a_tensor(folder):
    tensors = load_file(weights(folder))
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights(folder))


REFUSED = {
    "sample prediction": (scheduler(prediction_type="sample"), "sample.*epsilon and v_prediction"),
    "flow": (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "flow matching"),
    "zero SNR": (scheduler(rescale_betas_zero_snr=True), "zero_snr"),
    "inpainting": (unet(in_channels=9), "inpainting"),
    "SDXL's UNet": (unet(addition_embed_type="text_time"), "SDXL"),
    "SDXL": (index(_class_name="StableDiffusionXLPipeline"), "StableDiffusionXLPipeline"),
    "not square": (unet(sample_size=[8, 16]), "sample_size"),
    "no index": (lambda folder: (folder / "model_index.json").write_text("{"), "no readable JSON"),
    "cut short": (cut, "cut short"),
    "git-lfs": (pointer, "git lfs pull"),
    "pickled": (pickled, "nothing is unpickled"),
    "no vocabulary": (emptied, "tokenizer"),
    "no weights": (lambda folder: weights(folder).unlink(), "no weights"),
    "a tensor less": (without_a_tensor, "lack 1 tensors"),
    "no VAE": (lambda folder: shutil.rmtree(folder / "vae"), "lacks its part 'vae'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(folder, name):
    spoil, said = REFUSED[name]
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        load_world(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_path_never_becomes_a_hub_id(name):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_world(name)


def test_what_is_no_world_at_all(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file"):
        load_world(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="did you mean 'emoji'"):
        source_of("emojis")
    for wrong in (None, 3, " "):
        with pytest.raises(ValueError, match="the world is"):
            source_of(wrong)


@pytest.mark.parametrize(
    "given", [("cpuu", None), (3, None), ("cpu", "float16"), ("cpu", torch.int8)]
)
def test_a_device_or_type_that_cannot_be_had(given):
    with pytest.raises(ValueError, match="choose from"):
        place_of(*given)


def test_half_only_weights_are_loaded(folder):
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        path = weights(folder, part)
        save_file({k: v.half() for k, v in load_file(path).items()}, path)
        path.rename(path.with_name(f"{stem}.fp16.safetensors"))
    world = load_world(folder)
    assert world.unet.dtype == torch.float32
    assert sample(world, ["church"], [0], steps=1, progress=False).isfinite().all()


# --- in use


def test_loading_leaves_the_user_s_random_numbers_alone(folder):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_world(folder)
    assert torch.equal(torch.rand(3), wanted)


def test_worlds_share_no_lists():
    one, other = build_tiny_world(), build_tiny_world()
    one.styles.append("mine")
    one.roles["nine_objects"] = []
    assert "mine" not in other.styles and other.roles.get("nine_objects") != []


def test_a_lora_on_the_pipeline_is_refused_with_the_way_out(tiny_world, cache):
    tiny_world.pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="fuse_lora"):
        unlearn(tiny_world, "church", "esd", **STEP)


def test_export_gives_the_folder_s_own_scheduler_back(folder, tmp_path):
    config = dict(DDIMScheduler.from_pretrained(folder / "scheduler").config)
    EulerDiscreteScheduler.from_config(config).save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    world = load_world(folder)
    random_edit(world).export(world, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert isinstance(world.pipe.scheduler, DDIMScheduler)  # Lethe's own again


def test_an_embedding_of_several_vectors_counts_as_several_tokens(tiny_world, tmp_path):
    width = tiny_world.pipe.text_encoder.config.hidden_size
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    save_file({"<it>": vectors}, tmp_path / "it.safetensors")
    tiny_world.pipe.load_textual_inversion(str(tmp_path / "it.safetensors"), token="<it>")
    mask = concept_mask(tiny_world, ["a picture of a <it>"], "<it>", end=False)
    assert mask.sum() == 3 and len(find_tokens(tiny_world, ["a <it>"], "<it>")[0]) == 3
    with pytest.raises(ValueError, match="shorten"):
        tiny_world.encode(["a b c d e f g h i j k l m <it>"])


def test_logits_of_upcast_attention_do_not_overflow(tiny_world):
    """Keys of 300 in half precision: logits of 90 000 d are infinite there, and fine in fp32."""
    layer = next(m for n, m in tiny_world.unet.named_modules() if n.endswith("attn2"))
    layer.to_k.weight.data.fill_(2.0)
    layer.to_q.weight.data.fill_(2.0)
    layer.half()
    pixels = torch.full((1, 4, layer.to_q.in_features), 100.0).half()
    text = torch.full((1, 3, layer.to_k.in_features), 100.0).half()
    seen = []
    layer.upcast_attention = False
    assert not AttentionProcessor()(layer, pixels, text).isfinite().all()
    layer.upcast_attention = True
    out = AttentionProcessor(seen.append)(layer, pixels, text)
    assert out.isfinite().all() and seen[0].dtype == torch.float16


def test_a_second_thread_waits(tiny_world):
    """Two blocks that overlap, with two edits: the base is back to the bit."""
    before = {name: p.detach().clone() for name, p in tiny_world.parameters().items()}
    edits = [full_edit(tiny_world), full_edit(tiny_world)]
    inside, most = [], []

    def work(edit):
        with tiny_world.applied(edit):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work, args=(edit,)) for edit in edits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1] and not tiny_world.is_edited
    assert all(torch.equal(p, before[name]) for name, p in tiny_world.parameters().items())


def test_undoing_outlives_interrupts():
    """A Ctrl-C within the undoing itself starts it again, and is raised when it is done."""
    done, left = [], [KeyboardInterrupt, KeyboardInterrupt]

    def undo():
        if left:
            raise left.pop()
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        surely(undo)
    assert done == [1]
    with pytest.raises(RuntimeError, match="inside"), undoing(undo):
        raise RuntimeError("inside")
    assert len(done) >= 2


def test_pictures_that_are_not_finite_stop_with_the_reason(tiny_world, cache):
    edit = full_edit(tiny_world)
    for value in edit.delta.values():
        value.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"scale the edit down|lower the guidance"):
        sample(tiny_world, ["church"], [0], edit=edit, steps=2, progress=False)
    assert not tiny_world.is_edited
    tiny_world.pipe.vae.decoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        unlearn(tiny_world, "church", "gcirs", images=1, **STEP)
    assert not list(cache.rglob("*.safetensors"))  # nothing of it is kept


@pytest.mark.parametrize("method", ["esd", "resteering", "sepme"])
def test_gradient_checkpointing_finds_the_same_increments(cache, method):
    options = {**STEP, **({} if method == "esd" else {"images": 1})}
    plain = unlearn(build_tiny_world(), "church", method, **options)
    world = build_tiny_world()
    world.pipe.unet.enable_gradient_checkpointing()
    edit = unlearn(world, "church", method, **options)
    assert edit.delta.keys() == plain.delta.keys()
    for name, value in plain.delta.items():
        torch.testing.assert_close(edit.delta[name], value, rtol=1e-4, atol=1e-5)


def test_a_compiled_network_is_unwrapped():
    layer = torch.nn.Linear(2, 2)
    assert unwrapped(torch.compile(layer)) is layer and unwrapped(layer) is layer
