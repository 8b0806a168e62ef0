"""Each case is given `student`, the functions of the submission, and `rng`, which draws its inputs: for each
submission others. What it returns is compared with the package's, or loops."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course.checks import close, refuse_changes


def sizes(rng, count):
    return tuple(map(int, rng.integers(2, 6, count)))


@pytest.mark.points(2, number="4.1",
                    hint="the triangle's half width is max(s, 1); divide each row by its sum")
def test_one_axis(student, rng):
    for a, b in ((8, 2), (8, 3), (7, 7), (3, 5), *(sizes(rng, 2) for _ in range(3))):
        close(student.axis_weights(a, b), tt.ops.resize_matrix((1, a), (1, b)))


@pytest.mark.points(1, number="4.1", hint="rows first, then columns: kron")
def test_both_axes(student, rng):
    for grid, size in (((6, 8), (2, 3)), (sizes(rng, 2), sizes(rng, 2)), (sizes(rng, 2), sizes(rng, 2))):
        close(student.resize_matrix(grid, size), tt.ops.resize_matrix(grid, size))


@pytest.mark.points(1, number="4.1", visibility="hidden", hint="an axis of one output is the mean; the same "
                                                               "size changes nothing")
def test_the_two_ends_of_a_resize(student, rng):
    for n, m in ((4, 4), sizes(rng, 2)):
        close(student.resize_matrix((n, m), (n, m)), np.eye(n * m))
        close(student.resize_matrix((n, m), (1, 1)), tt.ops.resize_matrix((n, m), (1, 1)))


def tokens(rng, B=2, H=3, M=4, N=7, d=5):
    return tuple(rng.standard_normal((B, H, rows, d)) for rows in (M, N, N))


@pytest.mark.points(2, number="4.2", hint="softmax over the lookup tokens of q k^T / sqrt(d)")
def test_the_gather(student, rng):
    for sides in ((2, 3, 4, 7, 5), sizes(rng, 5), sizes(rng, 5)):
        q, k, v = tokens(rng, *sides)
        for found, expected in zip(refuse_changes(student.gather, q, k, v), tt.ops.lookup_gather(q, k, v),
                                   strict=True):
            close(found, expected.data)


@pytest.mark.points(1, number="4.2", visibility="hidden", hint="masses: each row of A sums to 1, all columns "
                                                               "together to M")
def test_masses(student, rng):
    for B, H, M, N, d in ((2, 3, 4, 7, 5), sizes(rng, 5)):
        q, k, v = tokens(rng, B, H, M, N, d)
        _, A, scores = student.gather(30 * q, k, v)
        expected = tt.ops.lookup_gather(30 * q, k, v)
        close(A, expected[1].data)
        close(A.sum(axis=-1), np.ones((B, H, M)))
        close(A.sum(axis=(2, 3)), np.full((B, H), float(M)))
        close(scores, 30 * q @ k.swapaxes(-1, -2) / np.sqrt(d))


def of_gather(rng):
    out, A, S = (part.data for part in tt.ops.lookup_gather(*tokens(rng, 2, *sizes(rng, 4))))
    return A, S, rng.standard_normal(out.shape)


def infused(student, rng, reuse):
    for _ in range(3):
        A, S, values = of_gather(rng)
        close(refuse_changes(lambda *arrays: student.infuse(*arrays, reuse), A, S, values),
              tt.ops.lookup_infuse(A, S, values, reuse=reuse).data)


@pytest.mark.points(1, number="4.3", hint="A^T values")
def test_probs(student, rng):
    infused(student, rng, "probs")


@pytest.mark.points(1, number="4.3", hint="each column of A divided by its sum")
def test_renorm(student, rng):
    infused(student, rng, "renorm")


@pytest.mark.points(1, number="4.3", hint="a softmax of the scores, over the compressed tokens")
def test_resoftmax(student, rng):
    infused(student, rng, "resoftmax")


@pytest.mark.points(1, number="4.3", visibility="hidden", hint="a lookup token that nobody looks at gets "
                                                               "zeros, not 0 / 0")
def test_a_column_of_zeros(student, rng):
    for _ in range(3):
        A, S, values = of_gather(rng)
        nobody = int(rng.integers(A.shape[3]))
        A[..., nobody] = 0
        close(student.infuse(A, S, values, "renorm"), tt.ops.lookup_infuse(A, S, values, reuse="renorm").data)


def by_the_tape(rng, shape, *, answers=True, written=True):
    """Arguments of scores_gradient, with no gradient of the answers, or of what is written, where that is
    False -> (them, dL/d(scores) by the package's ops)."""
    B, H, M, N, d = shape
    S = tt.Tensor(2 * rng.standard_normal((B, H, M, N)), requires_grad=True)
    v, g_written = rng.standard_normal((2, B, H, N, d))
    values, g_answers = rng.standard_normal((2, B, H, M, d))
    g_answers, g_written = g_answers * answers, g_written * written
    A = tt.ops.softmax(S)
    (((A @ v) * g_answers).sum() + ((A.swapaxes(-1, -2) @ values) * g_written).sum()).backward()
    return (A.data, v, values, g_answers, g_written), S.grad


@pytest.mark.points(1, number="4.4", hint="through the answers: d_A = g_answers v^T, then the softmax's A "
                                          "(d_A - sum(A d_A))")
def test_the_first_use(student, rng):
    for shape in ((1, 2, 3, 4, 4), sizes(rng, 5), sizes(rng, 5)):
        arrays, expected = by_the_tape(rng, shape, written=False)
        close(refuse_changes(student.scores_gradient, *arrays), expected)


@pytest.mark.points(1, number="4.4", hint="through what is written: d_A = values g_written^T")
def test_the_second_use(student, rng):
    for shape in ((1, 2, 3, 4, 4), sizes(rng, 5), sizes(rng, 5)):
        arrays, expected = by_the_tape(rng, shape, answers=False)
        close(student.scores_gradient(*arrays), expected)


@pytest.mark.points(2, number="4.4", hint="both uses add up, before the softmax")
def test_both_uses(student, rng):
    for shape in ((2, 2, 4, 4, 4), sizes(rng, 5), sizes(rng, 5)):
        arrays, expected = by_the_tape(rng, shape)
        close(student.scores_gradient(*arrays), expected)


def a_block(rng):
    made = tt.models.lookupvit.LookupBlock(dim=12, heads=3, reuse="probs", norm="qk").astype("float64")
    for p in made.parameters():
        p.data[...] = p.data + 0.3 * rng.standard_normal(p.shape)
    refine = lambda x: made.refine(tt.Tensor(x)).data
    F_l, F_p = rng.standard_normal((2, 16, 12)), rng.standard_normal((2, 4, 12))
    return made.state_dict(), refine, F_l, F_p, [part.data for part in made(tt.Tensor(F_l), tt.Tensor(F_p))]


@pytest.mark.points(2, number="4.5", hint="(a) and (b): norms after the projections, the output projection, "
                                          "then refine")
def test_the_compressed_tokens(student, rng):
    for _ in range(2):
        w, refine, F_l, F_p, (_, expected) = a_block(rng)
        found = refuse_changes(lambda F_l, F_p: student.lookup_block(F_l, F_p, w, 3, refine), F_l, F_p)
        close(found[1], expected, 1e-6)


@pytest.mark.points(2, number="4.5",
                    hint="(c) and (d): values from the refined tokens; both parts add to F_l")
def test_the_lookup_tokens(student, rng):
    for _ in range(2):
        w, refine, F_l, F_p, (expected, _) = a_block(rng)
        close(student.lookup_block(F_l, F_p, w, 3, refine)[0], expected, 1e-6)


@pytest.mark.points(1, number="4.5", visibility="hidden", hint="lookup tokens in another order give the "
                                                               "same, in that order")
def test_the_order_of_lookup_tokens(student, rng):
    for _ in range(2):
        w, refine, F_l, F_p, (expected, same) = a_block(rng)
        order = rng.permutation(16)
        lookup, compressed = student.lookup_block(F_l[:, order], F_p, w, 3, refine)
        close(compressed, same, 1e-6)
        close(lookup, expected[:, order], 1e-6)


def count(m, dim, depth, both):
    model = tt.models.LookupViT(dim=dim, depth=depth, heads=3, compressed=(m, m), classifiers="both")
    return tt.macs(model, np.zeros((1, 3, 32, 32), "float32"), mean_of_heads=both).total


@pytest.mark.points(1, number="4.6", hint="4 N + 15 M products with D x D matrices; 3 N M + 2 M^2 products "
                                          "of D numbers")
def test_a_blocks_cost(student, rng):
    for m, dim in ((3, 96), (int(rng.integers(2, 6)), int(12 * rng.integers(1, 6)))):
        close(student.block_cost(64, m * m, dim), count(m, dim, 3, True) - count(m, dim, 2, True))


@pytest.mark.points(1, number="4.6", hint="the patch embedding, the blocks, two heads")
def test_a_models_cost(student, rng):
    for m, dim, depth in ((3, 96, 6), (int(rng.integers(2, 6)), int(12 * rng.integers(1, 6)), 4)):
        close(student.model_cost(64, m * m, dim, 48, 10, depth, True), count(m, dim, depth, True))


@pytest.mark.points(1, number="4.6", hint="without the lookup head nobody reads what (c) and (d) of the last "
                                          "block write")
def test_the_cost_of_one_head(student, rng):
    for m, dim in ((2, 48), (5, int(12 * rng.integers(1, 6)))):
        close(student.model_cost(64, m * m, dim, 48, 10, 4, False), count(m, dim, 4, False))


def compressed(student, rng, grid, table_grid, size):
    X, table = rng.standard_normal((2, np.prod(grid), 6)), rng.standard_normal((np.prod(table_grid), 6))
    expected = tt.ops.resize_matrix(grid, size) @ X + tt.ops.resize_matrix(table_grid, size) @ table
    close(student.compressed_tokens(X, grid, table, table_grid, size), expected)


@pytest.mark.points(1, number="4.7", hint="two resizes, each from its own grid")
def test_tokens_at_any_grid(student, rng):
    for size in ((2, 2), (3, 3), (4, 5), sizes(rng, 2)):
        compressed(student, rng, (8, 8), (3, 3), size)


@pytest.mark.points(1, number="4.7", visibility="hidden", hint="grids need not be square")
def test_grids_that_are_not_square(student, rng):
    for grid, table_grid, size in (((4, 8), (2, 3), (3, 5)), [sizes(rng, 2) for _ in range(3)]):
        compressed(student, rng, grid, table_grid, size)
