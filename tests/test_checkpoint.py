"""Checkpoints: what is written comes back to the bit, and a file is whole or absent."""

import pytest
import torch

from helpers import checked
from helpers.checkpoint import load_checkpoint, moments, restore_moments, save_checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "c.safetensors"
    groups = {
        "weight": {"unet.a": torch.randn(3, 2), "b/c": torch.arange(4)},
        "state": {"unet.a": torch.zeros(1)},  # the same name in another group
    }
    save_checkpoint(path, groups, history=[{"loss": 0.1}], run={"seed": 3})
    again, metadata = load_checkpoint(path)
    assert metadata == {"history": [{"loss": 0.1}], "run": {"seed": 3}}
    assert again.keys() == groups.keys()
    for group, tensors in groups.items():
        assert again[group].keys() == tensors.keys()
        assert all(torch.equal(again[group][n], v) for n, v in tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_a_float_in_the_history_comes_back_to_the_bit(tmp_path):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    save_checkpoint(tmp_path / "c.safetensors", {}, history=values)
    assert load_checkpoint(tmp_path / "c.safetensors") == ({}, {"history": values})


def test_without_a_file_there_is_nothing(tmp_path):
    assert load_checkpoint(tmp_path / "none.safetensors") == ({}, {})


def test_leaves_and_views_are_saved(tmp_path):
    """Tensors with gradients, and those that are no block of memory of their own."""
    leaf, block = torch.ones(2, requires_grad=True), torch.arange(6.0).view(2, 3)
    save_checkpoint(tmp_path / "c.safetensors", {"w": {"leaf": leaf, "view": block.T}})
    groups, _ = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(groups["w"]["leaf"], leaf) and torch.equal(groups["w"]["view"], block.T)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": {"a": torch.ones(2)}}, step=1)

    def dies(tensors, name, metadata):
        name.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checked, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"w": {"a": torch.zeros(2)}}, step=2)
    groups, metadata = load_checkpoint(path)
    assert metadata == {"step": 1} and torch.equal(groups["w"]["a"], torch.ones(2))


def steps(w, optimizer, targets):
    for target in targets:
        optimizer.zero_grad()
        (w - target).pow(2).sum().backward()
        optimizer.step()


def test_adam_goes_on_from_its_moments(tmp_path):
    """Three steps, a file, three steps: the bits of six steps."""
    targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(4, requires_grad=True)
    steps(whole, torch.optim.Adam([whole], lr=0.1), targets)

    first = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([first], lr=0.1)
    steps(first, optimizer, targets[:3])
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"adam": moments(optimizer), "w": {"w": first}})

    groups, _ = load_checkpoint(path)
    second = groups["w"]["w"].requires_grad_(True)
    optimizer = torch.optim.Adam([second], lr=0.1)
    restore_moments(optimizer, groups["adam"])
    steps(second, optimizer, targets[3:])
    assert torch.equal(second, whole)


def test_an_optimizer_that_has_not_moved_has_no_moments():
    w = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.1)
    assert moments(optimizer) == {}
    restore_moments(optimizer, {})
    assert optimizer.state_dict()["state"] == {}
