# %% [markdown]
# # Lesson 06: Gumbel-softmax, and what straight-through costs
# After this lesson you can draw decisions that pass a gradient on, and measure how wrong and how noisy that
# gradient is.

# %%
import itertools
import math

import numpy as np
import tqdm

import tinytoken as tt
from tinytoken.experiments import lesson

here = lesson.begin("06_gumbel_softmax")
rng = np.random.default_rng(here.seed)

# %% [markdown]
# ## Drawing a category
#
# In lesson 05 the decisions were given: keep this token, drop that one. Now a network must make them. It
# computes a logit l_c for each of C categories, p = softmax(l) are their probabilities, and one category is
# drawn at random. (For DynamicViT the categories are "keep" and "drop", and there is one draw per token.)
#
# This is the usual way to draw: cut the interval [0, 1] into pieces of lengths p_1, ..., p_C, draw a uniform
# number U, and see in which piece it lies. That is right, but there is nothing to differentiate: for a fixed
# U, the result is constant until a cut moves past U, and then it jumps.
#
# There is another way. Draw C independent **Gumbel** numbers G_c = -ln(-ln U_c), add them to the logits, and
# take the category with the largest l_c + G_c. This **Gumbel-max trick** draws category c with probability
# exactly p_c. Here is why. The distribution function of G is
#
# $$F(x) = P(-\ln(-\ln \, U) \le x) = P(U \le e^{-e^{-x}}) = e^{-e^{-x}}, \qquad F'(x) = e^{-x} F(x)$$
#
# Category 1 wins if l_1 + G_1 takes some value x and all others stay below it. With S = sum_c e^(l_c),
#
# $$\begin{aligned}
# P(1 \text{ wins}) &= \int F'(x - l_1) \prod_{c \neq 1} F(x - l_c) \, dx
#                    = \int e^{-(x - l_1)} \prod_c e^{-e^{-(x - l_c)}} \, dx \\
#                   &= e^{l_1} \int e^{-x} e^{-S e^{-x}} \, dx = \frac{e^{l_1}}{S}
# \end{aligned}$$
#
# The last step substitutes y = e^-x: the integral of e^(-S y) dy over y > 0 is 1 / S. The result is p_1.

# %%
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gumbel(shape):  # U = 0 would give minus infinity: start at the smallest number above it
    return -np.log(-np.log(rng.uniform(np.finfo(float).tiny, 1, shape)))


logits, draws = np.array([1.0, 0.2, -0.5, -2.0]), here.pick(20_000, 1_000_000, 10_000_000)
p, uniform = softmax(logits), rng.uniform(size=draws)
ways = {"pieces of [0, 1]": np.minimum(np.searchsorted(p.cumsum(), uniform), 3),
        "Gumbel-max": np.argmax(logits + gumbel((draws, 4)), axis=1)}
print(f"{'probabilities':17}", *(f"{x:9.5f}" for x in p))
chi_squares = {}
for name, drawn in ways.items():
    counts = np.bincount(drawn, minlength=4)
    chi_squares[name] = float(((counts - draws * p) ** 2 / (draws * p)).sum())
    print(f"{name:17}", *(f"{x:9.5f}" for x in counts / draws), f"   chi-square {chi_squares[name]:.2f}")
print(f"{'standard error':17}", *(f"{math.sqrt(x * (1 - x) / draws):9.5f}" for x in p),
      "   (if all is right, chi-square is 3 on average, and above 16.3 once in 1000)")

# %% [markdown]
# Two categories are simpler. "Keep" wins if l_0 + G_0 > l_1 + G_1, which means theta + X > 0 with theta =
# l_0 - l_1 and X = G_0 - G_1. The difference of two Gumbel numbers has the **logistic** distribution: P(X <=
# x) = sigmoid(x) = 1 / (1 + e^-x). So P(keep) = P(X > -theta) = sigmoid(theta), as it must be. The density of
# X is rho(x) = sigmoid(x) sigmoid(-x). We shall use both.
#
# ## Temperature
#
# In this trick, all randomness is in G, which does not depend on the logits. The logits only decide which
# entry is the largest. If we make that soft, there is a gradient. **Gumbel-softmax** replaces the choice of
# the largest entry by a softmax with a temperature tau > 0:
#
# $$s = \mathrm{softmax} \left( \frac{l + G}{\tau} \right),
#   \quad \text{for two categories} \quad s_0 = \mathrm{sigmoid} \left( \frac{\theta + X}{\tau} \right)$$
#
# For a small tau, s is nearly one-hot, and nearly the hard draw. For a large tau, s is nearly uniform,
# whatever was drawn. The position of the largest entry is the same for every tau, since dividing by tau does
# not change the order. So the hard draw has the probabilities p at any temperature. But the mean of s is not
# p.

# %%
def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def rho(x):
    """The logistic density, which is the sigmoid's slope too."""
    return sigmoid(x) * sigmoid(-x)


TAUS = (0.1, 0.5, 1.0, 5.0)
two = np.log([0.7, 0.3]) + gumbel((here.pick(5000, 200_000, 200_000), 2))  # keep with probability 0.7
soft = {tau: softmax(two / tau)[:, 0] for tau in TAUS}
print("tau    mean of s   share of s > 1/2   mean of s (1 - s)")
for tau, s in soft.items():
    print(f"{tau:4} {s.mean():11.4f} {(s > 0.5).mean():18.4f} {(s * (1 - s)).mean():19.4f}")
    assert np.array_equal(s > 0.5, two[:, 0] > two[:, 1])  # the same decision at every temperature


def draw_temperatures(figure):
    for axis, (tau, s) in zip(figure.subplots(1, len(soft), sharey=True), soft.items()):
        axis.hist(s, bins=40, range=(0, 1), density=True, color="#0072b2")
        axis.axvline(s.mean(), color="#d55e00", lw=2, label=f"mean {s.mean():.2f}")
        axis.axvline(0.7, color="black", ls=":", label="p = 0.70")
        axis.set(title=f"tau = {tau}", xlabel="soft decision s", ylim=(0, 8))
        axis.legend(fontsize=8, loc="upper left")
    figure.axes[0].set_ylabel("density")
    figure.suptitle("A token kept with probability 0.7, as a soft decision: from nearly 0 or 1 to nearly one "
                    "half")


here.picture("temperatures", draw_temperatures, width=11, height=3)

# %% [markdown]
# ## Straight-through
#
# A soft decision is not a real decision. A token with s = 0.4 would take part in the attention with a weight
# of 0.4, while at inference it is either there or not. So in the forward pass, DynamicViT uses the hard draw
# h, which is 1 where s is largest and 0 elsewhere. In the backward pass it acts as if s had been used: the
# gradient that arrives at h is passed **straight through** to s. Many programs write this as y = (h -
# stop(s)) + s, where stop() has the value of its argument and no gradient.
#
# The rest is calculus: the vjp of the softmax (lesson 03) with an upstream gradient u, and a factor 1 / tau
# from the division.
#
# $$\frac{dL}{dl_c} = \frac{s_c}{\tau} \left( u_c - \sum_b s_b u_b \right),
#   \qquad \frac{dL}{d\theta} = \frac{u \, s \, (1 - s)}{\tau}$$
#
# The second is for two categories, with u at "keep" only.

# %%
def gumbel_softmax(logits, noise, tau, hard):
    """(value, vjp): the one-hot or soft draw, and upstream u -> gradient of the logits."""
    s = softmax((logits + noise) / tau)
    value = np.eye(s.shape[-1])[s.argmax(axis=-1)] if hard else s
    return value, lambda u: s * (u - (s * u).sum(axis=-1, keepdims=True)) / tau


logits, noise, upstream = rng.standard_normal((6, 2)), gumbel((6, 2)), rng.standard_normal((6, 2))
for hard in (False, True):
    value, vjp = gumbel_softmax(logits, noise, 0.5, hard)
    leaf = tt.Tensor(logits, requires_grad=True)
    out = tt.ops.gumbel_softmax(leaf, noise, tau=0.5, hard=hard)
    out.backward(upstream)
    values_off, gradients_off = np.abs(out.data - value).max(), np.abs(leaf.grad - vjp(upstream)).max()
    print(f"hard={hard}: value differs from the op's by {values_off:.1e}, gradient by {gradients_off:.1e}")
    assert max(values_off, gradients_off) < 1e-12
print(tt.gradcheck(lambda logits: tt.ops.gumbel_softmax(logits, noise, tau=0.5), logits))

# %% [markdown]
# The soft path passes the check. The hard path cannot be checked in this way: its value is constant almost
# everywhere, so the finite difference is 0, and the gradient is something else on purpose. But we can check
# that the hard and the soft gradient are equal for the same u. This was asserted above.
#
# So this is not a true gradient. It multiplies a slope of the loss at h with a slope of the decision at s,
# and these are two different points. Is it a good replacement? A training curve cannot tell, since it does
# not show what another gradient would have done. But we can find out with a problem so small that everything
# can be computed.
#
# ## A problem small enough to be exact
#
# One class token looks at n tokens. Each token has a key, a value and a decision D_j, 0 or 1. It is kept with
# probability p_j = sigmoid(theta_j), independently of the others. The masked attention of lesson 05 (the
# class token always sees itself, too) gives one vector, a matrix turns it into logits, and L(D) is the
# cross-entropy. Training minimises the expected loss
#
# $$J(\theta) = \sum_D P(D) \, L(D), \qquad P(D) = \prod_j p_j^{D_j} (1 - p_j)^{1 - D_j}$$
#
# This is a sum over all 2^n subsets: 256 for n = 8. For the exact gradient, note that only P depends on
# theta. dp_j/dtheta_j = p_j (1 - p_j), so dlnP/dtheta_j = D_j (1 - p_j) - (1 - D_j) p_j = D_j - p_j. And
# since dP = P dlnP,
#
# $$\begin{aligned}
# \frac{dJ}{d\theta_j} &= \sum_D P(D) \, (D_j - p_j) \, L(D) \\
#     &= p_j (1 - p_j) \, \left( E[L \mid D_j = 1] - E[L \mid D_j = 0] \right) && (1)
# \end{aligned}$$
#
# The last line says what the gradient of a decision is: **the difference that the decision makes** when it
# goes all the way from 0 to 1, averaged over the other decisions.

# %%
class Problem:
    """Keys, values, a read-out and a label by chance; theta (n,) are the logits of keeping each of the n
    tokens. spread: about the standard deviation of the attention logits."""

    def __init__(self, seed, n=8, spread=1.0, width=8, classes=4):
        chance = np.random.default_rng((here.seed, seed))
        # row 0: the class token
        self.q, self.k, self.v = (chance.standard_normal((rows, width)) for rows in (1, n + 1, n + 1))
        self.q *= spread
        self.readout = chance.standard_normal((width, classes))
        self.label, self.theta, self.n = int(chance.integers(classes)), chance.standard_normal(n), n

    def losses(self, decisions):
        """L (S,) and dL/dD (S, n) for decisions (S, n), hard or soft."""
        size = len(decisions)
        leaf = tt.Tensor(decisions, requires_grad=True)
        keep = tt.ops.concat(np.ones((size, 1)), leaf, axis=1)
        q, k, v = (np.broadcast_to(x, (size, 1, *x.shape)) for x in (self.q, self.k, self.v))
        out = tt.ops.attention(q, k, v, keep, sees_itself=False)
        log_probs = tt.ops.log_softmax(out.reshape(size, -1) @ self.readout)
        losses = -log_probs[:, self.label]
        return losses.data, tt.grad(losses.sum(), [leaf])[0]

    def uncapped_slopes(self, decisions):
        """dL/dD (S, n) without the cap that the op puts on dropped keys, by the formula of lesson 05b."""
        e = np.exp(self.k @ self.q[0] / math.sqrt(self.q.shape[1]))  # (n + 1,)
        keep = np.concatenate([np.ones((len(decisions), 1)), decisions], axis=1)
        Z = (keep * e).sum(axis=1, keepdims=True)
        A = keep * e / Z
        d_logits = softmax(A @ self.v @ self.readout) - np.eye(self.readout.shape[1])[self.label]
        u = d_logits @ self.readout.T @ self.v.T  # dL/dA (S, n + 1)
        return (e / Z * (u - (u * A).sum(axis=1, keepdims=True)))[:, 1:]


def all_subsets(n):
    return np.array(list(itertools.product((0.0, 1.0), repeat=n)))


def probabilities(theta, subsets):
    """P (2^n,) of each subset."""
    p = sigmoid(theta)
    return np.where(subsets > 0, p, 1 - p).prod(axis=1)


problem, subsets = Problem(0), all_subsets(8)
L, slopes = problem.losses(subsets)
P, p = probabilities(problem.theta, subsets), sigmoid(problem.theta)
exact = P @ ((subsets - p) * L[:, None])

step, J = 1e-5, lambda theta: probabilities(theta, subsets) @ L
numeric = [(J(problem.theta + e) - J(problem.theta - e)) / (2 * step) for e in step * np.eye(8)]
mean_given = lambda j, d: np.average(L, weights=P * (subsets[:, j] == d))  # E[L | D_j = d]
difference = [p[j] * (1 - p[j]) * (mean_given(j, 1) - mean_given(j, 0)) for j in range(8)]
print("exact gradient:", exact.round(4))
print(f"against finite differences of J: {np.abs(exact - numeric).max():.1e}; "
      f"against the right side of (1): {np.abs(exact - difference).max():.1e}")
assert np.abs(exact - numeric).max() < 1e-8 and np.abs(exact - difference).max() < 1e-12

# %% [markdown]
# ## Four estimates from one draw
#
# A real network has no time for 256 subsets, and certainly not for 2^196. It draws once and makes an
# estimate. Let D be a hard draw, s the soft draw with the same noise, g the exact gradient, and est its
# estimate.
#
# - **REINFORCE** (Williams 1992): est_j = (D_j - p_j) L(D). By (1), its mean is the exact gradient: it is
#   **unbiased**. It does not use the slope of L at all. It only sees whether the loss was high or low, and
#   cannot tell which of the decisions were the reason. So it is noisy.
# - **REINFORCE with a baseline**: est_j = (D_j - p_j)(L(D) - b) for a number b that does not depend on D. It
#   is still unbiased, because E[D_j - p_j] = 0. A good simple choice is a b near E[L]. We take exactly b = J.
#   In training, one would use a running mean.
# - **Soft relaxation**: forward with s, so est_j = dL/dD_j(s) s_j (1 - s_j) / tau. This is a true gradient,
#   but of another quantity, E[L(s)].
# - **Straight-through**: forward with D, so est_j = dL/dD_j(D) s_j (1 - s_j) / tau. This is not the gradient
#   of any quantity.
#
# For each estimate we want the **bias**, which is the distance of its mean from the exact gradient, and the
# **noise**, which is its standard deviation. We measure both as lengths of vectors, in units of the length
# |g| of the exact gradient: the bias is |E[est] - g| / |g|, and the noise of one draw is sqrt(sum_j
# Var[est_j]) / |g|.

# %%
def draw_estimates(problem, draws, tau, J):
    """{estimator: (draws, n) gradients, each from one draw of the noise}."""
    noise = gumbel((draws, problem.n, 2))
    p = sigmoid(problem.theta)
    log_probs = np.stack([np.log(p), np.log(1 - p)], axis=-1)  # column 0 = keep, as a predictor puts it out
    log_probs = np.broadcast_to(log_probs, noise.shape)
    s, D = (tt.ops.gumbel_softmax(log_probs, noise, tau=tau, hard=hard).data[..., 0]
            for hard in (False, True))
    L, slope_at_D = problem.losses(D)
    _, slope_at_s = problem.losses(s)
    pass_on = s * (1 - s) / tau
    return {"REINFORCE": (D - p) * L[:, None], "REINFORCE, baseline": (D - p) * (L - J)[:, None],
            "soft": slope_at_s * pass_on, "straight-through": slope_at_D * pass_on}


def bias_and_noise(samples, exact):
    """{bias, noise and the standard error of each}, relative to the exact gradient's length. Of the bias it
    is the root mean square distance of the mean of so many draws from its expectation, of the noise it is
    taken from 20 parts of the draws."""
    length, variance = np.linalg.norm(exact), samples.var(axis=0).sum()
    parts = [math.sqrt(part.var(axis=0).sum()) for part in np.array_split(samples, 20)]
    return {"bias": float(np.linalg.norm(samples.mean(axis=0) - exact) / length),
            "bias_error": float(math.sqrt(variance / len(samples)) / length),
            "noise": float(math.sqrt(variance) / length),
            "noise_error": float(np.std(parts) / math.sqrt(20) / length)}


draws = here.pick(2000, 100_000, 200_000)
print(f"problem 0, tau 1, {draws:,} draws each; ± standard "
      f"error\n{'':22}{'bias':>17}{'noise of one draw':>20}")
one_problem = {}
for name, samples in draw_estimates(problem, draws, 1.0, P @ L).items():
    one_problem[name] = found = bias_and_noise(samples, exact)
    print(f"{name:22}{found['bias']:8.4f} ± {found['bias_error']:.4f}{found['noise']:11.3f} ± "
          f"{found['noise_error']:.3f}")

# %% [markdown]
# The mean of finitely many draws is never exact. So an unbiased estimate shows a bias of about one standard
# error or less. The two biased estimates are off by many standard errors.
#
# ## The bias of straight-through, exactly
#
# For straight-through we need no draws at all. If D is given, the slope of the loss is fixed. What is left is
# the mean of s_j (1 - s_j) / tau over the noise that leads to this D_j, and this is a one-dimensional
# integral. Substitute y = (theta + x) / tau. Then s = sigmoid(y), s (1 - s) = rho(y), dx = tau dy, and the
# token is kept if y > 0:
#
# $$\begin{aligned}
# c^1_j &= E \left[ \frac{s_j (1 - s_j)}{\tau} \text{, where } D_j = 1 \right]
#        = \int_0^\infty \rho(y) \, \rho(\tau y - \theta_j) \, dy \\
# c^0_j &= E \left[ \frac{s_j (1 - s_j)}{\tau} \text{, where } D_j = 0 \right]
#        = \int_{-\infty}^0 \rho(y) \, \rho(\tau y - \theta_j) \, dy
# \end{aligned}$$
#
# (The density of x = tau y - theta is rho, and 1 / tau cancels with dx.) So the mean of straight-through is a
# sum over subsets. Its second moment is such a sum, too, with the slopes squared and with rho(y)^2 / tau
# instead of rho(y).
#
# $$E[\mathrm{est}_j] = c^1_j \, E \left[ \frac{dL}{dD_j} \mid D_j = 1 \right]
#                     + c^0_j \, E \left[ \frac{dL}{dD_j} \mid D_j = 0 \right] \qquad (2)$$

# %%
GRID = np.linspace(0, 40, 401)  # beyond 40 the logistic density is below 1e-17
WEIGHTS = 0.1 / 3 * np.array([1.0] + [4.0, 2.0] * 199 + [4.0, 1.0])  # Simpson's rule


def passed_on(theta, tau, power):
    """E[(s (1 - s) / tau)^power [D = d]] for d = 0, 1: two arrays (n,)."""
    return [(rho(tau * y - theta[:, None]) * rho(y) ** power * WEIGHTS).sum(axis=1) / tau ** (power - 1)
            for y in (-GRID, GRID)]


def straight_through_exactly(theta, subsets, P, slopes, tau):
    """Mean (n,) and variance (n,) of the straight-through estimate, by (2)."""
    p, moments = sigmoid(theta), []
    for power in (1, 2):
        zero, one = passed_on(theta, tau, power)
        moments.append(P @ (slopes ** power * np.where(subsets > 0, one / p, zero / (1 - p))))
    return moments[0], moments[1] - moments[0] ** 2


def relative(mean, variance, exact):
    length = np.linalg.norm(exact)
    return float(np.linalg.norm(mean - exact) / length), float(math.sqrt(variance.sum()) / length)


for tau in (0.25, 1.0, 4.0):
    mean, variance = straight_through_exactly(problem.theta, subsets, P, slopes, tau)
    samples = draw_estimates(problem, draws, tau, P @ L)["straight-through"]
    z = (samples.mean(axis=0) - mean) / np.sqrt(variance / draws)
    bias, noise = relative(mean, variance, exact)
    print(f"tau {tau}: bias {bias:.4f}, noise {noise:.3f}; "
          f"the mean of {draws:,} draws is off by at most {np.abs(z).max():.1f} standard errors")

# %% [markdown]
# ## Where the bias comes from
#
# Let tau -> 0 in (2). Then rho(tau y - theta) -> rho(theta) = p (1 - p), and the integral of rho over y > 0
# is 1/2. So c^0 and c^1 both become p (1 - p) / 2, and
#
# $$E[\mathrm{est}_j] \to \frac{p_j (1 - p_j)}{2} \left( E \left[ \frac{dL}{dD_j} \mid D_j = 1 \right]
#     + E \left[ \frac{dL}{dD_j} \mid D_j = 0 \right] \right) \qquad (3)$$
#
# Compare this with (1). Equation (1) has the difference L(1) - L(0), which is the integral of the slope from
# 0 to 1. Equation (3) has the mean of the slopes at both ends instead: this is the **trapezoidal rule** with
# a single interval. It is exact if L is linear or quadratic in each decision, and has an error otherwise. So
# in general, some bias stays at any temperature. (Liu et al. 2023, arXiv 2304.08612, also see
# straight-through as a rule for this integral, and build an estimator on the trapezoidal rule.)
#
# In this limit the soft relaxation is better. As tau -> 0, its s can be anywhere between 0 and 1, so it meets
# the slope everywhere in between, and its bias vanishes. Both estimates pay for a small tau with noise: s
# (1 - s) / tau is then 0 for nearly all draws and up to 1 / (4 tau) for a few, and its second moment grows
# like 1 / tau.
#
# With tau around 1 there is a second bias, in the length of the gradient. For p = 1/2 and tau = 1, s is
# uniform on [0, 1]. So on average a factor of E[s (1 - s)] = 1/6 is passed on, and not p (1 - p) = 1/4. This
# factor depends on p_j, so it also changes the direction a little. But it mostly changes the length, and
# AdamW divides the gradient by its own size. An error of the **direction** is not harmless. So in addition to
# the bias, we report what is left of it after the best rescaling: the sine of the angle between E[est] and g.
#
# There is a third bias: the cap of lesson 05b, by which a dropped key counts at most as much as the strongest
# kept one. This bias is on purpose. Is it a good one? We compare with the slope without the cap.

# %%
p_half = sum(passed_on(np.zeros(1), 1.0, 1))[0]
print(f"passed on at p = 1/2, tau 1: {p_half:.6f} (1/6 = {1 / 6:.6f})")
assert abs(p_half - 1 / 6) < 1e-6

ends = [np.array([np.average(slopes[:, j], weights=P * (subsets[:, j] == d)) for j in range(8)])
        for d in (0, 1)]
trapezoid = p * (1 - p) * (ends[0] + ends[1]) / 2
limit = straight_through_exactly(problem.theta, subsets, P, slopes, 1e-4)[0]
difference = np.abs(limit - trapezoid).max() / np.abs(trapezoid).max()
print(f"straight-through at tau 0.0001 against (3): {difference:.1e} of the largest")
assert difference < 1e-3

inside = rng.uniform(size=(5, 8))
difference = np.abs(problem.uncapped_slopes(inside) - problem.losses(inside)[1]).max()
print(f"uncapped slopes against the op's at soft decisions, where there is no cap: {difference:.1e}")
assert difference < 1e-12

# %% [markdown]
# ## Many problems
#
# One problem is not enough. We draw more problems at random, and look at medians and quartiles.
# Straight-through and REINFORCE are computed exactly, the soft relaxation from draws.

# %%
def sine(a, b):
    """Of the angle between two vectors: 0 same direction, 1 orthogonal or worse."""
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return float(math.sqrt(max(0.0, 1 - max(cosine, 0.0) ** 2)))


def study(seed, taus, n=8, spread=1.0, draws=0):
    """{(estimator, tau): (bias, noise, sine)} for one problem; soft only if there are draws."""
    problem, subsets = Problem(seed, n, spread), all_subsets(n)
    L, slopes = problem.losses(subsets)
    P, p = probabilities(problem.theta, subsets), sigmoid(problem.theta)
    exact, found = P @ ((subsets - p) * L[:, None]), {}
    for name, baseline in (("REINFORCE", 0.0), ("REINFORCE, baseline", P @ L)):
        each = (subsets - p) * (L - baseline)[:, None]
        found[name, None] = *relative(P @ each, P @ each ** 2 - (P @ each) ** 2, exact), 0.0
    uncapped = problem.uncapped_slopes(subsets)
    for tau in taus:
        for name, slope in (("straight-through", slopes), ("straight-through, no cap", uncapped)):
            mean, variance = straight_through_exactly(problem.theta, subsets, P, slope, tau)
            found[name, tau] = *relative(mean, variance, exact), sine(mean, exact)
        if draws:
            samples = draw_estimates(problem, draws, tau, P @ L)["soft"]
            found["soft", tau] = *relative(samples.mean(axis=0), samples.var(axis=0),
                                           exact), sine(samples.mean(axis=0), exact)
    return found


STUDY_TAUS = here.pick((0.25, 1.0), (0.1, 0.25, 0.5, 1.0, 2.0, 5.0), (0.1, 0.25, 0.5, 1.0, 2.0, 5.0))
soft_draws, problems = here.pick(500, 10_000, 40_000), here.pick(3, 30, 100)
studies = [study(seed, STUDY_TAUS, draws=soft_draws) for seed in tqdm.tqdm(range(problems), desc="problems")]
# {(estimator, tau): (3, 3)}: quartiles of bias, noise and sine over the problems
quartiles = {key: np.quantile([s[key] for s in studies], (0.25, 0.5, 0.75), axis=0) for key in studies[0]}
print(f"{problems} problems of 8 tokens, medians [quartiles]; noise is that of one draw\n"
      f"{'':27}{'tau':>5}{'bias':>22}{'sine of the angle':>24}{'noise':>22}")
for (name, tau), rows in quartiles.items():
    bias, noise, angle = (f"{m:.3f} [{low:.3f} {high:.3f}]" for low, m, high in rows.T)
    print(f"{name:27}{tau or '':>5}{bias:>22}{angle:>24}{noise:>22}")
soft_error = {tau: quartiles["soft", tau][1, 1] / math.sqrt(soft_draws) for tau in STUDY_TAUS}
print("standard error of soft's bias, from its draws:",
      ", ".join(f"{tau}: {error:.3f}" for tau, error in soft_error.items()))

# %% [markdown]
# This is what to look for. As tau becomes smaller, the bias of straight-through falls until it reaches the
# error of the trapezoidal rule (and of the cap). The bias of the soft relaxation falls further. Large
# temperatures make both estimates very short (a bias near 1), but keep much of their direction. REINFORCE has
# no bias and the most noise, and the baseline removes most of this noise.
#
# The cap of lesson 05b does not change the direction much here, and it removes about half of the noise. These
# attention logits have a spread of 1. With a larger spread, dropped keys stand out more, and the effect of
# the cap becomes visible:

# %%
def as_dict(row):
    return {"bias": float(row[0]), "noise": float(row[1]), "sine": float(row[2])}


cap = []
print("medians, tau 1     straight-through: sine   noise     without the cap: sine    noise")
for spread in (1.0, 2.0, 4.0):
    found = [study(seed, (1.0,), spread=spread) for seed in range(problems)]
    names = ("straight-through", "straight-through, no cap")
    medians = {name: as_dict(np.median([f[name, 1.0] for f in found], axis=0)) for name in names}
    cap.append({"spread": spread} | medians)
    print(f"spread {spread:3}"
          + "".join(f"{medians[name]['sine']:29.3f}{medians[name]['noise']:9.3f}" for name in names))

# %% [markdown]
# Is a small bias better than much noise? That depends on how many draws are averaged. The mean of m
# independent draws has the expected squared error bias^2 + noise^2 / m. The right panel of the picture shows
# the square root of this.

# %%
COLOURS = {"straight-through": "#d55e00", "straight-through, no cap": "#e69f00", "soft": "#0072b2",
           "REINFORCE": "#777777",
           "REINFORCE, baseline": "#009e73", "exact": "black", "straight-through, mean": "#cc79a7"}
MARKS = {"straight-through": "o", "straight-through, no cap": "v", "soft": "s"}


def draw_study(figure):
    left, middle, right = figure.subplots(1, 3)
    for name, mark in MARKS.items():
        low, median, high = np.stack([quartiles[name, tau] for tau in STUDY_TAUS], axis=1)  # each (taus, 3)
        for axis, i in ((left, 0), (middle, 1)):
            axis.plot(STUDY_TAUS, median[:, i], mark + "-", color=COLOURS[name], label=name)
            axis.fill_between(STUDY_TAUS, low[:, i], high[:, i], color=COLOURS[name], alpha=0.15)
    left.errorbar(STUDY_TAUS, [quartiles["soft", tau][1, 0] for tau in STUDY_TAUS],
                  list(soft_error.values()), fmt="none",
                  color="black", capsize=3, label="standard error (soft)")
    for name in ("REINFORCE", "REINFORCE, baseline"):
        middle.axhline(quartiles[name, None][1, 1], color=COLOURS[name], ls="--", label=name)
    left.set(xscale="log", ylim=(0, 1), xlabel="temperature tau", ylabel="bias / length of the exact "
                                                                             "gradient",
             title="How wrong on average")
    middle.set(xscale="log", yscale="log", xlabel="temperature tau", title="How noisy",
               ylabel="noise of one draw / length of the exact gradient")
    many = np.geomspace(1, 1000, 100)
    for name, tau, style in (("straight-through", 1.0, "-"), ("straight-through", 0.25, ":"),
                             ("soft", 1.0, "-"),
                             ("soft", 0.25, ":"), ("REINFORCE", None, "--"),
                             ("REINFORCE, baseline", None, "--")):
        errors = np.median([np.sqrt(s[name, tau][0] ** 2 + s[name, tau][1] ** 2 / many) for s in studies],
                           axis=0)
        right.plot(many, errors, style, color=COLOURS[name], label=name + (f", tau {tau}" if tau else ""))
    right.set(xscale="log", yscale="log", xlabel="draws averaged", ylabel="root mean square error / length",
              title="Who wins depends on the draws")
    figure.suptitle(f"Estimates of a decision's gradient: {problems} problems of 8 tokens, medians and "
                    f"quartiles")
    for axis in (left, middle, right):
        axis.legend(fontsize=7)


here.picture("bias_and_noise", draw_study, width=14, height=4.7)

# %% [markdown]
# ## More tokens
#
# REINFORCE uses the whole loss for every decision, so the estimate for each token has the noise of all the
# others. How does this noise grow with the number of tokens? And how many draws are needed until the unbiased
# estimate (with baseline) is the better one? The errors are equal if noise_R^2 / m = bias^2 + noise_S^2 / m,
# so m = (noise_R^2 - noise_S^2) / bias^2.

# %%
by_tokens = []
print(f"medians of {problems} problems, tau 1\n"
      "tokens   straight-through: bias   sine   noise    REINFORCE with baseline: noise    equal error at "
      "draws")
for n in here.pick((2, 6), (2, 4, 6, 8, 10, 12), (2, 4, 6, 8, 10, 12)):
    found = [study(seed, (1.0,), n=n) for seed in range(problems)]
    S, R = (np.array([f[key] for f in found])
            for key in (("straight-through", 1.0), ("REINFORCE, baseline", None)))
    bias, noise, angle = np.median(S, axis=0).tolist()
    noise_R, equal = float(np.median(R[:, 1])), float(np.median((R[:, 1] ** 2 - S[:, 1] ** 2) / S[:, 0] ** 2))
    by_tokens.append({"tokens": n, "bias": bias, "sine": angle, "noise": noise, "noise_reinforce": noise_R,
                      "equal_at_draws": equal})
    print(f"{n:6} {bias:24.3f} {angle:6.3f} {noise:7.3f} {noise_R:33.3f} {equal:23.0f}")

# %% [markdown]
# ## What this means for training
#
# Now we let a model learn which tokens to keep. There are 64 pictures with n tokens each. Some tokens are
# signal: they show the class of their picture, one of 4. The others are clutter: each shows a random class. A
# fixed reader (a class token with masked attention, a fixed matrix, cross-entropy) sees the tokens that are
# kept. The part that learns is a **scorer**. From 8 features of a token it computes theta = w . x + b, with
# the same w and b for all tokens. One direction of the features tells signal from clutter, with noise. All
# arms start from w = 0, where each token is kept with probability one half. All take the same number of steps
# of AdamW with 16 pictures and one draw each. They differ only in the gradient for theta. (With `--full`,
# each arm also gets the best of three learning rates.)
#
# For 8 tokens there are two more arms. They use no draws, and go through all 256 subsets of each picture: the
# exact gradient of equation (1), and the mean of straight-through by equation (2). The second one has the
# bias of straight-through but no noise, so it shows which of the two matters. For all arms we look at J, the
# expected loss of **hard** decisions, also for the soft arm, which never sees a hard decision in training.

# %%
class Task:
    """64 pictures of n tokens: features (64, n, 8) for the scorer; heights (64, n) of their attention logits,
    values (64, n, 8) and labels for the reader; is_signal (64, n)."""

    def __init__(self, seed, n, signal, pictures=64, width=8, classes=4):
        chance = np.random.default_rng((here.seed, 1000 + seed))
        prototypes, marker = chance.standard_normal((classes, width)), chance.standard_normal(width)
        prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
        marker /= np.linalg.norm(marker)
        self.labels = chance.integers(classes, size=pictures)
        self.is_signal = np.array([chance.permutation(n) < signal for _ in range(pictures)])
        shows = np.where(self.is_signal, self.labels[:, None], chance.integers(classes, size=(pictures, n)))
        self.values = 2 * prototypes[shows] + 0.3 * chance.standard_normal((pictures, n, width))
        self.features = np.where(self.is_signal, 1,
                                 -1)[..., None] * marker + 0.7 * chance.standard_normal((pictures, n, width))
        self.heights, self.readout = chance.standard_normal((pictures, n)), 4 * prototypes.T
        self.uniform = chance.uniform(size=(20, pictures, n))  # the same draws for whatever is evaluated

    def losses(self, decisions, index):
        """Cross-entropy (S,) of pictures `index` (S,) under the decisions (S, n)."""
        size, first = len(index), ((0, 0), (1, 0))  # a zero in front for the class token
        keys, values = np.pad(self.heights[index], first), np.pad(self.values[index], (*first, (0, 0)))
        keep = tt.ops.concat(np.ones((size, 1)), decisions, axis=1)
        out = tt.ops.attention(np.ones((size, 1, 1, 1)), keys[:, None, :, None], values[:, None], keep,
                               sees_itself=False)
        return -tt.ops.log_softmax(out.reshape(size, -1) @ self.readout)[np.arange(size), self.labels[index]]

    def table(self):
        """Every subset (2^n, n), and of each in every picture L (64, 2^n) and dL/dD (64, 2^n, n)."""
        subsets, pictures = all_subsets(self.heights.shape[1]), len(self.labels)
        leaf = tt.Tensor(np.tile(subsets, (pictures, 1)), requires_grad=True)
        losses = self.losses(leaf, np.repeat(np.arange(pictures), len(subsets)))
        slopes = tt.grad(losses.sum(), [leaf])[0]
        return subsets, losses.data.reshape(pictures, -1), slopes.reshape(pictures, *subsets.shape)

    def expected_loss(self, theta):
        """J, estimated from 20 hard draws for each picture."""
        decisions = (self.uniform < sigmoid(theta)).reshape(-1, theta.shape[1]).astype(float)
        return float(self.losses(decisions, np.tile(np.arange(len(theta)), 20)).data.mean())


WITHOUT_DRAWS = ("exact", "straight-through, mean")


def theta_gradient(arm, task, theta, index, chance, state):
    """An estimate of d(mean loss of the pictures `index`) / d theta, (B, n), from one draw; from all subsets
    for the arms with a table: the exact gradient by (1), the mean of straight-through by (2)."""
    size = len(index)
    if "table" in state:
        subsets, losses, slopes = state["table"]
        theta = theta.clip(-30, 30)  # beyond, p rounds to 0 or 1
        p, q = sigmoid(theta), sigmoid(-theta)
        P = np.where(subsets > 0, p[:, None], q[:, None]).prod(axis=2)  # (B, 2^n)
        if arm == "exact":
            return ((P * losses[index])[..., None] * (subsets - p[:, None])).sum(axis=1) / size
        zero, one = (c.reshape(p.shape) for c in passed_on(theta.reshape(-1), 1.0, 1))
        pass_on = np.where(subsets > 0, (one / p)[:, None], (zero / q)[:, None])
        return (P[..., None] * slopes[index] * pass_on).sum(axis=1) / size
    x, p = theta + chance.logistic(size=theta.shape), sigmoid(theta)  # the difference of two Gumbels
    D, s = (x > 0).astype(float), sigmoid(x)
    if arm.startswith("REINFORCE"):
        losses = task.losses(D, index).data
        baseline = state.get("mean", 0.0) if "baseline" in arm else 0.0
        state["mean"] = 0.9 * state.get("mean", losses.mean()) + 0.1 * losses.mean()
        return (D - p) * (losses - baseline)[:, None] / size
    leaf = tt.Tensor(D if arm == "straight-through" else s, requires_grad=True)
    return tt.grad(task.losses(leaf, index).mean(), [leaf])[0] * s * (1 - s)  # tau 1


def train(arm, task, seed, lr, steps, scorer=None):
    """(the scorer, [(step, J)])."""
    chance, n = np.random.default_rng((here.seed, 2000 + seed)), task.heights.shape[1]
    scorer = scorer or tt.nn.Linear(8, 1).astype("float64")  # weights and bias are zero
    optimizer = tt.optim.AdamW(scorer.parameters(), lr, weight_decay=0)
    state = {"table": task.table()} if arm in WITHOUT_DRAWS else {}
    theta_of = lambda features: scorer(features).reshape(-1, n)
    history = []
    for step in range(steps + 1):
        if step % 20 == 0:
            history.append((step, task.expected_loss(theta_of(task.features).data)))
        index = chance.choice(len(task.labels), 16, replace=False)
        theta = theta_of(task.features[index])
        scorer.zero_grad()
        theta.backward(theta_gradient(arm, task, theta.data, index, chance, state))
        optimizer.step(lr * tt.optim.warmup_cosine(step, steps + 1, warmup=0.05))
    return scorer, np.array(history)


# %%
SIZES = {8: 2, 64: 8}  # tokens: signal among them
steps, seeds, rates = here.pick(20, 300, 1000), here.pick(2, 8, 20), here.pick((0.3,), (0.3,),
                                                                               (0.1, 0.3, 1.0))
ARMS = (*WITHOUT_DRAWS, "straight-through", "soft", "REINFORCE", "REINFORCE, baseline")
arms = [(n, arm) for n in SIZES for arm in ARMS if n == 8 or arm not in WITHOUT_DRAWS]
tasks = {(n, seed): Task(seed, n, SIZES[n]) for n in SIZES for seed in range(seeds)}
runs, scorers = {}, {}
for n, arm in tqdm.tqdm(arms, desc="training"):
    tried = [[train(arm, tasks[n, seed], seed, lr, steps) for seed in range(seeds)] for lr in rates]
    # each has the rate that suits it
    best = min(tried, key=lambda results: np.mean([history[-1, 1] for _, history in results]))
    runs[n, arm], scorers[n, arm] = np.array([history for _, history in best]), [scorer for scorer, _ in best]

trained = []
print(f"\n{steps} steps, the same {seeds} tasks for each. J: mean at the end; its ratio to "
      f"straight-through's on the same task:\n"
      "geometric mean [± one standard error]; sure: the loss if the tokens with p > 1/2 are kept; kept: mean "
      "probability")
print(f"tokens  {'gradient':23}{'J':>7}{'of straight-through':>29}{'sure':>9}{'signal kept':>13}{'clutter kept':>14}")
for n, arm in arms:
    final, sure, kept = runs[n, arm][:, -1, 1], [], []
    for seed, scorer in enumerate(scorers[n, arm]):
        task = tasks[n, seed]
        theta = scorer(task.features).reshape(-1, n).data
        sure.append(task.losses((theta > 0).astype(float), np.arange(64)).data.mean())
        kept.append([sigmoid(theta)[which].mean() for which in (task.is_signal, ~task.is_signal)])
    signal, clutter = np.mean(kept, axis=0)
    gap = np.log(final / runs[n, "straight-through"][:, -1, 1])
    error = gap.std(ddof=1) / math.sqrt(seeds)
    low, ratio, high = (float(np.exp(gap.mean() + sign * error)) for sign in (-1, 0, 1))
    print(f"{n:6}  {arm:23}{final.mean():7.3f}{ratio:13.2f} [{low:.2f} to {high:.2f}]"
          f"{np.mean(sure):9.3f}{signal:13.2f}{clutter:14.2f}")
    trained.append({"tokens": n, "gradient": arm, "J": float(final.mean()), "ratio": ratio, "ratio_low": low,
                    "ratio_high": high,
                    "J_sure": float(np.mean(sure)), "signal_kept": float(signal),
                    "clutter_kept": float(clutter)})

stuck = scorers[8, "straight-through"]
after = [train("exact", tasks[8, seed], seed, 0.3, steps // 2, scorer)[1] for seed,
         scorer in enumerate(stuck)]
went_on = {"before": float(np.mean([h[0, 1] for h in after])),
           "after": float(np.mean([h[-1, 1] for h in after]))}
print(f"8 tokens, from where straight-through ended, {steps // 2} steps with the exact gradient: "
      f"J {went_on['before']:.3f} -> {went_on['after']:.3f}")

# %%
def draw_training(figure):
    for axis, n in zip(figure.subplots(1, 2), SIZES):
        for arm in [arm for size, arm in arms if size == n]:
            step, J = runs[n, arm][0, :, 0], runs[n, arm][:, :, 1]
            style = "--" if arm.startswith("REINFORCE") else "-"
            axis.plot(step, J.T, style, color=COLOURS[arm], lw=0.5, alpha=0.4)
            axis.plot(step, np.exp(np.log(J).mean(axis=0)), style, color=COLOURS[arm], lw=2.5, label=arm)
        axis.set(yscale="log", xlabel="step", ylabel="expected loss J of hard decisions",
                 title=f"{n} tokens, {SIZES[n]} of them signal")
        axis.legend(fontsize=8, loc="lower left" if n == 64 else "upper right")
    figure.suptitle("Learning which tokens to keep, by the gradient used (thin: each task, thick: their "
                    "geometric mean)")


here.picture("training", draw_training, width=11, height=4.4)

# %% [markdown]
# This is the result of the full run (20 tasks, 1,000 steps, the best of three learning rates for each arm,
# seed 0; `lessons/results/06_gumbel_softmax_full.json`). With 8 tokens, the exact gradient ends at 0.80 of
# the J of straight-through. The mean of straight-through, without its noise, ends at 0.97. So
# straight-through is worse here mostly because of its bias. REINFORCE with a baseline, which has no bias and
# much more noise, ends at 0.84 of the J of straight-through: at this size it is the better choice. In the
# default run (300 steps, 8 tasks, one learning rate) a part of the loss still comes from noise.
#
# With 64 tokens, the noise decides. REINFORCE with a baseline ends at 1.16 times the J of straight-through,
# without a baseline at 2.1 times. After the 300 steps of the default run, both are much further behind.
# DynamicViT makes 64 decisions per picture (196 in the paper) at each of three places. There straight-through
# is the better choice of the two.
#
# The soft gradient is best in both cases. But the reader here is fixed, so it cannot adapt to tokens that are
# half there (exercise 5). A network that is trained with soft decisions can adapt to them, and at inference
# there are no soft decisions. Whether soft decisions would be good for DynamicViT is not measured here.
#
# ## What was measured

# %%
through, reinforce = quartiles["straight-through", 1.0][1], quartiles["REINFORCE, baseline", None][1]
here.says("In units of the exact gradient's length, straight-through at temperature 1 is off by "
          f"{through[0]:.2f} on average and one draw is noisy by {through[1]:.2f}; REINFORCE with a baseline "
          f"by 0 and {reinforce[1]:.1f} (medians of {problems} problems of 8 tokens).")
here.measured(chi_squares=chi_squares, draws=draws, one_problem=one_problem, problems=problems,
              by_tokens=by_tokens, cap=cap,
              trained=trained, went_on=went_on,
              soft_standard_error={str(tau): float(error) for tau, error in soft_error.items()},
              medians={f"{name}, tau {tau}" if tau else name: as_dict(rows[1]) for (name, tau),
                       rows in quartiles.items()})
print(f"medians of {problems} problems of 8 tokens, in units of the exact gradient's length:")
for (name, tau), rows in quartiles.items():
    if tau in (None, 1.0):
        bias, noise, angle = rows[1]
        print(f"  {name}{', tau 1' if tau else ''}: bias {bias:.2f}, noise of one draw {noise:.2f}, "
              f"sine of the angle {angle:.2f}")
for row in trained:
    print(f"trained, {row['tokens']} tokens, {row['gradient']}: J {row['J']:.3f}, {row['ratio']:.2f} of "
          f"straight-through's "
          f"[{row['ratio_low']:.2f} to {row['ratio_high']:.2f}]")

# %% [markdown]
# ## Exercises
#
# 1. Draw a category with `np.argmin(-np.log(U) / p)`, where U is uniform. Show that this is the Gumbel-max
#    trick, written in another way.
# 2. Make the loss of `Problem` linear in the decisions: L(D) = sum_j w_j D_j. What does (2) say the bias of
#    straight-through is at tau = 1? Predict the ratio of each entry to the exact one as a function of p_j,
#    then compute it. For which p is it 1?
# 3. As the baseline, use the mean loss of the other draws in a batch of m ("leave one out"). Why is the
#    estimate still unbiased? How close is its noise to that of b = J for m = 2, 4, 16? What happens if you
#    leave none out?
# 4. Train with straight-through at tau = 0.25 and 4 on 8 tokens. Does the table of biases tell you what to
#    expect?
# 5. The reader in `Task` is fixed. Let it learn `readout` together with the scorer, starting from small
#    random numbers. For the soft arm, compare J with the loss at soft decisions. What does the reader learn
#    to do with half a token?
# 6. For one token at a time, evaluate the loss with D_j = 0 and with D_j = 1, the other decisions as drawn,
#    and use p_j (1 - p_j) (L(1) - L(0)) as the estimate. Use (1) to show that it is unbiased. Add it to
#    `draw_estimates`. How noisy is it? How many forward passes does it need, and when is it worth them?
#
# ## The paper
#
# DynamicViT (Rao et al. 2021, arXiv 2106.02034), sections 3.2 and 3.3, beside our lines; pi are the
# probabilities that its predictor gives for each token:
#
# | paper | ours |
# |---|---|
# | decisions: Gumbel-softmax of pi, "keep" | `ops.gumbel_softmax(log_probs, draw, hard=...)[:, :, 0]` |
# | y_i = e^((ln pi_i + g_i) / tau) / sum_j e^((ln pi_j + g_j) / tau) | `soft = softmax_of((log_probs + noise) / tau)` |
# | hard forward, soft backward | `out = (... == soft.argmax(axis=-1)...)`, `grad = softmax_vjp(soft, g) / tau` |
#
# The first line is in `tinytoken/models/dynamicvit.py`, the others in `tinytoken/ops/select.py`. The second
# equation is eq. 2 of Jang, Gu & Poole 2017 (arXiv 1611.01144).
#
# The official code uses tau = 1 throughout, and column 0 for "keep" (the paper's text has 1).

# %%
here.end()
