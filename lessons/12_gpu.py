# %% [markdown]
# # Lesson 12: A GPU
# After this lesson you can move a model to a GPU, and say what its training step waits for and what a shorter
# number format costs. You can write a kernel of your own, and show that it is right.
#
# All of tinytoken is written once, for both NumPy arrays and CuPy arrays: `backend.array_module(x)` is the
# module that x belongs to, and an op takes its functions from that module. If you have a GPU, run this lesson
# with `--device cuda`. It also runs without one. Then it counts what can be counted, it runs the kernel of
# the last part on the CPU, and it says what it leaves out because it needs a GPU.

# %%
import ctypes
import pathlib
import shutil
import subprocess
import tempfile
import time

import numpy as np

import tinytoken as tt
from tinytoken import backend
from tinytoken.experiments import lesson
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import AdamW, Classify, Distil, loss_and_grads

here = lesson.begin("12_gpu")
on_gpu, xp = here.device == "cuda", backend.module_for(here.device)
SIZES = here.pick(dict(patch_size=8, dim=16, depth=2, heads=2), {}, {})


def wait():
    """Until the device has done all that it was asked for."""
    if on_gpu:
        xp.cuda.Device().synchronize()


def seconds(run, rounds=here.pick(2, 7, 15)):
    """The median time of a call of `run`, to the end of its work on the device."""
    run()  # the first call compiles kernels and fetches memory
    times = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times)[rounds // 2]


# %% [markdown]
# ## What moves to the device, and what must not
# A GPU has its own memory. The processor that runs Python, the *host*, does not compute in that memory. It
# puts work into a queue, a *stream*, and continues without waiting. This is why a GPU can be fast, and also
# why it can be slow:
#
# - **Parameters, gradients and moments** are on the device: call `model.to("cuda")` before you make the
#   optimiser.
# - **Pictures** are on the device, too: all of them are sent once, as bytes. Each batch is then selected,
#   shifted, mirrored and normalised on the device (`data.Batches`), and the host sends only the number of the
#   step. Random numbers are a function of that number. So they need no transfer either, and are the same on
#   the host and on the device.
# - **Looking at a value** (`float(loss)`, `.item()`, printing, `if x.sum() > 0`) waits until everything in
#   the queue is done. With one look per step, the host can no longer work ahead. `fit` leaves the losses on
#   the device and looks at them every 20 steps.
# - **An index that is a condition**, `x[x > 0]`, gives an array whose size only the device knows. So this is
#   a look at a value, too. That is why DynamicViT takes the k best tokens, and never "those above 0.5".

# %%
model = ViT(**SIZES).to(here.device)
train, _ = here.pictures(here.pick(64, 2000, 16000), 1)
learned = sum(p.data.nbytes for p in model.parameters())
sizes = {"parameters": learned, "gradients": learned, "moments of AdamW": 2 * learned,
         "pictures, as bytes": train.images.nbytes,
         "the same as float32": 4 * train.images.nbytes}
for name, size in sizes.items():
    print(f"{name:<22}{size / 1e6:>8.1f} MB")
images, labels = backend.to_device(train.images, here.device), backend.to_device(train.labels, here.device)
batches = {size: tt.data.Batches(images, labels, size, seed=here.seed)
           for size in here.pick((1, 4), (1, 4, 16, 64), (1, 4, 16, 64, 256))}
LARGEST = max(batches)

# %% [markdown]
# ## How many launches is a step?
# Each call of an array function is at least one *kernel*, a program that the device runs once per element. To
# launch a kernel costs the host some microseconds, no matter how large the array is. So we count the calls of
# a training step. This needs no GPU: if you write a subclass of NumPy's array, NumPy tells it about every
# function that is called with such an array. Everything that is computed from a counted array is counted,
# too.


# %%
class Counted(np.ndarray):
    """An array that counts the functions it is computed with. Views (reshape, transpose, slices) launch
    nothing."""
    calls = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return counted_call(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function, types, args, options):
        return counted_call(function, args, options)

    def astype(self, *args, **options):
        Counted.calls += 1
        return super().astype(*args, **options)


def counted_call(function, args, options):
    Counted.calls += 1
    result, out = function(*plain(args), **plain(options)), options.get("out")
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    return np.asarray(result).view(Counted) if isinstance(result, (np.ndarray, np.generic)) else result


def plain(value):
    """Arguments with every Counted among them as an array of NumPy's own."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    return value.view(np.ndarray) if isinstance(value, Counted) else value


def launches(task, size):
    """Array calls of a step of `size` pictures -> {part of the step: calls}."""
    rng = np.random.default_rng(here.seed)
    images, labels = rng.standard_normal((size, 3, 32, 32)).astype("float32"), rng.integers(0, 10, size)
    draws = {name: draw.view(Counted) for name, draw in task.noise(size, 0, here.seed).items()}
    task.model.to("cpu")
    Counted.calls = 0
    loss, _ = task(images.view(Counted), labels, **draws)
    forward = Counted.calls
    loss.backward()
    whole = Counted.calls
    optimizer = AdamW(task.model.parameters(), clip=1.0)
    part = [np.ones(4, "float32").view(Counted) for _ in range(4)]
    Counted.calls = 0
    optimizer._update(*part, 1e-3, 0.05, (0.1, 0.001))
    return {"forward": forward, "backward": whole - forward,
            "AdamW": Counted.calls * len(optimizer.flat.segments) + 5}


pruned = here.pick(dict(prune_before=(1,), keep_ratios=(0.5,)), {}, {})
coarse = here.pick(dict(compressed=(2, 2)), {}, {})
counted = {"ViT": launches(Classify(ViT(**SIZES)), 4),
           "DynamicViT": launches(Distil(DynamicViT(**SIZES, **pruned), ViT(**SIZES)), 4),
           "LookupViT": launches(Classify(LookupViT(**SIZES, **coarse)), 4)}
assert launches(Classify(ViT(**SIZES)), 8) == counted["ViT"]  # it does not depend on the size of the batch
print(f"{'array calls of a step':<24}{'forward':>9}{'backward':>10}{'AdamW':>7}{'all':>7}")
for name, row in counted.items():
    print(f"{name:<24}{row['forward']:>9}{row['backward']:>10}{row['AdamW']:>7}{sum(row.values()):>7}")

# %% [markdown]
# (This count does not see arrays that are made from nothing, such as `zeros` or `arange`, nor the cropping
# and normalising of the pictures. So it is a lower bound.)
#
# ## Why small models wait
# The time of a step is at least the number of launches times the cost of a launch. It is also at least the
# work divided by the speed of the device. For small batches the first bound is larger. Then the device is
# idle most of the time, and a smaller batch is not faster. To see this, we time a call that has almost
# nothing to do, and steps with larger and larger batches.

# %%
tiny = xp.ones(1, "float32")
CALLS = here.pick(20, 2000, 2000)
per_launch = seconds(lambda: [xp.add(tiny, tiny) for _ in range(CALLS)]) / CALLS
floor = per_launch * sum(counted["ViT"].values())
model.to(here.device)
task, optimizer = Classify(model), AdamW(model.parameters(), clip=1.0)


def step(size, look=False):
    arrays = batches[size](0)
    loss, _ = loss_and_grads(task, optimizer.params, arrays, micro=size, threads=1)
    optimizer.step(0.0)
    return float(loss) if look else loss


times = {size: seconds(lambda: step(size)) for size in batches}
print(f"a call with nothing to do: {1e6 * per_launch:.1f} us; {sum(counted['ViT'].values())} of them: "
      f"{1e3 * floor:.1f} ms")
print(f"{'batch':>6}{'ms per step':>13}{'us per picture':>16}{'of it launches':>16}")
for size, spent in times.items():
    print(f"{size:>6}{1e3 * spent:>13.1f}{1e6 * spent / size:>16.0f}{100 * min(1, floor / spent):>14.0f} %")
MORE = here.pick(2, 10, 50)
looked = seconds(lambda: [step(LARGEST, look=True) for _ in range(MORE)],
                 3) / seconds(lambda: [step(LARGEST) for _ in range(MORE)], 3)
print(f"with a look at the loss in every step: {looked:.2f} times the time"
      + ("" if on_gpu else " (on a CPU nothing is waited for)"))


def draw_times(figure):
    axes = figure.subplots()
    axes.plot(list(times), [1e3 * t for t in times.values()], "o-", color="#0072b2", label="measured")
    axes.axhline(1e3 * floor, color="#d55e00", ls="--", label="launches alone")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms per step", title=f"A training step of "
                                                                                     f"the ViT on the "
                                                                                     f"{here.device}")
    axes.legend()


here.picture("times", draw_times, 5, 3.6)

# %% [markdown]
# ## A time line of one step
# When does the host ask for an op, and when has the device finished it? `tensor.observe` calls a function of
# ours after each op of the forward pass. On a GPU, this function puts an event into the stream behind the op.
# On a CPU an op is finished when it returns, so the two lines are the same.


# %%
class TimeLine:
    """Moments, by the host's clock and by the device's, in ms since the first."""

    def __init__(self):
        self.names, self.host, self.device = [], [], []
        self.mark("begin")

    def mark(self, name, *_):
        self.names.append(getattr(name, "name", name))
        self.host.append(time.perf_counter())
        if on_gpu:
            self.device.append(xp.cuda.Event())
            self.device[-1].record()

    def read(self):
        wait()
        host = [1e3 * (moment - self.host[0]) for moment in self.host]
        return host, [xp.cuda.get_elapsed_time(self.device[0], event)
                      for event in self.device] if on_gpu else host


step(LARGEST)
wait()
line = TimeLine()
arrays = batches[LARGEST](1)
line.mark("batch")
with backend.blas_threads(1), tt.tensor.observe(line.mark):
    loss, _ = task(*arrays)
loss.backward()
line.mark("backward")
optimizer.step(0.0)
line.mark("AdamW")
asked, done = line.read()
print(f"the host has asked for everything after {asked[-1]:.1f} ms, the device has done it after "
      f"{done[-1]:.1f} ms")


def draw_line(figure):
    axes, spent = figure.subplots(), {}
    for name, start, stop in zip(line.names[1:], done, done[1:]):
        spent[name] = spent.get(name, 0.0) + stop - start
    longest = sorted(spent, key=spent.get, reverse=True)[:7]
    colours = dict(zip(longest, ("#cc79a7", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9",
                                 "#f0e442")))
    rows = {"done by the device": done, "asked by the host": asked} if on_gpu else {"on the CPU": done}
    for row, moments in enumerate(rows.values()):
        for name, start, stop in zip(line.names[1:], moments, moments[1:]):
            label = name if name in colours else "other"
            axes.barh(row, stop - start, left=start, height=0.6, color=colours.get(name, "#999999"),
                      label=label)
    found = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="ms", title=f"One step of {LARGEST} "
                                                                                 f"pictures")
    axes.legend(found.values(), found.keys(), fontsize=8, ncols=8, loc="upper center",
                bbox_to_anchor=(0.5, -0.25))


here.picture("line", draw_line, 10, 3.4)

# %% [markdown]
# ## Precision
# A float32 has 23 bits after the leading one. The fast units of a GPU multiply shorter numbers: TF32 keeps 10
# bits, bf16 keeps 7, and both add up the products in float32. What accuracy does that cost? We can imitate
# the rounding: cut the bits off the factors, and then multiply.


# %%
def rounded(x, bits):
    """float32 with so many bits after the leading one, to nearest, ties to even."""
    words, cut = x.astype("float32").view(np.uint32).astype(np.uint64), 23 - bits
    words += (1 << (cut - 1)) - 1 + (words >> cut & 1)
    return (words >> cut << cut).astype(np.uint32).view(np.float32)


assert rounded(np.array([1 + 2**-8 + 2**-20, 1 + 2**-8, 1 + 3 * 2**-8]), 7).tolist() == [1 + 2**-7, 1.0,
                                                                                         1 + 2**-6]
rng = np.random.default_rng(here.seed)
FORMATS = {"float32": 23, "TF32": 10, "bf16": 7}
product_errors = {name: [] for name in FORMATS}
WIDTHS = here.pick((16, 64), (16, 64, 256, 1024), (16, 64, 256, 1024))
for width in WIDTHS:
    a, b = rng.standard_normal((2, 128, width))
    exact = a.astype("float32").astype("float64") @ b.astype("float32").astype("float64").T
    for name, bits in FORMATS.items():
        left, right = (x.astype("float32") if bits == 23 else rounded(x, bits) for x in (a, b))
        product_errors[name].append(float(np.sqrt(((left @ right.T - exact) ** 2).mean()
                                                  / (exact ** 2).mean())))
print(f"{'error of a product, relative':<30}" + "".join(f"{f'{w} long':>12}" for w in WIDTHS))
for name, row in product_errors.items():
    print(f"{name:<30}" + "".join(f"{error:>12.1e}" for error in row))
assert all(f32 < tf32 / 100 and tf32 < bf16 for f32, tf32, bf16 in zip(*product_errors.values()))

# %% [markdown]
# The relative error hardly grows with the length of the sum: the errors have different signs, so they add up
# as slowly as the sum itself. A network can live with an error of 1 in 300 in its products, since the noise
# of its batches is larger. But it cannot live with *weights* of so few bits. A step changes a weight by about
# the learning rate. If that is less than half of the weight's last bit, the weight does not change, in this
# step and in all later ones. So the weights stay in float32, and the products read rounded copies of them
# (Micikevicius et al. 2018, section 3.1).

# %%
weights = np.concatenate([p.ravel() for name, p in ViT(**SIZES).state_dict().items()
                          if name.endswith("weight") and p.ndim == 2])
lost = {}
for rate in (1e-3, 1e-4, 1e-5):
    moved = rounded(weights, 7) + rate * np.sign(rng.standard_normal(weights.size)).astype("float32")
    lost[rate] = float((rounded(moved, 7) == rounded(weights, 7)).mean())
    print(f"steps of {rate:g} that a bf16 weight does not feel: {100 * lost[rate]:.0f} %")

# %% [markdown]
# ## A kernel of your own
# GELU is x Phi(x). Written with array functions, it takes several launches, and each of them reads and writes
# the whole array. A single kernel reads x once and writes the result once. In CUDA C, a kernel says what one
# thread does. The thread first finds out which element is its own:

# %%
SOURCE = r"""
extern "C" __global__ void gelu_forward(const float* x, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}
extern "C" __global__ void gelu_backward(const float* x, const float* g, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        float cdf = 0.5f * (1.0f + erff(x[i] * 0.70710678f));
        float density = 0.39894228f * expf(-0.5f * x[i] * x[i]);
        out[i] = g[i] * (cdf + x[i] * density);
    }
}
"""

# %% [markdown]
# There are four traps, and each can cost you an evening. A constant without an `f` is a double, and then the
# thread computes in double. The size of the array is rarely a multiple of the block, so threads past the end
# must do nothing (`if (i < n)`). A kernel knows nothing about strides, so its arrays must be contiguous. And
# a Python number arrives with 64 bits, so write `np.int32(n)`.
#
# Without a GPU, the same source runs on the CPU. A dozen lines of C++ define the words that C++ does not
# know, and run one thread after the other. This is slow and says nothing about speed, but it checks the
# indices, the end of the array, and the formulas.

# %%
SHIM = r"""
#include <math.h>
#define __global__
static struct { int x; } blockIdx, blockDim, threadIdx;
"""
RUN = r"""
extern "C" void run_gelu_forward(int blocks, int threads, const float* x, float* out, int n) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) gelu_forward(x, out, n);
}
extern "C" void run_gelu_backward(int blocks, int threads, const float* x, const float* g, float* out, int n) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) gelu_backward(x, g, out, n);
}
"""
THREADS = 128
compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(source):
    """{name: function(*arrays)} of a kernel source: on the GPU, else on the CPU; None where there is no
    compiler either."""
    if on_gpu:
        load = xp.RawModule(code=source).get_function
    elif compiler:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "kernel.cpp"
            file.write_text(SHIM + source + RUN, encoding="utf-8")
            subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(file), "-o",
                            str(file.with_suffix(".so"))], check=True)
            library = ctypes.CDLL(str(file.with_suffix(".so")))
        load = lambda name: getattr(library, f"run_{name}")
    else:
        return None
    return {name: launcher(load(name)) for name in ("gelu_forward", "gelu_backward")}


def launcher(kernel):
    def launch(*arrays):
        size, blocks = arrays[0].size, -(-arrays[0].size // THREADS)
        if on_gpu and size:  # a grid of no blocks is an error there
            kernel((blocks,), (THREADS,), (*arrays, np.int32(size)))
        elif not on_gpu:
            kernel(blocks, THREADS, *(ctypes.c_void_p(array.ctypes.data) for array in arrays), size)
    return launch


kernels = build(SOURCE)


# %% [markdown]
# Now the kernel becomes an implementation of the op. The contract is the same: a function that takes arrays
# and returns the output and its vjp. The plain op stays the definition. `@op.implementation("cupy")`
# registers another implementation for the arrays of CuPy, and nothing else in the package changes. We use a
# copy of the op here, so that the op of the package stays as it is.


# %%
@tt.op
def my_gelu(x):
    """The plain definition."""
    return tt.ops.gelu.function(x)


@my_gelu.implementation(xp.__name__)
def _(x):
    x = xp.ascontiguousarray(x)
    out = xp.empty_like(x)
    kernels["gelu_forward"](x, out)

    def vjp(g):
        grad = xp.empty_like(x)
        kernels["gelu_backward"](x, xp.ascontiguousarray(g), grad)
        return grad
    return out, vjp


def largest_difference():
    """Of values and gradients from the plain op's in float64, over sizes with and without a tail, transposed
    arrays included."""
    worst = 0.0
    for shape in ((1,), (127,), (128,), (129,), (3, 1000), (0,), (40, 30)):
        x, g = rng.standard_normal((2, *shape)) * 3
        for turn in (False, True):
            x, g = (x.T, g.T) if turn else (x, g)
            mine = tt.Tensor(backend.to_device(x.astype("float32"), here.device), requires_grad=True)
            out = my_gelu(mine)
            out.backward(backend.to_device(g.astype("float32"), here.device))
            exact = tt.Tensor(x.astype("float32").astype("float64"), requires_grad=True)
            plain = tt.ops.gelu(exact)
            plain.backward(g.astype("float32").astype("float64"))
            for a, b in ((out.numpy(), plain.numpy()), (backend.to_numpy(mine.grad), exact.grad)):
                worst = max(worst, float(np.abs(a - b).max(initial=0)))
    return worst


def writes_past_the_end(kernels, n=129, room=256):
    """How many of the elements behind the n-th a kernel for n elements changes."""
    x, out = xp.zeros(room, "float32"), xp.full(room, 7, "float32")
    kernels["gelu_forward"](x[:n], out[:n])
    return int((out[n:] != 7).sum())


kernel_error = kernel_past = careless_past = None
if kernels:
    kernel_error, kernel_past = largest_difference(), writes_past_the_end(kernels)
    careless_past = writes_past_the_end(build(SOURCE.replace("if (i < n) out", "out")))
    print(f"largest difference from the plain op in float64: {kernel_error:.1e}; written past the end: "
          f"{kernel_past} elements, "
          f"and {careless_past} without the test `i < n`")
    assert kernel_error < 5e-6 and kernel_past == 0 and careless_past > 0
else:
    print("not run: there is neither a GPU nor a C++ compiler here")
kernel_times = None
if on_gpu:
    x = tt.Tensor(xp.asarray(rng.standard_normal((LARGEST * 64, 384)).astype("float32")))
    kernel_times = {"plain": seconds(lambda: tt.ops.gelu(x)), "kernel": seconds(lambda: my_gelu(x))}
    print(f"plain {1e6 * kernel_times['plain']:.0f} us, one kernel {1e6 * kernel_times['kernel']:.0f} us")
else:
    print("speed of the kernel: not measured, for want of a GPU")

# %% [markdown]
# ## What was measured

# %%
here.says(f"A ViT's training step is {sum(counted['ViT'].values())} array calls, each a launch on a GPU or "
          "more, whatever the batch. Rounded to bf16 the factors of a product cost "
          f"{100 * product_errors['bf16'][-1]:.2f} % of it; of starting weights, {100 * lost[1e-4]:.0f} % "
          "would not feel a step of 1e-4.")
print(f"array calls of a ViT's step: {sum(counted['ViT'].values())}; launches alone {1e3 * floor:.1f} ms, a "
      f"step of {LARGEST} "
      f"{1e3 * times[LARGEST]:.1f} ms on the {here.device}")
here.measured(on_gpu=on_gpu, bytes=sizes, array_calls=counted, launch_seconds=per_launch, floor_seconds=floor,
              step_seconds=times, look_costs=looked,
              line={"names": line.names, "asked_ms": asked, "done_ms": done},
              product_errors={"widths": WIDTHS, **product_errors}, updates_lost=lost,
              kernel={"error": kernel_error, "past_the_end": kernel_past,
                      "past_the_end_without_test": careless_past,
                      "seconds": kernel_times})

# %% [markdown]
# ## Exercises
# 1. Which ops of a block make the most array calls? Count with `tensor.observe` and `Counted` together. Which
#    of them could be one kernel? How far would that lower the smallest possible time of a step?
# 2. `x[x > 0].sum()` and `(x * (x > 0)).sum()` give the same number. Which one would you use in a training
#    step, and why?
# 3. Add a bias to `gelu_forward`: out[i] = gelu(x[i] + b[i % width]). What is the gradient of b, and why can
#    the same kernel not write it?
# 4. Write `0.5` instead of `0.5f` and check again. Does the test notice it? How else could you find it?
# 5. Measure the share of lost steps for trained weights. Which layers lose most?
#
# ## The paper
# Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.1: a float32 copy of the
# weights receives the updates, since in float16 an update is lost if it is smaller than 2^-11 of its weight.
# `lost` measures the same here for bf16 (2^-8 of the weight).

# %%
here.end()
