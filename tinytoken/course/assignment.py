"""An assignment: what its folder holds, its exercises, and the cases of its tests, read without running them.

    a1_autograd/
        a1_autograd.py     a percent script with the solutions; the one file that is handed in
        assignment.toml    title, what may be imported, seconds, the exercises
        references.py      the exercises' functions from the package, for the tests of the others
        training.py        optional: run(student) trains something with the submission, at the end of the
                           script and for a leaderboard
        tests/*.py         pytest functions, each with
                           @pytest.mark.points(3, number="1.2", visibility="visible", hint="...");
                           their fixtures are `student`, the submission's functions, and `rng` (judge.py)
        mistakes.py        wrong solutions, for the tests of the tests; never released
"""
import ast
import dataclasses
import importlib.util
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, expect

VISIBILITIES = ("visible", "hidden", "after_due_date")


@dataclasses.dataclass(frozen=True)
class Exercise:
    """number "1.3"; names: the functions and classes that solve it; lesson: where it is explained."""
    number: str
    title: str
    names: tuple[str, ...]
    lesson: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One test function, worth `points`. Only cases with visibility "visible" are in a student's copy."""
    name: str
    file: pathlib.Path
    number: str
    points: float
    visibility: str
    hint: str


@dataclasses.dataclass(frozen=True)
class Assignment:
    """An assignment's settings, as its assignment.toml has them, and its folder.

    imports: modules that a submission may import; tinytoken: dotted names of the package that it may use.
    seconds: the time for the tests of one exercise.
    """
    folder: pathlib.Path
    name: str  # "a1_autograd"
    title: str
    imports: tuple[str, ...]
    tinytoken: tuple[str, ...]
    seconds: float
    exercises: tuple[Exercise, ...]

    @property
    def script(self) -> str:
        """The name of the file that is handed in."""
        return f"{self.name}.py"

    def cases(self) -> list[Case]:
        """All cases of the tests, in the order of their exercises."""
        cases = [case for path in sorted((self.folder / "tests").glob("*.py")) for case in _cases(path)]
        names = [case.name for case in cases]
        exercises = [exercise.number for exercise in self.exercises]
        expect(len(set(names)) == len(names), "assignment",
               f"two cases of one name in {self.name}: {sorted(names)}")
        for case in cases:
            expect(case.number in exercises, "assignment",
                   f"{case.file.name}: {case.name} is of exercise {case.number!r}, "
                   f"expected one of {', '.join(exercises)}")
        return sorted(cases, key=lambda case: exercises.index(case.number))


def folders() -> list[pathlib.Path]:
    """Where assignments are looked for: lessons/assignments of the checkout that this package lies in.

    Where the package is installed without a checkout, as students have it, it is the current folder.
    """
    checkout = pathlib.Path(__file__).parents[2] / "lessons" / "assignments"
    return [checkout if checkout.is_dir() else pathlib.Path()]


def find(name: str, places: Sequence[pathlib.Path] | None = None) -> Assignment:
    """The assignment with this name, "a1" for short. places: folders to look in, or a student's copy."""
    known = []
    for place in places or folders():
        for path in sorted([*place.glob("*/assignment.toml"), *place.glob("assignment.toml")]):
            assignment = load(path.parent)
            if name in (assignment.name, assignment.name.split("_")[0]):
                return assignment
            known.append(assignment.name)
    raise InputError(f"no assignment {name!r} in {', '.join(map(str, places or folders()))}"
                     + (f", only {', '.join(known)}" if known else "; give its folder with --assignment"))


def load(folder: pathlib.Path) -> Assignment:
    """The assignment in `folder`. InputError where assignment.toml is missing or cannot be used."""
    path = folder / "assignment.toml"
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        exercises = tuple(Exercise(e["number"], e["title"], tuple(e["names"]), e["lesson"])
                          for e in settings["exercise"])
        assignment = Assignment(folder, settings["name"], settings["title"], tuple(settings["imports"]),
                                tuple(settings["tinytoken"]), float(settings["seconds"]), exercises)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot use {path}: {type(error).__name__} {error}") from error
    names = [name for exercise in exercises for name in exercise.names]
    expect(len(set(names)) == len(names), "assignment", f"{path}: a name belongs to two exercises: {names}")
    return assignment


def run_file(path: pathlib.Path) -> Any:
    """Run a Python file of an assignment's folder, which is no package -> the module."""
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cases(path):
    for node in ast.parse(path.read_bytes(), str(path)).body:
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test")):
            continue
        marks = [mark for mark in node.decorator_list if ast.unparse(mark).startswith("pytest.mark.points(")]
        expect(len(marks) == len(node.decorator_list) == 1, "assignment",
               f"{path}: {node.name} needs the one decorator pytest.mark.points(...): a case is one function")
        settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in marks[0].keywords}
        case = Case(node.name, path, settings["number"], float(ast.literal_eval(marks[0].args[0])),
                    settings.get("visibility", "visible"), settings.get("hint", ""))
        expect(case.visibility in VISIBILITIES, "assignment",
               f"{path}: {node.name} has visibility {case.visibility!r}, expected one of "
               f"{', '.join(VISIBILITIES)}")
        yield case
