"""What the compiled ops (extra `fast`) save: each op, and whole steps of models, plain and compiled in
alternation on one thread.

    python tests/benchmarks/compiled.py [--quick] [--rounds N] [--out FILE.json]

Ratios are compiled / plain of the same round: below 1 the compiled one is faster. Both compute the same,
which is checked first. CPU time of one thread, which other programs disturb less. Ctrl-C ends it at any time.
"""
import argparse
import pathlib
import time

import numpy as np

import tinytoken as tt
from timing import quartiles, seconds
from tinytoken import bench, ops
from tinytoken.backend import blas_threads, prepare_cpu
from tinytoken.experiments import machine
from tinytoken.files import check_target, write_json
from tinytoken.tensor import Tensor, grad

ROUNDS = 9
# 64 tokens, dim 96, depth 6, 4 heads; a ConvNeXt of dim 48
MODELS = {"ViT": ("vit", {}), "DynamicViT .7": ("dynamicvit", {}), "LookupViT 3x3": ("lookupvit", {}),
          "ConvNeXt": ("convnext", {"dim": 48})}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def cases():
    """{name: (op, arrays, settings)} at the sizes of a slice of 32 images in a ViT of dim 96, 4 heads,
    and of 16 in a ConvNeXt."""
    tokens, q = (32, 65, 96), [normal(32, 4, 65, 24, seed=i) for i in range(3)]
    keep = np.random.default_rng(0).random((32, 65)).round().astype("float32")
    look = normal(32, 4, 9, 24), normal(32, 4, 64, 24, seed=1), normal(32, 4, 64, 24, seed=2)
    A = ops.softmax(normal(32, 4, 9, 64)).data
    maps = normal(16, 96, 16, 16), normal(96, 1, 7, 7), normal(96)
    return {"layer_norm": (ops.layer_norm, [normal(*tokens), normal(96), normal(96)], {}),
            "gelu": (ops.gelu, [normal(32, 65, 384)], {}),
            "softmax": (ops.softmax, [normal(32, 4, 65, 65)], {}),
            "attention": (ops.attention, q, {}),
            "attention, keep": (ops.attention, [*q, keep], {}),
            "lookup_gather": (ops.lookup_gather, look, {}),
            "conv2d 7x7": (ops.conv2d, maps, {"padding": 3, "groups": 96}),
            "lookup_infuse": (ops.lookup_infuse, [A, normal(32, 4, 9, 64), look[0]], {"reuse": "resoftmax"})}


def forward_and_gradients(op, arrays, settings):
    """-> (call of the forward pass, call of both passes)."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]

    def forward():
        with tt.no_grad():
            return op(*leaves, **settings)

    def both():
        out = op(*leaves, **settings)
        out = out[0] if isinstance(out, tuple) else out
        return [out.data, *grad(out, leaves, gradient=upstream)]
    first = forward()
    upstream = normal(*(first[0] if isinstance(first, tuple) else first).shape, seed=9)
    return forward, both


def plainly(call):
    with tt.plain():
        return call()


def alternating(call, rounds, repeats=1):
    """{"plain_ms", "compiled_ms", "ratio"}: median and quartiles of the CPU time of both."""
    ways, taken = (lambda: plainly(call), call), []
    for turn in range(rounds + 1):
        one = [seconds(way, repeats, time.thread_time) for way in (ways if turn % 2 else ways[::-1])]
        taken.append(one if turn % 2 else one[::-1])
    taken = taken[1:]  # the first is for warming up
    return {"plain_ms": quartiles([1e3 * a for a, _ in taken]),
            "compiled_ms": quartiles([1e3 * b for _, b in taken]),
            "ratio": quartiles([b / a for a, b in taken])}


def row(name, way, times):
    print(f"{name:<18}{way:<10}{times['plain_ms'][0]:>9.2f}{times['compiled_ms'][0]:>10.2f} ms   "
          "ratio {:.2f} [{:.2f}, {:.2f}]".format(*times["ratio"]), flush=True)
    return {"name": name, "way": way, **times}


def of_ops(rounds):
    rows = []
    for name, case in cases().items():
        forward, both = forward_and_gradients(*case)
        for mine, its in zip(both(), plainly(both), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-4 * np.abs(its).max())
        for way, call in (("forward", forward), ("both", both)):
            rows.append(row(name, way, alternating(call, rounds, 3)))
    optimizer = bench.Job("vit", batch=1, dim=96, depth=6, heads=4).optimizer
    optimizer.flat.grad[...] = normal(optimizer.flat.grad.size)
    return rows + [row("AdamW", "step", alternating(optimizer.step, rounds, 3))]


def of_models(rounds):
    rows = []
    for name, (kind, sizes) in MODELS.items():
        job = bench.Job(kind, batch=128, threads=1, **{"dim": 96, "depth": 6, "heads": 4} | sizes)
        for way, call in (("step", job.step), ("infer", job.infer)):
            rows.append(row(name, way, alternating(call, rounds)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    options = parser.parse_args()
    if options.out:
        check_target(options.out, ".json")
    rounds = 3 if options.quick else max(3, options.rounds)
    result = {"machine": machine("cpu"), "malloc": prepare_cpu(), "rounds": rounds,
              "clock": "CPU time of one thread", "spread": "median, lower and upper quartile"}
    with blas_threads(1):
        result |= {"ops": of_ops(rounds), "models": of_models(rounds)}
    if options.out:
        write_json(options.out, result)
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
