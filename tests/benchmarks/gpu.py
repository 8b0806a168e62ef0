"""How fast tinytoken trains and infers on a GPU, beside PyTorch (eager, its own CUDA graph, compiled), and
its kernels beside what the device can do.

    python tests/benchmarks/gpu.py [--quick] [--minutes 9] [--only steps|inference|kernels] [--out FILE.json]

Contenders share a process and the device. A round times each once, by device events, in an order that turns
by one each round; ratios are taken inside a round. Before that, all must compute the same from the same
weights and pictures: the first losses and the first gradient's norm, or the logits. What does not is not
timed.

A training step is the same everywhere: forward, loss, backward, clipping of the global gradient norm, AdamW
with weight decay on the matrices of linear layers, from a batch that lies on the device. DynamicViT's loss
has its four parts and runs the frozen teacher.

FILE.json is written after every row. A run ends after --minutes, or sooner where the next row might not fit
in; the same command goes on with what is missing. What failed (memory, compiling, capturing) is there with
its reason.
"""
import argparse
import gc
import hashlib
import importlib
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import tqdm

from cpu import RECIPE, Work, arrays_of, table
from gpu_kernels import Kernels, kernels_text
from gpu_tinytoken import TinyToken
from timing import quartiles, turned
from tinytoken.backend import cuda_ready, module_for
from tinytoken.cuda import gemm, launcher
from tinytoken.experiments import machine
from tinytoken.files import as_json, check_target, write_json

OURS = "tinytoken bf16"
CONTENDERS = {  # in the order in which they take their memory
    OURS: lambda: TinyToken("bf16"), "torch eager": lambda: torch_as("eager"),
              "torch graph": lambda: torch_as("graph"),
    "torch compile": lambda: torch_as("compile"),
              "tinytoken bf16 launched": lambda: TinyToken("bf16", captured=False),
    "tinytoken fp32": lambda: TinyToken("fp32")}
POLICIES = {
    "all": "Weights, their gradients, AdamW's moments, the residual stream, sums of layer norms and losses "
           "in float32; factors of "
           "products in bf16. Batches are copied to the place that a graph reads. Inference rounds the "
           "weights of products once, before.",
    OURS: "One CUDA graph with forward, backward, clipping and AdamW. A bf16 copy of all weights is made "
          "once per step. Between the "
          "products of a block all is bf16; a layer norm gives bf16. LookupViT's gather and infusion, "
          "DynamicViT's predictors, the patch "
          "embedding and the heads are float32, their products' factors rounded to bf16 as they are "
          "multiplied.",
    "tinytoken bf16 launched": "The same kernels without a graph. In inference weights are rounded at each "
                               "call.",
    "tinytoken fp32": "As tinytoken bf16, and nothing is rounded: no TF32 either.",
    "torch eager": "torch.autocast in bf16, fused AdamW. Layer norms give float32, which is rounded again "
                   "for the product after it; each "
                   "weight is rounded by itself. DynamicViT's masked attention has its scores and their "
                   "exponentials in bf16.",
    "torch graph": "As torch eager, the whole step in one torch.cuda.CUDAGraph, AdamW fused and capturable.",
    "torch compile": "torch.compile(mode='max-autotune', dynamic=False) of two regions: the model with its "
                     "loss (and so their backward "
                     "pass), and clipping with AdamW (foreach, capturable). The mode makes CUDA graphs of "
                     "both. Inference: the model."}
KINDS, HEADS, PATCHES = ("ViT", "LookupViT", "DynamicViT"), {96: 3, 192: 3, 384: 6}, {64: 4, 256: 2}
AIMED = ((192, 256, 64), (96, 128, 64))  # dim, batch, tokens of the targets
TARGETS = {"torch eager": {192: 0.40, 96: 0.40}, "torch graph": {192: 0.80, 96: 0.80},
           "torch compile": {192: 1.0, 96: 0.7}}
FIRST = 6  # calls that are compared before timing: graphs are captured by then
# relative; in bf16 another token may be kept
TOLERANCES = {"loss": 0.02, "norm": 0.05, "logits": 0.05, "logits of DynamicViT": 0.2}
ENOUGH, ROUNDS = 0.05, 11  # seconds that a timing should last; rounds
# what the rows of one file have in common
SAME = ("gpu", "driver", "versions", "quick", "rounds", "recipe", "sources")


def torch_as(how):
    return importlib.import_module("peers_torch").OnDevice(how)


# What is timed

def work(kind, dim, batch, tokens, depth=6):
    """A model of 32 x 32 pictures in so many tokens."""
    config = dict(image_size=32, patch_size=PATCHES[tokens], dim=dim, depth=depth, heads=HEADS[dim],
                  num_classes=10)
    if kind == "DynamicViT":
        stages = ((1, 0.7), (3, 0.49), (5, 0.343))
        config |= dict(zip(("prune_before", "keep_ratios"),
                           zip(*(stage for stage in stages if stage[0] < depth))))
    if kind == "LookupViT":
        config["compressed"] = (3, 3) if tokens == 64 else (5, 5)
    return Work(f"{kind} {dim}, batch {batch}, {tokens} tokens", kind, config, batch)


def step_works(quick=False):
    """The issue's targets first: of the ViT, then of the others; then what is left, sizes by sizes. quick:
    toy sizes."""
    if quick:
        return [work(kind, 96, 8, 64, depth=2) for kind in KINDS]
    aimed = [(kind, *sizes) for kinds in (KINDS[:1], KINDS[1:]) for sizes in AIMED for kind in kinds]
    rest = [(kind, dim, batch, tokens) for tokens in PATCHES for dim in (192, 96, 384)
            for batch in (256, 128, 1024) for kind in KINDS]
    return [work(*sizes) for sizes in dict.fromkeys(aimed + rest)]


def inference_works(quick=False):
    if quick:
        return [work(kind, 96, 2, 64, depth=2) for kind in KINDS]
    return [work(kind, dim, batch, tokens) for tokens in PATCHES for dim in (192, 96, 384)
            for batch in (1, 128) for kind in KINDS]


def limit(one, peer):
    """The issue's target for tinytoken's share of a peer's step, or None."""
    sizes = one.config["dim"], one.batch, (one.config["image_size"] // one.config["patch_size"]) ** 2
    return TARGETS.get(peer, {}).get(sizes[0]) if sizes in AIMED else None


# What is kept

class Results:
    """The rows so far, in a file (None: only in memory) after every one of them, and what failed, by row and
    contender."""

    def __init__(self, path, about):
        self.path = path
        self.data = {"about": about, "rows": [], "failed": {}, "under_way": [], "broken_off": []}
        if path and path.exists():
            self.data = json.loads(path.read_text())
            old, new = self.data["about"], as_json(about)
            other = "; ".join(f"{name} {old[name]} there, {new[name]} now" for name in SAME
                              if old[name] != new[name])
            if other:
                sys.exit(f"gpu.py: {path} belongs to other conditions ({other}): choose another --out")
            self.find_broken_off()

    def find_broken_off(self):
        """Where the last run ended, if in the middle of something. What two runs did not survive is not tried
        again."""
        where = self.data["under_way"]
        if where and where in self.data["broken_off"]:
            self.fail(*where, "two runs ended in the middle of it")
        elif where:
            self.data["broken_off"].append(where)

    def has(self, key):
        return any(row["key"] == key for row in self.data["rows"])

    def begin(self, *where):
        """Note what is begun, or with nothing given that it is over."""
        self.data["under_way"] = list(where)
        self.write()

    def fail(self, key, name, reason):
        self.data["failed"].setdefault(key, {})[name] = reason
        self.write()

    def failed(self, key):
        return self.data["failed"].get(key, {})

    def add(self, row):
        self.data["rows"].append(row)
        self.begin()

    def write(self):
        if self.path:
            write_json(self.path, self.data)


def go(todo, results, minutes, now=time.monotonic, bar=True):
    """Do what `results` lack of todo, [(key, function that gives the row)], as long as the longest row of
    that part so far would still be done in time -> how many are left. The first word of a key is its part."""
    began, longest, left = now(), {}, [(key, job) for key, job in todo if not results.has(key)]
    with tqdm.tqdm(total=len(todo), initial=len(todo) - len(left), disable=not bar) as progress:
        for done, (key, job) in enumerate(left):
            start, part = now(), key.split()[0]
            if done and start - began + longest.get(part, 0) > 60 * minutes:
                return len(left) - done
            progress.set_description(key)
            row = job()
            seconds = now() - start
            results.add({"key": key, **row, "seconds": round(seconds, 1)})
            longest[part] = max(longest.get(part, 0), seconds)
            progress.update()
    return 0


# Measuring

class Bench:
    """What times contenders beside each other. clock(call, repeats) -> seconds of a call; free(): gives
    memory back."""

    def __init__(self, results, contenders, clock, rounds, free):
        self.results, self.contenders, self.clock, self.rounds, self.free = results, contenders, clock, rounds, free

    def attempt(self, key, name, action):
        """What action() gives; None where it fails, and the reason is kept."""
        try:
            return action()
        except Exception as error:  # whatever it is, the others go on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.results.fail(key, name, reason)  # not in the except block: the exception's frames hold memory
        try:
            self.free()
        except Exception as error:
            sys.exit(f"gpu.py: the device is lost after {name} ({reason}; {error}): the same command goes on "
                     f"without it")

    def measure(self, one, mode, key):
        """The row of a workload. mode: train or infer."""
        arrays, macs = arrays_of(one)
        calls, agreement = self.agreed(one, mode, key, arrays)
        repeats, ms = self.timed(key, calls)
        del calls
        self.free(compiled=True)
        return {"workload": one.name, "kind": one.kind, "config": one.config, "batch": one.batch,
                "macs": macs, "agreement": agreement,
                "skipped": self.results.failed(key), "repeats": repeats, **summary(one, mode, ms)}

    def agreed(self, one, mode, key, arrays):
        """({name: a function that does one call}, agreement) of those that run, and compute the same."""
        calls, first = {}, {}
        for name, make in self.contenders.items():
            if name not in self.results.failed(key):
                self.results.begin(key, name)
                self.free()  # what the one before keeps for its next call, it can get again
                found = self.attempt(key, name, lambda: prepared(make(), mode, one, arrays))
                if found:
                    calls[name], first[name] = found
        self.results.begin()
        agreement = agreement_of(mode, one.kind, first)
        for name, gaps in agreement["of"].items():
            if not all(gap <= TOLERANCES[what] for what, gap in gaps.items()):  # nor if it is not a number
                self.results.fail(key, name, f"computes something else than {agreement['reference']}: {gaps}")
                del calls[name]
        return calls, agreement

    def inspect(self, name, action, key):
        """The row of a kernel, that action() gives."""
        self.results.begin(key, name)
        row = None if self.results.failed(key) else self.attempt(key, name, action)
        return row or {"skipped": self.results.failed(key)}

    def timed(self, key, calls):
        """(repeats, {name: [milliseconds, one per round]}) of those that last to the end."""
        took = [self.attempt(key, name, lambda: self.clock(call, 3)) for name, call in calls.items()]
        repeats = round(min(max(ENOUGH / min(filter(None, took), default=1), 5), 300))
        ms = {name: [] for name in calls}
        for turn in range(self.rounds):
            for name in turned(calls, turn) if calls else ():
                if name not in self.results.failed(key):
                    seconds = self.attempt(key, name, lambda: self.clock(calls[name], repeats))
                    ms[name] += [] if seconds is None else [1e3 * seconds]
        return repeats, {name: values for name, values in ms.items() if len(values) == self.rounds}


def prepared(contender, mode, one, arrays):
    """(a function that does one call, what the first calls gave: losses and norms (FIRST, 2), or logits
    (FIRST, B, K))."""
    call = contender.train(one, arrays, RECIPE) if mode == "train" else contender.infer(one, arrays)
    read = lambda out: [float(contender.host(x)) for x in out] if mode == "train" else contender.host(out)
    return call, np.array([read(call()) for _ in range(FIRST)])


def agreement_of(mode, kind, first):
    """How far each is from PyTorch, or from the first that there is: relative gaps of the losses (the
    largest) and of the first gradient's norm, or of the logits after capturing (of an image: the largest;
    their median)."""
    logits = "logits of DynamicViT" if kind == "DynamicViT" else "logits"
    reference = "torch eager" if "torch eager" in first else next(iter(first), None)
    gaps = {}
    for name in first:
        mine, its = first[name], first[reference]
        if mode == "train":
            gaps[name] = {"loss": float(np.abs(mine[:, 0] / its[:, 0] - 1).max()),
                          "norm": float(abs(mine[0, 1] / its[0, 1] - 1))}
        else:
            gaps[name] = {logits: float(np.median(np.abs(mine[-1] - its[-1]).max(axis=1))
                                        / np.abs(its[-1]).max())}
    return {"reference": reference, "of": gaps}


def summary(one, mode, ms):
    """Medians and quartiles of the times and of tinytoken's ratio to each other in the same round, and the
    targets."""
    peers, limits = [name for name in ms if name != OURS and OURS in ms], {name: limit(one, name)
                                                                           for name in ms if mode == "train"}
    ratio = {name: quartiles([a / b for a, b in zip(ms[OURS], ms[name])]) for name in peers}
    targets = [{"against": name, "limit": limits[name], "ratio": ratio[name],
                "met": ratio[name][0] <= limits[name]}
               for name in ratio if limits.get(name)]
    return {"ms": {mode: ms}, "median_ms": {mode: {name: quartiles(values) for name, values in ms.items()}},
            "ratio": {mode: ratio},
            "targets": targets}


# The device

def clock(call, repeats=1):
    """Seconds of one call by device events, mean of `repeats`, after two that are not counted. PyTorch and
    CuPy both work on the null stream here, where the events are."""
    cuda = module_for("cuda").cuda
    for _ in range(2):
        call()
    start, stop = cuda.Event(), cuda.Event()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return 1e-3 * cuda.get_elapsed_time(start, stop) / repeats


def free(compiled=False):
    """Give back the memory of what is no longer used; compiled: torch.compile forgets what it made. Raises
    where the device is lost."""
    cupy, torch = module_for("cuda"), sys.modules.get("torch")
    torch = torch if torch and torch.cuda.is_available() else None
    cupy.cuda.Device().synchronize()
    if torch and compiled:
        torch.compiler.reset()  # and its limit of how often one function is compiled starts anew
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if torch:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that failed may have left its own
        torch.cuda.empty_cache()


def lacking(only):
    """What is missing on this machine, or ''."""
    ready, reason = cuda_ready()
    if not ready:
        return f"no GPU: {reason}"
    try:
        found = importlib.import_module("torch").cuda.is_available()
        reason = "" if found else "PyTorch finds no GPU"
    except ImportError as error:
        reason = f"no PyTorch ({error})"
    return f"{reason}; --only kernels does without" if reason and only != "kernels" else ""


def about(options, rounds):
    """What the numbers were measured on, and how."""
    cupy, torch = module_for("cuda"), sys.modules.get("torch")
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    versions = {"cuda": cupy.cuda.runtime.runtimeGetVersion(), "cupy": cupy.__version__,
                "numpy": np.__version__,
                "cublaslt": gemm.library() and gemm.library().cublasLtGetVersion()}
    if torch:
        versions |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    return {"gpu": properties["name"].decode(), "driver": driver(cupy), "versions": versions,
            "machine": machine("cuda"), "seed": 0,
            "quick": options.quick, "rounds": rounds, "recipe": RECIPE, "sources": fingerprint(),
            "l2_bytes": properties["l2CacheSize"],
            "policies": POLICIES, "tolerances": TOLERANCES, "spread": "median, lower and upper quartile"}


def driver(cupy):
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True)
        return found.stdout.split()[0]
    except (OSError, IndexError):
        return f"for CUDA {cupy.cuda.runtime.driverGetVersion()}"


def fingerprint():
    """Of the sources that are timed, and of what times them: rows of others do not belong into one file."""
    here = pathlib.Path(__file__)
    patterns = "tinytoken/**/*.py", "tinytoken/cuda/sources/*", "tests/benchmarks/gpu*.py", "tests/benchmarks/peers_torch.py"
    files = [path for pattern in patterns for path in sorted(here.parents[2].glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


# What comes out

def report(rows):
    """The tables, as text."""
    timed, kernels = [row for row in rows if "ms" in row], [row for row in rows if "share" in row
                                                            or "products" in row]
    spread = "median [quartiles]"
    parts = [table(timed, "median_ms", f"ms, {spread}", "{:.3f} [{:.3f}, {:.3f}]", CONTENDERS),
             table(timed, "ratio", f"{OURS} / each, in the same round, {spread}", "{:.2f} [{:.2f}, {:.2f}]",
                   CONTENDERS),
             targets_text(timed), kernels_text(kernels)]
    skipped = "\n".join(f"skipped: {row['key']}: {name}: {reason}" for row in rows for name,
                        reason in row.get("skipped", {}).items())
    return "\n\n".join([part for part in parts if part.count("\n") > 1] + [skipped] * bool(skipped))


def targets_text(rows):
    lines = [f"| target: {OURS} / peer, a training step | at most | measured, median [quartiles] | met |",
             "|---|---|---|---|"]
    lines += [f"| {row['workload']}: {one['against']} | {one['limit']:.2f} | "
              f"{'{:.2f} [{:.2f}, {:.2f}]'.format(*one['ratio'])} | "
              f"{'yes' if one['met'] else 'NO'} |" for row in rows for one in row["targets"]]
    return "\n".join(lines)


def plan(bench, inspected, quick=False, only=None):
    """[(key, function that gives the row)]: the steps with targets, the kernels, inference, the other
    steps."""
    job = lambda part, mode, one: (f"{part} {one.name}",
                                   lambda: bench.measure(one, mode, f"{part} {one.name}"))
    steps = [job("steps", "train", one) for one in step_works(quick)]
    rows = {name: lambda name=name: inspected.kernel(name)
            for name in launcher.kernels()} | {"products": inspected.products}
    parts = {"steps": steps[:6],
             "kernels": [(f"kernels {name}", lambda a=(name, row, f"kernels {name}"): bench.inspect(*a))
                         for name, row in rows.items()],
             "inference": [job("inference", "infer", one) for one in inference_works(quick)],
             "other steps": steps[6:]}
    return [one for part, jobs in parts.items() for one in jobs if not only or part.endswith(only)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes and 3 rounds: does it run?")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing that might end later "
                                                                 "(default 9)")
    parser.add_argument("--only", choices=("steps", "inference", "kernels"))
    parser.add_argument("--out", type=pathlib.Path, help="JSON that is written after every row, and gone on "
                                                         "with")
    options = parser.parse_args()
    if options.out:
        check_target(options.out, ".json")
    if reason := lacking(options.only):
        sys.exit(f"gpu.py: {reason}")
    rounds = 3 if options.quick else ROUNDS
    results = Results(options.out, about(options, rounds))
    sizes = (96, 8, 64, 2) if options.quick else (192, 256, 64)
    inspected = Kernels([work(kind, *sizes) for kind in KINDS], clock, rounds,
                        results.data["about"]["l2_bytes"])
    todo = plan(Bench(results, CONTENDERS, clock, rounds, free), inspected, options.quick, options.only)
    left = go(todo, results, options.minutes)
    print(f"\n{report(results.data['rows'])}")
    if left:
        print(f"\n{left} of {len(todo)} rows are left: the same command goes on with them")


if __name__ == "__main__":
    main()
