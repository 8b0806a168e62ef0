# %% [markdown]
# # Assignment 1: Autograd from nothing
# You build a tape: values that remember how they were made, and a walk back over them that finds every
# gradient. Then the three gradients on which attention rests, and a check that tells a right gradient from a
# wrong one. 25 points.
#
# Write your code where `raise NotImplementedError` stands. Keep names and arguments. You may write more
# functions. Only numpy and math may be imported. `python -m tinytoken grade a1 --submission .` says at any
# time what you have.

# %%
import math

import numpy as np

# %% [markdown]
# ## The tape
# A node holds a value (a NumPy array), the nodes it was made from, and a **vjp** (vector-Jacobian product): a
# function from the upstream gradient, dL/d(this node), to a list with dL/d(parent) for each parent. A node
# without parents is a leaf.


# %%
class Node:
    """value: array. parents: tuple of nodes. vjp: upstream gradient -> list of one gradient for each parent.
    grad: dL/d(value) after backward, an array, or None."""

    def __init__(self, value, parents=(), vjp=None):
        self.value, self.parents, self.vjp, self.grad = np.asarray(value, dtype=float), tuple(parents), vjp, None


def add(a, b):
    """The node a + b, for values of shapes that broadcast."""
    return Node(a.value + b.value, (a, b),
                lambda g: [unbroadcast(g, a.value.shape), unbroadcast(g, b.value.shape)])


# %% [markdown]
# ### Exercise 1.1 (3 points)
# The product of two nodes, number by number. Shapes may broadcast: use `unbroadcast` (exercise 1.4) as `add`
# does. What if both are the same node?


# %%
def multiply(a, b):
    """The node a * b, for values of shapes that broadcast."""
    ### BEGIN SOLUTION
    def vjp(g):
        return [unbroadcast(g * b.value, a.value.shape), unbroadcast(g * a.value, b.value.shape)]
    return Node(a.value * b.value, (a, b), vjp)
    ### END SOLUTION


# %% [markdown]
# ### Exercise 1.2 (4 points)
# The gradient of a node is complete when everything that was made from it has passed its gradient on. So the
# walk back needs an order: all nodes that `end` was made from, directly or not, each **once**, parents before
# what was made from them, `end` last. A graph may be 10,000 nodes deep, so recursion will not do. And a value
# that is used twice must not be walked twice: with twenty such steps in a row that would be a million walks.


# %%
def order(end):
    """A list of all nodes that `end` depends on, each once, parents first, `end` last."""
    ### BEGIN SOLUTION
    done, found, waiting = set(), [], [(end, False)]
    while waiting:
        node, parents_are_in = waiting.pop()
        if parents_are_in:
            found.append(node)
        elif id(node) not in done:
            done.add(id(node))
            waiting.append((node, True))
            waiting.extend((parent, False) for parent in node.parents)
    return found
    ### END SOLUTION


# %% [markdown]
# ### Exercise 1.3 (4 points)
# Walk the order from its end to its start, and give each node's gradient to its parents. `grad` of `end` is 1
# (in its shape). A node that is used several times gets the **sum**. Start from clean gradients: calling
# `backward` twice gives the same result, not twice the gradient. Never change an array that a vjp gave you:
# it may be shared.


# %%
def backward(end):
    """Set .grad of every node that `end` depends on, and of `end`, to d(sum of end.value) / d(node.value)."""
    ### BEGIN SOLUTION
    nodes = order(end)
    for node in nodes:
        node.grad = np.zeros_like(node.value)
    end.grad = np.ones_like(end.value)
    for node in reversed(nodes):
        for parent, part in zip(node.parents, node.vjp(node.grad) if node.parents else ()):
            parent.grad = parent.grad + part
    ### END SOLUTION


# %% [markdown]
# ### Exercise 1.4 (3 points)
# When shapes broadcast, one number is used in several places, and its gradient is the sum over them. Given g
# in the shape of the result, sum it down to the shape of the input: axes in front that the input does not
# have, and axes in which it has length 1.


# %%
def unbroadcast(g, shape):
    """g summed to `shape`, a shape that broadcasts to g's."""
    ### BEGIN SOLUTION
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    stretched = tuple(axis for axis, length in enumerate(shape) if length == 1)
    return g.sum(axis=stretched, keepdims=True)
    ### END SOLUTION


# %% [markdown]
# ## Three gradients
# ### Exercise 1.5 (3 points)
# C = A B with A (n, k), B (k, m). Write the change of L for a small change of A, and of B, and read the
# gradients off. Then let both have the same number of axes in front, as attention has: A (..., n, k), B (...,
# k, m).


# %%
def matmul_vjp(a, b, g):
    """(dL/da, dL/db) for c = a @ b and g = dL/dc. a (..., n, k), b (..., k, m), g (..., n, m)."""
    ### BEGIN SOLUTION
    return g @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ g
    ### END SOLUTION


# %% [markdown]
# ### Exercise 1.6 (3 points)
# p = softmax(x) over the last axis. From p and g = dL/dp alone: dL/dx. No matrix of n x n numbers is needed.


# %%
def softmax(x):
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_vjp(p, g):
    """dL/dx from p = softmax(x) and g = dL/dp, over the last axis."""
    ### BEGIN SOLUTION
    return p * (g - (p * g).sum(axis=-1, keepdims=True))
    ### END SOLUTION


# %% [markdown]
# ### Exercise 1.7 (3 points)
# y = (x - mean) / sqrt(var + eps) over the last axis; var is the mean of (x - mean)^2. Mean and variance
# depend on x too. Check yourself: the result sums to 0 over the axis. Why?


# %%
def layer_norm(x, eps=1e-5):
    """Layer norm over the last axis, without weight and bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + eps)


def layer_norm_vjp(x, g, eps=1e-5):
    """dL/dx for y = layer_norm(x, eps) and g = dL/dy."""
    ### BEGIN SOLUTION
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    y = (x - x.mean(axis=-1, keepdims=True)) / spread
    return (g - g.mean(axis=-1, keepdims=True) - y * (g * y).mean(axis=-1, keepdims=True)) / spread
    ### END SOLUTION


# %% [markdown]
# ## Is it right?
# ### Exercise 1.8 (2 points)
# With L = sum(g * f(x)), the gradient of L at x can be found without any calculus: for each number of x, (L(x
# + h) - L(x - h)) / 2h. Return how far the vjp is from that, relative to the larger of 1 and the largest
# numerical gradient. The upstream gradient g must be random: with ones a softmax's gradient is zero, and a
# vjp that returns zeros would pass. x must be as before when you are done.


# %%
def largest_error(f, vjp, x, rng, h=1e-5):
    """The largest difference between vjp(g) and central differences of sum(g * f(x)), over max(1, largest
    difference quotient). f: array -> array; vjp: upstream gradient, shaped as f(x) -> gradient, shaped as x;
    rng: numpy Generator, for g."""
    ### BEGIN SOLUTION
    g = rng.standard_normal(f(x).shape)
    numeric = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[place] = h
        numeric[place] = (g * (f(x + step) - f(x - step))).sum() / (2 * h)
    return float(np.abs(vjp(g) - numeric).max() / max(1, np.abs(numeric).max()))
    ### END SOLUTION


# %% [markdown]
# ## All together
# Your pieces train a small network on scenes: pictures with a shape among clutter, ten classes, shrunk to 8 x
# 8 pixels. It works only if all of them are right. A tenth of the answers is right by chance; the network
# should end well above a fifth.


# %%
def matmul(a, b):
    return Node(a.value @ b.value, (a, b), lambda g: list(matmul_vjp(a.value, b.value, g)))


def normed(x):
    return Node(layer_norm(x.value), (x,), lambda g: [layer_norm_vjp(x.value, g)])


def surprise(x, labels):
    """Mean over the rows of -log softmax(x)[label]."""
    rows, p = np.arange(len(labels)), softmax(x.value)
    at_label = np.maximum(p[rows, labels], 1e-12)

    def vjp(g):
        upstream = np.zeros_like(p)
        upstream[rows, labels] = -g / at_label / len(p)
        return [softmax_vjp(p, upstream)]
    return Node(-np.log(at_label).mean(), (x,), vjp)


def network(pictures, weights):
    """pictures (B, 192) -> scores (B, 10)"""
    hidden = normed(add(matmul(Node(pictures), weights[0]), weights[1]))
    return add(matmul(multiply(hidden, hidden), weights[2]), weights[3])


def train(pictures, labels, steps=1000, rate=0.005, seed=0):
    """Gradient descent with momentum on batches of 64 -> weights"""
    rng = np.random.default_rng(seed)
    sizes = ((pictures.shape[1], 64), (64,), (64, 10), (10,))
    weights = [Node(rng.standard_normal(size) / math.sqrt(size[0]) if len(size) > 1 else np.zeros(size))
               for size in sizes]
    speed = [np.zeros(size) for size in sizes]
    for step in range(steps):
        chosen = rng.choice(len(labels), 64, replace=False)
        loss = surprise(network(pictures[chosen], weights), labels[chosen])
        backward(loss)
        speed = [0.9 * v - rate * w.grad for v, w in zip(speed, weights)]
        weights = [Node(w.value + v) for v, w in zip(speed, weights)]
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.value):.3f}")
    return weights


if __name__ == "__main__":
    from tinytoken.data import make_scenes

    sets = [make_scenes(count, split=split) for count, split in ((8000, "train"), (2000, "test"))]
    small = [s.images.reshape(-1, 3, 8, 4, 8, 4).mean(axis=(3, 5)).reshape(-1, 192) / 128 - 1 for s in sets]
    weights = train(small[0], sets[0].labels)
    right = (network(small[1], weights).value.argmax(axis=1) == sets[1].labels).mean()
    print(f"right on new pictures: {100 * right:.1f} % (by chance 10 %)")
