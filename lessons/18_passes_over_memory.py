# %% [markdown]
# # Lesson 18: Passes over memory
# After this lesson you can predict how long an elementwise op takes from the bytes that it moves. You can
# say which ops of a training step wait for memory and which for arithmetic, and you can write an op that
# passes over memory once.
#
# Lesson 03 counted multiply-adds. On a CPU they are only a part of the time. A GELU has no multiply-add in
# our count, and still NumPy may need as long for it as for the product before it. The reason is memory.
# NumPy computes `a * b + c` in two **passes**: the first reads a and b and writes a temporary array, the
# second reads that and c and writes the result. Between two passes nothing stays in the processor's
# registers, and if the arrays are large, nothing stays in its caches either.
#
# All times below are of one thread, medians of interleaved rounds. They depend on the machine, and the
# JSON says which one it was.

# %%
import functools
import math
import statistics

import numpy as np

import tinytoken as tt
from tinytoken import backend, ops, tensor
from tinytoken.backend import CDF_POLYNOMIAL, blas_threads
from tinytoken.bench import Job
from tinytoken.compiled import why_not
from tinytoken.experiments import lesson
from tinytoken.experiments.timing import interleaved, seconds
from tinytoken.threads import share_out

here = lesson.begin("18_passes_over_memory")
rng = np.random.default_rng(here.seed)
backend.prepare_cpu()  # as for any training: freed memory is kept for the next array
COMPILED, ROUNDS = not why_not(), here.pick(2, 9, 21)
if not COMPILED:
    print(f"not run: what Numba compiles ({why_not()}). `pip install numba` is enough.")


def medians(ways, repeats=1):
    """{name: seconds of one run}, of interleaved rounds on one thread."""
    def often(run):
        for _ in range(repeats):
            run()
    with blas_threads(1):
        times = interleaved({name: functools.partial(often, run) for name, run in ways.items()}, ROUNDS)
    return {name: statistics.median(taken) / repeats for name, taken in times.items()}


# %% [markdown]
# ## What one pass costs
# The smallest pass reads an array and writes another: `np.multiply(x, 2, out=y)`. It moves 8 bytes for
# each float32. While both arrays are in a cache it is fast. When they are not, the time of an element is
# that of its bytes on their way from the memory and back, and the multiplication is free.

# %%
SIZES = [2 ** k for k in here.pick((10, 12), range(10, 25, 2), range(10, 26))]
pass_ns = {}
for size in SIZES:
    x, y = rng.standard_normal(size).astype("float32"), np.zeros(size, "float32")
    taken = medians({"pass": lambda: np.multiply(x, 2, out=y)}, repeats=max(1, 2 ** 20 // size))
    pass_ns[size] = 1e9 * taken["pass"] / size
LARGE = SIZES[-1]
best = min(pass_ns.values())
print(f"{'elements':>12}{'MB, both arrays':>18}{'ns an element':>16}{'GB/s':>8}")
for size, ns in pass_ns.items():
    print(f"{size:>12,}{8 * size / 1e6:>18.2f}{ns:>16.3f}{8 / ns:>8.1f}")

# %% [markdown]
# How much is that? Compare it with multiply-adds, which a matrix product does at the peak rate. Their
# quotient is a number to remember: **one pass over an element costs as much as so many multiply-adds.** A
# linear layer does D multiply-adds for each number that it writes. So if D is 96, a few passes over its
# output take as long as the layer itself.

# %%
a = rng.standard_normal((here.pick(64, 1024, 1024),) * 2).astype("float32")
macs_per_ns = len(a) ** 3 / (1e9 * medians({"product": lambda: a @ a})["product"])
worth_of_a_pass = pass_ns[LARGE] * macs_per_ns
print(f"a product: {macs_per_ns:.0f} multiply-adds in a nanosecond ({2 * macs_per_ns:.0f} GFLOP/s)\n"
      f"one pass over a large array costs as much as {worth_of_a_pass:.0f} multiply-adds for each element,\n"
      f"over a small one as much as {best * macs_per_ns:.0f}")

# %% [markdown]
# ## GELU, five times
# GELU is x Phi(x), where Phi is the distribution function of the normal distribution. For float32 the
# package uses Phi(x) = 1 / (1 + exp(x q(x^2))) with a polynomial q of degree 4 (`backend.CDF_POLYNOMIAL`).
# Here it is written in five ways:
#
# 1. **As a formula.** Each operation makes a new array.
# 2. **In place.** As many passes, but over two arrays that are reused: less memory is touched.
# 3. **In blocks.** The same, for 16,384 elements at a time. A block stays in the cache from the first pass
#    to the last, so only the first and the last touch memory.
# 4. **One loop, as you would write it in C,** compiled by Numba. One pass.
# 5. **One loop, as the compiler needs it.** A processor computes 8 or 16 float32 with one instruction, but
#    only if the loop has nothing in it that works on one number: no call of `math.exp`, and no constant
#    that is a float64 (it would make the loop a float64 one, half as many at a time). So it needs an exp
#    of its own, from multiplications, additions and one shift of bits.


# %%
QUIET = np.errstate(over="ignore")  # far below 0 the exp is infinite, and x over it rightly 0


@QUIET
def as_a_formula(x):
    s, q = x * x, CDF_POLYNOMIAL
    return x / (1 + np.exp(x * (q[0] + s * (q[1] + s * (q[2] + s * (q[3] + s * q[4]))))))


@QUIET
def in_place(x, out=None):
    out = np.empty_like(x) if out is None else out
    square = np.multiply(x, x, out=np.empty_like(x))
    np.multiply(square, CDF_POLYNOMIAL[-1], out=out)
    for coefficient in CDF_POLYNOMIAL[-2:0:-1]:
        out += coefficient
        out *= square
    out += CDF_POLYNOMIAL[0]
    out *= x
    np.exp(out, out=out)
    out += 1
    return np.divide(x, out, out=out)


def in_blocks(x, block=16384):
    out = np.empty_like(x)
    for a in range(0, len(x), block):
        in_place(x[a:a + block], out[a:a + block])
    return out


def exp_by_hand(x):
    """e^x of a float32 array: 2^n e^r, n the whole number next to x / log 2. A float32 that is 2^n has
    n + 127 in its bits from 23 on."""
    n = np.rint(x * np.float32(1 / math.log(2)))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # log 2 in two parts
    power = (n.astype("int32") + 127 << 23).view("float32")
    series = sum(r ** k / np.float32(math.factorial(k)) for k in range(8))
    return series * power


GELUS = {"as a formula": as_a_formula, "in place": in_place, "in blocks": in_blocks}
if COMPILED:
    import numba

    from tinytoken.compiled import kernels

    @numba.njit
    def naive_loop(x, q, out):
        for i in range(x.size):
            s = x[i] * x[i]
            out[i] = x[i] / (1 + math.exp(x[i] * (q[0] + s * (q[1] + s * (q[2] + s * (q[3] + s * q[4]))))))

    def of_loop(loop, x, q):
        out = np.empty_like(x)
        loop(x, q, out)
        return out
    GELUS["one loop, as in C"] = lambda x: of_loop(naive_loop, x, CDF_POLYNOMIAL)
    GELUS["one loop, vectors"] = lambda x: of_loop(kernels.gelu, x, tuple(map(np.float32, CDF_POLYNOMIAL)))

some = np.linspace(-20, 20, 8001).astype("float32")
exact = some.astype("float64") * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(some)
errors = {name: float(np.abs(gelu(some) - exact).max()) for name, gelu in GELUS.items()}
assert max(errors.values()) < 5e-6, errors  # all are the same function
exps = np.abs(exp_by_hand(some) / np.exp(some.astype("float64")) - 1).max()
assert exps < 3e-7, exps

# %% [markdown]
# The passes can be counted as in lesson 13: NumPy tells a subclass of its arrays about every call. Each
# array that a call gets is read once, its result is written once. Bytes over the speed of memory, which is
# known from above, is a prediction of the time.


# %%
class Counted(np.ndarray):
    """An array that notes the passes over arrays of its size."""
    passes = moved = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        bare = lambda arrays: tuple(a.view(np.ndarray) if isinstance(a, Counted) else a for a in arrays)
        result = getattr(ufunc, method)(*bare(inputs), **options, **({"out": bare(out)} if out else {}))
        Counted.passes += 1
        read = {a.ctypes.data: a.nbytes for a in inputs if isinstance(a, np.ndarray)}  # x * x reads x once
        Counted.moved += sum(read.values()) + result.nbytes
        return out[0] if out else np.asarray(result).view(Counted)


def passes_of(function, x):
    """(passes, bytes read and written for each element) of a function of NumPy's calls."""
    Counted.passes = Counted.moved = 0
    function(x.view(Counted))
    return Counted.passes, Counted.moved / x.size


size = here.pick(2 ** 12, 2 ** 23, 2 ** 23)
x = rng.standard_normal(size).astype("float32")
taken = medians({name: functools.partial(gelu, x) for name, gelu in GELUS.items()})
gelu_ns = {name: 1e9 * taken[name] / size for name in GELUS}
passes = {name: (1, 8.0) if "loop" in name else passes_of(gelu, x) for name, gelu in GELUS.items()}
passes["in blocks"] = (passes["in place"][0], 8.0)  # of memory; the other passes are over the cache
by_memory = {name: moved * pass_ns[LARGE] / 8 for name, (_, moved) in passes.items()}
print(f"ns for each of {size:,} elements\n{'':<22}{'passes':>12}{'bytes of memory':>17}{'ns by memory':>14}"
      f"{'ns measured':>13}{'error':>10}")
for name, ns in gelu_ns.items():
    print(f"{name:<22}{passes[name][0]:>12}{passes[name][1]:>17.0f}{by_memory[name]:>14.2f}{ns:>13.2f}"
          f"{errors[name]:>10.0e}")

# %% [markdown]
# ## Two more, by rows
# A layer norm and a softmax need the whole row before they can write its first number. That need not be a
# pass over memory: a row of 96 numbers stays in the smallest cache. A loop over rows can read it as often
# as it likes. NumPy cannot do this, since each of its calls goes over all rows.


# %%
def norm_as_a_formula(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + 1e-6)


def softmax_as_a_formula(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def ways_of(formula, op, x):
    """The formula, the package's plain op, and what runs where Numba is."""
    plain = tt.plain()(lambda: op(x).data)
    with tt.no_grad():
        assert np.abs(formula(x) - plain()).max() < 1e-5 * np.abs(plain()).max()
    ways = {"formula": lambda: formula(x), "plain": tt.no_grad()(plain)}
    if COMPILED:
        ways["compiled"] = tt.no_grad()(lambda: op(x).data)
        assert np.abs(ways["compiled"]() - plain()).max() < 1e-5 * np.abs(plain()).max()
    return ways


rows = rng.standard_normal((here.pick(64, 2 ** 16, 2 ** 16), 96)).astype("float32")
by_rows = {"GELU": ways_of(as_a_formula, ops.gelu, rows),
           "layer norm": ways_of(norm_as_a_formula, ops.layer_norm, rows),
           "softmax": ways_of(softmax_as_a_formula, ops.softmax, rows)}
row_ns = {name: {way: 1e9 * taken / rows.size for way, taken in medians(ways).items()}
          for name, ways in by_rows.items()}
print(f"ns an element, {rows.shape[0]:,} rows of {rows.shape[1]}\n{'':<12}"
      + "".join(f"{way:>12}" for way in row_ns["GELU"]))
for name, row in row_ns.items():
    print(f"{name:<12}" + "".join(f"{ns:>12.2f}" for ns in row.values()))

# %% [markdown]
# The faster way has to be right, too. The plain op is the definition. The compiled one must give its
# values and its gradients: in float64, by finite differences under a random upstream gradient.

# %%
if COMPILED:
    checked = rng.standard_normal((64, 96))  # 6,144 numbers: small arrays would run as the plain op
    for op in (ops.gelu, ops.layer_norm, ops.softmax):
        upstream = rng.standard_normal(checked.shape)
        found = {}
        for way, context in (("plain", tt.plain()), ("compiled", backend.using_implementations("numpy"))):
            with context:
                leaf = tt.Tensor(checked, requires_grad=True)
                (op(leaf) * upstream).sum().backward()
                found[way] = leaf.grad
        assert np.abs(found["compiled"] - found["plain"]).max() < 1e-12
        tt.gradcheck(op, checked, max_elements=here.pick(5, 20, 100), seed=here.seed)

# %% [markdown]
# ## A whole step
# Where does this matter? We time each op of a ViT's training step, plain and compiled. (`tensor.around`
# lets us run every op inside a function of ours, as in lesson 13.) The products of the linear layers are
# BLAS's in both. If all the rest took no time at all, the step would take as long as they do: that is the
# limit of what compiling the rest can give. Compiled, each branch of a block is one op, its linear layers
# included: so a bias is added where its sum is next read.

# %%
job = Job("vit", batch=here.pick(8, 64, 64), threads=1, micro=here.pick(8, 16, 16),
          **here.pick(dict(dim=24, depth=2), {}, {}))


def by_op(context):
    """One step -> seconds by op, forward and backward."""
    spent = {}

    def timed(op, way, shapes, run):
        box = []
        taken = seconds(lambda: box.append(run()))
        if way != "add":  # that is inside of "backward"
            spent[op.name] = spent.get(op.name, 0) + taken
        return box[0]
    with context(), tensor.around(timed):
        spent["whole step"] = seconds(job.step)
    return spent


compiled = functools.partial(backend.using_implementations, "numpy")
WAYS = {"plain": tt.plain} | ({"compiled": compiled} if COMPILED else {})
times = {way: [] for way in WAYS}
for turn in range(1 + here.pick(1, 9, 21)):
    for way, context in WAYS.items():
        taken = by_op(context)
        if turn:
            times[way].append(taken)
step_ms = {way: {name: 1e3 * statistics.median(row.get(name, 0) for row in found) for name in found[0]}
           for way, found in times.items()}
longest = {name: max(ms.get(name, 0) for ms in step_ms.values()) for ms in step_ms.values() for name in ms}
names = sorted(longest, key=lambda name: -longest[name])[:10]
print(f"{'ms of a step, one thread':<26}" + "".join(f"{way:>12}" for way in WAYS))
for name in names:
    print(f"{name:<26}" + "".join(f"{step_ms[way].get(name, 0):>12.1f}" for way in WAYS))
outside = 1 - step_ms["plain"]["linear"] / step_ms["plain"]["whole step"]
gain = step_ms["plain"]["whole step"] / step_ms[list(WAYS)[-1]]["whole step"]
print(f"of the plain step, {100 * outside:.0f} % are not in linear layers: without them it would be "
      f"{1 / (1 - outside):.2f} times as fast; compiled, it is {gain:.2f} times as fast")

# %% [markdown]
# ## Two threads, one memory
# Two cores have two sets of registers and of small caches, but one memory. What is limited by arithmetic
# gets twice as fast on two threads; a pass over large arrays need not. And there is a second limit: Python
# runs one thread at a time. NumPy gives its lock back while it computes, but if a call takes only a few
# microseconds, the threads spend their time in handing over the lock. So cut the *pictures* into slices
# and let each thread do all ops of a slice, as the package does (`train/parallel.py`). A slice is small
# enough that what one op writes is still in the cache when the next one reads it, and large enough that
# the calls are long.

# %%
shared = {}
if backend.cpu_count() > 1:
    for size in here.pick((2 ** 10,), (2 ** 14, 2 ** 18, LARGE), (2 ** 14, 2 ** 18, LARGE)):
        halves = [(rng.standard_normal(size).astype("float32"), np.zeros(size, "float32")) for _ in "12"]
        repeats = max(1, 2 ** 23 // size)

        def work(arrays):
            for _ in range(repeats):
                np.multiply(arrays[0], 2, out=arrays[1])
        taken = medians({n: functools.partial(share_out, work, halves, n) for n in (1, 2)})
        shared[size] = taken[1] / taken[2]
        print(f"passes over {size:>10,} elements, {1e6 * taken[1] / repeats / 2:>7.1f} microseconds each: "
              f"two threads are {shared[size]:.2f} times as fast as one")
else:
    print("not run, for want of a second CPU: two threads")

# %% [markdown]
# ## What was measured
# The bounds were set before the first run, but for those of two threads: in a first run, the arrays that
# were to fit the cache were so small that the lock counted. A smoke run decides nothing.

# %%
here.claim("a pass over a large array: time of an element, of that in the cache",
           pass_ns[LARGE] / best, low=2)
here.claim("GELU in blocks: times as fast as in place", gelu_ns["in place"] / gelu_ns["in blocks"], low=1.2)
if COMPILED:
    here.claim("GELU as one loop of vectors: times as fast as the formula",
               gelu_ns["as a formula"] / gelu_ns["one loop, vectors"], low=4)
    here.claim("GELU as one loop as in C: times as fast as the formula",
               gelu_ns["as a formula"] / gelu_ns["one loop, as in C"], high=2)
    here.claim("training step of a ViT: plain over compiled", gain, low=1.1)
if len(shared) > 1:
    short, middle, large = shared.values()
    here.claim("two threads over one: passes so short that the lock counts", short, high=1.3)
    here.claim("two threads over one: longer passes, in the cache", middle, low=1.3)
    here.claim("two threads over one: passes over a large array", large, high=1.3)
last = list(GELUS)[-1]
here.says(f"One pass over a large array costs as much as {worth_of_a_pass:.0f} multiply-adds for each of its "
          f"elements. GELU takes {gelu_ns['as a formula']:.2f} ns an element as a formula and "
          f"{gelu_ns[last]:.2f} {'as ' * COMPILED}{last}; a ViT's training step is {gain:.2f} times as fast "
          f"compiled.")


def draw_passes(figure):
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.plot([8 * size / 1e6 for size in SIZES], list(pass_ns.values()), "o-", color="#0072b2")
    left.set(xscale="log", xlabel="MB of both arrays", ylabel="ns an element", title="One pass: y = 2 x")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    places = np.arange(len(GELUS))
    right.barh(places + 0.2, [gelu_ns[name] for name in GELUS], 0.4, color="#0072b2", label="measured")
    right.barh(places - 0.2, [by_memory[name] for name in GELUS], 0.4, color="#bbbbbb",
               label="the bytes alone")
    right.set_yticks(places, GELUS)
    right.invert_yaxis()
    right.set(xlabel="ns an element", title="GELU of a large array")
    right.legend(fontsize=8)


def draw_step(figure):
    axis, shown = figure.subplots(), [name for name in names if name != "whole step"]
    for j, (way, colour) in enumerate(zip(WAYS, ("#bbbbbb", "#0072b2"))):
        lengths = [step_ms[way].get(name, 0) for name in shown]
        axis.barh(np.arange(len(shown)) + 0.2 * (2 * j - 1), lengths, 0.4, color=colour, label=way)
    axis.set_yticks(range(len(shown)), shown)
    axis.invert_yaxis()
    axis.set(xlabel="ms, forward and backward", title="A ViT's training step, by op")
    axis.legend()


here.picture("passes", draw_passes, 10, 3.6)
here.picture("step", draw_step, 7, 3.4)
here.measured(pass_ns=pass_ns, macs_per_ns=macs_per_ns, multiply_adds_of_a_pass=worth_of_a_pass,
              gelu=dict(ns=gelu_ns, by_memory=by_memory, passes=passes, errors=errors), rows_ns=row_ns,
              step_ms=step_ms, outside_linear=outside, two_threads=shared, compiled=COMPILED)

# %% [markdown]
# This is what to look for. The figures are those of the committed run (one thread, or two;
# `lessons/results/18_passes_over_memory.json`). They are of one machine, but the order of things is not.
#
# **The curve of one pass has three parts.** On the left, below 10,000 elements, an element is dear because
# the call itself takes 0.6 microseconds, however short the arrays are. In the middle, in the caches, it
# takes 0.05 to 0.08 ns. On the right, in memory, 0.24 ns, five times as long as at best. So one pass over
# a large array costs as much as 15 multiply-adds for each element, and one in the cache as much as 3.
#
# **GELU as a formula has 13 passes,** and takes 2.7 ns an element: as long as 170 multiply-adds. The
# linear layer before it, of a model of width 96, has 96. The bytes alone would predict more, 3.7 ns. A
# presumable reason is that a processor reads a line of memory before it writes a part of it, so that the
# pass of our curve, which writes another array than it reads, moves more than the passes that write where
# they have read. In blocks the 13 passes are as many, but over the cache: 1.5 ns. What is left is
# arithmetic, the calls, and an exp.
#
# **One loop is not enough.** The loop as in C moves the fewest bytes and is the slowest of all, 5.5 ns: it
# computes one number at a time, in float64. With vector instructions it takes 0.29 ns, and the bytes alone
# would take 0.24: now it waits for memory, and cannot become much faster. Both changes are needed, one
# pass and vectors.
#
# **In a training step** of a ViT at this size, 64 % of the time is in linear layers, which no loop of ours
# makes faster. All the rest could gain a factor of 1.57 at most. Compiled, GELU and layer norm take less
# than half of their time, and the step is 1.15 times as fast. That is Amdahl's law: what gets ten times as
# fast alone gains a few percent of the whole if it was a tenth of it.
#
# **Two threads** gain nothing with short calls (0.8 times as fast: they wait for each other) and nothing
# with large arrays (1.07). In between they gain 1.65. The slices of `train/parallel.py` are in between.
#
# ## Exercises
# 1. How many passes has AdamW's update of a weight (`AdamW.step` in `train/optim.py`)? How many bytes for
#    each weight? The package updates blocks of 32,768 weights at a time. Predict what that gains for a
#    model of 0.7 million weights, and for one of 70 million. Then change `BLOCK` and measure.
# 2. Give `in_blocks` blocks from 256 to 2^22 elements. Draw the time over the block. Which two things make
#    the ends slow?
# 3. Make `naive_loop` faster one change at a time: first constants of float32, then `exp_by_hand` for one
#    number in place of `math.exp`. Which change helps alone, and which only with the other?
# 4. Write bias and GELU as one loop: out = GELU(x + b). How many passes has NumPy for the two, and how
#    many bytes has yours for each element? Is it worth the code?
# 5. The vjp of `gelu` in `compiled/kernels.py` computes Phi again, in place of keeping it. Count the bytes
#    of both ways. From how many nanoseconds on would you keep it?
#
# ## The paper
# Williams, Waterman & Patterson 2009, "Roofline: an insightful visual performance model for multicore
# architectures" (Communications of the ACM 52, 4): what a program reaches is bounded by the peak rate of
# its arithmetic, and by the speed of memory times the operations that it does for each byte.
#
# | paper | our line |
# |---|---|
# | peak memory bandwidth | `8 / ns` |
# | peak performance | `macs_per_ns = len(a) ** 3 / ...` |
# | operational intensity, operations for each byte of memory | 1 over `passes[name][1]` for a GELU |
# | the bound by memory | `by_memory = {name: moved * pass_ns[LARGE] / 8 ...` |

# %%
here.end()
