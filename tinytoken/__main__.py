"""tinytoken compare | predict | explore | doctor | bench | site | stub | grade | nbgrader | autograder-zip

or python -m tinytoken ...
"""
import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, backend, models, predict, program
from .data import dataset
from .errors import InputError, expect
from .program import path

MOST = 65_536  # of a size on the command line


def main(argv: Sequence[str] | None = None) -> int:
    """The command line -> exit code: 0, or as program.ended says."""
    try:
        program.prepare_streams()
        try:
            return run(parser().parse_args(argv))
        finally:
            sys.stdout.flush()  # here and not at exit, where nothing could be said about it
    except (InputError, OSError) as error:
        return program.ended(error)


def run(args: argparse.Namespace) -> int:
    """Run the command that was chosen -> exit code, with one line on stderr if it is not 0."""
    try:
        return args.run(args) or 0
    except program.ENDS as error:
        return program.ended(error)


def size(text: str) -> int:
    """A size on the command line: small enough for arrays that have several of them as axes."""
    if int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{text}, expected at most {MOST:,}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; args.run(args) runs the one that was chosen."""
    top = argparse.ArgumentParser(prog="tinytoken", description="LookupViT and DynamicViT from scratch.")
    top.add_argument("--version", action="version", version=f"tinytoken {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    job = commands.add_parser(
        "compare", help="train a ViT, a DynamicViT and a LookupViT side by side; a table and a picture")
    job.add_argument("--data", default="scenes",
                     help=f"{dataset.choices()} (default: scenes)")
    job.add_argument("--steps", type=int, help="training steps of each model")
    job.add_argument("--seed", type=int, default=0)
    job.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    job.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"),
                     help="of a GPU's products in training (default: fp32)")
    job.add_argument("--threads", type=int, help="CPU threads (default: all)")
    job.add_argument("--out", type=path,
                     help="folder for what is written (default: runs/compare-DATA-SEED)")
    job.set_defaults(run=run_compare)

    guess = commands.add_parser(
        "predict", help="classes of a picture by a checkpoint, and the tokens it used",
        description=predict.EXPECTED, formatter_class=argparse.RawDescriptionHelpFormatter)
    guess.add_argument("checkpoint", type=path)
    guess.add_argument("picture", type=path)
    guess.add_argument("--out", type=path,
                       help="where to write the picture with its tokens: .png, .jpg, .pdf or .svg "
                            "(default: PICTURE.tokens.png, of a sample in the current folder)")
    guess.set_defaults(run=run_predict)

    clock = commands.add_parser(
        "bench", help="how fast this machine trains and runs a model; where the time of a step goes")
    clock.add_argument("--model", default="vit", choices=models.names())
    for name, value in dict(image_size=32, patch_size=4, dim=96, depth=6, heads=3, batch=64).items():
        clock.add_argument("--" + name.replace("_", "-"), type=size, default=value, help=f"default: {value}")
    clock.add_argument("--micro", type=size, help="images of a slice (default: what fit would take)")
    clock.add_argument("--threads", type=int, help="CPU threads (default: all)")
    clock.add_argument("--profile", action="store_true", help="a training step on one thread, op by op")
    clock.set_defaults(run=run_bench)

    doctor = commands.add_parser(
        "doctor", help="what this machine has for tinytoken, and what would fix what is missing")
    doctor.set_defaults(run=run_doctor)

    pages(commands)
    course(commands)
    return top


def pages(commands: Any) -> None:
    """The commands that make pages for a browser."""
    explorer = commands.add_parser(
        "explore", help="a page on which a picture goes through three small models, live")
    explorer.add_argument("--port", type=int, default=0, help="of this machine (default: one that is free)")
    explorer.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")
    explorer.add_argument("--static", type=path, metavar="OUT",
                          help="write the page into a folder for a web server instead: there Python runs in "
                               "the visitor's browser")
    explorer.add_argument("--pyodide", type=path, metavar="FOLDER",
                          help="with --static: a folder with Pyodide and its NumPy, to copy (default: the "
                               "page loads them from Pyodide's own distribution)")
    explorer.set_defaults(run=run_explore)

    made = commands.add_parser(
        "site", help="the lessons, the results and the API as static pages (in a checkout; the extra `site`)")
    made.add_argument("--out", type=path, required=True, help="a new folder, or an earlier site")
    made.add_argument("--address",
                      help="https://github.com/OWNER/NAME, whose branch gh-pages has the site: for links to "
                           "files without a page, and to each notebook in Colab")
    made.add_argument("--pyodide", type=path, metavar="FOLDER",
                      help="a folder with Pyodide and its NumPy, to copy for the explorer's page (default: "
                           "the page loads them from Pyodide's own distribution)")
    made.set_defaults(run=run_site)


def course(commands: Any) -> None:
    """The commands of the course. Assignments are looked for in lessons/assignments, or in --assignment."""
    copy = commands.add_parser(
        "stub", help="a student's copy of an assignment: without solutions and hidden tests")
    copy.add_argument("--out", type=path, required=True, help="a new folder")
    copy.add_argument("--notebook", action="store_true", help="a notebook as well; either can be handed in")
    copy.set_defaults(run=run_stub)

    points = commands.add_parser("grade", help="points for a submission, case by case")
    which = points.add_mutually_exclusive_group(required=True)
    which.add_argument("--submission", type=path, help="the folder that holds the file, or the file")
    which.add_argument("--submissions", type=path, help="a folder of such folders; needs --csv")
    points.add_argument("--csv", type=path, help="with --submissions: a line for each")
    points.add_argument("--json", type=path, help="write the report as JSON")
    points.add_argument("--gradescope", type=path, help="write Gradescope's results.json")
    points.add_argument("--sandbox", action=argparse.BooleanOptionalAction, default=None,
                        help="run what was handed in inside bubblewrap, where it can read Python alone "
                             "(default: where bubblewrap works). Without it a submission's process may read "
                             "and change what you may, should it get past the rules")
    points.add_argument("--leaderboard", action="store_true",
                        help="with --gradescope: train with a submission that has all points "
                             "(a3, a4: about a minute) and post accuracy and multiply-adds")
    points.set_defaults(run=run_grade)

    marked = commands.add_parser("nbgrader", help="the instructor's notebook for nbgrader, with solutions")
    marked.add_argument("--out", type=path, required=True,
                        help="a new folder: source/NAME in nbgrader's course")
    marked.set_defaults(run=run_nbgrader)

    archive = commands.add_parser("autograder-zip", help="the zip that Gradescope runs")
    archive.add_argument("--out", type=path, help="default: NAME_autograder.zip")
    archive.set_defaults(run=run_zip)
    for command in (copy, points, marked, archive):
        command.add_argument("name", help="a1, a2, a3 or a4")
        command.add_argument("--assignment", type=path,
                             help="the folder of the assignment, or of several")
    for command in (points, archive):
        command.add_argument("--hidden", action="store_true",
                             help="say hidden cases at Gradescope too: it then hides the total")


def run_compare(args: argparse.Namespace) -> None:
    from .experiments import Recipe, compare, tables
    changes = {name: getattr(args, name) for name in ("data", "steps", "seed", "precision")
               if getattr(args, name) is not None}
    name = pathlib.Path(args.data).name or pathlib.Path(args.data).resolve().name  # "." has none
    out = args.out or pathlib.Path("runs") / f"compare-{name}-{args.seed}"
    device = backend.announced_device(args.device)
    try:
        table, picture = compare.run(Recipe(**changes), out, device=device, threads=args.threads)
    except KeyboardInterrupt as stop:
        kept = ("The same command goes on from the last checkpoint." if any(out.glob("*.npz"))
                else "There is no checkpoint yet: the same command starts anew.")
        raise KeyboardInterrupt(f"{str(stop) or 'by Ctrl-C'}. {kept}") from None
    print(f"\n{tables.table_text(table)}\n{picture}\neverything is in {out}")


def run_predict(args: argparse.Namespace) -> None:
    print(predict.classify(args.checkpoint, args.picture, args.out or predict.default_out(args.picture)))


def run_explore(args: argparse.Namespace) -> None:
    expect(args.static or not args.pyodide, "explore", "--pyodide is for --static")
    if args.static:
        from .explorer import static
        print("\n".join(static.write(args.static, args.pyodide)))
    else:
        from .explorer import server
        server.serve(args.port, not args.no_browser)


def run_bench(args: argparse.Namespace) -> None:
    from . import bench
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "profile", "run")}
    job = bench.Job(args.model, **settings)
    print(bench.profile_text(bench.profile(job)) if args.profile
          else bench.speeds_text(job, bench.speeds(job)))


def run_doctor(args: argparse.Namespace) -> None:
    from .doctor import report
    print(report())


def run_site(args: argparse.Namespace) -> None:
    from . import site
    print(site.build(args.out, args.address, args.pyodide))


def find_assignment(args: argparse.Namespace) -> Any:
    from .course import assignment
    return assignment.find(args.name, [args.assignment] if args.assignment else None)


def run_stub(args: argparse.Namespace) -> None:
    from .course import release
    print("\n".join(map(str, release.write_copy(find_assignment(args), args.out, args.notebook))))


def check_grade(args: argparse.Namespace) -> None:
    """InputError for an option that would have no effect beside the others."""
    idle, of = ((("json", "gradescope", "leaderboard", "hidden"), "one --submission") if args.submissions
                else (("csv",), "--submissions"))
    for name in idle:
        expect(not getattr(args, name), "grade", f"--{name} is for {of}")
    for name in ("leaderboard", "hidden"):
        expect(args.gradescope or not getattr(args, name), "grade",
               f"--{name} without --gradescope: give the file for the results")
    expect(args.csv or not args.submissions, "grade",
           "--submissions without --csv: give the file for the points")


def run_grade(args: argparse.Namespace) -> None:
    from .course import grade, gradescope, sandbox
    from .files import check_target, write_json
    check_grade(args)
    assignment = find_assignment(args)
    for path, ending in ((args.csv, ".csv"), (args.json, ".json"), (args.gradescope, ".json")):
        if path:
            check_target(path, ending)
    if args.submissions:
        reports = grade.grade_folder(assignment, args.submissions, args.csv, sandboxed=args.sandbox)
        if args.sandbox is None and (why_not := sandbox.missing()):
            print(f"graded without a sandbox: {why_not}", file=sys.stderr)
        print(f"{len(reports)} submissions graded: {args.csv}")
        return
    report = grade.grade_submission(assignment, args.submission, bar=sys.stderr.isatty(),
                                    sandboxed=args.sandbox)
    if args.json:
        write_json(args.json, report.as_json())
    if args.gradescope:
        board = (grade.leaderboard(assignment, args.submission, report, args.sandbox)
                 if args.leaderboard else ())
        gradescope.write_results(report, args.gradescope, hidden=args.hidden, leaderboard=board)
    print(grade.text(report, assignment))


def run_nbgrader(args: argparse.Namespace) -> None:
    from .course import nbgrader
    print("\n".join(map(str, nbgrader.write_source(find_assignment(args), args.out))))


def run_zip(args: argparse.Namespace) -> None:
    from .course import gradescope
    from .files import check_target
    assignment = find_assignment(args)
    out = args.out or pathlib.Path(f"{assignment.name}_autograder.zip")
    check_target(out, ".zip")
    print(gradescope.autograder_zip(assignment, out, args.hidden))


if __name__ == "__main__":
    sys.exit(main())
