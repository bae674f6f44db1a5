"""What sampling costs: sixteen images by the world's own sampler, beside 25 steps of DDIM.

A course on two cores must afford it. Bar: at most half of DDIM's time (2.1 of 4.2 s, measured on
two quiet cores).

make bench
"""

from dataclasses import asdict

import pytest
import torch

from helpers import load_world, sample

WAYS = {"the world's own": {}, "DDIM, 25 steps": {"sampler": "ddim", "steps": 25}}


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(2)
    return load_world("emoji")


@pytest.mark.benchmark(group="sampling sixteen images")
@pytest.mark.parametrize("way", WAYS)
def test_sixteen_images(benchmark, world, way):
    given = (world, world.concepts[:16], list(range(16)))
    options = {"progress": False, **WAYS[way]}
    images = benchmark.pedantic(sample, args=given, kwargs=options, rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(asdict(world.sampling) | WAYS[way])
    assert len(images) == 16


def test_the_worlds_own_sampler_asks_the_network_half_as_often(world):
    """What the bar rests on, counted: rows that go through the UNet."""
    rows = []
    hook = world.unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    counts = []
    for options in WAYS.values():
        rows.clear()
        sample(world, ["church"], [0], progress=False, **options)
        counts.append(sum(rows))
    hook.remove()
    ours, ddim = counts
    assert ours <= ddim / 2
