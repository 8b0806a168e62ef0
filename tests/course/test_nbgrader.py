"""nbgrader: the instructor's notebook has what nbgrader asks for, and goes its whole way."""
import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import tinytoken as tt
from tinytoken.course import assignment, nbgrader, notebook

GIVEN = [assignment.find(name) for name in ("a1", "a2", "a3", "a4")]
every_assignment = pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.name)


@every_assignment
def test_every_solution_and_every_case_has_its_cell(given):
    nbformat = pytest.importorskip("nbformat")
    made = nbformat.reads(nbgrader.for_nbgrader(given), 4)
    nbformat.validate(made)
    marked = [(each.metadata.nbgrader, each.source) for each in made.cells if "nbgrader" in each.metadata]
    assert all(each.keys() >= {"grade_id", "grade", "solution", "locked", "task", "schema_version"}
               for each, _ in marked)
    ids = [each.grade_id for each, _ in marked]
    assert len(set(ids)) == len(ids)
    for each in made.cells:
        solution = each.metadata.get("nbgrader", {}).get("solution", False)
        assert ("### BEGIN SOLUTION" in each.source) == solution
    graded = [(each, source) for each, source in marked if each.grade]
    cases = given.cases()
    assert [each.points for each, _ in graded] == [case.points for case in cases]
    for case, (each, source) in zip(cases, graded):
        assert each.locked and f"def {case.name}(student" in source and "pytest.mark" not in source
        hidden = source.partition("### BEGIN HIDDEN TESTS")[2].partition("### END HIDDEN TESTS")[0]
        assert (f"\n{case.name}(student" in hidden) == (case.visibility != "visible")
        if case.visibility != "visible":
            assert source.startswith(f"# Exercise {case.number}\n### BEGIN HIDDEN TESTS\n")


@every_assignment
def test_with_the_solutions_every_case_passes_and_nothing_is_trained(given, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    space = {"__name__": "__main__"}
    for each in json.loads(nbgrader.for_nbgrader(given))["cells"]:
        if each["cell_type"] == "code":
            exec(compile("".join(each["source"]), "cell", "exec"), space)
    assert {case.name for case in given.cases()} <= space.keys()


def test_a_test_that_hides_a_students_function_is_refused(doubling):
    path = doubling.folder / "tests" / "test_b1.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(f"{text}\n\ndef double(x):\n    return 2 * x\n", encoding="utf-8")
    with pytest.raises(tt.InputError, match="defines double"):
        nbgrader.for_nbgrader(doubling)


def test_no_source_is_written_over_another_and_none_from_a_students_copy(doubling, tmp_path):
    (path,) = nbgrader.write_source(doubling, tmp_path / "source")
    with pytest.raises(tt.InputError, match="is there already"):
        nbgrader.write_source(doubling, tmp_path / "source")
    (doubling.folder / "training.py").write_text("def run(student):\n    return []\n", encoding="utf-8")
    both = nbgrader.write_source(doubling, tmp_path / "new")
    assert [each.name for each in both] == [path.name, "training.py"]
    script = doubling.folder / doubling.script
    script.write_text(script.read_text(encoding="utf-8").replace("### ", "# "), encoding="utf-8")
    with pytest.raises(tt.InputError, match="no solutions"):
        nbgrader.for_nbgrader(doubling)


def test_a_script_becomes_a_notebook_and_again_the_same_script():
    for given in GIVEN:
        script = (given.folder / given.script).read_text(encoding="utf-8")
        again, places = notebook.to_script(notebook.from_script(script))
        assert ast.dump(ast.parse(again)) == ast.dump(ast.parse(script))
        assert len(places) == len(again.splitlines())
    assert notebook.cells("import os\n\n# %%\na = 1\n# %% [markdown]\n# # Title\n#\n# text") == [
        ("code", "import os"), ("code", "a = 1"), ("markdown", "# Title\n\ntext")]


@pytest.mark.slow
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.name)
def test_nbgraders_own_way(given, tmp_path):
    """generate_assignment and autograde of nbgrader 0.9.6: the solutions get 25 points, the release none."""
    beside = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("nbgrader", path=beside)
    if program is None:
        pytest.skip("nbgrader is not installed here: pip install nbgrader==0.9.6")
    environment = os.environ | {"PATH": f"{pathlib.Path(program).parent}{os.pathsep}{os.environ['PATH']}",
                                "PYTHONPATH": str(pathlib.Path(tt.__file__).parents[1]),
                                "JUPYTER_PLATFORM_DIRS": "1", "HOME": str(tmp_path)}

    def nbgrade(*words):
        done = subprocess.run([program, *words, "--course-dir=."], cwd=tmp_path, env=environment, timeout=600,
                              capture_output=True, encoding="utf-8", errors="replace")
        assert done.returncode == 0, done.stderr
    name, book = given.name, f"{given.name}.ipynb"
    nbgrader.write_source(given, tmp_path / "source" / name)
    nbgrade("generate_assignment", name)
    released = (tmp_path / "release" / name / book).read_text(encoding="utf-8")
    hidden = [case.name for case in given.cases() if case.visibility != "visible"]
    assert hidden and not [case for case in hidden if case in released]
    assert "BEGIN SOLUTION" not in released and "NotImplementedError" in released
    for student, folder in (("ada", "source"), ("bob", "release")):
        (tmp_path / "submitted" / student / name).mkdir(parents=True)
        shutil.copy(tmp_path / folder / name / book, tmp_path / "submitted" / student / name / book)
    nbgrade("autograde", name)
    code = ("from nbgrader.api import Gradebook\n"
            "with Gradebook('sqlite:///gradebook.db') as book:\n"
            f"    for who in ('ada', 'bob'):\n        print(book.find_submission({name!r}, who).score)\n")
    python = pathlib.Path(program).parent / "python"
    out = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                         encoding="utf-8", check=True)
    assert out.stdout.split() == ["25.0", "0.0"]
