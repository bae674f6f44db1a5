"""What one step of G-CiRs costs: one network and batches of two, against two networks, four passes.

make bench
"""

import copy

import pytest
import torch
from conftest import randomise

from helpers import load_world, losses
from helpers.methods import gcirs
from helpers.parameters import Dense

BATCH = 4


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(2)
    return load_world("emoji")


def inputs(world):
    x_t = torch.randn(BATCH, *world.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([50, 300, 600, 950])
    c, null = world.encode(["church", ""])
    return x_t, t, c, null


def start(world):
    """Increments that are not zero, so that the two networks differ."""
    return randomise(Dense(world).leaves, 1e-3)


class Plain:
    """The equation as it stands: a frozen network, a second that is trained, four passes."""

    def __init__(self, world):
        self.inputs, self.frozen = inputs(world), world.unet
        self.trained = copy.deepcopy(world.unet)
        self.parameters = {
            f"unet.{n}": p for n, p in self.trained.named_parameters() if "attn2." in n
        }
        for name, value in start(world).items():
            self.parameters[name].data += value.detach()
            self.parameters[name].requires_grad_(True)

    def __call__(self):
        x_t, t, *states = self.inputs
        states = [s.expand(BATCH, -1, -1) for s in states]
        with torch.no_grad():
            eps_c, eps_null = (self.frozen(x_t, t, s).sample for s in states)
        eps_c2, eps_null2 = (self.trained(x_t, t, s).sample for s in states)
        loss = ((eps_c - eps_null) * (eps_c2 - eps_null2)).mean()
        loss.backward()
        gradients = {name: p.grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        return loss.item(), gradients


class Ours:
    """One network, conditional and unconditional in one batch.

    With fixed triples, the base's side of each is computed once.
    """

    def __init__(self, world, *, fixed: bool):
        self.world, self.inputs, self.delta, self.fixed = world, inputs(world), start(world), fixed
        self.base = self.frozen()

    @torch.no_grad()
    def frozen(self):
        return gcirs.delta_eps(self.world, {}, *self.inputs)

    def __call__(self):
        base = self.base if self.fixed else self.frozen()
        edited = gcirs.delta_eps(self.world, self.delta, *self.inputs)
        loss = losses.correlation(base, edited)
        loss.backward()
        gradients = {name: d.grad for name, d in self.delta.items()}
        for d in self.delta.values():
            d.grad = None
        return loss.item(), gradients


WAYS = {
    "plain, two networks": Plain,
    "ours, fresh triples": lambda world: Ours(world, fixed=False),
    "ours, fixed triples": lambda world: Ours(world, fixed=True),
}


@pytest.mark.benchmark(group="one step of G-CiRs")
@pytest.mark.parametrize("way", WAYS)
def test_step(benchmark, world, way):
    benchmark.pedantic(WAYS[way](world), rounds=20, warmup_rounds=3)


def test_the_same_numbers(world):
    expected, wanted = Plain(world)()
    for way in ("ours, fresh triples", "ours, fixed triples"):
        loss, gradients = WAYS[way](world)()
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-8)
        for name, gradient in gradients.items():
            rounding = {"rtol": 1e-3, "atol": 1e-5 * wanted[name].abs().max()}
            assert torch.allclose(gradient, wanted[name], **rounding)
