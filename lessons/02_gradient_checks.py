# %% [markdown]
# # Lesson 02: Gradient checks
# After this lesson you can tell whether a gradient that you wrote is right. You know what a check can find,
# and what it cannot.
#
# Lesson 01 built the tape. Each op has a *vjp*, which turns the upstream gradient g = dL/d(output) into
# dL/d(input). The tape believes everything that a vjp returns. So we need a second, independent way to
# compute a derivative, even if it is slow.

# %%
import inspect
import math

import numpy as np
from tqdm import tqdm

import tinytoken as tt
from tinytoken.checking import differences
from tinytoken.experiments import lesson

here = lesson.begin("02_gradient_checks")
rng = np.random.default_rng(here.seed)
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"

# %% [markdown]
# ## A wrong gradient does not crash
#
# Here is the network of lesson 01, trained three times: with the right vjp of tanh, with one that forgets a
# square, and with one that returns zeros, so that the first layer learns nothing at all.


# %%
@tt.op
def tanh_forgets_square(x):
    out = np.tanh(x)
    return out, lambda g: g * (1 - out)  # right: 1 - out * out


@tt.op
def tanh_zeros(x):
    return np.tanh(x), lambda g: 0 * g


def loss_of(parameters, x, y, tanh):
    """x (n, 1), y (n, 1) -> the mean squared error of tanh(x w1 + b1) w2 + b2."""
    w1, b1, w2, b2 = parameters
    error = tanh(x @ w1 + b1) @ w2 + b2 - y
    return (error * error).mean()


def problem(rng, points=64, hidden=32):
    """x, y and the starting parameters."""
    x = rng.uniform(-1, 1, (points, 1))
    y = np.sin(4 * x) + 0.5 * x + rng.normal(0, 0.1, x.shape)
    return x, y, [rng.normal(0, 3, (1, hidden)), rng.uniform(-2, 2, hidden),
                  rng.normal(0, hidden ** -0.5, (hidden, 1)),
                  np.zeros(1)]


def fit(tanh, seed, steps, rate=0.03):
    """The loss at every step of gradient descent."""
    x, y, arrays = problem(np.random.default_rng(seed))
    parameters, losses = [tt.Tensor(p, requires_grad=True) for p in arrays], []
    for _ in tqdm(range(steps), desc=f"{tanh.name}, seed {seed}", leave=False):
        loss = loss_of(parameters, x, y, tanh)
        losses.append(loss.item())
        for p, g in zip(parameters, tt.grad(loss, parameters)):
            p.data = p.data - rate * g
    return losses


steps, seeds = here.pick(100, 1000, 5000), here.pick(1, 3, 10)
CURVES = {"right": tt.ops.tanh, "forgets the square": tanh_forgets_square, "zeros": tanh_zeros}
losses = {name: [fit(tanh, here.seed + s, steps) for s in range(seeds)] for name, tanh in CURVES.items()}
last = {name: [run[-1] for run in runs] for name, runs in losses.items()}
for name, runs in losses.items():
    assert all(run[-1] < 0.2 * run[0] for run in runs)  # each of them seems to learn
    print(f"{name:<20} loss {np.mean([run[0] for run in runs]):.3f} -> {np.mean(last[name]):.4f} ± "
          f"{np.std(last[name]):.4f}")


# %%
def draw(figure):
    axis = figure.subplots()
    for (name, runs), colour, style in zip(losses.items(), (BLUE, RED, GREEN), ("-", "--", ":")):
        for i, run in enumerate(runs):
            axis.loglog(range(1, steps + 1), run, style, color=colour, lw=1.8, label=None if i
                        else f"vjp of tanh: {name}")
    axis.set(xlabel="step", ylabel="loss", title=f"The loss falls with wrong gradients too ({seeds} "
                                                 f"seed{'s' * (seeds > 1)})")
    axis.legend()
    axis.grid(alpha=0.3)


here.picture("training", draw, width=8)

# %% [markdown]
# Nothing in these curves says that two of the three programs are wrong. If a loss is a little higher than
# expected, there are many possible causes, and a wrong gradient is the last one that comes to mind.
#
# ## A slope by subtraction
#
# The derivative f'(x) is the limit of (f(x + h) - f(x)) / h as h goes to 0. On a computer, h cannot go to 0,
# because of two errors. One becomes smaller with h, the other becomes larger:
#
# *Truncation.* By Taylor, f(x + h) = f + h f' + (h^2 / 2) f'' + (h^3 / 6) f''' + ... at x, so
#
# $$\begin{aligned}
# \text{forward:} && \frac{f(x + h) - f(x)}{h} &= f' + \frac{h}{2} f'' + \ldots \\
# \text{central:} && \frac{f(x + h) - f(x - h)}{2h} &= f' + \frac{h^2}{6} f''' + \ldots
# \end{aligned}$$
#
# In the central difference the terms with f and f'' cancel.
#
# *Rounding.* Each value of f is stored with a relative error of up to u: 2^-53 in float64, 2^-24 in float32.
# Both values can be wrong by u |f|. After the division this is an error of 2 u |f| / h (forward) or u |f| / h
# (central). The smaller h is, the larger this error.
#
# The sum of the two errors is smallest where they balance. Take f = exp, for which f = f' = f'' = f''', and
# look at relative errors:
#
#     forward:  E(h) = h / 2 + 2 u / h      E'(h) = 0  at  h = 2 u^(1/2),     E = 2 u^(1/2)
#     central:  E(h) = h^2 / 6 + u / h      E'(h) = 0  at  h = (3 u)^(1/3),   E = (3 u)^(2/3) / 2
#
# The central difference needs two evaluations of f, like the forward difference, but is much more accurate. A
# third formula needs four. Let D(h) and D(2h) be the central differences with steps h and 2h. Their errors
# are h^2 f''' / 6 and four times that, so the errors cancel in (4 D(h) - D(2h)) / 3 (*Richardson
# extrapolation*).


# %%
def central(f, x, h):
    high, low = x + h, x - h
    return (f(high) - f(low)) / (high - low)  # high - low: the step that rounding left of 2h


def forward(f, x, h):
    high = x + h
    return (f(high) - f(x)) / (high - x)


def extrapolated(f, x, h):
    return (4 * central(f, x, h) - central(f, x, 2 * h)) / 3


def errors_by_step(slope, dtype, steps, points):
    """The root mean square relative error of the slope of exp over `points`, per step; NaN where rounding
    swallows a step."""
    x = points.astype(dtype)
    with np.errstate(all="ignore"):
        relative = [(slope(np.exp, x, dtype(h)) / np.exp(x.astype("float64")) - 1).astype("float64")
                    for h in steps]
    return np.array([np.sqrt(np.mean(r * r)) for r in relative])


h_tried, points = np.logspace(-15, 0, 61), rng.uniform(0, 1, 300)
METHODS = {("forward", "float32"): forward, ("central", "float32"): central, ("forward", "float64"): forward,
           ("central", "float64"): central, ("extrapolated", "float64"): extrapolated}
measured, best = {}, {}
for (name, dtype), slope in METHODS.items():
    measured[name, dtype] = e = errors_by_step(slope, np.dtype(dtype).type, h_tried, points)
    best[name, dtype] = h_tried[np.nanargmin(e)], np.nanmin(e)
    u = np.finfo(dtype).eps / 2
    print(f"{name:<12} {dtype}: best step {best[name, dtype][0]:.0e}, error {best[name, dtype][1]:.0e}")
    if name != "extrapolated":
        step, bound = {"forward": (2 * u ** 0.5, 2 * u ** 0.5),
                       "central": ((3 * u) ** (1 / 3), (3 * u) ** (2 / 3) / 2)}[name]
        print(f"{'':<12} expected: step {step:.0e}, error at most {bound:.0e}")
        assert bound / 20 < best[name, dtype][1] < 2 * bound


# %%
def draw(figure):
    axis = figure.subplots()
    looks = {"forward": (RED, "o"), "central": (BLUE, "s"), "extrapolated": (GREEN, "^")}
    for (name, dtype), e in measured.items():
        colour, marker = looks[name]
        axis.loglog(h_tried, e, color=colour, ls="-" if dtype == "float64" else "--", marker=marker, ms=4,
                    lw=1,
                    mfc=colour if dtype == "float64" else "white", label=f"{name}, {dtype}")
    axis.axvline(1e-6, color=GREY, ls=":")
    axis.text(1.15e-6, 3, "gradcheck's step", color=GREY, va="top")
    axis.set(xlabel="step h", ylabel="relative error of the slope", ylim=(1e-15, 5),
             title="The slope of exp by differences: small steps suffer from rounding, large ones from "
                   "truncation")
    axis.legend(loc="lower left", fontsize=9)
    axis.grid(alpha=0.3)


here.picture("steps", draw, height=5)

# %% [markdown]
# Read the V shapes from right to left. At first the error falls with h, with the slope that Taylor predicts:
# 1 for forward, 2 for central, 4 for extrapolated differences. Then the rounding error becomes larger, and
# the curve rises as 1 / h. In float32, the best central difference has an error of about 1e-5, so it cannot
# show a smaller mistake. So **a gradient is checked in float64**, even if it is used in float32 later.
#
# The package's `gradcheck` takes h = 1e-6 (times |x| where that is larger than 1). This is a little left of
# the best step for exp, which leaves room for functions that bend more sharply. Its relative tolerance is
# 1e-6, well above the error at that step.
#
# ## A check of our own
#
# For an op with many inputs and outputs, we need one number to differentiate. So we give each output a weight
# g_i. Then
#
#     L = sum_i g_i f_i(x),      dL/dx_k = sum_i g_i (f_i(x + h e_k) - f_i(x - h e_k)) / 2h      (e_k: 1 at place k, else 0)
#
# and g is the upstream gradient of f in L. So the right side must be equal to vjp(g), for every g.


# %%
def numeric_gradient(f, x, g, h=1e-6):
    """d(sum(g * f(x)))/dx, by a central difference per element of x."""
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[place] += h
        low[place] -= h
        out[place] = (g * ((f(high) - f(low)) / (2 * h))).sum()
    return out


# %% [markdown]
# One detail matters: the function first subtracts the outputs, element by element, and then sums the small
# differences. The other order, to subtract two large sums, loses digits. Here x has 10,000 numbers, f adds
# 10,000 to each, and the slope is 1:

# %%
x = rng.standard_normal(10_000)
high, low = x.copy(), x.copy()
high[0] += 1e-6
low[0] -= 1e-6
sums_first = abs((np.sum(high + 1e4) - np.sum(low + 1e4)) / 2e-6 - 1)
differences_first = abs((((high + 1e4) - (low + 1e4)) / 2e-6).sum() - 1)
print(f"error: {differences_first:.0e} with the differences first, {sums_first:.0e} with the sums first")

# %% [markdown]
# Now an op to check. *Softmax* turns a row of numbers x into positive numbers p that sum to 1 (attention is
# made of it, lesson 03):
#
# $$\begin{aligned}
# p_i &= \frac{e^{x_i}}{\sum_k e^{x_k}} \\
# J_{ij} = \frac{dp_i}{dx_j} &= p_i \, ([i = j] - p_j) \\
# \text{vjp:} \quad \sum_i g_i J_{ij} &= p_j \, \left( g_j - \sum_i g_i p_i \right)
# \end{aligned}$$


# %%
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))  # the same quotient, and no overflow
    return e / e.sum(axis=-1, keepdims=True)


def softmax_vjp(x, g):
    p = softmax(x)
    return p * (g - (g * p).sum(axis=-1, keepdims=True))


x, g = rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
numeric = numeric_gradient(softmax, x, g)
tensor = tt.Tensor(x, requires_grad=True)
[theirs] = tt.grad(tt.ops.softmax(tensor), [tensor], gradient=g)
print(f"our vjp against differences: {np.abs(softmax_vjp(x, g) - numeric).max():.0e}; "
      f"against the package's op: {np.abs(softmax_vjp(x, g) - theirs).max():.0e}")
assert np.abs(softmax_vjp(x, g) - numeric).max() < 1e-8 and np.abs(softmax_vjp(x, g) - theirs).max() < 1e-12

# %% [markdown]
# ## All ones is blind
#
# Which g should we use? A common habit is to sum the output, L = f(x).sum(), so that g is all ones. Here is
# what this check says about four vjps. All four are wrong:


# %%
BLIND = {  # name: (f, a wrong vjp)
    "softmax, zeros returned": (softmax, lambda x, g: 0 * g),
    "x - mean, zeros returned": (lambda x: x - x.mean(axis=-1, keepdims=True), lambda x, g: 0 * g),
    "rows reversed, and not back": (lambda x: x[::-1], lambda x, g: g),
    "exp, upstream forgotten": (np.exp, lambda x, g: np.exp(x)),
}
UPSTREAMS = {"ones": np.ones_like(x), "random": g}
blind = {}
for name, (f, wrong_vjp) in BLIND.items():
    gaps = {kind: float(np.abs(wrong_vjp(x, u) - numeric_gradient(f, x, u)).max()) for kind,
            u in UPSTREAMS.items()}
    blind[name] = gaps
    print(f"{name:<28} off by {gaps['ones']:.0e} with ones, by {gaps['random']:.2f} with a random upstream "
          f"gradient")
    assert gaps["ones"] < 1e-8 and gaps["random"] > 0.01

# %% [markdown]
# All four pass with ones. Why? Let J be the true Jacobian, and W the one that the vjp uses. The check
# compares sum_i g_i J_ij with sum_i g_i W_ij, and sees nothing else of J and W. With ones, these are the
# *column sums*.
#
# - Softmax: its outputs always sum to 1. Since their sum never changes, every column of J sums to 0. So zeros
#   are the right answer, but to the wrong question. x - mean is the same case: its outputs sum to 0.
# - An op that only moves values: the sum does not depend on where they go.
# - An op whose vjp forgets g: with g = 1 it makes no difference.
#
# A transformer consists mostly of softmaxes, of rows from which a mean is subtracted, and of ops that move
# values. A check with ones says little about it.
#
# Instead, draw g at random, each g_i standard normal. If the vjp is wrong, some column of W - J is not zero.
# The difference that the check sees there, sum_i g_i (W - J)_ij, is a normal number whose standard deviation
# is the length of that column. The probability that it is exactly zero is zero. So one draw is enough. (The
# vjp that forgets g does not have the form g W. Any g other than ones finds it. Zeros upstream find it best,
# since then every gradient must be zero.)

# %%
p = softmax(x)[0]
J = np.diag(p) - np.outer(p, p)
columns, length = np.abs(J.sum(axis=0)).max(), np.sqrt((J ** 2).sum(axis=0)).max()
print(f"softmax's J: column sums up to {columns:.0e}, columns up to {length:.2f} long")
assert columns < 1e-12 < 0.01 < length

# %% [markdown]
# ## The package's check
#
# `tt.gradcheck(op, *inputs)` is this check with care: float64 or it refuses; a random upstream gradient,
# drawn from a seed; each input by itself; twice, to see that the result is the same; inputs, outputs and g
# unchanged; with zeros upstream, where every gradient must be zero; with an upstream gradient of large, small
# and zero numbers, which a vjp must treat as any other, since it is linear in g. An element passes if the gap
# is at most 1e-8 + 1e-6 times its slope. The check returns a report or raises `GradientError`, with a reading
# of what kind of mistake the numbers look like.

# %%
print(tt.gradcheck(tt.ops.softmax, x))


@tt.op
def zero_softmax(x):
    return softmax(x), lambda g: 0 * g


def verdict(function, *inputs, **settings):
    """The GradientError that gradcheck raises, or None if it passes."""
    try:
        tt.gradcheck(function, *inputs, **settings)
    except tt.GradientError as error:
        return error


print(verdict(zero_softmax, x))
assert verdict(zero_softmax, x).kind == "zeros"

# %% [markdown]
# And here is the network from the beginning, with all four parameters at once: its loss is a function of them
# like any other. The check needs two forward runs for each number. That is why training does not use
# differences: the tape needs only one backward run.

# %%
(inputs, targets, arrays), calls = problem(rng), []


def network(w1, b1, w2, b2, tanh=tt.ops.tanh):
    calls.append(1)
    return loss_of((w1, b1, w2, b2), inputs, targets, tanh)


print(tt.gradcheck(network, *arrays))
print(f"{sum(p.size for p in arrays)} parameters: {len(calls)} runs of the network")
for tanh in (tanh_forgets_square, tanh_zeros):
    error = verdict(lambda *p: network(*p, tanh=tanh), *arrays, names=["w1", "b1", "w2", "b2"])
    print(f"\n{tanh.name}: {error}")
    # those that tanh stands above, no others
    assert "the gradient of w1" in str(error) and "also wrong: b1\n" in str(error)

# %% [markdown]
# ## A gallery of mistakes
#
# Here are ten ops with a right forward pass and a wrong vjp, with mistakes that people really make. Read each
# one before you look at the result. The picture below has two marks per op. They show how far the vjp is from
# the finite differences, with ones and with a random upstream gradient. A mark in the grey area means that
# this check finds nothing.


# %%
@tt.op
def divide_minus_forgotten(a, b):
    return a / b, lambda g: (g / b, g * a / b ** 2)


@tt.op
def scores_scale_forgotten(q, k):
    return q @ k.T / math.sqrt(8), lambda g: (g @ k, g.T @ q)


@tt.op
def weight_transposed(x, weight):
    return x @ weight.T, lambda g: (g @ weight, x.T @ g)


@tt.op
def bias_of_first_row(x, bias):
    return x + bias, lambda g: (g, g[0])


@tt.op
def exp_upstream_forgotten(x):
    out = np.exp(x)
    return out, lambda g: out


@tt.op
def rows_not_put_back(x):
    return x[::-1], lambda g: g


@tt.op
def rows_overwritten(x):
    def vjp(g):
        out = np.zeros_like(x)
        out[[0, 2, 2]] = g  # row 2 was taken twice
        return out
    return x[[0, 2, 2]], vjp


@tt.op
def softmax_rest_forgotten(x):
    p = softmax(x)
    return p, lambda g: g * p * (1 - p)  # the diagonal of J only


@tt.op
def product_spoils_upstream(a, b):
    def vjp(g):
        of_b = g * a
        g *= b  # saves an array, but g is not ours: others may have been sent the same
        return g, of_b
    return a * b, vjp


def normal(*shape):
    return rng.standard_normal(shape)


def positive(*shape):
    return rng.uniform(0.5, 2, shape)


GALLERY = [  # op, inputs, what gradcheck should call it (None: no simple reading fits)
    (zero_softmax, (normal(3, 5),), "zeros"),
           (divide_minus_forgotten, (positive(3, 4), positive(3, 4)), "sign"),
    (scores_scale_forgotten, (normal(3, 8), normal(5, 8)), "factor"),
    (weight_transposed, (normal(2, 3), normal(3, 3)), "transposed"),
           (bias_of_first_row, (normal(4, 3), normal(3)), "not summed"),
    (exp_upstream_forgotten, (normal(3, 4),), "upstream not used"),
           (rows_not_put_back, (normal(3, 4),), "permuted"),
    (rows_overwritten, (normal(3, 4),), "duplicates"), (softmax_rest_forgotten, (normal(3, 5),), None),
    (product_spoils_upstream, (normal(3, 4), normal(3, 4)), "writes")]


def largest_gap(op, inputs, g):
    """The largest |vjp - differences| over all inputs, with g upstream."""
    tensors = [tt.Tensor(x, requires_grad=True) for x in inputs]
    gradients = tt.grad(op(*tensors), tensors, gradient=g.copy())
    gaps = []
    for i, gradient in enumerate(gradients):
        alone = lambda x: op(*inputs[:i], x, *inputs[i + 1:]).data
        gaps.append(np.abs(gradient - numeric_gradient(alone, inputs[i], g)).max())
    return float(max(gaps))


gallery = {}
for mistake, given, kind in GALLERY:
    error = verdict(mistake, *given)
    assert error is not None and error.kind == kind, mistake.name
    out = mistake(*given).data
    gaps = {"ones": largest_gap(mistake, given, np.ones_like(out)),
            "random": largest_gap(mistake, given, normal(*out.shape))}
    gallery[mistake.name] = gaps | {"kind": str(kind)}
    reading = str(error).split("reading: ")[-1].split("\n")[0]
    print(f"{mistake.name}: {'passes' if gaps['ones'] < 1e-7 else 'fails'} with ones; gradcheck: {kind}\n    "
          f"{reading}")

# %% [markdown]
# The last one is special. The gradients that it returns are right, so no comparison of numbers finds the
# mistake. But it changes the array g, which does not belong to it. If a sum sent the same g to two ops, the
# second op gets the changed array. So gradcheck compares g before and after. And for
# `softmax_rest_forgotten`, no simple diagnosis fits: gradcheck says that the gradient is wrong, and nothing
# more.
#
# Here is one message in full. It names the factor, since 8 is a size of q:

# %%
print(verdict(scores_scale_forgotten, normal(3, 8), normal(5, 8)))


# %%
def draw(figure):
    axis = figure.subplots()
    names = list(gallery)[::-1]
    for kind, colour, marker, shift in (("ones", RED, "o", 0.12), ("random", BLUE, "s", -0.12)):
        axis.semilogx([max(gallery[n][kind], 1e-12) for n in names], np.arange(len(names)) + shift, marker,
                      color=colour, ms=8,
                      label=f"upstream gradient: {kind}")
    axis.axvspan(1e-13, 1e-7, color="#eeeeee", zorder=0)
    axis.text(1.3e-13, len(names) - 0.45, "a check passes", color=GREY, va="bottom")
    axis.set(yticks=range(len(names)), yticklabels=[n.replace("_", " ") for n in names], xlim=(1e-13, 30),
             ylim=(-0.6, len(names) + 0.2), xlabel="largest gap between vjp and differences (1e-12: that or "
                                                   "less)",
             title="Ten wrong vjps: what a check with ones sees, and one with a random upstream")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="center", bbox_to_anchor=(0.53, 0.5))


here.picture("gallery", draw, width=10, height=5)

# %% [markdown]
# The package's own tests plant well over a hundred such mistakes (`tests/planted/`), and fail if gradcheck
# lets one of them pass.
#
# ## Where there is no slope
#
# relu(x) = max(x, 0) has slope 0 to the left of 0 and slope 1 to the right. At 0 it has no slope: it has a
# *kink*. A difference with a step h that crosses the kink measures something between 0 and 1. This is not a
# mistake in the vjp. So before gradcheck reports anything, it tries other steps and looks at both sides (its
# numbers are slopes times g at that place):

# %%
at_kink = np.array([1.0, 0.0, -1.0])
error = verdict(tt.ops.relu, at_kink)
print(error)
assert error.kind == "not differentiable"
tt.gradcheck(tt.ops.relu, at_kink + 0.01)
chance = 2e-6 / math.sqrt(2 * math.pi)
print(f"a standard normal number lies within 1e-6 of 0 with probability {chance:.0e}: random inputs rarely "
      f"meet a kink")

# %% [markdown]
# Ties are kinks, too: max(a, b) at a = b, and every function that selects the largest few. Random inputs
# avoid them. If you test with round numbers such as 0, 0.5 and 1, you often test exactly at a kink.
#
# A *hard decision* is worse. "Keep this token if its score x is above 0" is a step: its slope is 0 everywhere
# except at the step, so nothing can be learned from it. But DynamicViT (lessons 06 and 07) must learn such a
# decision. The *straight-through* trick uses the hard value in the forward pass, and the gradient of a
# similar smooth function in the backward pass. Here this is the sigmoid s(x) = 1 / (1 + e^-x), with s' = s
# (1 - s):


# %%
@tt.op
def decide(x, *, hard):
    """1 if x > 0, else 0 (hard), or the sigmoid of x (soft). The gradient is the sigmoid's in both cases."""
    soft = 1 / (1 + np.exp(-x))
    return (x > 0).astype(x.dtype) if hard else soft, lambda g: g * soft * (1 - soft)


scores = normal(6)
error = verdict(lambda x: decide(x, hard=True), scores)
print(error)
assert error.kind == "flat"

# %% [markdown]
# The differences are right that the slope is 0, and the vjp returns something else on purpose. So a
# straight-through op is checked in two parts: first the soft path by differences, and then that the hard path
# has *exactly* the gradient of the soft path.


# %%
def straight_through_check(op, x, g):
    """True if op(x, hard=True) has the gradient of op(x, hard=False), and that one is right."""
    if verdict(lambda x: op(x, hard=False), x):
        return False
    tensor = tt.Tensor(x, requires_grad=True)
    [soft], [hard] = (tt.grad(op(tensor, hard=h), [tensor], gradient=g) for h in (False, True))
    return np.array_equal(soft, hard)


@tt.op
def decide_from_the_hard_value(x, *, hard):
    soft = 1 / (1 + np.exp(-x))
    out = (x > 0).astype(x.dtype) if hard else soft
    return out, lambda g: g * out * (1 - out)  # right for the soft value; for a 0 or a 1 it is zero


assert straight_through_check(decide, scores, normal(6))
assert not straight_through_check(decide_from_the_hard_value, scores, normal(6))
print("decide passes in two parts; the one that takes its slope from the hard value is caught")


# %%
def draw(figure):
    left, right = figure.subplots(1, 2)
    h, near = 1.0, np.linspace(-3, 3, 601)
    left.plot(near, (np.maximum(near + h, 0) - np.maximum(near - h, 0)) / (2 * h), color=RED, lw=2,
              label="central difference")
    left.plot(near, near > 0, color=BLUE, lw=2, ls="--", label="the vjp: 0 or 1")
    left.set(xlabel="x / h", ylabel="slope of relu", title="across the kink a difference measures\nsomething "
                                                           "between")
    left.legend()
    x = np.linspace(-6, 6, 601)
    soft = 1 / (1 + np.exp(-x))
    right.plot(x, x > 0, color=BLUE, lw=2, label="forward: the hard decision")
    right.plot(x, soft, color=GREEN, lw=2, ls="--", label="its stand-in, the sigmoid")
    right.plot(x, soft * (1 - soft), color=RED, lw=2, label="backward: the sigmoid's slope")
    right.set(xlabel="x", ylim=(-0.05, 1.55), title="straight-through: the slope is not that\nof the value")
    right.legend(fontsize=9, loc="upper left")
    for axis in (left, right):
        axis.grid(alpha=0.3)


here.picture("no_slope", draw)

# %% [markdown]
# ## What a check cannot see
#
# **A small mistake.** Multiply a right vjp by 1 + delta. If delta is below the tolerance, it passes:


# %%
def scaled_exp(delta):
    @tt.op
    def exp(x):
        out = np.exp(x)
        return out, lambda g: (1 + delta) * g * out
    return exp


deltas = [10.0 ** -k for k in range(3, 10)]
caught = [verdict(scaled_exp(delta), normal(10)) is not None for delta in deltas]
print("caught:", *(f"{delta:.0e}" for delta, c in zip(deltas, caught) if c),
      "  passed:", *(f"{delta:.0e}" for delta, c in zip(deltas, caught) if not c))
assert caught[:3] == [True] * 3 and caught[-2:] == [False] * 2

# %% [markdown]
# **A place that the check did not visit.** This relu passes its gradient on everywhere. For positive inputs
# this is right:


# %%
@tt.op
def relu_without_gate(x):
    return np.maximum(x, 0), lambda g: g


tt.gradcheck(relu_without_gate, positive(10))
assert verdict(relu_without_gate, -positive(10))
print("relu without its gate passes on positive inputs, and fails on negative ones")

# %% [markdown]
# **A wrong forward pass.** Take a softmax over the wrong axis, with the vjp of the softmax over that axis. It
# has the right gradient of the wrong function. Only tests of the values find it.
#
# **Many numbers.** n inputs need 2n runs. If there are more than 512 elements, gradcheck takes a sample of
# them and adds two random directions: it moves *all* inputs at once along d, and compares with sum (dL/dx) d,
# as lesson 01 did. A direction shows that something is wrong, but not where.


# %%
@tt.op
def one_lost(x):
    def vjp(g):
        out = 2 * g * x
        out[100] = 0
        return out
    return x * x, vjp


many = normal(5000)
many[100] = 1.5
error = verdict(one_lost, many)
print(error)
assert "along a random direction" in str(error)  # place 100 is not in the sample

# %% [markdown]
# ## What was measured

# %%
here.says("A softmax whose gradient is all zeros is off by {random:.1f} for a random upstream gradient, and "
          "by {ones:.0e} for ones: it passes.".format(**blind["softmax, zeros returned"]))
for (name, dtype), (step, error) in best.items():
    print(f"best step for exp, {name}, {dtype}: {step:.0e}, error {error:.0e}")
passed = sum(gaps["ones"] < 1e-7 for gaps in gallery.values())
print(f"wrong vjps of the gallery that pass with ones: {passed} of {len(gallery)}; that pass gradcheck: 0")
print("training with a wrong vjp of tanh:",
      "; ".join(f"{name} {np.mean(values):.4f} ± {np.std(values):.4f}" for name, values in last.items()),
      f"({steps} steps)")
here.measured(best_steps={f"{name} {dtype}": {"step": float(s), "error": float(e)} for (name, dtype),
                          (s, e) in best.items()},
              blind=blind, gallery=gallery, steps=steps, loss_last=last,
              sums_first=float(sums_first), differences_first=float(differences_first),
              caught={f"{delta:.0e}": c for delta, c in zip(deltas, caught)})

# %% [markdown]
# ## Exercises
#
# 1. Write an op `square_root` with @tt.op and let gradcheck pass it. What does gradcheck say at x = 0? At
#    x = 1e-7 a step of 1e-6 leads out of the domain, and still it passes: which steps could it take?
# 2. For |x| with the vjp g sign(x), what does gradcheck say at x = 0? Explain why it differs from relu's
#    case.
# 3. Divide by 2h instead of (high - low) in `central`. Which part of the V changes, and why?
# 4. Find a wrong vjp that passes with g = (1, 2, 3, ...), a fixed upstream gradient that is not all ones. Can
#    you do the same for one drawn at random after you have chosen?
# 5. A vjp is wrong for one parameter of n. Show that one random direction d shows a gap with probability 1.
#    gradcheck allows 1e-6 times the length of the vector of all (dL/dx_k) d_k. If all slopes are of one size,
#    how large may n be before the gap hides below that?
#
# ## The paper
#
# C. J. F. Ridders, *Accurate computation of F'(x) and F'(x) F''(x)*, Advances in Engineering Software 4
# (1982), repeats the step from central to extrapolated differences. With D(k, 0) the central difference of
# step h / 2^k,
#
#     D(k, j + 1) = D(k, j) + (D(k, j) - D(k - 1, j)) / (4^(j + 1) - 1)
#
# each j removes one more power h^(2j + 2) from the error. `gradcheck` does this before it calls a gradient
# wrong. In `tinytoken/checking/differences.py`, `row` holds D(k - 1, .) and `new` D(k, .):

# %%
LINE = "new.append(new[j] + (new[j] - old) / (4 ** (j + 1) - 1))"
assert LINE in inspect.getsource(differences.Slopes.extrapolated)
row = []
for k in range(6):
    new = [central(np.exp, 1.0, 0.8 / 2 ** k)]
    for j, old in enumerate(row):
        new.append(new[j] + (new[j] - old) / (4 ** (j + 1) - 1))
    row = new
    print(f"step {0.8 / 2 ** k:.3f}, relative errors:", *(f"{abs(d / math.e - 1):.0e}" for d in row))
assert abs(row[-1] / math.e - 1) < 1e-12 < 1e-6 < abs(row[0] / math.e - 1)

# %% [markdown]
# Each line halves the step. The last entry of a line is the best guess from all steps so far. These steps are
# not small at all, so rounding does not matter yet, and the result is better than the best of all central
# differences.
#
# The straight-through gradient is described by Bengio, Léonard and Courville, *Estimating or propagating
# gradients through stochastic neurons for conditional computation* (2013). Lesson 06 asks how good it is.

# %%
here.end()
