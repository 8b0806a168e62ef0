"""Each case is given `student`, the functions of the submission, and `rng`, which draws its inputs: for each
submission others. What it returns is compared with the package's, or loops."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course.checks import close, refuse_changes


def sizes(rng, count):
    return tuple(map(int, rng.integers(2, 6, count)))


@pytest.mark.points(1, number="2.1", hint="exp(x) / sum(exp(x)), over the last axis")
def test_shares(student, rng):
    for shape in ((2, 3, 4), sizes(rng, 2), sizes(rng, 4)):
        x = rng.standard_normal(shape)
        close(refuse_changes(student.softmax, x), np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.points(1, number="2.1", hint="take something off the scores before exp; it cancels")
def test_large_scores(student, rng):
    for n in (2, *sizes(rng, 2)):
        x, far = rng.standard_normal(n), float(rng.uniform(1000, 2000))
        close(student.softmax(x + far), np.exp(x) / np.exp(x).sum())
        close(student.softmax(x - far), np.exp(x) / np.exp(x).sum())


@pytest.mark.points(1, number="2.1", visibility="hidden", hint="each row has its own maximum")
def test_rows_far_apart(student, rng):
    for n in (2, *sizes(rng, 2)):
        x = rng.standard_normal((3, n))
        far = np.array([[0.0], [-2000.0], [1000.0]])
        close(student.softmax(x + far), np.exp(x) / np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.points(2, number="2.2", hint="softmax(q k^T / sqrt(d)) v, and the weights")
def test_one_head(student, rng):
    for n, m, d in ((3, 5, 4), sizes(rng, 3), sizes(rng, 3)):
        q, k, v = (rng.standard_normal((rows, d)) for rows in (n, m, m))
        scores = np.array([[sum(q[i, c] * k[j, c] for c in range(d)) / d**0.5 for j in range(m)]
                           for i in range(n)])
        A = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        answers, found = refuse_changes(student.attention, q, k, v)
        close(found, A)
        close(answers, A @ v)


@pytest.mark.points(2, number="2.2", hint="axes in front of (T, d) go along")
def test_heads_and_pictures_go_along(student, rng):
    for B, H, n, m, d in ((2, 3, 4, 5, 9), sizes(rng, 5), sizes(rng, 5)):
        q, k, v = (rng.standard_normal((B, H, rows, d)) for rows in (n, m, m))
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
def test_the_gradient_of_the_values(student, rng):
    for shape in ((2, 2, 4, 3), sizes(rng, 4), sizes(rng, 4)):
        q, k, v, g = rng.standard_normal((4, *shape))
        A, (_, _, d_v) = gradients(q, k, v, g)
        close(student.attention_vjp(q, k, v, A, g)[2], d_v)


@pytest.mark.points(2, number="2.3", hint="through the softmax: A (u - sum(u A)) with u = g v^T; and the 1 / "
                                          "sqrt(d)")
def test_the_gradients_of_queries_and_keys(student, rng):
    for n, m, d in ((4, 5, 3), sizes(rng, 3), sizes(rng, 3)):
        q, k, v, g = (rng.standard_normal((1, 2, rows, d)) for rows in (n, m, m, n))
        A, wanted = gradients(q, k, v, g)
        for found, expected in zip(refuse_changes(student.attention_vjp, q, k, v, A, g)[:2], wanted[:2],
                                   strict=True):
            close(found, expected)


@pytest.mark.points(1, number="2.3", visibility="hidden", hint="large scores too")
def test_gradients_at_large_scores(student, rng):
    for shape in ((1, 1, 6, 4), (2, *sizes(rng, 3)), (1, *sizes(rng, 3))):
        q, k, v, g = rng.standard_normal((4, *shape))
        q, k = 9 * q, 9 * k
        A, wanted = gradients(q, k, v, g)
        for found, expected in zip(student.attention_vjp(q, k, v, A, g), wanted, strict=True):
            close(found, expected)


@pytest.mark.points(1, number="2.4", hint="(B, T, D) -> (B, T, H, d) by reshape, then the transpose")
def test_split(student, rng):
    for B, T, H, d in ((2, 5, 3, 2), sizes(rng, 4), sizes(rng, 4)):
        x = rng.standard_normal((B, T, H * d))
        close(student.split_heads(x, H),
              np.stack([x[:, :, head * d:(head + 1) * d] for head in range(H)], axis=1))


@pytest.mark.points(1, number="2.4", hint="a reshape alone mixes heads and tokens")
def test_merge(student, rng):
    for B, H, T, d in ((2, 3, 5, 2), sizes(rng, 4), sizes(rng, 4)):
        x = rng.standard_normal((B, H, T, d))
        close(student.merge_heads(x), np.concatenate([x[:, head] for head in range(H)], axis=2))


@pytest.mark.points(1, number="2.4", visibility="hidden", hint="merging undoes splitting, for any number of "
                                                               "heads")
def test_there_and_back(student, rng):
    for heads in (1, 2, 4, 12):
        x = rng.standard_normal((2, 5, 12))
        there = student.split_heads(x, heads)
        close(there, tt.ops.split_heads(x, heads=heads).data)
        close(student.merge_heads(there), x)


def softmax_of(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def is_removing(student, scores, keep):
    expected = np.zeros(scores.shape)
    for b, h, i in np.ndindex(scores.shape[:3]):
        seen = [j for j in range(scores.shape[3]) if keep[b, j] or j == i]
        expected[b, h, i, seen] = softmax_of(scores[b, h, i, seen])
    close(student.masked_weights(scores, keep), expected, 1e-12)


@pytest.mark.points(1, number="2.5", hint="kept rows: the softmax among the kept columns, zeros elsewhere")
def test_a_mask_is_removing(student, rng):
    keep = np.array([[1, 0, 1, 1, 0, 1.0], [0, 1, 1, 0, 0, 0.0]])
    is_removing(student, rng.standard_normal((2, 3, 6, 6)), keep)
    for _ in range(3):
        keep = (rng.uniform(size=(3, 5)) < 0.6).astype(float)
        keep[:, rng.integers(5)] = 1
        is_removing(student, rng.standard_normal((3, 2, 5, 5)), keep)


@pytest.mark.points(1, number="2.5", hint="a dropped row sees itself and the kept ones, and sums to 1")
def test_dropped_rows_see_themselves(student, rng):
    for n in (3, *sizes(rng, 2)):
        scores, keep = rng.standard_normal((1, 1, n, n)), np.eye(n)[:1]
        row = np.exp(scores[0, 0, 1, [0, 1]])
        close(student.masked_weights(scores, keep)[0, 0, 1],
              np.array([*row / row.sum(), *np.zeros(n - 2)]))


@pytest.mark.points(1, number="2.5", hint="take off the largest score that the row sees, not the largest of "
                                          "all")
def test_a_dropped_key_that_stands_out(student, rng):
    for _ in range(3):
        scores, column = rng.standard_normal((1, 2, 5, 5)), int(rng.integers(5))
        scores[..., column] += rng.uniform(800, 1200)
        keep = np.ones((1, 5))
        keep[0, [column, column - 1]] = 0
        is_removing(student, scores, keep)


@pytest.mark.points(1, number="2.5", visibility="hidden", hint="one token left, none left, all left")
def test_one_none_all(student, rng):
    for n in (4, *sizes(rng, 2)):
        scores, one = rng.standard_normal((3, 2, n, n)), int(rng.integers(n))
        found = student.masked_weights(scores, np.stack([np.eye(n)[one], np.zeros(n), np.ones(n)]))
        close(found[0, :, one], np.broadcast_to(np.eye(n)[one], (2, n)))
        close(found[1], np.broadcast_to(np.eye(n), (2, n, n)))
        close(found[2], softmax_of(scores[2]))


def cross(x, memory, keep, w, heads):
    q, k, v = (tt.ops.split_heads(a @ w[name].T, heads=heads)
               for a, name in ((x, "q"), (memory, "k"), (memory, "v")))
    return tt.ops.merge_heads(tt.ops.attention(q, k, v, keep, sees_itself=False)).data @ w["out"].T


@pytest.mark.points(2, number="2.6", hint="queries from x, keys and values from the memory; then the output "
                                          "matrix")
def test_reading_a_memory(student, rng):
    for B, n, m, heads in ((2, 3, 5, 2), (*sizes(rng, 3), 3), (*sizes(rng, 3), 2)):
        w = {name: rng.standard_normal((6, 6)) for name in ("q", "k", "v", "out")}
        x, memory, keep = rng.standard_normal((B, n, 6)), rng.standard_normal((B, m, 6)), np.ones((B, m))
        close(student.cross_attention(x, memory, keep, w, heads), cross(x, memory, keep, w, heads))


@pytest.mark.points(1, number="2.6", hint="what is dropped is never read, however it is scored; there is no "
                                          "diagonal here")
def test_reading_what_is_left_of_a_memory(student, rng):
    keep = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0.0]])
    for heads in (3, 2, 1):
        w = {name: 3 * rng.standard_normal((6, 6)) for name in ("q", "k", "v", "out")}
        x, memory = rng.standard_normal((2, 2, 5, 6))
        keep = rng.permuted(keep, axis=1)
        close(student.cross_attention(x, memory, keep, w, heads), cross(x, memory, keep, w, heads))


def weights_of_block(rng, width):
    shapes = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (4 * width, width),
              "fc2": (width, 4 * width)}
    return {name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}


def packages_block(x, w, heads):
    made = tt.nn.Block(x.shape[2], heads).astype("float64")
    names = {"attn.qkv.weight": "qkv", "attn.proj.weight": "proj", "mlp.fc1.weight": "fc1",
             "mlp.fc2.weight": "fc2"}
    for name, p in made.named_parameters():
        p.data[...] = w[names[name]] if name in names else 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return made(tt.Tensor(x)).data


def is_a_block(student, rng, shape, heads):
    x, w = rng.standard_normal(shape), weights_of_block(rng, shape[-1])
    close(refuse_changes(lambda x: student.block(x, w, heads), x), packages_block(x, w, heads), 1e-6)


@pytest.mark.points(2, number="2.7", hint="both halves add to x; the norm stands in front of each")
def test_a_block_of_one_head(student, rng):
    for T in (5, *sizes(rng, 2)):
        is_a_block(student, rng, (2, T, 6), 1)


@pytest.mark.points(2, number="2.7", hint="queries, keys, values in this order; heads after that")
def test_a_block_of_three_heads(student, rng):
    for T in (4, *sizes(rng, 2)):
        is_a_block(student, rng, (1, T, 12), 3)
