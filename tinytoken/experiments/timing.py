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


def shown_on_the_clock(cost: Mapping[str, int],
                       times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What of the multiply-adds that other ways save beside the first one shows in their times. cost: {way:
    its multiply-adds}; times: as `interleaved` returns them.

    -> {way: "macs"; of the first one "milliseconds", a median; of the others quartiles over the rounds, in
    which ratios are taken, of the time beside the first one's, "of_time", and of the share of what is saved
    that shows, "shows": (1 - time / first time) / (1 - multiply-adds / first multiply-adds)}."""
    first, *others = cost
    quartiles = lambda values: [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]
    found: dict[str, dict[str, Any]] = {first: {"macs": cost[first],
                                                "milliseconds": 1e3 * float(np.median(times[first]))}}
    for way in others:
        ratio = np.array(times[way]) / np.array(times[first])
        shows = (1 - ratio) / (1 - cost[way] / cost[first])
        found[way] = {"macs": cost[way], "of_time": quartiles(ratio), "shows": quartiles(shows)}
    return found


def shown_text(ways: Mapping[str, dict[str, Any]]) -> str:
    """What `shown_on_the_clock` found, for the terminal: a line for the first way, and one for each other."""
    (first, its), *others = ways.items()
    lines = [f"{first} {its['macs'] / 1e6:.1f} M MACs, {its['milliseconds']:.1f} ms"]
    for way, row in others:
        low, middle, high = row["shows"]
        lines.append(f"  {way}: {row['macs'] / its['macs']:.3f} of the MACs, {row['of_time'][1]:.3f} of the "
                     f"time; of what is saved {middle:.2f} [{low:.2f}, {high:.2f}] shows")
    return "\n".join(lines)


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


def machine(device: str, here: bool = True) -> dict[str, Any]:
    """What the results were measured on. compiled: whether ops ran compiled (compiled/) in this process; left
    out where other processes than this one computed (here=False)."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processors = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": processors[0] if processors else platform.processor() or platform.machine(),
            "cpus": backend.cpu_count(), "blas": backend.blas_description(),
            "environment": backend.blas_environment(),
            **({"compiled": "tinytoken.compiled.kernels" in sys.modules} if here else {}),
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
