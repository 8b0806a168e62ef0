# %% [markdown]
# # Lesson 01: Autograd from nothing
# You will be able to write an autograd engine of about fifty lines, and to read the one of this package.
#
# Training means: make one number, the *loss* L, small by changing many numbers, the *parameters*. For that we
# need the *gradient*: the derivative of L with respect to every parameter. The expressions are long, so a
# program should do it. *Autograd* is that program. You need NumPy and the chain rule.
#
# All lessons begin like the next cell. `lesson.begin` reads the options of the command line: `--smoke` runs the
# lesson in seconds, to see whether it works, and `--full` runs it longer. `here` then knows this run:
# `here.pick(a, b, c)` is a in a smoke run, b by default and c in a full run, `here.seed` is the seed of all
# random draws, `here.picture` saves a figure, and `here.measured` writes down results for a JSON file. In a
# notebook there are no options, and you get the defaults.

# %%
import inspect
import itertools

import numpy as np
from tqdm import tqdm

import tinytoken as tt
from tinytoken import graph, tensor
from tinytoken.experiments import lesson

here = lesson.begin("01_tape")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## One step of the chain rule
#
# Take one operation (an *op*) y = f(x) somewhere in the expression. x holds n numbers, y holds m. Their
# derivatives form the *Jacobian* J, an (m, n) table: J_ij = dy_i / dx_j.
#
# Suppose we know g = dL/dy already, one number per number of y. It is called the *upstream gradient* of the
# op. The chain rule gives the gradient one step further down:
#
# $$\frac{dL}{dx_j} = \sum_i \frac{dL}{dy_i} \frac{dy_i}{dx_j} = \sum_i g_i J_{ij}$$
#
# A vector times a Jacobian: a *vector-Jacobian product*, in short *vjp*. We never need J itself, only this
# product, and that is what makes gradients cheap. Take the matrix product C = A B with A (N, K), B (K, M), so
# C (N, M):
#
# $$\begin{aligned}
# C_{ij} &= \sum_k A_{ik} B_{kj} \\
# \frac{dC_{ij}}{dA_{kl}} &= [i = k] \, B_{lj} && \text{the Jacobian: } N M \times N K \text{ numbers} \\
# \frac{dL}{dA_{kl}} &= \sum_{ij} g_{ij} \frac{dC_{ij}}{dA_{kl}} = \sum_j g_{kj} B_{lj}
#     && [i = k] \text{ is 1 for } i = k \text{, else 0} \\
# \frac{dL}{dA} &= g B^T && (N, M) (M, K) \to (N, K)
# \end{aligned}$$
#
# and in the same way dL/dB = A^T g. Here is both, the table and the short way:

# %%
N, K, M = 30, 20, 10
A, B, g = rng.standard_normal((N, K)), rng.standard_normal((K, M)), rng.standard_normal((N, M))
jacobian = np.einsum("ik,lj->ijkl", np.eye(N), B)  # (N, M, N, K)
by_table = np.einsum("ij,ijkl->kl", g, jacobian)
by_vjp = g @ B.T
assert np.abs(by_table - by_vjp).max() < 1e-12
print(f"the Jacobian holds {jacobian.size:,} numbers, the gradient {by_vjp.size}; "
      f"largest difference {np.abs(by_table - by_vjp).max():.1e}")

# %% [markdown]
# ## Values that remember
#
# A `Value` is an array that remembers how it was made: from which values (its *parents*), and the vjp of the
# op that made it. A vjp takes the upstream gradient and returns one gradient per parent. A value that no op
# made is a *leaf*: the parameters, the data. `number` counts the values in the order in which they are made;
# we shall need that.
#
# The vjps below: an elementwise op has a diagonal Jacobian, since y_i depends on x_i alone, so its vjp is g
# times the slope. The slope of a b with respect to a is b, and the other way round. The slope of tanh is 1 -
# tanh^2. A mean of n numbers has the slope 1 / n with respect to each of them. `matmul` is what we just
# derived.

# %%
numbers = itertools.count()


class Value:
    """An array, the values that it was made from, and the vjp of the op that made it (None for a leaf)."""

    def __init__(self, data, parents=(), vjp=None):
        self.data, self.parents, self.vjp = np.asarray(data, dtype=float), parents, vjp
        self.number, self.grad = next(numbers), None


def add(a, b):
    return Value(a.data + b.data, (a, b), lambda g: (g, g))


def subtract(a, b):
    return Value(a.data - b.data, (a, b), lambda g: (g, -g))


def multiply(a, b):
    return Value(a.data * b.data, (a, b), lambda g: (g * b.data, g * a.data))


def matmul(a, b):
    return Value(a.data @ b.data, (a, b), lambda g: (g @ b.data.T, a.data.T @ g))


def tanh(x):
    out = np.tanh(x.data)
    return Value(out, (x,), lambda g: (g * (1 - out * out),))


def mean(x):
    return Value(x.data.mean(), (x,), lambda g: (np.full(x.data.shape, g / x.data.size),))


Value.__add__, Value.__sub__, Value.__mul__, Value.__matmul__, Value.mean = add, subtract, multiply, matmul, mean

# %% [markdown]
# Writing an expression now builds a graph: an arrow from every value to its parents. The graph is often
# called the *tape*, since it records what was computed. Our example has a value that is used twice, y:
#
#     y = x w,   z = y + tanh(y),   dz/dx = w (1 + 1 - tanh(y)^2)
#
# The two terms in the brackets belong to the two uses of y.


# %%
def example():
    x, w = Value(0.5), Value(2.0)
    y = x * w
    z = y + tanh(y)
    return x, w, y, z


x, w, y, z = example()
exact = 2.0 * (2 - np.tanh(1.0) ** 2)
print(f"z = {z.data:.4f}, made of {len(z.parents)} parents; dz/dx should be {exact:.4f}")

# %% [markdown]
# ## Two recursions that fail
#
# How does a gradient travel from z back to x and w? The first idea: run the vjp of z, and do the same for
# each parent at once.


# %%
def backward_by_paths(value, g):
    """Sends g on along every path down to the leaves. Returns how many vjps it ran."""
    if value.vjp is None:
        value.grad = g if value.grad is None else value.grad + g
        return 0
    return 1 + sum(backward_by_paths(parent, part) for parent, part in zip(value.parents, value.vjp(g)))


runs = backward_by_paths(z, 1.0)
assert abs(x.grad - exact) < 1e-12
print(f"by paths: dz/dx = {x.grad:.4f}, with {runs} runs of a vjp for a graph of 3 ops")

# %% [markdown]
# The result is right: the chain rule says to add up all paths from z to x, and this walks all of them. But
# the vjp of y ran twice, once per use, and that is the trouble. A transformer is made of steps y + f(y),
# where y is used twice (we meet them in lesson 04). Each step doubles the number of paths:
#
#     runs(d) = 2 + 2 runs(d - 1) = 2 (2^d - 1)      for d steps: the addition, f, and everything below twice


# %%
def steps_deep(depth):
    """x, and a value `depth` steps y + tanh(y) above it."""
    x = Value(0.1)
    y = x
    for _ in range(depth):
        y = y + tanh(y)
    return x, y


depths = list(range(1, here.pick(10, 16, 20) + 1))
runs_by_paths, gradients_by_paths = [], []
for depth in depths:
    x, y = steps_deep(depth)
    runs_by_paths.append(backward_by_paths(y, 1.0))
    gradients_by_paths.append(x.grad)
assert runs_by_paths == [2 * (2 ** d - 1) for d in depths]
print(f"by paths: {runs_by_paths[-1]:,} runs for {depths[-1]} steps; "
      f"a ViT of 12 blocks has 24: at least {2 * (2 ** 24 - 1):,} runs")

# %% [markdown]
# The second idea: run each vjp only once, by leaving out what was visited before. It is fast, and wrong: y is
# run as soon as the first part of its gradient has arrived, and the part through tanh comes too late.


# %%
def backward_once(value, g, seen):
    """Like backward_by_paths, but goes through each op only once. Wrong."""
    if value.vjp is None:
        value.grad = g if value.grad is None else value.grad + g
    elif value not in seen:
        seen.add(value)
        for parent, part in zip(value.parents, value.vjp(g)):
            backward_once(parent, part, seen)


x, w, y, z = example()
backward_once(z, 1.0, set())
wrong = float(x.grad)
assert wrong == 2.0  # w alone: the part through tanh is lost
print(f"each op once, in the order of the recursion: dz/dx = {wrong:.4f} instead of {exact:.4f}")

# %% [markdown]
# And any recursion needs one level of Python's call stack per level of the graph. Python stops at about a
# thousand levels. A sum in a loop is deeper than that:


# %%
def sum_in_a_loop(length):
    """x, and x + x + ... + x with `length` additions."""
    x = Value(1.0)
    y = x
    for _ in range(length):
        y = y + x
    return x, y


DEEP = 10_000
x, y = sum_in_a_loop(DEEP)
try:
    backward_by_paths(y, 1.0)
    raise AssertionError("the recursion got through")
except RecursionError as error:
    print(f"{DEEP:,} additions deep: RecursionError: {error}")

# %% [markdown]
# ## The right order
#
# An op's vjp may run when its gradient is complete: when everything that used its output has run. So we need
# an order of the graph in which every value comes after its parents, a *topological order*, and go through it
# from the end. We have one for nothing: a value is made after its parents, so its number is larger than
# theirs. Find what lies under the root, and sort by number.
#
# `arrived` holds the gradients that are still incomplete. A value's gradient is taken out when it is the
# value's turn: it is complete then. Each vjp runs once. No function calls itself: the list `stack` does what
# Python's call stack did.
#
# (`unbroadcast` is explained right after this.)


# %%
def topological_order(root):
    """The values under `root`, each after its parents."""
    found, stack = {root}, [root]
    while stack:
        new = [parent for parent in stack.pop().parents if parent not in found]
        found.update(new)
        stack += new
    return sorted(found, key=lambda value: value.number)


def unbroadcast(g, shape):
    """Sum g over the axes along which an array of `shape` was repeated."""
    in_front = tuple(range(g.ndim - len(shape)))
    g = g.sum(axis=in_front)
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def backward(root):
    """Add d(root)/d(leaf) to .grad of every leaf. The root is a single number."""
    arrived = {root: np.ones_like(root.data)}
    for value in reversed(topological_order(root)):
        g = arrived.pop(value)
        if value.vjp is None:
            value.grad = g if value.grad is None else value.grad + g
            continue
        for parent, part in zip(value.parents, value.vjp(g)):
            part = unbroadcast(part, parent.data.shape)
            arrived[parent] = arrived[parent] + part if parent in arrived else part


Value.backward = backward

# %% [markdown]
# This is the whole tape. Now the three cases: the value used twice, the many steps, the deep graph. `watch`
# puts a small function around each vjp that writes down when it ran, and with which gradient.


# %%
def watch(root):
    """A list to which each vjp under `root` will add (value, the upstream gradient it was run with)."""
    log = []

    def watched(value, vjp):
        def vjp_with_a_note(g):
            log.append((value, float(g)))
            return vjp(g)
        return vjp_with_a_note
    for value in topological_order(root):
        value.vjp = value.vjp and watched(value, value.vjp)
    return log


x, w, y, z = example()
log_in_order = watch(z)
z.backward()
assert abs(x.grad - exact) < 1e-12 and len(log_in_order) == 3
print(f"in order: dz/dx = {x.grad:.4f}, with {len(log_in_order)} runs")

runs_in_order = []
for depth, by_paths in zip(depths, gradients_by_paths):
    x, y = steps_deep(depth)
    log = watch(y)
    y.backward()
    runs_in_order.append(len(log))
    assert abs(x.grad - by_paths) < 1e-12 * by_paths  # the same sum over all paths
assert runs_in_order == [2 * d for d in depths]
print(f"{depths[-1]} steps: {runs_in_order[-1]} runs in order, {runs_by_paths[-1]:,} by paths, the same "
      f"gradient")

x, y = sum_in_a_loop(DEEP)
y.backward()
assert x.grad == DEEP + 1
print(f"{DEEP:,} additions deep: dy/dx = {x.grad:,.0f}, which is the number of times that x was used")

# %% [markdown]
# The picture shows the example twice, with the number of the run in each box and the gradient that the vjp
# was run with. In the middle y is run second, with 1.00; the 0.42 through tanh arrives when it is too late.
# On the right: the work. Note the logarithmic axis.

# %%
BLUE, RED, GREY = "#0072B2", "#D55E00", "#555555"
PLACES = {"z": (1, 3), "tanh(y)": (2, 2), "y": (1, 1), "x": (0.4, 0), "w": (1.6, 0)}
FORMULAS = {"z": "z = y + tanh(y)", "tanh(y)": "tanh(y)", "y": "y = x w"}


def draw_graph(axis, log, order, title, late=()):
    """The example's graph: which run of a vjp each op was, and its g. late: an edge whose gradient is
    lost."""
    for edge in (("z", "tanh(y)"), ("z", "y"), ("tanh(y)", "y"), ("y", "x"), ("y", "w")):
        colour, style = (RED, "--") if edge == late else (GREY, "-")
        shrink = 12 if edge[1] in "xw" else 45 if "tanh(y)" in edge else 21
        axis.annotate("", PLACES[edge[1]], PLACES[edge[0]], arrowprops=dict(
            arrowstyle="-|>", color=colour, linestyle=style, lw=1.5, shrinkA=20, shrinkB=shrink))
    if late:
        axis.text(1.7, 1.35, f"{1 - np.tanh(1.0) ** 2:.2f}, too late", color=RED)
    for run, ((_, g), name) in enumerate(zip(log, order), 1):
        axis.text(*PLACES[name], f"{FORMULAS[name]}\nrun {run}, g = {g:.2f}", ha="center", va="center",
                  fontsize=10,
                  bbox=dict(boxstyle="round", fc="white", ec=RED if name in late[1:] else BLUE, lw=1.5))
    for leaf in "xw":
        axis.text(*PLACES[leaf], leaf, ha="center", va="center",
                  bbox=dict(boxstyle="circle", fc="white", ec=GREY))
    axis.set(xlim=(0.2, 2.6), ylim=(-0.3, 3.3), title=title)
    axis.axis("off")


x, w, y, z = example()
log_once = watch(z)
backward_once(z, 1.0, set())


def draw(figure):
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    draw_graph(left, log_in_order, ("z", "tanh(y)", "y"), f"in order: dz/dx = {exact:.2f}")
    draw_graph(middle, log_once, ("z", "y", "tanh(y)"), f"each op once, by recursion:\ndz/dx = {wrong:.2f}, "
                                                        f"wrong",
               late=("tanh(y)", "y"))
    right.semilogy(depths, runs_by_paths, "o-", color=RED, label="recursion along all paths")
    right.semilogy(depths, runs_in_order, "s-", color=BLUE, label="in topological order")
    right.set(xlabel="steps y + tanh(y)", ylabel="runs of a vjp", title="the work for the same gradient")
    right.legend()
    right.grid(alpha=0.3)


here.picture("order", draw, width=12, height=4)

# %% [markdown]
# ## Broadcasting undone
#
# NumPy repeats a small array so that it fits a large one: with X (4, 3) and b (3,), X + b adds b to each of
# the 4 rows. Repeating is an op of its own, B_ij = b_j, and it has a vjp:
#
#     dL/db_j = sum_ik (dL/dB_ik) (dB_ik/db_j) = sum_i dL/dB_ij             (4, 3) -> (3,)
#
# since dB_ik/db_j is 1 where k = j and 0 elsewhere. **What the forward pass repeats, the backward pass
# sums.** (And what it sums, like `mean`, the backward pass repeats: look at mean's vjp.) NumPy repeats in two
# ways: it puts new axes in front, and it stretches axes of size 1. `unbroadcast` sums over the one kind, then
# over the other. The vjps above need not know about it: add returns g for both parents, whatever their
# shapes, and the tape sums where a parent is smaller.

# %%
X, b = Value(rng.standard_normal((4, 3))), Value(rng.standard_normal(3))
weights = rng.standard_normal((4, 3))
((X + b) * Value(weights)).mean().backward()
assert b.grad.shape == (3,) and np.abs(b.grad - weights.sum(axis=0) / 12).max() < 1e-12
g, shapes = np.ones((5, 4, 3)), [(5, 4, 3), (4, 3), (3,), (1, 3), (4, 1), (5, 1, 1), ()]
for shape in shapes:
    summed = unbroadcast(g, shape)
    assert summed.shape == shape and (summed * np.ones(shape)).sum() == g.size
print("unbroadcast of a (5, 4, 3) gradient reaches", *shapes)

# %% [markdown]
# Without it nothing would crash here. The gradient of b would be (4, 3), and the update b - rate * gradient
# would broadcast again: b would become a (4, 3) array, a bias for each row of the data. That is why the
# package's engine checks the shape of each gradient.

# %%
b_updated = b.data - 0.1 * (weights / 12)  # the gradient as it was before unbroadcast
print(f"b {b.data.shape} would become {b_updated.shape}")
assert b_updated.shape == (4, 3)

# %% [markdown]
# ## Is it right?
#
# The derivative is a limit, so a small step h comes near it. Move all parameters p at once along a random
# direction d:
#
#     (L(p + h d) - L(p - h d)) / 2h   is near   sum (dL/dp) d
#
# Two runs forward, without any tape, and one number to compare. Lesson 02 is about this check: how small h
# should be, what the check cannot see. The network is the one that we train next: x (n, 1), two layers, and
# the mean squared error.
#
#     hidden = tanh(x w1 + b1)         (n, 1) (1, H) + (H,) -> (n, H)
#     prediction = hidden w2 + b2      (n, H) (H, 1) + (1,) -> (n, 1)
#     L = mean (prediction - y)^2


# %%
def loss_of(parameters, x, y, tanh):
    w1, b1, w2, b2 = parameters
    error = tanh(x @ w1 + b1) @ w2 + b2 - y
    return (error * error).mean()


def start(rng, hidden=32):
    """w1, b1, w2, b2, drawn so that the tanhs bend at different places of the interval."""
    return [rng.normal(0, 3, (1, hidden)), rng.uniform(-2, 2, hidden),
            rng.normal(0, hidden ** -0.5, (hidden, 1)),
            np.zeros(1)]


def curve(rng, points=64):
    """Points of a curve, with noise of standard deviation 0.1."""
    x = np.sort(rng.uniform(-1, 1, (points, 1)), axis=0)
    return x, np.sin(4 * x) + 0.5 * x + rng.normal(0, 0.1, x.shape)


inputs, targets = curve(rng)
arrays = start(rng)
parameters = [Value(p) for p in arrays]
loss_of(parameters, Value(inputs), Value(targets), tanh).backward()

h, direction = 1e-5, [rng.standard_normal(p.shape) for p in arrays]
up, down = (float(loss_of([p + s * h * d for p, d in zip(arrays, direction)], inputs, targets, np.tanh))
            for s in (1, -1))
slope, by_tape = (up - down) / (2 * h), sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction))
print(f"along a random direction: {slope:.10f} by a small step, {by_tape:.10f} by the tape")
assert abs(slope - by_tape) < 1e-6 * sum(float(((p.grad * d) ** 2).sum()) for p,
                                         d in zip(parameters, direction)) ** 0.5

# %% [markdown]
# `loss_of` ran twice there on plain arrays, as an ordinary NumPy function: the tape changes nothing in how it
# is written.
#
# ## Training with it
#
# *Gradient descent*: take a small step against the gradient, and again. `fit` works with any engine that has
# `.data`, `.grad` and `backward()`: ours now, the package's below.


# %%
def fit(make, tanh, arrays, x, y, steps, rate=0.03):
    """Gradient descent from `arrays` -> (parameters, the loss at every step). make: a Value, or a Tensor,
    from an array."""
    # x and y get gradients too, which nobody reads
    parameters, x, y, losses = [make(p) for p in arrays], make(x), make(y), []
    for _ in tqdm(range(steps), desc="fit", leave=False):
        loss = loss_of(parameters, x, y, tanh)
        loss.backward()
        for p in parameters:
            p.data = p.data - rate * p.grad
            p.grad = None
        losses.append(float(loss.data))
    return parameters, losses


steps, seeds, fits = here.pick(200, 3000, 10000), here.pick(1, 3, 10), []
for seed in range(here.seed, here.seed + seeds):
    seeded = np.random.default_rng(seed)
    x, y = curve(seeded)
    arrays = start(seeded)
    fits.append((x, y, arrays, *fit(Value, tanh, arrays, x, y, steps)))
first, last = ([losses[i] for *_, losses in fits] for i in (0, -1))
assert all(b < 0.5 * a for a, b in zip(first, last))
print(f"{steps} steps, {seeds} seeds: loss {np.mean(first):.3f} ± {np.std(first):.3f} at the start, "
      f"{np.mean(last):.4f} ± {np.std(last):.4f} at the end; the noise alone has 0.01")


# %%
def draw(figure):
    left, right = figure.subplots(1, 2)
    x, y, arrays, parameters, losses = fits[0]
    grid = np.linspace(-1, 1, 200)[:, None]
    for values, colour, style, label in ((arrays, GREY, "--", "before training"),
                                         ([p.data for p in parameters], BLUE, "-", f"after {steps} steps")):
        w1, b1, w2, b2 = values
        left.plot(grid, np.tanh(grid @ w1 + b1) @ w2 + b2, style, color=colour, label=label, lw=2)
    left.plot(x, y, "o", color=RED, ms=4, label="the 64 points")
    left.set(xlabel="x", ylabel="y", xticks=(-1, -0.5, 0, 0.5, 1), title="a curve, fitted by fifty lines of "
                                                                         "autograd")
    left.legend()
    for *_, losses in fits:
        right.loglog(range(1, steps + 1), losses, color=BLUE, alpha=0.7)
    right.axhline(0.01, color=GREY, ls=":")
    right.text(1, 0.0105, "variance of the noise", color=GREY, va="bottom")
    right.set(xlabel="step", ylabel="loss", title=f"the loss, {seeds} seed{'s' * (seeds > 1)}")
    right.grid(alpha=0.3)


here.picture("fit", draw)

# %% [markdown]
# ## The package's engine, line beside line
#
# The engine is `tinytoken/tensor.py` and `tinytoken/graph.py`. It does what our tape does, in the same way. Here
# are its lines beside ours. The cell looks each line up in the source of its function, so that this table
# cannot become outdated unnoticed.

# %%
BESIDE = [
    ("a value made later has a larger number", Value.__init__, "self.number, self.grad = next(numbers), None",
     graph.Node.__init__, "self.op, self.vjp, self.number = op, vjp, next(self.numbers)"),
    ("an op: its result, and its vjp beside it", multiply, "(a, b), lambda g: (g * b.data, g * a.data))",
     tt.ops.multiply.function, "return a * b, lambda g: (lambda: g * b, lambda: g * a)"),
    ("find what is under the root", topological_order, "new = [parent for parent in stack.pop().parents if "
                                                       "parent not in found]",
     graph.topological_order, "new = [parent for parent in stack.pop().parents() if parent not in found]"),
    ("sort by number", topological_order, "return sorted(found, key=lambda value: value.number)",
     graph.topological_order, "return sorted(found, key=lambda node: node.number)"),
    ("from the end", backward, "for value in reversed(topological_order(root)):",
     graph.backward, "node = order.pop()"),
    ("take out the complete gradient", backward, "g = arrived.pop(value)",
     graph.backward, "arrived.pop((node, place), (None,))[0]"),
    ("run the vjp", backward, "zip(value.parents, value.vjp(g))",
     graph._run_node, "entries = vjp(*upstream)"),
    ("undo broadcasting", backward, "part = unbroadcast(part, parent.data.shape)",
     graph._checked, "return unbroadcast(g, shape)"),
    ("add up what arrives", backward, "arrived[parent] = arrived[parent] + part if parent in arrived else "
                                      "part",
     graph._accumulate, "held = held + g"),
    ("a leaf keeps its gradient", backward, "value.grad = g if value.grad is None else value.grad + g",
     tensor._add_to_leaf, "leaf.grad += g"),
]
for what, ours, our_line, theirs, their_line in BESIDE:
    assert our_line in inspect.getsource(ours) and their_line in inspect.getsource(theirs), what
    print(f"{what}\n    ours    {our_line}\n    theirs  {their_line}    ({theirs.__qualname__})")

# %% [markdown]
# The same network on the package's engine, from the same start: the losses and the parameters are the same
# but for rounding.

# %%
x, y, arrays, ours, losses = fits[0]
theirs, their_losses = fit(lambda array: tt.Tensor(array, requires_grad=True), tt.ops.tanh, arrays, x, y,
                           steps)
difference = max(np.abs(p.data - q.data).max() for p, q in zip(ours, theirs))
assert difference < 1e-9 and np.abs(np.array(losses) - their_losses).max() < 1e-9
print(f"parameters after {steps} steps: largest difference {difference:.1e}")

# %% [markdown]
# What more does the package's engine do?
#
# - **An op is a function on plain arrays**, `@op`, that returns its result and its vjp. Unwrapping the
#   arrays, and wrapping the result, is done in one place (`Op.__call__`) and not in each op.
# - **The node is not the tensor.** Ours keeps each intermediate array as long as the graph lives. There a
#   `Tensor` holds the array and a `Node` holds the vjp; an array lives only as long as a vjp still needs it,
#   and a node is freed when it has run.
# - **Nothing is computed for nobody.** Only leaves with `requires_grad` get a gradient. The entries of a vjp
#   may be functions without arguments (`lambda: g * b` above), called only if that gradient is wanted.
# - **It checks what a vjp returns**, and names the op whose gradient cannot have the shape or dtype of its
#   input.
#
# The last three, seen from outside. (A second `backward` is refused, since the nodes are freed.)

# %%
leaf, data, called = tt.Tensor(np.ones(3), requires_grad=True), np.ones(3), []


@tt.op
def product(a, b):
    """a * b, which notes what it is asked for."""
    def of(name, value):
        called.append(name)
        return value
    return a * b, lambda g: (lambda: of("a", g * b), lambda: of("b", g * a))


loss = product(leaf, data).sum()
loss.backward()
print("asked for the gradient of:", *called, "(b is data)")
assert called == ["a"]

try:
    loss.backward()
except tt.GraphError as error:
    print("a second time:", error)


@tt.op
def careless(a):
    """a * 2, with a vjp that sums too much."""
    return a * 2, lambda g: 2 * g.sum(keepdims=True)


try:
    careless(leaf).sum().backward()
except tt.GradientError as error:
    print("a wrong shape:", error)

# %% [markdown]
# ## What was measured

# %%
here.says(f"In a graph {depths[-1]} deep whose values are used twice, a recursion without an order runs "
          f"{runs_by_paths[-1]:,} gradients, one in order {runs_in_order[-1]}; a graph {DEEP:,} deep is "
          "no trouble.")
print(f"dz/dx of the example: {exact:.4f} in order, {wrong:.4f} with each op once in recursion")
print(f"fit: loss {np.mean(last):.4f} ± {np.std(last):.4f} after {steps} steps ({seeds} seeds)")
print(f"ours and the package's engine after {steps} steps: parameters differ by at most {difference:.1e}")
here.measured(depths=depths, runs_by_paths=runs_by_paths, runs_in_order=runs_in_order, slope_exact=exact,
              slope_each_op_once=wrong, deep=DEEP, steps=steps, loss_first=first, loss_last=last,
              difference_to_package=float(difference))

# %% [markdown]
# ## Exercises
#
# 1. Write `exp(x)` and `divide(a, b)` for the tape, and check both along a random direction as above.
# 2. In `example`, write `tanh(y) + y` in place of `y + tanh(y)`. What does `backward_once` return now, and
#    why?
# 3. Call `y.backward()` twice on one of our graphs. What happens to `.grad`? Is that useful? What would you
#    have to change to refuse it, as the package does?
# 4. Measure how much memory our tape holds after the forward pass of `loss_of` with 10,000 points (add up
#    `.data.nbytes` over `topological_order`). Which of these arrays does no vjp need? Free those in the
#    forward pass. (`backward` needs their shape.)
# 5. Let `matmul` take stacks of matrices, (..., N, K) @ (..., K, M), whose leading axes broadcast. What
#    changes in its vjp, and what does `unbroadcast` do for you?
#
# ## The paper
#
# Rumelhart, Hinton and Williams, *Learning representations by back-propagating errors*, Nature 323 (1986),
# for a network of layers where unit j has the total input x_j = sum_i y_i w_ji, the output y_j, and E is the
# loss:
#
# | the paper | here |
# |---|---|
# | dE/dx_j = (dE/dy_j) dy_j/dx_j | `tanh`: `g * (1 - out * out)` (theirs: y_j (1 - y_j), for the logistic function) |
# | dE/dw_ji = (dE/dx_j) y_i | `matmul`: `a.data.T @ g`, summed over the rows of data |
# | dE/dy_i = sum_j (dE/dx_j) w_ji | `matmul`: `g @ b.data.T` |
#
# They go from layer to layer. For any graph the rule is older (Linnainmaa, 1970), and is the one of
# `backward`. Write v_i for the values in their order and G_i = dL/dv_i:
#
#     G_i = sum over the values j that used i of G_j (dv_j / dv_i)
#
#     arrived[parent] = arrived[parent] + part if parent in arrived else part

# %%
here.end()
