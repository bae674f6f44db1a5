"""Notebook 09: the definitions taken out of its cells give what the kit's metrics give."""

import ast
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from helpers import Edit, attacks, metrics
from helpers.training import select_parameters

WRITTEN_OUT = (
    "my_accuracy", "my_lpips", "distance", "relative_drift", "my_clip_score", "my_fid", "shuffled",
    "spread_and_roughness", "undo",
)  # fmt: skip
PATH = Path(__file__).resolve().parents[1] / "notebooks" / "09_measuring_forgetting.ipynb"


@pytest.fixture
def notebook(tiny_world) -> SimpleNamespace:
    """The notebook's own functions, with a tiny world as their ``world``."""
    names = {"world": tiny_world, "torch": torch, "F": F, "sqrtm": sqrtm, "metrics": metrics}
    names |= {"Edit": Edit, "Tensor": Tensor, "select_parameters": select_parameters}
    cells = [cell for cell in nbformat.read(PATH, 4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.parse(cell.source).body]
    wanted = [node for node in nodes if getattr(node, "name", None) in WRITTEN_OUT]
    exec(compile(ast.Module(wanted, []), PATH.name, "exec"), names)
    return SimpleNamespace(**names)


def pictures(n: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_edit(world) -> Edit:
    generator, chosen = torch.Generator().manual_seed(0), select_parameters(world.unet, "kv")
    return Edit({name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in chosen.items()})


def test_accuracy(notebook):
    things = ["church", "dog", "church", "blank"]
    notebook.world.judge = SimpleNamespace(things=lambda images: things)
    assert notebook.my_accuracy(pictures(4), "church") == 0.5
    assert notebook.my_accuracy(pictures(4), "castle") == 0.0


def test_lpips_and_relative_drift(notebook, monkeypatch):
    network = metrics.emoji_lpips()
    monkeypatch.setattr(metrics, "lpips_network", lambda emoji: network)
    a, b = pictures(4), pictures(4, seed=1)
    assert torch.allclose(notebook.my_lpips(a, b), metrics.lpips_distance(notebook.world, a, b), atol=1e-5)
    scope = notebook.relative_drift.__globals__
    scope["before"] = {"dog": a}
    assert notebook.relative_drift({"dog": a[:2]}) == {"dog": 0.0}
    assert notebook.relative_drift({"dog": a.roll(1, 0)})["dog"] == pytest.approx(1.0)  # what another seed is


def test_clip_score(notebook):
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = notebook.world.pipe.tokenizer
    marks = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": notebook.world.text_length}
    both = {**text, **marks, "vocab_size": len(tokenizer)}
    notebook.world.clip = CLIPModel(
        CLIPConfig(text_config=both, vision_config={**text, "image_size": 16, "patch_size": 8}, projection_dim=8)
    ).eval()
    images = pictures(3, 16)
    theirs = metrics.clip_score(notebook.world, images, ["dog"] * 3)
    assert torch.allclose(notebook.my_clip_score(images, "dog"), theirs, atol=1e-5)


def test_fid(notebook):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 6, generator=generator), 1 + 2 * torch.randn(70, 6, generator=generator)
    assert notebook.my_fid(a, b) == pytest.approx(metrics.fid(a, b), rel=1e-6)


def test_shuffling_keeps_the_norm_and_moves_the_entries(notebook):
    edit = random_edit(notebook.world)
    noise = notebook.shuffled(edit, 0)
    assert noise.norm() == pytest.approx(edit.norm(), rel=1e-6)
    for name, value in edit.delta.items():
        sizes, theirs = value.abs().flatten(), noise.delta[name].abs().flatten()
        assert torch.equal(sizes.sort().values, theirs.sort().values) and not torch.equal(sizes, theirs)
        assert noise.delta[name].shape == value.shape and 0.3 < (noise.delta[name] > 0).float().mean() < 0.7


def test_roughness(notebook):
    images = torch.cat([pictures(3), torch.linspace(0, 1, 64).expand(1, 3, 64, 64)])
    spread, rough = notebook.spread_and_roughness(images)
    assert torch.allclose(rough, metrics.roughness(images), atol=1e-5)
    assert spread.tolist() == pytest.approx([images[i].std((1, 2)).max().item() for i in range(4)], rel=1e-5)


def test_undoing_in_closed_form(notebook):
    edit = random_edit(notebook.world)
    c = notebook.world.encode(["church"])
    assert torch.allclose(notebook.undo(edit, c), attacks.closed_form_states(notebook.world, edit, c), atol=1e-5)
