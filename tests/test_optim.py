"""AdamW against the paper's algorithm, one parameter at a time; the schedule; loss_and_grads: cuts and threads change nothing."""
import copy
import functools
import sys
import threading
import time

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, refuses
from tinytoken import backend, nn, optim
from tinytoken.models import DynamicViT, ViT
from tinytoken.optim import AdamW, clip_norm, loss_and_grads, share_out, warmup_cosine
from tinytoken.train import Classify, Distil

# (shape, decay, lr_scale): two groups of matrices, two of vectors, and not in the order of flat storage
LAYOUT = [((7, 5), True, 1.0), ((5,), False, 1.0), ((3, 3), True, 3.0), ((4,), False, 0.5), ((2, 3), False, 3.0),
          ((6, 2), True, 1.0)]


def host(array):
    return array.get() if hasattr(array, "get") else array


def some_parameters(xp=np, dtype="float64"):
    rng, params = np.random.default_rng(0), []
    for shape, decay, scale in LAYOUT:
        params.append(nn.Parameter(xp.asarray(rng.standard_normal(shape).astype(dtype)), decay))
        params[-1].lr_scale = scale
    return params


def some_gradients(steps=6):
    """Small ones and large ones by turns, so that clipping at norm 1 acts in every second step only."""
    rng = np.random.default_rng(1)
    return [[rng.standard_normal(shape) * (0.01, 10)[t % 2] for shape, _, _ in LAYOUT] for t in range(steps)]


def adamw_by_hand(weights, gradients, rates, *, weight_decay, betas, eps, clip):
    """Algorithm 2 of Loshchilov & Hutter with bias-corrected moments, written for one parameter at a time."""
    weights, m, v = [w.copy() for w in weights], [0] * len(LAYOUT), [0] * len(LAYOUT)
    for t, (step_gradients, rate) in enumerate(zip(gradients, rates), start=1):
        norm = sum((g ** 2).sum() for g in step_gradients) ** 0.5
        for i, (g, (_, decay, scale)) in enumerate(zip(step_gradients, LAYOUT)):
            if clip is not None and norm > clip:
                g = g * clip / norm
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g ** 2
            m_hat, v_hat = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            old = weights[i]
            weights[i] = old - rate * scale * (m_hat / (np.sqrt(v_hat) + eps))
            if decay:
                weights[i] = weights[i] - rate * scale * weight_decay * old
    return weights


@pytest.mark.parametrize("block", [1, 4, 35, optim.BLOCK])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_is_the_papers(xp, monkeypatch, block, clip):
    monkeypatch.setattr(optim, "BLOCK", block)
    settings, rates = dict(weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6, clip=clip), [0.1, 0.05, 0.2, 0.0, 0.01, 0.1]
    for dtype, tolerance in (("float64", 1e-11), ("float32", 2e-5)):
        params = some_parameters(xp, dtype)
        expected = adamw_by_hand([host(p.data).astype("float64") for p in params], some_gradients(), rates, **settings)
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


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_switch_quickly_inside_and_as_before_outside(threads):
    before, seen = sys.getswitchinterval(), []

    def work(item):
        seen.append(sys.getswitchinterval())
        if item == 3:
            raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError):
        share_out(work, range(4), threads)
    [inside] = set(seen)
    assert inside == (before if threads == 1 else pytest.approx(5e-4)) and sys.getswitchinterval() == before


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


REFUSAL = ("AdamW: a parameter's array, group or place changed since the optimiser was made (another dtype or device, a copy, "
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
], ids=["astype", "to and astype", "data", "grad", "of a part", "another order", "another group", "load float64"])
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


def test_load_state_refuses_and_changes_nothing():
    optimizer = AdamW(some_parameters())
    size = optimizer.m.size
    good, short, narrow = np.ones(size), np.ones(size - 1), np.ones(size, "float32")
    for wrong, text in (({"m": short, "v": good}, f"AdamW: moments m ({size - 1},) float64, expected ({size},) float64"),
                        ({"m": good, "v": narrow}, f"AdamW: moments v ({size},) float32, expected ({size},) float64")):
        with refuses(text):
            optimizer.load_state(wrong, 7)
        assert optimizer.steps == 0 and not optimizer.m.any() and not optimizer.v.any()


def test_warmup_cosine():
    shares = [warmup_cosine(step, 100) for step in range(101)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    assert shares[10] == 1 and shares[100] == 0 and 0 < shares[99] < 1e-3
    assert shares[55] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(shares[10:], shares[11:]))
    assert warmup_cosine(0, 1) == 1  # one step alone is a full one
    assert [warmup_cosine(step, 10, warmup=0) for step in (0, 1)] == [1, 1]  # the shortest warm-up is one step, at the peak
    assert warmup_cosine(4, 10, warmup=0.5) == 1 == warmup_cosine(5, 10, warmup=0.5) and warmup_cosine(3, 10, warmup=0.5) == 0.8


# loss_and_grads

def one_batch(xp=np, batch=10):
    rng = np.random.default_rng(0)
    return xp.asarray(rng.standard_normal((batch, 3, 8, 8))), xp.asarray(rng.integers(0, 5, batch))


def classify(dtype="float64", xp=np):
    model = ViT(**SMALL).astype(dtype).train()
    return Classify(model if xp is np else model.to("cuda"), smoothing=0.1), one_batch(xp)


def distil(dtype="float64", xp=np):
    tt.manual_seed(0)
    model = DynamicViT(**SMALL, prune_before=(0, 1), keep_ratios=(0.7, 0.4)).astype(dtype).train()
    teacher = ViT(**SMALL).astype(dtype)
    objective = Distil(*((model, teacher) if xp is np else (model.to("cuda"), teacher.to("cuda"))))
    return objective, (*one_batch(xp), *objective.noise(10, 3, 0, xp))


objectives = pytest.mark.parametrize("make", [classify, distil])


def full_batch(objective, batch):
    """(loss, parts, {name: gradient}) by one backward pass."""
    for p in objective.model.parameters():
        p.grad = None
    loss, parts = objective(*batch)
    loss.backward()
    grads = {name: np.zeros(p.shape) if p.grad is None else host(p.grad).copy() for name, p in objective.model.named_parameters()}
    return float(loss), {name: float(part) for name, part in parts.items()}, grads


def close(objective, result, expected, tolerance):
    (loss, parts), (full_loss, full_parts, full_grads) = result, expected
    loss, parts = float(loss), {name: float(value) for name, value in parts.items()}  # 0-d arrays where it ran on a GPU
    assert loss == pytest.approx(full_loss, rel=tolerance) and list(parts) == list(full_parts)
    assert parts == {name: pytest.approx(value, rel=tolerance) for name, value in full_parts.items()}
    largest = max(np.abs(g).max() for g in full_grads.values())
    for name, p in objective.model.named_parameters():
        np.testing.assert_allclose(host(p.grad), full_grads[name], rtol=0, atol=tolerance * largest, err_msg=name)


@objectives
def test_cuts_and_threads_give_the_full_batchs_gradient(xp, make):
    objective, batch = make(xp=xp)
    expected = full_batch(objective, batch)
    assert max(np.abs(g).max() for g in expected[2].values()) > 0.01
    for micro, threads in ((10, 1), (16, 2), (4, 1), (3, 2), (1, 3), (3, 100)):
        close(objective, loss_and_grads(objective, objective.model.parameters(), batch, micro, threads), expected, 1e-12)
    close(objective, loss_and_grads(objective, iter(objective.model.parameters()), batch), expected, 1e-12)


@objectives
def test_float32_thread_counts_agree_and_one_gives_the_same_bits(make):
    objective, batch = make("float32")
    bits, expected = {}, full_batch(objective, batch)
    for threads in (1, 2, 2, 1, 3, 3):
        result = loss_and_grads(objective, objective.model.parameters(), batch, 3, threads)
        close(objective, result, expected, 1e-5)
        assert isinstance(result[0], float) and all(isinstance(part, float) for part in result[1].values())
        found = (repr(result), objective.model.parameters()[0].flat.grad.tobytes())
        assert bits.setdefault(threads, found) == found


def test_slices_are_weighted_by_their_share_of_the_images():
    p, x = nn.Parameter(np.full(1, 3.0)), np.array([[1.0], [2.0], [4.0], [8.0], [100.0]])

    def line(x):
        loss = (p * x).mean()
        return loss, {"tensor": loss * 2, "number": float(x.mean())}

    for micro, threads in ((2, 1), (2, 2), (4, 2), (5, 1)):
        loss, parts = loss_and_grads(line, [p], (x,), micro, threads)
        assert loss == pytest.approx(69) and parts == pytest.approx({"tensor": 138, "number": 23}) and p.grad == pytest.approx(23)


def test_gradients_are_overwritten_and_unused_parameters_get_zeros():
    p, unused = nn.Parameter(np.full(1, 3.0)), nn.Parameter(np.ones((2, 2)))
    p.grad, unused.grad = np.full(1, 7.0), np.full((2, 2), 7.0)
    for threads in (1, 2, 2):
        loss_and_grads(lambda x: (p * x).mean(), [unused, p], (np.array([[1.0], [2.0], [6.0]]),), 1, threads)
        assert p.grad == pytest.approx(3) and not unused.grad.any()


def test_a_loss_without_parts_and_one_without_parameters():
    p = nn.Parameter(np.full(1, 3.0))
    assert loss_and_grads(lambda x: (p * x).mean(), [p], (np.ones((4, 1)),), 2, 2) == (3.0, {})
    assert loss_and_grads(lambda x: tt.Tensor(x).mean(), [p], (np.ones((4, 1)),), 2, 2) == (1.0, {}) and p.grad == 0


def test_loss_and_grads_refuses():
    p, x = nn.Parameter(np.ones(1)), np.ones((4, 1))
    run = functools.partial(loss_and_grads, lambda x: (p * x).mean(), [p])
    with refuses("loss_and_grads: batch arrays of 4, 3, 4 images: one size expected"):
        run((x, x[:3], x))
    with refuses("loss_and_grads: batch arrays of 0, 0 images: one size expected"):
        run((x[:0], x[:0]))
    for micro, threads in ((0, None), (16, 0), (16, -1)):
        with refuses(f"loss_and_grads: micro {micro}, threads {threads}: at least 1 each expected"):
            run((x,), micro=micro, threads=threads)
    for wrong in (lambda x: p * x, lambda x: (p * x).mean(axis=0), lambda x: 3.0):
        with refuses("loss_and_grads: loss_fn must return a scalar Tensor, or one and its parts"):
            loss_and_grads(wrong, [p], (x[:1],))


@pytest.mark.skipif(backend.blas_controller() is None, reason="a BLAS whose threads cannot be set")
@pytest.mark.parametrize("threads", [1, 2])
def test_blas_has_one_thread_inside_and_gets_back_what_it_had(threads):
    p, seen, get = nn.Parameter(np.ones(1)), [], lambda: backend.blas_controller().info()[0]["num_threads"]

    def loss(x):
        seen.append(get())
        if x.max() > 1:
            raise ArithmeticError("in the middle of a step")
        return (p * x).mean()

    with backend.blas_threads(3):
        loss_and_grads(loss, [p], (np.ones((6, 1)),), 2, threads)
        assert get() == 3 and seen == [1, 1, 1]
        with pytest.raises(ArithmeticError, match="in the middle of a step"):
            loss_and_grads(loss, [p], (np.arange(6.0).reshape(6, 1),), 2, threads)
        assert get() == 3


def test_an_exception_is_raised_when_all_threads_have_ended():
    """Otherwise a thread that is left over would go on adding to gradients of the next step."""
    ended, started = [], threading.Event()

    def work(item):
        if item == 0:
            started.wait(5)
            raise ArithmeticError("first")
        started.set()
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ArithmeticError, match="first"):
        share_out(work, range(100), 2)
    found = list(ended)
    time.sleep(0.1)
    assert 1 in found and ended == found and len(ended) < 99  # what had begun has ended, what had not is dropped


def test_share_out_keeps_the_order_and_uses_the_threads():
    meeting = threading.Barrier(3)

    def work(item):
        if item < 3:
            meeting.wait(5)  # passes only if three run at once
        return item * item
    assert share_out(work, range(7), 3) == [i * i for i in range(7)]
    assert share_out(lambda item: threading.current_thread(), [1], 3) == [threading.current_thread()]
    assert share_out(work, []) == []
