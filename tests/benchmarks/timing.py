"""What the benchmarks share: clocks, spreads, the order of a round, a process's peak memory."""
import pathlib
import statistics
import time


def quartiles(values):
    """[median, lower quartile, upper quartile]."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def turned(items, turn):
    """The order of round `turn`: turned by one each round, so that nobody always follows the same
    neighbour."""
    items = list(items)
    return items[turn % len(items):] + items[:turn % len(items)]


def seconds(call, repeats=1, clock=time.perf_counter):
    """Of one call, mean of `repeats`."""
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def high_water():
    """The most memory that this process held so far (VmHWM), in MB of 10**6 bytes, or None where the system
    does not say. (ru_maxrss would start from the parent's.)"""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)
