# %% [markdown]
# # Lesson 13: From one kernel to a captured step
# After this lesson you can count what a training step launches and how many bytes it moves through memory.
# You can say which numbers may be bf16, and compute attention without keeping its weights in memory. And you
# can repeat a whole step with one call, without freezing what must change from step to step.
#
# Lesson 12 found that the step of a small model on a GPU waits for its launches. There are two remedies.
# **Fusing** makes one kernel out of many array calls: there are fewer launches, and less to read and write.
# **Capturing** records the launches of a step and repeats them with one call, as a *CUDA graph*.
# `tinytoken/cuda/` does both. In this lesson we study each idea on a CPU. What needs a GPU is left out if
# there is none, and the lesson says so.

# %%
import collections
import contextlib
import math
from unittest import mock

import numpy as np

import tinytoken as tt
from tinytoken import backend, nn, ops, optim, tensor
from tinytoken.cuda import capture, gemm, launcher
from tinytoken.cuda.weights import Weights
from tinytoken.experiments import lesson
from tinytoken.models import ViT
from tinytoken.train import AdamW, Classify, accuracy, fit, infer, loss_and_grads, products_in
from tinytoken.train.step import Work

here = lesson.begin("13_one_step")
on_gpu, xp, rng = here.device == "cuda", backend.module_for(here.device), np.random.default_rng(here.seed)
SIZES = here.pick(dict(patch_size=8, dim=32, depth=2, heads=2), {}, {})


def table(title, columns, rows, form):
    for name, row in ({title: columns} | rows).items():
        print(f"{name:<42}" + "".join(f"{value:>16{form if name in rows else ''}}" for value in row))


# %% [markdown]
# ## What a step costs in launches
# As in lesson 12, NumPy tells a subclass of its arrays about every call, and a call is one launch or more.
# Two things are new. We count the calls of each op separately: under `tensor.around(named)` the engine runs
# each op inside our function `named`. And we count bytes: each array that a call gets is read once, and its
# result is written once.

# %%
# by group of ops: calls; bytes read and written
launches, moved = collections.Counter(), collections.Counter()
running = ["no op"]  # the ops that are being computed, the innermost last
GROUPS = {"linear": "linear", "layer_norm": "layer norm", "attention": "attention", "gelu": "GELU",
          "attention_branch": "whole branches",
          "mlp_branch": "whole branches", "gradients": "adding gradients", "no op": "AdamW, and all outside "
                                                                                    "ops"}


def named(op, way, shapes, run):
    """For tensor.around: run(), noted under the op's name; the sums of gradients have a name of their own."""
    running.append("gradients" if way == "add" else op.name)
    result = run()
    running.pop()
    return result


def note(read, written):
    """A launch that reads these arrays and writes those."""
    group = GROUPS.get(running[-1], "other ops")
    launches[group] += 1
    for arrays in (read, written):
        moved[group] += sum({a.ctypes.data: a.nbytes for a in arrays if isinstance(a, np.ndarray)}.values())


class Counted(np.ndarray):
    """An array that notes the elementwise functions, sums and products that it is computed with. Views launch
    nothing."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        bare = lambda arrays: tuple(a.view(np.ndarray) if isinstance(a, Counted) else a for a in arrays)
        result = np.asarray(getattr(ufunc, method)(*bare(inputs), **options,
                                                   **({"out": bare(out)} if out else {})))
        note(inputs, (result,))
        return out[0] if out else result.view(Counted)

    # concatenate makes a plain array of Counted ones
    def __array_function__(self, function, types, args, options):
        result = super().__array_function__(function, types, args, options)
        return result.view(Counted) if isinstance(result, np.ndarray) else result


# %% [markdown]
# The plain ops are counted as CuPy would run them: CuPy has no `vecdot`, and has an erf of its own. The fused
# ops are counted without running them. `backend.using_implementations("cupy")` selects for NumPy arrays what
# is registered for CuPy's arrays, and `launcher.running_on(f)` passes each launch to f, which notes it and
# runs nothing. All results are then zeros, but the launches do not depend on the values. A matrix product is
# one launch, of NVIDIA's library.

# %%
@contextlib.contextmanager
def replaced(*places):
    """Context: each (module, name, function) with the function in the name's place."""
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch.object(*place))
        yield


def as_on_cupy():
    dot = lambda a, b: (a * b).sum(axis=-1)
    return replaced((ops.norm, "vecdot", dot), (ops.attend, "vecdot", dot),
                    # tanh: one call, as erf is
                    (ops.activation, "normal_cdf", lambda x: 0.5 * (1 + np.tanh(x * 0.7))))


def launched(kernel, blocks, threads, arguments, shared):
    given = [(array, out) for array, (*_, out) in zip(arguments, kernel.parameters)]
    note([array for array, out in given if not out], [array for array, out in given if out])


def empty(like, *shape, dtype="float32"):
    return np.zeros(shape, dtype).view(Counted)


def product(a, b, *, ta=False, tb=False, bias=None, add=None, out=None, dtype="float32"):
    out = empty(a, a.shape[ta], b.shape[1 - tb], dtype=dtype) if out is None else out
    note((a, b, bias, add), (out,))
    return out


@contextlib.contextmanager
def on_paper(precision):
    """The kernels of tinytoken.cuda in the ops' place, for NumPy arrays; noted, not run."""
    with replaced((launcher, "empty", empty), (launcher, "most_shared", lambda: 227 * 1024),
                  (gemm, "product", product), (gemm, "library", lambda: True)):
        with backend.using_implementations("cupy"), launcher.running_on(launched), gemm.precision(precision):
            yield


def counted_step(pictures, precision):
    """(launches, bytes) by group of a training step, by the plain ops (None) or the fused ones."""
    task, shape = Classify(ViT(**SIZES)), (pictures, 3, 32, 32)
    optimizer = AdamW(task.model.parameters(), clip=1.0)
    flat = optimizer.flat
    flat.data, flat.grad, optimizer.m, optimizer.v = (a.view(Counted)
                                                      for a in (flat.data, flat.grad, optimizer.m,
                                                                optimizer.v))
    batch = rng.standard_normal(shape).astype("float32").view(Counted), rng.integers(0, 10, pictures)
    launches.clear()
    moved.clear()
    with on_paper(precision) if precision else as_on_cupy(), mock.patch.object(optim, "BLOCK",
                                                                               flat.data.size):
        with Weights(flat).in_use() if precision else contextlib.nullcontext(), tensor.around(named):
            loss_and_grads(task, optimizer.params, batch, pictures, threads=1)
        optimizer.step(1e-3)
    return launches.copy(), moved.copy()


WAYS = {"plain ops": None, "fused, float32": "fp32", "fused, bf16": "bf16"}
counted, per_picture = [], []
for precision in WAYS.values():
    (count, few), (same, more) = counted_step(4, precision), counted_step(8, precision)
    assert count == same  # whatever the batch
    counted.append(count)
    # what does not grow with the batch, AdamW's say, drops out
    per_picture.append((sum(more.values()) - sum(few.values())) / 4)
all_launches = [sum(count.values()) for count in counted]
counts = {group: [count[group] for count in counted]
          for group in (*dict.fromkeys(GROUPS.values()), "other ops")}
# seconds, assumed: lesson 12 measures it; bytes a second, of a copy on one H100, measured elsewhere
PER_LAUNCH, BANDWIDTH = 5e-6, 3.0e12
breaks_even = [n * PER_LAUNCH / (size / BANDWIDTH) for n, size in zip(all_launches, per_picture)]
table("launches of a ViT's training step", WAYS, counts | {"together": all_launches}, "d")
table("", WAYS, {"ms, at 5 us for a launch": [1e3 * n * PER_LAUNCH for n in all_launches],
                 "MB read and written for a picture": [size / 1e6 for size in per_picture],
                 "us for that, at 3 TB/s": [1e6 * size / BANDWIDTH for size in per_picture],
                 "pictures that take as long as the launches": breaks_even}, ".1f")
assert all_launches[0] > 2 * all_launches[1] and all_launches[1] > 1.1 * all_launches[2] and breaks_even[2] > breaks_even[1]
assert per_picture[0] > 2 * per_picture[1] and per_picture[1] > 1.5 * per_picture[2]


def draw_launches(figure):
    axes, left = figure.subplots(), np.zeros(3)
    colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#999999")
    for (group, row), colour in zip(counts.items(), colours):
        axes.barh(list(WAYS), row, left=left, height=0.6, color=colour, label=group)
        left += row
    for y, n in enumerate(all_launches):
        axes.text(n + 5, y, n, va="center")
    axes.set(xlabel="launches", xlim=(0, 1.08 * left.max()), title="A training step of the ViT, by op")
    axes.invert_yaxis()
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.24))


here.picture("launches", draw_launches, 9, 3.2)

# %% [markdown]
# (The count does not see arrays that are made from nothing, copies, and the making of the batch. So it is a
# lower bound. Lesson 12 counted the calls as NumPy runs them, and did not count the sums of gradients into
# flat storage.)
#
# A step takes at least 5 us for each launch, and at least its bytes divided by the bandwidth. For batches
# smaller than the last line says, the launches take longer than the bytes. bf16 halves the bytes but saves
# few launches, so the number in this line *rises* again. The launches that are left need another remedy: see
# "A graph repeats what was captured".
#
# ## One kernel: layer norm
# A layer norm is y = (x - mean) / sqrt(variance + eps) weight + bias, for each row of x. The plain op
# (`tinytoken/ops/norm.py`) is a sequence of array calls. Count by hand how often it reads or writes an array
# of the size of x. The mean reads 1. The difference reads 1 and writes 1, and so does its square. The sum of
# the squares reads 1. The products with the scale and with the weight, and the addition of the bias, read and
# write 1 each. That is 12 passes together.
#
# The kernel uses a *warp* for each row: 32 threads that run together. Each thread, or lane, adds up every
# 32nd number. Then it exchanges its sum with the lane at a distance of 16, 8, 4, 2 and 1. After these five
# exchanges, each lane has the sum over the whole row. x is read from memory once (later it is found in the
# cache), and y is written once: 2 passes. Here is `layer_norm_forward` of `tinytoken/cuda/sources/norm.cu` in
# NumPy, for all rows at once:


# %%
def warp_sum(lanes):
    """(rows, 32) -> the sum of each row, in every lane."""
    for step in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, np.arange(32) ^ step]
    assert (lanes == lanes[:, :1]).all()  # to the bit: no lane has to tell the others
    return lanes


def norm_by_warps(x, weight, bias, eps=1e-6):
    lanes = x.reshape(len(x), -1, 32)  # lane i has the columns i, i + 32, ...
    centred = lanes - (warp_sum(lanes.sum(axis=1)) / x.shape[1])[:, None]
    factor = 1 / np.sqrt(warp_sum((centred ** 2).sum(axis=1)) / x.shape[1] + eps)
    return (centred * factor[:, None]).reshape(x.shape) * weight + bias


# for each number: 1 and 1 up to the difference, 2 for its square's sum, then 2, 1, 1
WIDTH, OPERATIONS = SIZES.get("dim", 96), 8
x, weight, bias = (rng.standard_normal(shape).astype("float32") for shape in ((64 * 65, WIDTH), WIDTH, WIDTH))
exact = ops.layer_norm(*(a.astype("float64") for a in (x, weight, bias))).data
norm_error = float(np.abs(norm_by_warps(x, weight, bias) - exact).max())
passes = {}
for way, context in (("plain op", as_on_cupy()), ("one kernel", on_paper("fp32"))):
    moved.clear()
    with context:
        ops.layer_norm(x.view(Counted), weight, bias)
    passes[way] = sum(moved.values()) / x.nbytes
    print(f"layer norm, {way:<10}: {passes[way]:5.2f} passes over x")
print(f"by warps, float32: at most {norm_error:.1e} from the plain op in float64")
assert 12 <= passes["plain op"] < 13 and 2 <= passes["one kernel"] < 2.2 and norm_error < 1e-5

# %% [markdown]
# **Why bytes decide.** Let a device move b bytes per second and do p operations per second. Let a kernel do I
# operations for each byte, which is called its *arithmetic intensity*. Then it does at most min(p, b I)
# operations per second. This is the roofline model (Williams et al. 2009). If I is below p / b, the kernel
# waits for memory. For one H100, measured elsewhere: b = 3.0 TB/s, and p = 798 TFLOP/s in a bf16 product of
# 8192^3. For float32, p = 45 TFLOP/s is an estimate. A matrix product (m, k) (k, n) does 2 m k n operations
# on m k + k n + m n numbers.

# %%
PEAK, SHAPES = {"float32": 45e12, "bf16": 798e12}, {"qkv, width 96": (256 * 65, 96, 288),
                                                    "fc1, width 96": (256 * 65, 96, 384),
                                                    "fc1, width 384": (256 * 65, 384, 1536),
                                                    "8192^3": (8192, 8192, 8192)}
intensities = {("layer norm, " + way, "float32"): OPERATIONS / (4 * n) for way, n in passes.items()}
intensities |= {(name, "bf16"): 2 * m * k * n / (2 * (m * k + k * n + m * n)) for name,
                (m, k, n) in SHAPES.items()}
attainable = {name: min(1, BANDWIDTH * I / PEAK[kind]) for (name, kind), I in intensities.items()}
for (name, kind), I in intensities.items():
    wanted, share = PEAK[kind] / BANDWIDTH, 100 * attainable[name]
    print(f"{name:<24}{I:>8.1f} operations a byte, {kind} wants {wanted:>4.0f}: {share:5.1f} % of the peak "
          f"at most")
assert attainable["layer norm, one kernel"] < 0.1 and attainable["fc1, width 96"] < 1 == attainable["8192^3"]

# %% [markdown]
# In bf16, even the matrix products of a small ViT wait for memory. So the results between two products should
# not go through memory at all, or with half as many bytes.
#
# ## From float32 to bf16
# A bf16 number is the upper half of a float32: all 8 bits of the exponent, and 7 of the 23 bits after the
# leading one. One rounding has an error of at most 2^-8 of the number, or 0.4 %. But a sum has many
# roundings.


# %%
def bf16(x):
    """float32 rounded to bf16, to nearest, ties to even; kept in a float32."""
    bits = np.asarray(x, "float32").view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)


assert bf16([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]
assert bf16(np.float32(256) + 1) == 256  # so 1 + 1 + ... ends at 256
LENGTHS = (16, 256, 4096)
terms, in_bf16, in_float32 = bf16(rng.random((4096, 100), dtype="float32")), np.float32(0), np.float32(0)
exact, sum_errors = terms.cumsum(axis=0, dtype="float64"), {"in bf16": [],
                                                            "in float32, rounded at the end": [],
                                                            "in float32": []}
for n, term in enumerate(terms, 1):
    in_bf16, in_float32 = bf16(in_bf16 + term), in_float32 + term
    if n in LENGTHS:
        for errors, found in zip(sum_errors.values(), (in_bf16, bf16(in_float32), in_float32)):
            errors.append(float(np.sqrt(((found / exact[n - 1] - 1) ** 2).mean())))
table("relative error of a sum of bf16 numbers", [f"{n} terms" for n in LENGTHS], sum_errors, ".1e")
assert sum_errors["in bf16"][-1] > 0.5 and max(sum_errors["in float32"]) < 1e-5
assert max(sum_errors["in float32, rounded at the end"]) < 2**-8

# %% [markdown]
# A bf16 sum of positive terms not only becomes inaccurate, it *stops*: a term that is smaller than half of
# the last bit changes nothing. So matrix products add up in float32. The means of a layer norm are also added
# up in float32, and they are kept in float32: the error of a rounded mean is proportional to the mean, but
# what matters is how large it is compared with the standard deviation. The third long sum is the **residual
# stream**, to which every branch of every block adds. It is float32, too. What a single branch adds may be
# bf16, since it is rounded only once. A stream in bf16 would round the whole sum again at each addition.


# %%
def normed(x, average):
    centred = x - average(x)
    return centred / np.sqrt(average(centred ** 2) + 1e-6)


def summed_in_bf16(x):
    total = np.zeros(len(x), "float32")
    for column in bf16(x).T:
        total = bf16(total + column)
    return bf16(total / x.shape[1])[:, None]


def last_tokens(model, of_branch, of_stream):
    """The normed tokens of a ViT, with functions applied to what each branch adds and to each sum."""
    x = model.embed(images).data
    for block in model.blocks:
        for norm, inner in ((block.norm1, block.attn), (block.norm2, block.mlp)):
            x = of_stream(x + of_branch(inner(norm(tt.Tensor(x))).data))
    return model.norm(tt.Tensor(x)).data


MEANS, DEPTHS, images = (0, 1, 4, 16), here.pick((2, 4), (6, 12, 24),
                                                 (6, 12, 24)), rng.standard_normal((4, 3, 32, 32)).astype("float32")
rms, as_it_is, row_mean = lambda x: float(np.sqrt((x ** 2).mean())), lambda x: x, lambda x: x.mean(axis=1, keepdims=True)
averages = {"float32": row_mean, "float32, then rounded to bf16": lambda x: bf16(row_mean(x)),
            "bf16, each sum": summed_in_bf16}
rows = [(rng.standard_normal((1000, 96)) + mean).astype("float32") for mean in MEANS]
norm_errors = {name: [rms(bf16(normed(x, average)) - normed(x.astype("float64"), row_mean)) for x in rows]
               for name, average in averages.items()}
with tt.no_grad():
    models = [ViT(**SIZES | {"depth": depth}) for depth in DEPTHS]
    stream_errors = {name: [rms(last_tokens(m, bf16, stream) - last_tokens(m, as_it_is, as_it_is))
                            for m in models]
                     for name, stream in (("branches in bf16", as_it_is),
                                          ("branches and stream in bf16", bf16))}
table("error of a layer norm, statistics in", [f"mean {mean}" for mean in MEANS], norm_errors, ".1e")
table("error of a ViT's last tokens", [f"{depth} blocks" for depth in DEPTHS], stream_errors, ".1e")
assert max(norm_errors["float32"]) < 2**-8 and norm_errors["float32, then rounded to bf16"][-1] > 4 * 2**-8
assert all(3 * good < bad for good, bad in zip(norm_errors["float32"], norm_errors["bf16, each sum"]))
assert all(2 * good < bad for good, bad in zip(*stream_errors.values()))

# %% [markdown]
# ## Attention in one kernel
# The plain op writes A = softmax(q k^T / sqrt d), (B, H, T, T), to memory and reads it again. The kernel
# takes 16 keys at a time. For each query it keeps the largest score so far, m, and the sums of e^(score - m)
# and of e^(score - m) v. If the next 16 keys (a tile) have a larger score, both sums are multiplied by
# e^(m_old - m_new). This is the **online softmax** (Milakov & Gimelshein 2018). A is never in memory. Masking
# is removing (lesson 05): a dropped key counts 0 and does not change m. A row that has seen no key yet has
# m = -1e30.
#
# The backward pass needs A, and computes it again, tile by tile: e^(score_ij - m_i) / total_i. For this the
# forward pass has saved m and total: two numbers for each row instead of T.

# %%
TILE, LOWEST = 16, -1e30


@tt.op
def tiled_attention(q, k, v, keep, *, rescale=True):
    """ops.attention(q, k, v, keep), 16 keys at a time. rescale=False, a mistake: sums are not scaled when the
    maximum grows."""
    (B, H, T, d), itself = q.shape, np.eye(q.shape[2], dtype=q.dtype)
    tiles = [slice(start, start + TILE) for start in range(0, T, TILE)]

    def scores_and_seen(tile):
        return q @ k[:, :, tile].swapaxes(-1, -2) / math.sqrt(d), np.maximum(keep[:, None, None, tile],
                                                                             itself[:, tile])
    most, total, out = np.full((B, H, T, 1), LOWEST,
                               q.dtype), np.zeros((B, H, T, 1), q.dtype), np.zeros_like(q)
    for tile in tiles:
        scores, seen = scores_and_seen(tile)
        larger = np.maximum(most, np.where(seen > 0, scores, LOWEST).max(axis=-1, keepdims=True))
        weights, shrink = np.exp(np.minimum(scores - larger,
                                            0)) * seen, np.exp(most - larger) if rescale else 1
        most, total, out = larger, total * shrink + weights.sum(axis=-1, keepdims=True), out * shrink + weights @ v[:, :, tile]
    out /= total

    def vjp(g):
        dq, dk, dv, dkeep = (np.zeros_like(array) for array in (q, k, v, keep))
        along = (g * out).sum(axis=-1, keepdims=True)  # sum_j A_ij g_i v_j, without A
        for tile in tiles:
            scores, seen = scores_and_seen(tile)
            slope = np.exp(np.minimum(scores - most, 0)) / total
            centred = g @ v[:, :, tile].swapaxes(-1, -2) - along
            d_scores = slope * seen * centred / math.sqrt(d)
            dq += d_scores @ k[:, :, tile]
            dk[:, :, tile] = d_scores.swapaxes(-1, -2) @ q
            dv[:, :, tile] = (slope * seen).swapaxes(-1, -2) @ g
            dkeep[:, tile] = (slope * centred * (1 - itself[:, tile])).sum(axis=(1, 2))
        return dq, dk, dv, dkeep
    return out, vjp


def attended(attention, *arrays):
    """[out, and the gradients of q, k, v, keep] for the upstream gradient g."""
    given = [tt.Tensor(array, requires_grad=True) for array in arrays]
    out = attention(*given)
    return [out.data, *tt.grad(out, given, gradient=g)]


q, k, v, g = rng.standard_normal((4, 2, 3, 40, 8))  # 40 keys: two tiles and a half
keep, attention_errors = (rng.random((2, 40)) < 0.5).astype("float64"), {}
keep[0, :TILE] = 0  # a tile that only its own tokens see
for spread in (1, 20):
    plain, tiled = attended(ops.attention, spread * q, k, v, keep), attended(tiled_attention, spread * q, k,
                                                                             v, keep)
    attention_errors[spread] = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(plain, tiled))
    print(f"scores of standard deviation {spread:>2}: values and gradients at most "
          f"{attention_errors[spread]:.0e} from ops.attention's")
mistake = float(np.abs(tiled_attention(20 * q, k, v, keep, rescale=False).data - plain[0]).max())
print(f"the same without the scaling: values {mistake:.1f} off")
assert max(attention_errors.values()) < 1e-12 and mistake > 0.1
for b, kept in enumerate(keep > 0):  # masking is removing
    gathered = ops.attention(*(array[b:b + 1, :, kept] for array in (q, k, v))).data
    assert np.abs(tiled_attention(q, k, v, keep).data[b:b + 1, :, kept] - gathered).max() < 1e-12
few, some = here.pick(20, 160, 512), [array[:1, :2, :TILE + 4, :4] for array in (q, k, v)]
# a hard mask
tt.gradcheck(lambda q, k, v: tiled_attention(q, k, v, keep[:1, :TILE + 4]), *some, max_elements=few,
             seed=here.seed)
# a soft one, and its gradient
tt.gradcheck(tiled_attention, *some, rng.random((1, TILE + 4)), max_elements=few, seed=here.seed)

# %% [markdown]
# The price is one more matrix product: 2 products of T^2 d multiply-adds for each head in the forward pass
# and 5 in the backward pass, instead of 2 and 4.
#
# ## A graph repeats what was captured
# To make a CUDA graph, we run a step while its stream *captures*. Then nothing is computed, and each launch
# is recorded, with the addresses of its arrays and the values of its numbers. Here is such a graph in Python,
# with kernels that write into fixed arrays.


# %%
class Graph(list):
    def launch(self, kernel, *arguments):
        """Keep it."""
        self.append((kernel, arguments))

    def replay(self):
        for kernel, arguments in self:
            kernel(*arguments)


def residuals(x, w, y, out):
    np.matmul(x, w, out=out)
    out -= y


def gradient(x, residual, out):  # of half the mean of squares
    np.matmul(x.T, residual, out=out)
    out /= len(x)


def adamw(w, g, m, v, lr, corrections):  # as optim.AdamW without decay
    m += (g - m) * (1 - 0.9)
    v += (g * g - v) * (1 - 0.999)
    w -= m / (np.sqrt(v / corrections[1]) + 1e-8) * (lr / corrections[0])


# %% [markdown]
# The problem is y = x w + noise: find 16 numbers w from batches of 32. Three things change from step to step:
# the batch; the learning rate, which rises and falls; and the step number, on which the corrections 1 -
# beta^t of AdamW depend. Each of them is written into a buffer before each replay. To see what can go wrong,
# we *freeze* one of them: the capture gets its value at that time, which is the number, or the array with the
# first batch.

# %%
STEPS, truth = 100, rng.standard_normal(16)
inputs = rng.standard_normal((STEPS, 32, 16))
answers = inputs @ truth + 0.1 * rng.standard_normal((STEPS, 32))
at = lambda t: (inputs[t - 1], answers[t - 1], 0.1 * optim.warmup_cosine(t - 1, STEPS),
                (1 - 0.9 ** t, 1 - 0.999 ** t))


def ordinary():
    """w after each step, by the package's AdamW."""
    p, residual, history = nn.Parameter(np.zeros(16)), np.empty(32), []
    optimizer = AdamW([p])
    for x, y, lr, _ in map(at, range(1, STEPS + 1)):
        residuals(x, p.data, y, residual)
        gradient(x, residual, p.grad)
        optimizer.step(lr)
        history.append(p.data.copy())
    return np.stack(history)


def replayed(frozen):
    """The same by a graph. frozen: which of at(1) it keeps."""
    graph, (w, m, v, g), residual, history = Graph(), np.zeros((4, 16)), np.empty(32), []
    buffers = [np.empty(np.shape(value)) for value in at(1)]
    x, y, lr, corrections = (at(1)[i] if i in frozen else buffer for i, buffer in enumerate(buffers))
    graph.launch(residuals, x, w, y, residual)
    graph.launch(gradient, x, residual, g)
    graph.launch(adamw, w, g, m, v, lr, corrections)
    for t in range(1, STEPS + 1):
        for buffer, value in zip(buffers, at(t)):
            buffer[...] = value
        graph.replay()
        history.append(w.copy())
    return np.stack(history)


expected, toy = ordinary(), {}
print(f"{'frozen':<20}{'first wrong step':>18}{'w, from the truth':>20}")
for name, frozen in {"nothing": (), "learning rate": (2,), "step number": (3,), "batch": (0, 1)}.items():
    found = replayed(frozen)
    wrong = np.flatnonzero((found != expected).any(axis=1))  # to the bit
    toy[name] = {"first_wrong": int(wrong[0]) + 1 if wrong.size else None,
                 "distance": float(np.linalg.norm(found[-1] - truth))}
    print(f"{name:<20}{toy[name]['first_wrong'] or 'none':>18}{toy[name]['distance']:>20.3f}")
assert [row["first_wrong"] for row in toy.values()] == [None, 2, 2, 2]

# %% [markdown]
# There is no error and no NaN, and the result need not even look worse: a frozen step still trains, only
# differently. You find the mistake if you compare with ordinary steps: over several steps, bit by bit, and
# with batches that change. In the training of the package (`CapturedSteps` in `tinytoken/cuda/capture.py`),
# everything that changes follows from the number of the step. This number is in device memory, and the last
# kernel of the graph adds one to it. Random draws are functions of the seed and the number. Rates and
# corrections are in a table with a row for each step. Before a replay, the host writes only the numbers of
# the batch's pictures. Temporary arrays are the same trap again: their addresses are in the graph, so they
# lie in a memory pool that is used for nothing else. And a step that reads a value on the host (lesson 12)
# cannot be captured at all.
#
# ## On a device
# If there is a GPU, we run the step of the ViT in two ways: with each kernel launched separately, and as one
# graph. Events in the stream measure the time. We check whether both ways end with the same weights, and we
# run a short training in both precisions.

# %%
step_seconds, reached = {}, {}


def on_device(precision, captured, size, rounds=here.pick(1, 50, 200)):
    """(seconds for a training step, the weights after all of them)."""
    tt.manual_seed(here.seed)
    model, arrays = ViT(**SIZES).to("cuda"), tt.data.Batches(*train_set, size, seed=here.seed)(0)
    optimizer, rates = AdamW(model.parameters(), clip=1.0), [1e-3] * (4 + rounds)
    start, stop = xp.cuda.Event(), xp.cuda.Event()
    with products_in(precision, "cuda"):
        take = capture.CapturedSteps(Work(Classify(model), lambda step: arrays, optimizer, rates))
        take.replay.failed = not captured  # as if the capture had failed: each kernel is launched by itself
        for step in range(len(rates)):
            if step == 4:  # it is compiled, products are timed, and the step is captured
                start.record()
            take(step)
        stop.record()
    stop.synchronize()
    return xp.cuda.get_elapsed_time(start, stop) / 1e3 / rounds, model.state_dict()


if on_gpu:
    train, test = here.pictures(here.pick(16, 8000, 16000), here.pick(16, 2000, 10000))
    train_set = [backend.to_device(array, "cuda") for array in (train.images, train.labels)]
    for precision in ("fp32", "bf16"):
        for size in here.pick((4,), (16, 64, 256), (16, 64, 256, 1024)):
            (eager, weights), (graph, same) = (on_device(precision, captured, size)
                                               for captured in (False, True))
            assert all(np.array_equal(weights[name], same[name]) for name in weights)  # to the bit
            step_seconds[f"{precision}, batch {size}"] = eager, graph
        tt.manual_seed(here.seed)
        model, batches = ViT(**SIZES).to("cuda"), tt.data.Batches(*train_set, here.pick(4, 64, 64),
                                                                  seed=here.seed)
        fit(model, Classify(model), batches, steps=here.pick(4, 400, 2000), bar=False, precision=precision)
        prepare = lambda images: tt.data.normalise(backend.to_device(images, "cuda"), batches.mean,
                                                   batches.std)
        reached[precision] = accuracy(infer(model, test.images, prepare, precision=precision), test.labels)
    table("ms for a training step", ("eager", "captured"),
          {name: [1e3 * t for t in row] for name, row in step_seconds.items()}, ".3f")
    print("accuracy after a short training:",
          ", ".join(f"{name} {100 * share:.1f} %" for name, share in reached.items()))
else:
    print("not run, for want of a GPU: the times of a step, eager and captured, and the accuracies. The "
          "package's kernels were compiled "
          "for GPUs and emulated on a CPU, but not yet run on a GPU.")

# %% [markdown]
# ## What was measured

# %%
here.says(f"A ViT's training step is {all_launches[0]} array calls as CuPy makes them, sums of gradients included, "
          f"{all_launches[1]} launches with fused ops and {all_launches[2]} with whole branches in bf16; for "
          f"a picture it moves {', '.join(f'{size / 1e6:.1f}' for size in per_picture)} MB. A running sum of "
          f"{LENGTHS[-1]:,} bf16 numbers is off by {100 * sum_errors['in bf16'][-1]:.0f} %. A graph that "
          "froze its learning rate or its step number is wrong from step "
          f"{toy['step number']['first_wrong']} on, and says nothing.")
here.measured(on_gpu=on_gpu, ways=list(WAYS), launches=counts, all_launches=all_launches,
              bytes_per_picture=per_picture,
              pictures_as_long_as_launches=breaks_even, norm={"passes": passes, "error": norm_error},
              attainable=attainable,
              sums={"terms": LENGTHS, **sum_errors}, norms={"means": MEANS, **norm_errors},
              streams={"depths": DEPTHS, **stream_errors},
              attention={"errors": attention_errors, "without_scaling": mistake}, frozen=toy,
              step_seconds=step_seconds,
              accuracy=reached)

# %% [markdown]
# ## Exercises
# 1. "Adding gradients" is many launches with plain ops and few with fused ones. Which additions are left?
#    (Print shapes in `note`.) Where are the others? (Look for `Into`, and for `add=` in
#    `tinytoken/cuda/gradients.py`, `weights.py`.)
# 2. Count the bytes of a GELU, plain and fused, by hand as for the layer norm, and check them with `moved`.
# 3. Add up 4096 bf16 numbers in bf16 by pairs, then pairs of pairs, and so on. How large is the error, and
#    why?
# 4. Disturb a temporary array: write into `residual` between two replays, and then between two kernels of one
#    replay. When is this harmless?
# 5. Let the graph itself count the steps and look up the learning rate in an array. What does the host still
#    have to write?
#
# ## The paper
# Milakov & Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv 1805.02867), algorithm 3:
# m_j = max(m_(j-1), x_j) and d_j = d_(j-1) e^(m_(j-1) - m_j) + e^(x_j - m_j); here `larger` and `total`, 16
# keys at a time, and `shrink`. Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), carry the output along
# and compute A again in the backward pass, as `bf16_attention.cu` does.

# %%
here.end()
