"""The grader: the reference gets every point, the stub none, each planted mistake costs its exercise alone,
and tricks gain nothing."""
import ast
import concurrent.futures
import csv
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

import tinytoken as tt
from tinytoken.__main__ import main
from tinytoken.course import assignment, grade, judge, release, rules

A1, *OTHERS = (assignment.find(name) for name in ("a1", "a2", "a3", "a4"))
SOLVED = (A1.folder / A1.script).read_text()


def mistakes(given):
    return assignment.run_file(given.folder / "mistakes.py").MISTAKES


def replaced(source, old, new):
    assert source.count(old) == 1, f"{source.count(old)} times in the script: {old!r}"
    return source.replace(old, new)


def points(source, given=A1, numbers=None):
    """{exercise number: (points, of)}, each exercise in its own process, two at a time."""
    cases = given.cases()
    chosen = [e for e in given.exercises if numbers is None or e.number in numbers]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = pool.map(lambda e: grade.run_exercise(given, e, source,
                                                     [c for c in cases if c.number == e.number]), chosen)
        return {e.number: (sum(r.points for r in row.values()), sum(r.max_points for r in row.values()), row)
                for e, row in zip(chosen, rows)}


@pytest.mark.slow  # a1 is in test_try_all.py, too
@pytest.mark.parametrize("given", [A1, *OTHERS], ids=lambda given: given.name)
def test_the_reference_gets_every_point_and_the_stub_none(given):
    solved = (given.folder / given.script).read_text()
    assert sum(case.points for case in given.cases()) == 25 and not rules.breaches(solved, given)
    assert not {number: rows for number, (got, most, rows) in points(solved, given).items() if got != most}
    stub = points(release.without_solutions(given, solved), given)
    said = [row.output for got, _, rows in stub.values() for row in rows.values() if got == 0]
    assert len(said) == len(given.cases())
    assert all(f"NotImplementedError: Exercise {given.name[1]}." in output for output in said)


def test_there_are_planted_mistakes_of_every_exercise():
    for given in (A1, *OTHERS):
        numbers = [number for number, *_ in mistakes(given)]
        assert all(numbers.count(exercise.number) >= 2 for exercise in given.exercises)
    assert sum(len(mistakes(given)) for given in (A1, *OTHERS)) >= 50


@pytest.mark.parametrize("given, all_of_them",
                         [(A1, False), *(pytest.param(given, True, marks=pytest.mark.slow)
                                                             for given in (A1, *OTHERS))])
def test_each_planted_mistake_costs_its_exercise(given, all_of_them):
    source, planted = (given.folder / given.script).read_text(), mistakes(given)
    if not all_of_them:  # the first of each exercise
        planted = list({number: (number, *rest) for number, *rest in reversed(planted)}.values())
    wrong = [(number, what, replaced(source, old, new)) for number, what, old, new in planted]
    assert not [what for _, what, text in wrong if rules.breaches(text, given)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: points(job[2], given, [job[0]])[job[0]], wrong)
        unnoticed = [f"{number}, {what}" for (number, what, _), (got, most, _) in zip(wrong, found)
                     if got == most]
    assert not unnoticed


@pytest.mark.parametrize("given", [A1, *OTHERS], ids=lambda given: given.name)
def test_of_a_mistake_nothing_reaches_another_exercise(given):
    source = (given.folder / given.script).read_text()
    def run(text, number):
        statements = ast.parse(text).body
        return [ast.dump(statements[place]) for place in judge.taken(text, given, number)[0]]
    for number, what, old, new in mistakes(given):
        wrong = replaced(source, old, new)
        assert [e.number for e in given.exercises
                if run(wrong, e.number) != run(source, e.number)] == [number], what


@pytest.mark.slow
@pytest.mark.parametrize("given", [A1, *OTHERS], ids=lambda given: given.name)
def test_a_mistake_costs_no_other_exercise(given):
    number, _, old, new = mistakes(given)[0]
    found = points(replaced((given.folder / given.script).read_text(), old, new), given)
    assert [other for other, (got, most, _) in found.items() if got != most] == [number]


def solved_with(name, body):
    """The reference with another body for the function `name`."""
    lines = SOLVED.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
    first = next(i for i in range(start, len(lines)) if release.BEGIN in lines[i])
    last = next(i for i in range(start, len(lines)) if release.END in lines[i])
    return "\n".join(lines[:first + 1] + [f"    {line}" for line in body.splitlines()] + lines[last:]) + "\n"


@pytest.mark.parametrize("body, said", [
    ("while True:\n    pass", "endless loop"),
    ("def again():\n    return [again() for _ in range(2)]\nreturn again()", "RecursionError"),
    ("return np.zeros((10**6, 10**6))", "MemoryError"),
    ("raise SystemExit(0)", "SystemExit"),
    ("raise KeyboardInterrupt", "")])
def test_what_ends_or_fills_a_process_costs_its_exercise_alone(body, said, monkeypatch):
    given = dataclasses.replace(A1, seconds=3.0)
    found = points(solved_with("unbroadcast", body), given, ["1.4", "1.6"])
    assert found["1.4"][0] == 0 and found["1.6"][0] == found["1.6"][1]
    assert all(said in row.output for row in found["1.4"][2].values())


HOSTILE = {
    "reads the tests": "return open('tests/test_a1.py').read()",
    "overwrites the tests": "import pathlib\npathlib.Path('tests/test_a1.py').write_text('')\nreturn g",
    "opens by another way": "return np.fromfile('/etc/passwd')",
    "a file through numpy": "np.save('/tmp/full', g)\nreturn g",
    "ends the process": "import os\nos._exit(0)",
    "forks": "import os\nos.fork()\nreturn g",
    "sleeps": "import time\ntime.sleep(100)",
    "changes numpy": "np.allclose = lambda *a, **k: True\nreturn g",
    "changes numpy's absolute value": "np.abs = lambda x: np.zeros(1)\nreturn g",
    "patches pytest": "import pytest\npytest.raises = None\nreturn g",
    "the package's own": "from tinytoken.tensor import unbroadcast as u\nreturn u(g, shape)",
    "another import": "return __import__('tinytoken').tensor.unbroadcast(g, shape)",
    "code from text": "return eval('g')",
    "the function's globals": "return unbroadcast.__globals__",
    "classes of Python": "return ().__class__.__bases__[0].__subclasses__()",
    "a frame": "try:\n    raise ValueError\nexcept ValueError as error:\n    return "
               "error.__traceback__.tb_frame",
    "names from text": "return getattr(np, 'lo' + 'ad')('x')",
    "a name inside a format": "return '{0.__class__}'.format(g)",
    "numpy's own modules": "return np.lib.npyio",
    "ctypes": "return np.ctypeslib.as_array(g)",
    "an attribute by a pattern": "match g:\n    case object(__class__=c):\n        return c",
    "a generator's frame": "return (x for x in g).gi_frame",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_tricks_are_refused_before_they_run_and_cost_their_exercise(body, tmp_path, monkeypatch):
    (tmp_path / A1.script).write_text(solved_with("unbroadcast", body))
    monkeypatch.setattr(grade, "run_exercise", lambda given, exercise, source, cases, sandboxed: {
        case.name: grade._row(case, True, "") for case in cases})
    report = grade.grade_submission(A1, tmp_path)
    refused = [row for row in report.rows if not row.points]
    assert not report.problem and {row.number for row in refused} == {"1.4"} and all("was not run: line" in row.output for row in refused)


def allowing(folder, *modules):
    """A1 as if it allowed these modules too, with little time."""
    shutil.copytree(A1.folder, folder / A1.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / A1.name / "assignment.toml"
    path.write_text(replaced(path.read_text(), 'imports = [',
                             "imports = [" + "".join(f'"{name}", ' for name in modules)))
    return dataclasses.replace(assignment.load(path.parent), seconds=3.0)


@pytest.mark.parametrize("body, said", [
    ("os._exit(0)", "ended by itself (exit code 0)"),
    pytest.param("time.sleep(1000)", "an endless loop, or sleep", marks=pytest.mark.slow),
    pytest.param("if os.fork() == 0:\n    time.sleep(1000)\nraise ValueError('parent')", "parent",
                 marks=pytest.mark.slow),
    ("file = os.open('full', os.O_CREAT | os.O_WRONLY)\nwhile True:\n    os.write(file, bytes(10**6))",
     "File too large"),
    ("os.kill(os.getpid(), 9)", "SIGKILL"),
    ("os.write(1, b'{\"case\": \"test_axes_in_front\", \"passed\": true}')\nreturn None",
     "expected an array")])
def test_what_gets_past_the_rules_meets_the_limits(body, said, tmp_path):
    given = allowing(tmp_path, "os", "time")
    found = points("import os\nimport time\n" + solved_with("unbroadcast", body), given, ["1.4", "1.6"])
    assert found["1.4"][0] == 0 and found["1.6"][0] == found["1.6"][1]
    assert all(said in row.output for row in found["1.4"][2].values())
    assert not [line for line in subprocess.run(["ps", "ax"], capture_output=True,
                                                text=True).stdout.splitlines()
                if ("tinytoken.course.judge" in line or "course/child.py" in line) and "defunct" not in line]


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_no_network(tmp_path):
    given = allowing(tmp_path, "socket")
    body = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
    output = points(solved_with("unbroadcast", body), given, ["1.4"])["1.4"][2]["test_axes_in_front"].output
    if "refused" in output:
        pytest.skip("this system gives no namespaces to users")
    assert "unreachable" in output


@pytest.mark.parametrize("body", [
    "print('{\"case\": \"test_axes_in_front\", \"passed\": true}')\nreturn g",
    "class Liar(np.ndarray):\n    def __eq__(self, other):\n        return True\nreturn g.view(Liar)",
    "class Same:\n    shape = ()\n    def __sub__(self, other):\n        return 0\nreturn Same()",
    "return np.full(shape, np.nan)",
    "def patch(self):\n    self.abs = lambda x: 0.0 * x\n    self.max = lambda *a: 0.0\npatch(np)\nreturn g"])
def test_lies_are_no_results(body):
    got, _, _ = points(solved_with("unbroadcast", body), numbers=["1.4"])["1.4"]
    assert got == 0


@pytest.mark.parametrize("source, said", [
    ("def broken(:\n", "line 1: invalid syntax"), ("import torch\n", "may not import torch"),
    ("from numpy import *\n", "may not import"),
    ("import numpy.lib\n", "may not import numpy.lib"), ("from numpy import testing\n", "may not import "
                                                                                        "numpy.testing"),
    ("from . import x\n", "may not import"), ("a = 1\0", "null")])
def test_a_file_that_cannot_be_run_says_why_once(tmp_path, source, said):
    users = "".join(f"def {name}():\n    torch, lib, testing, x, numpy\n"
                    for exercise in A1.exercises for name in exercise.names)
    (tmp_path / A1.script).write_text(source + users)
    report = grade.grade_submission(A1, tmp_path)
    assert said in report.problem and report.points == 0 and said in grade.text(report, A1)


def test_training_and_printing_are_not_run_and_may_import_what_they_like():
    assert not rules.breaches("import numpy as np\nprint(open('x'))\nif __name__ == '__main__':\n    import "
                              "tinytoken\n", A1)


def test_only_the_named_file_of_a_submission_counts(tmp_path):
    (tmp_path / A1.script).write_text(SOLVED)
    for name in ("conftest.py", "sitecustomize.py", "numpy.py", "assignment.toml", "references.py"):
        (tmp_path / name).write_text("raise SystemExit('loaded')")
    (tmp_path / "tinytoken").mkdir()
    (tmp_path / "tinytoken" / "__init__.py").write_text("raise SystemExit('loaded')")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert grade.grade_submission(A1, tmp_path).points == 25
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_command_reports_and_the_same_submission_gives_the_same_report(tmp_path, capsys):
    (tmp_path / A1.script).write_text(replaced(SOLVED, "parent.grad = parent.grad + part", "parent.grad = "
                                                                                           "part"))
    texts = []
    for name in ("one.json", "two.json"):
        assert main(["grade", "a1", "--submission", str(tmp_path), "--json", str(tmp_path / name)]) == 0
        texts.append((tmp_path / name).read_text())
    out = capsys.readouterr().out
    assert texts[0] == texts[1] and json.loads(texts[0])["points"] == 23
    assert "Exercise 1.3, the backward pass: 2 of 3" in out and "19 of 20 points visible now" in out
    assert "no array of a vjp is changed" not in out  # hidden
    assert main(["grade", "a1", "--submission", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["grade", "a1", "--submission", str(tmp_path / "empty"), "--gradescope",
                 str(tmp_path / "results.json")]) == 0
    said = json.loads((tmp_path / "results.json").read_text())
    assert said["score"] == 0 and said["output"] == "no a1_autograd.py was handed in" and len(said["tests"]) > 10


@pytest.mark.slow
def test_a_folder_of_submissions(tmp_path):
    for name, source in (("ada", SOLVED), ("bob", "from torch import *\n"), ("eve", None)):
        (tmp_path / "in" / name).mkdir(parents=True)
        if source:
            (tmp_path / "in" / name / A1.script).write_text(source)
    reports = grade.grade_folder(A1, tmp_path / "in", tmp_path / "points.csv", jobs=2)
    assert list(reports) == ["ada", "bob", "eve"] and reports["ada"].points == 25
    with open(tmp_path / "points.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["ada"]["points"] == rows["ada"]["of"] == "25" and rows["ada"]["1.2"] == "4" and not rows["ada"]["problem"]
    assert rows["bob"]["points"] == "0" and "torch" in rows["bob"]["problem"] and rows["eve"]["problem"] == "no a1_autograd.py was handed in"
    (tmp_path / "void").mkdir()
    with pytest.raises(tt.InputError, match="no folders"):
        grade.grade_folder(A1, tmp_path / "void", tmp_path / "x.csv")
