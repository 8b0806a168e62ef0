"""How fast tinytoken trains and infers on a CPU, beside PyTorch (stock, at its best, compiled), JAX, and
MyGrad for scale.

    python tests/benchmarks/cpu.py [--quick] [--coretype Haswell] [--cpus 1,2] [--today CHECKOUT]
                                   [--out FILE.json]

"plain" is tinytoken without what Numba compiles, "today" the same of another checkout, "torch-malloc" PyTorch
that keeps freed memory as tinytoken does. Each workload's rows are printed, and with --out written, as soon
as they are measured; the same command goes on after them.

Each contender is a process of its own and serves requests over a pipe. A round times every contender once on
one workload, with a pause between and the order turned by one each round, so that whatever else the machine
does meets all alike; ratios are taken inside a round. Before that, all must compute the same from the same
weights and pictures: logits, first loss and gradient.

A training step is the same everywhere: forward, loss, backward, clipping of the global gradient norm, AdamW
with weight decay on the matrices of linear layers. DynamicViT's loss has its four parts and runs the frozen
teacher. float32 throughout.
"""
import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
import timeit

import numpy as np

import tinytoken as tt
from contenders import Contender, Field, avx512_for_mkl
from timing import high_water, quartiles, seconds, turned
from tinytoken.backend import blas_description, cpu_count, prepare_cpu
from tinytoken.experiments import machine
from tinytoken.files import as_json, check_target, write_json
from tinytoken.models.lookupvit import PAPER
from tinytoken.train import AdamW, Classify, Distil, infer, loss_and_grads
from tinytoken.train.step import slice_of

CONTENDERS = ("tinytoken", "plain", "today", "torch", "torch-malloc", "torch-best", "torch-compile", "jax",
              "mygrad")
ON_NUMPY = ("tinytoken", "plain", "today", "mygrad")  # what OPENBLAS_CORETYPE reaches
# nothing is to be learned
RECIPE = {"lr": 1e-5, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip": 1.0}
PAUSE = 0.05  # seconds: BLAS threads of the contender before go on spinning for a while
ENOUGH = 0.25  # seconds that a timing should last; shorter steps are repeated
TOLERANCE = 1e-3  # relative, on logits, first loss and gradient norm


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, a batch size, and what is timed of it."""
    name: str
    kind: str
    config: dict
    batch: int = 64
    modes: tuple = ("train", "infer")


def workloads(quick):
    """Three ViTs (A, B, C), then the two token methods as wide as A and as B; all three with one picture at a
    time. quick: toy sizes."""
    def sizes(image, patch, dim, depth, heads, classes=10, **more):
        return dict(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads,
                    num_classes=classes, **more)

    stages, grid = dict(prune_before=(1, 3, 5), keep_ratios=(0.7, 0.49, 0.343)), dict(compressed=(3, 3))
    if quick:
        return [Work("quick A", "ViT", sizes(32, 4, 48, 2, 3), 8),
                Work("quick B", "ViT", sizes(32, 4, 24, 2, 3), 8),
                Work("quick D", "DynamicViT", sizes(32, 4, 48, 6, 3, **stages), 8),
                Work("quick L", "LookupViT", sizes(32, 4, 48, 2, 3, **grid), 8)]
    return [Work("A", "ViT", sizes(32, 4, 192, 6, 3)), Work("B", "ViT", sizes(32, 4, 96, 4, 3)),
            Work("C", "ViT", sizes(224, 16, 384, 12, 6, 1000), 8, ("infer",)),
            *(Work(f"DynamicViT {dim}", "DynamicViT", sizes(32, 4, dim, 6, 3, **stages))
              for dim in (192, 96)),
            *(Work(f"LookupViT {dim}", "LookupViT", sizes(32, 4, dim, 6, 3, **grid)) for dim in (192, 96)),
            *(Work(f"{kind} 192, batch 1", kind, sizes(32, 4, 192, 6, 3, **more), 1, ("infer",))
              for kind, more in (("ViT", {}), ("DynamicViT", stages), ("LookupViT", grid)))]


def model_of(work):
    """tinytoken's model of a workload; a LookupViT in the paper's reading, as the peers have it."""
    return getattr(tt.models, work.kind)(**work.config, **PAPER if work.kind == "LookupViT" else {})


def write_arrays(work, path):
    """Weights, pictures, labels, noise and teacher of a workload, for all contenders -> multiply-adds of one
    image."""
    random = np.random.default_rng(0)
    tt.manual_seed(0)
    model = model_of(work)
    images = random.standard_normal((work.batch, 3, work.config["image_size"], work.config["image_size"]),
                                    "float32")
    arrays = {f"weights/{name}": array for name, array in model.state_dict().items()}
    arrays |= {"images": images, "labels": random.integers(0, work.config["num_classes"], work.batch)}
    if work.kind == "DynamicViT":
        tt.manual_seed(1)
        arrays |= {f"teacher/{name}": array for name, array in teacher(work).state_dict().items()}
        arrays["noise"] = random.gumbel(size=(work.batch, len(model.keep_ratios), model.num_patches,
                                              2)).astype("float32")
    np.savez(path, **arrays)
    return tt.macs(model, images[:1]).total


def read_arrays(path):
    """What write_arrays wrote, weights and teacher as dictionaries."""
    arrays = {}
    with np.load(path) as file:
        for name in file:
            group, _, rest = name.partition("/")
            arrays.setdefault(group, {})[rest] = file[name]
    return {group: members[""] if "" in members else members for group, members in arrays.items()}


def arrays_of(work):
    """(what write_arrays writes, as read_arrays reads it, multiply-adds of one image)."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "arrays.npz"
        macs = write_arrays(work, path)
        return read_arrays(path), macs


def teacher(work):
    """The dense ViT of a DynamicViT's sizes."""
    return tt.models.ViT(**{k: v for k, v in work.config.items() if k not in ("prune_before", "keep_ratios")})


def task_of(work, arrays):
    """tinytoken's task of a workload, its model in train mode, with the weights of read_arrays."""
    model = model_of(work)
    model.load_state_dict(arrays["weights"])
    model.train()
    if work.kind != "DynamicViT":
        return Classify(model)
    dense = teacher(work)
    dense.load_state_dict(arrays["teacher"])
    return Distil(model, dense)


def batch_of(arrays):
    """(images, labels), and what is drawn for them, of a step."""
    return (arrays["images"], arrays["labels"]), {name: arrays[name] for name in ("noise",) if name in arrays}


# The contender's side: a process that answers requests

class TinyToken:
    """tinytoken as its own trainer runs it: slices as `fit` makes them, `infer` on all cores."""

    def __init__(self):
        self.malloc = prepare_cpu()  # as training and `infer` do by themselves

    def about(self):
        return {"version": f"in {pathlib.Path(tt.__file__).parents[1].name}", "numpy": np.__version__,
                "threads": cpu_count(),
                "malloc": self.malloc, "blas": blas_description(), "note": "slices as fit makes them"}

    def product(self, a, b):
        return lambda: a @ b

    def prepare(self, work, arrays, recipe):
        task, (batch, draws) = task_of(work, arrays), batch_of(arrays)
        model, params = task.model, task.model.parameters()
        count, logits = tt.macs(model, batch[0][:1]).total, lambda: infer(model, batch[0])
        if "train" not in work.modes:  # nor is there an optimiser where a model only infers
            return None, logits, count
        optimizer = AdamW(params, **recipe)
        micro = slice_of(task, batch, draws)

        def step():
            loss, _ = loss_and_grads(task, params, batch, micro, draws=draws)
            return loss, float(optimizer.step())
        return step, logits, count


def make(name):
    """The contender of that name; what it is made of is imported here."""
    if name in ("tinytoken", "plain"):
        return TinyToken()
    if name.startswith("torch"):
        return importlib.import_module("peers_torch").Torch(name)
    return importlib.import_module("peers_other").PEERS[name](name)


def serve(name, path, quick):
    """Answer requests on stdin, one JSON line each, until it closes. path: the arrays of the workload that it
    is named after."""
    work = next(work for work in workloads(quick) if work.name == pathlib.Path(path).stem)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    reply = lambda **answer: print(json.dumps(answer), file=out)
    try:
        contender = make(name)
        a = np.random.default_rng(0).standard_normal((1024, 1024), "float32")
        rate = 2 * 1024 ** 3 / min(timeit.repeat(contender.product(a, a), number=1, repeat=12)) / 1e9
        reply(about=contender.about() | {"sgemm_gflops": round(rate)})
        step, logits, macs = contender.prepare(work, read_arrays(path), RECIPE)
        calls = {"train": step, "infer": logits}
        for line in sys.stdin:
            reply(**answer(json.loads(line), calls, macs))
    except Exception as error:  # whatever it is, not installed above all: the others go on
        reply(error=f"{type(error).__name__}: {error}".splitlines()[0])


def answer(request, calls, macs):
    if request["do"] == "check":  # before any step, so that all weights are still equal
        logits = calls["infer"]().tolist()
        loss, norm = calls["train"]() if request["train"] else (0.0, 0.0)
        return {"logits": logits, "loss": loss, "norm": norm, "macs": macs}
    if request["do"] == "memory":
        held = high_water()
        return {"mb": held and round(held)}
    call, repeats = calls[request["mode"]], request["repeats"]
    call()  # wakes the threads and fills the caches
    return {"ms": 1e3 * seconds(call, repeats)}


# The measuring side

def contender(name, path, options, preload, cpus):
    """The process of a contender that serves the workload of `path`."""
    special = {"OPENBLAS_CORETYPE": options.coretype if name in ON_NUMPY else None,
               "TINYTOKEN_COMPILED": "0" if name in ("plain", "today") else None,
               "PYTHONPATH": str(options.today) if name == "today" else None,
               "LD_PRELOAD": preload if name == "torch-best" else None}
    script, name = ((options.today / "tests/benchmarks/cpu.py", "plain") if name == "today"
                    else (pathlib.Path(__file__).resolve(), name))
    command = [sys.executable, str(script), "--serve", name, str(path)] + ["--quick"] * options.quick
    return Contender(command, cpus, {k: v for k, v in special.items() if v})


def measure(work, cpus, path, options, preload, rounds):
    """Everything about one workload on so many CPUs."""
    row = {"workload": work.name, "cpus": cpus, "kind": work.kind, "config": work.config,
           "batch": work.batch, "macs": write_arrays(work, path), "skipped": {}, "repeats": {}, "ms": {}}
    print(f"{work.name}: {work.kind}, batch {work.batch}, {row['macs'] / 1e6:.2f} M MACs per image, "
          f"CPUs: {cpus}", flush=True)
    with contextlib.closing(Field(row["skipped"])) as field:
        for name in options.contenders:
            field.running[name] = contender(name, path, options, preload, cpus)
            row.setdefault("about", {}).update(field.each([name], lambda c: c.read()["about"]))
        row["agreement"] = check(field, options.contenders, work)
        for mode in work.modes:
            row["repeats"][mode], row["ms"][mode] = time_rounds(field, options.contenders, mode, rounds)
            if mode == "train":
                peaks = field.each(options.contenders, lambda c: c.ask(do="memory"))
                row["peak_memory_mb"] = {"train": {name: [got["mb"]] for name, got in peaks.items()}}
    return row


def check(field, names, work):
    """What each computes from the same weights and pictures, against the first. Too far off is dropped: it is
    another model."""
    got = field.each(names, lambda c: c.ask(do="check", train="train" in work.modes))
    first, *others = list(got) or [None]
    agreement = {"against": first}
    for name in others:
        mine, its = np.array(got[first]["logits"]), np.array(got[name]["logits"])
        gaps = np.abs(mine - its).max(axis=1) / np.abs(mine).max()
        # In float32 two tokens with nearly the same score may swap at the edge of the kept: that image is
        # then another one.
        allowed = int(work.kind == "DynamicViT" and work.batch > 1)
        one = {"logits": float(np.sort(gaps)[-1 - allowed]), "images_beyond": int((gaps > TOLERANCE).sum()),
               **{key: abs(got[name][key] / got[first][key] - 1) if got[first][key] else 0.0
                  for key in ("loss", "norm")},
               "macs": got[name]["macs"]}
        agreement[name] = one
        print(f"  {name} differs from {first}: logits {one['logits']:.1e}, loss {one['loss']:.1e}, gradient "
              f"{one['norm']:.1e}"
              + (f", {one['macs'] / 1e6:.2f} M MACs" if one["macs"] else ""), flush=True)
        if not all(one[key] <= TOLERANCE for key in ("logits", "loss", "norm")):  # nor if it is not a number
            field.drop(name, f"computes something else (beyond {TOLERANCE:g})")
    return agreement


def time_rounds(field, names, mode, rounds):
    """(repeats, {name: [milliseconds, one per round]}): interleaved, a contender once per round."""
    once = lambda repeats: lambda c: (time.sleep(PAUSE),
                                      c.ask(do="time", mode=mode, repeats=repeats)["ms"])[1]
    field.each(names, once(1))  # compiles, and warms up
    fastest = min(field.each(names, once(1)).values(), default=1)
    repeats = max(1, min(20, round(ENOUGH * 1e3 / fastest)))
    ms = {}
    for turn in range(rounds):
        for name, value in field.each(turned(names, turn), once(repeats)).items():
            ms.setdefault(name, []).append(value)
    return repeats, {name: ms[name] for name in names if len(ms.get(name, ())) == rounds}


# What comes out

def summarise(row):
    """Medians and quartiles of the times, and of each one's ratio to PyTorch (stock, and at its best) and to
    `today` in the same round."""
    for mode, ms in row["ms"].items():
        row.setdefault("median_ms", {})[mode] = {name: quartiles(values) for name, values in ms.items()}
        for peer in ("torch", "torch-best", "today"):
            if peer in ms:
                row.setdefault(f"ratio_to_{peer}", {})[mode] = {
                    name: quartiles([a / b for a, b in zip(values, ms[peer])]) for name, values in ms.items()
                    if name != peer}


def table(rows, key, title, form, contenders=CONTENDERS):
    """Markdown: a line per workload and mode, a column per contender."""
    names = [name for name in contenders
             if any(name in cells for row in rows for cells in row.get(key, {}).values())]
    lines = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        for mode, cells in row.get(key, {}).items():
            shown = [form.format(*cells[name]) if name in cells else "" for name in names]
            on = f", CPUs: {row['cpus']}" if "cpus" in row else ""
            lines.append(f"| {row['workload']} {mode}{on} | {' | '.join(shown)} |")
    return "\n".join(lines)


def report(rows):
    """The tables, as text."""
    spread, ratio = "median [quartiles]", "{:.2f} [{:.2f}, {:.2f}]"
    parts = [table(rows, "median_ms", f"ms, {spread}", "{:.1f} [{:.1f}, {:.1f}]"),
             table(rows, "ratio_to_torch", f"ratio to torch in the same round, {spread}", ratio),
             table(rows, "ratio_to_torch-best", f"ratio to torch-best, {spread}", ratio),
             table(rows, "ratio_to_today", f"ratio to today, {spread}", ratio, ("plain", "tinytoken")),
             table(rows, "peak_memory_mb", "peak memory of the process (VmHWM), MB", "{}")]
    return "\n\n".join(part for part in parts if part.count("\n") > 1)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes and 3 rounds: does it run?")
    parser.add_argument("--rounds", type=int, help="paired rounds (default 9, quick 3)")
    parser.add_argument("--coretype", help="OPENBLAS_CORETYPE for the contenders on NumPy, for example "
                                           "Haswell")
    parser.add_argument("--contenders", type=lambda text: text.split(","),
                        help="some of them, a,b,c")
    parser.add_argument("--today", type=pathlib.Path, metavar="CHECKOUT",
                        help="another checkout of tinytoken, whose plain ops are the contender \"today\"")
    parser.add_argument("--cpus", type=lambda text: [int(n) for n in text.split(",")], default=[cpu_count()],
                        help="on how many CPUs, for example 1,2 (default: all)")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="some of them")
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "ARRAYS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = [work.name for work in workloads(options.quick)]
    options.today = options.today and options.today.resolve()
    options.contenders = options.contenders or [n for n in CONTENDERS if n != "today" or options.today]
    if "today" in options.contenders and not (options.today and options.today.is_dir()):
        parser.error(f"--today {options.today}: a folder expected for the contender \"today\"")
    if options.out:
        check_target(options.out, ".json")
    for given, names in ((options.contenders, CONTENDERS), (options.workloads, known)):
        if unknown := set(given or ()) - set(names):
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    if not all(1 <= cpus <= cpu_count() for cpus in options.cpus):
        parser.error(f"--cpus {', '.join(map(str, options.cpus))}: expected from 1 to {cpu_count()}")
    return options


def begun(options, settings):
    """What an interrupted run with the same settings has written to options.out, or the settings alone."""
    if options.out and options.out.exists():
        there = json.loads(options.out.read_text())
        if all(there.get(key) == value for key, value in as_json(settings).items()):
            return there
        print(f"{options.out} is of another machine or recipe, and is written anew")
    return settings | {"began": time.strftime("%Y-%m-%d %H:%M:%S"), "rows": []}


def main(options):
    rounds = max(2, options.rounds or (3 if options.quick else 9))
    chosen = [work for work in workloads(options.quick) if not options.workloads
              or work.name in options.workloads]
    print(json.dumps(machine("cpu", here=False), indent=1), f"\nOPENBLAS_CORETYPE for NumPy: "
                                                f"{options.coretype or 'not set'}")
    with tempfile.TemporaryDirectory() as folder:
        preload, how = avx512_for_mkl(pathlib.Path(folder))
        print("AVX-512 in torch-best's MKL:", how)
        result = begun(options, {
            "machine": machine("cpu", here=False), "coretype": options.coretype, "rounds": rounds,
            "recipe": RECIPE, "spread": "median, lower and upper quartile", "mkl_avx512": how,
            "contenders": options.contenders, "quick": options.quick})
        rows = {(row["workload"], row["cpus"]): row for row in result["rows"]}
        for work, cpus in ((work, cpus) for work in chosen for cpus in options.cpus):
            if (work.name, cpus) not in rows:
                row = measure(work, cpus, pathlib.Path(folder) / f"{work.name}.npz", options, preload, rounds)
                summarise(row)
                for name, about in row["about"].items() if not rows else ():
                    print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in about.items()
                                                    if value != ""))
                rows[work.name, cpus] = row
                result["rows"] = list(rows.values())
                if options.out:
                    write_json(options.out, result)
            print(report([rows[work.name, cpus]]), flush=True)
    print(f"\n{report(result['rows'])}")
    if options.out:
        print(f"\nwritten: {options.out}")
    return result


if __name__ == "__main__":
    options = parse()
    serve(*options.serve, options.quick) if options.serve else main(options)
