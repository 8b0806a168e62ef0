"""How the tests of an assignment compare."""
from collections.abc import Callable
from typing import Any

import numpy as np

SCALARS = (int, float, np.integer, np.floating)
# Arrays of which a submission changed its copy; judge.py adds them.
CHANGED: list[np.ndarray] = []


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Fail unless `found` is a plain array or number with the shape and the values of `expected`.

    The tolerance is relative to the largest expected value where that is above 1. An object of a student's
    own class, which might call itself equal to anything, is refused.
    """
    if type(found) is not np.ndarray and not (isinstance(found, SCALARS)
                                              and type(found).__module__ in ("builtins", "numpy")):
        kind = getattr(found, "_kind", type(found).__name__)
        raise AssertionError(f"found a {kind}, expected an array")
    found, expected = np.asarray(found), np.asarray(expected)
    if found.dtype.kind not in "fiub":
        raise AssertionError(f"found numbers of type {found.dtype}, expected real ones")
    if found.shape != expected.shape:
        raise AssertionError(f"found shape {found.shape}, expected {expected.shape}")
    if not expected.size:
        return
    gap = float(np.abs(found.astype(float) - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not gap <= tolerance:  # also true for NaN
        raise AssertionError(f"off by {gap:.2g}, at most {tolerance:g} is allowed\n"
                             f"found    {found.ravel()[:6].round(4)}\n"
                             f"expected {expected.ravel()[:6].astype(float).round(4)}")


def refuse_changes(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """function(*arrays); fails if it changed one of the arrays, or a submission its copy of one."""
    before = [array.copy() for array in arrays]
    CHANGED.clear()
    result = function(*arrays)
    for position, (array, old) in enumerate(zip(arrays, before), start=1):
        if any(array is changed for changed in CHANGED) or not (array == old).all():
            raise AssertionError(f"argument {position} was changed")
    return result
