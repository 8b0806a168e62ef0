"""Arrays that are changed in place between forward and backward: found and said, since the gradient would be
wrong."""
import numpy as np
import pytest

import tinytoken as tt
from engine import equal, leaf, refusal
from tinytoken import GraphError, InputError, Tensor, graph, nn, ops
from tinytoken.train import AdamW, loss_and_grads

SAID = ("was changed in place between the forward and the backward pass, so the gradient would be wrong. "
        "Change a copy, or run the forward pass again.")
rng = np.random.default_rng(0)


def times(x, array):
    return x * array


@pytest.mark.parametrize("change", [
    lambda array: np.add(array, 1, out=array), lambda array: np.multiply(array, 2, out=array),
    lambda array: array.fill(0), lambda array: np.random.default_rng(1).shuffle(array.reshape(-1)),
    lambda array: array[:len(array) // 2].fill(7), lambda array: array.sort(axis=0)])
@pytest.mark.parametrize("shape", [(6,), (30, 65, 96)])
def test_a_change_of_an_input_is_said(change, shape):
    array, x = rng.standard_normal(shape), leaf(rng.standard_normal(shape))
    loss = (x * array).sum()
    change(array)
    assert refusal(GraphError, loss.backward) == f"backward: multiply: an array {shape} {SAID}"
    assert x.grad is None
    (x * array).sum().backward()
    equal(x.grad, array)


def test_a_change_of_a_leaf_of_a_result_and_of_an_index():
    x, rows = leaf(rng.standard_normal((3, 4))), np.array([0, 2])
    loss = (x * x).sum()
    x.data -= 0.1
    assert SAID in refusal(GraphError, loss.backward)
    y = ops.exp(x)
    loss = y.sum()
    y.data[...] = 0
    assert refusal(GraphError, loss.backward).startswith("backward: exp: an array (3, 4)")
    loss = x[rows, 1:].sum()
    rows[0] = 1
    assert refusal(GraphError, tt.grad, loss, x).startswith("backward: index: an array (2,)")
    loss = ops.linear(x, leaf(np.ones((2, 4)))).sum()  # which holds a view of x
    x.data *= 2
    assert refusal(GraphError, loss.backward).startswith("backward: linear: an array (3, 4)")


def test_a_step_between_the_passes_is_said():
    """Two losses of one model, and a step before the second one's backward pass."""
    model = nn.MLP(4, 8)
    nn.initialise(model)
    images = rng.standard_normal((5, 4)).astype("float32")
    optimiser = AdamW(model.parameters(), lr=0.1)
    first, second = (model(Tensor(images)).sum() for _ in range(2))
    first.backward()
    optimiser.step()
    assert SAID in refusal(GraphError, second.backward)
    for _ in range(3):
        model.zero_grad()
        model(Tensor(images)).sum().backward()
        optimiser.step()


@pytest.mark.parametrize("make", [
    lambda x: x + 1, lambda x: x - x, lambda x: x.sum(axis=0), lambda x: x.mean(), lambda x: x.reshape(-1),
    lambda x: x[1:], lambda x: x[[0, 0]], lambda x: x.transpose(), lambda x: ops.concat(x, x),
    lambda x: ops.pad(x, widths=((1, 1), (0, 0))), lambda x: -x,
    lambda x: ops.broadcast_to(x, shape=(2, 2, 4)),
    lambda x: ops.embedding(x, np.array([1])), lambda x: ops.take_tokens(x[None], np.array([[1]])),
    lambda x: ops.split_heads(x[None], heads=2), lambda x: ops.layer_norm(x), lambda x: x * 2.0,
    lambda x: ops.patchify(x[None, None], patch=2), lambda x: ops.softmax(x),
    lambda x: ops.linear(np.ones((3, 4)), x), lambda x: np.ones((5, 2)) @ x])
def test_a_change_that_the_gradient_does_not_depend_on_is_no_mistake(make):
    x = leaf(rng.standard_normal((2, 4)))
    expected = tt.grad(make(x).sum(), x)
    out = make(x)
    if np.shares_memory(out.data, x.data):
        x.data[...] += 1
    else:
        x.data[...] = np.nan
    equal(tt.grad(out, x, gradient=np.ones(out.shape)), expected)


def test_an_array_that_another_gradient_needs_too_counts():
    """Of x / array, for the gradient that is asked for as for the one that is not."""
    array = np.full(3, 2.0)
    loss = (leaf(np.ones(3)) / array).sum()
    array *= 2
    assert SAID in refusal(GraphError, loss.backward)


def test_what_is_changed_back_is_right_again_and_nan_is_not_a_change():
    x = leaf([1.0, np.nan, 3.0])
    loss = (x * x).sum()
    x.data += 1
    x.data -= 1
    equal(tt.grad(loss, x), [2, np.nan, 6])


def test_how_many_elements_are_compared():
    array = np.zeros((100, 100))
    x = leaf(np.ones((100, 100)))
    for samples, found in ((None, True), (0, False), (2, False), (1 << 62, True)):
        with tt.checked() if samples is None else tt.checked(samples):
            loss = (x * array).sum()
        array[3, 5] += 1
        if found:
            assert SAID in refusal(GraphError, loss.backward)
        else:
            loss.backward()

    @tt.checked(0)
    def build():
        return (x * array).sum()
    loss = build()
    array += 1
    loss.backward()


def test_of_sixteen_elements_all_are_compared():
    for place in range(16):
        array, x = rng.standard_normal(16), leaf(rng.standard_normal(16))
        loss = (x * array).sum()
        array[place] += 1
        assert SAID in refusal(GraphError, loss.backward)


def test_a_change_that_the_vjp_cannot_run_with_is_said():
    x, rows = leaf(rng.standard_normal((3, 2))), np.array([True, False, True])
    loss = x[rows].sum()
    rows[...] = False
    assert refusal(GraphError, loss.backward) == f"backward: index: an array (3,) {SAID}"


def test_the_elements_are_spread_over_the_array():
    """A change of one of sixteen images, or one of the columns of a transposed array, is seen."""
    for shape in ((16, 3, 8, 8), (16, 500), (16, 65, 96)):
        for cut in range(16):
            array = np.zeros(shape)
            loss = (leaf(np.ones(shape)) * array).sum()
            array[cut] = 1
            assert SAID in refusal(GraphError, loss.backward), (shape, cut)


def test_training_compares_nothing(monkeypatch):
    """There the two passes follow each other; what a model's own code changes, a direct backward() shows."""
    compared, watched = [], graph.watched

    def noted(vjp, samples):
        compared.append(samples)
        return watched(vjp, samples)
    monkeypatch.setattr(graph, "watched", noted)
    model = nn.Linear(3, 2)
    batch = (np.ones((4, 3), "float32"),)
    loss_and_grads(lambda x: model(Tensor(x)).mean(), model.parameters(), batch, micro=2, threads=2)
    assert compared == [16, 16]  # the two products with a micro-batch's share, and not its linear layer
    compared.clear()
    model(Tensor(batch[0])).mean().backward()
    assert compared == [16, 16]


def test_functions_that_hold_each_other_are_gone_through_once():
    array = np.ones(3)

    def even(n):
        return array if n == 0 else odd(n - 1)

    def odd(n):
        return -array if n == 0 else even(n - 1)
    assert len(graph.watched(even, 16)) == 2 and graph.watched(len, 16) == []


def test_checked_refuses_nothing_that_is_right():
    model = tt.models.ViT(image_size=8, patch_size=4, dim=8, depth=1, heads=2, num_classes=3).train()
    images, labels = rng.standard_normal((2, 3, 8, 8)).astype("float32"), np.array([0, 2])
    with tt.checked():
        loss, _ = model.loss(model(images), labels)
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(InputError):
        Tensor([1.0]).backward()
