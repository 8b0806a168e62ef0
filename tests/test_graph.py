"""What is recorded, and when it is freed; modes and threads; what watches the ops; the graph as text."""
import contextlib
import functools
import gc
import threading
import weakref

import numpy as np
import pytest

import tinytoken as tt
from engine import axpy, equal, leaf, pair, refusal
from tinytoken import GraphError, Tensor, graph, ops, tensor
from tinytoken.cost import graph_text


# Lifetimes

FREED = ("backward: this graph is already freed: backward() or grad() ran through it before. "
         "Run the forward pass again.")


def test_a_second_backward_says_so_and_changes_nothing():
    x = leaf([1.0, 2.0])
    y = x * x
    loss = y.sum()
    loss.backward()
    equal(x.grad, [2, 4])
    assert refusal(GraphError, loss.backward) == FREED
    assert refusal(GraphError, tt.grad, loss, [x]) == FREED
    other = (y * 3).sum() + x.sum()  # a part of this graph is freed: none of it may run
    assert refusal(GraphError, other.backward) == FREED
    equal(x.grad, [2, 4])
    equal(loss, 5)


def test_grad_frees_the_graph_too():
    x = leaf([1.0])
    loss = (x * x).sum()
    tt.grad(loss, [x])
    assert refusal(GraphError, loss.backward) == FREED
    assert x.grad is None


def test_a_branch_that_was_not_asked_for_is_still_there():
    """grad() for one leaf runs only what leads to it; the rest is neither freed nor cut."""
    a, b = (tt.Tensor(np.array([x]), requires_grad=True) for x in (2.0, 3.0))
    other = b * b
    assert tt.grad((a * a + other).sum(), [a])[0] == [4.0]
    assert tt.grad(other.sum(), [b])[0] == [6.0]


def network(x, w):
    q, k = ops.split_heads(ops.linear(ops.layer_norm(x), w), heads=2, parts=2)
    out, A = ops.attention(q, k, k, np.array([[1, 0, 1]]), weights=True)
    return ops.gelu(ops.merge_heads(out)).mean() + (A * A).sum()


def test_everything_dies_at_once_without_the_collector(no_collector):
    x, w = leaf(np.ones((1, 3, 4))), leaf(np.arange(32.0).reshape(8, 4))
    network(x, w).backward()
    x.grad = w.grad = None
    gc.collect()
    loss = network(x, w)
    held = [weakref.ref(loss), weakref.ref(loss.data), weakref.ref(loss.node.vjp)]
    del loss  # never used
    assert [ref() for ref in held] == [None] * 3
    loss = network(x, w)
    held = [weakref.ref(loss), weakref.ref(loss.data)]
    loss.backward()
    del loss
    assert [ref() for ref in held] == [None] * 2
    loss = network(x, w)
    tt.grad(loss, [w])
    del loss
    assert gc.collect() == 0


def test_a_graph_is_not_kept_by_its_leaves_nor_by_its_freed_root(no_collector):
    kept = {}

    @tt.op
    def keeper(x, *, name):
        saved = np.ones(3)
        kept[name] = weakref.ref(saved)

        def vjp(g):
            upstream.append(weakref.ref(g))
            alive.append(([n for n, ref in kept.items() if ref() is not None],
                          sum(ref() is not None for ref in upstream)))
            return g * saved
        return x * saved, vjp

    alive, upstream = [], []
    x = leaf(np.ones(3))
    y = x
    for name in range(5):
        y = keeper(y, name=name)
    loss = y.sum()
    del y
    loss.backward()
    assert [ref() for ref in kept.values()] == [None] * 5
    # And it goes step by step: when a vjp runs, what later nodes had saved is gone, and so are the gradients
    # they were given.
    assert alive == [(list(range(n + 1)), 1) for n in reversed(range(5))]


def test_a_graph_10_000_deep():
    x = leaf([1.0])
    y = x
    for _ in range(10_000):
        y = y + 0.001
    equal_to = y.item()
    assert equal_to == pytest.approx(11)
    y.sum().backward()
    equal(x.grad, [1])
    y = x
    for _ in range(10_000):
        y = ops.multiply(y, 1.0)
    assert graph_text(y).count("\n") == 10_000
    del y  # unused: the chain of nodes must not be taken down recursively


def test_a_graph_that_branches_at_every_step_is_sorted_in_time():
    x = leaf([1.0])
    y = x
    for _ in range(60):  # 2 ** 60 paths
        y = (y + y) * 0.5
    y.sum().backward()
    equal(x.grad, [1])


def test_the_order_holds_where_a_node_is_met_before_it_can_run():
    """A consumer far down must have run before its producer, in whatever order the edges name them."""
    for flip in (False, True):
        x = leaf([1.0])
        a = x * 2
        b = a * 3
        c = ops.add(*((a, b) if flip else (b, a)))
        d = ops.add(*((b, c) if flip else (c, b)))
        e = ops.add(*((a, d) if flip else (d, a)))
        e.sum().backward()
        equal(x.grad, [2 * (3 + 1 + 3 + 1)])


# Modes and threads

def test_no_grad_records_nothing(xp):
    x = leaf([1.0], xp=xp)
    with tt.no_grad():
        y = x * 2
        with tt.no_grad():
            pass
        assert not (y * 3).requires_grad and y.node is None
    assert (x * 2).requires_grad

    @tt.no_grad()
    def decorated():
        return x * 2
    assert not decorated().requires_grad and not decorated().requires_grad
    with pytest.raises(ZeroDivisionError), tt.no_grad():
        1 / 0
    assert (x * 2).requires_grad


def in_threads(*functions):
    """Run the functions at the same time; what they return, in order. The first error is raised here."""
    results = [None] * len(functions)

    def work(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        if isinstance(r, BaseException):
            raise r
    return results


def test_modes_hold_for_one_thread():
    x, barrier = leaf([1.0]), threading.Barrier(3, timeout=10)

    @tt.op
    def which(x):
        return x * 1, lambda g: g

    @which.implementation("numpy")
    def fast(x):
        return x * 100, lambda g: g * 100

    def with_mode(mode):
        with mode():
            barrier.wait()  # all three are inside
            result = which(x)
            barrier.wait()
        return result.requires_grad, result.item()
    modes = (tt.no_grad, tt.plain, contextlib.nullcontext)
    found = in_threads(*(functools.partial(with_mode, mode) for mode in modes))
    assert found == [(False, 100), (True, 1), (True, 100)]


def test_threads_have_tapes_of_their_own():
    rng = np.random.default_rng(0)
    w = leaf(rng.standard_normal((4, 4)))
    inputs = rng.standard_normal((4, 3, 4))

    def work(x):
        def run():
            total = np.zeros((4, 4))
            for _ in range(20):
                h = Tensor(x)
                for _ in range(10):
                    h = ops.tanh(ops.linear(h, w))
                tt.grad(h.sum(), [w], into=[total], add=True)
            return total
        return run
    expected = [work(x)() for x in inputs]
    for found, alone in zip(in_threads(*map(work, inputs)), expected):
        equal(found, alone)
    assert w.grad is None


# What watches

def test_observers_see_every_op_of_their_thread():
    noted = []
    with tensor.observe(lambda op, shapes: noted.append((op.name, shapes))):
        axpy(np.ones((2, 3)), Tensor(np.ones(3)), 1.0)
        with tt.no_grad():
            ops.linear(np.ones((2, 3)), np.ones((4, 3)), None)
        in_threads(lambda: axpy(1.0, np.ones(1)))
    axpy(1.0, np.ones(1))
    assert noted == [("axpy", [(2, 3), (3,), None]), ("linear", [(2, 3), (4, 3), None])]


def test_a_wrapper_goes_around_all_that_is_computed_for_an_op():
    x, w, noted, inside = leaf(np.ones((2, 3))), leaf(np.ones((4, 3))), [], []

    def wrapper(op, way, shapes, run):
        noted.append((op.name, way, shapes, tuple(inside)))
        inside.append(way)
        result = run()
        inside.pop()
        return result

    def gradient():
        y = ops.linear(x, w)
        return tt.grad((y * y).sum(), [x])[0]

    expected = gradient()
    with tensor.around(wrapper):
        equal(gradient(), expected)
        in_threads(gradient)
    gradient()
    linear, multiply, total, within = [(2, 3), (4, 3), None], [(2, 4), (2, 4)], [(2, 4)], ("backward",)
    assert noted == [
        ("linear", "forward", linear, ()), ("multiply", "forward", multiply, ()),
        ("sum", "forward", total, ()), ("sum", "backward", total, ()), ("sum", "add", total, within),
        ("multiply", "backward", multiply, ()), *[("multiply", "add", multiply, within)] * 2,
        ("linear", "backward", linear, ()), ("linear", "add", linear, within)]  # w's is not wanted


def test_an_entry_that_adds_its_gradient_itself_is_not_added_again():
    x, noted = leaf(np.ones(3)), []

    @tt.op
    def twice(x):
        def into(place):
            if place is None:
                return np.full(3, 2.0)
            place += 2.0
        return 2 * x, lambda g: graph.Into(into)

    def wrapper(op, way, shapes, run):
        noted.append((op.name, way))
        return run()

    with tensor.around(wrapper):
        [found] = tt.grad(twice(x).sum(), [x])
    equal(found, [2.0, 2.0, 2.0])
    assert noted[2:] == [("sum", "backward"), ("sum", "add"), ("twice", "backward")]


# explain

def test_explain_prints_the_graph(capsys):
    x, w = leaf(np.ones((2, 3))), leaf(np.ones((4, 3)))
    hidden = ops.linear(x, w)
    loss = (hidden * hidden).sum()
    rows = ["%0    linear           leaf(2, 3) leaf(4, 3) -> (2, 4)  24 MACs",
            "%1    multiply         %0(2, 4) %0(2, 4) -> (2, 4)",
            "%2    sum              %1(2, 4) -> ()"]
    assert graph_text(loss).splitlines() == [*rows, "3 ops, 24 multiply-adds (MACs)"]
    tt.explain(loss)
    assert capsys.readouterr().out == graph_text(loss) + "\n"
    loss.backward()
    assert graph_text(loss).splitlines() == ["%0    sum              (2, 4) -> ()  (freed)",
                                             "1 ops, 0 multiply-adds (MACs)"]


def test_explain_shows_plain_inputs_and_several_outputs():
    a, _ = pair(leaf([1.0, 2.0]))
    out = a * np.ones((3, 1)) + 2.0
    assert graph_text(out).splitlines() == ["%0    pair             leaf(2,) -> (2,), (2,)",
                                            "%1    multiply         %0(2,) (3, 1) -> (3, 2)",
                                            "%2    add              %1(3, 2) -> (3, 2)",
                                            "3 ops, 0 multiply-adds (MACs)"]
    assert graph_text(leaf([1.0])) == "a leaf: shape (1,)"
    assert graph_text(Tensor([1.0, 2.0])) == "no graph: shape (2,)"


@pytest.mark.parametrize("make, macs", [
    (lambda x: ops.matmul(x(5, 2, 3), x(3, 4)), 5 * 2 * 3 * 4),
    (lambda x: ops.matmul(x(5, 1, 2, 3), x(7, 3, 4)), 5 * 7 * 2 * 3 * 4),
    (lambda x: ops.linear(x(2, 5, 3), x(4, 3), x(4)), 2 * 5 * 3 * 4),
    (lambda x: ops.attention(x(2, 3, 4, 5), x(2, 3, 6, 5), x(2, 3, 6, 5)), 2 * (2 * 3 * 4 * 6 * 5)),
    (lambda x: ops.attention(x(2, 3, 4, 5), x(2, 3, 4, 5), x(2, 3, 4, 5), np.ones((2, 4))),
     2 * (2 * 3 * 4 * 4 * 5)),
    (lambda x: ops.lookup_gather(x(2, 3, 4, 5), x(2, 3, 6, 5), x(2, 3, 6, 5))[0], 2 * (2 * 3 * 4 * 6 * 5)),
    (lambda x: ops.lookup_infuse(x(2, 3, 4, 6), x(2, 3, 4, 6), x(2, 3, 4, 5), reuse="probs"),
     2 * 3 * 4 * 6 * 5),
    (lambda x: ops.gelu(ops.softmax(x(2, 3))), 0),
])
def test_multiply_adds_are_counted_from_shapes(make, macs):
    text = graph_text(make(lambda *shape: leaf(np.ones(shape))))
    assert text.endswith(f" ops, {macs:,} multiply-adds (MACs)")
