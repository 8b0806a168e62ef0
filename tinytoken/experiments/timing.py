"""Speeds, and what they were measured on."""
import functools
import pathlib
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array
from ..group import alone, current
from ..train import infer


def images_per_second(ways: dict[str, tuple[Any, dict[str, Any]]], images: Array, threads: int | None = None,
                      rounds: int = 9) -> dict[str, list[float]]:
    """{name: [median, lowest, highest]}. ways: {name: (model, further arguments of its call)}.

    The rounds are interleaved, so that whatever else the machine does slows all models alike. In a group of
    processes each measures itself, while the others do the same; rank 0's figures are written."""
    runs = {name: functools.partial(infer, model, images, threads=threads, **call)
            for name, (model, call) in ways.items()}
    with alone():
        taken = interleaved(runs, rounds)
    rates = {name: [len(images) / each for each in times] for name, times in taken.items()}
    return {name: [round(f(r), 1) for f in (statistics.median, min, max)] for name, r in rates.items()}


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int = 9) -> dict[str, list[float]]:
    """{name: the seconds of its run in each round}. A round before these is for warming up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:
                times[name].append(taken)
    return times


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_of_arrays(run: Callable[[], Any]) -> float:
    """The most memory that NumPy's arrays take at a time during run(), beyond what was there before it, in MB
    (10**6 bytes): by tracemalloc, to which NumPy reports every array."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        run()
        return (tracemalloc.get_traced_memory()[1] - before) / 1e6
    finally:
        tracemalloc.stop()


def machine(device: str) -> dict[str, Any]:
    """What the results were measured on. compiled: whether ops ran compiled (compiled/) in this process."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processors = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": processors[0] if processors else platform.processor() or platform.machine(),
            "cpus": backend.cpu_count(), "blas": backend.blas_description(),
            "environment": backend.blas_environment(),
            "compiled": "tinytoken.compiled.kernels" in sys.modules,
            "python": platform.python_version(), "numpy": np.__version__, "system": platform.platform(),
            "device": device, **({"processes": current().size} if current().size > 1 else {})}


def peak_memory() -> int | None:
    """The most memory this process ever held, in MB (10**6 bytes), or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)
