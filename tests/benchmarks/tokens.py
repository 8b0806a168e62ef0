"""What token methods save on this engine, beside what they save in multiply-adds, and how time and memory
grow with tokens.

    python tests/benchmarks/tokens.py [--quick] [--part savings|growth] [--rounds N] [--out FILE.json]

Savings: inference of DynamicViT (pruned before blocks 1, 3, 5 to keep, keep^2, keep^3) and LookupViT against
the ViT of equal width and depth. A round times the ViT and every method once, in an order that turns by one
each round; speed-ups are taken inside a round. Growth: time, and peak memory in a process of its own, over 64
to 1024 tokens; with --out also a picture.

Tokens are made by larger pictures at patch 4 (32, 64, 128 pixels), so that each is embedded from as many
values and only their number changes. Weights are untrained: what is computed does not depend on them, since
keep ratios fix how many tokens stay.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

import tinytoken as tt
from timing import high_water, quartiles, seconds, turned
from tinytoken.backend import cpu_count, prepare_cpu
from tinytoken.experiments.timing import machine, peak_of_arrays
from tinytoken.files import check_target, replacing, write_json
from tinytoken.train import AdamW, Classify, Distil, infer, loss_and_grads

PATCH, DEPTH, HEADS, STAGES = 4, 6, 3, (1, 3, 5)
ENOUGH = 0.2  # seconds that a timing should last; shorter calls are repeated
CHUNK_TOKENS = 512, 8192  # the fewest and the most tokens in a slice of the batch that are tried
LONG_ROUND, FEW = 120, 5  # a round of more than so many seconds is timed so few times

# Of issue 3, inference at dim 192 and batch 128: tokens, model, the least speed-up, and the aim. Batch 1 has
# none.
TARGETS = ((64, "DynamicViT 0.7", 1.35, 1.45), (256, "DynamicViT 0.7", 1.35, 1.45),
           (64, "LookupViT 3x3", 1.8, None),
           (256, "LookupViT 5x5", 2.2, None))

GROWTH = {"dim": 96, "batch": 8}  # of the second part
KINDS = {"ViT": "ViT", "DynamicViT": "DynamicViT 0.7", "LookupViT": "LookupViT 3x3"}
MODES = {"infer": "inference", "train": "training step"}


def make(kind, side, dim, **more):
    """A model of side x side tokens."""
    return getattr(tt.models, kind)(side * PATCH, PATCH, dim, DEPTH, HEADS, **more)


def pictures(count, side):
    return np.random.default_rng(0).standard_normal((count, 3, side * PATCH, side * PATCH), "float32")


# Part 1: savings

def models(side, dim, quick):
    """{name: (model, what is special about it)}, the ViT first."""
    keeps = (0.7,) if quick else (0.9, 0.8, 0.7, 0.6, 0.5)
    made = {"ViT": (make("ViT", side, dim), {})}
    for keep in keeps:
        model = make("DynamicViT", side, dim, prune_before=STAGES,
                     keep_ratios=[round(keep ** s, 6) for s in (1, 2, 3)])
        made[f"DynamicViT {keep}"] = model, {"keep_ratios": model.keep_ratios, "kept": model.counts}
    for n in (3,) if quick else range(2, 8):
        made[f"LookupViT {n}x{n}"] = make("LookupViT", side, dim, compressed=(n, n)), {"compressed": [n, n]}
    return made


def best_chunk(model, images, tokens):
    """(images per slice at which the model infers fastest here, seconds for all images), of one try. Each
    model gets its own: large slices leave the cache and small ones pay for calls, and one size for all would
    favour whom it suits."""
    share = -(-len(images) // cpu_count())
    least, most = CHUNK_TOKENS
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= share and least <= n * tokens <= most] or [share]
    sample = images[:sizes[-1] * cpu_count()]  # the same pictures for each size
    took = {n: min(seconds(lambda: infer(model, sample, batch_size=n)) for _ in range(3)) for n in sizes}
    chunk = min(took, key=took.get)
    return chunk, took[chunk] * len(images) / len(sample)


def savings(side, dim, batch, options):
    """The rows of one size: a model each, with milliseconds per batch and the speed-up over the ViT in the
    same round."""
    tokens, images, made, tried = side * side, pictures(batch, side), models(side, dim, options.quick), {}
    for name, (model, _) in made.items():
        tried[name] = best_chunk(model, images, tokens)
    repeats = max(1, min(50, round(ENOUGH / min(took for _, took in tried.values()))))
    long = repeats * sum(took for _, took in tried.values()) > LONG_ROUND
    rounds = min(options.rounds, FEW) if long else options.rounds
    ms = {name: [] for name in made}
    for turn in range(rounds):
        for name in turned(made, turn):
            model, chunk = made[name][0], tried[name][0]
            ms[name].append(1e3 * seconds(lambda: infer(model, images, batch_size=chunk), repeats))
    rows, counted = [], {name: tt.macs(model, images[:1]).total for name, (model, _) in made.items()}
    for name, (_, special) in made.items():
        fewer, speedup = counted["ViT"] / counted[name], quartiles([a / b for a, b in zip(ms["ViT"], ms[name])])
        rows.append({"model": name, "tokens": tokens, "dim": dim, "batch": batch, **special,
                     "macs": counted[name],
                     "macs_ratio": fewer, "speedup": speedup, "realised": realised(fewer, speedup[0]),
                     "ms": quartiles(ms[name]),
                     "chunk": tried[name][0], "rounds": rounds, "repeats": repeats, "ms_by_round": ms[name]})
    return rows


def realised(fewer_macs, speedup):
    """The share of time saved over the share of multiply-adds saved: 1 if all of the saving is real. None if
    less than 5 % of the multiply-adds are saved."""
    saved = 1 - 1 / fewer_macs
    return (1 - 1 / speedup) / saved if saved >= 0.05 else None


def savings_text(rows):
    """A Markdown table per number of tokens and width, both batch sizes side by side."""
    parts = []
    for tokens, dim in dict.fromkeys((row["tokens"], row["dim"]) for row in rows):
        here = [row for row in rows if (row["tokens"], row["dim"]) == (tokens, dim)]
        batches = list(dict.fromkeys(row["batch"] for row in here))
        lines = [f"{tokens} tokens, dim {dim}, depth {DEPTH}: rounds "
                 + ", ".join(f"{next(r['rounds'] for r in here if r['batch'] == b)} at batch {b}"
                             for b in batches),
                 "| model | M MACs | times fewer |" + "".join(f" batch {b}: ms | speed-up [quartiles] | "
                                                              f"realised | slice |"
                                                           for b in batches),
                 "|---" * (3 + 4 * len(batches)) + "|"]
        for name in dict.fromkeys(row["model"] for row in here):
            of_batch = [row for row in here if row["model"] == name]
            first = of_batch[0]
            cells = "".join(f" {row['ms'][0]:.1f} | {'{:.2f} [{:.2f}, {:.2f}]'.format(*row['speedup'])} | "
                            + ("" if row["realised"] is None else f"{100 * row['realised']:.0f} %")
                            + f" | {row['chunk']} |"
                            for row in of_batch)
            lines.append(f"| {name} | {first['macs'] / 1e6:.1f} | {first['macs_ratio']:.2f} |{cells}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def check_targets(rows):
    """The issue's targets -> [{target, measured [median, quartiles] or None, met}], and batch 1 beside them,
    without a target."""
    found = {(row["tokens"], row["dim"], row["batch"], row["model"]): row["speedup"] for row in rows}
    checked = []
    for tokens, model, least, aim in TARGETS:
        measured = found.get((tokens, 192, 128, model))
        checked.append({"target": f"{model}, {tokens} tokens, dim 192, batch 128: at least {least}x"
                        + (f" ({aim}x the aim)" if aim else ""), "measured": measured,
                        "met": measured and measured[0] >= least, "aim_met": measured and aim
                        and measured[0] >= aim,
                        "batch_1": found.get((tokens, 192, 1, model))})
    return checked


def targets_text(checked):
    lines = ["| target | measured | met | batch 1, no target |", "|---|---|---|---|"]
    show = lambda values: "not measured" if values is None else "{:.2f} [{:.2f}, {:.2f}]".format(*values)
    for row in checked:
        met = "" if row["measured"] is None else "yes" if row["met"] else "NO"
        met += "" if row["aim_met"] is None else ", the aim too" if row["aim_met"] else ", the aim not"
        lines.append(f"| {row['target']} | {show(row['measured'])} | {met} | {show(row['batch_1'])} |")
    return "\n".join(lines)


# Part 2: growth

def make_job(kind, mode, side, threads):
    """A call that infers or trains one step of the batch, as tinytoken.train does it: DynamicViT's step runs
    its teacher too."""
    model, images = make(kind, side, GROWTH["dim"]), pictures(GROWTH["batch"], side)
    micro = -(-len(images) // threads)
    if mode == "infer":
        return lambda: infer(model, images, batch_size=micro, threads=threads)
    task = Distil(model, make("ViT", side, GROWTH["dim"])) if kind == "DynamicViT" else Classify(model)
    batch, draws = (images, np.arange(len(images)) % 10), task.noise(len(images), 0, 0)
    params = model.train().parameters()
    optimizer = AdamW(params, clip=1.0)

    def step():
        loss_and_grads(task, params, batch, micro, threads, draws)
        optimizer.step()
    return step


def growth(sides, rounds):
    """Seconds (rounds interleaved over all points) and peak memory (a fresh process per point) -> a row per
    model and mode."""
    jobs = {(kind, mode, side): make_job(kind, mode, side, cpu_count()) for kind in KINDS for mode in MODES
            for side in sides}
    taken = {key: [] for key in jobs}
    for turn in range(rounds + 1):
        for key in turned(jobs, turn):
            once = seconds(jobs[key])
            if turn:  # the first is for warming up
                taken[key].append(once)
    rows = []
    for kind in KINDS:
        for mode in MODES:
            memory = [memory_of(kind, mode, side) for side in sides]
            row = {"model": KINDS[kind], "mode": mode, **GROWTH, "tokens": [side * side for side in sides],
                   "ms": [quartiles([1e3 * t for t in taken[kind, mode, side]]) for side in sides],
                   "arrays_mb": [m["arrays_mb"] for m in memory],
                   "process_mb": [m["process_mb"] for m in memory]}
            by_round = zip(*(taken[kind, mode, side] for side in sides))
            row["time_slope"] = quartiles([slope(row["tokens"], times) for times in by_round])
            row["memory_slope"] = slope(row["tokens"], row["arrays_mb"])
            rows.append(row)
    return rows


def slope(tokens, values):
    """Of log values over log tokens, by least squares."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def memory_of(kind, mode, side):
    """What a fresh process says of one point (`say_memory`)."""
    command = [sys.executable, __file__, "--point", kind, mode, str(side)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def say_memory(kind, mode, side):
    """Print the peak memory of one call, in MB (10**6 bytes), as JSON. arrays_mb: as of
    `peak_of_arrays`. process_mb: VmHWM over its value after the imports, or None where there is none.

    The slope is that of arrays_mb. process_mb also has weights, gradients, moments and BLAS buffers, which do
    not grow with tokens and so flatten a logarithmic slope; it shows that, where the arrays are large, they
    are nearly all there is. One thread has the whole batch: whether the halves of two peak together is
    chance.
    """
    imported = high_water()
    job = make_job(kind, mode, side, threads=1)
    job()
    process = None if imported is None else high_water() - imported
    print(json.dumps({"arrays_mb": peak_of_arrays(job), "process_mb": process}))


def growth_text(rows):
    tokens = rows[0]["tokens"]
    lines = [f"growth: dim {GROWTH['dim']}, depth {DEPTH}, batch {GROWTH['batch']}; ms are medians; MB: peak "
             f"of a call's arrays "
             "/ of the process, imports not counted",
             f"| model | {' | '.join(f'{n} tokens' for n in tokens)} | slope of time [quartiles] | slope of "
             f"memory |",
             "|---" * (len(tokens) + 3) + "|"]
    for row in rows:
        cells = [f"{ms[0]:.1f} ms, {arrays:.1f} / " + ("?" if process is None else f"{process:.0f}") + " MB"
                 for ms, arrays, process in zip(row["ms"], row["arrays_mb"], row["process_mb"])]
        lines.append(f"| {row['model']}, {MODES[row['mode']]} | {' | '.join(cells)} "
                     f"| {'{:.2f} [{:.2f}, {:.2f}]'.format(*row['time_slope'])} | {row['memory_slope']:.2f} |")
    return "\n".join(lines)


def draw(rows, path):
    """Two panels, time and peak memory over tokens, slopes in the legends -> a line that says where, or why
    not."""
    try:
        from matplotlib import figure
    except ImportError:
        return "no picture: matplotlib is not installed"
    made = figure.Figure(figsize=(11, 5.2), layout="constrained")
    panels = (("time, ms", lambda row: [ms[0] for ms in row["ms"]], lambda row: row["time_slope"][0]),
              ("peak memory of the arrays, MB", lambda row: row["arrays_mb"],
               lambda row: row["memory_slope"]))
    for axis, (title, values, slope_of) in zip(made.subplots(1, 2), panels):
        for row in sorted(rows, key=lambda row: row["mode"], reverse=True):
            axis.plot(row["tokens"], values(row), marker="o", markersize=4, linestyle="-"
                      if row["mode"] == "train" else "--",
                      color=f"C{list(KINDS.values()).index(row['model'])}", linewidth=4
                      if row["model"] == "ViT" else 1.5,
                      label=f"{row['model']}, {MODES[row['mode']]}: slope {slope_of(row):.2f}")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=title)
        axis.set_xticks(rows[0]["tokens"], [str(n) for n in rows[0]["tokens"]], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    made.suptitle(f"dim {GROWTH['dim']}, depth {DEPTH}, batch {GROWTH['batch']}; log-log slopes by least "
                  f"squares", fontsize=9)
    with replacing(path) as file:
        made.savefig(file, format="png", dpi=120)
    return f"picture: {path}"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sizes and 3 rounds: does it run?")
    parser.add_argument("--part", choices=("savings", "growth"), help="only this part")
    parser.add_argument("--rounds", type=int, help="paired rounds, at least 2 (default 9, quick 3)")
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON, and the picture beside "
                                                         "it as .png")
    parser.add_argument("--point", nargs=3, metavar=("KIND", "MODE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        check_target(options.out, ".json")
    options.rounds = options.rounds or (3 if options.quick else 9)
    if options.rounds < 2:
        parser.error("--rounds: at least 2, or there are no quartiles")
    return options


def main(options):
    tt.manual_seed(0)
    result = {"machine": machine("cpu"), "threads": cpu_count(), "malloc": prepare_cpu(),
              "quick": options.quick, "rounds": options.rounds, "spread": "lower and upper quartile over "
                                                                          "rounds",
              "weights": "untrained", "patch": PATCH, "depth": DEPTH, "heads": HEADS, "pruned_before": STAGES,
              "few_rounds": f"{FEW} where a round takes more than {LONG_ROUND} s",
              "began": time.strftime("%Y-%m-%d %H:%M:%S")}
    print(json.dumps(result, indent=1), flush=True)
    if options.part != "growth":
        sizes = [(8, 192, (1, 128))] if options.quick else [(side, dim, (1, 128)) for side in (8, 16, 32)
                                                            for dim in (96, 192)]
        result["savings"] = []
        for side, dim, batches in sizes:
            rows = [row for batch in batches for row in savings(side, dim, batch, options)]
            result["savings"] += rows
            print(f"\n{savings_text(rows)}", flush=True)
        result["targets"] = check_targets(result["savings"])
        print(f"\n{targets_text(result['targets'])}", flush=True)
    if options.part != "savings":
        result["growth"] = growth((4, 6, 8) if options.quick else (8, 12, 16, 24, 32), options.rounds)
        print(f"\n{growth_text(result['growth'])}")
    if options.quick:
        print("\n--quick: these numbers show that it runs, and measure nothing")
    if options.out:
        write_json(options.out, result)
        print(f"\nwritten: {options.out}")
        if "growth" in result:
            print(draw(result["growth"], options.out.with_suffix(".png")))


if __name__ == "__main__":
    options = parse()
    if options.point:
        kind, mode, side = options.point
        say_memory(kind, mode, int(side))
    else:
        main(options)
