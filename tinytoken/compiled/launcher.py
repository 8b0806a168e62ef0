"""Which calls the compiled kernels take, and how they are called. Numba is imported at the first of them."""
import functools
import importlib
import os
import sys
from typing import Any

import numpy as np

from ..backend import Array

# Elements of a call's arrays. Below, the time is Python's, and nothing should wait for a compiler.
LEAST = 4096


@functools.cache
def why_not() -> str:
    """"" if compiled kernels can run here, else why not. The first call imports Numba."""
    if os.environ.get("TINYTOKEN_COMPILED") == "0":
        return "TINYTOKEN_COMPILED=0"
    try:
        _kernels()
    except Exception as error:  # whatever a broken installation raises is the reason we report
        reason = f"Numba cannot be used ({' '.join(str(error).split())})"
        print(f"tinytoken: {reason}; the plain ops run", file=sys.stderr)
        return reason
    return ""


@functools.cache
def _kernels():
    return importlib.import_module(f"{__package__}.kernels")


def worth(*arrays: Any) -> bool:
    """Whether kernels take these arrays: of one float dtype, NumPy's own and no subclass, which may want to
    see what is computed, and large enough."""
    there = [a for a in arrays if a is not None]
    return (all(type(a) is np.ndarray and a.dtype.kind == "f" for a in there)
            and sum([a.size for a in there]) >= LEAST and not why_not())


def launch(name: str, *arguments: Any) -> None:
    """Run the kernel of this name."""
    getattr(_kernels(), name)(*arguments)


def contiguous(x: Array) -> Array:
    """The array, or a copy if it is not contiguous, or write-protected: for such Numba would compile anew."""
    return x if x.flags.carray else np.array(x, order="C")
