"""Pretraining: captions, checkpoints, and what the autoencoder keeps."""

import sys
from pathlib import Path

import pytest
import torch

from helpers import load_world, renders

PRETRAIN = Path(__file__).resolve().parents[1] / "data" / "pretrain"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(PRETRAIN))
    import common

    yield common
    sys.modules.pop("common", None)


def test_captions_fit_their_pictures(common):
    style, thing, captions, fits = common.draw_captions(400, common.seeded(5, 0), drop=0.1)
    assert all(fits[i, style[i], thing[i]] == 1 for i in range(400))
    empty = [i for i, caption in enumerate(captions) if not caption]
    assert 20 < len(empty) < 70 and all(fits[i].min() == 1 for i in empty)  # ten per cent, and they fit everything
    names = [renders.style_names(), renders.object_names()]
    both = [i for i, caption in enumerate(captions) if " in the style of " in caption and fits[i].sum() == 1]
    assert both and all(names[0][style[i]] in captions[i] for i in both)


def test_captions_are_seeded_and_leave_out_the_held_out(common):
    a, b = (common.draw_captions(50, common.seeded(7, 3), drop=0.1)[2] for _ in range(2))
    assert a == b != common.draw_captions(50, common.seeded(7, 4), drop=0.1)[2]
    many = common.draw_captions(3000, common.seeded(8, 0), drop=0.1)[2]
    assert not any(c.startswith(("an emoji of", "a photo of", "a painting by")) or c.endswith(" style") for c in many)


def test_the_loop_is_plain_adam_and_resumes_exactly(common, tmp_path):
    """Killed at its fourth step, gone on from the file of the second: the same bits as the loop written out by hand."""

    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def loss_of(model, step):
        return model(torch.randn(4, 3, generator=common.seeded(9, step))).pow(2).mean()

    def train(path, dies_at=None):
        model, optimizer = start()

        def batch_loss(step):
            if step == dies_at:
                raise KeyboardInterrupt
            return loss_of(model, step), {"size": model.weight.abs().mean()}

        common.fit(path, {"model": model}, optimizer, batch_loss, 5, warmup=2, save_every=2, clip=0.1)
        return model.weight.detach()

    expected, optimizer = start()
    for step in range(5):
        optimizer.param_groups[0]["lr"] = common.cosine(step, 5, 0.1, warmup=2)
        optimizer.zero_grad()
        loss_of(expected, step).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    assert torch.equal(train(tmp_path / "a.safetensors"), expected.weight)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b.safetensors", dies_at=3)
    assert common.load_checkpoint(tmp_path / "b.safetensors")[0] == 2
    assert torch.equal(train(tmp_path / "b.safetensors"), expected.weight)
    assert common.load_checkpoint(tmp_path / "b.safetensors")[0] == 5 and not list(tmp_path.glob("*.partial"))
    header, first, *later = (tmp_path / "b.csv").read_text().splitlines()
    assert header == "step,seconds,loss,size" and first.startswith("0,") and not later  # one line in twenty steps


@torch.no_grad()
def test_the_autoencoder_keeps_edges_and_colours():
    """Mean squared error of real drawings in [0, 1]; and each latent channel near the unit variance of sampling."""
    vae = load_world("emoji").pipe.vae
    images = renders.compose(renders.tiles()[:, ::5].flatten(0, 1), torch.Generator().manual_seed(0))
    z = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    again = vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5
    assert (images - again).pow(2).mean() < 0.004
    assert all(0.6 < s < 1.5 for s in z.std((0, 2, 3)).tolist())
    hue = (images - again).mean((2, 3))
    assert hue.abs().mean() < 0.02
