"""Runs the cases of one exercise, in a process of its own: `main` is what grade.py starts.

What the process knows comes in as JSON on stdin; what it finds goes out as lines on what was stdout, each
behind a word that only the parent knows, as soon as a case is done. So whatever a submission prints is no
result, and what ends the process early does not take the finished cases with it.
"""
import ast
import json
import os
import pathlib
import sys
import types

from . import rules
from .assignment import load, run_file


def main():
    """stdin: {"assignment": folder, "exercise": number, "source": text, "cases": [name], "word": text,
    "limits": {...}}. Without an exercise it is the assignment's training that is run, with all of the
    submission's functions."""
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
    except BaseException as error:  # whatever a submission does while it is loaded, SystemExit too
        report(failed=f"the file stopped while it was loaded: {_short(error)}")
        return
    if job["exercise"] is None:
        report(board=run_file(assignment.folder / "training.py").run(student))
    else:
        run_cases(assignment, student, job["cases"], report)
    report(done=True)


def compose(source, assignment, number):
    """The submission's functions for exercise `number`, among the references of all others -> a namespace.
    None: for all."""
    references = run_file(assignment.folder / "references.py")
    tree, others = taken(source, assignment, number)
    space = {name: getattr(references, name) for name in others if hasattr(references, name)}
    space |= {"__name__": "submission", "__builtins__": rules.safe_builtins(assignment)}
    exec(compile(tree, assignment.script, "exec"), space)
    return types.SimpleNamespace(**{name: value for name, value in space.items()
                                    if not name.startswith("__")})


def taken(source, assignment, number):
    """(what is run of a submission for exercise `number`, the names that solve the others). Nothing that
    solves another exercise is run, so a slip in one costs nothing in another; of the other statements see
    rules.is_taken."""
    others = {name for exercise in assignment.exercises if number not in (None, exercise.number)
              for name in exercise.names}
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if rules.is_taken(node, others)]
    return tree, others


def run_cases(assignment, student, names, say):
    """Run the cases with pytest; say(case=, passed=, seconds=, message=) as each is done."""
    import pytest
    modules = Guard(assignment)

    class Plugin:
        @pytest.fixture
        def student(self):
            return student

        def pytest_configure(self, config):
            config.addinivalue_line("markers", "points(points, number, visibility, hint): what a case is "
                                               "worth")

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
                 "-c", os.devnull,
                 "--rootdir", str(assignment.folder), "--noconftest", "-W", "ignore"], plugins=[Plugin()])


class Guard:
    """What modules hold before a case runs. A submission that changes one, numpy say, changes what it is
    compared with."""

    def __init__(self, assignment):
        names = {"tinytoken", *assignment.imports, "numpy.linalg", "numpy.random", "tinytoken.ops",
                 "tinytoken.models", "tinytoken.course.checks"}
        self.modules = {name: sys.modules[name] for name in names if name in sys.modules}
        self.held = {name: dict(vars(module)) for name, module in self.modules.items()}

    def restored(self):
        """The names that were changed since, put back as they were."""
        changed = []
        for name, module in self.modules.items():
            for attribute, value in self.held[name].items():
                if vars(module).get(attribute) is not value:
                    changed.append(f"{name}.{attribute}")
                    setattr(module, attribute, value)
        return changed


def _short(error, most=600):
    """An exception in a line or a few: what a student can use."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text}"[:most]


def _limit(limits):
    """Time on the processor, memory, size of files, further processes; and no network. As far as the platform
    has them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in (("RLIMIT_CPU", limits["seconds"]), ("RLIMIT_AS", limits["bytes"]),
                        ("RLIMIT_FSIZE", limits["file_bytes"]),
                        ("RLIMIT_NPROC", limits["processes"]), ("RLIMIT_CORE", 0)):
        if hasattr(resource, name):
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # a second between the signal and the end
            then = value + 1 if name == "RLIMIT_CPU" and value != hard else value
            try:
                resource.setrlimit(kind, (value, then))
            except (ValueError, OSError):  # macOS refuses some
                pass
    _leave_the_network()


def _leave_the_network(new_user=0x10000000, new_network=0x40000000):
    """Linux: a network namespace of the process's own, which has no way out. Where that is not allowed the
    network stays."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if libc.unshare(new_network) != 0:
            libc.unshare(new_user | new_network)
