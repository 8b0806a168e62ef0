"""What this folder registers, and what happens where it cannot run: kernels that do not compile or do not
launch, a cuBLASLt that lacks a function. From there on the plain operations run, after one warning."""
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

from .. import backend
from ..tensor import Op

state = types.SimpleNamespace(off=None)  # why the implementations of this folder do not run, or None


class Unusable(RuntimeError):
    """A kernel or product that cannot run here. All are off by now: the same call again runs without."""


def switch_off(what: str, error: BaseException) -> Unusable:
    """Switch all implementations off -> the exception to raise. Warns once, in one line."""
    reason = " ".join(f"{what}: {type(error).__name__}: {error}".split())[:300]
    if state.off is None:
        state.off = reason
        warnings.warn(f"kernels are off from here on, plain CuPy operations run in their place ({reason})",
                      stacklevel=2)
    return Unusable(f"{reason}. Kernels are off now: call it again")


def check_on() -> None:
    """Raise Unusable where the implementations are off."""
    if state.off is not None:
        raise Unusable(f"kernels are off ({state.off})")


def implementation(plain: Callable[..., Any], covers: Callable[..., Any] = lambda *args, **settings: True
                   ) -> Callable[[Any], Any]:
    """backend.implementation for CuPy arrays, which becomes `plain` where it turns out to be unusable.

    A backward pass cannot do so: it raises Unusable, and whoever takes the steps takes this one again."""
    definition = plain.function if isinstance(plain, Op) else plain  # being off, it finds no implementation

    def register(function):
        @functools.wraps(function, updated=())
        def run(*args, **settings):
            try:
                return function(*args, **settings)
            except Unusable:
                return definition(*args, **settings)
        backend.implementation(plain, "cupy", lambda *args, **settings: state.off is None and
                               covers(*args, **settings))(run)
        return function if isinstance(function, type) else run
    return register
