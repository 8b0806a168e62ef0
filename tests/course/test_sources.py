"""What is handed in: read within bounds, in its encoding, a notebook too; an odd file costs only itself."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

import tinytoken as tt
from tinytoken.__main__ import main
from tinytoken.course import assignment, grade, notebook, release, sources

A1 = assignment.find("a1")
SOLVED = (A1.folder / A1.script).read_text(encoding="utf-8")


def handed_in(given, folder, contents, name=None):
    """A folder with one file, its text or bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = contents if isinstance(contents, bytes) else contents.encode()
    (folder / (name or given.script)).write_bytes(data)
    return folder


ODD = {
    "a dict with an unhashable key": ("TABLE = {[]: 1}\ndef double(x):\n    return x + x\n", None),
    "deep brackets": (f"X = {'(' * 5000}1{')' * 5000}\n", "too many nested parentheses"),
    "a deep sign": (f"X = {'-' * 50_000}1\n", "too deep"),
    "a deep sum": (f"def double(x):\n    return {'+'.join(['x'] * 50_000)}\n", "too deep"),
    "a deep chain": (f"X = a{'.b' * 50_000}\n", "too deep"),
    "2 MB of numbers": (f"X = [{'1, ' * 700_000}]\n", "larger than 262,144 bytes"),
    "a null byte": ("X = 1\0", "null bytes"),
}


@pytest.mark.parametrize("source, said", ODD.values(), ids=ODD.keys())
def test_an_odd_source_is_refused_and_nothing_worse(doubling, tmp_path, source, said):
    found = sources.read(doubling, handed_in(doubling, tmp_path / "in", source))
    assert found.refused == {} if said is None else said in found.refused[None]


def test_what_one_submission_does_costs_only_itself(doubling, tmp_path, monkeypatch):
    for number, (source, _) in enumerate(ODD.values()):
        handed_in(doubling, tmp_path / "in" / f"odd {number}", source)
    (tmp_path / "in" / "folder" / doubling.script).mkdir(parents=True)
    handed_in(doubling, tmp_path / "in" / "broken", b"{", "b1_doubling.ipynb")
    handed_in(doubling, tmp_path / "in" / "crash", "")
    good = (doubling.folder / doubling.script).read_text(encoding="utf-8")
    handed_in(doubling, tmp_path / "in" / "ada", good)
    real = grade.run_exercise

    def run_exercise(given, exercise, source, *rest):
        if not source.strip():
            raise RuntimeError("the grader itself failed")
        return real(given, exercise, source, *rest)
    monkeypatch.setattr(grade, "run_exercise", run_exercise)
    reports = grade.grade_folder(doubling, tmp_path / "in", tmp_path / "points.csv", jobs=2)
    points = {name: report.points for name, report in reports.items()}
    assert {name: got for name, got in points.items() if got} == {"ada": 3, "odd 0": 2}
    assert reports["crash"].problem == "could not be graded: RuntimeError: the grader itself failed"
    assert "no regular file" in reports["folder"].problem
    assert "no notebook of nbformat 4" in reports["broken"].problem
    lines = (tmp_path / "points.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(reports) == 1 + len(ODD) + 4 and "ada,3,3,2,1," in lines


def test_a_reader_that_is_ended_or_takes_too_long_is_the_submissions_loss(doubling, tmp_path, monkeypatch):
    folder = handed_in(doubling, tmp_path / "in", "x = 1\n")
    for answer in ((-11, "", ""), (None, "", "")):
        monkeypatch.setattr(sources, "run_python", lambda *_: answer)
        assert "too much time or memory" in sources.read(doubling, folder).refused[None]


def test_no_more_is_read_than_may_be(doubling, tmp_path, monkeypatch):
    def read(path, most):
        assert most == 2**18 + 1
        return b"#" * most
    monkeypatch.setattr(sources.plain, "read", read)
    assert "larger than" in sources.read(doubling, handed_in(doubling, tmp_path / "in", "")).refused[None]


def test_a_process_that_takes_too_long_is_ended():
    assert sources.run_python("import time; time.sleep(60)  # {root!r}", "", 0.5)[0] is None


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_the_readers_memory_has_a_limit():
    start = ("import sys; sys.path.insert(0, {root!r}); from tinytoken.course import sources; "
             "sources._limit(); bytes(2**32)")
    code, _, said = sources.run_python(start, "", 60)
    assert code == 1 and said.strip().endswith("MemoryError")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_pipe_is_not_waited_for(doubling, tmp_path):
    os.mkfifo(tmp_path / doubling.script)
    assert "no regular file" in sources.read(doubling, tmp_path / doubling.script).refused[None]


@pytest.mark.parametrize("data, text", [
    (b"\xef\xbb\xbfa = 1\n", "a = 1\n"), ("α = 1\n".encode(), "α = 1\n"),
    (b"# -*- coding: latin-1 -*-\n# f\xfcr\n", "# -*- coding: latin-1 -*-\n# für\n"),
    (b"# f\xfcr\na = 1\n", "# f\ufffdr\na = 1\n"),
    (b"a = 1\n" * 3 + b"# f\xfcr\n", "a = 1\n" * 3 + "# f\ufffdr\n"),
    (b"# coding: klingon\na = 1\n", "# coding: klingon\na = 1\n"),
    ("α = 1\r\n".encode("utf-16"), "α = 1\r\n"), (b"\xfe\xff\0a\0", "a\ufffd"),
    (b"# coding: hex\n61\n", "# coding: hex\n61\n")])
def test_encodings(data, text):
    assert sources.decoded(data) == text


def test_a_byte_order_mark_and_greek_names_cost_nothing(doubling, tmp_path):
    text = "π = 2\ndef double(χ):\n    return π * χ\ndef fourfold(x):\n    return double(double(x))\n"
    folder = handed_in(doubling, tmp_path / "in", b"\xef\xbb\xbf" + text.encode())
    assert grade.grade_submission(doubling, folder).points == 3


def test_what_a_right_solution_may_need_is_there_when_it_is_graded(doubling, tmp_path):
    text = """from __future__ import annotations
import numpy as np
try:
    import torch
except ImportError:
    torch = None
EPS: float = np.finfo(float).eps * 0
RNG = np.random.default_rng(0)
Array = np.ndarray
def two() -> int:
    return 2
TWO = two()
def double(x: Array) -> Array:
    return TWO * x + EPS + 0 * RNG.random() if torch is None else None
def fourfold(x: Nothing) -> Nothing:
    return TWO * double(x)
"""
    report = grade.grade_submission(doubling, handed_in(doubling, tmp_path / "in", text))
    assert report.points == 3, report.rows


def test_where_the_system_has_a_code_page_nothing_else_comes_out(doubling, tmp_path):
    """As on a Windows whose code page has no Greek: the locale here is C, stdout is cp1252."""
    folder = handed_in(doubling, tmp_path / "in" / "Άδα", "def double(χ):\n    return λ * χ\n")
    handed_in(doubling, tmp_path / "in" / "ok", (doubling.folder / doubling.script).read_bytes())
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("LC_", "PYTHON"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                    "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(pathlib.Path(tt.__file__).parents[1])}

    def said(*words):
        done = subprocess.run([sys.executable, "-m", "tinytoken", *map(str, words)], env=environment,
                              capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode("cp1252")
    of = "b1", "--assignment", doubling.folder
    one = said("grade", *of, "--submission", folder, "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert "name '\\u03bb' is not defined" in one
    assert "name 'λ' is not defined" in report["rows"][0]["output"]
    said("grade", *of, "--submissions", tmp_path / "in", "--csv", "all.csv")
    assert "\nok,3,3,2,1," in (tmp_path / "all.csv").read_text(encoding="utf-8")
    assert "Άδα,0,3" in (tmp_path / "all.csv").read_text(encoding="utf-8")
    said("stub", *of, "--out", "copy", "--notebook")
    assert "Διπλάσιο" in (tmp_path / "copy" / "assignment.toml").read_text(encoding="utf-8")
    said("autograder-zip", *of)
    said("nbgrader", *of, "--out", "source")
    assert "δύο" in (tmp_path / "source" / "b1_doubling.ipynb").read_text(encoding="utf-8")


def cell(source, kind="code", **more):
    return {"cell_type": kind, "metadata": {}, "source": source, **more}


def test_a_notebook_can_be_handed_in(doubling, tmp_path):
    cells = [cell("# Doubling\n`open` it", "markdown"), cell(["%matplotlib inline\n", "import numpy as np"]),
             cell(["def double(x):\n", "    return x + x"], outputs=[{"data": {"image/png": "A" * 500_000}}]),
             cell("!pip install torch\nif True:\n    %time double(3)\ndouble?\nprint(double(3))"),
             cell("%%bash\nrm x"),
             cell("raw text (", "raw"), cell("def fourfold(x):\n    return (double(x)\n        % 10**9) * 2")]
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    folder = handed_in(doubling, tmp_path / "in", text, "b1_doubling.ipynb")
    report = grade.grade_submission(doubling, folder)
    assert (report.points, report.problem) == (3, "")
    assert "graded: b1_doubling.ipynb" in grade.text(report, doubling)
    assert grade.grade_submission(doubling, folder / "b1_doubling.ipynb").points == 3


def test_what_a_submission_says_is_printed_as_text(doubling, tmp_path):
    said = "π\\x1b[2J\\r\\x08\\ud800 3 of 3"
    source = f"def double(x):\n    raise ValueError('  ok 2/2\\n{said}')\n"
    report = grade.grade_submission(doubling, handed_in(doubling, tmp_path / "in", source))
    assert f"ok 2/2\n{said}" in report.rows[0].output
    handed_in(doubling, tmp_path / "named", "", "\x1b[2J.py")
    assert "in its place: \\x1b[2J.py" in grade.grade_submission(doubling, tmp_path / "named").problem


IPYTHON = {
    "what a magic or a shell gives": ("files = !ls\na, b[0] = %time 1\nx = 1", 1),
    "help": ("?np.sum\n??x\nnp.sum??\nx = 1", 1),
    "a shell line that goes on": ("!pip install \\\n    torch \\\n  numpy\nx = 1", 1),
    "in a block": ("if True:\n    %time 3\n    y = !ls\n    x = 1", 1),
    "a remark that asks": ("%time 3\nx = 1  # right?", 1),
    "a percent sign in brackets": ("%time 3\nx = (7\n% 4)", 3),
    "a percent sign on a line that goes on": ("%time 3\nx = 7 \\\n% 4", 3),
    "a percent sign in a text": ("%time 3\ny = \"\"\"\n%d\n!\n\"\"\"\nx = len(y)", 6),
}


@pytest.mark.parametrize("source, x", IPYTHON.values(), ids=IPYTHON.keys())
def test_lines_for_ipython_are_left_out_and_no_others(source, x):
    script, places = notebook.to_script(json.dumps({"cells": [cell(source)]}))
    space: dict = {}
    exec(compile(script, "script", "exec"), space)
    assert space["x"] == x and len(places) == script.count("\n") == source.count("\n") + 2


@pytest.mark.parametrize("cells, said", [
    ([cell("a = 1"), cell("", "markdown"), cell("a = 1\nimport torch\ndouble = fourfold = lambda x: torch")],
     "cell 3, line 2: may not import torch"),
    ([cell("a = 1"), cell("x = (")], "cell 2, line 1: '(' was never closed"),
    ({"a": 1}, "no notebook of nbformat 4"), (None, "no notebook of nbformat 4")])
def test_a_notebook_that_cannot_be_run_says_where(doubling, tmp_path, cells, said):
    text = json.dumps({"cells": cells}) if cells else "[]"
    found = sources.read(doubling, handed_in(doubling, tmp_path / "in", text, "b1_doubling.ipynb"))
    assert said in found.refused[None]


def test_of_a_stub_with_both_files_the_one_that_was_worked_in_is_graded(doubling, tmp_path):
    script, book = doubling.script, "b1_doubling.ipynb"
    release.write_copy(doubling, tmp_path / "copy", notebook=True)
    solved = (doubling.folder / script).read_text(encoding="utf-8")
    assert sources.read(doubling, tmp_path / "copy").name == script  # both untouched
    untouched = (tmp_path / "copy" / book).read_text(encoding="utf-8")
    (tmp_path / "copy" / book).write_text(notebook.from_script(solved), encoding="utf-8")
    assert sources.read(doubling, tmp_path / "copy").name == book
    assert grade.grade_submission(doubling, tmp_path / "copy").points == 3
    (tmp_path / "copy" / script).write_text("", encoding="utf-8")
    assert sources.read(doubling, tmp_path / "copy").name == book
    half = solved.replace("return double(double(x))", "raise NotImplementedError('Exercise 1.2: x')")
    (tmp_path / "copy" / script).write_text(half, encoding="utf-8")
    (tmp_path / "copy" / book).write_text("{", encoding="utf-8")
    assert sources.read(doubling, tmp_path / "copy").name == script
    (tmp_path / "copy" / book).write_text(untouched, encoding="utf-8")
    assert sources.read(doubling, tmp_path / "copy").name == script
    (tmp_path / "copy" / script).write_text(solved, encoding="utf-8")
    assert sources.read(doubling, tmp_path / "copy").name == script


def test_files_beside_the_folders_are_graded_too(doubling, tmp_path):
    good = (doubling.folder / doubling.script).read_bytes()
    handed_in(doubling, tmp_path / "in", good, "ada_1234_b1_doubling.py")
    handed_in(doubling, tmp_path / "in", b"{", "bob.ipynb")
    handed_in(doubling, tmp_path / "in", b"points", "notes.txt")
    handed_in(doubling, tmp_path / "in" / "eve", good)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for place in ("in", "link"):
        reports = grade.grade_folder(doubling, tmp_path / place, tmp_path / "points.csv")
        assert {name: report.points for name, report in reports.items()} == {
            "ada_1234_b1_doubling.py": 3, "bob.ipynb": 0, "eve": 3}
    for place in ("nowhere", "in/bob.ipynb"):
        with pytest.raises(tt.InputError, match="is no folder: expected one"):
            grade.grade_folder(doubling, tmp_path / place, tmp_path / "points.csv")


@pytest.mark.parametrize("name", ["release/b1_doubling.py", "a1.zip", "B1_Doubling.PY"])
def test_what_lies_there_in_its_place_is_named(doubling, tmp_path, name):
    place = tmp_path / "in" / name
    handed_in(doubling, place.parent, "", place.name)
    problem = sources.read(doubling, tmp_path / "in").refused[None]
    assert f"in its place: {name.split('/')[0]}{'/' * name.count('/')}. Right in the folder" in problem


def test_a_file_of_another_name_is_named(doubling, tmp_path):
    problem = sources.read(doubling, handed_in(doubling, tmp_path / "in", "", "Untitled.ipynb")).refused[None]
    assert problem.startswith("no b1_doubling.py was handed in") and "Untitled.ipynb" in problem
    assert "b1_doubling.ipynb" in problem


@pytest.fixture
def without_pytest(tmp_path, monkeypatch):
    """A Python whose processes find no pytest."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -I -c \"import sys; sys.modules['pytest'] = None; "
                      "exec(sys.argv[1])\" \"$3\"\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    sources.check_ready.cache_clear()
    yield
    sources.check_ready.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="the Python without pytest is a shell script")
@pytest.mark.parametrize("which", ["--submission", "--submissions"])
def test_without_pytest_nothing_is_graded(doubling, tmp_path, capsys, without_pytest, which):
    folder = handed_in(doubling, tmp_path / "in" / "ada", (doubling.folder / doubling.script).read_bytes())
    place = [which, str(folder.parent), "--csv", str(tmp_path / "x.csv")] if which == "--submissions" else [
        which, str(folder)]
    assert main(["grade", "b1", "--assignment", str(doubling.folder), *place]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "pytest" in error and "-m pip install pytest" in error
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("option, ending", [("--csv", ".csv"), ("--json", ".json"), ("--gradescope", ".json")])
@pytest.mark.parametrize("place, said", [("folder", "is a folder"), ("file/points", "cannot write")])
def test_where_no_report_can_be_written_nothing_is_graded(doubling, tmp_path, capsys, monkeypatch, option,
                                                          ending, place, said):
    monkeypatch.setattr(grade, "grade_submission", lambda *_, **__: pytest.fail("graded"))
    folder = handed_in(doubling, tmp_path / "in" / "ada", "")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / f"folder{ending}").mkdir()
    words = ["--submissions", str(folder.parent)] if option == "--csv" else ["--submission", str(folder)]
    words = ["grade", "b1", "--assignment", str(doubling.folder), *words, option,
             str(tmp_path / f"{place}{ending}")]
    assert main(words) == 2
    assert said in capsys.readouterr().err
