"""Edits: what a method changed, which adds, subtracts, scales, saves and loads."""

import functools
import json
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers import export
from helpers.adapters import Adapter, layer_of
from helpers.files import complete
from helpers.guards import Guard, guard_from

FORMAT, FIRST_FORMAT = "lethe-edit-2", "lethe-edit-1"


@dataclass
class Edit:
    """theta_edited = theta_base + delta, and what acts while sampling.

    delta: full parameter name ("unet.<name>", "text_encoder.<name>") -> increment, fp32, of the
    parameter's shape. adapters: increments gated by the prompt. guards: what wraps the denoiser.
    parts: an edit for each concept, where the method keeps them apart; their sum is this edit.
    history: one dict a training step. meta: method, concepts {name: factor}, options, seed, base
    {part: fingerprint of its weights}, versions, seconds.
    ValueError for an increment that is not fp32 or not finite.
    """

    delta: dict[str, Tensor]
    history: list[dict] = field(default_factory=list)
    meta: dict = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    guards: tuple[Guard, ...] = ()
    parts: dict[str, "Edit"] = field(default_factory=dict)

    def __post_init__(self):
        for name, value in self.delta.items():
            if value.dtype != torch.float32:
                raise ValueError(
                    f"the increment of {name} is {value.dtype}: increments are kept in float32"
                )
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"the increment of {name} holds NaN or infinity: train again with a lower rate"
                )
        if self.meta:
            self.meta = labelled(self.meta)

    @property
    def concepts(self) -> dict[str, float]:
        """Concept -> factor: 1 where it is erased once, -1 where an erasure was taken back."""
        return self.meta.get("concepts", {})

    @property
    def erased(self) -> list[str]:
        """What the edit erases: the concepts with a positive factor."""
        return [concept for concept, factor in self.concepts.items() if factor > 0]

    @property
    def base(self) -> dict[str, str]:
        """Part of the pipeline -> fingerprint of the weights that the edit was made for."""
        return self.meta.get("base", {})

    @property
    def M(self) -> int:
        """Number of parameter tensors touched, adapters' included: the divisor of ``norm``."""
        return len(self.delta.keys() | {n for a in self.adapters for n in a.shapes()})

    def norm(self) -> float:
        """||delta||_1 / M, M the number of parameter tensors touched; 0 for an edit that has none.

        Adapters count at full strength. Source: SepME, Table 1 (M is 80 or 32 in its tables).
        """
        total = sum(
            value.abs().sum(dtype=torch.float64).item() for value in export.dense(self).values()
        )
        return total / max(1, self.M)

    def require_fit(self, world, *, transfer: bool = False) -> None:
        """ValueError if the edit was made for other base weights, or for names or shapes that the
        world lacks. transfer: only names and shapes count."""
        for part, fingerprint in {} if transfer else self.base.items():
            if fingerprint != world.fingerprint(part):
                raise ValueError(
                    f"this edit was made for base weights {fingerprint} of the {part}, and the "
                    f"world {world.name!r} holds {world.fingerprint(part)}: load the world it was "
                    "trained on, or use applied(edit, transfer=True) if you mean another one"
                )
        shapes = [(name, tuple(value.shape)) for name, value in self.delta.items()]
        shapes += [item for adapter in self.adapters for item in adapter.shapes().items()]
        parameters = world.parameters(name for name, _ in shapes)
        for name, shape in shapes:
            if name not in parameters:
                raise ValueError(
                    f"the world {world.name!r} has no parameter {name!r}: "
                    "the edit is for another model"
                )
            if parameters[name].shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameters[name].shape)} in the world {world.name!r} "
                    f"and {shape} in the edit: the edit is for another model"
                )
        for adapter in self.adapters:
            for name in adapter.down:
                layer_of(world, name)

    # --- algebra

    def _combine(self, other: "Edit", sign: float) -> "Edit":
        clash = {p for p in self.base.keys() & other.base.keys() if self.base[p] != other.base[p]}
        if clash:
            raise ValueError(
                f"the edits were made for different base weights ({self.base} and {other.base}) "
                "and cannot be merged"
            )
        delta = {name: value.clone() for name, value in self.delta.items()}
        for name, value in other.delta.items():
            if name in delta and delta[name].shape != value.shape:
                raise ValueError(
                    f"{name} has shapes {tuple(delta[name].shape)} and {tuple(value.shape)} "
                    "in the two edits"
                )
            delta[name] = delta[name] + sign * value if name in delta else sign * value
        meta = {
            "base": self.base | other.base,
            "concepts": added(self.concepts, other.concepts, sign),
            "merged_from": [self.meta, other.meta],
        }
        adapters = joined_adapters(self.adapters, [a.scaled(sign) for a in other.adapters])
        guards = joined_guards(self.guards, other.guards, sign)
        return Edit(delta, [], meta, adapters, guards, joined_parts(self, other, sign))

    def __add__(self, other: "Edit") -> "Edit":
        return self._combine(other, 1.0)

    def __sub__(self, other: "Edit") -> "Edit":
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> "Edit":
        if self.guards and factor != 1:
            raise ValueError(f"a guard has no {factor:g}-fold: give its own strength instead")
        concepts = {c: factor * f for c, f in self.concepts.items() if factor * f != 0}
        meta = {**self.meta, "concepts": concepts, "scale": factor * self.meta.get("scale", 1.0)}
        return Edit(
            {name: factor * value for name, value in self.delta.items()}, [], meta,
            tuple(a.scaled(factor) for a in self.adapters) if factor else (), self.guards,
            {name: factor * part for name, part in self.parts.items()},
        )  # fmt: skip

    __rmul__ = __mul__

    def __neg__(self) -> "Edit":
        return -1.0 * self

    @staticmethod
    def sum(edits: Iterable["Edit"]) -> "Edit | None":
        """The sum of edits; None, which stands for the base, for none."""
        edits = list(edits)
        return functools.reduce(operator.add, edits) if edits else None

    # --- files

    def save(self, path: str | Path) -> Path:
        """Write increments, adapters, guards, parts, history and meta to one safetensors file.

        The file is written under a temporary name and then renamed.
        """
        path = Path(path)
        tensors, description = _packed(self)
        metadata = {"format": FORMAT, "edit": json.dumps(description)}
        with complete(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read what ``save`` wrote, in this format or the first.

        FileNotFoundError, or ValueError for a file that is cut short or of another kind.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no edit at {str(path)!r}: check the path that edit.save returned"
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path.name} is no readable safetensors file (cut short?): save it again"
            ) from error
        if metadata.get("format") == FIRST_FORMAT:
            delta = {f"unet.{name}": value for name, value in tensors.items()}
            return cls(delta, json.loads(metadata["history"]), json.loads(metadata["meta"]))
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path.name} holds tensors but no Lethe edit: its metadata lacks {FORMAT!r}"
            )
        return _unpacked(tensors, json.loads(metadata["edit"]))

    def export(self, world, folder: str | Path) -> Path:
        """The edited world as a pipeline folder for plain diffusers: see ``export.export``."""
        return export.export(self, world, folder)

    def export_lora(self, path: str | Path, *, rank: int | None = None) -> Path:
        """The edit as a LoRA file for ``pipe.load_lora_weights``: see ``export.export_lora``."""
        return export.export_lora(self, path, rank=rank)


def labelled(meta: dict) -> dict:
    """Meta with concepts as {name: factor} and base as {part: fingerprint}, however given."""
    meta = dict(meta)
    if not isinstance(meta.get("concepts", {}), dict):
        meta["concepts"] = dict.fromkeys(meta["concepts"], 1.0)
    if isinstance(meta.get("base"), str):
        meta["base"] = {"unet": meta["base"]}
    return meta


def added(a: dict[str, float], b: dict[str, float], sign: float) -> dict[str, float]:
    """Factors of concepts, added or subtracted; what comes to zero is dropped."""
    total = {c: a.get(c, 0.0) + sign * b.get(c, 0.0) for c in [*a, *b]}
    return {c: f for c, f in total.items() if not math.isclose(f, 0.0, abs_tol=1e-9)}


def joined_adapters(mine: Iterable[Adapter], theirs: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """Both lists of adapters; equal ones add their factors, and zeros are dropped."""
    found = list(mine)
    for adapter in theirs:
        i = next((i for i, known in enumerate(found) if known.is_same_as(adapter)), None)
        if i is None:
            found.append(adapter)
            continue
        known = found.pop(i)
        factor = known.factor + adapter.factor
        if factor:
            found.insert(i, Adapter(known.down, known.up, factor, known.gate, known.settings))
    return tuple(found)


def joined_guards(mine: tuple, theirs: tuple, sign: float) -> tuple[Guard, ...]:
    """Guards after a sum or a difference. ValueError for taking away one that is not there."""
    found = list(mine)
    for guard in theirs:
        if sign > 0:
            found.append(guard)
        elif guard in found:
            found.remove(guard)
        else:
            raise ValueError(
                f"there is no {guard} to take away: subtract it from a sum that has it"
            )
    return tuple(found)


def own_parts(edit: Edit) -> dict[str, Edit]:
    """One edit for each concept; that of one concept is its own part. Empty if they are mixed."""
    if edit.parts:
        return edit.parts
    return {edit.erased[0]: edit} if len(edit.concepts) == len(edit.erased) == 1 else {}


def joined_parts(a: Edit, b: Edit, sign: float) -> dict[str, Edit]:
    """One edit for each concept after a sum or a difference, where both sides still tell them.

    They add up to the result: a part is taken away only by itself, not by another edit of its
    concept, and two parts of one concept are not told apart.
    """
    mine, theirs = own_parts(a), own_parts(b)
    if not mine or not theirs or mine.keys() != a.concepts.keys():
        return {}
    if sign > 0:
        clash = mine.keys() & theirs.keys() or theirs.keys() != b.concepts.keys()
        return {} if clash else {**mine, **theirs}
    if not all(name in mine and same(mine[name], part) for name, part in theirs.items()):
        return {}
    return {name: part for name, part in mine.items() if name not in theirs}


def same(a: Edit, b: Edit) -> bool:
    """Whether two edits change the same, to the bit."""
    return (
        a.delta.keys() == b.delta.keys()
        and all(torch.equal(value, b.delta[name]) for name, value in a.delta.items())
        and a.guards == b.guards
        and len(a.adapters) == len(b.adapters)
        and all(
            x.is_same_as(y) and x.factor == y.factor
            for x, y in zip(a.adapters, b.adapters, strict=True)
        )
    )


def _packed(edit: Edit, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """An edit as tensors with distinct names and a description for JSON."""
    # a copy: the whole and its parts may share tensors, which safetensors refuses
    tensors = {f"{prefix}delta:{n}": v.contiguous().clone() for n, v in edit.delta.items()}
    described = []
    for i, adapter in enumerate(edit.adapters):
        for side, matrices in (("down", adapter.down), ("up", adapter.up)):
            for name, value in matrices.items():
                tensors[f"{prefix}adapter{i}.{side}:{name}"] = value.contiguous().clone()
        described.append(
            {"factor": adapter.factor, "gate": adapter.gate, "settings": adapter.settings}
        )
    parts = {}
    for i, (name, part) in enumerate(edit.parts.items()):
        more, parts[name] = _packed(part, f"{prefix}part{i}/")
        tensors |= more
    return tensors, {
        "meta": edit.meta, "history": edit.history, "adapters": described,
        "guards": [guard.described() for guard in edit.guards], "parts": parts,
    }  # fmt: skip


def _unpacked(tensors: dict[str, Tensor], description: dict, prefix: str = "") -> Edit:
    """The inverse of ``_packed``."""

    def below(start: str) -> dict[str, Tensor]:
        return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}

    adapters = tuple(
        Adapter(below(f"{prefix}adapter{i}.down:"), below(f"{prefix}adapter{i}.up:"), **described)
        for i, described in enumerate(description["adapters"])
    )
    parts = {
        name: _unpacked(tensors, part, f"{prefix}part{i}/")
        for i, (name, part) in enumerate(description["parts"].items())
    }
    guards = tuple(guard_from(described) for described in description["guards"])
    delta = below(f"{prefix}delta:")
    return Edit(delta, description["history"], description["meta"], adapters, guards, parts)
