"""Which parameters a method trains, and how what Adam moves becomes increments of them."""

import re
from typing import Annotated

import torch
from torch import Tensor

from helpers.options import Count, Dims, OneOf, Seed, Whole, typed
from helpers.seeds import generator_of
from helpers.worlds import PARTS, World

GROUPS = {  # sets of parameters: a pattern that their full names match
    "xattn": r"^unet\..*attn2\.",
    "kv": r"^unet\..*attn2\.to_[kv]\.",
    "noxattn": r"^unet\.(?!.*(attn2\.|norm))",  # linear layers and convolutions elsewhere
    "unet": r"^unet\.",
    "text": r"^text_encoder\.",
}
PAPER_GROUPS = {"ESD-x": "xattn", "ESD-x-strict": "kv", "ESD-u": "noxattn"}  # a paper's own names
GROUPS |= {name: GROUPS[group] for name, group in PAPER_GROUPS.items()}
Group = Annotated[str, OneOf(GROUPS)]
TEXT_PARTS = {  # of a text encoder: a pattern of names; LAST is the number of its last block
    "few-shot": r"\.mlp\.|\.LAST\.self_attn\.",
    "feed-forward": r"\.mlp\.",
    "self-attention": r"\.self_attn\.",
    "embeddings": r"\.token_embedding\.",
    "all": "",
}
Part = Annotated[str, OneOf(TEXT_PARTS)]


@typed
def select_parameters(
    world: World, group: Group = "xattn", *, within: list[str] | None = None
) -> dict[str, Tensor]:
    """Parameters of a named group by their full names, those of the UNet's modules ``within`` only
    if given. ValueError if that selects nothing."""
    inside = None if within is None else tuple(f"unet.{module}." for module in within)
    chosen = {
        name: parameter
        for name, parameter in world.parameters().items()
        if re.search(GROUPS[group], name) and (inside is None or name.startswith(inside))
    }
    if not chosen:
        raise ValueError(
            f"the group {group!r} within {within} selects no parameter: give layers that exist"
        )
    return chosen


@typed
def text_names(world: World, part: Part = "all", block: Whole | None = None) -> list[str]:
    """Full names of the parameters of one part of the text encoder, by position.

    block: of its blocks this one only, the first is 0. ValueError for a block that it does not
    have, or a part that has nothing in it.
    """
    names = select_parameters(world, "text")
    blocks = sorted({int(n) for name in names for n in re.findall(r"\.layers\.(\d+)\.", name)})
    if block is not None and block not in blocks:
        raise ValueError(f"block is {block}: the text encoder has blocks 0 to {blocks[-1]}")
    pattern = TEXT_PARTS[part].replace("LAST", str(blocks[-1]))
    inside = "" if block is None else f".layers.{block}."
    found = [name for name in names if re.search(pattern, name) and inside in name]
    if not found:
        raise ValueError(f"part {part!r} has nothing in block {block}: give another, or None")
    return found


def parts_of(names) -> list[str]:
    """The parts of the pipeline that parameters of these full names belong to."""
    return [part for part in PARTS if any(name.startswith(part + ".") for name in names)]


def group_sizes(world: World) -> list[dict]:
    """What a paper's name for a group means: a row of name, group, tensors (M), parameters each.

    ESD-u is read as in ESD's newer release: linear layers and convolutions outside cross-attention.
    (Its first release takes the norms too, and leaves out the last convolution and the time
    embedding.)
    """
    rows = []
    for name, group in PAPER_GROUPS.items():
        chosen = select_parameters(world, group).values()
        size = sum(p.numel() for p in chosen)
        rows.append({"name": name, "group": group, "tensors": len(chosen), "parameters": size})
    return rows


class Dense:
    """One increment of each parameter's own shape, trained as it is; it starts at zero."""

    def __init__(self, world: World, group: Group = "xattn", *, within: list[str] | None = None):
        self.leaves = {
            name: torch.zeros_like(p, dtype=torch.float32).requires_grad_(True)
            for name, p in select_parameters(world, group, within=within).items()
        }

    def delta(self) -> dict[str, Tensor]:
        """The increments by full parameter name."""
        return self.leaves


class NullSpace:
    """Increments of keys and values that some prompts do not see: the weights w are trained."""

    @typed(S=Dims(2))
    def __init__(self, world: World, S: Tensor, prefix: str = ""):
        self.S, self.prefix = S, prefix
        shapes = {name: p.shape for name, p in select_parameters(world, "kv").items()}
        self.w = {
            name: torch.zeros(shape[0], S.shape[1], device=S.device, requires_grad=True)
            for name, shape in shapes.items()
        }

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What Adam moves, under names that tell several concepts apart."""
        return {self.prefix + name: w for name, w in self.w.items()}

    def delta(self) -> dict[str, Tensor]:
        """w (beta S)^T for every layer: (d_out, d_in)."""
        return {name: w @ self.S.T for name, w in self.w.items()}


class LowRank:
    """LoRA: delta = B A for every matrix or convolution of a group; B starts at zero, A at random.

    A (r, in), B (out, r); a convolution's A is (r, in, kh, kw). Biases and norms are left out.
    ValueError for a rank below 1 or a seed that is none. Source: Hu et al., LoRA, Eq. 3.
    """

    @typed
    def __init__(self, world: World, group: Group = "kv", *, rank: Count = 4, seed: Seed = 0):
        generator = generator_of(seed)
        self.leaves: dict[str, Tensor] = {}
        self.shapes = {n: p.shape for n, p in select_parameters(world, group).items() if p.ndim > 1}
        for name, (out, *rest) in self.shapes.items():
            width = torch.Size(rest).numel()
            A = torch.randn(rank, width, generator=generator) / width**0.5
            self.leaves[name + ".A"] = A.to(world.device).requires_grad_(True)
            B = torch.zeros(out, rank, device=world.device)
            self.leaves[name + ".B"] = B.requires_grad_(True)

    def delta(self) -> dict[str, Tensor]:
        """B A for every layer, in the parameter's own shape."""
        return {
            name: (self.leaves[name + ".B"] @ self.leaves[name + ".A"]).view(shape)
            for name, shape in self.shapes.items()
        }
