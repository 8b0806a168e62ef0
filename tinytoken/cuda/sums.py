"""Sums over the rows of an array, in two steps and a fixed order: stretches of rows, then the stretches."""
from . import launcher

ROW_WARPS = 4  # rows of a block, a warp for each


def rows_of(count):
    """(blocks, threads) with a warp for each row."""
    return -(-count // ROW_WARPS), 32 * ROW_WARPS


def stretches(kernel, arrays, rows, width, *more, sums=1, each=1):
    """Partial sums (P, sums * width): `kernel` adds up stretches of rows, a thread for `each` columns."""
    stretch = max(16, -(-rows // 264))  # two blocks for each multiprocessor of an H100
    count = -(-rows // stretch)
    parts = launcher.empty(arrays[0], count, sums * width)
    launcher.launch(kernel, count, min(256, -(-width // (32 * each)) * 32), *arrays, parts, rows, width, *more, stretch)
    return parts


def sum_parts(parts, *outs, add=False):
    """parts (P, size) -> their sum, cut into the arrays `outs` of (size / len(outs)) numbers each, one or two; add: to what they hold."""
    count, size = parts.shape
    launcher.launch("sum_parts", -(-size // 32), 256, parts, outs[0], outs[-1], count, size, size // len(outs), add, shared=4 * 256)
