"""Edits: named increments of the UNet's weights, which add, subtract, scale, save, load and merge."""

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from helpers.files import complete

FORMAT = "lethe-edit-1"


@dataclass
class Edit:
    """What a method changed: theta_edited = theta_base + delta.

    delta: parameter name -> increment, fp32, of the parameter's shape. history: one dict a training step.
    meta: method, concepts, options, seed, base (fingerprint of the base weights), versions, seconds.
    """

    delta: dict[str, Tensor]
    history: list[dict] = field(default_factory=list)
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        for name, value in self.delta.items():
            if value.dtype != torch.float32:
                raise ValueError(f"the increment of {name} is {value.dtype}: increments are kept in float32")
            if not torch.isfinite(value).all():
                raise ValueError(f"the increment of {name} holds NaN or infinity: train again with a lower rate")

    @property
    def M(self) -> int:
        """Number of parameter tensors that the edit touches: the divisor of ``norm``."""
        return len(self.delta)

    def norm(self) -> float:
        """||delta||_1 / M, M the number of parameter tensors touched (SepME, Table 1; M is 80 or 32 in its tables)."""
        if not self.delta:
            return 0.0
        return sum(value.abs().sum(dtype=torch.float64).item() for value in self.delta.values()) / self.M

    def check(self, world) -> None:
        """ValueError if the edit was made for other base weights, another shape or a parameter that the world lacks."""
        base = self.meta.get("base")
        if base is not None and base != world.fingerprint():
            raise ValueError(
                f"this edit was made for base weights {base}, and the world {world.name!r} holds {world.fingerprint()}: "
                "load the world that it was trained on (and leave any `with world.applied(...)` block first)"
            )
        parameters = dict(world.unet.named_parameters())
        for name, value in self.delta.items():
            if name not in parameters:
                raise ValueError(f"the world {world.name!r} has no parameter {name!r}: the edit is for another model")
            if parameters[name].shape != value.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameters[name].shape)} in the world {world.name!r} "
                    f"and {tuple(value.shape)} in the edit: the edit is for another model"
                )

    def _combine(self, other: "Edit", sign: float) -> "Edit":
        mine, theirs = self.meta.get("base"), other.meta.get("base")
        if mine != theirs:
            raise ValueError(
                f"the edits were made for different base weights ({mine} and {theirs}) and cannot be merged"
            )
        delta = {name: value.clone() for name, value in self.delta.items()}
        for name, value in other.delta.items():
            if name in delta and delta[name].shape != value.shape:
                raise ValueError(
                    f"{name} has shapes {tuple(delta[name].shape)} and {tuple(value.shape)} in the two edits"
                )
            delta[name] = delta[name] + sign * value if name in delta else sign * value
        concepts = [*self.meta.get("concepts", []), *other.meta.get("concepts", [])] if sign > 0 else []
        return Edit(delta, meta={"base": mine, "concepts": concepts, "merged_from": [self.meta, other.meta]})

    def __add__(self, other: "Edit") -> "Edit":
        return self._combine(other, 1.0)

    def __sub__(self, other: "Edit") -> "Edit":
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> "Edit":
        return Edit({name: factor * value for name, value in self.delta.items()}, meta={**self.meta, "scale": factor})

    __rmul__ = __mul__

    def __neg__(self) -> "Edit":
        return -1.0 * self

    def save(self, path: str | Path) -> Path:
        """Write increments, history and meta to one safetensors file, under a temporary name and then renamed."""
        path = Path(path)
        metadata = {"format": FORMAT, "meta": json.dumps(self.meta), "history": json.dumps(self.history)}
        with complete(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.delta.items()}, temporary, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read what ``save`` wrote. FileNotFoundError, or ValueError for a file that is cut short or of another kind."""
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no edit at {str(path)!r}: check the path that edit.save returned")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                delta = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{Path(path).name} is no readable safetensors file (cut short?): save it again"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{Path(path).name} holds tensors but no Lethe edit: its metadata lacks {FORMAT!r}")
        return cls(delta, json.loads(metadata["history"]), json.loads(metadata["meta"]))

    def export(self, world, folder: str | Path) -> Path:
        """Write the edited world as a pipeline folder that plain ``StableDiffusionPipeline.from_pretrained`` loads.

        Merged in fp32, cast to the world's type last. FileExistsError for a folder that holds something already.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"the folder {folder.name!r} is not empty: choose another, or empty it first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, world.applied(self):
            world.pipe.save_pretrained(Path(temporary) / "pipeline")
            os.replace(Path(temporary) / "pipeline", folder)
        return folder

    def export_lora(self, path: str | Path, *, rank: int | None = None) -> Path:
        """Write the edit as a LoRA file (PEFT's layout) that ``pipe.load_lora_weights`` reads: delta = B A.

        B (d_out, r) and A (r, d_in) come from the singular value decomposition in float64; r is the largest rank that a layer
        needs (then the file is exact to rounding), or ``rank`` (then it is the best approximation of that rank).
        ValueError for an edit of biases or convolutions, which has no such form: train with ``group="kv"``.
        """
        unfit = sorted(name for name, value in self.delta.items() if value.ndim != 2 and value.any())
        if unfit:
            raise ValueError(
                f"{unfit[0]} is no matrix, so the edit has no LoRA form: train with group='kv', or use edit.export"
            )
        parts = {n: torch.linalg.svd(v.double(), full_matrices=False) for n, v in self.delta.items() if v.ndim == 2}
        if not parts:
            raise ValueError("the edit holds no matrix: there is nothing to export")
        needed = max(int((s > 1e-7 * s[0].clamp_min(1e-30)).sum()) for _, s, _ in parts.values())
        r = max(1, min(needed, rank or needed))
        tensors = {}
        for name, (U, s, Vh) in parts.items():
            module, root = "unet." + name.removesuffix(".weight"), s[:r].sqrt()
            gap = r - len(root)  # one rank for all layers, since readers scale by one alpha: zeros fill up
            tensors[module + ".lora_B.weight"] = pad(U[:, :r] * root, (0, gap))  # (d_out, r)
            tensors[module + ".lora_A.weight"] = pad(root[:, None] * Vh[:r], (0, 0, 0, gap))  # (r, d_in)
        path = Path(path)
        metadata = {"format": "pt", "meta": json.dumps(self.meta)}
        with complete(path) as temporary:
            save_file({n: value.float().contiguous() for n, value in tensors.items()}, temporary, metadata=metadata)
        return path
