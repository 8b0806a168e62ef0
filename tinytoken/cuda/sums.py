"""Sums over the rows of an array in two steps and a fixed order: of stretches of rows, then of these."""
from . import launcher

ROW_WARPS = 4  # rows of a block, a warp for each
# two blocks for each multiprocessor of an H100; always as many, some perhaps empty: the same sums have the
# same bits
STRETCHES = 264
THREADS = 512  # of the block that adds up a stretch


def rows_of(count):
    """(blocks, threads) with a warp for each row."""
    return -(-count // ROW_WARPS), 32 * ROW_WARPS


def add_up(parts, outs, add=False):
    """The sums over the rows of parts (P, pitch), cut into `outs`, one or two arrays of the same size; add:
    to what they hold."""
    size = outs[0].size * len(outs)
    pitch = parts.strides[0] // parts.itemsize
    launcher.launch("sum_parts", -(-size // 32), 256, parts, outs[0], outs[-1], pitch, len(parts), size,
                    outs[0].size, add, shared=4 * 256)
