"""Files that are whole when they are there: written under a temporary name and then renamed.

The standard library alone, so that whoever writes a file needs no torch.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

OURS = re.compile(r"\.(\d+)(-\d+-[0-9a-f]+)?\.partial$")  # a temporary name, and its process
OLD = 24 * 3600.0  # seconds after which a dead process's temporary file is removed
LONGEST = 120  # characters of a name that its temporary name keeps: file systems allow 255 bytes
CAUSES = {  # what a write meets, in words
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "your quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.EFBIG: "the file would be too large",
    errno.EIO: "the device reports an error",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOENT: "the folder cannot be made",
    errno.EEXIST: "a part of the path is a file, not a folder",
}
LIBRARY = re.compile(r"os error (\d+)")  # how safetensors names an error of the system


@contextlib.contextmanager
def complete(path: str | Path, *, remedy: str = "") -> Iterator[Path]:
    """A temporary name to write to, renamed to ``path`` when the block ends well.

    Folders above it are made. A file takes the place of a file, a folder that of a folder;
    IsADirectoryError or NotADirectoryError, and nothing is lost, where one would take the place of
    the other. Whatever ends the block otherwise, the temporary file is removed. The name is of this
    process, thread and call alone: any number may write at once. OSError names the file, the cause
    and the remedy where it cannot be written (``remedy``: the caller's, in place of the usual one).
    """
    path = as_path(path)
    token = f"{os.getpid()}-{threading.get_ident()}-{secrets.token_hex(4)}"
    temporary = path.parent / f"{path.name[:LONGEST]}.{token}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        yield temporary
        publish(temporary, path)
    except Exception as error:
        told = named(error, path, temporary, remedy)
        if told is error:
            raise
        raise told from error
    finally:
        remove(temporary)


def as_path(path: str | Path) -> Path:
    """A path, however given. ValueError for what is none."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise ValueError(f"the path is {path!r}: give text, or a pathlib.Path")
    return Path(path)


def publish(temporary: Path, path: Path) -> None:
    """Put what was written in its place: on the disk first, so that a power cut cannot empty it."""
    if not temporary.exists():
        raise RuntimeError(f"nothing was written for {shown(path)}: write to the name given")
    if path.is_dir() and temporary.is_file():
        raise IsADirectoryError(f"{path.name!r} is a folder: give the name of a file")
    if temporary.is_dir() and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path.name!r} is a file: give the name of a folder")
    for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
        if file.is_file():
            flush(file)
    if path.is_dir():  # aside, not away, until the new one is in its place
        aside = temporary.with_name(temporary.name.replace(".partial", "-old.partial"))
        os.replace(path, aside)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(aside, path)
            raise
        remove(aside)
    else:
        os.replace(temporary, path)
    if os.name == "posix":
        flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot say
            os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a temporary file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder, a day or more ago."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".partial") and is_stale(entry):
                remove(Path(entry.path))


def is_stale(entry: os.DirEntry) -> bool:
    """Whether a temporary file of ours is old and its process is gone."""
    found = OURS.search(entry.name)
    if not found or time.time() - entry.stat(follow_symlinks=False).st_mtime < OLD:
        return False
    if os.name != "posix":
        return True  # elsewhere a signal of 0 is no question
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def named(error: Exception, path: Path, temporary: Path, remedy: str) -> Exception:
    """An error of writing that says which file it is of, why, and what to do.

    Of the class of the system's error, where a library has wrapped it too. Any other error, another
    file's, and one that is told already, is given back as it is.
    """
    about = {str(temporary), str(path), *map(str, path.parents)}
    code, of = getattr(error, "errno", None), str(getattr(error, "filename", None) or temporary)
    if code is None and (found := LIBRARY.search(str(error))):
        code = int(found[1])
    if code not in CAUSES or not (of in about or of.startswith(f"{temporary}{os.sep}")):
        return error
    usual = "make room there" if code in (errno.ENOSPC, errno.EDQUOT) else "give another path"
    return OSError(
        code, f"{shown(path)} cannot be written: {CAUSES[code]}; {remedy or usual}", shown(path)
    )


def shown(path: str | Path) -> str:
    """A path as a message names it: from the working folder, where it lies below that."""
    path = Path(path)
    with contextlib.suppress(ValueError, OSError):
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    return str(path)


def require_file(path: str | Path, what: str, remedy: str) -> Path:
    """The path of a file that can be read. FileNotFoundError, IsADirectoryError or PermissionError
    names it and the remedy. what: what it ought to be ("edit")."""
    path = as_path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{shown(path)} is a folder, no {what}: give a file; {remedy}")
        with open(path, "rb"):
            return path
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no {what} at {shown(path)!r}: {remedy}") from error
    except PermissionError as error:
        raise PermissionError(
            f"{shown(path)} may not be read by you: change its permissions, or {remedy}"
        ) from error


def read_json(path: str | Path, what: str, remedy: str) -> dict:
    """A dict from a JSON file. ValueError names the file and the remedy if it holds none; the
    errors of ``require_file``."""
    text = require_file(path, what, remedy).read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        why = "is empty" if not text else "is no whole JSON (cut short, or damaged)"
        raise ValueError(f"{shown(path)} {why}: {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown(path)} holds a {type(found).__name__}, no {what}: {remedy}")
    return found
