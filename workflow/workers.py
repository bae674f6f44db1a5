"""Where the jobs of the tables run: a few processes that load the libraries and the world once.

They then take job after job: importing torch and loading a world costs more than many a job.
"""

import importlib
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def call(module: str, function: str, *arguments):
    """One function of one module, imported in the worker: who plans needs no torch."""
    return getattr(importlib.import_module(module), function)(*arguments)


def end_with_parent() -> None:
    """End this worker when its parent has ended, by a signal or not.

    A worker that outlived a SIGKILL would wait for jobs for ever.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


FASTER = {  # read when a process starts
    # models this small gain little from threads: a process for each core is faster
    "OMP_NUM_THREADS": "1",
    # memory that glibc keeps instead of giving it back is a third of a CPU run's time
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


class Workers:
    """``run(function, ...)`` waits for a job of ``module``; ``count`` threads may do so at once."""

    def __init__(self, module: str, count: int):
        self.module = module
        for name, value in FASTER.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and locks
        self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent)

    def run(self, function: str, *arguments):
        return self.pool.submit(call, self.module, function, *arguments).result()
