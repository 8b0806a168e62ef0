"""All CPU parallelism: cuts and threads change no gradient, and threads end before anything goes on."""
import functools
import sys
import threading
import time

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, refuses
from tinytoken import backend, nn
from tinytoken.models import DynamicViT, ViT
from tinytoken.tasks import Classify, Distil
from tinytoken.train.parallel import loss_and_grads, share_out


def host(array):
    return array.get() if hasattr(array, "get") else array


# Cuts and threads

def one_batch(xp=np, batch=10):
    rng = np.random.default_rng(0)
    return xp.asarray(rng.standard_normal((batch, 3, 8, 8))), xp.asarray(rng.integers(0, 5, batch))


def classify(dtype="float64", xp=np):
    model = ViT(**SMALL).astype(dtype).train()
    return Classify(model if xp is np else model.to("cuda"), smoothing=0.1), one_batch(xp), {}


def distil(dtype="float64", xp=np):
    tt.manual_seed(0)
    model = DynamicViT(**SMALL, prune_before=(0, 1), keep_ratios=(0.7, 0.4)).astype(dtype).train()
    teacher = ViT(**SMALL).astype(dtype)
    task = Distil(*((model, teacher) if xp is np else (model.to("cuda"), teacher.to("cuda"))))
    return task, one_batch(xp), task.noise(10, 3, 0, xp)


each_task = pytest.mark.parametrize("make", [classify, distil])


def full_batch(task, batch, draws):
    """(loss, parts, {name: gradient}) by one backward pass."""
    for p in task.model.parameters():
        p.grad = None
    loss, parts = task(*batch, **draws)
    loss.backward()
    grads = {name: np.zeros(p.shape) if p.grad is None else host(p.grad).copy()
             for name, p in task.model.named_parameters()}
    return float(loss), {name: float(part) for name, part in parts.items()}, grads


def close(task, result, expected, tolerance):
    (loss, parts), (full_loss, full_parts, full_grads) = result, expected
    # 0-d arrays where it ran on a GPU
    loss, parts = float(loss), {name: float(value) for name, value in parts.items()}
    assert loss == pytest.approx(full_loss, rel=tolerance) and list(parts) == list(full_parts)
    assert parts == {name: pytest.approx(value, rel=tolerance) for name, value in full_parts.items()}
    largest = max(np.abs(g).max() for g in full_grads.values())
    for name, p in task.model.named_parameters():
        np.testing.assert_allclose(host(p.grad), full_grads[name], rtol=0, atol=tolerance * largest,
                                   err_msg=name)


@each_task
def test_cuts_and_threads_give_the_full_batchs_gradient(xp, make):
    task, batch, draws = make(xp=xp)
    expected = full_batch(task, batch, draws)
    assert max(np.abs(g).max() for g in expected[2].values()) > 0.01
    for micro, threads in ((10, 1), (16, 2), (4, 1), (3, 2), (1, 3), (3, 100)):
        close(task, loss_and_grads(task, task.model.parameters(), batch, micro, threads, draws), expected,
              1e-12)
    close(task, loss_and_grads(task, iter(task.model.parameters()), batch, draws=draws), expected, 1e-12)


@each_task
def test_float32_thread_counts_agree_and_one_gives_the_same_bits(make):
    task, batch, draws = make("float32")
    bits, expected = {}, full_batch(task, batch, draws)
    for threads in (1, 2, 2, 1, 3, 3):
        result = loss_and_grads(task, task.model.parameters(), batch, 3, threads, draws)
        close(task, result, expected, 1e-5)
        assert isinstance(result[0], float) and all(isinstance(part, float) for part in result[1].values())
        found = (repr(result), task.model.parameters()[0].flat.grad.tobytes())
        assert bits.setdefault(threads, found) == found


def test_slices_are_weighted_by_their_share_of_the_images():
    p, x = nn.Parameter(np.full(1, 3.0)), np.array([[1.0], [2.0], [4.0], [8.0], [100.0]])

    def line(x):
        loss = (p * x).mean()
        return loss, {"tensor": loss * 2, "number": float(x.mean())}

    for micro, threads in ((2, 1), (2, 2), (4, 2), (5, 1)):
        loss, parts = loss_and_grads(line, [p], (x,), micro, threads)
        assert loss == pytest.approx(69) and parts == pytest.approx({"tensor": 138, "number": 23})
        assert p.grad == pytest.approx(23)


def test_gradients_are_overwritten_and_unused_parameters_get_zeros():
    p, unused = nn.Parameter(np.full(1, 3.0)), nn.Parameter(np.ones((2, 2)))
    p.grad, unused.grad = np.full(1, 7.0), np.full((2, 2), 7.0)
    for threads in (1, 2, 2):
        loss_and_grads(lambda x: (p * x).mean(), [unused, p], (np.array([[1.0], [2.0], [6.0]]),), 1, threads)
        assert p.grad == pytest.approx(3) and not unused.grad.any()


def test_a_loss_without_parts_and_one_without_parameters():
    p = nn.Parameter(np.full(1, 3.0))
    assert loss_and_grads(lambda x: (p * x).mean(), [p], (np.ones((4, 1)),), 2, 2) == (3.0, {})
    assert loss_and_grads(lambda x: tt.Tensor(x).mean(), [p], (np.ones((4, 1)),), 2, 2) == (1.0, {})
    assert p.grad == 0


def test_loss_and_grads_refuses():
    p, x = nn.Parameter(np.ones(1)), np.ones((4, 1))
    run = functools.partial(loss_and_grads, lambda x: (p * x).mean(), [p])
    with refuses("loss_and_grads: batch arrays of 4, 3, 4 images: one size expected"):
        run((x, x[:3], x))
    with refuses("loss_and_grads: batch arrays of 0, 0 images: one size expected"):
        run((x[:0], x[:0]))
    with refuses("loss_and_grads: batch arrays of 4, 3 images: one size expected"):
        run((x,), draws={"noise": x[:3]})
    for micro, threads in ((0, None), (16, 0), (16, -1)):
        with refuses(f"loss_and_grads: micro {micro}, threads {threads}: at least 1 each expected"):
            run((x,), micro=micro, threads=threads)
    for wrong in (lambda x: p * x, lambda x: (p * x).mean(axis=0), lambda x: 3.0):
        with refuses("loss_and_grads: loss_fn must return a scalar Tensor, or one and its parts"):
            loss_and_grads(wrong, [p], (x[:1],))


# Threads

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


@pytest.mark.skipif(backend.blas_controller() is None, reason="a BLAS whose threads cannot be set")
def test_a_lone_item_has_all_threads_for_its_products():
    get = lambda item: backend.blas_controller().info()[0]["num_threads"]
    with backend.blas_threads(3):
        assert share_out(get, [0], 2) == [2] and share_out(get, [0], 1) == [1]
        assert share_out(get, [0, 1], 2) == [1, 1] and get(0) == 3


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
    # what had begun has ended, what had not is dropped
    assert 1 in found and ended == found and len(ended) < 99


def test_share_out_keeps_the_order_and_uses_the_threads():
    meeting = threading.Barrier(3)

    def work(item):
        if item < 3:
            meeting.wait(5)  # passes only if three run at once
        return item * item
    assert share_out(work, range(7), 3) == [i * i for i in range(7)]
    assert share_out(lambda item: threading.current_thread(), [1], 3) == [threading.current_thread()]
    assert share_out(work, []) == []
