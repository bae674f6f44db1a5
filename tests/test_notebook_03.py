"""Notebook 03: the definitions taken out of its cells give what the kit's metrics give."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_edit
from notebook_code import functions
from scipy.linalg import sqrtm
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from helpers import Edit, metrics
from helpers.evaluation.scores import CLIP_MEAN, CLIP_STD
from helpers.perceptual import Perceptual, emoji_network

WRITTEN_OUT = (
    "my_accuracy", "my_lpips", "distance", "relative_drift", "my_clip_score", "my_fid", "shuffled",
    "spread_and_roughness",
)  # fmt: skip


@pytest.fixture
def notebook(tiny_world) -> SimpleNamespace:
    """The notebook's own functions, with a tiny world as their ``world``."""
    names = {"world": tiny_world, "torch": torch, "F": F, "sqrtm": sqrtm, "metrics": metrics}
    names |= {"Edit": Edit, "Tensor": Tensor}
    names |= {"CLIP_MEAN": CLIP_MEAN, "CLIP_STD": CLIP_STD}
    return SimpleNamespace(**functions("03", *WRITTEN_OUT, **names))


def pictures(n: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_accuracy(notebook):
    things = ["church", "dog", "church", "blank"]
    notebook.world.judge = SimpleNamespace(things=lambda images: things)
    assert notebook.my_accuracy(pictures(4), "church") == 0.5
    assert notebook.my_accuracy(pictures(4), "castle") == 0.0


def test_lpips_and_relative_drift(notebook):
    notebook.world.lpips = Perceptual("random", emoji_network())
    a, b = pictures(4), pictures(4, seed=1)
    theirs = metrics.lpips_distance(notebook.world, a, b)
    assert torch.allclose(notebook.my_lpips(a, b), theirs, atol=1e-5)
    scope = notebook.relative_drift.__globals__
    scope["before"] = {"dog": a}
    assert notebook.relative_drift({"dog": a[:2]}) == {"dog": 0.0}
    another_seed = notebook.relative_drift({"dog": a.roll(1, 0)})
    assert another_seed["dog"] == pytest.approx(1.0)


def test_clip_score(notebook):
    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    tokenizer, length = notebook.world.pipe.tokenizer, notebook.world.text_length
    both = {**text, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": length}
    vision = {**text, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**both, "vocab_size": len(tokenizer)}, vision_config=vision, projection_dim=8
    )
    notebook.world.clip = CLIPModel(config).eval()
    images = pictures(3, 16)
    theirs = metrics.clip_score(notebook.world, images, ["dog"] * 3)
    assert torch.allclose(notebook.my_clip_score(images, "dog"), theirs, atol=1e-5)


def test_fid(notebook):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator)
    b = 1 + 2 * torch.randn(70, 6, generator=generator)
    assert notebook.my_fid(a, b) == pytest.approx(metrics.fid(a, b), rel=1e-6)


def test_shuffling_keeps_the_norm_and_moves_the_entries(notebook):
    edit = random_edit(notebook.world)
    noise = notebook.shuffled(edit, 0)
    assert noise.norm() == pytest.approx(edit.norm(), rel=1e-6)
    for name, value in edit.delta.items():
        sizes, theirs = value.abs().flatten(), noise.delta[name].abs().flatten()
        assert torch.equal(sizes.sort().values, theirs.sort().values)
        assert not torch.equal(sizes, theirs)
        assert noise.delta[name].shape == value.shape
        assert 0.3 < (noise.delta[name] > 0).float().mean() < 0.7


def test_roughness(notebook):
    images = torch.cat([pictures(3), torch.linspace(0, 1, 64).expand(1, 3, 64, 64)])
    spread, rough = notebook.spread_and_roughness(images)
    assert torch.allclose(rough, metrics.roughness(images), atol=1e-5)
    assert spread.tolist() == pytest.approx([x.std((1, 2)).max().item() for x in images], rel=1e-5)
