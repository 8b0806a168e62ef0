"""Two processes of one thread against one process of two threads: training steps, and what of a step goes by
in adding up gradients.

    python tests/benchmarks/ranks.py [--ranks N] [--rounds N] [--steps N] [--batch N] [--dim N] [--out FILE.json]

The models and the recipe are `compare`'s. A round starts each way once, for each model, in an order that turns
by one; a way is processes of its own, which take a few steps to warm up and then so many that are timed. Ratios
are taken inside a round; above 1, ranks are the faster way. Targets of issue 32: ViT 1.0, LookupViT 1.25, and
sums below 5 % of a step.
"""
import argparse
import collections
import json
import pathlib
import statistics
import sys
import time

import ranked
import tinytoken as tt
from timing import quartiles, turned
from tinytoken import group
from tinytoken.data import Batches, make_scenes
from tinytoken.experiments import Recipe
from tinytoken.experiments.compare import SHOWN, arms
from tinytoken.experiments.timing import machine
from tinytoken.files import check_target, write_json
from tinytoken.models import create
from tinytoken.tasks import task as tasks
from tinytoken.train.step import Work, stepper

WARM_UP = 5
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
    scenes, arm = make_scenes(4 * batch, seed=0), arms(recipe)[name]
    tt.manual_seed(0)
    model = create(name, image_size=32, **recipe.sizes, **arm.config)
    task = tasks.pick(model.task)
    task = task(model, create("vit", image_size=32, **recipe.sizes)) if task.taught else task(model)
    batches = Batches(scenes.images, scenes.labels, batch)
    optimizer = tt.optim.AdamW(model.parameters(), clip=1.0)
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


def measured(ranks, name, options):
    """One run of one way: what rank 0 said."""
    words = ["--worker", name, "--steps", options.steps, "--batch", options.batch, "--dim", options.dim,
             "--threads", 1 if ranks else options.ranks]
    code, out, err = ranked.ended(ranked.started(ranks, *words, program=__file__), 600)
    if code:
        sys.exit(err)
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option, value in dict(ranks=2, rounds=9, steps=20, batch=64, dim=96, threads=1).items():
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--worker", choices=tuple(SHOWN.values()), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.worker:
        found = worker(options.worker, options.steps, options.batch, options.dim, options.threads)
        if group.current().rank == 0:
            print(json.dumps(found), flush=True)
        return
    if ranked.missing():
        sys.exit(ranked.missing())
    if options.out:
        check_target(options.out, ".json")
    taken = {name: {"threads": [], "ranks": []} for name in SHOWN.values()}
    ways = [(name, way) for name in taken for way in taken[name]]
    for turn in range(options.rounds):
        for name, way in turned(ways, turn):
            taken[name][way].append(measured(options.ranks if way == "ranks" else 0, name, options))
    rows = [row(name, found) for name, found in taken.items()]
    if options.out:
        write_json(options.out, {"ranks": options.ranks, "rounds": options.rounds, "steps": options.steps,
                                 "batch": options.batch, "dim": options.dim, "machine": machine("cpu"),
                                 "rows": rows})


def row(name, found):
    """Print, and return for the JSON, what was found of a model."""
    threads, ranks = ([1e3 * one["step"] for one in found[way]] for way in ("threads", "ranks"))
    ratio = quartiles([a / b for a, b in zip(threads, ranks)])
    share = {what: statistics.median(one[what] / one["step"] for one in found["ranks"])
             for what in ("all_reduce", "exchange")}
    target = f" (target {TARGETS[name]})" if name in TARGETS else ""
    print(f"{name:<12}{quartiles(threads)[0]:>8.1f} ms in threads{quartiles(ranks)[0]:>8.1f} ms in ranks   "
          f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]{target}   all_reduce {100 * share['all_reduce']:.1f} %, "
          f"waiting {100 * share['exchange']:.1f} %", flush=True)
    return {"model": name, "threads_ms": quartiles(threads), "ranks_ms": quartiles(ranks), "ratio": ratio,
            "share": share, "values": found["ranks"][0]["values"]}


if __name__ == "__main__":
    main()
