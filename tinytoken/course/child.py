"""Runs the cases of one exercise, in a process of its own: `main` is what grade.py starts.

The job comes in as JSON on stdin. A result goes out on the original stdout as soon as a case is done, on a
line that begins with a word that only the parent knows. So nothing that a submission prints can pass for a
result, and the results of finished cases survive a process that ends early.
"""
import ast
import json
import os
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from . import rules
from .assignment import Assignment, load, run_file


def main() -> None:
    """Read a job from stdin and run it.

    The job is {"assignment": folder, "exercise": "1.3", "source": text, "cases": [name], "word": text,
    "limits": {...}}. Where the exercise is null, the assignment's training is run, with all of the
    submission's functions.
    """
    job = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    _limit(job["limits"])

    def report(**row):
        channel.write(f"{job['word']} {json.dumps(row)}\n")
    assignment = load(pathlib.Path(job["assignment"]))
    try:
        student = compose(job["source"], assignment, job["exercise"])
    except BaseException as error:  # a submission may raise anything while it is loaded, SystemExit too
        report(failed=f"the file stopped while it was loaded: {_short(error)}")
        return
    if job["exercise"] is None:
        report(board=run_file(assignment.folder / "training.py").run(student))
    else:
        run_cases(assignment, student, job["cases"], report)
    report(done=True)


def compose(source: str, assignment: Assignment, number: str | None) -> types.SimpleNamespace:
    """The submission's functions for exercise `number` and the references for all others, in a namespace.

    number None: the submission's functions for all exercises.
    """
    references = run_file(assignment.folder / "references.py")
    tree, others = taken(source, assignment, number)
    space: dict[str, Any] = {name: getattr(references, name) for name in others
                             if hasattr(references, name)}
    space |= {"__name__": "submission", "__builtins__": rules.safe_builtins(assignment)}
    exec(compile(tree, assignment.script, "exec"), space)
    return types.SimpleNamespace(**{name: value for name, value in space.items()
                                    if not name.startswith("__")})


def taken(source: str, assignment: Assignment, number: str | None) -> tuple[ast.Module, set[str]]:
    """(the part of a submission that is run for exercise `number`, the names that solve the others).

    Nothing that solves another exercise is run, so a slip in one costs nothing in another. rules.is_taken
    says which of the remaining statements are run.
    """
    others = {name for exercise in assignment.exercises if number not in (None, exercise.number)
              for name in exercise.names}
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if rules.is_taken(node, others)]
    return tree, others


def run_cases(assignment: Assignment, student: Any, names: Sequence[str], say: Callable[..., None]) -> None:
    """Run the cases with pytest; say(case=, passed=, seconds=, message=) as each is done."""
    import pytest
    modules = Guard(assignment)

    class Plugin:
        @pytest.fixture
        def student(self):
            return student

        def pytest_configure(self, config):
            config.addinivalue_line(
                "markers", "points(points, number, visibility, hint): what a case is worth")

        def pytest_collection_modifyitems(self, items):
            items[:] = sorted((item for item in items if item.name in names),
                              key=lambda item: names.index(item.name))

        def pytest_runtest_makereport(self, item, call):
            if call.when == "call" or call.excinfo:
                message = "" if call.excinfo is None else _short(call.excinfo.value)
                if changed := modules.restored():
                    message = f"the submission changed {', '.join(changed)}"
                say(case=item.name, passed=not message, seconds=round(call.duration, 4), message=message)

        def pytest_collectreport(self, report):
            if report.failed:
                say(failed=f"the tests cannot be loaded: {report.longreprtext.splitlines()[-1]}")
    pytest.main([str(assignment.folder / "tests"), "-q", "--import-mode=importlib", "-p", "no:cacheprovider",
                 "-c", os.devnull, "--rootdir", str(assignment.folder), "--noconftest", "-W", "ignore"],
                plugins=[Plugin()])


class Guard:
    """The contents of modules before a case runs, to put back what a submission changes in them.

    A submission that changes numpy, say, would change what it is compared with.
    """

    def __init__(self, assignment: Assignment):
        names = {"tinytoken", *assignment.imports, "numpy.linalg", "numpy.random", "tinytoken.ops",
                 "tinytoken.models", "tinytoken.course.checks"}
        self.modules = {name: sys.modules[name] for name in names if name in sys.modules}
        self.held = {name: dict(vars(module)) for name, module in self.modules.items()}

    def restored(self) -> list[str]:
        """Put back what was changed since -> the names of what was."""
        changed = []
        for name, module in self.modules.items():
            for attribute, value in self.held[name].items():
                if vars(module).get(attribute) is not value:
                    changed.append(f"{name}.{attribute}")
                    setattr(module, attribute, value)
        return changed


def _short(error, most=600):
    """An exception in a few lines that a student can use."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text}"[:most]


def _limit(limits):
    """Limit processor time, memory, file sizes and processes, and cut the network, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in (("RLIMIT_CPU", limits["seconds"]), ("RLIMIT_AS", limits["bytes"]),
                        ("RLIMIT_FSIZE", limits["file_bytes"]), ("RLIMIT_NPROC", limits["processes"]),
                        ("RLIMIT_CORE", 0)):
        if hasattr(resource, name):
            limit = getattr(resource, name)
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # processor time ends with a signal (soft), and a second later with the process (hard)
            new_hard = value + 1 if name == "RLIMIT_CPU" and value != hard else value
            try:
                resource.setrlimit(limit, (value, new_hard))
            except (ValueError, OSError):  # macOS refuses some
                pass
    _leave_the_network()


def _leave_the_network(new_user=0x10000000, new_network=0x40000000):
    """Linux: move to a new network namespace, one without a way out. No effect where refused."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if libc.unshare(new_network) != 0:
            libc.unshare(new_user | new_network)
