"""Edits: what a method changed, which adds, subtracts, scales, saves and loads."""

import functools
import json
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from helpers import export
from helpers.adapters import Adapter, layer_of
from helpers.checked import load_tensors, save_tensors
from helpers.files import shown
from helpers.guards import Guard, guard_from
from helpers.identity import plain
from helpers.options import Count, File, in_words, typed

FORMAT = "lethe-edit-3"  # with a digest of tensors and metadata
OLDER, FIRST_FORMAT = "lethe-edit-2", "lethe-edit-1"  # without: read, as before
REMEDY = "save it again from the edit in memory, take a copy, or train it again"
NOISE = 4 * torch.finfo(torch.float32).eps  # what rounding leaves, relative to what cancels


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

    __array_ufunc__ = None  # a NumPy number leaves the product to the edit

    def __post_init__(self):
        self._require_sound()
        if self.meta:
            self.meta = labelled(self.meta)

    def _require_sound(self) -> None:
        """ValueError for tensors that no file could give back: not fp32, or not finite."""
        matrices = [m for a in self.adapters for side in (a.down, a.up) for m in side.items()]
        if not isinstance(self.delta, Mapping):
            raise ValueError(f"delta is {in_words(self.delta)}: give increments by parameter name")
        for name, value in [*self.delta.items(), *matrices]:
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the increment of {name} is {in_words(value)}: give a tensor of float32"
                )
            if value.dtype != torch.float32:
                raise ValueError(
                    f"the increment of {name} is {value.dtype}: increments are kept in float32"
                )
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"the increment of {name} holds NaN or infinity: train again with a lower rate"
                )

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
        if not isinstance(other, Edit):
            raise ValueError(f"an edit adds to another edit, not to {other!r}: give an Edit")
        clash = {p for p in self.base.keys() & other.base.keys() if self.base[p] != other.base[p]}
        if clash:
            raise ValueError(
                f"the edits were made for different base weights ({self.base} and {other.base}) "
                "and cannot be merged"
            )
        adapters = joined_adapters(self.adapters, [a.scaled(sign) for a in other.adapters])
        delta = joined_delta(self.delta, other.delta, sign)
        left = touched(delta, adapters)  # a part that nothing touches any more may be another one
        gone = (touched(self.delta, self.adapters) | touched(other.delta, other.adapters)) - left
        base = {p: mark for p, mark in (self.base | other.base).items() if p not in gone}
        meta = {
            "base": base,
            "concepts": added(self.concepts, other.concepts, sign),
            "merged_from": joined_sources(sources(self), sources(other, sign)),
        }
        guards = joined_guards(self.guards, other.guards, sign)
        return Edit(delta, [], meta, adapters, guards, joined_parts(self, other, sign))

    def __add__(self, other: "Edit") -> "Edit":
        return self._combine(other, 1.0)

    def __radd__(self, other) -> "Edit":
        if isinstance(other, int) and other == 0:  # where Python's sum begins
            return self
        return self._combine(other, 1.0)

    def __sub__(self, other: "Edit") -> "Edit":
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> "Edit":
        factor = number(factor)
        if self.guards and factor != 1:
            raise ValueError(f"a guard has no {factor:g}-fold: give its own strength instead")
        concepts = {c: factor * f for c, f in self.concepts.items() if factor * f != 0}
        meta = {**self.meta, "concepts": concepts, "scale": factor * self.meta.get("scale", 1.0)}
        if "merged_from" in meta:
            meta["merged_from"] = sources(self, factor)
        delta = {name: factor * value for name, value in self.delta.items()} if factor else {}
        if not all(value.isfinite().all() for value in delta.values()):
            raise ValueError(f"{factor:g} times this edit is beyond float32: give a smaller factor")
        return Edit(
            delta, [], meta,
            tuple(a.scaled(factor) for a in self.adapters) if factor else (), self.guards,
            {name: factor * part for name, part in self.parts.items()} if factor else {},
        )  # fmt: skip

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Edit":
        if number(divisor) == 0:
            raise ValueError("an edit has no 0th part: divide by another number")
        return self * (1 / number(divisor))

    def __neg__(self) -> "Edit":
        return -1.0 * self

    @staticmethod
    @typed
    def sum(edits: Iterable["Edit"]) -> "Edit | None":
        """The sum of edits; None, which stands for the base, for none."""
        return functools.reduce(operator.add, edits) if edits else None

    # --- files

    @typed
    def save(self, path: File) -> Path:
        """Write increments, adapters, guards, parts, history and meta to one safetensors file.

        The file is whole or absent, and has a digest of all that it holds. Paths and NumPy's
        numbers in the meta become text and plain numbers. ValueError, before anything is written,
        names what no file could hold; OSError names the file where it cannot be written.
        """
        path = Path(path)
        tensors, description = _packed(self)
        text = json.dumps(plain(description, "the edit"))
        save_tensors(path, tensors, {"format": FORMAT, "edit": text})
        return path

    @classmethod
    @typed
    def load(cls, path: File) -> "Edit":
        """Read what ``save`` wrote, in this format or an older one.

        FileNotFoundError, or ValueError names a file that is cut short, damaged, or of another
        kind, and the remedy.
        """
        tensors, metadata = load_tensors(path, "edit", REMEDY, signed=[FORMAT])
        known, kind = (FORMAT, OLDER, FIRST_FORMAT), metadata.get("format")
        if kind not in known:
            newer = f"of the format {kind!r}, and this version reads {', '.join(known)}"
            why = f"{newer}: update the kit" if kind else f"no Lethe edit (no format): {REMEDY}"
            raise ValueError(f"{shown(path)} holds tensors but is {why}")
        try:
            if kind == FIRST_FORMAT:
                delta = {f"unet.{name}": value for name, value in tensors.items()}
                history, meta = (json.loads(metadata[key]) for key in ("history", "meta"))
                return cls(delta, *checked_description(history, meta))
            return _unpacked(tensors, json.loads(metadata["edit"]))
        except KeyError as error:
            raise ValueError(
                f"{shown(path)} is damaged: its metadata lacks {error.args[0]!r}: {REMEDY}"
            ) from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{shown(path)} cannot be read: {error}; {REMEDY}") from error

    @typed
    def export(self, world, folder: File) -> Path:
        """The edited world as a pipeline folder for plain diffusers: see ``export.export``."""
        return export.export(self, world, folder)

    @typed
    def export_lora(self, path: File, *, rank: Count | None = None) -> Path:
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


def checked_description(history, meta) -> tuple[list[dict], dict]:
    """History and meta of a file. ValueError if they are not a list of dicts and a dict."""
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"its history is {str(history)[:40]!r}, not a list of steps")
    if not isinstance(meta, dict):
        raise ValueError(f"its meta is {str(meta)[:40]!r}, not a dict")
    found = meta.get("concepts", {})
    factors = found.values() if isinstance(found, dict) else [1.0]
    good = all(isinstance(f, int | float) and math.isfinite(f) for f in factors)
    if not isinstance(found, dict | list) or not good:
        raise ValueError(f"its concepts are {found!r}, not names with their factors")
    if not isinstance(meta.get("base", {}), dict | str):
        raise ValueError(f"its base is {meta['base']!r}, not fingerprints by part")
    return history, meta


def number(factor) -> float:
    """A factor of an edit as a plain number. ValueError for what is no finite number."""
    if isinstance(factor, Tensor) and factor.ndim == 0:
        factor = factor.item()
    if not isinstance(factor, Real) or not math.isfinite(factor):
        raise ValueError(f"the factor of an edit is {in_words(factor)}: give a finite number")
    return float(factor)


def sources(edit: Edit, factor: float = 1.0) -> list[dict]:
    """The metas of the trainings that an edit is the sum of, each with its "scale" in the sum."""
    found = edit.meta.get("merged_from") or ([edit.meta] if edit.meta else [])
    scaled = []
    for meta in found:
        concepts = {c: factor * f for c, f in labelled(meta).get("concepts", {}).items()}
        scale = factor * meta.get("scale", 1.0)
        scaled.append({**meta, "concepts": concepts, "scale": scale})
    return scaled


def joined_sources(mine: list[dict], theirs: list[dict]) -> list[dict]:
    """A flat list of both; the same training counts once, and one that cancels is left out."""
    found: list[dict] = []
    for meta in [*mine, *theirs]:
        known = next((m for m in found if unscaled(m) == unscaled(meta)), None)
        if known is None:
            found.append(dict(meta))
            continue
        known["scale"] += meta["scale"]
        known["concepts"] = added(known["concepts"], meta["concepts"], 1.0)
    return [meta for meta in found if not math.isclose(meta["scale"], 0.0, abs_tol=1e-9)]


def unscaled(meta: dict) -> dict:
    """A source's meta without what its factor changes."""
    names = sorted(meta["concepts"])
    return {**{k: v for k, v in meta.items() if k != "scale"}, "concepts": names}


def touched(delta: dict[str, Tensor], adapters: Iterable[Adapter]) -> set[str]:
    """The parts of the pipeline that increments and adapters change."""
    names = [*delta, *(name for adapter in adapters for name in adapter.down)]
    return {name.partition(".")[0] for name in names}


def joined_delta(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], sign: float
) -> dict[str, Tensor]:
    """Increments of a sum or a difference; a tensor that cancels, up to rounding, is left out.

    ValueError for different shapes under one name.
    """
    total = {name: value.clone() for name, value in mine.items()}
    for name, value in theirs.items():
        if name not in total:
            total[name] = sign * value
            continue
        before = total.pop(name)
        if before.shape != value.shape:
            raise ValueError(
                f"{name} has shapes {tuple(before.shape)} and {tuple(value.shape)} in the two edits"
            )
        largest = max((v.abs().max().item() for v in (before, value) if v.numel()), default=0.0)
        result = before + sign * value
        if largest == 0 or result.abs().max() > NOISE * largest:
            total[name] = result
    return {name: total[name] for name in {**mine, **theirs} if name in total}


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
    """An edit as tensors with distinct names and a description for JSON. ValueError for an edit
    that could not be read again."""
    edit._require_sound()
    checked_description(edit.history, edit.meta)
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
    """The inverse of ``_packed``. ValueError, KeyError or TypeError for what it did not write."""
    if not isinstance(description, dict):
        raise ValueError(f"it describes {str(description)[:40]!r}, no edit")

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
    about = checked_description(description["history"], description["meta"])
    return Edit(delta, *about, adapters, guards, parts)
