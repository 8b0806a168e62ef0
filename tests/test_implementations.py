"""The registry of ops, and the one way to a faster implementation: of an op, of a composition, of any
function."""
import sys
import threading
import types

import numpy as np
import pytest

import tinytoken as tt
from engine import equal, leaf, refusal
from small import refuses
from tinytoken import GradientError, backend, ops, tensor
from tinytoken.backend import faster, implementation, using_implementations
from tinytoken.cost import graph_text


@pytest.fixture(autouse=True)
def clean():
    """What the tests define is forgotten."""
    before = dict(tensor.registry)
    known = {key: list(entries) for key, entries in backend.implementations.items()}
    yield
    for now, then in ((tensor.registry, before), (backend.implementations, known)):
        now.clear()
        now.update(then)


def test_a_later_definition_replaces_an_earlier():
    def define(factor):
        @tt.op
        def redefined(x):
            return x * factor, lambda g: g * factor
        return redefined
    first = define(2)
    assert tensor.registry[__name__, "redefined"] is first
    second = define(3)
    assert tensor.registry[__name__, "redefined"] is second
    assert [key for key in tensor.registry if key[1] == "redefined"] == [(__name__, "redefined")]
    equal(first(np.ones(1)), [2])  # who holds it still can use it


# Ops

def test_implementations_by_array_module():
    @tt.op
    def double(x, *, extra=0):
        """Twice."""
        return x * 2 + extra, lambda g: g * 2

    calls = []

    @double.implementation("numpy")
    def fast(x, *, extra=0):
        calls.append(type(x))
        return x + x + extra, lambda g: g + g

    x = leaf([1.0, 2.0])
    assert faster(double, np, x.data) is fast
    double(x, extra=1).sum().backward()
    equal(x.grad, [2, 2])
    assert calls == [np.ndarray]
    with tt.plain():
        equal(double(x), [2, 4])
        assert len(calls) == 1
    double(x)
    assert len(calls) == 2
    with using_implementations("cupy"):  # of another module, which has none: the plain definition runs
        equal(double(x), [2, 4])
    assert len(calls) == 2


def test_the_engine_checks_implementations_as_it_checks_ops():
    @tt.op
    def good(x):
        return x * 2, lambda g: g * 2

    @good.implementation("numpy")
    def bad(x):
        return x * 2, lambda g: g[:1]
    message = refusal(GradientError, good(leaf([1.0, 2.0])).sum().backward)
    assert message == "good: its vjp returned shape (1,) for x, which is (2,)"


def test_an_implementation_of_an_op_says_which_calls_it_covers():
    """It sees the arrays as the op's function gets them, cast to one dtype, and the settings of the call."""
    seen = []

    @tt.op
    def scaled(x, y=None, *, times=1.0):
        return x * times, lambda g: (g * times, None)

    def covers(x, y, **settings):
        seen.append((x.dtype.name, y if y is None else y.dtype.name, settings))
        return settings["times"] == 2.0

    @scaled.implementation("numpy", covers)
    def fast(x, y, *, times):
        return x * -times, lambda g: (g * -times, None)
    x = leaf([1.0], "float32")
    equal(scaled(x, np.ones(1), times=2.0), [-2])
    equal(scaled(x, times=3.0), [3])
    assert seen == [("float32", "float32", {"times": 2.0}), ("float32", None, {"times": 3.0})]


# Any function

def plainly(x, *, bits=32):
    return x


def test_the_first_implementation_that_covers_a_call_is_taken():
    @implementation(plainly, "numpy", covers=lambda x, bits=32: bits == 16)
    def half(x, *, bits):
        return "half"

    @implementation(plainly, "numpy", covers=lambda x, bits=32: x > 0)
    def positive(x, *, bits=32):
        return "positive"

    assert faster(plainly, np, 1, bits=16) is half and faster(plainly, np, -1, bits=16) is half
    assert faster(plainly, np, 1) is faster(plainly, np, 1, bits=32) is positive
    assert faster(plainly, np, -1) is None
    assert faster(lambda x: x, np, 1) is None  # a function for which nobody has one
    assert half(1, bits=16) == "half"  # the decorator returns the function as it was


def test_the_module_is_that_of_the_arrays_unless_the_thread_says_another():
    @implementation(plainly)
    def for_cupy(x):
        return "cupy"

    @implementation(plainly, "numpy")
    def for_numpy(x):
        return "numpy"

    def chosen():
        return faster(plainly, np, 1)
    assert chosen() is for_numpy
    with using_implementations("cupy"):
        assert chosen() is for_cupy  # to count on paper what a GPU would run
        with tt.plain():
            assert chosen() is None
            with using_implementations("numpy"):
                assert chosen() is for_numpy
            assert chosen() is None
        assert chosen() is for_cupy
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(chosen()))
        thread.start()
        thread.join()
        assert elsewhere == [for_numpy]
    with pytest.raises(ZeroDivisionError), using_implementations("plain"):
        1 / 0
    assert chosen() is for_numpy


def test_precisions_of_products_are_those_that_are_implemented():
    text = "precision: 'tf32': on the CPU and under plain() products are in fp32"
    with refuses(text):
        backend.products_in("tf32", "cpu")
    with backend.products_in("fp32", "cpu"):
        pass
    entered = []

    @implementation(backend.products_in, "numpy", covers=lambda precision, device: precision == "tf32")
    def rounded(precision, device):
        entered.append((precision, device))
        return tt.no_grad()
    with backend.products_in("tf32", "cpu"):
        assert not tensor.recording()
    assert entered == [("tf32", "cpu")] and tensor.recording()
    with tt.plain(), refuses(text):
        backend.products_in("tf32", "cpu")


# Compositions of ops

def test_fused_records_its_parts_until_it_is_implemented():
    @tt.fused
    def add_then_gelu(x, y, *, times=1.0):
        """gelu(x + y) times a number."""
        return ops.gelu(x + y) * times

    x, y = leaf([1.0, 2.0]), leaf([[0.5], [1.5]])
    rows = graph_text(add_then_gelu(x, y, times=3.0).sum())
    assert [line.split()[1] for line in rows.splitlines()[:-1]] == ["add", "gelu", "multiply", "sum"]
    expected = tt.grad(add_then_gelu(x, y=y, times=3.0).sum(), [x, y])
    assert add_then_gelu.__name__ == "add_then_gelu"
    assert add_then_gelu.__doc__ == "gelu(x + y) times a number."

    @tt.op
    def whole(x, y, *, times=1.0):
        inner = ops.gelu.function(x + y)
        return inner[0] * times, lambda g: (inner[1](g * times),) * 2

    implementation(add_then_gelu, "numpy", covers=lambda x, y, times=1.0: times > 0)(whole)
    loss = add_then_gelu(x, y, times=3.0).sum()
    assert [line.split()[1] for line in graph_text(loss).splitlines()[:-1]] == ["whole", "sum"]
    for a, b in zip(tt.grad(loss, [x, y]), expected):
        np.testing.assert_allclose(a, b, rtol=1e-14)
    assert "whole" not in graph_text(add_then_gelu(x, y, times=-3.0).sum())
    with tt.plain():
        assert "whole" not in graph_text(add_then_gelu(x, y).sum())


def test_a_fused_method_hands_its_module_on():
    class Layer(tt.nn.Module):
        scale = 3.0

        @tt.fused
        def apply(self, x, factors=None):
            return x * self.scale

    layer, x = Layer(), leaf([1.0])
    equal(layer.apply(x), [3])

    @implementation(Layer.apply, "numpy", covers=lambda self, x, factors=None: factors is None)
    def fast(self, x, factors=None):
        return x * -self.scale
    equal(layer.apply(x), [-3])
    equal(layer.apply(x, factors=np.ones(1)), [3])


def test_any_array_among_the_arguments_says_whose_implementation_is_asked_for(monkeypatch):
    """Arrays of a module that is called cupy, by place and by name, among what is none."""
    class Array:
        pass
    cupy = types.ModuleType("cupy")
    cupy.ndarray = Array
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    @tt.fused
    def times(factor, x):
        return "plain"
    implementation(times, "cupy")(lambda factor, x: "cupy")
    implementation(times, "numpy", covers=lambda factor, x: factor > 0)(lambda factor, x: "numpy")
    assert times(2.0, Array()) == times(2.0, x=Array()) == times(Array(), None) == "cupy"
    assert times(2.0, np.ones(2)) == times(2.0, x=leaf(np.ones(2))) == times(2.0, None) == "numpy"
    assert times(-2.0, np.ones(2)) == "plain"


def test_the_branches_of_a_block_can_be_implemented():
    """What a GPU may fuse: a block asks for it by the branch as it is written, and the model does not
    know."""
    block, x, seen = tt.nn.Block(8, 2), leaf(np.ones((2, 3, 8)), "float32"), []

    def note(name):
        def covers(x, norm, part, factors=None, **options):
            seen.append((name, norm, part, factors, options))
            return False
        return covers
    for name in ("attention_branch", "mlp_branch"):
        implementation(getattr(tt.nn, name), "numpy", covers=note(name))(None)
    paths = np.ones((2, 2), "float32")
    block(x, paths, keep=None, official=False)
    (first, norm1, attn, _, options), (second, norm2, mlp, factors, none) = seen
    assert (first, second, none) == ("attention_branch", "mlp_branch", {})
    assert options == {"keep": None, "official": False}
    assert norm1 is block.norm1 and attn is block.attn and norm2 is block.norm2 and mlp is block.mlp
    assert factors.shape == (2,)
