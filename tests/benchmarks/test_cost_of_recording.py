"""What recording costs: a training step that collects the concept's columns, beside one without.

make bench
"""

import pytest
import torch

from helpers import load_world
from helpers.attention import AttentionProcessor, cross_attentions, processors


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def step(world, columns=None):
    """Forward and backward through all cross-attention weights, batch 4; the maps collected."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(4, *world.latent_shape, generator=generator)
    states = world.encode(["church"] * 4)
    parameters = [p for n, p in world.unet.named_parameters() if "attn2." in n]
    for p in parameters:
        p.requires_grad_(True)
    maps = []
    if columns is None:
        loss = world.unet(x_t, 500, states).sample.pow(2).mean()
    else:
        collect = AttentionProcessor(lambda A: maps.append(A[..., columns]))
        with processors(world.unet, lambda name: collect):
            eps = world.unet(x_t, 500, states).sample
        loss = eps.pow(2).mean() + sum(A.pow(2).sum() for A in maps)
    loss.backward()
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None
    return maps


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("columns", [None, [1]], ids=["plain", "recording"])
def test_step(benchmark, world, columns):
    torch.set_num_threads(2)
    benchmark.pedantic(step, args=(world, columns), rounds=15, warmup_rounds=3)


def test_only_the_chosen_columns_are_collected(world):
    maps = step(world, [1])
    assert len(maps) == len(cross_attentions(world.unet))
    assert all(A.shape[-1] == 1 for A in maps)
