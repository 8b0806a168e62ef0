"""Each case is given `student`, the functions of the submission. What they are compared with is the
package's, or loops."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course.checks import close, refuse_changes


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.points(2, number="4.1",
                    hint="the triangle's half width is max(s, 1); divide each row by its sum")
def test_one_axis(student):
    for a, b in ((8, 2), (8, 3), (7, 7), (3, 5)):
        close(student.axis_weights(a, b), tt.ops.resize_matrix((1, a), (1, b)))


@pytest.mark.points(1, number="4.1", hint="rows first, then columns: kron")
def test_both_axes(student):
    close(student.resize_matrix((6, 8), (2, 3)), tt.ops.resize_matrix((6, 8), (2, 3)))


@pytest.mark.points(1, number="4.1", visibility="hidden", hint="an axis of one output is the mean; the same "
                                                               "size changes nothing")
def test_the_two_ends_of_a_resize(student):
    close(student.resize_matrix((4, 4), (4, 4)), np.eye(16))
    close(student.resize_matrix((3, 5), (1, 1)), tt.ops.resize_matrix((3, 5), (1, 1)))


def tokens():
    return normal(2, 3, 4, 5), normal(2, 3, 7, 5, seed=1), normal(2, 3, 7, 5, seed=2)


@pytest.mark.points(2, number="4.2", hint="softmax over the lookup tokens of q k^T / sqrt(d)")
def test_the_gather(student):
    q, k, v = tokens()
    for found, expected in zip(refuse_changes(student.gather, q, k, v), tt.ops.lookup_gather(q, k, v)):
        close(found, expected.data)


@pytest.mark.points(1, number="4.2", visibility="hidden", hint="masses: each row of A sums to 1, all columns "
                                                               "together to M")
def test_masses(student):
    q, k, v = tokens()
    _, A, scores = student.gather(30 * q, k, v)
    close(A.sum(axis=-1), np.ones((2, 3, 4)))
    close(A.sum(axis=(2, 3)), np.full((2, 3), 4.0))
    close(scores, 30 * q @ k.swapaxes(-1, -2) / np.sqrt(5))


def of_gather():
    out, A, S = (part.data for part in tt.ops.lookup_gather(*tokens()))
    return A, S, normal(*out.shape, seed=5)


@pytest.mark.points(1, number="4.3", hint="A^T values")
def test_probs(student):
    A, S, values = of_gather()
    close(refuse_changes(lambda *arrays: student.infuse(*arrays, "probs"), A, S, values),
          tt.ops.lookup_infuse(A, S, values, reuse="probs").data)


@pytest.mark.points(1, number="4.3", hint="each column of A divided by its sum")
def test_renorm(student):
    A, S, values = of_gather()
    close(student.infuse(A, S, values, "renorm"), tt.ops.lookup_infuse(A, S, values, reuse="renorm").data)


@pytest.mark.points(1, number="4.3", hint="a softmax of the scores, over the compressed tokens")
def test_resoftmax(student):
    A, S, values = of_gather()
    close(student.infuse(A, S, values, "resoftmax"),
          tt.ops.lookup_infuse(A, S, values, reuse="resoftmax").data)


@pytest.mark.points(1, number="4.3", visibility="hidden", hint="a lookup token that nobody looks at gets "
                                                               "zeros, not 0 / 0")
def test_a_column_of_zeros(student):
    A, S, values = of_gather()
    A[..., 2] = 0
    close(student.infuse(A, S, values, "renorm")[:, :, 2], np.zeros((2, 3, 5)))


def by_the_tape(q, k, v, values, g_answers, g_written):
    """dL/d(scores), through the package's ops: from that of q, whose scores are q k^T / sqrt(d) with square
    k."""
    Q = tt.Tensor(q, requires_grad=True)
    answers, A, S = tt.ops.lookup_gather(Q, k, v)
    written = tt.ops.lookup_infuse(A, S, values, reuse="probs")
    ((answers * g_answers).sum() + (written * g_written).sum()).backward()
    return A.data, Q.grad @ np.linalg.pinv(k / np.sqrt(q.shape[-1]))


@pytest.mark.points(1, number="4.4", hint="through the answers: d_A = g_answers v^T, then the softmax's A "
                                          "(d_A - sum(A d_A))")
def test_the_first_use(student):
    q, k, v, values, g = normal(1, 2, 3, 4), normal(1, 2, 4, 4, seed=1), *(normal(1, 2, n, 4, seed=s) for n,
                                                                           s in ((4, 2), (3, 3), (3, 4)))
    nothing = np.zeros((1, 2, 4, 4))
    A, expected = by_the_tape(q, k, v, values, g, nothing)
    close(refuse_changes(student.scores_gradient, A, v, values, g, nothing), expected, 1e-7)


@pytest.mark.points(1, number="4.4", hint="through what is written: d_A = values g_written^T")
def test_the_second_use(student):
    q, k, v, values, g = normal(1, 2, 3, 4), normal(1, 2, 4, 4, seed=1), *(normal(1, 2, n, 4, seed=s) for n,
                                                                           s in ((4, 2), (3, 3), (4, 4)))
    nothing = np.zeros((1, 2, 3, 4))
    A, expected = by_the_tape(q, k, v, values, nothing, g)
    close(student.scores_gradient(A, v, values, nothing, g), expected, 1e-7)


@pytest.mark.points(2, number="4.4", hint="both uses add up, before the softmax")
def test_both_uses(student):
    q, k = 2 * normal(2, 2, 4, 4), normal(2, 2, 4, 4, seed=1)
    v, values, g_answers, g_written = (normal(2, 2, 4, 4, seed=s) for s in range(2, 6))
    A, expected = by_the_tape(q, k, v, values, g_answers, g_written)
    close(student.scores_gradient(A, v, values, g_answers, g_written), expected, 1e-6)


def a_block():
    made = tt.models.lookupvit.LookupBlock(dim=12, heads=3).astype("float64")
    for i, p in enumerate(made.parameters()):
        p.data += 0.3 * normal(*p.shape, seed=100 + i)
    refine = lambda x: made.refine(tt.Tensor(x)).data
    F_l, F_p = normal(2, 16, 12), normal(2, 4, 12, seed=1)
    return made, refine, F_l, F_p, [part.data for part in made(tt.Tensor(F_l), tt.Tensor(F_p))]


@pytest.mark.points(2, number="4.5", hint="(a) and (b): norms after the projections, the output projection, "
                                          "then refine")
def test_the_compressed_tokens(student):
    made, refine, F_l, F_p, (_, expected) = a_block()
    w = made.state_dict()
    found = refuse_changes(lambda F_l, F_p: student.lookup_block(F_l, F_p, w, 3, refine), F_l, F_p)
    close(found[1], expected, 1e-6)


@pytest.mark.points(2, number="4.5",
                    hint="(c) and (d): values from the refined tokens; both parts add to F_l")
def test_the_lookup_tokens(student):
    made, refine, F_l, F_p, (expected, _) = a_block()
    close(student.lookup_block(F_l, F_p, made.state_dict(), 3, refine)[0], expected, 1e-6)


@pytest.mark.points(1, number="4.5", visibility="hidden", hint="lookup tokens in another order give the "
                                                               "same, in that order")
def test_the_order_of_lookup_tokens(student):
    made, refine, F_l, F_p, (expected, same) = a_block()
    order = np.random.default_rng(3).permutation(16)
    lookup, compressed = student.lookup_block(F_l[:, order], F_p, made.state_dict(), 3, refine)
    close(compressed, same, 1e-6)
    close(lookup, expected[:, order], 1e-6)


def count(m, dim, depth, both):
    model = tt.models.LookupViT(dim=dim, depth=depth, heads=3, compressed=(m, m))
    return tt.macs(model, np.zeros((1, 3, 32, 32), "float32"), mean_of_heads=both).total


@pytest.mark.points(1, number="4.6", hint="4 N + 15 M products with D x D matrices; 3 N M + 2 M^2 products "
                                          "of D numbers")
def test_a_blocks_cost(student):
    close(student.block_cost(64, 9, 96), count(3, 96, 3, True) - count(3, 96, 2, True))


@pytest.mark.points(1, number="4.6", hint="the patch embedding, the blocks, two heads")
def test_a_models_cost(student):
    close(student.model_cost(64, 9, 96, 48, 10, 6, True), count(3, 96, 6, True))


@pytest.mark.points(1, number="4.6", hint="without the lookup head nobody reads what (c) and (d) of the last "
                                          "block write")
def test_the_cost_of_one_head(student):
    for m in (2, 5):
        close(student.model_cost(64, m * m, 48, 48, 10, 4, False), count(m, 48, 4, False))


@pytest.mark.points(1, number="4.7", hint="two resizes, each from its own grid")
def test_tokens_at_any_grid(student):
    X, table = normal(2, 64, 6), normal(9, 6, seed=1)
    for size in ((2, 2), (3, 3), (4, 5)):
        expected = tt.ops.resize_matrix((8, 8), size) @ X + tt.ops.resize_matrix((3, 3), size) @ table
        close(student.compressed_tokens(X, (8, 8), table, (3, 3), size), expected)


@pytest.mark.points(1, number="4.7", visibility="hidden", hint="grids need not be square")
def test_grids_that_are_not_square(student):
    X, table = normal(1, 32, 6), normal(6, 6, seed=1)
    expected = tt.ops.resize_matrix((4, 8), (3, 5)) @ X + tt.ops.resize_matrix((2, 3), (3, 5)) @ table
    close(student.compressed_tokens(X, (4, 8), table, (2, 3), (3, 5)), expected)
