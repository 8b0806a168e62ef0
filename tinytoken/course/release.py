"""A student's copy of an assignment: solutions cut out, hidden tests left out, and a check that nothing has
leaked."""
import ast
import pathlib
import re

from ..files import replacing
from ..errors import InputError, expect

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"  # nbgrader's words
LEAK = 12  # a solution's line of so many characters may not be in a student's copy, if it is not given text


def regions(text, where="the script"):
    """The solutions in a text: (first line, last line), markers included, counted from 0. InputError for a
    marker without its partner, one inside another, or nothing between."""
    found, begun = [], None
    for number, line in enumerate(text.splitlines()):
        if BEGIN in line:
            expect(begun is None, where,
                   f"line {number + 1}: a solution begins inside the one of line {(begun or 0) + 1}")
            begun = number
        elif END in line:
            expect(begun is not None, where, f"line {number + 1}: a solution ends that has not begun")
            expect(number > begun + 1, where, f"line {number + 1}: an empty solution")
            found.append((begun, number))
            begun = None
    expect(begun is None, where, f"line {(begun or 0) + 1}: a solution that does not end")
    return found


def without_solutions(assignment, text):
    """The text with `raise NotImplementedError` in place of each solution. A text without solutions stays as
    it is."""
    lines, tree = text.splitlines(), ast.parse(text)
    for first, last in reversed(regions(text, assignment.script)):
        exercise = _exercise_of(assignment, tree, first + 1)
        indent = re.match(r"\s*", lines[first]).group()
        message = f"Exercise {exercise.number}: {exercise.title}; see lessons/{exercise.lesson}"
        lines[first:last + 1] = [f"{indent}raise NotImplementedError({message!r})"]
    made = "\n".join(lines) + "\n"
    ast.parse(made)
    return made


def _exercise_of(assignment, tree, line):
    """The exercise whose function or class holds a line (from 1)."""
    holds = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
             and node.lineno <= line <= node.end_lineno]
    for exercise in assignment.exercises:
        if holds and holds[0].name in exercise.names:
            return exercise
    raise InputError(f"{assignment.script}: the solution at line {line} is in no function or class of an "
                     f"exercise")


def write_copy(assignment, out, notebook=False):
    """Write the student's copy into the new or empty folder `out`, or over an earlier copy of the same
    assignment -> the paths written. Nothing is written if something would leak."""
    out, source = pathlib.Path(out), (assignment.folder / assignment.script).read_text()
    expect(regions(source, assignment.script), "stub",
           f"{assignment.script} has no solutions: it is a student's copy already")
    files = {assignment.script: without_solutions(assignment, source)}
    for name in ("assignment.toml", "references.py", "training.py", "README.md"):
        if (assignment.folder / name).exists():
            files[name] = (assignment.folder / name).read_text()
    hidden = {case.name: case for case in assignment.cases() if case.visibility != "visible"}
    for path in sorted((assignment.folder / "tests").glob("*.py")):
        files[f"tests/{path.name}"] = without_functions(path.read_text(), hidden)
    expect(not (problems := leaks(assignment, files)), "stub", f"not released: {'; '.join(problems)}")
    strangers = [path.name for path in out.glob("*")
                 if path.name not in ("tests", *files, f"{assignment.name}.ipynb")]
    expect(not strangers, "stub",
           f"{out} holds other files ({', '.join(sorted(strangers))}): give a new folder")
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(out / name, "w") as file:
            file.write(text)
    written = [out / name for name in files]
    return written + ([_notebook(out / assignment.script)] if notebook else [])


def without_functions(text, names):
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


def leaks(assignment, files):
    """What of the instructor's would be in a copy with these {name: text}: one line for each thing found."""
    source = (assignment.folder / assignment.script).read_text()
    lines = source.splitlines()
    solved = {number for first, last in regions(source) for number in range(first, last + 1)}
    given = {line.strip() for number, line in enumerate(lines) if number not in solved}
    secret = {lines[number].strip() for number in solved} - given
    wrong = assignment.folder / "mistakes.py"
    secret |= {line.strip() for line in wrong.read_text().splitlines()} - given if wrong.exists() else set()
    secret = {line for line in secret if len(line) >= LEAK
              and not line.startswith(("#", '"""', "import ", "from "))}
    hidden = [case.name for case in assignment.cases() if case.visibility != "visible"]
    found = []
    for name, text in files.items():
        held = {line.strip() for line in text.splitlines()}
        found += [f"{name} holds a line of a solution or planted mistake: {line!r}"
                  for line in sorted(held & secret)]
        found += [f"{name} holds the marker {marker!r}" for marker in (BEGIN, END) if marker in text]
        found += [f"{name} holds the hidden test {case}" for case in hidden if f"def {case}(" in text]
        if name.endswith((".pyc", ".npz",
                          ".so")) or name.startswith((".git", "__pycache__")) or "mistakes" in name:
            found.append(f"{name} is no file for students")
    return found


def _notebook(script):
    """Write the percent script as a notebook beside it -> its path."""
    try:
        import nbformat
    except ImportError as error:
        raise InputError("stub: --notebook needs nbformat (pip install 'tinytoken-vit[notebook]')") from error
    cells = []
    for part in re.split(r"^# %%", script.read_text(), flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        if "[markdown]" in kind:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        make = nbformat.v4.new_markdown_cell if "[markdown]" in kind else nbformat.v4.new_code_cell
        cells.append(make(body.strip("\n"), id=f"cell-{len(cells)}"))
    path = script.with_suffix(".ipynb")
    with replacing(path, "w") as file:
        nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
    return path
