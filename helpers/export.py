"""Edits for other programs: a pipeline folder, or a LoRA file."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from helpers.checked import save_tensors
from helpers.files import complete
from helpers.identity import plain

TABLE = "_embedding.weight"  # rows that are looked up, not a matrix that is multiplied


def require_dense(edit, form: str) -> None:
    """ValueError, with the reason, for what acts while sampling: no file of weights can hold it."""
    if edit.guards:
        raise ValueError(
            f"{edit.guards[0]} acts while sampling and changes no weight, "
            f"so {form} cannot hold it: use sample(..., edit=edit)"
        )
    gated = [adapter.gate for adapter in edit.adapters if adapter.gate != "always"]
    if gated:
        raise ValueError(
            f"an adapter's strength is asked for each prompt (gate {gated[0]!r}), "
            f"and {form} has one strength: use sample(..., edit=edit), "
            "or merge adapter.delta() at a strength of yours"
        )


def dense(edit) -> dict[str, Tensor]:
    """All increments of an edit without guards or gates, its adapters merged."""
    total = dict(edit.delta)
    for adapter in edit.adapters:
        for name, value in adapter.delta().items():
            total[name] = total[name] + value if name in total else value
    return total


def export(edit, world, folder: str | Path) -> Path:
    """Write the edited world as a folder that ``StableDiffusionPipeline.from_pretrained`` loads.

    UNet and text encoder, merged in fp32 and cast to the world's type last. FileExistsError for a
    folder that holds something, NotADirectoryError for a file; ValueError for an edit that acts
    while sampling.
    """
    folder = Path(folder)
    require_dense(edit, "a pipeline folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"the folder {folder.name!r} is not empty: choose another, or empty it first"
        )
    whole = replace(edit, delta=dense(edit), adapters=(), parts={})
    with complete(folder) as temporary, world.applied(whole):
        world.pipe.save_pretrained(temporary)
    return folder


def export_lora(edit, path: str | Path, *, rank: int | None = None) -> Path:
    """Write the edit as a LoRA file (PEFT's layout) that ``pipe.load_lora_weights`` reads.

    delta = B A for UNet and text encoder; B (d_out, r) and A (r, d_in) come from the singular value
    decomposition in float64. r is the largest rank that a layer needs (then the file is exact to
    rounding), or ``rank`` (then it is the best approximation of that rank). ValueError for biases,
    norms, convolutions and embedding tables, which have no such form here, and for an edit that
    acts while sampling.
    """
    require_dense(edit, "a LoRA file")
    increments = dense(edit)
    fit = {n: v for n, v in increments.items() if v.ndim == 2 and not n.endswith(TABLE)}
    unfit = sorted(n for n, v in increments.items() if n not in fit and v.any())
    if unfit:
        raise ValueError(
            f"{unfit[0]} is no matrix of a linear layer, so the edit has no LoRA form: "
            "train with group='kv', or use export"
        )
    factors = {n: torch.linalg.svd(v.double(), full_matrices=False) for n, v in fit.items()}
    if not factors:
        raise ValueError("the edit holds no matrix: there is nothing to export")
    needed = max(int((s > 1e-7 * s[0].clamp_min(1e-30)).sum()) for _, s, _ in factors.values())
    r = max(1, min(needed, rank or needed))
    tensors: dict[str, Tensor] = {}
    for name, (U, s, Vh) in factors.items():
        module, root = name.removesuffix(".weight"), s[:r].sqrt()
        gap = r - len(root)  # one rank for all layers: readers scale by one alpha, zeros fill up
        tensors[module + ".lora_B.weight"] = pad(U[:, :r] * root, (0, gap))  # (d_out, r)
        tensors[module + ".lora_A.weight"] = pad(
            root[:, None] * Vh[:r], (0, 0, 0, gap)
        )  # (r, d_in)
    path = Path(path)
    metadata = {"format": "pt", "meta": json.dumps(plain(edit.meta, "meta"))}
    save_tensors(path, {name: value.float() for name, value in tensors.items()}, metadata)
    return path
