"""All CPU parallelism: `share_out` shares work out to threads, and nothing else does."""
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

from .backend import blas_threads, cpu_count, mode, prepare_cpu, quick_switches, using_implementations


def share_out(function: Callable[[Any], Any], items: Sequence[Any], threads: int | None = None) -> list[Any]:
    """[function(item) for item in items] on threads (None: the CPUs of this process), BLAS held to one thread
    each; a lone item has them all for its products. The threads run the implementations that the caller's
    does (plain()).

    The first exception is raised when all have ended: nothing goes on writing into arrays that the caller
    uses again."""
    prepare_cpu()
    threads = threads or cpu_count()
    with blas_threads(threads if len(items) == 1 else 1):
        threads = min(threads, len(items))
        if threads <= 1:
            return [function(item) for item in items]
        chosen = mode.implementations

        def run(item):
            with using_implementations(chosen):
                return function(item)
        with quick_switches():
            futures = [_pool(threads).submit(run, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()
                concurrent.futures.wait(futures)


_pools: dict = {}


def _pool(threads):
    """Threads are kept: starting them for each step costs more than a small step's work."""
    if threads not in _pools:
        _pools[threads] = concurrent.futures.ThreadPoolExecutor(threads, "tinytoken")
    return _pools[threads]
