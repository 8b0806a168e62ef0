"""One class and one form for everything a caller can get wrong.

    matmul: a (8, 16, 4) @ b (8, 16, 4): inner sizes 4 and 16 differ.
      likely: k.swapaxes(-1, -2)   (lesson 03)
"""
import contextlib
import os
import pathlib
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class InputError(ValueError):
    """An argument, array or file that cannot be used. The message names it and says what was expected."""


class Busy(InputError):
    """A file that another process is working on."""


class GradientError(AssertionError):
    """A gradient that finite differences, or the engine's own checks, refuse. kind: the mistake in a word,
    where gradcheck could tell."""
    kind: str | None = None


class GraphError(RuntimeError):
    """A backward pass over a graph that was never recorded, is freed, or whose arrays were changed."""


def expect(ok: Any, where: str, found: str | Callable[[], str], likely: str = "", lesson: str = "") -> None:
    """Raise InputError(f"{where}: {found}") unless ok.

    found: what is wrong, a string or a function that makes it. Formatting a string costs time, and the ops
    run thousands of times a second, so they pass a function. likely: what the caller probably meant; lesson:
    the one that explains it, "03".
    """
    if ok:
        return
    message = f"{where}: {found() if callable(found) else found}"
    if likely:
        message += f"\n  likely: {likely}"
    if lesson:
        message += f"   (lesson {lesson})" if likely else f"\n  see lesson {lesson}"
    raise InputError(message)


def shape_of(name: str, array: Any) -> str:
    """'a (8, 16, 4)': how shapes are named in every message."""
    return f"{name} {tuple(array.shape)}"


def some_of(names: Sequence[Any], most: int = 6) -> str:
    """The first of the names for a message, and how many more there are: 'a, b and 3 more'; or 'none'."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(map(str, names[:most])) or "none") + more


def printable(text: str, keep: str = "") -> str:
    """The text of others on one line: what does not print, such as a line's end or what would colour a
    terminal, as Python writes it. keep: letters that stay, such as a line's end."""
    return "".join(letter if letter.isprintable() or letter in keep else repr(letter)[1:-1]
                   for letter in text)


@contextlib.contextmanager
def one_line_of_warnings(where: str | os.PathLike, library: str) -> Iterator[None]:
    """Context: what `library` warns of in it becomes one line on stderr, in place of its source lines.

    where: the file or folder that it works on. The line has the first warning, and how many there were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if caught:
        first = " ".join(str(caught[0].message).split())
        times = f", {len(caught):,} times" if len(caught) > 1 else ""
        print(printable(f"{where}: {library} warns{times}: {first}"), file=sys.stderr)


def this_python() -> str:
    """What starts this Python in the reader's shell: 'python', '.venv/bin/python', or a whole path.

    A command that is to be pasted cannot count on an activated environment.
    """
    executable = sys.executable or "python"
    found = shutil.which("python")
    if found and os.path.dirname(found) == os.path.dirname(executable):  # an environment, and it is activated
        return "python"
    path = pathlib.Path(executable)
    try:
        here = pathlib.Path.cwd()
    except FileNotFoundError:  # the present folder was removed
        return shlex.quote(executable)
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def install(*packages: str) -> str:
    """The command that installs the packages for this Python. (tinytoken itself is not on the index.)"""
    return f"{this_python()} -m pip install {' '.join(map(shlex.quote, packages))}"
