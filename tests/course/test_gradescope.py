"""Gradescope: results.json field by field against its specification, and a zip that grades by itself.

The schema was written from https://gradescope-autograders.readthedocs.io/en/latest/specs/.
"""
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

import tinytoken as tt
from tinytoken.course import assignment, grade, gradescope, release

A1 = assignment.find("a1")
number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
text = lambda value: isinstance(value, str)
seen = lambda value: value in ("hidden", "after_due_date", "after_published", "visible")
format_ = lambda value: value in ("text", "html", "simple_format", "md", "ansi")
OF_TEST = {"score": number, "max_score": number, "status": lambda value: value in ("passed", "failed"),
           "name": text,
           "name_format": format_, "number": text, "output": text, "output_format": format_,
           "visibility": seen,
           "tags": lambda value: isinstance(value, list) and all(map(text, value)),
           "extra_data": lambda value: isinstance(value, dict)}
OF_BOARD = {"name": text, "value": lambda value: number(value) or text(value),
            "order": lambda value: value in ("asc", "desc")}
OF_FILE = {"score": number, "execution_time": number, "output": text, "output_format": format_,
           "test_output_format": format_,
           "test_name_format": format_, "visibility": seen, "stdout_visibility": seen,
           "extra_data": lambda value: isinstance(value, dict),
           "tests": lambda value: isinstance(value, list) and all(fits(row, OF_TEST) for row in value),
           "leaderboard": lambda value: isinstance(value, list)
           and all(fits(row, OF_BOARD) and {"name", "value"} <= row.keys()
                                                                         for row in value)}


def fits(said, schema):
    return isinstance(said, dict) and all(name in schema and schema[name](value) for name,
                                          value in said.items())


def report(problem=""):
    """Every other case solved."""
    rows = [grade.Row(case.number, case.name, case.points * (i % 2), case.points, case.visibility, ""
                      if i % 2 else "off by 3")
            for i, case in enumerate(A1.cases())]
    return grade.Report(A1.name, rows, problem, seconds=1.234)


@pytest.mark.parametrize("options", [{}, {"hidden": True},
                                     {"leaderboard": [("accuracy", 0.5, "desc"), ("M MACs", 3, "asc")]}])
def test_results_are_what_the_specification_says(tmp_path, options):
    gradescope.write_results(report(), tmp_path / "results.json", **options)
    said = json.loads((tmp_path / "results.json").read_text())
    assert fits(said, OF_FILE), said
    assert said["execution_time"] == 1.23 and said["score"] == sum(row["score"] for row in said["tests"])
    assert all(row.keys() >= {"score", "max_score", "status", "name", "number", "output", "visibility",
                              "tags"} for row in said["tests"])
    assert all((row["status"] == "passed") == (row["score"] == row["max_score"]) for row in said["tests"])
    hidden = [case for case in A1.cases() if case.visibility != "visible"]
    assert len(said["tests"]) == len(A1.cases()) - (0 if options.get("hidden") else len(hidden))
    assert ("leaderboard" in said) == ("leaderboard" in options)


def test_the_schema_refuses_what_is_not_in_the_specification():
    good = gradescope.results(report())
    assert fits(good, OF_FILE)
    for change in ({"execution_time": "1 s"}, {"visibility": "public"}, {"points": 3},
                   {"tests": [{"score": "2"}]},
                   {"tests": [{"status": "ok"}]}, {"leaderboard": [{"name": "x"}]}, {"score": True}):
        assert not fits(good | change, OF_FILE), change


def test_a_file_that_was_not_run_says_so_once_and_in_every_row():
    said = gradescope.results(report("line 1: may not import torch"))
    assert said["output"] == "line 1: may not import torch" and fits(said, OF_FILE)


@pytest.mark.parametrize("hidden", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_zip_grades_by_itself(tmp_path, hidden):
    path = gradescope.autograder_zip(A1, tmp_path / "a1.zip", hidden)
    first = path.read_bytes()
    assert gradescope.autograder_zip(A1, path, hidden).read_bytes() == first
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert {"setup.sh", "run_autograder"} <= set(names) and not [name for name in names
                                                                     if "mistakes" in name]
        assert f"assignment/{A1.script}" not in names  # the solutions stay at home
        assert all(archive.getinfo(name).external_attr >> 16 & 0o111
                   for name in ("setup.sh", "run_autograder"))
        archive.extractall(tmp_path / "source")
    for name in ("setup.sh", "run_autograder"):
        assert (tmp_path / "source" / name).read_text().startswith("#!/usr/bin/env bash\n")
    (tmp_path / "submission").mkdir()
    stub = release.without_solutions(A1, (A1.folder / A1.script).read_text())
    (tmp_path / "submission" / A1.script).write_text(stub)
    # run_autograder, with this Python and these folders in place of Gradescope's
    command = (tmp_path / "source" / "run_autograder").read_text()
    for theirs, ours in (("/autograder/venv/bin/python", sys.executable),
                         ("/autograder/source", str(tmp_path / "source")),
                         ("/autograder/submission", str(tmp_path / "submission")),
                         ("/autograder/results", str(tmp_path))):
        command = command.replace(theirs, ours)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["bash", "-c", command], check=True, env=environment, capture_output=True, timeout=120)
    said = json.loads((tmp_path / "results.json").read_text())
    assert fits(said, OF_FILE) and said["score"] == 0 and all("NotImplementedError" in row["output"]
                                                              for row in said["tests"])
    assert any(row["visibility"] == "hidden" for row in said["tests"]) == hidden


def test_a_zip_with_a_solution_in_it_is_not_written(tmp_path):
    folder = tmp_path / "a1_autograd"
    for path in A1.folder.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            (folder / path.relative_to(A1.folder)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(A1.folder)).write_text(path.read_text())
    (folder / "references.py").write_text("parent.grad = parent.grad + part\n")
    with pytest.raises(tt.InputError, match="a line of a solution"):
        gradescope.autograder_zip(assignment.load(folder), tmp_path / "a1.zip")
    assert not pathlib.Path(tmp_path / "a1.zip").exists()
