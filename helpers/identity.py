"""Identity: digests of values, tensors, modules and files. Nothing else in the kit makes one.

It imports neither torch nor the kit, so that planning the tables (``workflow/plan.py``) stays
quick: a tensor is asked for its bytes by its own methods.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

SHORT = 16  # hex digits of a fingerprint
DEEPEST = 100  # levels of a value: more is a circle, or an attack on JSON's reader


def plain(value, name: str = "value", depth: int = 0):
    """A value as JSON gives it back: tuples are lists, paths and keys text, numbers Python's own.

    ValueError names what JSON cannot hold, by its place within the value (``name``).
    """
    if depth > DEEPEST:
        raise ValueError(f"{name} is nested more than {DEEPEST} deep: give a flat value")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | PurePath):
        return str(value)
    if isinstance(value, Mapping):
        below = {
            _key(key, name): plain(one, f"{name}.{key}", depth + 1) for key, one in value.items()
        }
        if len(below) < len(value):
            raise ValueError(f"{name} has keys that are one in JSON: {list(value)!r}")
        return below
    if isinstance(value, list | tuple):
        return [plain(one, f"{name}[{i}]", depth + 1) for i, one in enumerate(value)]
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # NumPy's, torch's numbers
        return plain(value.item(), name, depth + 1)
    raise ValueError(
        f"{name} is of type {type(value).__name__}, which JSON cannot hold: "
        "give text, numbers, and lists and dicts of them"
    )


def _key(key, name: str) -> str:
    """A dict's key as JSON writes it."""
    key = plain(key, f"a key of {name}")
    if isinstance(key, list | dict):
        raise ValueError(f"a key of {name} is {key!r}: give text")
    return key if isinstance(key, str) else json.dumps(key)


def value_digest(value) -> str:
    """SHA-256 of a value that JSON can hold, keys sorted: equal for what JSON does not tell apart.

    ValueError for what JSON cannot hold.
    """
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def content(tensor):
    """A tensor's bytes, whatever its type (NumPy has no bfloat16), as an array of uint8."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(flat[:0].byte().dtype).numpy()


def tensors_digest(tensors: Mapping) -> str:
    """SHA-256 of named tensors: names, types, shapes and every byte, whatever their order."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(content(tensor))
    return found.hexdigest()


def module_digest(*modules, rounded: bool = True) -> str:
    """A short digest of modules' weights: the first ``SHORT`` hex digits of SHA-256.

    rounded: to half precision first, so that a model in fp32 and in fp16 has one fingerprint.
    """
    found = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            found.update(name.encode())
            value = value.detach()
            half = rounded and value.is_floating_point()
            found.update(content(value.half().float() if half else value))
    return found.hexdigest()[:SHORT]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, str]:
    """``manifest.json`` of a folder: file -> SHA-256. ValueError if it is missing or damaged."""
    path, remedy = folder / "manifest.json", f"run `git checkout -- data/{folder.name}`"
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{folder.name}/manifest.json cannot be read: {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder.name}/manifest.json is no JSON (cut short?): {remedy}"
        ) from error
    good = isinstance(manifest, dict) and all(isinstance(v, str) for v in manifest.values())
    inside = good and not any(".." in PurePath(n).parts or n.startswith("/") for n in manifest)
    if not inside or not manifest:
        raise ValueError(
            f"{folder.name}/manifest.json is no list of files with their SHA-256: {remedy}"
        )
    return manifest


def verify_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with ``manifest.json`` (SHA-256): all that it lists, or those named.

    ValueError names the first that is missing or not the one that was committed.
    """
    folder, manifest = Path(folder), read_manifest(Path(folder))
    remedy = f"run `git checkout -- data/{folder.name}`"
    for name in manifest if names is None else names:
        path = folder / name
        if name not in manifest:
            raise ValueError(f"{folder.name}/manifest.json does not list {name}: {remedy}")
        if not path.is_file():
            raise ValueError(f"{folder.name}/{name} is missing: {remedy}")
        if file_digest(path) != manifest[name]:
            raise ValueError(
                f"{folder.name}/{name} is not the file that was committed (its SHA-256 differs): "
                f"{remedy}"
            )
