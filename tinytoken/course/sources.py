"""What was handed in: found, read within bounds, and checked in a process of its own.

To parse a text takes memory and time, with some texts all that there is. So the grader itself reads bytes
only, and not too many; a child makes a source of them and looks for what the rules refuse. It runs nothing.
"""
import codecs
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tokenize

from ..errors import InputError, expect, install, some_of
from ..files import FilePath
from . import child, notebook, plain, rules
from .assignment import Assignment, load

MOST = {".py": 2**18, ".ipynb": 2**23}  # bytes of a script, and of a notebook with its outputs
SECONDS, MEMORY = 60, 2**31
START = ("import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {root!r}); "
         "from tinytoken.course.sources import main; main()")
NEEDED = "import sys; sys.path.insert(0, {root!r}); import pytest, tinytoken.course.judge"
UNSOLVED = re.compile(r"raise NotImplementedError\(['\"]Exercise ")


@dataclasses.dataclass(frozen=True)
class Source:
    """A submission's file: its name and its text as a script.

    refused: why the whole file (None) or an exercise (its number) is not run; all else is empty with None.
    """
    name: str
    text: str = ""
    refused: dict[str | None, str] = dataclasses.field(default_factory=dict)


def read(assignment: Assignment, submission: FilePath) -> Source:
    """The assignment's script or notebook: `submission`, or in that folder.

    Whatever is wrong with it stands in `refused`. InputError where `submission` is missing, or where no child
    can be started here.
    """
    path = pathlib.Path(submission)
    expect(path.exists(), "grade", f"no {path}: expected the folder that holds {assignment.script}")
    files = [path]
    try:
        if path.is_dir():
            files = [file for name in (assignment.script, f"{assignment.name}.ipynb")
                     if os.path.lexists(file := path / name)]
            if not files:
                return _refused(assignment.script, _missing(assignment, path))
        contents = {}
        for file in files:
            most = MOST.get(file.suffix, MOST[".py"])
            contents[file.name] = plain.read(file, most + 1)
            if len(contents[file.name]) > most:
                return _refused(file.name, f"{file.name} is larger than {most:,} bytes: hand in code alone, "
                                           "a notebook without its outputs")
    except InputError as error:
        return _refused(path.name, str(error))
    except OSError as error:
        return _refused(path.name, f"{path.name} cannot be read: {error.strerror or error}")
    return _checked(assignment, contents)


def _missing(assignment, folder):
    others = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    return f"no {assignment.script} was handed in" + (
        f"; in its place: {some_of(others)}. Right in the folder there should be {assignment.script} or "
        f"{assignment.name}.ipynb" if others else "")


def _refused(name, why):
    return Source(name, refused={None: why})


def _checked(assignment, contents):
    """The source that a child makes of {name: bytes}; of two files, the one with fewer exercises to do."""
    job = {"assignment": str(assignment.folder.resolve()),
           "contents": {name: data.decode("latin-1") for name, data in contents.items()}}
    code, out, _ = run_python(START, json.dumps(job), SECONDS)
    if code == 0:
        made = json.loads(out)
        return Source(made["name"], made["text"], {number: why for number, why in made["refused"]})
    return _refused(assignment.script, "the file takes too much time or memory to read: is it code?")


def run_python(start: str, said: str, seconds: float) -> tuple[int | None, str, str]:
    """Run a program in a process of its own, with a text on its stdin -> (exit code, stdout, stderr).

    start: its text, with {root!r} for the folder of this package. The code is None after too many seconds.
    """
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, "-I", "-c", start.format(root=root)], input=said,
                              encoding="utf-8", errors="replace", capture_output=True, timeout=seconds,
                              env=environment, check=False)
    except subprocess.TimeoutExpired:
        return None, "", ""
    return done.returncode, done.stdout, done.stderr


@functools.cache
def check_ready() -> None:
    """InputError unless a process that this Python starts has all that grading needs, so pytest too."""
    code, _, said = run_python(NEEDED, "", SECONDS)
    if code != 0:
        why = (said.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"grade: {sys.executable} -I lacks what grading needs, so nothing was graded: {why} "
                         f"(pytest: {install('pytest')})")


def main() -> None:
    """The child: reads {"assignment": folder, "contents": {name: bytes as Latin-1}}, writes a source."""
    job = json.load(sys.stdin)
    _limit()
    found = [_source(load(pathlib.Path(job["assignment"])), name, text.encode("latin-1"))
             for name, text in job["contents"].items()]
    # A stub has both files, and one of them was worked in: that in which less is left to do.
    best = min(found, key=lambda source: (not source.text, len(UNSOLVED.findall(source.text))))
    print(json.dumps({"name": best.name, "text": best.text, "refused": list(best.refused.items())}))


def _source(assignment, name, data):
    """The source of one file."""
    try:
        text, place = decoded(data), "line {}".format
        if name.endswith(".ipynb"):
            text, places = notebook.to_script(text)
            place = lambda line: places[min(line, len(places)) - 1]
        lines = rules.breaches(text, assignment, place)
    except ValueError as error:
        return _refused(name, f"{name} cannot be read: {error}")
    except (RecursionError, MemoryError):
        return _refused(name, f"{name} cannot be read: an expression in it is too deep or too large")
    refused = {number: f"was not run: {'; '.join(some[:5])}" for number, some in lines.items()}
    if None in refused:
        refused[None] = f"{name} {refused[None]}"
    return Source(name, text, refused)


def decoded(data: bytes) -> str:
    """Python source as text: by its byte-order mark or its coding line, as Python reads it, otherwise UTF-8.

    UTF-16, which PowerShell writes, is read by its byte-order mark too, though Python does not.
    A byte that is none of that encoding becomes U+FFFD, which does no harm in a comment.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding, errors="replace")
    except (SyntaxError, LookupError):  # an encoding that is not there, or not said
        return data.decode("utf-8-sig", errors="replace")


def _limit():
    child.limit({"RLIMIT_AS": MEMORY})
