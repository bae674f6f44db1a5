"""Undoing a change for certain: whatever happens meanwhile, a Ctrl-C included."""

import contextlib
from collections.abc import Callable, Iterator


def surely(undo: Callable[[], None]) -> None:
    """Run ``undo`` to its end: a Ctrl-C meanwhile starts it again, and is raised afterwards.

    ``undo`` may run several times, so it sets things to what they were; it takes no steps back.
    """
    interrupt = None
    while True:
        try:
            undo()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@contextlib.contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Run ``undo`` when the ``with`` block is left, an exception or not; the change comes inside.

    It runs twice: a Ctrl-C that cuts the first short before it has begun leaves the second.
    """
    try:
        try:
            yield
        finally:
            surely(undo)
    finally:
        surely(undo)
