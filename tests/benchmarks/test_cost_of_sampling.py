"""What drawing costs: sixteen pictures, 25 guided steps, which a course on two cores must afford (bar: 8 s).

make bench
"""

import pytest
import torch

from helpers import load_world, sample


@pytest.mark.benchmark(group="drawing sixteen pictures")
def test_sixteen_pictures(benchmark):
    torch.set_num_threads(2)
    world = load_world("emoji")
    names = world.concepts[:16]
    images = benchmark.pedantic(
        sample, args=(world, names, list(range(16))), kwargs={"progress": False}, rounds=3, warmup_rounds=1
    )
    assert len(images) == 16
