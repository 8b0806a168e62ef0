"""Each case is given `student`, the functions of the submission, and `rng`, which draws its inputs: for each
submission others. What is expected is computed here, from arrays that the submission has copies of."""
import numpy as np
import pytest

from tinytoken.course.checks import close, refuse_changes


def sizes(rng, count):
    return tuple(map(int, rng.integers(2, 6, count)))


@pytest.mark.points(1, number="1.1", hint="the value is a.value * b.value, the parents are (a, b)")
def test_the_product_and_its_parents(student, rng):
    for shape in ((2, 3), sizes(rng, 2), sizes(rng, 3)):
        a, b = rng.standard_normal((2, *shape))
        nodes = student.Node(a), student.Node(b)
        product = student.multiply(*nodes)
        close(product.value, a * b)
        assert product.parents == nodes


@pytest.mark.points(1, number="1.1", hint="dL/da = g * b; the vjp returns a gradient for each parent, in "
                                          "their order")
def test_the_products_gradients(student, rng):
    for shape in ((2, 3), sizes(rng, 2), sizes(rng, 3)):
        a, b, g = rng.standard_normal((3, *shape))
        d_a, d_b = student.multiply(student.Node(a), student.Node(b)).vjp(g)
        close(d_a, g * b)
        close(d_b, g * a)


@pytest.mark.points(1, number="1.1", hint="shapes may broadcast: each gradient has the shape of its parent")
def test_a_product_of_shapes_that_broadcast(student, rng):
    for n, m in ((4, 3), sizes(rng, 2), sizes(rng, 2)):
        a, b, g = rng.standard_normal((n, m)), rng.standard_normal(m), rng.standard_normal((n, m))
        d_a, d_b = student.multiply(student.Node(a), student.Node(b)).vjp(g)
        close(d_a, g * b)
        close(d_b, (g * a).sum(axis=0))


def made(student, parents, vjps=None):
    """Nodes, of which node n was made from the nodes with the numbers parents[n]."""
    nodes = []
    for number, its in enumerate(parents):
        vjp = (vjps[number],) if vjps and its else ()
        nodes.append(student.Node(np.zeros(1), tuple(nodes[parent] for parent in its), *vjp))
    return nodes


def reached(parents, end):
    """The numbers of all nodes that node `end` was made from, and its own."""
    reached_so_far, todo = set(), [end]
    while todo:
        number = todo.pop()
        if number not in reached_so_far:
            reached_so_far.add(number)
            todo += parents[number]
    return reached_so_far


def is_an_order(student, parents, end=-1):
    end = end % len(parents)
    nodes, expected = made(student, parents), reached(parents, end)
    found = student.order(nodes[end])
    assert isinstance(found, list), "not a list"
    assert len(found) == len(expected), f"{len(found)} nodes, expected {len(expected)}, each once"
    number_of = {id(node): number for number, node in enumerate(nodes)}
    numbers = [number_of.get(id(node)) for node in found]
    place = {number: i for i, number in enumerate(numbers)}
    assert set(numbers) == expected, "not the nodes that `end` was made from"
    assert numbers[-1] == end, "`end` does not stand last"
    for number in numbers:
        assert all(place[parent] < place[number]
                   for parent in parents[number]), "a node stands before one of its parents"


def random_graph(rng, count):
    """The numbers of each node's parents, some of them twice; some nodes have none."""
    return [[int(parent) for parent in rng.integers(0, number, rng.integers(0, 4))] if number else []
            for number in range(count)]


@pytest.mark.points(1, number="1.2", hint="a chain: leaf, middle, end")
def test_a_chain(student, rng):
    for length in (3, *sizes(rng, 2)):
        is_an_order(student, [[number - 1] if number else [] for number in range(length)])


@pytest.mark.points(1, number="1.2", hint="a node used by two others stands once, before both, however the "
                                          "walk goes")
def test_a_node_that_is_used_again_further_on(student, rng):
    is_an_order(student, [[], [0], [1, 0], [0, 2, 1]])
    for _ in range(5):
        parents = random_graph(rng, 12)
        is_an_order(student, parents, end=int(rng.integers(6, 12)))


@pytest.mark.points(1, number="1.2", hint="forty doublings: a walk over all paths would take 2 to the power "
                                          "40 steps")
def test_every_node_is_visited_once(student):
    is_an_order(student, [[number - 1] * 2 if number else [] for number in range(41)])


@pytest.mark.points(1, number="1.2", visibility="hidden", hint="10,000 nodes deep: no recursion")
def test_a_deep_graph(student):
    is_an_order(student, [[number - 1] if number else [] for number in range(10_001)])


def chain(student, value, factors):
    """A leaf, and nodes each of which is `factor` times the one before."""
    nodes = [student.Node(value)]
    for factor in factors:
        value = factor * value
        nodes.append(student.Node(value, (nodes[-1],), lambda g, factor=factor: [factor * g]))
    return nodes


@pytest.mark.points(1, number="1.3", hint="end.grad is 1, and each vjp takes it one step down")
def test_gradients_of_a_chain(student, rng):
    for n, factors in ((3, (2.0, 5.0)), *((n, rng.standard_normal(n)) for n in sizes(rng, 2))):
        nodes = chain(student, rng.standard_normal(n), factors)
        student.backward(nodes[-1])
        for number, node in enumerate(nodes):
            close(node.grad, np.full(n, np.prod(factors[number:])))


@pytest.mark.points(1, number="1.3", hint="what is used twice gets the sum")
def test_gradients_add_up(student, rng):
    for _ in range(3):
        parents, end = random_graph(rng, 8), 7
        parents[end] = [5, 6, 6]
        factors = [rng.standard_normal(len(its)) for its in parents]
        expected = np.eye(8)[end]  # d(end) / d(node), from the end to the start
        for number in range(end, -1, -1):
            for parent, factor in zip(parents[number], factors[number]):
                expected[parent] += factor * expected[number]
        vjps = [lambda g, its=its: [factor * g for factor in its] for its in factors]
        nodes = made(student, parents, vjps)
        student.backward(nodes[end])
        for number in reached(parents, end):
            close(nodes[number].grad, expected[number:number + 1])


@pytest.mark.points(1, number="1.3", hint="backward twice gives the same gradient, not twice as much")
def test_backward_again_starts_anew(student, rng):
    for n in sizes(rng, 3):
        factors = rng.standard_normal(2)
        nodes = chain(student, rng.standard_normal(n), factors)
        student.backward(nodes[-1])
        student.backward(nodes[-1])
        close(nodes[0].grad, np.full(n, factors.prod()))


@pytest.mark.points(1, number="1.3", visibility="hidden", hint="an array that a vjp returned may be shared: "
                                                               "add to a new one")
def test_no_array_of_a_vjp_is_changed(student, rng):
    for n in sizes(rng, 3):
        value, shared = rng.standard_normal(n), rng.standard_normal(n)
        a = student.Node(value)
        left, right = (student.Node(value, (a,), lambda g: [shared]) for _ in range(2))
        end = student.Node(value, (left, right), lambda g: [g, g])
        refuse_changes(lambda shared: student.backward(end), shared)
        close(a.grad, 2 * shared)
        close(left.grad, np.ones(n))


@pytest.mark.points(1, number="1.4", hint="axes in front that the input does not have are summed away")
def test_axes_in_front(student, rng):
    for shape in ((4, 2, 3), sizes(rng, 3), sizes(rng, 3)):
        g = rng.standard_normal(shape)
        close(student.unbroadcast(g, shape[2:]), g.sum(axis=(0, 1)))


@pytest.mark.points(1, number="1.4", hint="an axis of length 1 is summed and stays, with length 1")
def test_axes_of_length_one(student, rng):
    for n, m, k in ((4, 2, 3), sizes(rng, 3), sizes(rng, 3)):
        g = rng.standard_normal((n, m, k))
        close(student.unbroadcast(g, (n, 1, k)), g.sum(axis=1, keepdims=True))
        close(student.unbroadcast(g, (1, k)), g.sum(axis=(0, 1))[None])


@pytest.mark.points(1, number="1.4", visibility="hidden", hint="same shape: nothing to do; shape (): "
                                                               "everything is summed")
def test_the_two_ends(student, rng):
    for n in (3, *sizes(rng, 2)):
        g = rng.standard_normal((1, n))
        close(student.unbroadcast(g, (1, n)), g)
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
def test_matrices(student, rng):
    for n, k, m in ((2, 3, 4), sizes(rng, 3), sizes(rng, 3)):
        a, b, g = rng.standard_normal((n, k)), rng.standard_normal((k, m)), rng.standard_normal((n, m))
        d_a, d_b = refuse_changes(student.matmul_vjp, a, b, g)
        close(d_a, numeric(lambda a: a @ b, a, g), 1e-6)
        close(d_b, numeric(lambda b: a @ b, b, g), 1e-6)


@pytest.mark.points(1, number="1.5", hint="with axes in front, only the last two are turned")
def test_stacks_of_matrices(student, rng):
    for lead in ((2, 5), sizes(rng, 2)):
        a, b, g = rng.standard_normal((3, *lead, 3, 3))
        d_a, d_b = student.matmul_vjp(a, b, g)
        for place in np.ndindex(*lead):
            close(d_a[place], g[place] @ b[place].T)
            close(d_b[place], a[place].T @ g[place])


@pytest.mark.points(2, number="1.6", hint="p_i (g_i - sum_j p_j g_j)")
def test_the_softmax(student, rng):
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    for n in (5, *sizes(rng, 2)):
        x, g = rng.standard_normal((2, n))
        close(refuse_changes(student.softmax_vjp, softmax(x), g), numeric(softmax, x, g), 1e-6)


@pytest.mark.points(1, number="1.6", visibility="hidden", hint="each row by itself, whatever axes stand in "
                                                               "front")
def test_rows_of_a_softmax(student, rng):
    softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    for shape in ((2, 4, 3), sizes(rng, 3), sizes(rng, 4)):
        x, g = rng.standard_normal((2, *shape))
        expected = softmax(x) * (g - (softmax(x) * g).sum(axis=-1, keepdims=True))
        close(student.softmax_vjp(softmax(x), g), expected, 1e-6)


def normed(x, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(axis=-1, keepdims=True) + eps)


@pytest.mark.points(2, number="1.7", hint="(g - mean(g) - y mean(g y)) / sqrt(var + eps)")
def test_the_layer_norm(student, rng):
    for n, width in ((2, 5), (3, 8), (4, int(rng.integers(5, 9)))):
        x, g = rng.standard_normal((2, n, width))
        close(refuse_changes(student.layer_norm_vjp, x, g), numeric(lambda x: normed(x, 1e-5), x, g), 1e-6)


@pytest.mark.points(1, number="1.7", visibility="hidden", hint="eps counts: try a large one")
def test_the_layer_norms_eps(student, rng):
    for eps in (0.5, *rng.uniform(0.1, 2.0, 2)):
        x, g = rng.standard_normal((2, 3, 4))
        close(student.layer_norm_vjp(x, g, eps), numeric(lambda x: normed(x, eps), x, g), 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.points(1, number="1.8", hint="a right vjp is off by rounding, a factor of 2 by more than a "
                                          "tenth; x stays as it was")
def test_right_and_wrong(student, rng):
    f = lambda x: 300 * sigmoid(x)
    for wrong in rng.permutation([0.0, 0.0, 1.0, *rng.uniform(0.2, 2.0, 2)]):
        x, draws = rng.standard_normal((2, 3)), np.random.default_rng(int(rng.integers(2**32)))
        vjp = lambda g: (1 + wrong) * g * 300 * sigmoid(x) * (1 - sigmoid(x))
        close(refuse_changes(lambda x: student.largest_error(f, vjp, x, draws), x), wrong, 1e-6)


@pytest.mark.points(1, number="1.8", hint="the upstream gradient must be random: zeros are no gradient of a "
                                          "softmax")
def test_zeros_do_not_pass(student, rng):
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    for right in rng.permutation([True, True, False, False]):
        x, draws = rng.standard_normal(4), np.random.default_rng(int(rng.integers(2**32)))
        vjp = lambda g: (softmax(x) * (g - (softmax(x) * g).sum()) if right else np.zeros(4))
        error = float(student.largest_error(softmax, vjp, x, draws))
        assert 0 <= error < 1e-6 if right else error > 0.001, f"found {error:.3g}"
