"""AdamW against the paper's algorithm, one parameter at a time; the running mean of the weights; the
schedule."""
import copy

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, refuses
from tiny import batches, vit
from tinytoken import backend, nn
from tinytoken.models import ViT
from tinytoken.train import fit, optim
from tinytoken.train.optim import AdamW, clip_norm, warmup_cosine

# (shape, decay, lr_scale, frozen_steps): groups of matrices and of vectors, and not in the order of flat
# storage
LAYOUT = [((7, 5), True, 1.0, 0), ((5,), False, 1.0, 0), ((3, 3), True, 3.0, 0), ((4,), False, 0.5, 0),
          ((2, 3), False, 3.0, 2), ((6, 2), True, 1.0, 0), ((3, 5), True, 0.5, 3)]


def host(array):
    return array.get() if hasattr(array, "get") else array


def some_parameters(xp=np, dtype="float64"):
    rng, params = np.random.default_rng(0), []
    for shape, decay, scale, frozen in LAYOUT:
        params.append(nn.Parameter(xp.asarray(rng.standard_normal(shape).astype(dtype)), decay))
        params[-1].lr_scale, params[-1].frozen_steps = scale, frozen
    return params


def some_gradients(steps=6):
    """Small ones and large ones by turns, so that clipping at norm 1 acts in every second step only."""
    rng = np.random.default_rng(1)
    return [[rng.standard_normal(shape) * (0.01, 10)[t % 2] for shape, *_ in LAYOUT] for t in range(steps)]


def adamw_by_hand(weights, gradients, rates, *, weight_decay, betas, eps, clip):
    """Algorithm 2 of Loshchilov & Hutter with bias-corrected moments, written for one parameter at a time."""
    weights, m, v = [w.copy() for w in weights], [0] * len(LAYOUT), [0] * len(LAYOUT)
    for t, (step_gradients, rate) in enumerate(zip(gradients, rates), start=1):
        norm = sum((g ** 2).sum() for g in step_gradients) ** 0.5
        for i, (g, (_, decay, scale, frozen)) in enumerate(zip(step_gradients, LAYOUT)):
            if clip is not None and norm > clip:
                g = g * clip / norm
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g ** 2
            m_hat, v_hat = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            old = weights[i]
            if t <= frozen:  # its moments gather, and it stays
                continue
            weights[i] = old - rate * scale * (m_hat / (np.sqrt(v_hat) + eps))
            if decay:
                weights[i] = weights[i] - rate * scale * weight_decay * old
    return weights


@pytest.mark.parametrize("block", [1, 4, 35, optim.BLOCK])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_is_the_papers(xp, monkeypatch, block, clip):
    monkeypatch.setattr(optim, "BLOCK", block)
    settings = dict(weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6, clip=clip)
    rates = [0.1, 0.05, 0.2, 0.0, 0.01, 0.1]
    for dtype, tolerance in (("float64", 1e-11), ("float32", 2e-5)):
        params = some_parameters(xp, dtype)
        expected = adamw_by_hand([host(p.data).astype("float64") for p in params], some_gradients(), rates,
                                 **settings)
        optimizer = AdamW(iter(params), 123.0, **settings)
        for gradients, rate in zip(some_gradients(), rates):
            for p, g in zip(params, gradients):
                p.grad[...] = xp.asarray(g.astype(dtype))
            optimizer.step(rate)
        assert optimizer.steps == len(rates)
        for p, w in zip(params, expected):
            assert p.dtype == dtype
            np.testing.assert_allclose(host(p.data), w, rtol=tolerance, atol=tolerance)


def test_the_optimisers_own_rate_is_the_default():
    one, other = some_parameters(), some_parameters()
    for params, arguments in ((one, ()), (other, (0.02,))):
        optimizer = AdamW(params, 0.02)
        for p in params:
            p.grad[...] = 1
        optimizer.step(*arguments)
    assert all(np.array_equal(p.data, q.data) for p, q in zip(one, other))


def test_the_first_step_is_the_learning_rate_whatever_the_gradient():
    """Bias correction: m / sqrt(v) is the gradient's sign in step one."""
    p = nn.Parameter(np.zeros(3))
    optimizer = AdamW([p], 0.1, eps=1e-12)
    p.grad[...] = [1e-4, -1.0, 1e4]
    optimizer.step()
    np.testing.assert_allclose(p.data, [-0.1, 0.1, -0.1], rtol=1e-6)


def test_clip_norm(xp):
    g = xp.asarray(np.array([3.0, 4.0]))
    assert float(clip_norm(g, 10.0)) == 5 and host(g).tolist() == [3, 4]
    assert float(clip_norm(g, 1.0)) == 5
    np.testing.assert_allclose(host(g), [0.6, 0.8], rtol=1e-11)
    zero = xp.zeros(4)
    assert float(clip_norm(zero, 1.0)) == 0 and not host(zero).any()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_tells_the_norm_before_clipping(clip, xp):
    p = nn.Parameter(xp.zeros(2, "float32"))
    optimizer = AdamW([p], clip=clip)
    p.grad[...] = xp.asarray([3, 4])
    assert float(optimizer.step()) == 5


@pytest.mark.skipif(backend.blas_controller() is None, reason="a BLAS whose threads cannot be set")
def test_a_step_gives_the_same_bits_with_any_number_of_blas_threads():
    """The clipped norm is a BLAS product, and its sum is shared out over threads."""
    weights = []
    for threads in (1, 2, 3, 4):
        p = nn.Parameter(np.zeros(100_003))
        optimizer = AdamW([p], clip=1.0)
        p.grad[...] = np.random.default_rng(0).standard_normal(p.shape)
        with backend.blas_threads(threads):
            optimizer.step()
        weights.append(p.data.tobytes())
    assert len(set(weights)) == 1


REFUSAL = ("AdamW: a parameter's array, group or place changed since the optimiser was made (another dtype "
           "or device, a copy, "
           "another optimiser): make a new optimiser")


@pytest.mark.parametrize("change", [
    lambda m: m.astype("float64"),
    lambda m: m.to("cpu").astype("float32"),
    lambda m: setattr(m.head.weight, "data", m.head.weight.data.copy()),
    lambda m: setattr(m.head.bias, "grad", None),
    lambda m: AdamW(m.head.parameters()),
    lambda m: AdamW(m.parameters()[::-1]),
    lambda m: (setattr(m.head.weight, "lr_scale", 0.1), AdamW(m.parameters())),
    lambda m: m.load_state_dict({n: a.astype("float64") for n, a in m.state_dict().items()}),
], ids=["astype", "to and astype", "data", "grad", "of a part", "another order", "another group",
        "load float64"])
def test_a_parameter_that_was_re_pointed_is_refused(change):
    model = ViT(**SMALL)
    optimizer = AdamW(model.parameters())
    optimizer.step()
    change(model)
    before = model.state_dict()
    with refuses(REFUSAL):
        optimizer.step()
    assert optimizer.steps == 1 and all(np.array_equal(a, before[n]) for n, a in model.state_dict().items())


def test_a_deep_copy_and_an_equal_optimiser_change_nothing():
    model = ViT(**SMALL)
    optimizer = AdamW(model.parameters(), 0.1)
    twin, before = copy.deepcopy(model), model.state_dict()
    other = AdamW(model.parameters())
    assert other.flat is optimizer.flat
    optimizer.flat.grad[...] = 1
    optimizer.step()
    other.step()
    assert all(np.array_equal(p.data, before[n]) for n, p in twin.named_parameters())
    assert not any(np.array_equal(p.data, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("arguments, given", [
    (dict(lr=-1), "lr -1, weight_decay 0.05, betas (0.9, 0.999), eps 1e-08"),
    (dict(betas=(0.9, 1.0)), "lr 0.001, weight_decay 0.05, betas (0.9, 1.0), eps 1e-08"),
    (dict(weight_decay=-0.1), "lr 0.001, weight_decay -0.1, betas (0.9, 0.999), eps 1e-08"),
    (dict(eps=0), "lr 0.001, weight_decay 0.05, betas (0.9, 0.999), eps 0"),
])
def test_adamw_refuses(arguments, given):
    with refuses(f"AdamW: {given}: not negative, eps positive, betas below 1 expected"):
        AdamW(some_parameters(), **arguments)
    with refuses("AdamW: clip 0, expected a positive norm or None"):
        AdamW(some_parameters(), clip=0)


def test_state_goes_on_to_the_same_bits():
    gradients = some_gradients()

    def steps(optimizer, part):
        for step_gradients in part:
            for p, g in zip(optimizer.params, step_gradients):
                p.grad[...] = g
            optimizer.step(0.05)

    whole = AdamW(some_parameters(), clip=1.0)
    steps(whole, gradients)
    first = AdamW(some_parameters(), clip=1.0)
    steps(first, gradients[:3])
    second = AdamW([copy.deepcopy(p) for p in first.params], clip=1.0)
    arrays, count = first.state()
    second.load_state({name: array.copy() for name, array in arrays.items()}, count)
    steps(second, gradients[3:])
    assert second.steps == whole.steps == len(gradients)
    for mine, others in ((second.flat.data, whole.flat.data), (second.m, whole.m), (second.v, whole.v)):
        assert np.array_equal(mine, others)


def test_the_state_is_the_same_however_a_matrix_lies_in_memory():
    def trained(order):
        p, q = (tt.nn.Parameter(np.array(np.arange(2.0, 2 + n).reshape(shape), order=order))
                for n, shape in ((15, (5, 3)), (4, (4,))))
        optimizer = AdamW([p, q], 0.1, average=0.9)
        assert p.data.flags[f"{order}_CONTIGUOUS"]
        for step in range(3):
            p.grad[...], q.grad[...] = np.sin(step + np.arange(15.0)).reshape(5, 3), step
            optimizer.step()
        return optimizer, p
    (by_rows, p), (by_columns, q) = trained("C"), trained("F")
    np.testing.assert_array_equal(p.data, q.data)
    assert not np.array_equal(by_rows.m, by_columns.m)
    (mine, _), (others, _) = by_rows.state(), by_columns.state()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, others[name])
        np.testing.assert_array_equal(array, by_rows.moments[name])
        by_columns.moments[name][...] = 0
    by_columns.load_state(mine, 3)
    by_rows.step(), by_columns.step()
    np.testing.assert_array_equal(p.data, q.data)


def test_load_state_refuses_and_changes_nothing():
    optimizer = AdamW(some_parameters())
    size = optimizer.m.size
    good, short, narrow = np.ones(size), np.ones(size - 1), np.ones(size, "float32")
    for wrong, text in (({"m": short, "v": good},
                         f"AdamW: moments m ({size - 1},) float64, expected ({size},) float64"),
                        ({"m": good, "v": narrow},
                         f"AdamW: moments v ({size},) float32, expected ({size},) float64")):
        with refuses(text):
            optimizer.load_state(wrong, 7)
        assert optimizer.steps == 0 and not optimizer.m.any() and not optimizer.v.any()


# The running mean of the weights

def test_the_average_is_the_mean_that_it_says(xp):
    p = tt.nn.Parameter(xp.asarray(np.array([1.0, -2.0])))
    optimizer, mean = AdamW([p], 0.1, average=0.8), np.array([1.0, -2.0])
    for step in range(1, 40):
        p.grad[...] = xp.asarray(np.array([step % 3 - 1.0, 0.5]))
        optimizer.step()
        keep = min(0.8, (1 + step) / (10 + step))
        mean = keep * mean + (1 - keep) * host(p.data)
        # the rest is a gap of flat storage
        np.testing.assert_allclose(host(optimizer.mean)[:2], mean, rtol=1e-12)
    assert keep == 0.8 and np.abs(host(p.data) - mean).max() > 1e-3
    optimizer.use_average()
    np.testing.assert_allclose(host(p.data), mean, rtol=1e-12)


def test_without_being_asked_nothing_is_averaged():
    model, task = vit()
    optimizer = AdamW(model.parameters())
    assert optimizer.mean is None and set(optimizer.state()[0]) == {"m", "v"}
    with pytest.raises(tt.InputError, match="no average was asked for"):
        optimizer.use_average()
    with pytest.raises(tt.InputError, match="expected m, v, mean"):
        AdamW(model.parameters(), average=0.9).load_state(optimizer.state()[0], 3)
    assert fit(model, task, batches(), steps=2, bar=False)["loss"] > 0


# The learning rate

def test_warmup_cosine():
    shares = [warmup_cosine(step, 100) for step in range(101)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    assert shares[10] == 1 and shares[100] == 0 and 0 < shares[99] < 1e-3
    assert shares[55] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(shares[10:], shares[11:]))
    assert warmup_cosine(0, 1) == 1  # one step alone is a full one
    # the shortest warm-up is one step, at the peak
    assert [warmup_cosine(step, 10, warmup=0) for step in (0, 1)] == [1, 1]
    assert warmup_cosine(4, 10, warmup=0.5) == 1 == warmup_cosine(5, 10, warmup=0.5)
    assert warmup_cosine(3, 10, warmup=0.5) == 0.8
