"""What NumPy's own functions do with Tensors (NumPy enhancement proposals 13 and 18).

A ufunc that is an op of ours is that op, so `np.exp(x)` and `array * x` are in the graph. Anything else gets
the arrays, as np.asarray(x) would give them. Where that would cut a graph it is refused, by name, since the
gradient would be lost in silence. Integers and truth values have none to lose (np.argmax, np.allclose), and
what returns nothing takes the values (np.save).
"""
from typing import Any

import numpy as np

from ..errors import expect
from ..tensor import Tensor, recording
from .activation import tanh
from .arithmetic import add, divide, exp, log, multiply, negative, sqrt, subtract
from .dense import matmul
from .shape import swapaxes, transpose

OPS: dict[Any, Any] = {
    np.add: add, np.subtract: subtract, np.multiply: multiply, np.divide: divide, np.negative: negative,
    np.matmul: matmul, np.exp: exp, np.log: log, np.sqrt: sqrt, np.tanh: tanh,
    np.swapaxes: lambda a, axis1, axis2: swapaxes(a, axis1, axis2),  # by NumPy's names
    np.transpose: lambda a, axes=None: transpose(a, axes=axes)}
NEW = (np.zeros_like, np.ones_like, np.empty_like, np.full_like)
INSTEAD = {"concatenate": "ops.concat(*tensors, axis=0)", "stack": "ops.concat(*[x[None] for x in tensors])",
           "vstack": "ops.concat(*tensors, axis=0)", "hstack": "ops.concat(*tensors, axis=1)",
           "where": "a * mask + b * (1 - mask)", "power": "x ** exponent", "square": "x ** 2",
           "maximum": "ops.relu(x - y) + y", "sum": "x.sum(axis)", "mean": "x.mean(axis)",
           "max": "x.max(axis)", "reshape": "x.reshape(shape)", "ravel": "x.reshape(-1)",
           "expand_dims": "x[:, None]", "squeeze": "x.reshape(shape)", "split": "x[start:stop]",
           "take": "x[places]", "dot": "a @ b", "einsum": "a @ b", "pad": "ops.pad(x, widths=widths)",
           "norm": "ops.sqrt((x * x).sum())",
           "broadcast_to": "ops.broadcast_to(x, shape=shape)"}


def numpy_ufunc(self: Tensor, ufunc: Any, method: str, *args: Any, **options: Any) -> Any:
    """Tensor.__array_ufunc__."""
    if ufunc in OPS and method == "__call__" and not options:
        return OPS[ufunc](*args)
    return _of_arrays(ufunc.__name__, getattr(ufunc, method), args, options)


def numpy_function(self: Tensor, function: Any, types: Any, args: Any, options: Any) -> Any:
    """Tensor.__array_function__."""
    if function in OPS:
        return OPS[function](*args, **options)
    return _of_arrays(function.__name__, function, args, options)


def _of_arrays(name, function, args, options):
    tensors: list[Tensor] = []
    args, options = _arrays(args, tensors), _arrays(options, tensors)
    # NumPy also finds Tensors in other containers, and would ask again and again
    expect(tensors, f"np.{name}", "Tensors in a container of another class, expected a list or tuple of them")
    in_graph = recording() and any(t.requires_grad for t in tensors)
    adds = getattr(function, "__name__", "") == "at"  # np.add.at
    expect(not in_graph or options.get("out") is None and not adds, f"np.{name}",
           "writes a Tensor that requires a gradient into an array, which has no graph",
           "a = a + x, not a += x")
    result = function(*args, **options)
    expect(not in_graph or function in NEW or not _has_floats(result), f"np.{name}",
           "a Tensor that requires a gradient would lose its graph",
           f"{INSTEAD.get(name, 'an op of your own (@tt.op)')}, or x.data for the values alone")
    return result


def _arrays(value, tensors):
    """The arguments with the Tensors' arrays in their place; the Tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.data
    if isinstance(value, dict):
        return {name: _arrays(one, tensors) for name, one in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    values = [_arrays(one, tensors) for one in value]
    return tuple(values) if isinstance(value, tuple) else values


def _has_floats(result):
    if isinstance(result, (list, tuple)):
        return any(map(_has_floats, result))
    return getattr(getattr(result, "dtype", None), "kind", None) in ("f", "c", "O")  # O: np.frompyfunc's
