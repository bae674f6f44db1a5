"""Adapters: low-rank increments whose strength is asked for each prompt while sampling."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A gate says how strongly an adapter acts on each prompt: (world, adapter, prompts) -> (n,).
# Files name a gate, they hold no code: an edit with another gate needs it registered first.
GATES: dict[str, Callable] = {"always": lambda world, adapter, prompts: torch.ones(len(prompts))}


def register_gate(name: str, gate: Callable) -> None:
    """Make a gate known under a name. ValueError for a name that another gate has."""
    if GATES.get(name, gate) is not gate:
        raise ValueError(f"there is a gate {name!r} already: choose another name")
    GATES[name] = gate


@dataclass(frozen=True, eq=False)
class Adapter:
    """y = W x + factor * gate(prompt) * B (A x), by a forward hook on each named layer.

    down (A), up (B): full layer name ("unet....to_k") -> matrices, (r, in) and (out, r), or for
    convolutions (r, in, kh, kw) and (out, r, 1, 1); fp32. gate: a name in ``GATES``; settings:
    what the gate reads, ready for JSON. The gate is 1 where no prompt is known (training, M-Score).
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    factor: float = 1.0
    gate: str = "always"
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.gate not in GATES:
            raise ValueError(f"unknown gate {self.gate!r}: choose from {', '.join(GATES)}")
        if not self.down or self.down.keys() != self.up.keys():
            raise ValueError("an adapter needs a layer, and A and B for each of its layers")
        for name, A in self.down.items():
            if self.up[name].ndim != A.ndim or self.up[name].shape[1] != len(A):
                raise ValueError(
                    f"{name} has A {tuple(A.shape)} and B {tuple(self.up[name].shape)}: "
                    "want (r, in, ...) and (out, r, ...)"
                )

    def is_same_as(self, other: "Adapter") -> bool:
        """Whether both are the same but for their factors."""
        if (self.gate, self.settings, self.down.keys()) != (
            other.gate, other.settings, other.down.keys(),
        ):  # fmt: skip
            return False
        pairs = ((self.down, other.down), (self.up, other.up))
        return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)

    def scaled(self, factor: float) -> "Adapter":
        """The same adapter, ``factor`` times as strong."""
        return Adapter(self.down, self.up, factor * self.factor, self.gate, self.settings)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of ``delta`` by parameter name, without its matrix products."""
        return {f"{n}.weight": (len(self.up[n]), *A.shape[1:]) for n, A in self.down.items()}

    def delta(self, strength: float = 1.0) -> dict[str, Tensor]:
        """The dense increments at one strength: factor * strength * B A, by parameter name."""
        found = {}
        for name, A in self.down.items():
            product = self.up[name].flatten(1) @ A.flatten(1)  # (out, in * kh * kw)
            shape = (len(product), *A.shape[1:])
            found[f"{name}.weight"] = self.factor * strength * product.view(shape)
        return found

    def strengths(self, world, device: torch.device) -> Tensor | float:
        """What the gate gives each row of the batch that the network is fed now."""
        if world.rows is None:
            return self.factor
        gate = GATES[self.gate](world, self, world.rows)
        return self.factor * gate.to(device)

    def hooks(self, world) -> list[tuple[nn.Module, Callable]]:
        """Every layer that the adapter names, with the forward hook that belongs on it."""
        return [(layer_of(world, name), self._hook(world, name)) for name in self.down]

    def _hook(self, world, name: str) -> Callable:
        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0]
            A, B = (m[name].to(x) for m in (self.down, self.up))
            if isinstance(layer, nn.Conv2d):
                conv = {k: getattr(layer, k) for k in ("stride", "padding", "dilation")}
                low = F.conv2d(F.conv2d(x, A, **conv), B)
            else:
                low = F.linear(F.linear(x, A), B)
            strength = self.strengths(world, x.device)
            if isinstance(strength, Tensor):
                strength = strength.to(x).view(-1, *[1] * (low.ndim - 1))
            return output + strength * low

        return add


def layer_of(world, name: str) -> nn.Module:
    """A layer by its full name. ValueError if there is none, or none that adapters fit."""
    part, _, rest = name.partition(".")
    try:
        layer = world.part(part).get_submodule(rest)
    except AttributeError as error:
        raise ValueError(f"the world {world.name!r} has no layer {name!r}") from error
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"{name!r} is a {type(layer).__name__}: adapters fit linear and conv layers"
        )
    return layer
