"""What a course goes through, for each assignment: the student's copy is made, the solutions are pasted into
it, and both the copy's own tests and the instructor's grade it.

    python lessons/assignments/try_all.py [a1 a2 a3 a4] [--out FOLDER]

Exit code 1 if anything loses a point, or if the untouched copy gets one.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from tinytoken.course import assignment, release


def pasted(copy, source):
    """The student's copy with each solution of `source` in the place of its NotImplementedError."""
    lines = source.splitlines()
    solutions = iter(["\n".join(lines[first + 1:last]) for first, last in release.regions(source)])
    made = re.sub(r"^ *raise NotImplementedError\(['\"]Exercise .*$", lambda _: next(solutions), copy,
                  flags=re.MULTILINE)
    if next(solutions, None) is not None:
        raise SystemExit("more solutions than places for them")
    return made


def command(*words):
    subprocess.run([sys.executable, "-m", "tinytoken", *map(str, words)], check=True,
                   stdout=subprocess.DEVNULL)


def graded(name, folder, *options):
    """(points, of) by the command line."""
    report = folder.parent / f"{folder.name}.json"
    command("grade", name, "--submission", folder, "--json", report, *options)
    said = json.loads(report.read_text(encoding="utf-8"))
    return said["points"], said["max_points"]


def go_through(name, out):
    """Whether all points are as they should be."""
    folder, given = out / name, assignment.find(name)
    command("stub", name, "--out", folder)
    script = folder / given.script
    untouched = graded(name, folder)
    solved = (given.folder / given.script).read_text(encoding="utf-8")
    script.write_text(pasted(script.read_text(encoding="utf-8"), solved), encoding="utf-8")
    at_home, at_school = graded(name, folder, "--assignment", folder), graded(name, folder)
    print(f"{name}: the untouched copy {untouched[0]:g} of {untouched[1]:g}; solved, at home {at_home[0]:g} "
          f"of {at_home[1]:g} "
          f"visible, by the instructor {at_school[0]:g} of {at_school[1]:g}")
    return untouched[0] == 0 and at_home[0] == at_home[1] and at_school[0] == at_school[1] == 25


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=["a1", "a2", "a3", "a4"])
    parser.add_argument("--out", type=pathlib.Path, help="a new folder for the copies (default: a temporary "
                                                         "one)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if all([go_through(name, args.out or pathlib.Path(folder)) for name in args.names]) else 1


if __name__ == "__main__":
    sys.exit(main())
