"""The grader: a child process for each exercise, a row for each case, one report."""
import concurrent.futures
import csv
import dataclasses
import json
import math
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from ..backend import cpu_count
from ..errors import expect
from ..files import FilePath
from . import rules
from .assignment import Assignment, Case, Exercise

GIB = 2**30
# An exercise may take this many seconds on the clock for each second of computing: the machine may be busy.
PATIENCE = 4
TRAINING_SECONDS = 300
START = ("import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {root!r}); "
         "from tinytoken.course.child import main; main()")


@dataclasses.dataclass
class Row:
    """A case's result. output: what the student is told."""
    number: str
    name: str
    points: float
    max_points: float
    visibility: str
    output: str


@dataclasses.dataclass
class Report:
    """A submission's rows, in the order of the exercises. problem: why the file was not run at all, or ""."""
    assignment: str
    rows: list[Row]
    problem: str = ""
    seconds: float = 0.0

    @property
    def points(self) -> float:
        return sum(row.points for row in self.rows)

    @property
    def max_points(self) -> float:
        return sum(row.max_points for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Without times, so that the same submission gives the same text."""
        return {"assignment": self.assignment, "points": self.points, "max_points": self.max_points,
                "problem": self.problem, "rows": [dataclasses.asdict(row) for row in self.rows]}


def grade_submission(assignment: Assignment, submission: FilePath, bar: bool = False,
                     jobs: int | None = None) -> Report:
    """Grade a submission: the folder that holds the assignment's file, or that file.

    A folder without it has a Report too. Nothing else in the folder is read, and nothing is written there.
    jobs: exercises at a time (default: the CPUs of this process).
    """
    began = time.perf_counter()
    cases, source = assignment.cases(), _handed_in(assignment, submission)
    refused: dict[str | None, str] = {}
    problem = ""
    if source is None:
        problem = f"no {assignment.script} was handed in"
    else:
        for number, lines in rules.breaches(source, assignment).items():
            refused[number] = "was not run: " + "; ".join(lines[:5])
        if None in refused:
            problem = f"{assignment.script} {refused[None]}"
    if problem:
        return Report(assignment.name, [_row(case, False, problem) for case in cases], problem,
                      time.perf_counter() - began)

    def rows_of(exercise):
        its = [case for case in cases if case.number == exercise.number]
        if exercise.number in refused:
            return {case.name: _row(case, False, refused[exercise.number]) for case in its}
        return run_exercise(assignment, exercise, source, its)
    rows: dict[str, Row] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs or cpu_count()) as pool:
        for more in tqdm.tqdm(pool.map(rows_of, assignment.exercises), total=len(assignment.exercises),
                              desc="exercises", disable=not bar, leave=False):
            rows |= more
    return Report(assignment.name, [rows[case.name] for case in cases], "", time.perf_counter() - began)


def _handed_in(assignment, submission):
    """The text of the assignment's file: `submission`, or in that folder; None where the folder lacks it."""
    path = pathlib.Path(submission)
    expect(path.exists(), "grade", f"no {path}: expected the folder that holds {assignment.script}")
    path = path / assignment.script if path.is_dir() else path
    return path.read_text(errors="replace") if path.is_file() else None


def run_exercise(assignment: Assignment, exercise: Exercise, source: str,
                 cases: Sequence[Case]) -> dict[str, Row]:
    """{case name: Row} of one exercise, run in a child process."""
    messages, ended = _ask_child(assignment, exercise.number, source, [case.name for case in cases],
                                 assignment.seconds)
    results = {message["case"]: message for message in messages if "case" in message}
    stopped = "" if any("done" in message for message in messages) else ended
    stopped = next((message["failed"] for message in messages if "failed" in message), stopped)
    rows = {}
    for case in cases:
        result = results.get(case.name)
        message = result["message"] if result else stopped or "the case did not run"
        rows[case.name] = _row(case, bool(result and result["passed"]), message)
    return rows


def leaderboard(assignment: Assignment, submission: FilePath, report: Report) -> list[Any]:
    """The assignment's training with this submission's functions, for a leaderboard.

    Returns [(name, value, "asc" or "desc")]; nothing where the report lacks a point, where the assignment has
    no training.py, or where the training fails.
    """
    if report.points < report.max_points or not (assignment.folder / "training.py").is_file():
        return []
    messages, _ = _ask_child(assignment, None, _handed_in(assignment, submission), [], TRAINING_SECONDS)
    return next((message["board"] for message in messages if "board" in message), [])


def _ask_child(assignment, number, source, names, seconds):
    """(the messages of a child process, how it ended)."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tinytoken-grade-") as folder:
        limits = {"seconds": math.ceil(seconds), "bytes": 4 * GIB, "file_bytes": 2**20, "processes": 64}
        job = {"assignment": str(assignment.folder.resolve()), "exercise": number, "source": source,
               "word": word, "cases": names, "limits": limits}
        lines, ended = _run_child(job, folder, seconds)
    return [json.loads(line.removeprefix(word)) for line in lines if line.startswith(word + " ")], ended


def _run_child(job, folder, seconds):
    """(the lines that the child wrote, how it ended). Its whole group of processes is ended with it."""
    root = str(pathlib.Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG", "LD_LIBRARY_PATH")
                   if name in os.environ}
    environment |= {"HOME": folder, "TMPDIR": folder, "TEMP": folder, "PYTHONHASHSEED": "0",
                    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    child = subprocess.Popen([sys.executable, "-I", "-c", START.format(root=root)], cwd=folder,
                             env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, errors="replace", start_new_session=True)
    try:
        out, _ = child.communicate(json.dumps(job), timeout=PATIENCE * seconds)
        signal_name = signal.Signals(-child.returncode).name if child.returncode < 0 else ""
        if signal_name == "SIGXCPU":
            how = f"stopped after {seconds:g} s of computing: an endless loop?"
        elif signal_name:
            how = f"the process was ended ({signal_name}): too much time or memory"
        else:
            how = (f"the process ended by itself (exit code {child.returncode}): "
                   "it may not exit, and may use 4 GiB of memory")
    except subprocess.TimeoutExpired:
        _end(child)
        out, _ = child.communicate()
        how = f"stopped after {PATIENCE * seconds:g} s: an endless loop, or sleep?"
    finally:
        _end(child)
    return out.splitlines(), how


def _end(child):
    """End the child and whatever it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError, AttributeError):  # gone already; Windows has no groups
        child.kill()


def _row(case, passed, message):
    hint = f"Hint: {case.hint}" if case.hint else ""
    output = "" if passed else "\n".join(part for part in (hint, message) if part)
    name = case.name.removeprefix("test_").replace("_", " ")
    return Row(case.number, name, case.points if passed else 0.0, case.points, case.visibility, output)


def text(report: Report, assignment: Assignment) -> str:
    """The report as a student reads it, without the hidden cases."""
    shown = [row for row in report.rows if row.visibility == "visible"]
    lines = [f"{assignment.name}: {assignment.title}"] + ([report.problem] if report.problem else [])
    for exercise in assignment.exercises:
        rows = [row for row in shown if row.number == exercise.number]
        if not rows:
            continue
        lines.append(f"\nExercise {exercise.number}, {exercise.title}: "
                     f"{sum(row.points for row in rows):g} of {sum(row.max_points for row in rows):g}")
        for row in rows:
            mark = "ok  " if row.points else "FAIL"
            lines.append(f"  {mark} {row.points:g}/{row.max_points:g}  {row.name}")
            if row.output and not report.problem:
                lines += [f"           {line}" for line in row.output.splitlines()]
    lines.append(f"\n{sum(row.points for row in shown):g} of {sum(row.max_points for row in shown):g} "
                 "points visible now")
    return "\n".join(lines)


def grade_folder(assignment: Assignment, submissions: FilePath, csv_path: FilePath,
                 jobs: int | None = None) -> dict[str, Report]:
    """Grade every folder in `submissions`, `jobs` at a time -> {name: Report}.

    Each has a line in the CSV: name, points, points of each exercise, problem.
    """
    folders = sorted(path for path in pathlib.Path(submissions).iterdir() if path.is_dir())
    expect(folders, "grade", f"no folders in {submissions}: expected one for each submission")
    reports = {}
    with concurrent.futures.ThreadPoolExecutor(jobs or cpu_count()) as pool:
        waiting = {pool.submit(grade_submission, assignment, path, jobs=1): path.name for path in folders}
        for done in tqdm.tqdm(concurrent.futures.as_completed(waiting), total=len(waiting),
                              desc="submissions"):
            reports[waiting[done]] = done.result()
    with open(csv_path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "points", "of", *(exercise.number for exercise in assignment.exercises),
                         "problem"])
        for folder in folders:
            report = reports[folder.name]
            each = [sum(row.points for row in report.rows if row.number == e.number)
                    for e in assignment.exercises]
            writer.writerow([folder.name, f"{report.points:g}", f"{report.max_points:g}",
                             *(f"{p:g}" for p in each), report.problem])
    return dict(sorted(reports.items()))
