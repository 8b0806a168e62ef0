"""Notebooks: a percent script as one, and one that was handed in as a script.

A percent script has cells that begin with `# %%`. A notebook is a JSON file in nbformat 4.5:
https://nbformat.readthedocs.io/en/latest/format_description.html
"""
import ast
import io
import json
import re
import tokenize
from typing import Any

# A line of IPython's: %time f(x), !ls, files = !ls, f? and ?f.
IPYTHON = re.compile(r"\s*([%!].*|[\w.,\s\[\]]+=\s*[%!].*|\?.*|[\w.]+\?+\s*)")


def cells(script: str) -> list[tuple[str, str]]:
    """The cells of a percent script: ("markdown" or "code", text)."""
    first, *parts = re.split(r"^# %%", script, flags=re.MULTILINE)
    found = [("code", first.strip("\n"))] if first.strip() else []
    for part in parts:
        marker, _, body = part.partition("\n")
        if "[markdown]" in marker:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        found.append(("markdown" if "[markdown]" in marker else "code", body.strip("\n")))
    return found


def from_script(script: str) -> str:
    """A percent script as the text of a notebook."""
    return text_of([cell(kind, body) for kind, body in cells(script)])


def to_script(notebook: str) -> tuple[str, list[str]]:
    """(the code of a notebook's text as a script, where each of its lines stands: "cell 3, line 1").

    Lines for IPython (%matplotlib inline, !pip install) become comments. ValueError where it is no notebook.
    """
    try:
        parts = [(number, "".join(each["source"]))
                 for number, each in enumerate(json.loads(notebook)["cells"], start=1)
                 if each["cell_type"] == "code"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"no notebook of nbformat 4 ({type(error).__name__}: {error})") from error
    lines, places = [], []
    for number, source in parts:
        own = _python(source).split("\n")
        lines += ["# %%", *own]
        places += [f"cell {number}", *(f"cell {number}, line {line}" for line in range(1, len(own) + 1))]
    return "\n".join(lines) + "\n", places


def _python(source):
    """A cell's source with what only IPython understands as comments."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        if re.match(r"%%(?!time|capture|prun)", source.lstrip()):  # a cell in another language
            return re.sub("^", "# ", source, flags=re.MULTILINE)
        lines: list[str] = []
        goes_on = False  # the line before is IPython's and ends with a backslash
        for line in source.split("\n"):
            if goes_on:
                goes_on, line = line.endswith("\\"), f"# {line}"
            elif IPYTHON.fullmatch(line) and not _is_open("\n".join(lines)):
                goes_on, line = line.endswith("\\"), re.sub(r"^\s*", r"\g<0>pass  # ", line)
            lines.append(line)
        return "\n".join(lines)
    return source


def _is_open(source):
    """Whether a bracket, a string or a line goes on behind this source."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
            pass
    except tokenize.TokenError as error:
        return "EOF in multi-line" in str(error) or "unterminated triple-quoted" in str(error)
    except SyntaxError:  # of its indentation
        pass
    return False


def cell(kind: str, source: str, **nbgrader: Any) -> dict[str, Any]:
    """A cell, "markdown" or "code"; nbgrader: settings of nbgrader's metadata, where it gets any."""
    made = {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
    if nbgrader:
        plain = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
        made["metadata"] = {"nbgrader": plain | nbgrader}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def text_of(made: list[dict[str, Any]]) -> str:
    """A notebook with these cells, as text."""
    notebook = {"cells": [{"id": f"cell-{number}", **each} for number, each in enumerate(made)],
                "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python",
                                            "name": "python3"},
                             "language_info": {"name": "python"}},
                "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
