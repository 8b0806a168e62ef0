"""One class and one form for everything a caller can get wrong.

    matmul: a (8, 16, 4) @ b (8, 16, 4): inner sizes 4 and 16 differ.
      likely: k.swapaxes(-1, -2)   (lesson 03)
"""


class InputError(ValueError):
    """An argument, array or file that cannot be used. The message says what was given and what was
    expected."""


class Busy(InputError):
    """A file that another process is working on."""


class GradientError(AssertionError):
    """A gradient that finite differences, or the engine's own checks, refuse."""


class GraphError(RuntimeError):
    """A backward pass over a graph that is not there: never recorded, or already freed."""


def expect(ok, where, found, likely="", lesson=""):
    """Raise InputError(f"{where}: {found}") unless ok. `found` is a string, or a function that makes it:
    messages cost time to format, so the ops, which run thousands of times a second, pass a function."""
    if ok:
        return
    message = f"{where}: {found() if callable(found) else found}"
    if likely:
        message += f"\n  likely: {likely}"
    if lesson:
        message += f"   (lesson {lesson})" if likely else f"\n  see lesson {lesson}"
    raise InputError(message)


def shape_of(name, array):
    """'a (8, 16, 4)': how shapes are named in every message."""
    return f"{name} {tuple(array.shape)}"
