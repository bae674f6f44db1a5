"""Files that are whole when they are there: written under a temporary name and then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete(path: str | Path) -> Iterator[Path]:
    """A temporary name to write a file or a folder to, renamed to ``path`` when the block ends well.

    Folders above it are made; what stood at ``path`` is replaced. The name has the process's number: two may write at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    yield temporary
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)
