"""Each case is given `student`, the functions of the submission. Values are compared as plain arrays of
numbers."""
import numpy as np
import pytest

from tinytoken.course.checks import close, refuse_changes


def leaf(student, *shape, seed=0):
    return student.Node(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.points(1, number="1.1", hint="the value is a.value * b.value, the parents are (a, b)")
def test_the_product_and_its_parents(student):
    a, b = leaf(student, 2, 3), leaf(student, 2, 3, seed=1)
    product = student.multiply(a, b)
    close(product.value, a.value * b.value)
    assert product.parents == (a, b)


@pytest.mark.points(1, number="1.1", hint="dL/da = g * b; the vjp returns a gradient for each parent, in "
                                          "their order")
def test_the_products_gradients(student):
    a, b = leaf(student, 2, 3), leaf(student, 2, 3, seed=1)
    g = np.random.default_rng(2).standard_normal((2, 3))
    d_a, d_b = student.multiply(a, b).vjp(g)
    close(d_a, g * b.value)
    close(d_b, g * a.value)


@pytest.mark.points(1, number="1.1", hint="shapes may broadcast: each gradient has the shape of its parent")
def test_a_product_of_shapes_that_broadcast(student):
    a, b = leaf(student, 4, 3), leaf(student, 3, seed=1)
    g = np.random.default_rng(2).standard_normal((4, 3))
    d_a, d_b = student.multiply(a, b).vjp(g)
    close(d_a, g * b.value)
    close(d_b, (g * a.value).sum(axis=0))


def is_an_order(student, end, count):
    nodes = student.order(end)
    assert isinstance(nodes, list) and len(nodes) == count, f"{len(nodes)} nodes, expected {count}, each once"
    place = {id(node): number for number, node in enumerate(nodes)}
    assert len(place) == count and nodes[-1] is end
    for each in nodes:
        assert all(place[id(parent)] < place[id(each)]
                   for parent in each.parents), "a node stands before one of its parents"


@pytest.mark.points(1, number="1.2", hint="a chain: leaf, middle, end")
def test_a_chain(student):
    a = leaf(student, 2)
    middle = student.Node(a.value, (a,))
    is_an_order(student, student.Node(a.value, (middle,)), 3)


@pytest.mark.points(1, number="1.2", hint="a node used by two others stands once, before both, however the "
                                          "walk goes")
def test_a_node_that_is_used_again_further_on(student):
    a = leaf(student, 2)
    b = student.Node(a.value, (a,))
    c = student.Node(a.value, (b, a))
    is_an_order(student, student.Node(a.value, (a, c, b)), 4)


@pytest.mark.points(1, number="1.2", hint="forty doublings: a walk over all paths would take 2 to the power "
                                          "40 steps")
def test_every_node_is_visited_once(student):
    node = leaf(student, 1)
    for _ in range(40):
        node = student.Node(node.value, (node, node))
    is_an_order(student, node, 41)


@pytest.mark.points(1, number="1.2", visibility="hidden", hint="10,000 nodes deep: no recursion")
def test_a_deep_graph(student):
    node = leaf(student, 1)
    for _ in range(10_000):
        node = student.Node(node.value, (node,))
    is_an_order(student, node, 10_001)


def scaled(student, node, factor):
    return student.Node(factor * node.value, (node,), lambda g: [factor * g])


@pytest.mark.points(1, number="1.3", hint="end.grad is 1, and each vjp takes it one step down")
def test_gradients_of_a_chain(student):
    a = leaf(student, 3)
    end = scaled(student, scaled(student, a, 2.0), 5.0)
    student.backward(end)
    close(end.grad, np.ones(3))
    close(a.grad, np.full(3, 10.0))


@pytest.mark.points(1, number="1.3", hint="what is used twice gets the sum")
def test_gradients_add_up(student):
    a = leaf(student, 3)
    left, right = scaled(student, a, 2.0), scaled(student, a, 5.0)
    end = student.Node(left.value + right.value, (left, right), lambda g: [g, g])
    student.backward(end)
    close(a.grad, np.full(3, 7.0))


@pytest.mark.points(1, number="1.3", hint="backward twice gives the same gradient, not twice as much")
def test_backward_again_starts_anew(student):
    a = leaf(student, 3)
    end = scaled(student, a, 2.0)
    student.backward(end)
    student.backward(end)
    close(a.grad, np.full(3, 2.0))


@pytest.mark.points(1, number="1.3", visibility="hidden", hint="an array that a vjp returned may be shared: "
                                                               "add to a new one")
def test_no_array_of_a_vjp_is_changed(student):
    a, shared = leaf(student, 3), np.full(3, 4.0)
    left, right = (student.Node(a.value, (a,), lambda g: [shared]) for _ in range(2))
    end = student.Node(a.value, (left, right), lambda g: [g, g])
    student.backward(end)
    close(a.grad, np.full(3, 8.0))
    close(shared, np.full(3, 4.0))
    close(left.grad, np.ones(3))


@pytest.mark.points(1, number="1.4", hint="axes in front that the input does not have are summed away")
def test_axes_in_front(student):
    g = np.random.default_rng(0).standard_normal((4, 2, 3))
    close(student.unbroadcast(g, (3,)), g.sum(axis=(0, 1)))


@pytest.mark.points(1, number="1.4", hint="an axis of length 1 is summed and stays, with length 1")
def test_axes_of_length_one(student):
    g = np.random.default_rng(0).standard_normal((4, 2, 3))
    close(student.unbroadcast(g, (4, 1, 3)), g.sum(axis=1, keepdims=True))
    close(student.unbroadcast(g, (1, 3)), g.sum(axis=(0, 1))[None])


@pytest.mark.points(1, number="1.4", visibility="hidden", hint="same shape: nothing to do; shape (): "
                                                               "everything is summed")
def test_the_two_ends(student):
    g = np.random.default_rng(0).standard_normal((1, 3))
    close(student.unbroadcast(g, (1, 3)), g)
    close(student.unbroadcast(g, ()), g.sum())


def numeric(f, x, g, h=1e-6):
    """Central differences of sum(g f(x))."""
    slopes = np.zeros(x.shape)
    for spot in np.ndindex(*x.shape):
        nudge = np.zeros(x.shape)
        nudge[spot] = h
        slopes[spot] = (g * (f(x + nudge) - f(x - nudge))).sum() / (2 * h)
    return slopes


@pytest.mark.points(2, number="1.5", hint="dL/da = g b^T, dL/db = a^T g; look at the shapes")
def test_matrices(student):
    rng = np.random.default_rng(0)
    a, b, g = rng.standard_normal((2, 3)), rng.standard_normal((3, 4)), rng.standard_normal((2, 4))
    d_a, d_b = refuse_changes(student.matmul_vjp, a, b, g)
    close(d_a, numeric(lambda a: a @ b, a, g), 1e-6)
    close(d_b, numeric(lambda b: a @ b, b, g), 1e-6)


@pytest.mark.points(1, number="1.5", hint="with axes in front, only the last two are turned")
def test_stacks_of_matrices(student):
    rng = np.random.default_rng(1)
    a, b, g = rng.standard_normal((2, 5, 3, 3)), rng.standard_normal((2, 5, 3, 3)), rng.standard_normal((2, 5, 3, 3))
    d_a, d_b = student.matmul_vjp(a, b, g)
    for place in np.ndindex(2, 5):
        close(d_a[place], g[place] @ b[place].T)
        close(d_b[place], a[place].T @ g[place])


@pytest.mark.points(2, number="1.6", hint="p_i (g_i - sum_j p_j g_j)")
def test_the_softmax(student):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal(5), rng.standard_normal(5)
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    close(refuse_changes(student.softmax_vjp, softmax(x), g), numeric(softmax, x, g), 1e-6)


@pytest.mark.points(1, number="1.6", visibility="hidden", hint="each row by itself, whatever axes stand in "
                                                               "front")
def test_rows_of_a_softmax(student):
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 3))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    close(student.softmax_vjp(softmax(x), g), numeric(softmax, x, g), 1e-6)


def normed(x, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + eps)


@pytest.mark.points(2, number="1.7", hint="(g - mean(g) - y mean(g y)) / sqrt(var + eps)")
def test_the_layer_norm(student):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    close(refuse_changes(student.layer_norm_vjp, x, g), numeric(lambda x: normed(x, 1e-5), x, g), 1e-6)


@pytest.mark.points(1, number="1.7", visibility="hidden", hint="eps counts: try a large one")
def test_the_layer_norms_eps(student):
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    close(student.layer_norm_vjp(x, g, 0.5), numeric(lambda x: normed(x, 0.5), x, g), 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.points(1, number="1.8", hint="a right vjp is off by rounding, a factor of 2 by more than a "
                                          "tenth; x stays as it was")
def test_right_and_wrong(student):
    x = np.random.default_rng(0).standard_normal((2, 3))
    right = lambda g: g * sigmoid(x) * (1 - sigmoid(x))
    before = x.copy()
    assert 0 <= float(student.largest_error(sigmoid, right, x, np.random.default_rng(1))) < 1e-6
    assert float(student.largest_error(sigmoid, lambda g: 2 * right(g), x, np.random.default_rng(1))) > 0.1
    close(x, before)


@pytest.mark.points(1, number="1.8", hint="the upstream gradient must be random: zeros are no gradient of a "
                                          "softmax")
def test_zeros_do_not_pass(student):
    x = np.random.default_rng(0).standard_normal(4)
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    assert float(student.largest_error(softmax, lambda g: np.zeros(4), x, np.random.default_rng(1))) > 0.01
