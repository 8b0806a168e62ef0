"""What every lesson begins and ends with: three sizes, the same options, pictures, and a JSON of what was
measured."""
import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time

from .. import backend, random
from ..data import dataset, load_pictures
from ..errors import Busy, InputError, expect
from ..files import as_json, check_writable, claimed, replacing, write_json
from ..train import Run
from .timing import machine
from .trial import Trial

SIZES = ("smoke", "default", "full")


class Lesson:
    """One run of a lesson: its size, its options (data, device, seed, out), and the results it has noted so
    far."""

    def __init__(self, name, size, data, device, seed, out):
        self.name, self.size, self.data, self.seed = name, size, data, seed
        self.results, self.claims, self.headline = {}, [], None
        self.machines = []  # that parts of the results come from
        self.device, self.out, self.began = backend.announced_device(device), pathlib.Path(out), time.perf_counter()
        # of files
        self.stem = "_".join([name] + ["full"] * (size == "full") + [pathlib.Path(data).name]
                             * (data != "scenes"))
        check_writable(self.out)
        random.manual_seed(seed)

    def pick(self, smoke, default, full):
        """The one of the three that belongs to this run's size."""
        return {"smoke": smoke, "default": default, "full": full}[self.size]

    @property
    def seeds(self):
        """The seeds that models are trained with: three in a full run on scenes, one in any other."""
        return [self.seed + i for i in range(3 if self.size == "full" and self.data == "scenes" else 1)]

    def pictures(self, train, test):
        """(train, test) pictures of --data: so many scenes, or all of CIFAR."""
        return load_pictures(self.data, train=train, test=test, seed=self.seed)

    @property
    def checkpoints(self):
        """The folder for the checkpoints of a full run, None in smaller ones. Lessons with the same --out
        share it: what one has trained, another does not train again."""
        return self.out / "checkpoints" / pathlib.Path(self.data).name if self.size == "full" else None

    def trial(self, recipe, seed, arms=None, **changes):
        """A Trial of the recipe's arms with this seed, on this run's device and with its checkpoints.
        changes: as Trial takes them."""
        run, folder = None, self.checkpoints
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")  # wherever it is, weights stay out of version control
            run = Run(folder / f"seed{seed}", every=100)
        recipe = dataclasses.replace(recipe, seed=seed)
        return Trial(recipe, arms, device=self.device, run=run, bar=self.size != "smoke", **changes)

    def each(self, jobs, recipe):
        """Do the `jobs`, {name: function without arguments -> a JSON value} -> {name: its value}. A full run
        writes each value to OUT/STEM_parts/NAME.json, and one with the same --out does not compute it again:
        so it goes on where it was stopped, on another machine too, and the same command in several terminals
        (on a CPU each: taskset) shares the jobs. recipe: JSON that a part must agree with; InputError says
        which does not."""
        values, busy, recipe = {}, set(), as_json(recipe)
        while missing := [name for name in jobs if name not in values]:
            for name in missing:
                try:
                    values[name] = self._part(name, jobs[name], recipe)
                except Busy as error:
                    if name not in busy:
                        print(f"left for later: {error}")
                    busy.add(name)
            if not values.keys() & set(missing):
                time.sleep(5)  # others have all that is left
        return {name: values[name] for name in jobs}

    def _part(self, name, job, recipe):
        if self.size != "full":
            return as_json(job())
        path, began = self.out / f"{self.stem}_parts" / f"{name.replace(' ', '-')}.json", time.perf_counter()
        with claimed(path) if not path.exists() else contextlib.nullcontext():
            if not path.exists():  # still
                write_json(path, {"value": job(), "recipe": recipe, "machine": machine(self.device),
                                  "seconds": round(time.perf_counter() - began, 1)})
        part = json.loads(path.read_text())
        expect(part["recipe"] == recipe, "lesson",
               lambda: f"{path} belongs to another run: its recipe is {part['recipe']}, this one's {recipe}")
        if part["machine"] not in self.machines:
            self.machines.append(part["machine"])
        return part["value"]

    def claim(self, text, measured, low=None, high=None):
        """Print, and note for the JSON, whether a figure is above `low` and at most `high`, bounds that were
        set before the run."""
        holds = (low is None or measured > low) and (high is None or measured <= high)
        self.claims.append({"claim": text, "measured": measured, "bound": [low, high], "holds": holds})
        bounds = (f"above {low:g}" if low is not None else "", f"at most {high:g}" if high is not None
                  else "")
        print(f"{'holds' if holds else 'FAILS'}  {text}: {measured:.2f} ({', '.join(filter(None, bounds))})")

    def says(self, headline):
        """Note, and print, what this run has measured in a sentence or two: RESULTS.md quotes it."""
        self.headline = headline
        print(headline)

    def measured(self, **values):
        """Note results for the JSON: numbers, texts, lists and dictionaries of them."""
        expect(not values.keys() & self.results.keys(), "lesson",
               f"noted twice: {sorted(values.keys() & self.results.keys())}")
        self.results |= values

    def picture(self, what, draw, width=9, height=4):
        """Make a figure (inches), let draw(figure) fill it, write it as OUT/STEM_what.png, and show it in a
        notebook. Without matplotlib it says how to get it."""
        try:
            from matplotlib.figure import Figure  # not pyplot: no window system, no global state
        except ImportError:
            print(f"no picture {what!r}: matplotlib is not installed (pip install 'tinytoken-vit[plot]')")
            return
        figure, path = Figure(figsize=(width, height),
                              layout="constrained"), self.out / f"{self.stem}_{what}.png"
        draw(figure)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)
        print(f"picture: {path}")
        if "ipykernel" in sys.modules:
            from IPython.display import Image, display
            display(Image(path))

    def end(self):
        """Write OUT/STEM.json -> its path. STEM: the lesson's name, and _full, and the data where they are
        not scenes."""
        path = self.out / f"{self.stem}.json"
        if self.claims:
            self.measured(claims=self.claims)
        write_json(path, {"lesson": self.name, "size": self.size, "seed": self.seed, "data": self.data,
                          **({"headline": self.headline} if self.headline else {}),
                          "machine": machine(self.device),
                          "seconds": round(time.perf_counter() - self.began, 1),
                          **({"machines_of_parts": self.machines} if self.machines else {}),
                          "results": self.results})
        print(f"measured: {path} ({time.perf_counter() - self.began:.0f} s)")
        return path


def begin(name, argv=None, data="scenes"):
    """The lesson `name` with the options of the command line, or the defaults in a notebook -> Lesson. Leaves
    the program with exit code 2 and one line for options that cannot be used. data: the default of --data."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=f"Lesson {name}.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", dest="size", action="store_const", const="smoke",
                      help="seconds: does it run?")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more seeds and steps")
    parser.add_argument("--data", default=data,
                        help=f"{', '.join(dataset)}, or a folder of one of these kinds (default: {data})")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=f"runs/{name}",
                        help="folder for pictures and results (default: runs/NAME)")
    notebook = argv is None and "ipykernel" in sys.modules  # there the command line is the kernel's
    options = vars(parser.parse_args([] if notebook else argv))
    try:
        return Lesson(name, **options | {"size": options["size"] or "default"})
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
