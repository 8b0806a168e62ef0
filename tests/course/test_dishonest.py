"""Points without solving: each sample is harmless, and gets none for what it does not solve."""
import dataclasses
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import tinytoken as tt
from tinytoken.__main__ import main
from tinytoken.course import assignment, checks, child, grade, judge, processes, sandbox

GIVEN = {name: assignment.find(name) for name in ("a1", "a2", "a3", "a4")}


def source_of(given, **bodies):
    """The instructor's script, with other bodies for the functions named."""
    lines = (given.folder / given.script).read_text(encoding="utf-8").splitlines()
    for name, body in bodies.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
        first = next(i for i in range(start, len(lines)) if "### BEGIN" in lines[i])
        last = next(i for i in range(start, len(lines)) if "### END" in lines[i])
        lines[first:last + 1] = [f"    {line}" for line in body.splitlines()]
    return "\n".join(lines) + "\n"


def rows(given, number, source, sandboxed=False):
    exercise = next(e for e in given.exercises if e.number == number)
    cases = [case for case in given.cases() if case.number == number]
    return list(grade.run_exercise(given, exercise, source, cases, sandboxed).values())


def points(*args, **options):
    return sum(row.points for row in rows(*args, **options))


# (assignment, exercise, function, body): what a case could be passed with if it were written carelessly
SAMPLES = {
    "zeros, and the upstream gradient is set to zeros": (
        "a1", "1.4", "unbroadcast", "g[...] = 0\nreturn np.zeros(shape)"),
    "zeros for p, and then p is right": (
        "a1", "1.6", "softmax_vjp", "p[...] = 0\ng[...] = 0\nreturn p"),
    "weights of zero make any block the identity": (
        "a2", "2.7", "block", "for each in w.values():\n    each[...] = 0\nreturn x"),
    "weights of zero score all tokens alike": (
        "a3", "3.3", "predictor", "for each in w.values():\n    each[...] = 0\n"
                                  "return np.full((*x.shape[:2], 2), -np.log(2.0))"),
    "the answer of one run": ("a1", "1.8", "largest_error", "return 0.0"),
    "answers by turns": ("a1", "1.8", "largest_error",
                         "Turn.now = not Turn.now\nreturn float(Turn.now)"),
    "the numbers of the tests' visible sizes": ("a4", "4.6", "block_cost", "return 3784896"),
    "one count for all models": ("a3", "3.7", "multiply_adds", "return 1067088"),
    "no gradients, so none that differs": ("a2", "2.3", "attention_vjp", "return ()"),
    "the example on paper": ("a3", "3.4", "ratio_loss", "return 0.125"),
}


@pytest.mark.parametrize("name, number, function, body", SAMPLES.values(), ids=SAMPLES.keys())
def test_what_is_not_solved_gets_nothing(name, number, function, body):
    source = source_of(GIVEN[name], **{function: body})
    if function == "largest_error":
        source += "\nclass Turn:\n    now = True\n"
    got = points(GIVEN[name], number, source)
    solved = {"3.4": 1, "4.6": 0}.get(number, 0)  # 3.4 and 4.6 have a second function, which is right here
    assert got == solved


ZEROS = """
class Node:
    def __init__(self, value, parents=(), vjp=None):
        self.value, self.parents, self.grad = np.zeros_like(value), tuple(parents), np.zeros_like(value)
        self.vjp = lambda g: [np.zeros_like(parent.value) for parent in self.parents]
"""
CREATED = """
class Node:
    made = []
    def __init__(self, value, parents=(), vjp=None):
        self.value, self.parents = np.asarray(value, dtype=float), tuple(parents)
        self.vjp, self.grad = vjp, None
        Node.made.append(self)
"""


def with_node(node, **bodies):
    return source_of(GIVEN["a1"], **bodies) + node


@pytest.mark.parametrize("number, source, most", [
    ("1.1", with_node(ZEROS, multiply="return Node(a.value, (a, b))"), 0),
    ("1.3", with_node(ZEROS, backward="return None"), 0),
    # the order in which all nodes were made is an order of a graph that is all there is: no longer
    ("1.2", with_node(CREATED, order="nodes, Node.made = Node.made, []\nreturn nodes"), 3)])
def test_a_node_class_of_ones_own_gains_nothing(number, source, most):
    got = rows(GIVEN["a1"], number, source)
    assert sum(row.points for row in got) <= most
    if most:
        assert not next(row for row in got if "used again" in row.name).points


def allowing(tmp_path, *modules):
    """A1 with these modules allowed, so that a sample needs no way round the rules, and with little time."""
    shutil.copytree(GIVEN["a1"].folder, tmp_path / "a1", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "a1" / "assignment.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"math", "numpy"', str(["math", "numpy", *modules])[1:-1]), encoding="utf-8")
    return dataclasses.replace(assignment.load(tmp_path / "a1"), seconds=3.0)


@pytest.fixture
def anything(tmp_path):
    return allowing(tmp_path, "json", "os", "sys", "time")


FORGED = """import json
import os
row = {"case": "test_axes_in_front", "passed": True, "message": ""}
for line in (json.dumps(row), json.dumps([{"answer": 0}, []]), json.dumps([{"answer": True}, []])):
    for number in range(64):
        try:
            os.write(number, line.encode() + b"\\n")
        except OSError:
            pass
return None"""


def test_results_written_to_every_open_file_are_none(anything):
    got = rows(anything, "1.4", source_of(anything, unbroadcast=FORGED))
    assert sum(row.points for row in got) == 0 and {row.visibility for row in got} == {"visible", "hidden"}


def test_the_process_of_a_submission_has_neither_solutions_nor_tests(anything):
    source = ("import os\nimport sys\n\n\ndef unbroadcast(g, shape):\n"
              "    return [*sys.modules, *sys.argv, *sys.path, os.getcwd(), *os.environ.values()]\n")
    with judge.Judge(anything, 60, {}) as its:
        held = its.load(source, "1.4").unbroadcast(0, ())
    assert "numpy" in held and len(held) > 100
    folders = [str(anything.folder), str(GIVEN["a1"].folder.parents[1])]
    assert not [text for text in held if "pytest" in text.split(".") or text.startswith("tinytoken")
                or any(folder in text for folder in folders)]


def test_hidden_cases_come_last_so_their_inputs_reach_no_visible_message(monkeypatch):
    asked = []
    monkeypatch.setattr(grade, "_ask_judge", lambda *args: asked.append(args[3]) or [])
    given = GIVEN["a2"]
    rows(given, "2.1", "")
    hidden = {case.name for case in given.cases() if case.visibility != "visible"}
    assert [name in hidden for name in asked[0]] == [False, False, True]


def test_inputs_differ_between_files_and_are_the_same_for_one():
    source = source_of(GIVEN["a1"], unbroadcast="raise ValueError(repr(float(g.sum())))")
    first, again, other = (rows(GIVEN["a1"], "1.4", text)[0].output
                           for text in (source, source, source + "# a comment\n"))
    assert "ValueError: " in first and first == again != other


LEAVES = """import os
import time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_descendants_are_the_living_ones_at_any_depth_and_are_ended():
    with subprocess.Popen(["sh", "-c", "sh -c 'sleep 1000; true' & wait"], start_new_session=True) as top:
        until = time.monotonic() + 20
        while len(processes.descendants(top.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        inner, sleeping = processes.descendants(top.pid)
        assert processes.descendants(inner) == [sleeping] and top.pid in processes.descendants(os.getpid())
        processes.end_tree(top, top.pid)
        assert not processes.descendants(top.pid)
        os.waitid(os.P_PID, top.pid, os.WEXITED | os.WNOWAIT)
        assert top.pid not in processes.descendants(os.getpid())  # ended, though nobody has asked how


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="needs /proc and a subreaper")
@pytest.mark.parametrize("then", ["time.sleep(1000)", "os._exit(3)", "return g"])
def test_what_leaves_its_group_does_not_hold_the_grader_and_is_ended(anything, then):
    before = processes.descendants(os.getpid())
    began = time.monotonic()
    got = rows(anything, "1.4", source_of(anything, unbroadcast=LEAVES + then))
    took = time.monotonic() - began
    assert sum(row.points for row in got) <= 1  # of the shape that needs no sum
    assert took < judge.PATIENCE * anything.seconds + 10, took
    assert processes.descendants(os.getpid()) == before
    alive = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert f'"RLIMIT_CPU": {int(anything.seconds)}' not in alive


def test_a_process_that_one_look_missed_is_ended(monkeypatch):
    looks = iter([[], ["late"], [], []])
    with subprocess.Popen(["sleep", "1000"]) as late, subprocess.Popen(["true"], start_new_session=True) as top:
        monkeypatch.setattr(processes, "descendants", lambda _: [late.pid for _ in next(looks, [])])
        processes.end_tree(top, os.getpid())
        try:
            assert late.wait(10) == -9
        finally:
            late.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits")
def test_the_judge_has_a_limit_too_and_ends_nothing_that_is_not_the_submissions(anything):
    tests = anything.folder / "tests" / "test_a1.py"
    tests.write_text("import resource\nimport pytest\n\n\n@pytest.mark.points(1, number=\"1.4\")\n"
                     "def test_limit(student):\n"
                     "    assert resource.getrlimit(resource.RLIMIT_AS)[0] == 4 * 2**30\n", encoding="utf-8")
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            assert points(anything, "1.4", source_of(anything)) == 1
            with judge.Judge(anything, 60, {}) as its:
                its.load(source_of(anything), "1.4")
            assert other.poll() is None
        finally:
            other.kill()


def test_a_judge_that_hangs_is_ended_in_time(anything, monkeypatch):
    tests = anything.folder / "tests" / "test_a1.py"
    tests.write_text("import time\nimport pytest\n\n\n"
                     "@pytest.mark.points(1, number=\"1.4\")\ndef test_is_quick(student):\n    pass\n\n\n"
                     "@pytest.mark.points(1, number=\"1.4\")\ndef test_hangs(student):\n"
                     "    time.sleep(1000)\n", encoding="utf-8")
    monkeypatch.setattr(grade, "GRACE", 10)
    monkeypatch.setattr(grade, "PATIENCE", 1)
    began = time.monotonic()
    quick, hangs = rows(anything, "1.4", source_of(anything))
    assert time.monotonic() - began < 30 and quick.points == 1  # what was finished before counts
    assert hangs.points == 0 and hangs.output == "the tests stopped early: too much time or memory"


@pytest.mark.parametrize("make, said", [
    (lambda path, other: path.symlink_to(other), "is a link"),
    (lambda path, other: os.link(other, path), "is a hard link"),
    (lambda path, other: path.mkdir(), "is no regular file"),
    pytest.param(lambda path, other: os.mkfifo(path), "is no regular file",
                 marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names"))])
def test_a_link_to_anothers_file_is_not_graded(tmp_path, make, said):
    given = GIVEN["a1"]
    (tmp_path / "ada").mkdir()
    (tmp_path / "eve").mkdir()
    other = tmp_path / "ada" / given.script
    other.write_text(source_of(given), encoding="utf-8")
    make(tmp_path / "eve" / given.script, other)
    report = grade.grade_submission(given, tmp_path / "eve")
    assert report.points == 0 and said in report.problem


def test_a_folder_that_is_a_link_is_not_graded(tmp_path):
    given = GIVEN["a1"]
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / given.script).write_text(source_of(given), encoding="utf-8")
    (tmp_path / "eve").symlink_to(tmp_path / "ada")
    reports = grade.grade_folder(given, tmp_path, tmp_path / "points.csv")
    assert "is a link" in reports["eve"].problem and reports["ada"].points == 25


def answering(given, line):
    """A submission's function that answers the judge with these bytes, in place of a result."""
    return source_of(given, unbroadcast=f"import os\nimport time\nfor n in range(3, 64):\n    try:\n        "
                                        f"os.write(n, {line!r})\n    except OSError:\n        pass\n"
                                        "time.sleep(1000)")


@pytest.mark.parametrize("line", [
    b"no message\n", b"\n", b"[]\n", b"[1, 2]\n", b'[{"answer": {"array": 0}}, []]\n',
    b'[{"answer": {"array": 0}}, [["O", [2]]]]\n', b'[{"answer": {"array": 0}}, [["|b1", [-1]]]]\n',
    b'[{"answer": {"array": 0}}, [["<f8", [99999999999]]]]\n', b'[{"answer": {"yours": 99}}, []]\n',
    b'[{"answer": {"pickle": []}}, []]\n', b'[{"answer": 0, "changed": [7]}, []]\n', b"[" * 100_000 + b"\n",
    b'[{"answer": ' + b"9" * 5000 + b"}, []]\n"], ids=lambda line: line[:40].decode())
def test_what_is_no_result_is_none(anything, line):
    row = rows(anything, "1.4", answering(anything, line))[0]
    assert not row.points and "what its process sent is no result" in row.output


@pytest.fixture
def pair():
    """A judge's process and the names of a submission with these functions."""
    source = ("import numpy as np\n\n\ndef unbroadcast(*args, **kwargs):\n    return args, kwargs\n\n\n"
              "def called(f, *args):\n    return f(*args)\n\n\ndef failing(kind):\n    raise kind\n\n\n"
              "def a_set():\n    return {1, 2}\n\n\ndef write(a, b):\n    b[...] = 1\n    return a\n\n\n"
              "def draw(rng):\n    return rng.standard_normal(3)\n\n\n"
              "class Error(Exception):\n    def __str__(self):\n        raise self\n\n\n"
              "def worse():\n    raise Error\n")
    with judge.Judge(GIVEN["a1"], 60, {}) as its:
        yield its.load(source, "1.4")


@pytest.mark.parametrize("value", [
    None, True, 3, -2.5, float("inf"), "text é", [], (), {}, [1, (2, [3.0])], {"a": 1, (1, 2): "b"},
    np.arange(6.0).reshape(2, 3), np.zeros((0, 3)), np.array(4.0), np.arange(4, dtype=">i2"), np.float32(0.1),
    np.arange(12.0).reshape(3, 4).T[::2], np.array([True, False]), np.complex64(1j), np.bool_(True)],
    ids=repr)
def test_values_go_there_and_come_back(pair, value):
    (found,), kwargs = pair.unbroadcast(value)
    np.testing.assert_equal(found, value)
    assert type(found) is type(value) and getattr(found, "dtype", 0) == getattr(value, "dtype", 0)
    assert kwargs == {} and pair.unbroadcast(a=1) == ((), {"a": 1})


@pytest.mark.parametrize("value, kind", [
    ("np.array([1, None])", "object array"), ("np.array(['a'])", "<U1 array"),
    ("np.ma.ones(2)", "MaskedArray")])
def test_an_array_that_holds_no_numbers_is_called_what_it_is(value, kind):
    with judge.Judge(GIVEN["a1"], 60, {}) as its:
        student = its.load(f"import numpy as np\n\n\ndef unbroadcast(g, shape):\n    return {value}\n", "1.4")
        with pytest.raises(AssertionError, match=f"found a {kind}, expected an array"):
            checks.close(student.unbroadcast(0, ()), np.zeros(2))


def raise_value_error(text):
    raise ValueError(text)


def test_objects_functions_and_errors_on_both_sides(pair):
    assert pair.called(lambda x: x + 1, 2) == 3 and sorted(pair.a_set()) == [1, 2]
    function = pair.called
    assert pair.called(lambda f: f, function) is function and pair.Error is pair.Error
    given = lambda x: x
    assert pair.unbroadcast(given)[0][0] is given
    with pytest.raises(ZeroDivisionError, match="division"):
        pair.called(lambda: 1 / 0)
    with pytest.raises(child.Raised) as caught:
        pair.worse()
    assert caught.value.kind == "Error" and str(caught.value) == "no message: Error"
    for text, said in (("", "no message"), ("x" * 10**6, "x" * 600)):
        with pytest.raises(ValueError) as refused:
            pair.called(lambda text=text: raise_value_error(text))
        assert str(refused.value) == said
    with pytest.raises(TypeError, match="a case passes a object"):
        pair.unbroadcast(object())
    with pytest.raises(AttributeError, match="nothing is missing: the submission has no"):
        pair.nothing()
    np.testing.assert_array_equal(pair.draw(np.random.default_rng(5)),
                                  np.random.default_rng(5).standard_normal(3))


def test_a_changed_argument_is_seen_and_the_judges_own_is_not_changed(pair):
    a, b = np.zeros(3), np.zeros(2)
    checks.refuse_changes(pair.unbroadcast, a, b)
    with pytest.raises(AssertionError, match="argument 2 was changed"):
        checks.refuse_changes(pair.write, a, b)
    with pytest.raises(AssertionError, match="argument 1 was changed"):  # an array given twice is one there
        checks.refuse_changes(lambda a: pair.write(a, a), a)
    assert not a.any() and not b.any()
    checks.close(pair.write(a, a), np.ones(3))


def test_an_array_that_a_function_of_the_judge_returns_twice_is_one_array_there():
    shared = np.zeros(2)
    with judge.Judge(GIVEN["a1"], 60, {}) as its:
        student = its.load("def unbroadcast(f):\n    f(None)[0] = 1\n"
                           "    return f({1}), f({1}) is f({1})\n", "1.4")
        of_the_judge = lambda x: shared if x is None else (list(x), shared)[1]  # it may ask back meanwhile
        with pytest.raises(AssertionError, match="argument 1 was changed"):
            checks.refuse_changes(lambda shared: student.unbroadcast(of_the_judge), shared)
        found, same = student.unbroadcast(of_the_judge)
    assert same and not shared.any()
    checks.close(found, np.array([1.0, 0.0]))


@pytest.mark.parametrize("source, kind", [
    ("import os as unbroadcast\n", "ModuleNotFoundError"),
    ("class unbroadcast:\n    open('x')\n", "NameError"),
    ("class unbroadcast:\n    __import__('os')\n", "ModuleNotFoundError"),
    ("class unbroadcast:\n    raise SystemExit\n", "SystemExit")])
def test_what_the_rules_missed_is_not_there_when_it_runs(source, kind):
    with judge.Judge(GIVEN["a1"], 60, {}) as its, pytest.raises(child.Raised) as caught:
        its.load(source, "1.4")
    assert caught.value.kind == kind


def test_what_trains_and_what_solves_another_exercise_is_not_run():
    source = ("raise SystemExit\n\n\ndef order(end):\n    return 'mine'\n\n\n"
              "def unbroadcast():\n    return order\n")
    with judge.Judge(GIVEN["a1"], 60, {}) as its:
        student = its.load(source, "1.4")
        reference = student.unbroadcast()
    assert reference.__module__ == "references" and reference is student.order


def test_more_than_fits_in_a_message_is_refused(pair, monkeypatch):
    monkeypatch.setattr(child, "MOST", 1000)
    with pytest.raises(ValueError, match="too much in one call: 1600 bytes"):
        pair.unbroadcast(np.zeros(200))


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system of a few files in place of this one's."""
    for name in ("usr/lib", "venv", "usr/app/tinytoken/course"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    monkeypatch.setattr(sandbox, "SYSTEM", tuple(str(tmp_path / name) for name in ("usr", "lib", "sbin")))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "usr"))
    monkeypatch.setattr(np, "__file__", str(tmp_path / "usr" / "lib" / "numpy" / "__init__.py"))
    return tmp_path


def test_the_command_of_the_sandbox(system):
    package = system / "usr" / "app" / "tinytoken"
    words = sandbox.command(["python", "child.py"], [package / "course"], [package, system / "elsewhere"])
    text = " ".join(words).replace(str(system), "")
    assert text == ("bwrap --unshare-all --die-with-parent --new-session --cap-drop ALL "
                    "--ro-bind /usr /usr --symlink usr/lib /lib --ro-bind /venv /venv "
                    "--tmpfs /usr/app/tinytoken "
                    "--ro-bind /usr/app/tinytoken/course /usr/app/tinytoken/course "
                    f"--dev-bind {os.devnull} {os.devnull} --remount-ro / --chdir / python child.py")


@pytest.mark.parametrize("platform, bwrap, said", [
    ("win32", "", "bubblewrap is for Linux only"), ("linux", None, "bubblewrap is not installed"),
    ("linux", "#!/bin/sh\necho hello >&2\necho No permissions >&2\nexit 1\n",
     "does not work here: No permissions"),
    ("linux", "#!/bin/sh\nexit 0\n", "")])
@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_where_there_is_no_sandbox_it_says_why(tmp_path, monkeypatch, platform, bwrap, said):
    sandbox.missing.cache_clear()
    monkeypatch.setattr(sys, "platform", platform)
    if bwrap:
        (tmp_path / "bwrap").write_text(bwrap, encoding="utf-8")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if bwrap is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert said in sandbox.missing() and bool(said) == bool(sandbox.missing())
        assert grade._sandboxed(None) == (not said) and grade._sandboxed(False) is False
        if said:
            with pytest.raises(tt.InputError, match="--sandbox: bubblewrap"):
                grade._sandboxed(True)
    finally:
        sandbox.missing.cache_clear()


def test_the_command_asks_for_the_sandbox_or_does_without(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sandbox, "missing", lambda: "bubblewrap is not installed")
    monkeypatch.setattr(grade, "_ask_judge", lambda *args: asked.append(args[-1]) or [{"failed": ""}])
    (tmp_path / "in" / "ada").mkdir(parents=True)
    (tmp_path / "in" / "ada" / GIVEN["a1"].script).write_text(source_of(GIVEN["a1"]), encoding="utf-8")
    one = ["grade", "a1", "--submission", str(tmp_path / "in" / "ada")]
    many = ["grade", "a1", "--submissions", str(tmp_path / "in"), "--csv", str(tmp_path / "points.csv")]
    assert main([*one, "--sandbox"]) == main([*many, "--sandbox"]) == 2 and not asked
    assert capsys.readouterr().err.count("grade: --sandbox: bubblewrap is not installed") == 2
    assert main(many) == 0 and "without a sandbox: bubblewrap is not installed" in capsys.readouterr().err
    assert main([*many, "--no-sandbox"]) == 0 and "without" not in capsys.readouterr().err
    assert len(asked) == 16 and not any(asked)
    monkeypatch.setattr(sandbox, "missing", lambda: "")
    for words in (one, many, [*one, "--sandbox"]):
        assert main(words) == 0
    assert asked[16:] == 24 * [True]


def test_the_package_and_the_assignment_are_hidden_in_the_sandbox(monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "command", lambda *args: asked.append(args) or [sys.executable, "-c", ""])
    with judge.Judge(GIVEN["a1"], 60, {}, True):
        pass
    (program, shown, hidden), = asked
    assert hidden == [judge.PACKAGE, GIVEN["a1"].folder] and [str(path) for path in shown] == [child.__file__]
    assert program[:4] == [sys.executable, "-I", "-B", child.__file__]


boxed = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox: {sandbox.missing()}")


@pytest.mark.parametrize("sandboxed", [False, pytest.param(True, marks=boxed)])
def test_an_assignment_may_allow_some_of_the_package(sandboxed):
    given = dataclasses.replace(GIVEN["a1"], tinytoken=("ops.softmax",))
    source = "from tinytoken.ops import softmax\n\n\ndef unbroadcast(g, shape):\n    return softmax(g).data\n"
    with judge.Judge(given, 60, {}, sandboxed) as its:
        checks.close(its.load(source, "1.4").unbroadcast(np.zeros(2), ()), np.full(2, 0.5))


@boxed
def test_in_the_sandbox_python_can_be_read_and_nothing_else(anything):
    source = '''
import os
def unbroadcast(g, shape):
    seen, written = [], []
    for path in ("/", "/tmp", "/home", "/etc", "/proc", "/dev", FOLDER, PACKAGE):
        try:
            seen += [os.path.join(path, name) for name in os.listdir(path)]
        except OSError:
            pass
    for path in ("/x", "/tmp/x", "/dev/x", "/dev/shm/x", "/usr/x", PACKAGE + "/x"):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            written.append(path)
        except OSError:
            pass
    return seen, written, os.getpid()
'''.replace("FOLDER", repr(str(anything.folder))).replace("PACKAGE", repr(str(judge.PACKAGE)))
    with judge.Judge(anything, 60, {}, True) as its:
        seen, written, pid = its.load(source, "1.4").unbroadcast(0, ())
    assert not written and pid < 10 and f"{os.devnull}" in seen
    hidden = (str(anything.folder), "/home", "/proc", "/etc/passwd")
    assert not [path for path in seen if path.startswith(hidden)]
    assert [path for path in seen if path.startswith(str(judge.PACKAGE))] == [f"{judge.PACKAGE}/course"]


@boxed
@pytest.mark.parametrize("then", ["time.sleep(1000)", "os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_in_the_sandbox_nothing_is_left(anything, then):
    before = processes.descendants(os.getpid())
    got = rows(anything, "1.4", source_of(anything, unbroadcast=LEAVES + then), True)
    assert not sum(row.points for row in got) and processes.descendants(os.getpid()) == before
    said = {"time.sleep(1000)": "an endless loop, or sleep?", "os._exit(3)": "by itself (exit code 3)"}
    assert said.get(then, "SIGKILL") in got[0].output


@boxed
def test_in_the_sandbox_the_reference_gets_every_point():
    report = grade.grade_submission(GIVEN["a1"], GIVEN["a1"].folder, sandboxed=True)
    assert report.points == 25
