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

import tqdm

from ..backend import cpu_count
from ..errors import expect
from . import rules

GIB = 2**30
# seconds on the clock for each second of computing that an exercise has: the machine may be busy
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
    rows: list
    problem: str = ""
    seconds: float = 0.0

    @property
    def points(self):
        return sum(row.points for row in self.rows)

    @property
    def max_points(self):
        return sum(row.max_points for row in self.rows)

    def as_json(self):
        """Without times: the same submission gives the same text."""
        return {"assignment": self.assignment, "points": self.points, "max_points": self.max_points,
                "problem": self.problem,
                "rows": [dataclasses.asdict(row) for row in self.rows]}


def grade_submission(assignment, submission, bar=False, jobs=None):
    """Grade the file of `assignment` in the folder `submission` (or that file itself) -> Report, also where
    the folder lacks it. Nothing else there is read, and nothing there is written. jobs: exercises at a time
    (default: the CPUs of this process)."""
    began, cases, source = time.perf_counter(), assignment.cases(), _handed_in(assignment, submission)
    if source is None:
        refused, problem = {}, f"no {assignment.script} was handed in"
    else:
        refused = {number: "was not run: " + "; ".join(lines[:5]) for number,
                   lines in rules.breaches(source, assignment).items()}
        problem = f"{assignment.script} {refused[None]}" if None in refused else ""
    if problem:
        return Report(assignment.name, [_row(case, False, problem) for case in cases], problem,
                      time.perf_counter() - began)

    def rows_of(exercise):
        its = [case for case in cases if case.number == exercise.number]
        if exercise.number in refused:
            return {case.name: _row(case, False, refused[exercise.number]) for case in its}
        return run_exercise(assignment, exercise, source, its)
    found = {}
    with concurrent.futures.ThreadPoolExecutor(jobs or cpu_count()) as pool:
        for rows in tqdm.tqdm(pool.map(rows_of, assignment.exercises), total=len(assignment.exercises),
                              desc="exercises",
                              disable=not bar, leave=False):
            found |= rows
    return Report(assignment.name, [found[case.name] for case in cases], "", time.perf_counter() - began)


def _handed_in(assignment, submission):
    """The text of the assignment's file in the folder `submission`, or of that file itself; None where the
    folder lacks it."""
    path = pathlib.Path(submission)
    expect(path.exists(), "grade", f"no {path}: expected the folder that holds {assignment.script}")
    path = path / assignment.script if path.is_dir() else path
    return path.read_text(errors="replace") if path.is_file() else None


def run_exercise(assignment, exercise, source, cases):
    """{case name: Row} of one exercise, run in a child process."""
    said, ended = _ask_child(assignment, exercise.number, source, [case.name for case in cases],
                             assignment.seconds)
    results = {row["case"]: row for row in said if "case" in row}
    stopped = next((row["failed"] for row in said if "failed" in row), ""
                   if any("done" in row for row in said) else ended)
    rows = {}
    for case in cases:
        result = results.get(case.name)
        message = result["message"] if result else stopped or "the case did not run"
        rows[case.name] = _row(case, bool(result and result["passed"]), message)
    return rows


def leaderboard(assignment, submission, report):
    """What the assignment's training shows on a leaderboard with this submission's functions: [(name, value,
    "asc" or "desc")]. Nothing where the report lacks a point, where the assignment has no training.py, or
    where the training fails."""
    if report.points < report.max_points or not (assignment.folder / "training.py").is_file():
        return []
    said, _ = _ask_child(assignment, None, _handed_in(assignment, submission), [], TRAINING_SECONDS)
    return next((row["board"] for row in said if "board" in row), [])


def _ask_child(assignment, number, source, names, seconds):
    """(what a child process reported, how it ended)."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="tinytoken-grade-") as folder:
        limits = {"seconds": math.ceil(seconds), "bytes": 4 * GIB, "file_bytes": 2**20, "processes": 64}
        job = {"assignment": str(assignment.folder.resolve()), "exercise": number, "source": source,
               "word": word, "cases": names,
               "limits": limits}
        lines, ended = _run_child(job, folder, seconds)
    return [json.loads(line.removeprefix(word)) for line in lines if line.startswith(word + " ")], ended


def _run_child(job, folder, seconds):
    """(lines that it wrote, how it ended). Its whole group of processes is ended with it."""
    root = str(pathlib.Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG", "LD_LIBRARY_PATH")
                   if name in os.environ}
    environment |= {"HOME": folder, "TMPDIR": folder, "TEMP": folder, "PYTHONHASHSEED": "0",
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    child = subprocess.Popen([sys.executable, "-I", "-c", START.format(root=root)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, cwd=folder, env=environment, text=True,
                             errors="replace",
                             start_new_session=True)
    try:
        out, _ = child.communicate(json.dumps(job), timeout=PATIENCE * seconds)
        how = f"the process ended by itself (exit code {child.returncode}): it may not exit, and may use 4 GiB of memory"
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            how = f"stopped after {seconds:g} s of computing: an endless loop?" if name == "SIGXCPU" else \
                f"the process was ended ({name}): too much time or memory"
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
    output = "" if passed else "\n".join(part for part in (case.hint and f"Hint: {case.hint}", message)
                                         if part)
    return Row(case.number, case.name.removeprefix("test_").replace("_", " "), case.points if passed
               else 0.0, case.points,
               case.visibility, output)


def text(report, assignment):
    """The report as a student reads it: hidden cases are not in it."""
    shown = [row for row in report.rows if row.visibility == "visible"]
    lines = [f"{assignment.name}: {assignment.title}"] + ([report.problem] if report.problem else [])
    for exercise in assignment.exercises:
        rows = [row for row in shown if row.number == exercise.number]
        if not rows:
            continue
        lines.append(f"\nExercise {exercise.number}, {exercise.title}: {sum(row.points for row in rows):g} "
                     f"of "
                     f"{sum(row.max_points for row in rows):g}")
        for row in rows:
            lines.append(f"  {'ok  ' if row.points else 'FAIL'} {row.points:g}/{row.max_points:g}  {row.name}")
            if row.output and not report.problem:
                lines += [f"           {line}" for line in row.output.splitlines()]
    lines.append(f"\n{sum(row.points for row in shown):g} of {sum(row.max_points for row in shown):g} points "
                 f"visible now")
    return "\n".join(lines)


def grade_folder(assignment, submissions, csv_path, jobs=None):
    """Grade every folder in `submissions`, `jobs` at a time; write a line each to the CSV: name, points,
    points of each exercise, problem -> {name: Report}."""
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
