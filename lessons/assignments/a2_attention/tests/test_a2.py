"""Each case is given `student`, the functions of the submission. What they are compared with is the
package's, or loops."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course.checks import close, refuse_changes


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.points(1, number="2.1", hint="exp(x) / sum(exp(x)), over the last axis")
def test_shares(student):
    x = normal(2, 3, 4)
    close(refuse_changes(student.softmax, x), np.exp(x) / np.exp(x).sum(axis=2, keepdims=True))


@pytest.mark.points(1, number="2.1", hint="take something off the scores before exp; it cancels")
def test_large_scores(student):
    close(student.softmax(np.array([1000.0, 1001.0])), np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum())
    close(student.softmax(np.array([-1000.0, -1001.0])), np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum())


@pytest.mark.points(1, number="2.1", visibility="hidden", hint="each row has its own maximum")
def test_rows_far_apart(student):
    x = np.array([[0.0, 1.0], [-2000.0, -2001.0]])
    close(student.softmax(x), np.array([[1, np.e], [np.e, 1]]) / (1 + np.e))


@pytest.mark.points(2, number="2.2", hint="softmax(q k^T / sqrt(d)) v, and the weights")
def test_one_head(student):
    q, k, v = normal(3, 4), normal(5, 4, seed=1), normal(5, 4, seed=2)
    scores = np.array([[sum(q[i, c] * k[j, c] for c in range(4)) / 2 for j in range(5)] for i in range(3)])
    A = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    answers, found = refuse_changes(student.attention, q, k, v)
    close(found, A)
    close(answers, A @ v)


@pytest.mark.points(2, number="2.2", hint="axes in front of (T, d) go along")
def test_heads_and_pictures_go_along(student):
    q, k, v = normal(2, 3, 4, 9), normal(2, 3, 5, 9, seed=1), normal(2, 3, 5, 9, seed=2)
    out, A = tt.ops.attention(q, k, v, weights=True)
    answers, found = student.attention(q, k, v)
    close(answers, out.data)
    close(found, A.data)


def gradients(q, k, v, g):
    leaves = [tt.Tensor(x, requires_grad=True) for x in (q, k, v)]
    out, A = tt.ops.attention(*leaves, weights=True)
    out.backward(g)
    return A.data, [leaf.grad for leaf in leaves]


@pytest.mark.points(1, number="2.3", hint="dL/dv = weights^T g")
def test_the_gradient_of_the_values(student):
    q, k, v, g = (normal(2, 2, 4, 3, seed=s) for s in range(4))
    A, (_, _, d_v) = gradients(q, k, v, g)
    close(student.attention_vjp(q, k, v, A, g)[2], d_v)


@pytest.mark.points(2, number="2.3", hint="through the softmax: A (u - sum(u A)) with u = g v^T; and the 1 / "
                                          "sqrt(d)")
def test_the_gradients_of_queries_and_keys(student):
    q, k, v, g = normal(1, 2, 4, 3), normal(1, 2, 5, 3, seed=1), normal(1, 2, 5, 3, seed=2), normal(1, 2, 4, 3, seed=3)
    A, wanted = gradients(q, k, v, g)
    for found, expected in zip(refuse_changes(student.attention_vjp, q, k, v, A, g)[:2], wanted):
        close(found, expected)


@pytest.mark.points(1, number="2.3", visibility="hidden", hint="large scores too")
def test_gradients_at_large_scores(student):
    q, k, v, g = (normal(1, 1, 6, 4, seed=s) * (9 if s < 2 else 1) for s in range(4))
    A, wanted = gradients(q, k, v, g)
    for found, expected in zip(student.attention_vjp(q, k, v, A, g), wanted):
        close(found, expected)


@pytest.mark.points(1, number="2.4", hint="(B, T, D) -> (B, T, H, d) by reshape, then the transpose")
def test_split(student):
    x = normal(2, 5, 6)
    found = student.split_heads(x, 3)
    for head in range(3):
        close(found[:, head], x[:, :, 2 * head:2 * head + 2])


@pytest.mark.points(1, number="2.4", hint="a reshape alone mixes heads and tokens")
def test_merge(student):
    x = normal(2, 3, 5, 2)
    found = student.merge_heads(x)
    for head in range(3):
        close(found[:, :, 2 * head:2 * head + 2], x[:, head])


@pytest.mark.points(1, number="2.4", visibility="hidden", hint="merging undoes splitting, for any number of "
                                                               "heads")
def test_there_and_back(student):
    x = normal(2, 5, 12)
    for heads in (1, 2, 4, 12):
        close(student.merge_heads(student.split_heads(x, heads)), x)


def softmax_of(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def is_removing(student, scores, keep):
    found = student.masked_weights(scores, keep)
    close(found.sum(axis=-1), np.ones(found.shape[:-1]))
    for b in range(len(scores)):
        kept = np.flatnonzero(keep[b])
        rows = found[b][:, kept]
        close(rows[:, :, kept], softmax_of(scores[b][:, kept][:, :, kept]), 1e-12)
        assert not rows[:, :, keep[b] == 0].any(), "a kept row gives weight to a dropped token"


@pytest.mark.points(1, number="2.5", hint="kept rows: the softmax among the kept columns, zeros elsewhere")
def test_a_mask_is_removing(student):
    is_removing(student, normal(2, 3, 6, 6), np.array([[1, 0, 1, 1, 0, 1.0], [0, 1, 1, 0, 0, 0.0]]))


@pytest.mark.points(1, number="2.5", hint="a dropped row sees itself and the kept ones, and sums to 1")
def test_dropped_rows_see_themselves(student):
    scores, keep = normal(1, 1, 3, 3), np.array([[1, 0, 0.0]])
    row = np.exp(scores[0, 0, 1, [0, 1]])
    close(student.masked_weights(scores, keep)[0, 0, 1], np.array([*row / row.sum(), 0.0]))


@pytest.mark.points(1, number="2.5", hint="take off the largest score that the row sees, not the largest of "
                                          "all")
def test_a_dropped_key_that_stands_out(student):
    scores = normal(1, 2, 5, 5)
    scores[..., 2] += 1000
    is_removing(student, scores, np.array([[1, 1, 0, 1, 0.0]]))


@pytest.mark.points(1, number="2.5", visibility="hidden", hint="one token left, none left, all left")
def test_one_none_all(student):
    scores = normal(3, 2, 4, 4)
    found = student.masked_weights(scores, np.array([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1.0]]))
    close(found[0, :, 2, 2], np.ones(2))
    close(found[1], np.broadcast_to(np.eye(4), (2, 4, 4)))
    close(found[2], softmax_of(scores[2]))


def cross(x, memory, keep, w, heads):
    q, k, v = (tt.ops.split_heads(a @ w[name].T, heads=heads) for a,
               name in ((x, "q"), (memory, "k"), (memory, "v")))
    return tt.ops.merge_heads(tt.ops.attention(q, k, v, keep, sees_itself=False)).data @ w["out"].T


@pytest.mark.points(2, number="2.6", hint="queries from x, keys and values from the memory; then the output "
                                          "matrix")
def test_reading_a_memory(student):
    w = {name: normal(6, 6, seed=s) for s, name in enumerate(("q", "k", "v", "out"))}
    x, memory, keep = normal(2, 3, 6, seed=8), normal(2, 5, 6, seed=9), np.ones((2, 5))
    close(student.cross_attention(x, memory, keep, w, 2), cross(x, memory, keep, w, 2))


@pytest.mark.points(1, number="2.6", hint="what is dropped is never read, however it is scored; there is no "
                                          "diagonal here")
def test_reading_what_is_left_of_a_memory(student):
    w = {name: 3 * normal(6, 6, seed=s) for s, name in enumerate(("q", "k", "v", "out"))}
    x, memory, keep = normal(2, 5, 6, seed=8), normal(2, 5, 6, seed=9), np.array([[1, 0, 1, 0, 0],
                                                                                  [0, 0, 0, 1, 0.0]])
    close(student.cross_attention(x, memory, keep, w, 3), cross(x, memory, keep, w, 3))


def weights_of_block(width):
    shapes = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (4 * width, width),
              "fc2": (width, 4 * width)}
    return {name: normal(*shape, seed=s) / 2 for s, (name, shape) in enumerate(shapes.items())}


def packages_block(x, w, heads):
    made = tt.nn.Block(x.shape[2], heads).astype("float64")
    names = {"attn.qkv.weight": "qkv", "attn.proj.weight": "proj", "mlp.fc1.weight": "fc1",
             "mlp.fc2.weight": "fc2"}
    for name, p in made.named_parameters():
        p.data[...] = w[names[name]] if name in names else 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return made(tt.Tensor(x)).data


@pytest.mark.points(2, number="2.7", hint="both halves add to x; the norm stands in front of each")
def test_a_block_of_one_head(student):
    x, w = normal(2, 5, 6, seed=9), weights_of_block(6)
    close(refuse_changes(lambda x: student.block(x, w, 1), x), packages_block(x, w, 1), 1e-6)


@pytest.mark.points(2, number="2.7", hint="queries, keys, values in this order; heads after that")
def test_a_block_of_three_heads(student):
    x, w = normal(1, 4, 12, seed=9), weights_of_block(12)
    close(student.block(x, w, 3), packages_block(x, w, 3), 1e-6)
