"""Arrays of other kinds than the engine computes with: made ordinary with the same values, or refused."""
import warnings

import numpy as np
import pytest

import tinytoken as tt
from engine import equal, leaf, pick, refusal
from tinytoken import InputError, Tensor, backend, nn, ops
from tinytoken.train import checkpoint

A = np.array([[1.0, 2.0], [3.0, 4.0]])


def matrix(array):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(array)


def memory_map(array, folder):
    path = folder / f"{array.dtype.str[1:]}{array.dtype.isnative}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


class Subclass(np.ndarray):
    """Its + means something else."""

    def __add__(self, other):
        raise AssertionError("the subclass computes")
    __mul__ = __radd__ = __rmul__ = __add__


def of_all_kinds(folder):
    """The values of A in arrays of other kinds."""
    return {"big-endian": A.astype(">f8"), "little-endian": A.astype("<f8"), "matrix": matrix(A),
            "memory map": memory_map(A, folder),
            "memory map, big-endian": memory_map(A.astype(">f8"), folder), "subclass": A.view(Subclass),
            "masked array without masked values": np.ma.array(A)}


def test_an_ordinary_array_is_used_as_it_is(xp):
    for array in (xp.asarray(A), xp.asarray(A).T, xp.asarray([1, 2], "int8"), xp.asarray([True])):
        assert backend.native_array(array) is array and Tensor(array).data is array


class Watcher(np.ndarray):
    """Sees the ufuncs that it is computed with."""
    seen: list = []

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        Watcher.seen.append(ufunc.__name__)
        return getattr(ufunc, method)(*(x.view(np.ndarray) if isinstance(x, Watcher) else x for x in inputs))


def test_a_subclass_that_wants_to_see_what_is_computed_does(monkeypatch):
    monkeypatch.setattr(Watcher, "seen", [])
    watcher = A.view(Watcher)
    assert Tensor(watcher).data is watcher and type(Tensor(watcher.astype(">f8")).data) is Watcher
    equal(ops.tanh(Tensor(watcher)) * watcher, np.tanh(A) * A)
    assert Watcher.seen == ["tanh", "multiply"]


def test_a_memory_map_is_not_copied(tmp_path):
    mapped = memory_map(A, tmp_path)
    assert np.shares_memory(Tensor(mapped).data, mapped)


def test_as_a_tensor_and_as_an_argument(tmp_path):
    for kind, array in of_all_kinds(tmp_path).items():
        t = Tensor(array, requires_grad=True)
        assert type(t.data) is np.ndarray and t.dtype == "float64" and t.dtype.isnative, kind
        equal(t * t, A * A)
        (t * 3).sum().backward()
        equal(t.grad, np.full_like(A, 3))
        x = leaf(A)
        for out in (x * array, ops.multiply(array, x)):
            assert type(out.data) is np.ndarray and out.dtype.isnative, kind
            equal(out, A * A)
            equal(tt.grad(out.sum(), [x])[0], A)
        for out in (ops.multiply(array, array), ops.multiply(array, 1) * A):
            assert type(out.data) is np.ndarray
            equal(out, A * A)
        (x * x).backward(array)
        equal(x.grad, 2 * A * A)
        assert type(x.grad) is np.ndarray


def test_numbers_of_another_byte_order():
    for dtype in (">f4", ">f8"):
        x = Tensor(np.array([1, 2], dtype))
        assert x.dtype == dtype[1:]
        equal(ops.exp(x * 0), [1, 1])
    equal(Tensor(np.array([1, 258], ">i4")), [1, 258])
    equal(pick(leaf([1.0, 2.0, 3.0]), np.array([2, 0], ">i8")), [3, 1])
    equal(ops.embedding(A, np.array([1, 0], ">i4")), A[::-1])
    equal(ops.embedding(A, 1), A[1])
    equal(leaf([1.0, 2.0], "float32") * np.array([2, 3], ">f4")[0], [2, 4])


@pytest.mark.parametrize("array, dtype", [
    (np.array([1 + 2j, 3j]), "complex128"), (np.complex64(1 + 2j), "complex64"),
    (np.array(["1", "2"]), "<U1"), (np.array([1, 2], "datetime64[s]"), "datetime64[s]"),
    (np.array([1, 2], "timedelta64[s]"), "timedelta64[s]"), (np.array([1, 2], object), "object")])
def test_what_holds_no_real_numbers_is_refused(array, dtype):
    """Complex numbers lost their imaginary part, dates became days, words the numbers that they spell."""
    text = f"multiply: argument 1 has dtype {dtype}, expected float, int or bool"
    x = leaf([1.0, 2.0])
    assert refusal(InputError, lambda: x * array) == text
    assert refusal(InputError, lambda: array * x) == text.replace("argument 1", "argument 0")
    assert refusal(InputError, ops.exp, array) == text.replace("multiply: argument 1", "exp: argument 0")
    text = f"Tensor: dtype {dtype}, expected float32, float64, int or bool"
    assert refusal(InputError, Tensor, array) == text


def test_all_that_casts_to_floats_is_cast():
    x = leaf([1.0, 2.0], "float32")
    for dtype in ("float16", "longdouble", "int8", "uint64", "bool"):
        out = x * np.array([1, 1], dtype)
        assert out.dtype == "float32"
        equal(out, [1, 2])


def test_masked_values_are_not_counted_silently():
    array = np.ma.array([1.0, 2, 3], mask=[0, 1, 0])
    text = ("array: a masked array, whose masked values would count\n"
            "  likely: array.filled(0), and the mask as an argument of its own")
    model = nn.Linear(3, 1)
    state = model.state_dict() | {"weight": np.ma.array(np.ones((1, 3)), mask=[[0, 1, 0]])}
    for call in (lambda: Tensor(array), lambda: leaf([1.0, 2, 3]) * array, lambda: ops.exp(array),
                 lambda: nn.Buffer(array), lambda: model.load_state_dict(state)):
        assert refusal(InputError, call) == text


def small_vit():
    return tt.models.ViT(image_size=8, patch_size=4, dim=12, depth=1, heads=3)


@pytest.mark.parametrize("width", ["f4", "f8"])
def test_weights_of_another_byte_order_are_loaded(width):
    saved, model = small_vit().astype(width), small_vit()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(width)
    swapped = {n: a.astype(f">{width}") for n, a in saved.state_dict().items()}
    assert model.load_state_dict(swapped) == ([], [])
    assert model.dtype == width and all(p.dtype.isnative for p in model.parameters())
    equal(model(images).logits, saved(images).logits.data)
    model.load_state_dict({n: a.astype("<f4") if i % 2 else a.astype(">f4")
                           for i, (n, a) in enumerate(saved.state_dict().items())})
    assert model.dtype == "float32"


def test_weights_of_other_kinds_are_loaded(tmp_path):
    model = nn.Linear(2, 2, bias=False).astype("float64")
    for array in of_all_kinds(tmp_path).values():
        model.weight.data[...] = 0
        model.load_state_dict({"weight": array})
        assert type(model.weight.data) is np.ndarray
        equal(model.weight, A)


def test_a_buffer_of_another_byte_order():
    class Counter(nn.Module):
        def __init__(self):
            self.steps, self.weight = nn.Buffer(np.array([1, 2], ">i8")), nn.Parameter(np.ones(1))
    module = Counter()
    assert module.steps.dtype == "int64" and module.steps.dtype.isnative
    module.load_state_dict({"weight": np.ones(1), "steps": np.array([5, 6], ">i8")})
    equal(module.steps.data, [5, 6])


def test_a_checkpoint_of_another_byte_order(tmp_path):
    model, path = small_vit(), tmp_path / "model.npz"
    checkpoint.save(path, model)
    with np.load(path) as box:
        arrays = {n: a if n == "header" else a.astype(a.dtype.newbyteorder(">")) for n, a in box.items()}
    np.savez(path, **arrays)
    groups = checkpoint.load(path)[1]
    assert all(array.dtype.isnative for group in groups.values() for array in group.values())
    loaded = checkpoint.load_model(path)[0]
    images = np.zeros((1, 3, 8, 8), "float32")
    equal(loaded(images).logits, model(images).logits.data)
    checkpoint.restore(path, small_vit())
