"""Files that are whole when they are there: written under a temporary name and then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to ``path`` when the block ends well.

    Folders above it are made. A file takes the place of a file, a folder that of a folder;
    IsADirectoryError, and nothing is lost, where a file would take the place of a folder.
    The name has the process's number: two processes may write at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    yield temporary
    if path.is_dir():
        if temporary.is_file():
            temporary.unlink()
            raise IsADirectoryError(f"{path.name!r} is a folder: give the name of a file")
        shutil.rmtree(path)
    os.replace(temporary, path)
