"""Two processes of one thread against one process of two threads: training steps, and what of a step goes by
in adding up gradients.

    python tests/benchmarks/ranks.py [--ranks N] [--rounds N] [--steps N] [--batch N] [--dim N] [--out FILE.json]
    python tests/benchmarks/ranks.py --overlap [--steps N] ... [--out FILE.json]
    python tests/benchmarks/ranks.py --arms [--rounds N] [--steps N] ... [--out FILE.json]

The models and the recipe are `compare`'s. A round starts each way once, for each model, in an order that turns
by one; a way is processes of its own, which take a few steps to warm up and then so many that are timed. Ratios
are taken inside a round; above 1, ranks are the faster way. "At most" is the ratio if two ranks took half the
time of one thread alone. Targets: ViT 1.0, LookupViT 1.25, and sums below 5 % of a step. TINYTOKEN_COMPILED=0
before the command: the same with plain ops.

--overlap: the most that adding up gradients during the backward pass could save: a step's gradients and a sum
of as many numbers, one after the other and both at once, the sum in a thread of its own.

--arms: so many arms of a full lesson, of the three models in turn, each trained by one rank, or one after the
other by all ranks (see Lesson.each). Ratios above 1: one rank an arm is the faster way.
"""
import argparse
import collections
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

import ranked
import tinytoken as tt
from timing import quartiles, seconds, turned
from tinytoken import group
from tinytoken.data import Batches, make_scenes
from tinytoken.experiments import Recipe, lesson
from tinytoken.experiments.compare import SHOWN, arms
from tinytoken.experiments.timing import machine
from tinytoken.files import check_target, write_json
from tinytoken.models import create
from tinytoken.tasks import task as tasks
from tinytoken.threads import share_out
from tinytoken.train import fit, loss_and_grads
from tinytoken.train.step import Work, stepper

WARM_UP = 5
ARMS = (2, 3, 4, 6)  # how many
WAYS = {"one rank an arm": 1, "all ranks": 10 ** 9}  # and from how many jobs of a rank on it gets whole ones
TARGETS = {"vit": 1.0, "lookupvit": 1.25}


def timed(name, calls):
    """The method of Ranks, and from now on its seconds in calls[name]."""
    plain = getattr(group.Ranks, name)

    def method(self, *args):
        began = time.perf_counter()
        try:
            return plain(self, *args)
        finally:
            calls[name] += time.perf_counter() - began
    setattr(group.Ranks, name, method)


def worker(name, steps, batch, dim, threads):
    """Steps of a model -> {"step": seconds, "all_reduce": seconds of it, "exchange": seconds of it, which is
    waiting for the slower rank but for some microseconds}."""
    calls = collections.Counter()
    for method in ("all_reduce", "exchange"):
        timed(method, calls)
    recipe = Recipe(dim=dim, batch=batch)
    task, batches = prepared(name, recipe, make_scenes(4 * batch, seed=0))
    optimizer = tt.optim.AdamW(task.model.parameters(), clip=1.0)
    take = stepper(Work(task, batches, optimizer, [1e-3] * (WARM_UP + steps), threads=threads))
    for step in range(WARM_UP):
        take(step)
    calls.clear()
    group.current().exchange("begin")
    began = time.perf_counter()
    for step in range(steps):
        take(WARM_UP + step)
    return {"step": (time.perf_counter() - began) / steps, "values": int(optimizer.flat.grad.size),
            **{what: calls[what] / steps for what in ("all_reduce", "exchange")}}


def prepared(name, recipe, scenes):
    """(task, batches) of a model of `compare`."""
    tt.manual_seed(0)
    model = create(name, image_size=32, **recipe.sizes, **arms(recipe)[name].config)
    task = tasks.pick(model.task)
    task = task(model, create("vit", image_size=32, **recipe.sizes)) if task.taught else task(model)
    return task, Batches(scenes.images, scenes.labels, recipe.batch)


def overlap_worker(options):
    """{model: seconds of {"gradients", "sum", "both": at once}, a list each}, of this rank's part of a batch."""
    recipe, ranks, found = Recipe(dim=options.dim, batch=options.batch), group.current(), {}
    scenes = make_scenes(4 * options.batch, seed=0)
    for name in SHOWN.values():
        task, batches = prepared(name, recipe, scenes)
        optimizer = tt.optim.AdamW(task.model.parameters(), clip=1.0)
        work = Work(task, batches, optimizer, [])
        arrays, draws, _ = work.mine(batches(0), work.noise(options.batch, 0))
        total = np.ones_like(optimizer.flat.grad)
        runs = {"gradients": lambda: loss_and_grads(task, optimizer.params, arrays, 16, 1, draws),
                "sum": lambda: ranks.all_reduce(total)}
        runs["both"] = lambda: share_out(lambda run: run(), (runs["gradients"], runs["sum"]), 2)
        taken = found[name] = {run: [] for run in runs}
        for _ in range(WARM_UP + options.steps):
            for run in runs:
                ranks.exchange("begin")
                taken[run].append(seconds(runs[run]))
        found[name] = {run: times[WARM_UP:] for run, times in taken.items()}
    return found


def arms_worker(options):
    """One round -> {number of arms: {way: seconds}}, in all ranks."""
    recipe, ranks = Recipe(dim=options.dim, batch=options.batch), group.current()
    scenes, found = make_scenes(4 * options.batch, seed=0), {}

    def job(name):
        task, batches = prepared(name, recipe, scenes)
        fit(task.model, task, batches, steps=options.steps, threads=options.threads, bar=False)
    job("vit")
    for count in ARMS:
        jobs = {f"arm {i}": functools.partial(job, tuple(SHOWN.values())[i % 3]) for i in range(count)}
        for way, least in turned(list(WAYS.items()), options.turn):
            with ranks.leading("a folder", tempfile.TemporaryDirectory(dir=options.folder)) as folder:
                here = lesson.Lesson("arms", "full", "scenes", "cpu", 0, folder)
                lesson.JOBS_OF_A_RANK = least
                ranks.exchange("begin")
                began = time.perf_counter()
                here.each(jobs, {})
                ranks.exchange("end")
                found.setdefault(count, {})[way] = time.perf_counter() - began
    return found


def measured(ranks, options, *words):
    """One run of a worker: what rank 0 said."""
    for option in ("steps", "batch", "dim"):
        words += f"--{option}", getattr(options, option)
    code, out, err = ranked.ended(ranked.started(ranks, *words, program=__file__), 600)
    if code:
        sys.exit(err)
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option, value in dict(ranks=2, rounds=9, steps=20, batch=64, dim=96, threads=1, turn=0).items():
        parser.add_argument(f"--{option}", type=int, default=value)
    for option in ("arms", "overlap"):
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("--worker", choices=(*SHOWN.values(), "arms", "overlap"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.worker:
        other = {"arms": arms_worker, "overlap": overlap_worker}.get(options.worker)
        found = (other(options) if other else
                 worker(options.worker, options.steps, options.batch, options.dim, options.threads))
        if group.current().rank == 0:
            print(json.dumps(found), flush=True)
        return
    if ranked.missing():
        sys.exit(ranked.missing())
    if options.out:
        check_target(options.out, ".json")
    rows = (of_arms if options.arms else of_overlap if options.overlap else of_steps)(options)
    if options.out:
        write_json(options.out, {"ranks": options.ranks, "rounds": options.rounds, "steps": options.steps,
                                 "batch": options.batch, "dim": options.dim,
                                 "machine": machine("cpu", here=False), "rows": rows})


def of_arms(options):
    """The table of --arms."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = [measured(options.ranks, options, "--worker", "arms", "--turn", turn, "--folder", folder)
                  for turn in range(options.rounds)]
    rows = []
    for count in rounds[0]:
        one, all_ranks = ([each[count][way] for each in rounds] for way in WAYS)
        ratio = quartiles([b / a for a, b in zip(one, all_ranks)])
        print(f"{count:>3} arms{quartiles(one)[0]:>8.1f} s, one rank an arm{quartiles(all_ranks)[0]:>8.1f} s, all ranks "
              f"{ratio[0]:>7.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]", flush=True)
        rows.append({"arms": int(count), "one_rank": one, "all_ranks": all_ranks, "ratio": ratio})
    return rows


def of_overlap(options):
    """The table of --overlap."""
    rows = []
    for name, taken in measured(options.ranks, options, "--worker", "overlap").items():
        one, total, both = (quartiles([1e3 * each for each in taken[run]]) for run in ("gradients", "sum", "both"))
        saved = quartiles([100 * (a + b - c) / (a + b) for a, b, c in zip(*taken.values())])
        print(f"{name:<12}{one[0]:>8.1f} ms for gradients{total[0]:>6.2f} ms for a sum{both[0]:>8.1f} ms at once   "
              f"saved {saved[0]:.1f} [{saved[1]:.1f}, {saved[2]:.1f}] %", flush=True)
        rows.append({"model": name, "gradients_ms": one, "sum_ms": total, "both_ms": both, "saved_percent": saved})
    return rows


def of_steps(options):
    """The table of steps, in threads, in ranks, and of one thread alone."""
    ways = {"threads": (0, options.ranks), "ranks": (options.ranks, 1), "alone": (0, 1)}  # (ranks, threads)
    taken = {name: {way: [] for way in ways} for name in SHOWN.values()}
    for turn in range(options.rounds):
        for name, way in turned([(name, way) for name in taken for way in ways], turn):
            ranks, threads = ways[way]
            taken[name][way].append(measured(ranks, options, "--worker", name, "--threads", threads))
    return [row(name, found, options.ranks) for name, found in taken.items()]


def row(name, found, count):
    """Print, and return for the JSON, what was found of a model. most: the ratio if `count` ranks were as many
    times as fast as one thread alone, and adding up took no time."""
    threads, ranks, alone = ([1e3 * one["step"] for one in found[way]] for way in ("threads", "ranks", "alone"))
    ratio, most = (quartiles([a / b for a, b in zip(threads, other)])
                   for other in (ranks, [one / count for one in alone]))
    share = {what: statistics.median(one[what] / one["step"] for one in found["ranks"])
             for what in ("all_reduce", "exchange")}
    target = f" (target {TARGETS[name]})" if name in TARGETS else ""
    print(f"{name:<12}{quartiles(threads)[0]:>8.1f} ms in threads{quartiles(ranks)[0]:>8.1f} ms in ranks   "
          f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}], at most {most[0]:.2f}{target}   all_reduce "
          f"{100 * share['all_reduce']:.1f} %, waiting {100 * share['exchange']:.1f} %", flush=True)
    return {"model": name, "threads_ms": quartiles(threads), "ranks_ms": quartiles(ranks),
            "alone_ms": quartiles(alone), "ratio": ratio, "most": most, "share": share,
            "values": found["ranks"][0]["values"]}


if __name__ == "__main__":
    main()
