"""Adapters: equal to their dense increments at a constant gate, and gated by each row's prompt."""

import pytest
import torch
from conftest import full_edit, random_edit
from torch import nn
from torch.nn import functional as F

from helpers import Edit, adapters, sample
from helpers.adapters import Adapter, layer_of, register_gate
from helpers.denoise import Sampling, predict, trajectory
from helpers.guards import NegativePrompt

FAST = {"steps": 2, "progress": False}


@pytest.fixture
def church(monkeypatch):
    """A toy gate: 1 for prompts that hold the adapter's word, else 0. Yields what it was asked."""
    asked = []

    def gate(world, adapter, prompts):
        asked.append(list(prompts))
        return torch.tensor([float(adapter.settings["word"] in prompt) for prompt in prompts])

    monkeypatch.setitem(adapters.GATES, "church", gate)
    return asked


def only_adapters(world, gate="always", part=""):
    """The adapters of ``full_edit`` alone, those of one part of the pipeline if it is named."""
    (adapter,) = full_edit(world, gate=gate).adapters
    down = {n: A for n, A in adapter.down.items() if n.startswith(part)}
    up = {n: adapter.up[n] for n in down}
    return Edit({}, adapters=(Adapter(down, up, 4.0, gate, adapter.settings),))


def outputs(world):
    """Text states, and what the UNet predicts from them."""
    x = torch.randn(2, *world.latent_shape, generator=torch.Generator().manual_seed(0))
    states = world.encode(["church", "dog"])
    return states, world.unet(x, torch.tensor([3, 700]), states).sample


def test_at_a_constant_gate_an_adapter_is_its_dense_increments(tiny_world):
    """A linear layer and a convolution of the UNet, and a linear layer of the text encoder."""
    edit = only_adapters(tiny_world)
    (adapter,) = edit.adapters
    kinds = {type(layer_of(tiny_world, name)) for name in adapter.down}
    assert kinds == {nn.Linear, nn.Conv2d} and len(adapter.down) == 3
    base = outputs(tiny_world)
    with tiny_world.applied(edit):
        hooked = outputs(tiny_world)
    with tiny_world.applied(Edit(adapter.delta())):
        dense = outputs(tiny_world)
    for a, b, unchanged in zip(hooked, dense, base, strict=True):
        assert torch.allclose(a, b, atol=1e-4) and (a - unchanged).abs().max() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(outputs(tiny_world), base, strict=True))


def test_samples_of_an_adapter_are_those_of_its_dense_increments(tiny_world):
    edit = only_adapters(tiny_world)
    hooked, dense = (
        sample(tiny_world, ["church", "dog"], [0, 1], e, **FAST)
        for e in (edit, Edit(edit.adapters[0].delta()))
    )
    assert torch.allclose(hooked, dense, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_s_adapter_by_hand(stride):
    """B * (A * x) is one convolution with the kernel B A, at the layer's own stride and padding."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(s, generator=generator) for s in ((2, 3, 3, 3), (5, 2, 1, 1)))
    delta = Adapter({"conv": A}, {"conv": B}, 0.5).delta(strength=2.0)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    kernel = torch.einsum("or,rihw->oihw", B[..., 0, 0], A)
    assert list(delta) == ["conv.weight"] and torch.allclose(delta["conv.weight"], kernel)
    step = {"stride": stride, "padding": 1}
    both = F.conv2d(F.conv2d(x, A, **step), B)
    assert torch.allclose(both, F.conv2d(x, delta["conv.weight"], **step), atol=1e-4)


def test_the_adapter_of_a_strided_convolution(tiny_world):
    name = next(
        n for n, m in tiny_world.unet.named_modules() if getattr(m, "stride", None) == (2, 2)
    )
    full = f"unet.{name}"
    out, *rest = layer_of(tiny_world, full).weight.shape
    adapter = Adapter({full: torch.full((1, *rest), 0.05)}, {full: torch.ones(out, 1, 1, 1)})
    with tiny_world.applied(Edit({}, adapters=(adapter,))):
        hooked = outputs(tiny_world)[1]
    with tiny_world.applied(Edit(adapter.delta())):
        dense = outputs(tiny_world)[1]
    assert torch.allclose(hooked, dense, atol=1e-4)


def test_shapes_are_those_of_delta(tiny_world):
    (adapter,) = full_edit(tiny_world).adapters
    assert adapter.shapes() == {n: tuple(v.shape) for n, v in adapter.delta().items()}


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("batch_size", [3, 2])
def test_a_gate_acts_on_the_rows_of_its_prompts(tiny_world, church, part, guidance, batch_size):
    """Images of other prompts are the base's to the bit."""
    edit = only_adapters(tiny_world, "church", part)
    prompts, seeds = ["dog", "a church", "Noto"], [0, 1, 2]
    options = {**FAST, "guidance": guidance, "batch_size": batch_size}
    base, edited = (sample(tiny_world, prompts, seeds, e, **options) for e in (None, edit))
    assert torch.equal(edited[0], base[0]) and torch.equal(edited[2], base[2])
    assert (edited[1] - base[1]).abs().max() > 1e-3
    if part == "unet":  # both halves of a guided batch: no prompt, and the prompts
        rows = prompts[:batch_size]
        assert church[0] == ([""] * batch_size + rows if guidance != 1 else rows)
    assert tiny_world.rows is None


def test_a_gate_that_is_always_1_for_a_prompt_is_no_gate(tiny_world, church):
    prompts = ["church", "a church"]
    gated, plain = (
        sample(tiny_world, prompts, [0, 1], only_adapters(tiny_world, gate, "unet"), guidance=1.0,
               **FAST)
        for gate in ("church", "always")
    )  # fmt: skip
    assert torch.equal(gated, plain)


def test_outside_sampling_the_gate_counts_1(tiny_world, church):
    """Training, inversion and M-Score predict from states whose prompts nobody tells."""
    gated, plain = only_adapters(tiny_world, "church"), only_adapters(tiny_world)
    found = []
    for edit in (gated, plain):
        with tiny_world.applied(edit):
            x_t = torch.ones(1, *tiny_world.latent_shape)
            states = tiny_world.encode(["dog"])
            found.append((states, predict(tiny_world, {}, x_t, torch.tensor([9]), states)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and church == []


def test_a_gate_by_prompt_follows_rows_that_leave_the_batch(tiny_world, church):
    """With ``until`` a row that has arrived is gone, and its prompt with it."""
    edit = only_adapters(tiny_world, "church", "unet")
    prompts, until = ["dog", "church"], torch.tensor([900, 5])
    states = tiny_world.encode(prompts)
    x_T = torch.randn(2, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))

    def ends(edit, rows):
        how = Sampling(4, 5.0, "ddim")
        said = [prompts[i] for i in rows]
        with tiny_world.applied(edit):
            steps = list(
                trajectory(
                    tiny_world, states[rows], x_T[rows], how, prompts=said, until=until[rows]
                )
            )
        return steps[-1][1]

    both = ends(edit, [0, 1])
    assert torch.allclose(both[1], ends(edit, [1])[0], atol=1e-5)
    assert torch.allclose(both[0], ends(None, [0])[0], atol=1e-5)
    assert not torch.allclose(both[1], ends(None, [1])[0], atol=1e-3)
    assert ["", "church"] in church and ["", "", "dog", "church"] in church


def test_a_guard_s_own_pass_is_gated_by_its_phrase(tiny_world, church):
    """An adapter of "church" lets a guard against "dog" see the base's dog, and no other."""
    gated = only_adapters(tiny_world, "church").adapters
    images = [
        sample(tiny_world, ["Noto"], [0], Edit({}, adapters=a, guards=(NegativePrompt(p),)), **FAST)
        for a, p in (((), "dog"), (gated, "dog"), ((), "church"), (gated, "church"))
    ]
    assert torch.equal(images[0], images[1])
    assert (images[2] - images[3]).abs().max() > 1e-3


def test_adapters_and_increments_of_one_layer_add_up(tiny_world):
    edit = only_adapters(tiny_world)
    (adapter,), delta = edit.adapters, random_edit(tiny_world).delta
    dense = adapter.delta()
    total = {n: delta.get(n, 0.0) + dense.get(n, 0.0) for n in [*delta, *dense]}
    with tiny_world.applied(Edit(delta, adapters=(adapter, adapter.scaled(-0.5)))):
        ours = outputs(tiny_world)
    half = {n: total[n] - 0.5 * dense[n] if n in dense else total[n] for n in total}
    with tiny_world.applied(Edit(half)):
        theirs = outputs(tiny_world)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_gates_are_known_by_their_names(monkeypatch):
    monkeypatch.setattr(adapters, "GATES", dict(adapters.GATES))
    gate, other = (lambda world, adapter, prompts: torch.zeros(len(prompts)) for _ in range(2))
    register_gate("toy", gate)
    register_gate("toy", gate)  # a notebook's cell may run twice
    assert adapters.GATES["toy"] is gate
    with pytest.raises(ValueError, match="a gate 'toy' already"):
        register_gate("toy", other)


@pytest.mark.parametrize(
    ("down", "up", "gate", "said"),
    [
        ({"a": (2, 4)}, {"a": (3, 2)}, "spmm", "unknown gate 'spmm': choose from always"),
        ({}, {}, "always", "needs a layer"),
        ({"a": (2, 4)}, {"b": (3, 2)}, "always", "A and B for each"),
        ({"a": (2, 4)}, {"a": (3, 1)}, "always", r"a has A \(2, 4\) and B \(3, 1\)"),
        ({"a": (2, 4, 3, 3)}, {"a": (3, 2)}, "always", r"want \(r, in, ...\)"),
    ],
)
def test_bad_adapters(down, up, gate, said):
    down, up = ({n: torch.ones(s) for n, s in m.items()} for m in (down, up))
    with pytest.raises(ValueError, match=said):
        Adapter(down, up, gate=gate)


def test_layers_that_take_no_adapter(tiny_world):
    norm = next(n for n, m in tiny_world.unet.named_modules() if isinstance(m, nn.GroupNorm))
    with pytest.raises(ValueError, match="is a GroupNorm: adapters fit linear and conv layers"):
        layer_of(tiny_world, f"unet.{norm}")
    with pytest.raises(ValueError, match=r"has no layer 'unet\.nowhere'"):
        layer_of(tiny_world, "unet.nowhere")
    with pytest.raises(ValueError, match="unknown part 'vae'"):
        layer_of(tiny_world, "vae.encoder")
