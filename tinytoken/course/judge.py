"""Checks one exercise: runs its tests here, and the submission in a process of its own. grade.py starts it.

The tests call the submission's functions through stand-ins, which pass arguments to the other process
(child.py) and bring results back. Expected values, hidden tests, the functions of the other exercises and the
package stay here. What a submission does to its arguments or to NumPy happens in its own process, and
whatever it says of itself is compared like any result.
"""
import ast
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import checks, child, rules, sandbox, statements
from .assignment import Assignment, load, run_file
from .processes import adopt_orphans, end_tree

# An exercise may take this many seconds on the clock for each second of computing: the machine may be busy.
PATIENCE = 4
PACKAGE = pathlib.Path(__file__).parents[1]


def main() -> None:
    """Read a job from stdin and do it; each result goes to stdout, behind the job's word, when it is there.

    The job is {"assignment": folder, "exercise": "1.3", "source": text, "cases": [name], "word": text,
    "seconds": number, "limits": {name: value}, "sandbox": bool}. Where the exercise is null, the assignment's
    training is run, with all of the submission's functions.
    """
    job = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    adopt_orphans()
    child.limit({name: job["limits"][name] for name in ("RLIMIT_AS", "RLIMIT_CORE")})

    def report(**row):
        channel.write(f"{job['word']} {json.dumps(row)}\n")
    try:
        _do(job, load(pathlib.Path(job["assignment"])), report)
    except Exception as error:
        report(failed=f"the tests cannot be run: {_short(error)}")
    report(done=True)


def _do(job, assignment, report):
    with Judge(assignment, job["seconds"], job["limits"], job["sandbox"], alone=True) as judge:
        try:
            student = judge.load(job["source"], job["exercise"])
        except (Stopped, child.Raised) as error:
            report(failed=str(error) if isinstance(error, Stopped)
                   else f"the file stopped while it was loaded: {_short(error)}")
            return
        if job["exercise"] is None:
            report(board=run_file(assignment.folder / "training.py").run(student))
        else:
            run_cases(assignment, student, job["source"], job["cases"], report)


class Stopped(child.Ended):
    """The submission's process has ended; says how."""


class Submission(types.SimpleNamespace):
    """The names of a submission and of the references for the other exercises."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is missing: the submission has no function or class of this name, or "
                             "none that keeps the rules")


class Remote:
    """Stands for an object of a submission: it can be called, and its attributes and its items read."""

    def __init__(self, judge: "Judge", number: int, kind: str):
        self._judge, self._number, self._kind = judge, number, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._judge.ask(do="call", of=self._number, args=args, kwargs=kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and NumPy look for in any object
            raise AttributeError(name)
        return self._judge.ask(do="get", of=self._number, name=name)

    def __iter__(self) -> Any:
        return iter(self._judge.ask(do="list", of=self._number))

    def __repr__(self) -> str:
        return f"<{self._kind} of the submission>"


class Judge(child.Peer):
    """The judge's end. It lends functions only, and passes on numbers, texts, arrays, containers of them and
    NumPy generators. It changes none of its own arrays, whatever the submission does with its copies.

    seconds: of computing; limits: names and values of resource.setrlimit; sandboxed: start it in bubblewrap.
    alone: this process has started nothing else, so all it is left with is the submission's and is ended.
    """

    def __init__(self, assignment: Assignment, seconds: float, limits: dict[str, int],
                 sandboxed: bool = False, alone: bool = False):
        self.assignment, self.seconds, self.how = assignment, seconds, ""
        self.lock, self.depth = threading.RLock(), 0
        self.remotes: dict[int, Remote] = {}
        self.sent: list[np.ndarray] = []  # the arrays of this call
        self.places: dict[int, int] = {}  # id of such an array -> its place
        # the package, for assignments that allow some of it
        folders = [PACKAGE] if assignment.tinytoken else []
        file = pathlib.Path(child.__file__)
        program = [sys.executable, "-I", "-B", str(file), json.dumps(limits),
                   *(str(folder.parent) for folder in folders)]
        if sandboxed:
            program = sandbox.command(program, [file, *folders], [PACKAGE, assignment.folder])
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        super().__init__(self.process.stdout, self.process.stdin)
        self.root = os.getpid() if alone else self.process.pid
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.watch.join()
        for pipe in (self.source, self.sink):
            with contextlib.suppress(OSError):  # what could not be sent to it any more
                pipe.close()

    def _watch(self):
        """Wait for the process, to its limit at most, and end what it leaves: that could hold the pipes."""
        try:
            self.process.wait(PATIENCE * self.seconds)
        except subprocess.TimeoutExpired:
            self.how = f"stopped after {PATIENCE * self.seconds:g} s: an endless loop, or sleep?"
        end_tree(self.process, self.root)

    def load(self, source: str, number: str | None) -> Submission:
        """The submission's functions for exercise `number` (None: all), and the references for the others."""
        places, others = taken(source, self.assignment, number)
        references = vars(run_file(self.assignment.folder / "references.py"))
        job = {"source": source, "name": self.assignment.script, "taken": places,
               "given": {name: references[name] for name in sorted(others & references.keys())},
               "forbidden": sorted(rules.FORBIDDEN), "roots": rules.roots(self.assignment)}
        return Submission(**self.ask(do="load", job=job))

    def ask(self, **request: Any) -> Any:
        with self.lock:
            self.depth += 1
            try:
                return super().ask(**request)
            except child.Ended as error:
                raise Stopped(self._ending()) from error
            finally:
                self.depth -= 1
                if not self.depth:
                    self.sent, self.places = [], {}

    def do(self, request: dict[str, Any]) -> Any:
        """Call what was lent; nothing else can be asked of the judge."""
        return self.lent[request["of"]](*request["args"], **request["kwargs"])

    def receive(self) -> dict[str, Any]:
        message = super().receive()
        try:
            checks.CHANGED.extend(self.sent[place] for place in message.get("changed", ()))
        except (LookupError, TypeError) as error:
            raise child.Ended("no message") from error
        return message

    def pack(self, value: Any, arrays: list[np.ndarray]) -> Any:
        """As above; an array that was sent in this call already goes as its place alone."""
        if type(value) is not np.ndarray or id(value) not in self.places:
            packed = super().pack(value, arrays)
            if type(value) is np.ndarray:
                packed["number"] = self.places[id(value)] = len(self.sent)
                self.sent.append(value)
            return packed
        return {"number": self.places[id(value)]}

    def lend(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"yours": value._number}
        if isinstance(value, np.random.Generator):
            return {"generator": value.bit_generator.state}
        if not callable(value):
            raise TypeError(f"a case passes a {type(value).__name__} to the submission; expected numbers, "
                            "texts, arrays, lists, tuples, dicts, functions, NumPy generators, or what it "
                            "returned")
        return super().lend(value)

    def borrowed(self, number: int, kind: str) -> Remote:
        return self.remotes.setdefault(number, Remote(self, number, kind))

    def _ending(self):
        """How the submission's process ended; it is ended here if what it sent was no message."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.how = self.how or "stopped: what its process sent is no result"
            self.process.kill()
        self.watch.join()
        if self.how:
            return self.how
        # bubblewrap adds 128 to the number of a signal
        ended_by = -code if code < 0 else code - 128
        name = next((s.name for s in signal.Signals if s == ended_by), "")
        if name == "SIGXCPU":
            return f"stopped after {self.seconds:g} s of computing: an endless loop?"
        if name:
            return f"the process was ended ({name}): too much time or memory"
        return (f"the process ended by itself (exit code {code}): "
                "it may not exit, and may use 4 GiB of memory")


def taken(source: str, assignment: Assignment, number: str | None) -> tuple[list[int], set[str]]:
    """(the places of the statements that are run for exercise `number`, the names that solve the others).

    Nothing that solves another exercise is run, so a slip in one costs nothing in another. rules.taken says
    which of the remaining statements are run. number None: all exercises.
    """
    tree = ast.parse(source)
    nodes, others = rules.taken(statements.read(tree), assignment, number)
    run = set(map(id, nodes))
    return [place for place, node in enumerate(tree.body) if id(node) in run], others


def run_cases(assignment: Assignment, student: Any, source: str, names: Sequence[str],
              say: Callable[..., None]) -> None:
    """Run the cases with pytest; say(case=, passed=, seconds=, message=) as each is done."""
    import pytest

    class Plugin:
        @pytest.fixture
        def student(self):
            return student

        @pytest.fixture
        def rng(self, request):
            """Draws a case's inputs: always the same for one file, others as soon as it is changed, so that
            no file can hold the answers to its own."""
            text = f"{request.node.name}\n{source}".encode(errors="replace")
            return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8]))

        def pytest_configure(self, config):
            config.addinivalue_line(
                "markers", "points(points, number, visibility, hint): what a case is worth")

        def pytest_collection_modifyitems(self, items):
            items[:] = sorted((item for item in items if item.name in names),
                              key=lambda item: names.index(item.name))

        def pytest_runtest_makereport(self, item, call):
            if call.when == "call" or call.excinfo:
                message = "" if call.excinfo is None else _short(call.excinfo.value)
                say(case=item.name, passed=not message, seconds=round(call.duration, 4), message=message)

        def pytest_collectreport(self, report):
            if report.failed:
                say(failed=f"the tests cannot be loaded: {report.longreprtext.splitlines()[-1]}")
    pytest.main([str(assignment.folder / "tests"), "-q", "--import-mode=importlib", "-p", "no:cacheprovider",
                 "-c", os.devnull, "--rootdir", str(assignment.folder), "--noconftest", "-W", "ignore"],
                plugins=[Plugin()])


def _short(error, most=600):
    """An exception in a few lines that a student can use."""
    if isinstance(error, Stopped):
        return str(error)
    text = str(error).strip() or "no message"
    return f"{getattr(error, 'kind', type(error).__name__)}: {text}"[:most]
