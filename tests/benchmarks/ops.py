"""What the engine adds to NumPy: attention and layer norm beside the same formulas written by hand, and the
graph's own cost. And convolutions beside PyTorch's, where PyTorch is installed.

    python tests/benchmarks/ops.py [--quick] [--rounds N] [--out FILE.json]

By hand means one function, forward and backward, without the engine. Both are timed on one thread and in CPU
time, which other programs disturb less, in alternation; a ratio above 1 says what the engine's op takes more.

The graph's cost is what a training step takes beyond its ops: a step is run once by the engine and once by
calling the same functions and vjps in the same order on the same arrays, without a graph. At toy width the
difference is nearly all there is; the cost does not depend on the width, so it is taken there and put beside
the step of full size.
"""
import argparse
import math
import pathlib
import statistics
import time

import numpy as np

from timing import quartiles, seconds
from tinytoken import bench, ops, tensor
from tinytoken.backend import blas_threads, faster, prepare_cpu
from tinytoken.experiments import machine
from tinytoken.files import check_target, write_json

# images, tokens, dim, heads: workloads A, B and C
SHAPES = ((16, 65, 192, 3), (16, 65, 96, 3), (8, 197, 384, 6))
SMALL = dict(dim=12, heads=3, image_size=8)  # four patches: what is left is what Python does
STEPS = {"A": ("vit", dict(dim=192, depth=6)), "B": ("vit", dict(dim=96, depth=4)),
         "DynamicViT 96": ("dynamicvit", dict(dim=96, depth=6)),
         "LookupViT 96": ("lookupvit", dict(dim=96, depth=6))}


# images, channels, side, filters, kernel, stride, groups: two of LV-ViT's stem on pictures of 32 x 32, one of
# it at 224; ConvNeXt's stem, at 32 and 224, and depthwise ones
CONVOLUTIONS = ((16, 3, 32, 64, 7, 2, 1), (16, 64, 16, 64, 3, 1, 1), (2, 64, 112, 64, 3, 1, 1),
                (16, 3, 32, 96, 4, 4, 1), (2, 3, 224, 96, 4, 4, 1),
                (16, 96, 16, 96, 7, 1, 96), (16, 96, 8, 96, 7, 1, 96), (16, 192, 4, 192, 7, 1, 192))


# By hand

def attention_by_hand(qkv, g, heads):
    """Packed qkv (B, T, 3 D) and the gradient of the output (B, T, D) -> output, gradient of qkv."""
    B, T, D = g.shape
    size = D // heads
    scale = 1 / math.sqrt(size)
    q, k, v = qkv.reshape(B, T, 3, heads, size).transpose(2, 0, 3, 1, 4)
    A = (q * scale) @ k.swapaxes(-1, -2)
    A -= A.max(axis=-1, keepdims=True)
    np.exp(A, out=A)
    A /= A.sum(axis=-1, keepdims=True)
    out = (A @ v).transpose(0, 2, 1, 3).reshape(B, T, D)

    g = g.reshape(B, T, heads, size).transpose(0, 2, 1, 3)
    d_qkv = np.empty((B, T, 3, heads, size), qkv.dtype)
    dq, dk, dv = d_qkv.transpose(2, 0, 3, 1, 4)
    np.matmul(A.swapaxes(-1, -2), g, out=dv)
    d_scores = g @ v.swapaxes(-1, -2)
    d_scores -= np.vecdot(d_scores, A)[..., None]
    d_scores *= A
    d_scores *= scale
    np.matmul(d_scores, k, out=dq)
    np.matmul(d_scores.swapaxes(-1, -2), q, out=dk)
    return out, d_qkv.reshape(qkv.shape)


def layer_norm_by_hand(x, weight, bias, g, eps=1e-6):
    """-> output, gradients of x, weight and bias."""
    rows, up = x.reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
    mean, ones = np.full(rows.shape[1], 1 / rows.shape[1], x.dtype), np.ones(len(rows), x.dtype)
    normed = rows - (rows @ mean)[:, None]
    scale = 1 / np.sqrt(np.vecdot(normed, normed) / rows.shape[1] + eps)[:, None]
    normed *= scale
    out = normed * weight
    out += bias

    d_weight, d_bias = ones @ (up * normed), ones @ up
    u = up * weight
    along = np.vecdot(u, normed)[:, None] / rows.shape[1]
    u -= (u @ mean)[:, None]
    u -= normed * along
    u *= scale
    return out.reshape(x.shape), u.reshape(x.shape), d_weight, d_bias


# By the engine's ops. In a graph gradients pass from node to node by reference, so the ops are called as the
# graph calls them.

def gradients(vjp, *upstream):
    """What a vjp returns, all of it asked for."""
    entries = vjp(*upstream)
    entries = entries if isinstance(entries, tuple) else (entries,)
    return [entry() if callable(entry) else entry for entry in entries]


def attention_by_ops(qkv, g, heads):
    parts, split = ops.split_heads.function(qkv, heads=heads, parts=3)
    attended, attend = ops.attention.function(*parts)
    out, merge = ops.merge_heads.function(attended)
    dq, dk, dv, _ = gradients(attend, *gradients(merge, g))
    return out, *gradients(split, dq, dk, dv)


def layer_norm_by_ops(x, weight, bias, g):
    out, vjp = ops.layer_norm.function(x, weight, bias)
    return out, *gradients(vjp, g)


def beside_hand(rounds):
    """A row per op and shape, after a check that both compute the same."""
    random, rows = np.random.default_rng(0), []
    normal = lambda *shape: random.standard_normal(shape, "float32")
    for images, tokens, dim, heads in SHAPES:
        g = normal(images, tokens, dim)
        pairs = {"attention": (attention_by_ops, attention_by_hand,
                               (normal(images, tokens, 3 * dim), g, heads)),
                 "layer norm": (layer_norm_by_ops, layer_norm_by_hand,
                                (normal(images, tokens, dim), normal(dim), normal(dim), g))}
        for name, (engine, hand, arguments) in pairs.items():
            for mine, its in zip(engine(*arguments), hand(*arguments), strict=True):
                np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-3)
            times = alternating(lambda: engine(*arguments), lambda: hand(*arguments), rounds, repeats=5)
            rows.append({"op": name, "images": images, "tokens": tokens, "dim": dim, "heads": heads, **times})
            print(f"{name:<11}{images:>4} x {tokens} x {dim}: by hand {rows[-1]['second_ms'][0]:.2f} ms, "
                  "engine / hand {:.2f} [{:.2f}, {:.2f}]".format(*rows[-1]["ratio"]), flush=True)
    return rows


def alternating(first, second, rounds, repeats=1):
    """CPU milliseconds of both, and the ratio first / second of each round."""
    taken = []
    for turn in range(rounds + 1):
        one = [seconds(call, repeats, time.thread_time)
               for call in ((first, second) if turn % 2 else (second, first))]
        taken.append(one if turn % 2 else one[::-1])
    taken = taken[1:]  # the first is for warming up
    return {"first_ms": quartiles([1e3 * a for a, _ in taken]),
            "second_ms": quartiles([1e3 * b for _, b in taken]),
            "ratio": quartiles([a / b for a, b in taken])}


def beside_torch(rounds):
    """A row per convolution, after a check that both compute the same: forward pass and all gradients. Where
    Numba is installed the depthwise ones run compiled."""
    try:
        import torch
    except ImportError:
        print("no convolutions beside PyTorch: it is not installed")
        return []
    torch.set_num_threads(1)
    random, rows = np.random.default_rng(0), []
    for images, channels, side, filters, kernel, stride, groups in CONVOLUTIONS:
        arrays = [random.standard_normal(shape, "float32") for shape in (
            (images, channels, side, side), (filters, channels // groups, kernel, kernel), (filters,))]
        settings = dict(stride=stride, padding=0 if stride == kernel else kernel // 2, groups=groups)
        run = faster(ops.conv2d, np, *arrays, **settings)
        tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
        g = random.standard_normal(ops.conv2d.function(*arrays, **settings)[0].shape, "float32")

        def engine():
            out, vjp = (run or ops.conv2d.function)(*arrays, **settings)
            return out, *gradients(vjp, g)

        def peer():
            out = torch.nn.functional.conv2d(*tensors, **settings)
            return out, *torch.autograd.grad(out, tensors, torch.from_numpy(g))
        for mine, its in zip(engine(), peer(), strict=True):
            np.testing.assert_allclose(mine, its.detach().numpy(), rtol=1e-3, atol=1e-3 * np.abs(mine).max())
        times = alternating(engine, peer, rounds)
        rows.append({"op": "conv2d", "images": images, "channels": channels, "side": side, "filters": filters,
                     "kernel": kernel, "compiled": run is not None, **settings, **times})
        print(f"conv2d {images} x {channels} x {side} x {side}, {filters} filters of {kernel}, stride "
              f"{stride}, {groups} groups{', compiled' * (run is not None)}: "
              f"PyTorch {rows[-1]['second_ms'][0]:.2f} ms, "
              "engine / PyTorch {:.2f} [{:.2f}, {:.2f}]".format(*rows[-1]["ratio"]), flush=True)
    return rows


# The graph

class Replay:
    """The functions and vjps that one gradient computation of a job runs, recorded by the engine, to be run
    without it."""

    def __init__(self, job):
        self.calls, plain = [], {op: op.function for op in tensor.registry.values()}
        try:
            for op, function in plain.items():
                op.function = self.recorder(function)
            job.gradients(threads=1)
        finally:
            for op, function in plain.items():
                op.function = function

    def recorder(self, function):
        def run(*arrays, **settings):
            out, vjp = function(*arrays, **settings)
            call = [function, arrays, settings, None, ()]
            self.calls.append(call)

            def recorded(*upstream):
                entries = vjp(*upstream)
                call[3] = upstream
                entries = entries if isinstance(entries, tuple) else (entries,)
                return tuple(self.marked(call, i, entry) if callable(entry) else entry for i,
                             entry in enumerate(entries))
            return out, vjp and recorded
        return run

    def marked(self, call, place, entry):
        """The entry, noting that the engine asked for it."""
        def run():
            call[4] += (place,)
            return entry()
        return run

    def __call__(self):
        vjps = [(function(*arrays, **settings)[1], upstream, asked) for function, arrays, settings, upstream,
                asked in self.calls]
        for vjp, upstream, asked in reversed(vjps):
            if upstream is not None:
                entries = vjp(*upstream)
                for place in asked:
                    (entries[place] if isinstance(entries, tuple) else entries)()


def graph_cost(rounds):
    """Per kind of step: nodes, the graph's microseconds per node, and its share of the full step's CPU
    time."""
    rows = []
    for name, (kind, sizes) in STEPS.items():
        grid = {"compressed": (2, 2)} if kind == "lookupvit" else {}
        small, full = bench.Job(kind, batch=1, **(sizes | SMALL | grid)), bench.Job(kind, batch=64, **sizes)
        replay = Replay(small)
        times = alternating(lambda: small.gradients(threads=1), replay, rounds, repeats=5)
        slices = -(-64 // full.micro)
        full.step()
        step = statistics.median(seconds(lambda: (full.gradients(threads=1), full.optimizer.step()), 1,
                                         time.thread_time)
                                 for _ in range(3))
        cost = 1e-3 * (times["first_ms"][0] - times["second_ms"][0])
        rows.append({"step": name, "ops": len(replay.calls), "slices": slices, "batch": 64,
                     "engine_small_ms": times["first_ms"],
                     "replay_small_ms": times["second_ms"],
                     "microseconds_per_op": 1e6 * cost / len(replay.calls),
                     "step_ms": 1e3 * step, "share": slices * cost / step})
        print(f"{name:<14}{len(replay.calls):>4} ops x {slices} slices, "
              f"{rows[-1]['microseconds_per_op']:.1f} us each for the graph: "
              f"{100 * rows[-1]['share']:.1f} % of a step of {1e3 * step:.0f} ms (CPU time, one thread)",
              flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
    options = parser.parse_args()
    if options.out:
        check_target(options.out, ".json")
    rounds = 3 if options.quick else max(3, options.rounds)
    result = {"machine": machine("cpu"), "malloc": prepare_cpu(), "rounds": rounds,
              "clock": "CPU time of one thread",
              "spread": "median, lower and upper quartile"}
    with blas_threads(1):
        result |= {"by_hand": beside_hand(rounds), "beside_torch": beside_torch(rounds),
                   "graph": graph_cost(rounds)}
    if options.out:
        write_json(options.out, result)
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
