"""Edits: arithmetic, files, and the world's exact restore."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from helpers import Edit


@pytest.fixture
def edit(tiny_world):
    generator = torch.Generator().manual_seed(1)
    delta = {
        name: torch.randn(p.shape, generator=generator) * 0.01
        for name, p in tiny_world.unet.named_parameters()
        if "attn2.to_k" in name or "attn2.to_v" in name
    }
    return Edit(delta, [{"step": 0, "loss": 1.0}], {"base": tiny_world.fingerprint(), "concepts": ["church"]})


def weights(world):
    return {name: p.detach().clone() for name, p in world.unet.named_parameters()}


def test_norm_by_hand():
    edit = Edit({"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])})
    assert edit.norm() == 3.0  # (1 + 2 + 3) / 2 tensors
    assert edit.M == 2 and Edit({}).norm() == 0.0


def test_arithmetic(edit):
    other = 2.0 * edit
    for name, value in edit.delta.items():
        assert torch.equal((edit + other).delta[name], value + 2 * value)
        assert torch.equal((edit - edit).delta[name], torch.zeros_like(value))
        assert torch.equal((-edit).delta[name], -value)
        assert torch.equal((0.5 * edit).delta[name], 0.5 * value)
        assert torch.equal((edit + other).delta[name], (other + edit).delta[name])


def test_applied_restores_to_the_bit(tiny_world, edit):
    before = weights(tiny_world)
    with tiny_world.applied(edit):
        changed = weights(tiny_world)
    after = weights(tiny_world)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(changed[n], before[n] + edit.delta[n]) for n in edit.delta)
    assert all(torch.equal(changed[n], before[n]) for n in before if n not in edit.delta)


def test_applied_restores_after_an_exception(tiny_world, edit):
    before = weights(tiny_world)
    with pytest.raises(RuntimeError, match="stop"), tiny_world.applied(edit):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_world).items())


def test_applied_nests(tiny_world, edit):
    before = weights(tiny_world)
    with tiny_world.applied(edit):
        once = weights(tiny_world)
        with tiny_world.applied(edit):
            twice = weights(tiny_world)
        back = weights(tiny_world)
    name = next(iter(edit.delta))
    assert torch.allclose(twice[name], before[name] + 2 * edit.delta[name], atol=1e-6)
    assert torch.equal(back[name], once[name])
    assert all(torch.equal(value, before[n]) for n, value in weights(tiny_world).items())


def test_file_round_trip(edit, tmp_path):
    path = edit.save(tmp_path / "deep" / "edit.safetensors")
    again = Edit.load(path)
    assert again.meta == edit.meta and again.history == edit.history
    assert all(torch.equal(again.delta[name], value) for name, value in edit.delta.items())
    assert [p.name for p in path.parent.iterdir()] == ["edit.safetensors"]  # no partial file left


def test_bad_files(edit, tmp_path):
    path = edit.save(tmp_path / "edit.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        Edit.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Edit.load(tmp_path / "nowhere.safetensors")


def test_wrong_base_shape_or_values(tiny_world, edit):
    stranger = Edit(edit.delta, meta={"base": "0123456789abcdef"})
    with pytest.raises(ValueError, match="0123456789abcdef"), tiny_world.applied(stranger):
        pass
    with pytest.raises(ValueError, match="different base"):
        edit + stranger
    name = next(iter(edit.delta))
    with pytest.raises(ValueError, match="shape"), tiny_world.applied(Edit({name: torch.zeros(1)})):
        pass
    with pytest.raises(ValueError, match="no parameter"), tiny_world.applied(Edit({"nothing": torch.zeros(1)})):
        pass
    with pytest.raises(ValueError, match="NaN"):
        Edit({"a": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="float32"):
        Edit({"a": torch.zeros(1, dtype=torch.float16)})


def test_export_is_loaded_by_plain_diffusers(tiny_world, edit, tmp_path):
    before = weights(tiny_world)
    folder = edit.export(tiny_world, tmp_path / "out" / "pipeline")
    assert all(torch.equal(p, before[n]) for n, p in tiny_world.unet.named_parameters())
    loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with tiny_world.applied(edit):
        for name, p in loaded.unet.named_parameters():
            assert torch.equal(p, dict(tiny_world.unet.named_parameters())[name])
    assert not list(folder.rglob("*.bin")) and len(list(folder.parent.iterdir())) == 1
    with pytest.raises(FileExistsError, match="not empty"):
        edit.export(tiny_world, folder)


def test_lora_file_is_read_by_diffusers_and_peft(tiny_world, edit, tmp_path):
    """The network with the LoRA file loaded against the network with the edit applied."""
    path = edit.export_lora(tmp_path / "edit.safetensors")
    x = torch.randn(2, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([3, 500]), tiny_world.encode(["church", ""]))
    base = tiny_world.unet(*inputs).sample
    with tiny_world.applied(edit):
        expected = tiny_world.unet(*inputs).sample
    tiny_world.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    assert torch.allclose(tiny_world.unet(*inputs).sample, expected, atol=1e-5)  # fp32 sums in another order
    tiny_world.pipe.unload_lora_weights()
    assert torch.equal(tiny_world.unet(*inputs).sample, base)


def test_lora_of_a_lower_rank_is_the_nearest(tmp_path):
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    path = Edit({"mid.attn2.to_k.weight": delta}).export_lora(tmp_path / "edit.safetensors", rank=2)
    file = load_file(path)
    product = file["unet.mid.attn2.to_k.lora_B.weight"] @ file["unet.mid.attn2.to_k.lora_A.weight"]
    assert torch.allclose(product, torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-6)


def test_a_bias_has_no_lora_form(tmp_path):
    with pytest.raises(ValueError, match=r"to_out\.0\.bias is no matrix"):
        Edit({"attn2.to_out.0.bias": torch.ones(3)}).export_lora(tmp_path / "edit.safetensors")
