"""Gradescope: results.json as its autograder specification has it, and the zip that it runs."""
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

from ..errors import expect
from ..files import FilePath, replacing
from .assignment import Assignment
from .grade import Report
from .release import leaks

SETUP = """#!/usr/bin/env bash
# Runs once, when Gradescope builds the image.
set -e
apt-get update && apt-get install -y python3 python3-venv
python=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    apt-get install -y python3.11 python3.11-venv
    python=python3.11
fi
$python -m venv /autograder/venv
/autograder/venv/bin/pip install -q numpy tqdm threadpoolctl pytest
"""
RUN = """#!/usr/bin/env bash
# Runs for each submission, which lies in /autograder/submission. Gradescope reads results.json.
cd /autograder/source
/autograder/venv/bin/python -m tinytoken grade {name} --assignment assignment \\
    --submission /autograder/submission \\
    --gradescope /autograder/results/results.json --leaderboard {options}
"""


def results(report: Report, hidden: bool = False, leaderboard: Sequence[Any] = ()) -> dict[str, Any]:
    """The report as the contents of Gradescope's results.json.

    hidden: include hidden cases, with their visibility. Gradescope hides the total from the student if any
    case is hidden, so by default they are left out. leaderboard: [(name, value, "asc" or "desc")]; the order
    says which end is better.
    """
    rows = [row for row in report.rows if hidden or row.visibility == "visible"]
    points = sum(row.points for row in rows)
    tests = [{"score": row.points, "max_score": row.max_points,
              "status": "passed" if row.points == row.max_points else "failed",
              "name": row.name, "number": row.number, "output": row.output, "visibility": row.visibility,
              "tags": [row.number]}
             for row in rows]
    contents = {"score": points, "execution_time": round(report.seconds, 2), "visibility": "visible",
                "output": report.problem or f"{points:g} of {sum(row.max_points for row in rows):g} points",
                "tests": tests}
    if leaderboard:
        contents["leaderboard"] = [{"name": name, "value": value, "order": order}
                                   for name, value, order in leaderboard]
    return contents


def write_results(report: Report, path: FilePath, **options: Any) -> None:
    """Write results.json, whole or not at all. options: those of `results`."""
    with replacing(pathlib.Path(path), "w") as file:
        json.dump(results(report, **options), file, indent=1)


def autograder_zip(assignment: Assignment, out: FilePath, hidden: bool = False) -> pathlib.Path:
    """Write the zip that Gradescope takes -> its path.

    It holds setup.sh, run_autograder, the package, and the assignment without its solutions and planted
    mistakes. hidden: Gradescope is told of hidden cases as well, and counts them.
    """
    out, package = pathlib.Path(out), pathlib.Path(__file__).parents[1]
    files = {"setup.sh": SETUP,
             "run_autograder": RUN.format(name=assignment.name, options="--hidden" if hidden else "")}
    for path in sorted(package.rglob("*.py")):
        files[f"tinytoken/{path.relative_to(package)}"] = path.read_text(encoding="utf-8")
    for path in [*(assignment.folder / name for name in ("assignment.toml", "references.py", "training.py")),
                 *sorted((assignment.folder / "tests").glob("*.py"))]:
        if path.exists():
            files[f"assignment/{path.relative_to(assignment.folder)}"] = path.read_text(encoding="utf-8")
    ours = {name: text for name, text in files.items() if name.startswith("assignment/")}
    problems = [line for line in leaks(assignment, ours) if "hidden test" not in line]
    expect(not problems, "autograder-zip", f"not written: {'; '.join(problems)}")
    with replacing(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))  # the same files make the same zip
            entry.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            archive.writestr(entry, text)
    return out
