"""What recording costs: one training step with the concept's columns kept, against the same step without.

make bench
"""

import pytest
import torch

from helpers import load_world
from helpers.attention import AttentionProcessor, cross_attentions, processors


@pytest.fixture(scope="module")
def world():
    return load_world("emoji")


def step(world, keep=None):
    """Forward and backward through all cross-attention weights, batch 4."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(4, *world.latent_shape, generator=generator)
    states = world.encode(["church"] * 4)
    parameters = [p for n, p in world.unet.named_parameters() if "attn2." in n]
    for p in parameters:
        p.requires_grad_(True)
    kept = []
    if keep is None:
        eps = world.unet(x_t, 500, states).sample
        loss = eps.pow(2).mean()
    else:
        with processors(world.unet, lambda name: AttentionProcessor(lambda A: kept.append(A[..., keep]))):
            eps = world.unet(x_t, 500, states).sample
        loss = eps.pow(2).mean() + sum(A.pow(2).sum() for A in kept)
    loss.backward()
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None
    return kept


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("keep", [None, [1]], ids=["plain", "recording"])
def test_step(benchmark, world, keep):
    torch.set_num_threads(2)
    benchmark.pedantic(step, args=(world, keep), rounds=15, warmup_rounds=3)


def test_only_the_chosen_columns_are_kept(world):
    kept = step(world, [1])
    assert len(kept) == len(cross_attentions(world.unet)) and all(A.shape[-1] == 1 for A in kept)
