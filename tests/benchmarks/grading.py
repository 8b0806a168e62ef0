"""How long a folder of submissions takes, and whether the same folder twice gives the same points.

    python tests/benchmarks/grading.py [--name a1] [--count 30] [--jobs 2] [--out FILE.json]

The submissions: the reference, the untouched copy, and planted mistakes in turn. Each folder is graded twice.
"""
import argparse
import json
import pathlib
import tempfile
import time

from tinytoken.course import assignment, grade, release
from tinytoken.experiments import machine
from tinytoken.files import check_target, write_json

AT_MOST = 300  # seconds for 30 submissions of a1 on two cores (issue 6)


def submissions(given, count, folder):
    """Write `count` submissions under `folder`."""
    mistakes = assignment.run_file(given.folder / "mistakes.py").MISTAKES
    solved = (given.folder / given.script).read_text()
    texts = [solved, release.without_solutions(given, solved),
             *(solved.replace(old, new) for _, _, old, new in mistakes)]
    for number in range(count):
        place = folder / f"student{number:02}"
        place.mkdir(parents=True)
        (place / given.script).write_text(texts[number % len(texts)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="a1")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.out:
        check_target(args.out, ".json")
    given, seconds, points = assignment.find(args.name), [], []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        submissions(given, args.count, place / "in")
        for turn in range(2):
            began = time.perf_counter()
            reports = grade.grade_folder(given, place / "in", place / f"{turn}.csv", args.jobs)
            seconds.append(round(time.perf_counter() - began, 1))
            points.append((place / f"{turn}.csv").read_text())
    got = sorted(report.points for report in reports.values())
    said = {"machine": machine("cpu", here=False), "assignment": given.name, "submissions": args.count,
            "jobs": args.jobs, "seconds": seconds,
            "at_most": AT_MOST, "same_points_twice": points[0] == points[1],
            "points": {"least": got[0], "most": got[-1]}}
    print(json.dumps(said, indent=1))
    if args.out:
        write_json(args.out, said)


if __name__ == "__main__":
    main()
