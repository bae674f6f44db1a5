"""Which parameters are trained, and how what Adam moves becomes increments of them."""

import pytest
import torch
from conftest import randomise
from torch.nn import functional as F

from helpers import nullspace
from helpers.attention import cross_attentions
from helpers.denoise import encode, predict
from helpers.parameters import GROUPS, Dense, LowRank, NullSpace, parts_of, select_parameters


def test_select_parameters(tiny_world):
    unet = {f"unet.{name}" for name, _ in tiny_world.unet.named_parameters()}
    text = {f"text_encoder.{n}" for n, _ in tiny_world.pipe.text_encoder.named_parameters()}
    assert set(select_parameters(tiny_world, "xattn")) == {n for n in unet if "attn2." in n}
    kv = {n for n in unet if "attn2.to_k" in n or "attn2.to_v" in n}
    assert set(select_parameters(tiny_world, "kv")) == kv
    assert set(select_parameters(tiny_world, "unet")) == unet
    assert set(select_parameters(tiny_world, "text")) == text
    with pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(tiny_world, "kv", within=["conv_in"])
    with pytest.raises(ValueError, match=r"unknown group.*'cross'.*xattn"):
        select_parameters(tiny_world, "cross")


def test_within_takes_whole_modules_by_the_unet_s_names(tiny_world):
    layer, *others = cross_attentions(tiny_world.unet)
    chosen = select_parameters(tiny_world, "xattn", within=[layer])
    assert len(chosen) == 5 and all(n.startswith(f"unet.{layer}.") for n in chosen)
    assert len(select_parameters(tiny_world, "xattn", within=[layer, others[0]])) == 10
    with pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(tiny_world, "xattn", within=[layer[:-1]])  # attn is no module


def test_a_selection_is_the_world_s_own_parameters(tiny_world):
    chosen = select_parameters(tiny_world, "kv")
    assert all(tiny_world.parameters()[n] is p for n, p in chosen.items())


def test_parts_of():
    assert parts_of(["unet.a", "unet.b"]) == ["unet"] and parts_of([]) == []
    assert parts_of(["text_encoder.a", "unet.b"]) == ["unet", "text_encoder"]


@pytest.mark.parametrize("group", GROUPS)
def test_dense_starts_at_zero_in_every_group(tiny_world, group):
    dense = Dense(tiny_world, group)
    chosen = select_parameters(tiny_world, group)
    assert dense.delta() is dense.leaves and dense.leaves.keys() == chosen.keys()
    for name, leaf in dense.leaves.items():
        assert leaf.shape == chosen[name].shape and leaf.dtype == torch.float32
        assert leaf.requires_grad and leaf.is_leaf and not leaf.any()
    assert not any(p.requires_grad for p in chosen.values())


def test_low_rank_is_b_times_a(tiny_world):
    lora = LowRank(tiny_world, "xattn", rank=2)
    matrices = {n: p for n, p in select_parameters(tiny_world, "xattn").items() if p.ndim > 1}
    delta = lora.delta()
    assert delta.keys() == matrices.keys() and len(lora.leaves) == 2 * len(matrices)
    assert not any(value.any() for value in delta.values())  # B starts at zero
    randomise(lora.leaves)
    for name, value in lora.delta().items():
        A, B = lora.leaves[f"{name}.A"], lora.leaves[f"{name}.B"]
        out, width = matrices[name].shape
        assert A.shape == (2, width) and B.shape == (out, 2)
        assert torch.equal(value, B @ A) and torch.linalg.matrix_rank(value) == 2


def test_low_rank_of_a_convolution_is_two_convolutions(tiny_world):
    lora = LowRank(tiny_world, "unet", rank=3)
    randomise(lora.leaves)
    name, layer = "unet.conv_in.weight", tiny_world.unet.conv_in
    delta = lora.delta()[name]
    assert delta.shape == layer.weight.shape
    A = lora.leaves[f"{name}.A"].view(3, *layer.weight.shape[1:])  # (r, in, kh, kw)
    B = lora.leaves[f"{name}.B"][..., None, None]  # (out, r, 1, 1)
    x = torch.randn(1, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))
    both = F.conv2d(F.conv2d(x, A, padding=1), B)
    assert torch.allclose(F.conv2d(x, delta, padding=1), both, atol=1e-5)
    assert all(value.ndim > 1 for value in lora.delta().values())  # no biases, no norms


def test_low_rank_trains_by_its_delta(tiny_world):
    """The first step moves B alone, since A's gradient is B's; then both have one."""
    lora = LowRank(tiny_world, "kv", rank=2)
    x = torch.randn(1, *tiny_world.latent_shape, generator=torch.Generator().manual_seed(0))

    def gradients():
        out = predict(tiny_world, lora.delta(), x, torch.tensor([9]), tiny_world.encode(["dog"]))
        grads = torch.autograd.grad(out.pow(2).sum(), list(lora.leaves.values()))
        sizes = dict(zip(lora.leaves, (g.abs().max().item() for g in grads), strict=True))
        return [max(v for n, v in sizes.items() if n.endswith(side)) for side in (".A", ".B")]

    a, b = gradients()
    assert a == 0 and b > 0
    randomise(lora.leaves)
    assert min(gradients()) > 0


def test_low_rank_is_seeded_and_fits_the_text_encoder(tiny_world):
    a, b, c = (LowRank(tiny_world, "kv", seed=seed).leaves for seed in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)
    lora = LowRank(tiny_world, "text", rank=1)
    randomise(lora.leaves)
    states = encode(tiny_world, ["dog"], lora.delta())
    assert not torch.allclose(states, tiny_world.encode(["dog"]))
    with pytest.raises(ValueError, match="rank is 0"):
        LowRank(tiny_world, "kv", rank=0)


def test_null_space_increments_are_not_seen_by_the_protected_states(tiny_world):
    protected, other = tiny_world.encode(["church"])[0], tiny_world.encode(["dog"])[0]
    S = nullspace.null_space(protected[:5]).float()  # (width, width - 5)
    free = NullSpace(tiny_world, S, prefix="dog: ")
    assert all(name.startswith("dog: unet.") for name in free.leaves)
    randomise(free.w)
    for name, value in free.delta().items():
        assert value.shape == tiny_world.parameters()[name].shape
        assert (protected[:5] @ value.T).abs().max() < 1e-4 < (other @ value.T).abs().max()
    assert free.delta().keys() == select_parameters(tiny_world, "kv").keys()
