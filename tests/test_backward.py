"""How gradients flow: what a vjp may return, several outputs, broadcasting, accumulation, grad()."""
import numpy as np
import pytest

import tinytoken as tt
from engine import arrived, axpy, equal, leaf, op_returning, pair, refusal, twice_the_same
from tinytoken import GradientError, InputError, Tensor
from tinytoken.backend import to_numpy
from tinytoken.graph import Into


# What a vjp may return

@pytest.mark.parametrize("entries, message", [
    (lambda g: g, "student: its vjp returned 1 entries for 2 array arguments"),
    (lambda g: (g, g, g), "student: its vjp returned 3 entries for 2 array arguments"),
    (lambda g: (g.astype("float32"), g),
     "student: its vjp returned float32 for x, which is float64: is a constant a NumPy scalar?"),
    (lambda g: (g, g[:, :2]), "student: its vjp returned shape (2, 2) for y, which is (2, 3)"),
    (lambda g: (g.sum(axis=0), g), "student: its vjp returned shape (3,) for x, which is (2, 3)"),
    (lambda g: (g.T, g), "student: its vjp returned shape (3, 2) for x, which is (2, 3)"),
    (lambda g: (g, [1.0]), "student: its vjp returned a list for y, expected an array"),
    (lambda g: (g, Tensor(g)), "student: its vjp returned a Tensor for y, expected an array"),
    (lambda g: (g, lambda: 2.0), "student: its vjp returned a float for y, expected an array"),
])
def test_wrong_entries_are_named(entries, message):
    x, y = leaf(np.ones((2, 3))), leaf(np.ones((2, 3)))
    assert refusal(GradientError, op_returning(entries)(x, y).sum().backward) == message


def test_wrong_entry_of_a_variadic_op_is_named_by_its_place():
    @tt.op
    def joined(*xs):
        return np.concatenate(xs), lambda g: (g[:2], g)
    message = "joined: its vjp returned shape (5,) for input 1, which is (3,)"
    assert refusal(GradientError, joined(leaf([1.0] * 2), leaf([2.0] * 3)).sum().backward) == message


def test_none_is_no_gradient():
    x, y = leaf([1.0]), leaf([1.0])
    op_returning(lambda g: (None, g))(x, y).sum().backward()
    assert x.grad is None
    equal(y.grad, [1])


def test_an_entry_is_called_only_if_its_input_needs_it():
    calls = []

    def entries(g):
        def of(name):
            calls.append(name)
            return g
        return lambda: of("x"), lambda: of("y")
    student = op_returning(entries)
    x, y = leaf([1.0]), leaf([2.0])
    for inputs, expected in (((x, Tensor([2.0])), ["x"]), ((np.ones(1), y), ["y"]), ((x, 3.0), ["x"]),
                             ((x, y), ["x", "y"])):
        calls.clear()
        student(*inputs).sum().backward()
        assert calls == expected
    calls.clear()
    tt.grad(student(x, y).sum(), [y])  # x needs one in general, but not here
    assert calls == ["y"]


def test_nothing_is_recorded_without_a_tensor_that_needs_it():
    assert axpy(np.ones(1), 2.0).node is None
    out = axpy(Tensor([1.0]), 2.0)
    assert out.node is None and not out.requires_grad
    text = "backward: this tensor does not depend on anything that requires a gradient"
    assert refusal(InputError, out.backward) == text


def test_an_op_without_a_vjp_ends_the_graph():
    @tt.op
    def rounded(x):
        return np.round(x), None
    assert not rounded(leaf([1.2])).requires_grad


# Several outputs

def test_unused_outputs_give_none():
    x = leaf([1.0, 2.0])
    for use, expected in ((lambda a, b: a.sum(), [2, 2]), (lambda a, b: b.sum(), [3, 3]),
                          (lambda a, b: (a * b).sum(), [12, 24])):
        arrived.clear()
        (gradient,) = tt.grad(use(*pair(x)), [x])
        equal(gradient, expected)
        assert len(arrived) == 1
    arrived.clear()
    a, b = pair(x)
    b.sum().backward()
    assert arrived[0][0] is None
    equal(arrived[0][1], [1, 1])


def test_a_node_runs_once_after_all_consumers_of_all_its_outputs():
    x = leaf([1.0])
    arrived.clear()
    a, b = pair(x)
    late = a
    for _ in range(5):  # a long way and a short one
        late = late * 2
    (late + a * 10 + b * 100 + b * a).sum().backward()
    assert len(arrived) == 1
    equal(arrived[0][0], [32 + 10 + 3])
    equal(arrived[0][1], [100 + 2])
    equal(x.grad, [2 * 45 + 3 * 102])


def test_each_output_can_be_the_root():
    for place, factor in enumerate((2, 3)):
        x = leaf([1.0, 5.0])
        pair(x)[place].backward(np.array([1.0, 10.0]))
        equal(x.grad, [factor, 10 * factor])


# Broadcasting

@pytest.mark.parametrize("shape, other", [
    ((), (2, 3)), ((3,), (2, 3)), ((1, 3), (2, 3)), ((2, 1), (2, 3)), ((1, 1), (2, 3)), ((1,), (4, 2, 3)),
    ((2, 1, 4), (3, 1)), ((1, 2, 1), (5, 1, 3)), ((2, 3), ()), ((1, 3), (1, 2, 3))])
def test_broadcasting_is_undone(shape, other, xp):
    x, y, g = leaf(np.full(shape, 2.0), xp=xp), leaf(np.full(other, 3.0), xp=xp), np.random.default_rng(0)
    out = x * y
    g = g.standard_normal(out.shape)
    out.backward(xp.asarray(g))
    for t, factor in ((x, 3), (y, 2)):
        expected = np.zeros(t.shape)
        for place in np.ndindex(g.shape):  # each element of g belongs to one of t
            own = place[g.ndim - t.ndim:]
            expected[tuple(p if n > 1 else 0 for p, n in zip(own, t.shape))] += factor * g[place]
        assert t.grad.shape == t.shape
        np.testing.assert_allclose(to_numpy(t.grad), expected, rtol=1e-13)


def test_an_op_may_return_the_broadcast_shape_or_the_right_one():
    x, y = leaf(np.ones((1, 3))), leaf(np.ones((2, 3)))
    op_returning(lambda g: (g.sum(axis=0, keepdims=True), g))(x, y).sum().backward()
    equal(x.grad, [[2, 2, 2]])


# Accumulation

def test_gradients_of_all_uses_add_up(xp):
    x = leaf([3.0], xp=xp)
    y = x * 2
    (y * 1 + y * 10 + y * 100 + x * 1000 + y).sum().backward()
    equal(x.grad, [1224])


def test_gradients_of_all_uses_of_a_scalar_add_up(xp):
    """Arrays without axes become NumPy scalars when added, which are not changed in place."""
    x = leaf(3.0, xp=xp)
    y = x * 2
    (y * 1 + y * 10 + y * 100 + y * 1000).backward()
    equal(x.grad, 2222)
    assert isinstance(x.grad, xp.ndarray) and x.grad.shape == ()


def test_backward_adds_to_the_gradient_of_the_leaves():
    x = leaf([1.0, 2.0])
    (x * 2).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    assert x.grad is first
    equal(x.grad, [5, 5])
    x.grad = None
    (x * 3).sum().backward()
    equal(x.grad, [3, 3])


def test_no_gradient_is_written_into():
    """An op that hands its upstream gradient on to both inputs, which hold it by reference while more
    arrive."""
    received = []

    def note(g):
        received.append((g, g.copy()))
        return g, g
    student = op_returning(note)
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    a = student(x, y)
    b = student(a, x)
    c = student(b, a)
    d = student(a, a)
    upstream = np.array([1.0, 10.0])
    (c + student(d, b) + a).backward(upstream)
    equal(upstream, [1.0, 10.0])
    for g, at_that_time in received:
        equal(g, at_that_time)
    # a: 1 by b in c, 1 by c, 2 by d, 1 by b in the last, 1 itself; x: those 6 and twice by b
    equal(x.grad, np.array([8, 80]))
    equal(y.grad, np.array([6, 60]))


def test_every_grad_is_an_array_of_its_own(xp):
    x, y = leaf([1.0, 2.0], xp=xp), leaf([3.0, 4.0], xp=xp)
    upstream = xp.asarray([1.0, 1.0])
    twice_the_same(x, y).backward(upstream)
    arrays = [x.grad, y.grad, upstream, x.data, y.data]
    assert not any(xp.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    x.grad += 1
    equal(y.grad, [1, 1])
    z = leaf(np.ones((2, 3)), xp=xp)
    z.sum().backward()  # the vjp of sum gives a read-only view
    z.grad += 1
    equal(z.grad, np.full((2, 3), 2))


def test_grad_has_shape_dtype_and_device_of_its_tensor(xp):
    for dtype in ("float32", "float64"):
        for shape in ((), (3,), (2, 1, 3)):
            x = leaf(np.ones(shape), dtype, xp)
            ((x * xp.ones((2, 2, 3))).sum() * 2).backward()
            assert isinstance(x.grad, xp.ndarray)
            assert (x.grad.shape, x.grad.dtype) == (shape, dtype)


def test_a_leaf_is_a_root_too():
    x = leaf(3.0)
    x.backward()
    equal(x.grad, 1)
    equal(tt.grad(x, [x])[0], 1)
    equal(tt.grad(leaf(2.0), [x])[0], 0)


def test_upstream_gradients(xp):
    x = leaf([1.0, 2.0], xp=xp)
    (x * 2).backward(xp.asarray([1.0, 10.0]))
    equal(x.grad, [2, 20])
    (x * 2).backward(Tensor(xp.asarray([1.0, 10.0])))
    equal(x.grad, [4, 40])
    x = leaf([[3.0]], xp=xp)
    (x * 2).backward()  # one element
    equal(x.grad, [[2]])


@pytest.mark.parametrize("gradient, message", [
    (None, "backward: a tensor of shape (2,) needs an upstream gradient; only a scalar does without"),
    (np.ones(3), "backward: upstream gradient (3,) float64 for a tensor (2,) float64"),
    (np.ones(2, "float32"), "backward: upstream gradient (2,) float32 for a tensor (2,) float64"),
    (1.0, "backward: upstream gradient 1.0  for a tensor (2,) float64"),
])
def test_wrong_upstream_gradients_are_refused(gradient, message):
    x = leaf([1.0, 2.0])
    assert refusal(InputError, (x * 2).backward, gradient) == message
    assert x.grad is None


# grad()

def test_grad_returns_arrays_and_touches_nothing_else():
    x, y, z = leaf([1.0, 2.0]), leaf([3.0, 4.0]), leaf([5.0, 6.0])
    found = tt.grad((x * y).sum() + (y * y).sum(), [x, y])
    equal(found[0], [3, 4])
    equal(found[1], [1 + 6, 2 + 8])
    assert x.grad is y.grad is None
    unreached = tt.grad((x * y).sum(), [z, x])
    equal(unreached[0], [0, 0])
    assert unreached[0].dtype == "float64"


def test_grad_of_a_bare_tensor_is_a_bare_array(xp):
    for values in (3.0, [1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]]):
        x = leaf(values, xp=xp)
        found = tt.grad((x * x).sum(), x)
        assert isinstance(found, xp.ndarray)
        equal(found, 2 * np.array(values))
        into = xp.full(x.shape, 100.0)
        assert tt.grad((x * x).sum(), x, into=into, add=True) is into
        equal(into, 100 + 2 * np.array(values))
    equal(tt.grad(x * 3, x, gradient=xp.ones((2, 2)))[1], [3, 3])


def test_grad_takes_any_iterable_of_tensors():
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    for wrt in ((x, y), iter([x, y]), {"x": x, "y": y}.values()):
        found = tt.grad((x * y).sum(), wrt)
        equal(found[0], [3, 4])
        equal(found[1], [1, 2])


def test_grad_into_given_arrays():
    x, y = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    into = [np.full(2, 100.0), np.full(2, 100.0)]
    found = tt.grad((x * x).sum(), [x, y], into=into)
    assert found is into
    equal(into[0], [2, 4])
    equal(into[1], [0, 0])
    tt.grad((x * y).sum(), [x, y], into=into, add=True)
    equal(into[0], [5, 8])
    equal(into[1], [1, 2])


def test_grad_into_views_of_one_buffer():
    x, y = leaf([[1.0, 2.0]]), leaf([3.0])
    flat = np.full(3, np.nan)
    tt.grad((x * x).sum() * y.sum(), [x, y], into=[flat[:2].reshape(1, 2), flat[2:]])
    equal(flat, [6, 12, 5])


def test_grad_of_intermediate_tensors():
    x = leaf([1.0, 2.0])
    y = x * 3
    z = y * y
    equal(tt.grad(z.sum() + y.sum(), [y])[0], [7, 13])
    y = x * 3
    loss = (y * y).sum()
    in_the_middle, at_the_end = tt.grad(loss, [y, x])
    equal(in_the_middle, [6, 12])
    equal(at_the_end, [18, 36])
    loss = (x * 2).sum()
    equal(tt.grad(loss, [loss])[0], 1)
    a, b = pair(x)
    for_a, for_b = tt.grad((a * b).sum() + b.sum(), [a, b])
    equal(for_a, [3, 6])
    equal(for_b, [3, 5])


def test_grad_with_an_upstream_gradient():
    x = leaf([1.0, 2.0])
    equal(tt.grad(x * 3, [x], gradient=np.array([1.0, 10.0]))[0], [3, 30])


def test_grad_runs_only_what_leads_to_what_is_wanted():
    ran = []

    def note(name):
        def entries(g):
            ran.append(name)
            return g, g
        return op_returning(entries)
    x, y, z = leaf([1.0]), leaf([1.0]), leaf([1.0])
    loss = note("top")(note("left")(x, y), note("right")(z, z)).sum()
    tt.grad(loss, [x])
    assert ran == ["top", "left"]
    ran.clear()
    middle = note("below")(x, y)
    tt.grad(note("above")(middle, z).sum(), [middle])
    assert ran == ["above"]


def test_grad_refuses():
    x = leaf([1.0])
    text = "grad: 0 arrays in `into` for 1 tensors in `wrt`"
    assert refusal(InputError, tt.grad, x.sum(), [x], into=[]) == text
    # an array of another shape could take the gradient in many copies
    for array, said in ((np.zeros((2, 1)), "(2, 1) float64"), (np.zeros(1, int), "(1,) int64"),
                        (1.0, "float ")):
        text = f"grad: an array in `into` is {said}, expected (1,) float64"
        assert refusal(InputError, tt.grad, x.sum(), [x], into=[array]) == text
        assert refusal(InputError, tt.grad, x.sum(), x, into=array, add=True) == text
    equal(tt.grad((x * x).sum(), [x], into=np.ones((1, 1))), [[2]])
    text = "grad: `into` is a float, expected a list of arrays"
    assert refusal(InputError, tt.grad, x.sum(), [x], into=1.0) == text
    assert refusal(InputError, tt.grad, x.sum(), None) == "grad: `wrt` is a NoneType, expected Tensors"
    text = "grad: a ndarray, expected a Tensor"
    assert refusal(InputError, tt.grad, x.sum(), [np.ones(1)]) == text
    assert refusal(InputError, tt.grad, lambda: x.sum(), x) == "grad: a function, expected a Tensor"
    text = "grad: a tensor in `wrt` does not require a gradient"
    assert refusal(InputError, tt.grad, x.sum(), [Tensor([1.0])]) == text
    assert refusal(InputError, tt.grad, x * np.ones(2), [x]) == (
        "backward: a tensor of shape (2,) needs an upstream gradient; only a scalar does without")


# Entries that add to the leaf's array themselves

def adding(factor, places, wrong=False):
    """x times a factor, whose vjp adds its gradient to the array that it is handed, if any."""
    def run_with(g):
        def run(place):
            places.append(place)
            out = g[:1] if wrong else g * factor
            if place is None:
                return out
            place += out
        return run

    @tt.op
    def times(x):
        return x * factor, lambda g: Into(run_with(g))
    return times


@pytest.mark.parametrize("into", [True, False])
def test_a_leafs_gradient_is_added_in_its_place(into):
    x, places, mine = leaf([1.0, 2.0]), [], [np.full(2, 100.0)]
    by_two, by_three = adding(2.0, places), adding(3.0, places)
    found = tt.grad((by_two(x) + by_three(x) + x).sum(), [x], into=mine if into else None, add=into)
    equal(found[0], [106, 106] if into else [6, 6])  # twice by the entries, once by the engine
    assert len(places) == 2 and all(place is found[0] for place in places) and (not into or found is mine)


def test_what_is_not_a_leafs_place_is_returned():
    x, places = leaf([1.0, 2.0]), []
    (adding(2.0, places)(x) + adding(3.0, places)(x)).sum().backward()  # .grad is the engine's to make
    equal(x.grad, [5, 5])
    y = x * 1
    equal(tt.grad(adding(2.0, places)(y).sum(), [y])[0], [2, 2])  # no leaf
    z = x * 1
    equal(tt.grad(adding(2.0, places)(z).sum(), [x])[0], [2, 2])  # on the way to one
    assert places == [None] * 4


def test_an_entry_that_is_not_wanted_is_not_run():
    x, y, places = leaf([1.0]), leaf([1.0]), []
    equal(tt.grad((adding(2.0, places)(x) + y).sum(), [y])[0], [1])
    assert places == []


def test_what_is_returned_is_checked_as_ever():
    x = leaf([1.0, 2.0])
    text = "times: its vjp returned shape (1,) for x, which is (2,)"
    assert refusal(GradientError, adding(2.0, [], wrong=True)(x).sum().backward) == text
    y = x * 1
    assert refusal(GradientError, tt.grad, adding(2.0, [], wrong=True)(y).sum(), [y]) == text


def test_views_of_one_buffer_are_added_to_in_their_places():
    x, y = leaf([1.0, 2.0]), leaf([3.0])
    flat, places = np.zeros(3), []
    double = adding(2.0, places)
    tt.grad((double(x) * double(y)).sum(), [x, y], into=[flat[:2], flat[2:]])
    equal(flat, [12, 12, 12])
    assert [place.shape for place in places] == [(1,), (2,)]
    assert all(np.shares_memory(place, flat) for place in places)
