"""Files that carry a digest of what they hold: tensors (safetensors) and results (JSON).

What is read is what was written, or the error names the file and what to do. Nothing is unpickled.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.files import complete, read_json, require_file, shown
from helpers.identity import plain, tensors_digest, value_digest

DIGEST = "digest"  # the key of a file's digest


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *,
    remedy: str = "",
) -> None:  # fmt: skip
    """Write tensors and metadata to a safetensors file, which is whole or absent, with a digest.

    OSError names the file and the remedy where it cannot be written.
    """
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    about = {**metadata, DIGEST: _digest(ready, metadata)}
    with complete(path, remedy=remedy) as temporary:
        save_file(ready, temporary, metadata=about)
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Put a file's metadata in order, in place: the library writes them in another one each time,
    and what holds the same is to be the same to the byte."""
    with open(path, "r+b") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= n:  # the same signs, so of the same length
            file.seek(8)
            file.write(text.ljust(n))


def load_tensors(
    path: str | Path, what: str, remedy: str, *, signed: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, which may be removed or replaced afterwards.

    what: what the file ought to be ("edit"). signed: the formats (metadata "format") whose files
    carry a digest; one that is there is always compared. FileNotFoundError, or ValueError names
    the file, what is wrong with it, and the remedy.
    """
    path = require_file(path, what, remedy)
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            # copies: a tensor of an open file is a view of it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except Exception as error:  # whatever the library makes of a damaged file
        raise ValueError(
            f"{shown(path)} is no readable safetensors file ({found_in(path)}): {remedy}"
        ) from error
    said = metadata.pop(DIGEST, None)
    if said is None and metadata.get("format") in signed:
        raise ValueError(f"{shown(path)} has lost its digest, so it was changed: {remedy}")
    if said is not None and said != _digest(tensors, metadata):
        raise ValueError(
            f"{shown(path)} is damaged: it is not what was written (its digest differs): {remedy}"
        )
    return tensors, metadata


def require_finite(tensors: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """ValueError for a tensor of a file that holds NaN or infinity."""
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{shown(path)} holds NaN or infinity in {name}: {remedy}")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return value_digest([tensors_digest(tensors), dict(metadata)])


def found_in(path: Path) -> str:
    """What a file that is no whole safetensors file seems to be, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: run `git lfs pull`"
    if start[:1] == b"\x80" or start.startswith(b"PK"):
        return "it is a pickled file, which nothing here reads: save it as safetensors"
    if not any(start):
        return "it is all zeros"
    return "cut short, damaged, or of another kind"


def save_json(path: str | Path, value: Mapping) -> None:
    """Write a result as JSON, which is whole or absent, with a digest."""
    text = json.dumps(signed(value), indent=1) + "\n"
    with complete(path) as temporary:
        temporary.write_text(text)


def signed(value: Mapping) -> dict:
    """A result with its digest. ValueError for what JSON cannot hold."""
    ready = plain(value, "result")
    return {**ready, DIGEST: value_digest(ready)}


def load_json(path: str | Path, what: str, remedy: str, *keys: str) -> dict:
    """What ``save_json`` wrote, or an older file without a digest. ValueError as ``read_json``, for
    a file that was changed, and for one that lacks one of the keys."""
    found = read_json(path, what, remedy)
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise ValueError(f"{shown(path)} is no {what}: it lacks {', '.join(lacking)}: {remedy}")
    said = found.pop(DIGEST, None)
    if said is not None and said != value_digest(found):
        raise ValueError(
            f"{shown(path)} is damaged: it is not what was written (its digest differs): {remedy}"
        )
    return found
