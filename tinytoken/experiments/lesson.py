"""What every lesson begins and ends with: size, options, pictures, and a JSON of what was measured."""
import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import backend, program, random
from ..data import dataset, load_pictures
from ..errors import Busy, InputError, expect, install, one_line_of_warnings
from ..files import as_json, check_target, claimed, replacing, write_json
from ..group import apart, current
from ..reading import field, read_json
from ..train import Run
from .arm import Arm, Recipe
from .stats import bounds_text
from .timing import machine
from .trial import Trial

SIZES = ("smoke", "default", "full")
# Where there are so many jobs for each rank, a rank does whole ones. What ranks add up and wait for costs 4
# to 10 % of a training (lesson 17), and much more where other programs slow one of them. Whole jobs leave a
# rank idle for half a job in the end. Times: tests/benchmarks/ranks.py --arms
JOBS_OF_A_RANK = 3
DEFAULTS = as_json(dataclasses.asdict(Recipe()))


class Lesson:
    """One run of a lesson: its size, its options (data, device, seed, out), and its results so far."""

    def __init__(self, name: str, size: str, data: str, device: str, seed: int,
                 out: str | os.PathLike) -> None:
        self.name, self.size = name, size
        self.data, self.seed = data, seed
        self.results: dict[str, Any] = {}
        self.claims: list[dict[str, Any]] = []
        self.headline: str | None = None
        self.machines: list[dict[str, Any]] = []  # that parts of the results come from
        self.device, self.out = backend.announced_device(device), pathlib.Path(out)
        self.began = time.perf_counter()
        # stem: what the names of all files begin with
        self.stem = name + "_full" * (size == "full")
        if data != "scenes":
            self.stem += f"_{pathlib.Path(data).name}"
        check_target(self.out / f"{self.stem}.json", ".json")
        random.manual_seed(seed)

    def pick(self, smoke: Any, default: Any, full: Any) -> Any:
        """The one of the three that belongs to this run's size."""
        return {"smoke": smoke, "default": default, "full": full}[self.size]

    @property
    def seeds(self) -> list[int]:
        """The seeds that models are trained with: three in a full run on scenes, one in any other."""
        return [self.seed + i for i in range(3 if self.size == "full" and self.data == "scenes" else 1)]

    def pictures(self, train: int, test: int) -> tuple[Any, Any]:
        """(train, test) pictures of --data: so many scenes, or all pictures of another set."""
        return load_pictures(self.data, train=train, test=test, seed=self.seed)

    @property
    def checkpoints(self) -> pathlib.Path | None:
        """The folder for the checkpoints of a full run, None in smaller ones.

        Lessons with the same --out share it: what one has trained, another does not train again."""
        return self.out / "checkpoints" / pathlib.Path(self.data).name if self.size == "full" else None

    def trial(self, recipe: Recipe, seed: int, arms: Mapping[str, Arm] | None = None,
              **changes: Any) -> Trial:
        """A Trial of the recipe's arms with this seed, on this run's device and with its checkpoints.
        changes: as Trial takes them."""
        run, folder = None, self.checkpoints
        if folder is not None:
            # wherever it is, weights stay out of version control
            with replacing(folder / ".gitignore", "w") as file:
                file.write("*\n")
            run = Run(folder / f"seed{seed}", every=100)
        recipe = dataclasses.replace(recipe, seed=seed)
        return Trial(recipe, arms, device=self.device, run=run, bar=self.size != "smoke", **changes)

    def each(self, jobs: Mapping[str, Callable[[], Any]], recipe: Any) -> dict[str, Any]:
        """Do the `jobs`, {name: function without arguments -> a JSON value} -> {name: its value}.

        A full run writes each value to OUT/STEM_parts/NAME.json, and one with the same --out does not compute
        it again. So it goes on where it was stopped, also on another machine; and the same command in several
        terminals (each on a CPU of its own: taskset) shares the jobs. So do the ranks of a group where there
        are enough jobs (JOBS_OF_A_RANK) and all see the same OUT; else all ranks do each job together.
        recipe: JSON that a part must agree with; InputError says which does not."""
        recipe, ranks = as_json(recipe), current().size
        enough = self.size == "full" and len(jobs) >= JOBS_OF_A_RANK * ranks
        if enough and ranks > 1 and self._one_folder():
            print(f"{len(jobs)} jobs, each of one of {ranks} ranks")
            with apart("the end of the jobs"):
                self._values(jobs, recipe)
        return self._values(jobs, recipe)

    def _one_folder(self):
        """Whether all ranks see the same files: they may be on several machines."""
        path = self.out / f"{self.stem}_parts" / "all"
        with current().leading("a file for all", claimed(path, wait=True)):
            return all(current().exchange("a file for all", path.with_name("all.lock").exists()))

    def _values(self, jobs, recipe):
        values: dict[str, Any] = {}
        busy: set[str] = set()
        while missing := [name for name in jobs if name not in values]:
            for name in missing:
                try:
                    values[name] = self._part(name, jobs[name], recipe)
                except Busy as error:
                    if name not in busy:
                        print(f"left for later: {error}")
                    busy.add(name)
            if not values.keys() & set(missing):
                time.sleep(1)  # others have all that is left
        return {name: values[name] for name in jobs}

    def _part(self, name, job, recipe):
        if self.size != "full":
            return as_json(job())
        path = self.out / f"{self.stem}_parts" / f"{name.replace(' ', '-')}.json"
        began = time.perf_counter()
        ranks = current()
        with contextlib.ExitStack() as claims:
            def there():
                if not path.exists():
                    claims.enter_context(claimed(path))
                return path.exists()  # or has another process written it meanwhile?
            if not ranks.agreed(f"is {name} there?", there):
                write_json(path, {"value": job(), "recipe": recipe, "machine": machine(self.device),
                                  "seconds": round(time.perf_counter() - began, 1)})
        part = ranks.agreed(f"part {name}", lambda: read_json(path, "lesson"))
        expect("value" in part, "lesson", f"{path} has no value: delete it")
        for key in ("recipe", "machine"):
            field("lesson", path, part, key, lambda value: isinstance(value, dict), "an object: delete it")
        # an option of the recipe that an older part does not name had the value that is the default now
        there = {name: value for name, value in DEFAULTS.items() if name in recipe} | part["recipe"]
        other = [f"{name} {there.get(name)!r} there, {recipe.get(name)!r} now"
                 for name in there | recipe if there.get(name) != recipe.get(name)]
        expect(not other, "lesson",
               f"{path} belongs to another run ({', '.join(other)}): choose another --out, or delete it")
        if part["machine"] not in self.machines:
            self.machines.append(part["machine"])
        return part["value"]

    def claim(self, text: str, measured: float, low: float | None = None, high: float | None = None) -> None:
        """Print, and note for the JSON, whether a figure is above `low` and at most `high`: bounds that were
        set before the run."""
        holds = (low is None or measured > low) and (high is None or measured <= high)
        self.claims.append({"claim": text, "measured": measured, "bound": [low, high], "holds": holds})
        print(f"{'holds' if holds else 'FAILS'}  {text}: {measured:.2f} ({bounds_text(low, high)})")

    def says(self, headline: str) -> None:
        """Print, and note for the JSON, what this run has measured: a sentence or two, for RESULTS.md."""
        self.headline = headline
        print(headline)

    def measured(self, **values: Any) -> None:
        """Note results for the JSON: figures, texts, lists and dictionaries of them."""
        expect(not values.keys() & self.results.keys(), "lesson",
               f"noted twice: {sorted(values.keys() & self.results.keys())}")
        self.results |= values

    def picture(self, what: str, draw: Callable[[Any], Any], width: float = 9, height: float = 4) -> None:
        """Make a figure (inches), let draw(figure) fill it, write it as OUT/STEM_what.png, and show it in a
        notebook. Without matplotlib, a line says how to get it."""
        try:
            from matplotlib.figure import Figure  # not pyplot: no window system, no global state
        except ImportError:
            print(f"no picture {what!r}: matplotlib is not installed ({install('matplotlib')})")
            return
        path = self.out / f"{self.stem}_{what}.png"
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        with claimed(path, wait=True), one_line_of_warnings(path, "matplotlib"), replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)
        print(f"picture: {path}")
        if "ipykernel" in sys.modules:
            from IPython.display import Image, display
            display(Image(path))

    def end(self) -> pathlib.Path:
        """Write OUT/STEM.json -> its path. STEM: the lesson's name; _full in a full run; the data where they
        are not scenes."""
        path = self.out / f"{self.stem}.json"
        if self.claims:
            self.measured(claims=self.claims)
        saved = {"lesson": self.name, "size": self.size, "seed": self.seed, "data": self.data,
                 **({"headline": self.headline} if self.headline else {}),
                 "machine": machine(self.device), "seconds": round(time.perf_counter() - self.began, 1),
                 **({"machines_of_parts": self.machines} if self.machines else {}),
                 "results": self.results}
        with claimed(path, wait=True):
            write_json(path, saved)
        # flushed: what fails at exit would be said in a traceback
        print(f"measured: {path} ({time.perf_counter() - self.began:.0f} s)", flush=True)
        return path


def begin(name: str, argv: Sequence[str] | None = None, data: str = "scenes") -> Lesson:
    """The lesson `name` with the options of the command line; in a notebook, with the defaults.

    data: the default of --data. Options that cannot be used end the program with one line and exit code 2,
    and so does later what cannot be read or written, or a folder in which another process is at work."""
    try:
        program.prepare_streams()
    except InputError as error:
        sys.exit(program.ended(error))
    program.end_in_one_line(name)
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=f"Lesson {name}.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", dest="size", action="store_const", const="smoke",
                      help="seconds: does it run?")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more seeds and steps")
    parser.add_argument("--data", default=data,
                        help=f"{dataset.choices()} (default: {data})")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=program.path, default=f"runs/{name}",
                        help="folder for pictures and results (default: runs/NAME)")
    notebook = argv is None and "ipykernel" in sys.modules  # there the command line is the kernel's
    options = vars(parser.parse_args([] if notebook else argv))
    try:
        return Lesson(name, **options | {"size": options["size"] or "default"})
    except InputError as error:
        sys.exit(program.ended(error))
