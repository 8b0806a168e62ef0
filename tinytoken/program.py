"""How a program of this package begins and ends: its streams, one line for an error, its exit code."""
import argparse
import io
import os
import pathlib
import sys
import traceback
from types import TracebackType

from . import group
from .errors import InputError, printable

ENDS = (InputError, OSError, MemoryError, KeyboardInterrupt)  # what a program ends with in one line


def prepare_streams() -> None:
    """Make stdout and stderr ready for whatever is printed: where they are closed, or take only ASCII; and
    where this is one of several processes, see group.py. InputError where these cannot work together."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8")  # closed by `>&-`
                              for stream in (sys.stdout, sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a letter that the terminal's encoding lacks is written as \u03bb, where it would end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    group.speak_for_all()


def ended(error: BaseException, where: str = "") -> int:
    """Say on one line of stderr what a program ends with, one of ENDS -> its exit code.

    2 for an input that cannot be used; 130 after Ctrl-C; 141, without a word, where nobody reads the output
    any more, as in `tinytoken ... | head`, which is no error. where: begins the text of an error. In a group
    of processes one rank says it, and it ends them all.
    """
    begins, stream = group.last_words(error)
    return group.end(_said(error, begins + where, stream) if stream else 2)


def _said(error, where, stream):
    text = printable(" ".join(str(error).split()))  # on one line, even if there is a hint on a second one
    try:
        if isinstance(error, BrokenPipeError):
            raise error
        if isinstance(error, KeyboardInterrupt):
            print(f"stopped: {text or 'by Ctrl-C'}", file=stream)
        else:
            kind = "out of memory: " if isinstance(error, MemoryError) else ""
            print(f"error: {where}{kind}{text}", file=stream)
        sys.stdout.flush()  # here and not at exit, where nothing could be said about it
    except BrokenPipeError:
        _to_nowhere(sys.stdout, stream)
        return 141
    except OSError:  # a full disk under the output, which `error` has said already
        _to_nowhere(sys.stdout)
    return 130 if isinstance(error, KeyboardInterrupt) else 2


def _to_nowhere(*streams):
    """What the streams still hold, and what comes, is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def end_in_one_line(script: str) -> None:
    """From now on, what ends the script and is one of ENDS is one line, that says where in the script it was.

    Nothing changes where the script is not what Python was started with: in a notebook, in a test."""
    path, before = getattr(sys.modules["__main__"], "__file__", None), sys.excepthook
    if path is None or pathlib.Path(path).stem != script:
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ENDS):
            return before(kind, error, trace)
        lines = [line for frame, line in traceback.walk_tb(trace) if frame.f_code.co_filename == path]
        sys.exit(ended(error, f"{os.path.basename(path)}, line {lines[-1]}: " if lines else ""))
    sys.excepthook = hook


def path(text: str) -> pathlib.Path:
    """A path of the command line; '' would be the present folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, given ''")
    return pathlib.Path(text)
