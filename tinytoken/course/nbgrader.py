"""nbgrader: the instructor's notebook for the `source` folder of an nbgrader course.

Its format: https://nbgrader.readthedocs.io/en/stable/contributor_guide/metadata.html
"""
import ast
import pathlib
from typing import Any

from ..errors import expect
from ..files import FilePath, replacing
from . import notebook
from .assignment import Assignment, Case
from .release import BEGIN, without_functions

# What the grader gives to a case: the student's functions, here those of the cells above, and a generator.
STUDENT = '''


import numpy


class Student:
    def __getattr__(self, name):
        return globals()[name]


student, rng = Student(), numpy.random.default_rng(0)'''
MAIN = 'if __name__ == "__main__":'


def write_source(assignment: Assignment, out: FilePath) -> list[pathlib.Path]:
    """Write the notebook, and training.py where there is one, into the folder `out` -> the paths written.

    That is source/NAME in nbgrader's course. The notebook holds the solutions and the hidden tests: nbgrader
    takes them out of what it gives to students. InputError where a file is there already.
    """
    files = {f"{assignment.name}.ipynb": for_nbgrader(assignment)}
    training = assignment.folder / "training.py"
    if training.exists():
        files["training.py"] = training.read_text(encoding="utf-8")
    paths = [pathlib.Path(out) / name for name in files]
    for path in paths:
        expect(not path.exists(), "nbgrader", f"{path} is there already: give a new folder")
    for path, text in zip(paths, files.values()):
        with replacing(path, "w") as file:
            file.write(text)
    return paths


def for_nbgrader(assignment: Assignment) -> str:
    """The instructor's script as the text of a notebook for nbgrader's source folder.

    A cell with a solution is marked for the student to change. Each case of the tests is a cell with its
    points, behind the last solution, and a hidden one stands between nbgrader's words for that.
    """
    script = (assignment.folder / assignment.script).read_text(encoding="utf-8")
    expect(BEGIN in script, "nbgrader", f"{assignment.script} has no solutions: it is a student's copy")
    made, solved = [], 0
    for number, (kind, body) in enumerate(notebook.cells(script)):
        # nbgrader runs every cell: a training waits for someone who runs the notebook
        body = body.replace(MAIN, f'import os\n\n{MAIN[:-1]} and "NBGRADER_EXECUTION" not in os.environ:')
        made.append(notebook.cell(kind, body))
        if kind == "code" and BEGIN in body:
            made[-1] = notebook.cell(kind, body, grade_id=f"solution-{number}", solution=True)
            solved = len(made)
    return notebook.text_of([*made[:solved], *_test_cells(assignment), *made[solved:]])


def _test_cells(assignment):
    cases = assignment.cases()
    names = {name for exercise in assignment.exercises for name in exercise.names}
    made = [notebook.cell("markdown", "## Tests\nnbgrader runs these cells.")]
    for path in sorted({case.file for case in cases}):
        shared = without_functions(path.read_text(encoding="utf-8"), {case.name for case in cases})
        hides = names & {getattr(node, "name", "") for node in ast.parse(shared).body}
        expect(not hides, "nbgrader", f"{path} defines {', '.join(sorted(hides))}: in a notebook that would "
                                      "take the place of the student's")
        made.append(notebook.cell("code", shared.strip("\n") + STUDENT, grade_id=f"shared-{path.stem}",
                                  locked=True))
    return made + [_case_cell(case, number) for number, case in enumerate(cases, 1)]


def _case_cell(case: Case, number: int) -> dict[str, Any]:
    text = case.file.read_text(encoding="utf-8")
    function = next(node for node in ast.parse(text).body
                    if isinstance(node, ast.FunctionDef) and node.name == case.name)
    lines = text.splitlines()[function.lineno - 1:function.end_lineno]  # without its mark
    given = ", ".join(argument.arg for argument in function.args.args)
    body = "\n".join([*lines, "", "", f"{case.name}({given})"])
    if case.visibility != "visible":
        body = f"### BEGIN HIDDEN TESTS\n{body}\n### END HIDDEN TESTS"
    elif case.hint:
        body = f"# Hint: {case.hint}\n{body}"
    return notebook.cell("code", f"# Exercise {case.number}\n{body}", grade_id=f"case-{number}", grade=True,
                 locked=True, points=case.points)
