"""A student's copy: what is cut out, what stays, what is refused, and that nothing leaks."""
import ast
import pathlib
import shutil

import pytest

import tinytoken as tt
from tinytoken.course import assignment, release

FOLDERS = sorted(path.parent for path in assignment.folders()[0].glob("*/assignment.toml"))
every_assignment = pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])


def text_with(*lines):
    return "\n".join(lines) + "\n"


@every_assignment
def test_a_copy_parses_has_no_solutions_and_raises_in_each_exercise(folder, tmp_path):
    given = assignment.load(folder)
    release.write_copy(given, tmp_path / "copy")
    copy = (tmp_path / "copy" / given.script).read_text()
    tree = ast.parse(copy)
    assert release.BEGIN not in copy and release.END not in copy
    for exercise in given.exercises:
        nodes = [node for node in tree.body if getattr(node, "name", None) in exercise.names]
        assert len(nodes) == len(exercise.names)
        assert any(f"NotImplementedError({f'Exercise {exercise.number}: {exercise.title}; see lessons/{exercise.lesson}'!r})"
                   in ast.unparse(node) for node in nodes), exercise
    signature = lambda source: [ast.unparse(node.args) for node in ast.walk(ast.parse(source))
                                if isinstance(node, ast.FunctionDef)
                                and ast.get_docstring(node)]
    assert signature(copy) == signature((folder / given.script).read_text())


@every_assignment
def test_the_same_copy_twice_and_a_copy_has_nothing_to_cut(folder, tmp_path):
    given = assignment.load(folder)
    first = [path.read_bytes() for path in release.write_copy(given, tmp_path / "copy")]
    assert [path.read_bytes() for path in release.write_copy(given, tmp_path / "copy")] == first
    copy = (tmp_path / "copy" / given.script).read_text()
    assert release.without_solutions(given, copy) == copy
    with pytest.raises(tt.InputError, match="a student's copy already"):
        release.write_copy(assignment.load(tmp_path / "copy"), tmp_path / "again")


@every_assignment
def test_hidden_tests_stay_with_the_instructor(folder, tmp_path):
    given = assignment.load(folder)
    release.write_copy(given, tmp_path / "copy")
    held = {case.name for case in assignment.load(tmp_path / "copy").cases()}
    assert held == {case.name for case in given.cases()
                    if case.visibility == "visible"} != {case.name for case in given.cases()}
    assert not list(tmp_path.rglob("mistakes.py")) and not list(tmp_path.rglob("*.pyc"))


@pytest.mark.parametrize("lines, said", [
    (["### BEGIN SOLUTION", "a = 1"], "does not end"),
    (["a = 1", "### END SOLUTION"], "has not begun"),
    (["### BEGIN SOLUTION", "### END SOLUTION"], "empty"),
    (["### BEGIN SOLUTION", "a = 1", "### BEGIN SOLUTION", "b = 2", "### END SOLUTION"], "inside the one of "
                                                                                         "line 1")])
def test_markers_that_do_not_match_are_refused(lines, said):
    with pytest.raises(tt.InputError, match=said):
        release.regions(text_with(*lines))


@pytest.fixture
def a1(tmp_path):
    """A copy of the instructor's folder, to be damaged."""
    folder = tmp_path / "a1_autograd"
    shutil.copytree(FOLDERS[0], folder, ignore=shutil.ignore_patterns("__pycache__"))
    return assignment.load(folder)


def test_a_solution_outside_of_every_exercise_is_refused(a1):
    with pytest.raises(tt.InputError, match="in no function or class of an exercise"):
        release.without_solutions(a1, text_with("def helper():", "    ### BEGIN SOLUTION", "    return 1",
                                                "    ### END SOLUTION"))


@pytest.mark.parametrize("name, text, said", [
    ("references.py", "parent.grad = parent.grad + part\n", "a line of a solution"),
    ("references.py", "# ### BEGIN SOLUTION\n", "the marker"),
    ("README.md", "    return p * (g - (p * g).sum(axis=-1, keepdims=True))\n", "a line of a solution"),
    ("README.md", "return g @ b.T, a.T @ g\n", "not released"),
    ("tests/more.py", "def more():\n    spread = np.sqrt(x.var(axis=-1, keepdims=True) + eps)\n",
     "a line of a solution")])
def test_what_would_leak_is_not_released(a1, tmp_path, name, text, said):
    path = a1.folder / name
    path.write_text((path.read_text() if path.exists() else "") + text)
    if name == "README.md" and "a.T" in text:
        text = (a1.folder / "mistakes.py").read_text().splitlines()[-3] + "\n"
        path.write_text(text)
    with pytest.raises(tt.InputError, match=said):
        release.write_copy(a1, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_is_not_written_over_other_files(a1, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(tt.InputError, match="thesis.tex"):
        release.write_copy(a1, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("notebook", [False, True])
@pytest.mark.parametrize("name", ["a1_autograd.py", "a1_autograd.ipynb"])
def test_a_copy_is_not_written_over_someones_work(a1, tmp_path, name, notebook):
    release.write_copy(a1, tmp_path / "copy", notebook=True)
    path = tmp_path / "copy" / name
    worked_in = path.read_text(encoding="utf-8").replace("raise NotImplementedError", "return", 1)
    path.write_text(worked_in, encoding="utf-8")
    (tmp_path / "copy" / "README.md").write_text("of last year", encoding="utf-8")
    with pytest.raises(tt.InputError, match=f"{name} is not as it was released"):
        release.write_copy(a1, tmp_path / "copy", notebook)
    assert path.read_text(encoding="utf-8") == worked_in
    assert (tmp_path / "copy" / "README.md").read_text(encoding="utf-8") == "of last year"
    release.write_copy(a1, tmp_path / "new", notebook)


def test_an_untouched_copy_is_replaced(a1, tmp_path):
    release.write_copy(a1, tmp_path / "copy", notebook=True)
    (tmp_path / "copy" / "README.md").write_text("of last year", encoding="utf-8")
    release.write_copy(a1, tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_bytes() == (a1.folder / "README.md").read_bytes()
    assert (tmp_path / "copy" / "a1_autograd.ipynb").exists()


def test_a_notebook_has_the_scripts_cells(a1, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    *_, path = release.write_copy(a1, tmp_path / "copy", notebook=True)
    notebook, script = nbformat.read(path, 4), (tmp_path / "copy" / a1.script).read_text()
    nbformat.validate(notebook)
    assert len(notebook.cells) == script.count("# %%") and notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# Assignment 1")


def test_without_a_checkout_the_current_folder_is_looked_into(a1, tmp_path, monkeypatch):
    release.write_copy(a1, tmp_path / "copy")
    monkeypatch.setattr(assignment, "__file__",
                        str(tmp_path / "site-packages" / "tinytoken" / "course" / "assignment.py"))
    monkeypatch.chdir(tmp_path / "copy")
    assert assignment.find("a1").folder.resolve() == tmp_path / "copy"


def test_an_assignment_that_cannot_be_used(a1, tmp_path):
    with pytest.raises(tt.InputError, match="no assignment 'a9'"):
        assignment.find("a9")
    with pytest.raises(tt.InputError, match="give its folder"):
        assignment.find("a1", [pathlib.Path(tmp_path / "nowhere")])
    (a1.folder / "tests" / "odd.py").write_text("import pytest\n@pytest.mark.points(1, number='7.1')\ndef "
                                                "test_x(student):\n    pass\n")
    with pytest.raises(tt.InputError, match="exercise '7.1'"):
        a1.cases()
    (a1.folder / "tests" / "odd.py").write_text("def test_x(student):\n    pass\n")
    with pytest.raises(tt.InputError, match="needs the one decorator"):
        a1.cases()
    (a1.folder / "assignment.toml").write_text("name = 'a1'")
    with pytest.raises(tt.InputError, match="cannot use .*assignment.toml"):
        assignment.load(a1.folder)
