"""The grader: a judge in a process of its own for each exercise, a row for each case, one report."""
import concurrent.futures
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from ..backend import cpu_count
from ..errors import expect, printable
from ..files import FilePath, check_target, replacing
from . import sandbox, sources
from .assignment import Assignment, Case, Exercise
from .judge import PATIENCE
from .processes import end_tree

GIB = 2**30
GRACE = 30  # seconds in which a judge starts and ends, beside those of the submission
TRAINING_SECONDS = 300
START = ("import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {root!r}); "
         "from tinytoken.course.judge import main; main()")


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
    """A submission's rows, in the order of the exercises. problem: why the file was not run at all, or "".
    file: the name of the file that was graded."""
    assignment: str
    rows: list[Row]
    problem: str = ""
    seconds: float = 0.0
    file: str = ""

    @property
    def points(self) -> float:
        return sum(row.points for row in self.rows)

    @property
    def max_points(self) -> float:
        return sum(row.max_points for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Without times, so that the same submission gives the same text."""
        return {"assignment": self.assignment, "file": self.file, "points": self.points,
                "max_points": self.max_points, "problem": self.problem,
                "rows": [dataclasses.asdict(row) for row in self.rows]}


def grade_submission(assignment: Assignment, submission: FilePath, bar: bool = False,
                     jobs: int | None = None, sandboxed: bool | None = None) -> Report:
    """Grade a submission: the folder that holds the assignment's script or notebook, or that file.

    A folder without it has a Report too. Nothing else in the folder is read, and nothing is written there.
    jobs: exercises at a time (default: the CPUs of this process). sandboxed: run the submission in bubblewrap
    (default: where that works). InputError if it is asked for and does not work, and where grading cannot
    work here.
    """
    began, sandboxed = time.perf_counter(), _sandboxed(sandboxed)
    sources.check_ready()
    cases, source = assignment.cases(), sources.read(assignment, submission)
    if problem := source.refused.get(None, ""):
        return _unread(assignment, problem, time.perf_counter() - began, source.name)

    def rows_of(exercise):
        its = [case for case in cases if case.number == exercise.number]
        if exercise.number in source.refused:
            return {case.name: _row(case, False, source.refused[exercise.number]) for case in its}
        return run_exercise(assignment, exercise, source.text, its, sandboxed)
    rows: dict[str, Row] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs or cpu_count()) as pool:
        for more in tqdm.tqdm(pool.map(rows_of, assignment.exercises), total=len(assignment.exercises),
                              desc="exercises", disable=not bar, leave=False):
            rows |= more
    return Report(assignment.name, [rows[case.name] for case in cases], "", time.perf_counter() - began,
                  source.name)


def _unread(assignment, problem, seconds=0.0, file=""):
    """The report of a submission that was not run."""
    problem = printable(problem, keep="\n")
    rows = [_row(case, False, problem) for case in assignment.cases()]
    return Report(assignment.name, rows, problem, seconds, file)


def run_exercise(assignment: Assignment, exercise: Exercise, source: str, cases: Sequence[Case],
                 sandboxed: bool = False) -> dict[str, Row]:
    """{case name: Row} of one exercise, checked in a process of its own."""
    # visible cases come first: what a hidden one asks is not known yet when their messages are written
    names = [case.name for case in sorted(cases, key=lambda case: case.visibility != "visible")]
    messages = _ask_judge(assignment, exercise.number, source, names, assignment.seconds, sandboxed)
    results = {message["case"]: message for message in messages if "case" in message}
    failed = next((message["failed"] for message in messages if "failed" in message), "the case did not run")
    rows = {}
    for case in cases:
        result = results.get(case.name, {"passed": False, "message": failed})
        rows[case.name] = _row(case, result["passed"], result["message"])
    return rows


def leaderboard(assignment: Assignment, submission: FilePath, report: Report,
                sandboxed: bool | None = None) -> list[Any]:
    """The assignment's training with this submission's functions, for a leaderboard.

    Returns [(name, value, "asc" or "desc")]; nothing where the report lacks a point, where the assignment has
    no training.py, or where the training fails. sandboxed: as for `grade_submission`.
    """
    if report.points < report.max_points or not (assignment.folder / "training.py").is_file():
        return []
    source = sources.read(assignment, submission)
    messages = _ask_judge(assignment, None, source.text, [], TRAINING_SECONDS, _sandboxed(sandboxed))
    return next((message["board"] for message in messages if "board" in message), [])


def _sandboxed(wanted):
    """Whether to use the sandbox: as wanted, and by default where it works. InputError where it cannot be."""
    why_not = sandbox.missing() if wanted is not False else ""
    expect(not (wanted and why_not), "grade", f"--sandbox: {why_not}")
    return wanted is not False and not why_not


def _ask_judge(assignment, number, source, names, seconds, sandboxed):
    """The messages of a judge. It and all that it started are ended with it."""
    word = secrets.token_hex(16)
    limits = {"RLIMIT_CPU": math.ceil(seconds), "RLIMIT_AS": 4 * GIB, "RLIMIT_FSIZE": 2**20,
              "RLIMIT_NPROC": 64, "RLIMIT_CORE": 0}
    job = {"assignment": str(assignment.folder.resolve()), "exercise": number, "source": source,
           "word": word, "cases": names, "seconds": seconds, "limits": limits, "sandbox": sandboxed}
    with tempfile.TemporaryDirectory(prefix="tinytoken-grade-") as folder:
        lines = _run_judge(job, folder, PATIENCE * seconds + GRACE)
    said = [json.loads(line.removeprefix(word)) for line in lines if line.startswith(word + " ")]
    if not any("done" in message or "failed" in message for message in said):
        said.append({"failed": "the tests stopped early: too much time or memory"})
    return said


def _run_judge(job, folder, seconds):
    """The lines that the judge wrote in this time."""
    root = str(pathlib.Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG", "LD_LIBRARY_PATH")
                   if name in os.environ}
    environment |= {"HOME": folder, "TMPDIR": folder, "TEMP": folder, "PYTHONHASHSEED": "0",
                    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
                    "TINYTOKEN_COMPILED": "0"}  # nothing to compile there, and the same points everywhere
    judge = subprocess.Popen([sys.executable, "-I", "-c", START.format(root=root)], cwd=folder,
                             env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace",
                             start_new_session=True)
    try:
        out, _ = judge.communicate(json.dumps(job), timeout=seconds)
    except subprocess.TimeoutExpired:
        end_tree(judge, judge.pid)
        try:
            out, _ = judge.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # something that was not ended holds the pipe
            out = ""
    finally:
        end_tree(judge, judge.pid)
    return out.splitlines()


def _row(case, passed, message):
    hint = f"Hint: {case.hint}" if case.hint else ""
    output = "" if passed else "\n".join(part for part in (hint, printable(message, keep="\n")) if part)
    name = case.name.removeprefix("test_").replace("_", " ")
    return Row(case.number, name, case.points if passed else 0.0, case.points, case.visibility, output)


def text(report: Report, assignment: Assignment) -> str:
    """The report as a student reads it, without the hidden cases."""
    shown = [row for row in report.rows if row.visibility == "visible"]
    lines = [f"{assignment.name}: {assignment.title}", *([report.problem] if report.problem else [])]
    if report.file.endswith(".ipynb"):
        lines.append(f"graded: {report.file}")
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
                 jobs: int | None = None, sandboxed: bool | None = None) -> dict[str, Report]:
    """Grade every folder, script and notebook in `submissions`, `jobs` at a time -> {name: Report}.

    Each has a line in the CSV (UTF-8): name, points, points of each exercise, problem. InputError before any
    is graded where grading cannot work here, or the CSV cannot be written. sandboxed: as for
    `grade_submission`.
    """
    sandboxed = _sandboxed(sandboxed)
    expect(pathlib.Path(submissions).is_dir(), "grade", f"{submissions} is no folder: expected one with a "
                                                        "folder or file for each submission")
    places = sorted(path for path in pathlib.Path(submissions).resolve().iterdir()
                    if path.is_dir() or path.suffix in sources.MOST)
    expect(places, "grade", f"no folders in {submissions}: expected one for each submission")
    check_target(csv_path)
    sources.check_ready()
    assignment.cases()

    def graded(place):
        try:
            return grade_submission(assignment, place, jobs=1, sandboxed=sandboxed)
        except Exception as error:  # whatever it was: it concerns this submission, and its line says so
            return _unread(assignment, f"could not be graded: {type(error).__name__}: {error}")
    reports = {}
    with concurrent.futures.ThreadPoolExecutor(jobs or cpu_count()) as pool:
        waiting = {pool.submit(graded, path): path.name for path in places}
        for done in tqdm.tqdm(concurrent.futures.as_completed(waiting), total=len(waiting),
                              desc="submissions"):
            reports[waiting[done]] = done.result()
    reports = dict(sorted(reports.items()))
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    numbers = [exercise.number for exercise in assignment.exercises]
    writer.writerow(["name", "points", "of", *numbers, "problem"])
    for name, report in reports.items():
        each = [sum(row.points for row in report.rows if row.number == number) for number in numbers]
        shown = os.fsencode(name).decode("utf-8", errors="replace")  # a folder's name may be no text
        writer.writerow([shown, f"{report.points:g}", f"{report.max_points:g}", *(f"{p:g}" for p in each),
                         report.problem])
    with replacing(csv_path) as file:
        file.write(lines.getvalue().encode("utf-8", errors="backslashreplace"))
    return reports
