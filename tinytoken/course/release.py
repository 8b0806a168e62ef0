"""A student's copy of an assignment: without solutions and hidden tests, and checked for leaks of them."""
import ast
import pathlib
from collections.abc import Collection

from ..errors import InputError, expect
from ..files import FilePath, replacing
from .assignment import Assignment
from .notebook import from_script

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"  # nbgrader's words
# A solution's line of so many characters may not be in a student's copy, unless it is outside a solution too.
LEAK = 12


def regions(text: str, where: str = "the script") -> list[tuple[int, int]]:
    """The solutions in a text: (first line, last line), markers included, counted from 0.

    InputError for a marker without its partner, one inside another, or nothing between the two.
    """
    spans = []
    begin: int | None = None
    for i, line in enumerate(text.splitlines()):
        if BEGIN in line:
            expect(begin is None, where,
                   f"line {i + 1}: a solution begins inside the one of line {(begin or 0) + 1}")
            begin = i
        elif END in line:
            if begin is None:
                raise InputError(f"{where}: line {i + 1}: a solution ends that has not begun")
            expect(i > begin + 1, where, f"line {i + 1}: an empty solution")
            spans.append((begin, i))
            begin = None
    expect(begin is None, where, f"line {(begin or 0) + 1}: a solution that does not end")
    return spans


def without_solutions(assignment: Assignment, text: str) -> str:
    """The text with `raise NotImplementedError` in place of each solution; unchanged if it has none."""
    lines, tree = text.splitlines(), ast.parse(text)
    for first, last in reversed(regions(text, assignment.script)):
        exercise = _exercise_of(assignment, tree, first + 1)
        indent = lines[first][:len(lines[first]) - len(lines[first].lstrip())]
        message = f"Exercise {exercise.number}: {exercise.title}; see lessons/{exercise.lesson}"
        lines[first:last + 1] = [f"{indent}raise NotImplementedError({message!r})"]
    stub = "\n".join(lines) + "\n"
    ast.parse(stub)  # raises SyntaxError where a solution's markers do not enclose whole statements
    return stub


def _exercise_of(assignment, tree, line):
    """The exercise whose function or class holds a line (from 1)."""
    holds = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
             and node.lineno <= line <= node.end_lineno]
    for exercise in assignment.exercises:
        if holds and holds[0].name in exercise.names:
            return exercise
    raise InputError(f"{assignment.script}: the solution at line {line} is in no function or class of an "
                     f"exercise")


def write_copy(assignment: Assignment, out: FilePath, notebook: bool = False) -> list[pathlib.Path]:
    """Write the student's copy into the folder `out` -> the paths written.

    The folder is new or empty, or has an earlier copy of the same assignment, which is replaced; but not a
    script or notebook that someone has worked in. Nothing is written if something would leak.
    """
    out, source = pathlib.Path(out), (assignment.folder / assignment.script).read_text(encoding="utf-8")
    expect(regions(source, assignment.script), "stub",
           f"{assignment.script} has no solutions: it is a student's copy already")
    stub = without_solutions(assignment, source)
    work = {assignment.script: stub, f"{assignment.name}.ipynb": from_script(stub)}
    files = {assignment.script: stub}
    for name in ("assignment.toml", "references.py", "training.py", "README.md"):
        if (assignment.folder / name).exists():
            files[name] = (assignment.folder / name).read_text(encoding="utf-8")
    hidden = {case.name: case for case in assignment.cases() if case.visibility != "visible"}
    for path in sorted((assignment.folder / "tests").glob("*.py")):
        files[f"tests/{path.name}"] = without_functions(path.read_text(encoding="utf-8"), hidden)
    expect(not (problems := leaks(assignment, files)), "stub", f"not released: {'; '.join(problems)}")
    files |= work if notebook else {}
    strangers = [path.name for path in out.glob("*") if path.name not in ("tests", *files, *work)]
    expect(not strangers, "stub",
           f"{out} holds other files ({', '.join(sorted(strangers))}): give a new folder")
    for name, text in work.items():
        there = (out / name).read_text(encoding="utf-8", errors="replace") if (out / name).exists() else text
        expect(there == text, "stub", f"{out / name} is not as it was released: it may be someone's work; "
                                      "give a new folder")
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(out / name, "w") as file:
            file.write(text)
    return [out / name for name in files]


def without_functions(text: str, names: Collection[str]) -> str:
    """The text without the top-level functions `names`, decorators and comments right above them included."""
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first and lines[first - 1].startswith("#"):
                first -= 1
            while first and not lines[first - 1].strip():
                first -= 1
            del lines[first:node.end_lineno]
    return "\n".join(lines) + "\n"


def leaks(assignment: Assignment, files: dict[str, str]) -> list[str]:
    """What a copy with these files, {name: text}, would give away: a line for each leak."""
    source = (assignment.folder / assignment.script).read_text(encoding="utf-8")
    lines = source.splitlines()
    solved = {i for first, last in regions(source) for i in range(first, last + 1)}
    public = {line.strip() for i, line in enumerate(lines) if i not in solved}
    secret = {lines[i].strip() for i in solved} - public
    mistakes = assignment.folder / "mistakes.py"
    if mistakes.exists():
        secret |= {line.strip() for line in mistakes.read_text(encoding="utf-8").splitlines()} - public
    secret = {line for line in secret if len(line) >= LEAK
              and not line.startswith(("#", '"""', "import ", "from "))}
    hidden = [case.name for case in assignment.cases() if case.visibility != "visible"]
    leaked = []
    for name, text in files.items():
        own = {line.strip() for line in text.splitlines()}
        leaked += [f"{name} holds a line of a solution or planted mistake: {line!r}"
                   for line in sorted(own & secret)]
        leaked += [f"{name} holds the marker {marker!r}" for marker in (BEGIN, END) if marker in text]
        leaked += [f"{name} holds the hidden test {case}" for case in hidden if f"def {case}(" in text]
        if (name.endswith((".pyc", ".npz", ".so")) or name.startswith((".git", "__pycache__"))
                or "mistakes" in name):
            leaked.append(f"{name} is no file for students")
    return leaked
