"""Attention under a mask is attention without the masked tokens; and what else must hold of it and of the
official form."""
import itertools
import math
import pathlib

import numpy as np
import pytest

from tinytoken import InputError, Tensor, checking, ops
from tinytoken.backend import to_numpy

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "official_softmax.npz"
B, H, T, D = 2, 3, 7, 4
SPREADS = (1, 5, 20)  # standard deviations of the logits


def draw(std, seed=0, shape=(B, H, T, D)):
    """q, k, v and an upstream gradient; the logits q k^T / sqrt(d) have that standard deviation."""
    q, k, v, g = np.random.default_rng(seed).standard_normal((4, *shape))
    return q * (std / (q @ k.swapaxes(-1, -2) / math.sqrt(shape[-1])).std()), k, v, g


def keeps(count, seed=0, shape=(B, T)):
    """A hard mask with `count` ones per row, elsewhere in each."""
    rng = np.random.default_rng(seed + 100 * count)
    return np.array([rng.permutation(shape[1]) < count for _ in range(shape[0])], float)


def run(q, k, v, g, keep=None, g_weights=None, xp=np, **settings):
    """(out, dq, dk, dv, dkeep) as NumPy arrays for the upstream gradient g (and g_weights of the weights)."""
    leaves = [Tensor(xp.asarray(a), requires_grad=True)
              for a in (q, k, v) + (() if keep is None else (keep,))]
    out = ops.attention(*leaves, weights=g_weights is not None, **settings)
    if g_weights is None:
        out.backward(xp.asarray(g))
    else:
        out, A = out
        ((out * xp.asarray(g)).sum() + (A * xp.asarray(g_weights)).sum()).backward()
    return [to_numpy(out.data), *(to_numpy(t.grad) for t in leaves)]


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max(initial=0)))


# Against loops

def attention_by_loops(q, k, v, seen):
    """A_ij = K_ij e^{a_ij} / sum_j K_ij e^{a_ij}; seen (Tq, Tk). One image, one head."""
    out = []
    for i, row in enumerate(q.tolist()):
        logits = [math.fsum(a * b for a, b in zip(row, key)) / math.sqrt(len(row)) for key in k.tolist()]
        weights = [s * math.exp(a) for s, a in zip(seen[i], logits)]
        total = math.fsum(weights) or 1.0
        out.append([math.fsum(w * value[c] for w, value in zip(weights, v.tolist())) / total
                    for c in range(v.shape[1])])
    return np.array(out)


@pytest.mark.parametrize("sees_itself", [True, False])
def test_against_loops(sees_itself, xp):
    q, k, v, _ = draw(2)
    rng = np.random.default_rng(1)
    for keep in (None, rng.uniform(size=(B, T)), keeps(3), keeps(0)):
        out = ops.attention(*map(xp.asarray, (q, k, v)), None if keep is None else xp.asarray(keep),
                            sees_itself=sees_itself)
        for b, h in itertools.product(range(B), range(H)):
            seen = np.ones((T, T)) if keep is None else np.tile(keep[b], (T, 1))
            if sees_itself:
                np.fill_diagonal(seen, 1)
            close(to_numpy(out.data)[b, h], attention_by_loops(q[b, h], k[b, h], v[b, h], seen))


def test_cross_attention_and_weights(xp):
    q, k, v, _ = draw(2)
    out, A = ops.attention(*map(xp.asarray, (q[:, :, :4], k, v)), weights=True)
    assert A.shape == (B, H, 4, T)
    close(to_numpy(A.data).sum(axis=-1), np.ones((B, H, 4)))
    close(to_numpy(A.data) @ v, to_numpy(out.data))
    close(to_numpy(out.data), to_numpy(ops.attention(*map(xp.asarray, (q, k, v))).data)[:, :, :4])


# Masking is removing

def gather(array, keep):
    """The kept tokens of (B, H, T, d): every image keeps equally many."""
    rows = np.stack([np.flatnonzero(row) for row in keep])[:, None, :, None]
    return np.take_along_axis(array, rows, axis=2)


@pytest.mark.parametrize("count", range(1, T + 1))
@pytest.mark.parametrize("std", SPREADS)
def test_masked_equals_gathered(std, count, xp):
    q, k, v, g = draw(std, seed=count)
    keep = keeps(count)
    g = g * keep[:, None, :, None]  # read at the kept rows
    masked = run(q, k, v, g, keep, xp=xp)
    gathered = run(*(gather(a, keep) for a in (q, k, v, g)), xp=xp)
    for a, b in zip(masked[:4], gathered):  # out, dq, dk, dv
        close(gather(a, keep), b)
    for gradient in masked[1:4]:
        assert not gather(gradient, 1 - keep).any()


@pytest.mark.parametrize("std", SPREADS)
def test_masked_equals_gathered_through_the_weights(std):
    keep = keeps(4)
    q, k, v, g = draw(std)
    within = np.stack([np.outer(row, row) for row in keep])[:, None]
    g, g_weights = g * keep[:, None, :, None], np.random.default_rng(9).standard_normal((B, H, T, T)) * within
    masked = run(q, k, v, g, keep, g_weights)
    weights = np.stack([a[:, row][:, :, row] for a, row in zip(g_weights, keep.astype(bool))])
    gathered = run(*(gather(a, keep) for a in (q, k, v, g)), g_weights=weights)
    for a, b in zip(masked[:4], gathered):
        close(gather(a, keep), b)


@pytest.mark.parametrize("count", [1, 3, T])
@pytest.mark.parametrize("std", SPREADS)
def test_masked_equals_gathered_in_cross_attention(std, count):
    q, k, v, g = draw(std, seed=count)
    keep = keeps(count)
    q, g = q[:, :, :5], g[:, :, :5]
    masked = run(q, k, v, g, keep, sees_itself=False)
    gathered = run(q, gather(k, keep), gather(v, keep), g)
    close(masked[0], gathered[0])
    close(masked[1], gathered[1])
    for a, b in zip(masked[2:4], gathered[2:]):
        close(gather(a, keep), b)
        assert not gather(a, 1 - keep).any()


@pytest.mark.parametrize("std", SPREADS)
def test_keeping_all_is_the_plain_softmax(std, xp):
    q, k, v, g = draw(std)
    for sees_itself in (True, False):
        masked = run(q, k, v, g, np.ones((B, T)), xp=xp, sees_itself=sees_itself)
        plain = run(q, k, v, g, xp=xp)
        np.testing.assert_array_equal(masked[0], plain[0])
        for a, b in zip(masked[1:4], plain[1:]):
            close(a, b)


def test_a_mask_may_be_bool_or_int():
    q, k, v, g = draw(1)
    keep = keeps(3)
    expected = ops.attention(q, k, v, keep).data
    for dtype in (bool, np.int64, np.uint8, np.float32):
        np.testing.assert_array_equal(ops.attention(q, k, v, keep.astype(dtype)).data, expected)


@pytest.mark.parametrize("official", [False, True])
def test_permuting_tokens_permutes(official, xp):
    q, k, v, g = draw(5)
    keep = np.random.default_rng(3).uniform(size=(B, T)) * (keeps(5) > 0)
    order = np.random.default_rng(4).permutation(T)
    before = run(q, k, v, g, keep, xp=xp, official=official)
    after = run(*(a[:, :, order] for a in (q, k, v, g)), keep[:, order], xp=xp, official=official)
    for a, b in zip(before[:4], after):
        close(a[:, :, order], b)
    close(before[4][:, order], after[4])


# The gradient of the mask

@pytest.mark.parametrize("sees_itself", [True, False])
def test_keep_gradient_of_hard_masks_is_the_slope_where_no_dropped_key_outweighs(sees_itself):
    """There the masked softmax is smooth in keep even at 0 and 1. (Soft masks are in the table of cases.)"""
    keep = keeps(3)
    q, k, v, _ = draw(0.5)
    lift(q, k, np.where(keep > 0, 4, 0))
    logits = q @ k.swapaxes(-1, -2)
    kept, dropped = (logits.max(axis=-1, where=keep[:, None, None] == value, initial=-9) for value in (1, 0))
    assert (kept > dropped).all()
    checking.gradcheck(lambda keep: ops.attention(q, k, v, keep, sees_itself=sees_itself), keep, rtol=1e-6)


def lift(q, k, heights):
    """Change q and k so that the logits toward key j of image b are heights[b, j] more."""
    q[..., 0], k[..., 0] = math.sqrt(q.shape[-1]), heights[:, None]


def test_keep_gradient_at_a_dropped_key_counts_at_most_as_the_strongest_kept_one():
    """Toward a key that outweighs the kept ones the slope would be e^gap; here it is that of a key as strong
    as they are."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.standard_normal((4, 1, 1, 4, 3))
    keep = np.array([[1.0, 1, 0, 1]])
    lift(q, k, np.array([[0, 0, 50, 0]]))
    as_strong = run(q, k, v, g, keep, sees_itself=False)[4][0, 2]
    logits = (q @ k.swapaxes(-1, -2) / math.sqrt(3))[0, 0]
    expected = 0.0
    for i in range(4):
        kept = [j for j in range(4) if keep[0, j]]
        total = math.fsum(math.exp(logits[i, j] - logits[i, kept].max()) for j in kept)
        mean = sum(math.exp(logits[i, j] - logits[i, kept].max()) / total * (g[0, 0, i] @ v[0, 0, j])
                   for j in kept)
        expected += (g[0, 0, i] @ v[0, 0, 2] - mean) / total  # e^min(gap, 0) = 1
    np.testing.assert_allclose(as_strong, expected, rtol=1e-12)


@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("std", SPREADS)
def test_float32_stays_finite_for_all_masks(std, sees_itself, xp):
    for count in range(T + 1):  # down to an image that lost every token
        q, k, v, g = (a.astype("float32") for a in draw(std, seed=count))
        keep = keeps(count).astype("float32")
        keep[0] = keep[0] if count % 2 else 0  # images that differ
        results = run(q, k, v, g, keep, xp=xp, sees_itself=sees_itself)
        for array in results:
            assert array.dtype == "float32" and np.isfinite(array).all()
        for b in np.flatnonzero(keep.sum(axis=1) == 0):
            np.testing.assert_array_equal(results[0][b], v[b] if sees_itself else 0)


@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("gap", [50, 200, 1e4])
def test_float32_when_a_dropped_key_towers_over_the_kept(gap, sees_itself, xp):
    q, k, v, g = (a.astype("float32") for a in draw(1))
    keep = keeps(4).astype("float32")
    lift(q, k, np.where(keep > 0, 0, gap))
    out, dq, dk, dv, dkeep = run(q, k, v, g, keep, xp=xp, sees_itself=sees_itself)
    for array in (out, dq, dk, dv, dkeep, dkeep ** 2):  # the square is AdamW's second moment
        assert array.dtype == "float32" and np.isfinite(array).all()
    kept = keep[0] > 0
    if not sees_itself:
        close(out[0], run(*(a[:1] for a in (q, *(gather(x, keep) for x in (k, v)), g)))[0][0], 1e-5)
    else:
        close(out[0][:, kept], run(*(gather(a, keep)[:1] for a in (q, k, v, g)))[0][0], 1e-5)
    u = np.abs(g @ v.swapaxes(-1, -2)).max()
    # each of H x T rows: |u - mean u| / (total >= 1)
    assert 1e-3 < np.abs(dkeep[keep == 0]).max() <= 2 * H * T * u


# Keeps and scores at the ends of their range

@pytest.mark.parametrize("value, tolerance", [(1e-39, 1e-5), (1e-42, 2e-3), (1e-30, 1e-5), (1e30, 1e-5)])
@pytest.mark.parametrize("sees_itself", [True, False])
def test_only_the_ratios_of_soft_keeps_count(value, tolerance, sees_itself, xp):
    """Equal keeps of any size are the plain softmax over the keys, and all gradients are finite. (Below 1e-38
    float32 has the fewer digits the smaller it is.)"""
    q, k, v, g = (a.astype("float32") for a in draw(1))
    keep = np.full((B, T), value, "float32")
    results = run(q, k, v, g, keep, xp=xp, sees_itself=sees_itself)
    assert all(np.isfinite(array).all() for array in results)
    if not sees_itself:
        for a, b in zip(results[:4], run(q, k, v, g, xp=xp)):
            close(a, b, tolerance)


@pytest.mark.parametrize("dtype, factor", [("float32", 1e-4), ("float32", 1e-29), ("float64", 1e-290)])
def test_the_slope_toward_keep_grows_as_all_keeps_shrink(dtype, factor, xp):
    q, k, v, g = (a.astype(dtype) for a in draw(1))
    keep = np.random.default_rng(0).uniform(0.5, 1, (B, T)).astype(dtype)
    before, after = (run(q, k, v, g, keep * size, xp=xp, sees_itself=False)[4] for size in (1, factor))
    close(after * factor, before, 1e-5)


@pytest.mark.parametrize("high", [3e31, 1e38])
def test_a_row_that_sees_no_key_may_have_any_scores(high, xp):
    v, g = np.random.default_rng(0).standard_normal((2, 1, 1, 3, 2)).astype("float32")
    q, k = np.full((1, 1, 3, 1), 1, "float32"), np.full((1, 1, 3, 1), high, "float32")
    q, k = (np.concatenate([a, 0 * a], axis=-1) for a in (q, k))
    out, _, _, dv, dkeep = run(q, k, v, g, np.zeros((1, 3), "float32"), xp=xp, sees_itself=False)
    assert not out.any() and not dv.any() and np.isfinite(dkeep).all()


def test_a_soft_keep_that_float32_hardly_holds_beside_a_key_that_towers(xp):
    """Both shares are as in float64, though their sum is below the smallest normal float32."""
    q, k, v, g = (a[:1, :1].astype("float32") for a in draw(1))
    keep = np.array([[1, 1e-39, 0, 0, 0, 0, 0]], "float32")
    lift(q, k, np.array([[0, 90, 120, 0, 0, 0, 0]]))
    results = run(q, k, v, g, keep, xp=xp, sees_itself=False)
    exact = run(*(a.astype("float64") for a in (q, k, v, g, keep)), xp=xp, sees_itself=False)
    for a, b in zip(results[:4], exact):
        close(a, b, 1e-4)
    assert np.isfinite(results[4]).all()


@pytest.mark.parametrize("dtype, low", [("float32", -2e30), ("float32", -1e38), ("float64", -1e200)])
@pytest.mark.parametrize("official", [False, True])
def test_kept_scores_may_be_as_low_as_numbers_go(dtype, low, official, xp):
    v = np.random.default_rng(0).standard_normal((1, 1, 4, 2)).astype(dtype)
    q, k = np.zeros((2, 1, 1, 4, 2), dtype)
    q[..., 0], k[..., 0] = 1, low
    keep = np.array([[1, 0, 1, 0]], dtype)
    out, A = ops.attention(*map(xp.asarray, (q, k, v, keep)), sees_itself=False, official=official,
                           weights=True)
    close(to_numpy(A.data), np.tile(np.array([0.5, 0, 0.5, 0], dtype), (1, 1, 4, 1)), 1e-5)
    close(to_numpy(out.data), np.tile(v[:, :, [0, 2]].mean(axis=2, keepdims=True), (1, 1, 4, 1)), 1e-5)


@pytest.mark.parametrize("keep", [None, [[1, 1, 1, 1]], [[1, 0, 1, 1]]])
def test_a_score_of_minus_infinity_removes_the_key(keep, xp):
    """And with all of them a row sees nothing, which gives zeros."""
    keep = None if keep is None else xp.asarray(keep)
    v = np.random.default_rng(0).standard_normal((1, 1, 4, 2))
    q, k = np.ones((1, 1, 4, 1)), np.array([-np.inf, 0, 0, -np.inf]).reshape(1, 1, 4, 1)
    out = ops.attention(*map(xp.asarray, (q, k, np.tile(v[..., :1], 1))), keep, sees_itself=False)
    left = [1, 2] if keep is None or keep[0, 1] else [2]
    close(to_numpy(out.data), np.full((1, 1, 4, 1), v[0, 0, left, 0].mean()))
    out = ops.attention(*map(xp.asarray, (q, np.full_like(k, -np.inf), v[..., :1])), keep, sees_itself=False)
    assert not to_numpy(out.data).any()
    leaves = [Tensor(xp.asarray(a), requires_grad=True) for a in (q, v[..., :1])]
    low = xp.asarray(np.full_like(k, -1e300))
    ops.attention(leaves[0], low, leaves[1], keep, sees_itself=False).sum().backward()
    assert all(np.isfinite(to_numpy(leaf.grad)).all() for leaf in leaves)


# The official form

def official_by_loops(q, k, v, keep, eps=1e-6):
    out = np.zeros_like(v)
    for b, h, i in itertools.product(range(len(q)), range(q.shape[1]), range(q.shape[2])):
        logits = [math.fsum(q[b, h, i] * key) / math.sqrt(q.shape[3]) for key in k[b, h]]
        w = [math.exp(a - max(logits)) * (1 if i == j else keep[b, j]) for j, a in enumerate(logits)]
        total = math.fsum(w) + eps
        out[b, h, i] = sum((x + eps / len(w)) / total * value for x, value in zip(w, v[b, h]))
    return out


@pytest.mark.parametrize("std", SPREADS)
def test_official_form_is_its_formula(std, xp):
    q, k, v, _ = draw(std)
    for keep in (keeps(3), np.random.default_rng(0).uniform(size=(B, T)), np.ones((B, T))):
        close(to_numpy(ops.attention(*map(xp.asarray, (q, k, v, keep)), official=True).data),
              official_by_loops(q, k, v, keep))


def test_official_form_is_not_removing():
    """Why it is not the default: at large logits a dropped key that holds the maximum pushes all kept ones
    down to eps."""
    far = {}
    for std in SPREADS:
        q, k, v, g = draw(std, shape=(16, 3, 33, 4))
        keep = keeps(2, shape=(16, 33))
        gathered = run(*(gather(a, keep) for a in (q, k, v, g)))[0]
        official, exact = (gather(ops.attention(q, k, v, keep, official=form).data, keep)
                           for form in (True, False))
        close(exact, gathered)
        far[std] = np.abs(official - gathered).max()
    assert far[1] < 1e-4 and far[5] > 1 and far[20] > 1


def fixture_cases():
    with np.load(FIXTURE) as file:
        return [{name: file[f"case{i}/{name}"]
                 for name in ("q", "k", "v", "keep", "g", "out", "A", "dq", "dk", "dv", "dkeep")}
                for i in range(int(file["cases"]))]


def test_official_form_equals_the_one_made_with_torch(xp):
    cases = fixture_cases()
    assert len(cases) >= 10
    for c in cases:
        found = run(*(c[name] for name in ("q", "k", "v", "g", "keep")), xp=xp, official=True)
        for a, name in zip(found, ("out", "dq", "dk", "dv", "dkeep"), strict=True):
            np.testing.assert_allclose(a, c[name], rtol=0, atol=1e-12 * np.abs(c[name]).max(), err_msg=name)
        A = ops.attention(*(xp.asarray(c[name]) for name in ("q", "k", "v", "keep")), official=True,
                          weights=True)[1]
        np.testing.assert_allclose(to_numpy(A.data), c["A"], rtol=1e-12, atol=1e-15)


# What is refused

SHAPES = "expected (B, H, Tq, d), (B, H, Tk, d), (B, H, Tk, d)"


def z(*shape):
    return np.zeros(shape)


@pytest.mark.parametrize("call, message", [
    (lambda: ops.attention(z(2, 3, 4), z(2, 3, 4), z(2, 3, 4)),
     "attention: q (2, 3, 4), k (2, 3, 4), v (2, 3, 4): " + SHAPES),
    (lambda: ops.attention(z(1, 2, 3, 4), z(1, 2, 3, 5), z(1, 2, 3, 5)),
     "attention: q (1, 2, 3, 4), k (1, 2, 3, 5), v (1, 2, 3, 5): " + SHAPES),
    (lambda: ops.attention(z(1, 2, 3, 4), z(1, 2, 3, 4), z(1, 2, 5, 4)),
     "attention: q (1, 2, 3, 4), k (1, 2, 3, 4), v (1, 2, 5, 4): " + SHAPES),
    (lambda: ops.attention(*[z(1, 2, 3, 4)] * 3, np.array([[0, -math.inf, 0]])),
     "attention: keep from -inf to 0.0, expected 1 to keep a key and 0 to drop it\n"
     "  likely: keep=mask == 0, if the mask is one that is added to scores   (lesson 05)"),
    (lambda: ops.attention(*[z(1, 2, 3, 4)] * 3, np.array([[0, -1e9, 0]], "float32")),
     "attention: keep from -1000000000.0 to 0.0, expected 1 to keep a key and 0 to drop it\n"
     "  likely: keep=mask == 0, if the mask is one that is added to scores   (lesson 05)"),
    (lambda: ops.attention(*[z(1, 2, 3, 4)] * 3, np.array([[0, math.inf, 1]])),
     "attention: keep from 0.0 to inf, expected 1 to keep a key and 0 to drop it\n"
     "  likely: keep=mask == 0, if the mask is one that is added to scores   (lesson 05)"),
    (lambda: ops.attention(*[z(1, 2, 3, 4)] * 3, np.array([[0, math.nan, 1]])),
     "attention: keep from nan to nan, expected 1 to keep a key and 0 to drop it\n"
     "  likely: keep=mask == 0, if the mask is one that is added to scores   (lesson 05)"),
    (lambda: ops.attention(*[z(1, 2, 3, 4)] * 3, z(1, 4)),
     "attention: keep (1, 4) for k (1, 2, 3, 4): expected (B, Tk)"),
    (lambda: ops.attention(z(1, 2, 3, 4), z(1, 2, 5, 4), z(1, 2, 5, 4), z(1, 5)),
     "attention: q (1, 2, 3, 4), k (1, 2, 5, 4), v (1, 2, 5, 4): with keep and sees_itself Tq must equal Tk\n"
     "  likely: sees_itself=False for cross-attention   (lesson 05)"),
])
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message
