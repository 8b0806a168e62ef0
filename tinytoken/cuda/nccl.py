"""What several processes add up on their GPUs, by NCCL as CuPy offers it: one process a device, and nothing
through the host, so that the sum is a part of a captured step. Not run on GPUs yet.

NCCL adds up in an order of its own, the same on all ranks. NVIDIA's user guide: "Using NCCL with CUDA
Graphs".
"""
import sys
from typing import Any

from ..backend import implementation, module_for
from ..errors import InputError, expect, install
from ..group import Ranks, current

PACKAGES = ("nvidia-nccl-cu13",)
_made: dict[Ranks, Any] = {}  # the communicator of a group; None where sums go through the host


def one_device_each() -> None:
    """Give each rank of this machine a device of its own. InputError where there are too few: NCCL refuses
    two ranks on one."""
    group = current()
    if group.size > 1:
        import cupy
        count = cupy.cuda.runtime.getDeviceCount()
        expect(group.local_rank < count, "device",
               f"rank {group.rank} is number {group.local_rank + 1} on this machine, which has {count}: "
               f"expected at most one process a device, or --device cpu")
        cupy.cuda.Device(group.local_rank).use()


def communicator(group: Ranks) -> Any:
    """NCCL's communicator of the group's ranks, made by the first call, which all ranks make; None where one
    of them has no NCCL, which rank 0 says once."""
    if group not in _made:
        nccl, reason = _library()
        missing = [f"rank {rank}: {text}" for rank, text in enumerate(group.exchange("NCCL", reason)) if text]
        if missing:
            if group.rank == 0:
                print(f"gradients go through the host ({missing[0]})", file=sys.stderr)
            _made[group] = None
        else:
            number = group.exchange("NCCL's number", nccl.get_unique_id() if group.rank == 0 else None)[0]
            _made[group] = nccl.NcclCommunicator(group.size, number, group.rank)
    return _made[group]


def _library():
    """(cupy.cuda.nccl, "") or (None, why not)."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        return None, f"{' '.join(str(error).split())} ({install(*PACKAGES)})"
    return (nccl, "") if getattr(nccl, "available", True) else (None, f"no NCCL ({install(*PACKAGES)})")


def covers(group: Ranks, array: Any) -> bool:
    """Arrays that lie in one piece, of a type that NCCL adds up."""
    fits = array.dtype in ("float32", "float64") and array.flags.c_contiguous
    return fits and communicator(group) is not None


@implementation(Ranks.all_reduce, "cupy", covers)
def all_reduce(group: Ranks, array: Any) -> None:
    """Group.all_reduce, in place, on the current stream."""
    cuda = module_for("cuda").cuda
    nccl, _ = _library()
    kind = nccl.NCCL_FLOAT32 if array.dtype == "float32" else nccl.NCCL_FLOAT64
    place = array.data.ptr
    try:
        communicator(group).allReduce(place, place, array.size, kind, nccl.NCCL_SUM,
                                      cuda.get_current_stream().ptr)
    except nccl.NcclError as error:
        raise InputError(f"NCCL: {error}") from error
