"""Checkpoints: tensors and Adam's moments in one safetensors file, so that a killed run goes on."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.files import complete


def save_checkpoint(path: str | Path, groups: dict[str, dict[str, Tensor]], **metadata) -> None:
    """Write named groups of tensors and JSON metadata to a file that is whole or absent."""
    flat = {
        f"{group}/{name}": value.detach().cpu().contiguous()
        for group, tensors in groups.items()
        for name, value in tensors.items()
    }
    with complete(path) as temporary:
        save_file(flat, temporary, metadata={k: json.dumps(v) for k, v in metadata.items()})


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """What ``save_checkpoint`` wrote, groups and metadata; two empty dicts without a file."""
    groups: dict[str, dict[str, Tensor]] = {}
    if not Path(path).exists():
        return groups, {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        return groups, {k: json.loads(v) for k, v in (file.metadata() or {}).items()}


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
