"""How the tests of an assignment compare.

The NumPy functions for it are bound here, before a submission runs and could replace them.
"""
from collections.abc import Callable
from typing import Any

import numpy as np

_asarray, _ndarray = np.asarray, np.ndarray
_abs, _max = np.abs, np.max
_scalars = (int, float, np.integer, np.floating)


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Fail unless `found` is a plain array or number with the shape and the values of `expected`.

    The tolerance is relative to the largest expected value where that is above 1. An object of a student's
    own class, which might call itself equal to anything, is refused.
    """
    if type(found) is not _ndarray and not (isinstance(found, _scalars)
                                            and type(found).__module__ in ("builtins", "numpy")):
        raise AssertionError(f"found a {type(found).__name__}, expected an array")
    found, expected = _asarray(found), _asarray(expected)
    if found.dtype.kind not in "fiub":
        raise AssertionError(f"found numbers of type {found.dtype}, expected real ones")
    if found.shape != expected.shape:
        raise AssertionError(f"found shape {found.shape}, expected {expected.shape}")
    if not expected.size:
        return
    gap = float(_max(_abs(found.astype(float) - expected))) / max(1.0, float(_max(_abs(expected))))
    if not gap <= tolerance:  # also true for NaN
        raise AssertionError(f"off by {gap:.2g}, at most {tolerance:g} is allowed\n"
                             f"found    {found.ravel()[:6].round(4)}\n"
                             f"expected {expected.ravel()[:6].astype(float).round(4)}")


def refuse_changes(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """function(*arrays); fails if it changed one of the arrays."""
    before = [array.copy() for array in arrays]
    result = function(*arrays)
    for position, (array, old) in enumerate(zip(arrays, before), start=1):
        if not (array == old).all():
            raise AssertionError(f"argument {position} was changed")
    return result
