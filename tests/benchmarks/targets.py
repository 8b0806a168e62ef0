"""What a CPU is to reach: plain ops beside those of another checkout, compiled ones beside PyTorch at its
best, and what token methods save on the clock beside what they save in multiply-adds.

    python tests/benchmarks/targets.py --today CHECKOUT [--rounds N] [--cpus 1,2] [--out FILE.json]

The rows are those of cpu.py, the savings those of tokens.py, both of interleaved rounds. Every row is written
as soon as it is measured, and the same command goes on after it.
"""
import argparse
import json
import pathlib

import cpu
import tinytoken as tt
import tokens
from tinytoken.backend import cpu_count, prepare_cpu
from tinytoken.experiments.tables import markdown_table
from tinytoken.files import check_target, write_json

CONTENDERS = ("plain", "today", "tinytoken", "torch-best")
INFER, TRAIN, BOTH = ("infer",), ("train",), ("train", "infer")
# workloads, modes, the most plain / today, the most compiled / PyTorch at its best
TIMES = ((("A",), INFER, 0.92, 1.00), (("B",), INFER, 0.88, 0.90), (("A",), TRAIN, 0.97, 1.00),
         (("B",), TRAIN, 0.97, 0.92),
         (("DynamicViT 192", "DynamicViT 96", "LookupViT 192", "LookupViT 96"), BOTH, 0.95, 0.95),
         (tuple(f"{kind} 192, batch 1" for kind in ("ViT", "DynamicViT", "LookupViT")), INFER, 0.90, 0.90))
MEMORY = ("A", 1.00, 0.35)  # peak of the process in training, the same two ratios
REALISED = 0.95  # of the multiply-adds saved at batch 128; at batch 1 the least speed-up over the ViT is 1
SAVINGS = ((8, 128), (16, 128), (8, 1))  # patches along a side, images


def judged(name, cpus, what, ratio, most):
    """A line of the table. ratio: [median, quartiles], or one number."""
    median, *spread = ratio if isinstance(ratio, list) else [ratio]
    text = f"{median:.2f}" + (" [{:.2f}, {:.2f}]".format(*spread) if spread else "")
    return [name, str(cpus), what, text, f"{most:.2f}",
            "hit" if median <= most else f"missed by {median - most:.2f}"]


def of_times(rows):
    """Lines of cpu.py's rows: times, and the peak memory of A's training."""
    lines = []
    for names, modes, plain, compiled in TIMES:
        pairs = (("plain / today", "today", "plain", plain),
                 ("compiled / torch-best", "torch-best", "tinytoken", compiled))
        for row in (row for row in rows if row["workload"] in names):
            for mode in (mode for mode in modes if mode in row["ms"]):
                for what, peer, own, most in pairs:
                    ratio, name = row.get(f"ratio_to_{peer}", {}).get(mode, {}).get(own), row["workload"]
                    if ratio:
                        lines.append(judged(f"{name} {mode}", row["cpus"], what, ratio, most))
    workload, plain, compiled = MEMORY
    for row in (row for row in rows if row["workload"] == workload):
        mb = {name: got[0] for name, got in row["peak_memory_mb"]["train"].items()}
        for what, a, b, most in (("plain / today", "plain", "today", plain),
                                 ("compiled / torch-best", "tinytoken", "torch-best", compiled)):
            if a in mb and b in mb:
                lines.append(judged(f"{workload} peak memory", row["cpus"], what, mb[a] / mb[b], most))
    return lines


def of_savings(rows):
    """Lines of tokens.py's rows."""
    lines = []
    for row in (row for row in rows if row["model"] != "ViT"):
        name = f"{row['model']}, {row['tokens']} tokens, batch {row['batch']}"
        if row["batch"] == 1:
            median, low, high = row["speedup"]
            lines.append(judged(name, cpu_count(), "time / ViT", [1 / median, 1 / high, 1 / low], 1))
        else:
            lines.append([name, str(cpu_count()), "share of MACs saved that is saved in time",
                          f"{row['realised']:.2f}", f"{REALISED:.2f}",
                          "hit" if row["realised"] >= REALISED
                          else f"missed by {REALISED - row['realised']:.2f}"])
    return lines


def report(result):
    heads = ("what", "CPUs", "ratio", "median [quartiles]", "target", "")
    return markdown_table(heads, of_times(result["rows"]) + of_savings(result.get("savings", [])))


def main(options):
    names = [name for workloads, *_ in TIMES for name in workloads]
    arguments = ["--today", str(options.today), "--contenders", ",".join(CONTENDERS),
                 "--cpus", ",".join(map(str, options.cpus)), "--rounds", str(options.rounds),
                 "--workloads", *dict.fromkeys(names)]
    result = cpu.main(cpu.parse(arguments + (["--out", str(options.out)] if options.out else [])))
    prepare_cpu()
    tt.manual_seed(0)
    for side, batch in SAVINGS:
        there = {(row["tokens"], row["batch"]) for row in result.get("savings", [])}
        if (side * side, batch) not in there:
            settings = argparse.Namespace(quick=True, rounds=options.rounds)
            result["savings"] = result.get("savings", []) + tokens.savings(side, 192, batch, settings)
            if options.out:
                write_json(options.out, result)
    print(f"\n{report(result)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--today", type=pathlib.Path,
                        help="another checkout of tinytoken, whose plain ops are the ones to beat")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpus", type=lambda text: [int(n) for n in text.split(",")],
                        default=[1, cpu_count()])
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    parser.add_argument("--show", type=pathlib.Path, help="only the table, of such a file")
    options = parser.parse_args()
    if options.show:
        print(report(json.loads(options.show.read_text())))
    elif options.today is None:
        parser.error("--today or --show expected")
    else:
        if options.out:
            check_target(options.out, ".json")
        main(options)
