"""How the tests of an assignment compare. What they compare with is fetched here, before a submission
runs."""
import numpy as np

_asarray, _abs, _ndarray, _number, _max = np.asarray, np.abs, np.ndarray, (int, float, np.integer,
                                                                           np.floating), np.max


def close(found, expected, tolerance=1e-9):
    """Fail unless `found` is a plain array or number, of the shape and (relative to the largest, where that
    is above 1) the values of `expected`. A class of one's own that calls itself equal is neither."""
    if type(found) is not _ndarray and not (isinstance(found, _number)
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
    if not gap <= tolerance:  # also where it is not a number
        raise AssertionError(f"off by {gap:.2g}, at most {tolerance:g} is allowed\nfound    "
                             f"{found.ravel()[:6].round(4)}\n"
                             f"expected {expected.ravel()[:6].astype(float).round(4)}")


def refuse_changes(function, *arrays):
    """function(*arrays); fails if one of the arrays was changed by it."""
    before = [array.copy() for array in arrays]
    result = function(*arrays)
    for number, (array, old) in enumerate(zip(arrays, before)):
        if not (array == old).all():
            raise AssertionError(f"argument {number + 1} was changed")
    return result
