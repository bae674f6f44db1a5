"""What entering and leaving ``world.applied(edit)`` costs at Stable Diffusion 1.4's shapes.

The edit holds keys and values of the 16 cross-attentions, 32 matrices; beside it the plain
statement, one copy of these weights. Bar: 1.2 times that, and no digest of the network.

make bench
"""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from sd14 import build_text_encoder, build_tokenizer, build_unet

from helpers import Edit, worlds
from helpers.parameters import select_parameters
from helpers.worlds import World

BAR = 1.2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that the CPU seconds of this thread are the whole cost, whatever else is running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world():
    """All names and shapes of Stable Diffusion 1.4; only keys and values have weights.

    The fingerprints are there, as after ``load_world``; another digest of a part fails.
    """
    with torch.device("meta"):
        unet, text_encoder = build_unet(), build_text_encoder(build_tokenizer())
    world = World("sd14", SimpleNamespace(unet=unet, text_encoder=text_encoder))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in select_parameters(world, "kv").items():
        layer = unet.get_submodule(name.removeprefix("unet.").removesuffix(".weight"))
        theta = torch.randn(parameter.shape, generator=generator)
        layer.weight = torch.nn.Parameter(theta, requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "digest", lambda module: "base")
        for part in worlds.PARTS:
            world.fingerprint(part)
        patch.setattr(worlds, "digest", refuse)
        yield world


def refuse(module):
    raise AssertionError("the network was hashed")


@pytest.fixture(scope="module")
def edit(world):
    generator = torch.Generator().manual_seed(1)
    delta = {
        name: 0.01 * torch.randn(p.shape, generator=generator)
        for name, p in select_parameters(world, "kv").items()
    }
    return Edit(delta, meta={"base": world.fingerprint(), "concepts": ["church"]})


def apply(world, edit):
    with world.applied(edit):
        pass


def copy(world, edit):
    copies = [p.clone() for p in world.parameters(edit.delta).values()]
    del copies  # memory is fresh the next time, as for ours


WAYS = {"ours, applied": apply, "plain, one copy of the touched weights": copy}


def cpu_seconds(way, *arguments) -> float:
    start = time.thread_time()
    way(*arguments)
    return time.thread_time() - start


def ratio(world, edit, rounds: int = 40) -> float:
    """CPU seconds of ours over those of the plain way: medians, the two taken in turn."""
    for way in WAYS.values():
        way(world, edit)
    pairs = [[cpu_seconds(way, world, edit) for way in WAYS.values()] for _ in range(rounds)]
    ours, plain = map(statistics.median, zip(*pairs, strict=True))
    return ours / plain


@pytest.mark.benchmark(group="entering and leaving an edit, 32 matrices", timer=time.thread_time)
@pytest.mark.parametrize("way", WAYS)
def test_way(benchmark, world, edit, way):
    benchmark.pedantic(WAYS[way], args=(world, edit), rounds=20, warmup_rounds=3)
    if WAYS[way] is apply:
        benchmark.extra_info["ratio to one copy"] = found = ratio(world, edit)
        assert found <= BAR


def test_the_weights_are_those_of_the_paper_and_the_edit_is_undone(world, edit):
    """32 matrices, 19 million weights; edited inside, the very same storage after."""
    before = {name: p.data_ptr() for name, p in world.parameters(edit.delta).items()}
    theta = {name: p.detach().clone() for name, p in world.parameters(edit.delta).items()}
    assert len(before) == 32 and sum(v.numel() for v in theta.values()) == 19_169_280
    with world.applied(edit):
        for name, p in world.parameters(edit.delta).items():
            assert torch.equal(p, theta[name] + edit.delta[name])
    for name, p in world.parameters(edit.delta).items():
        assert p.data_ptr() == before[name] and torch.equal(p, theta[name])


def test_a_digest_would_be_noticed(world):
    with pytest.raises(AssertionError, match="hashed"):
        World("sd14", world.pipe).fingerprint()
