"""Checkpoints: tensors and Adam's moments in one safetensors file, so that a killed run goes on."""

import json
from pathlib import Path

import torch
from torch import Tensor

from helpers.checked import load_tensors, save_tensors
from helpers.files import shown

FORMAT = "lethe-checkpoint-2"  # the first had neither its name nor a digest
REMEDY = "delete it to train from the beginning, or give this run a file of its own"


def save_checkpoint(path: str | Path, groups: dict[str, dict[str, Tensor]], **metadata) -> None:
    """Write named groups of tensors and JSON metadata to a file that is whole or absent.

    OSError names the file where it cannot be written.
    """
    flat = {
        f"{group}/{name}": value for group, tensors in groups.items()
        for name, value in tensors.items()
    }  # fmt: skip
    about = {k: json.dumps(v) for k, v in metadata.items()}
    save_tensors(path, flat, {"format": json.dumps(FORMAT), **about})


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """What ``save_checkpoint`` wrote, groups and metadata; two empty dicts without a file.

    Checkpoints of the first format are read too. ValueError names a file that is damaged or no
    checkpoint, and the remedy.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    if not Path(path).exists():
        return groups, {}
    tensors, texts = load_tensors(path, "checkpoint", REMEDY, signed=(json.dumps(FORMAT),))
    try:
        metadata = {k: json.loads(v) for k, v in texts.items()}
        for key, value in tensors.items():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = value
    except (ValueError, RecursionError) as error:
        kind = "an edit" if "edit" in texts.get("format", "") else "of another kind"
        raise ValueError(f"{shown(path)} is no checkpoint, it is {kind}: {REMEDY}") from error
    if metadata.pop("format", FORMAT) != FORMAT:
        raise ValueError(f"{shown(path)} is of a format that this version does not know: {REMEDY}")
    return groups, metadata


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments as a flat dict of tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{key}": torch.as_tensor(value)
        for i, entry in state.items()
        for key, value in entry.items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``moments``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
