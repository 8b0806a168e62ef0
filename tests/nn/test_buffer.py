"""Buffers: state that is saved, loaded, cast and moved with the parameters, and that nobody learns."""
import copy

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tinytoken import nn
from tinytoken.train import checkpoint


class Counting(nn.Module):
    """Subtracts a running mean, and counts its calls."""

    def __init__(self):
        self.mean, self.calls = nn.Buffer(np.zeros(3, "float32")), nn.Buffer(np.zeros((), "int64"))
        self.inner = [nn.Linear(3, 3), nn.LayerNorm(3)]

    def forward(self, x):
        self.calls.data += 1
        return self.inner[0](x - self.mean.data)


class Outer(nn.Module):
    def __init__(self):
        self.first, self.scale, self.second = Counting(), nn.Parameter(np.ones(2, "float32")), [Counting()]

    def forward(self, x):
        return self.second[0](self.first(x))


def test_names_stand_where_they_were_set_and_parameters_are_parameters():
    model = Outer()
    assert [name for name, _ in model.named_buffers()] == ["first.mean", "first.calls", "second.0.mean",
                                                           "second.0.calls"]
    assert list(model.state_dict())[:3] == ["scale", "first.mean", "first.calls"]
    assert not {name for name, _ in model.named_parameters()} & {name for name, _ in model.named_buffers()}
    assert model.parameter_count() == 2 * (12 + 6) + 2 == sum(p.size for p in model.parameters())
    assert "mean" not in model.summary()
    assert repr(model.first.mean) == "Buffer([0. 0. 0.], shape (3,), float32)"


def test_nobody_learns_them():
    model = Outer()
    for p in model.parameters():
        p.data += 0.5
    model.first.mean.data[...] = [1, 2, 3]
    optimizer = tt.optim.AdamW(model.parameters(), 0.1)
    assert optimizer.flat.data.size == 9 * 64  # of 38 numbers in 9 parameters, and gaps
    model(np.ones((2, 3), "float32")).sum().backward()
    optimizer.step()
    assert model.first.mean.data.tolist() == [1, 2, 3] and model.first.calls.data == 1
    assert not hasattr(model.first.mean, "grad")
    model.requires_grad_(False)
    model.zero_grad()


def test_they_are_saved_and_loaded_and_copies_are_made():
    model, other = Outer(), Outer()
    model.first.mean.data[...], model.first.calls.data[...] = [1, 2, 3], 7
    state = model.state_dict()
    assert state["first.mean"].dtype == "float32" and state["first.calls"].dtype == "int64"
    assert not np.shares_memory(state["first.mean"], model.first.mean.data)
    array = other.first.mean.data
    assert other.load_state_dict(state) == ([], [])
    assert other.first.mean.data is array and array.tolist() == [1, 2, 3] and other.first.calls.data == 7
    state["first.mean"][...] = np.nan
    assert array.tolist() == [1, 2, 3]
    twin = copy.deepcopy(model)
    twin.first.mean.data += 1
    assert model.first.mean.data.tolist() == [1, 2, 3]


@pytest.mark.parametrize("change, text", [
    (lambda s: s.pop("first.calls"), "missing first.calls; unexpected none"),
    (lambda s: s.update({"first.mean": np.ones(4, "float32")}),
     "other shapes: first.mean (4,), expected (3,)"),
    (lambda s: s.update({"first.mean": np.ones(3)}),
     "dtypes float32, float64, expected all float32 or all float64"),
    (lambda s: s.update({"first.mean": np.ones(3, "int64")}),
     "dtypes float32, int64, expected all float32 or all float64"),
    (lambda s: s.update({"first.calls": np.ones((), "float32")}),
     "other dtypes: first.calls float32, expected int64"),
    (lambda s: s.update({"first.calls": np.ones((), "int32"), "second.0.calls": np.ones(())}),
     "other dtypes: first.calls int32, expected int64, second.0.calls float64, expected int64"),
])
def test_what_does_not_fit_is_refused_and_nothing_is_changed(change, text):
    model = Outer()
    state = {name: array + 1 for name, array in model.state_dict().items()}
    state = {name: array.astype(model.state_dict()[name].dtype) for name, array in state.items()}
    change(state)
    with refuses("load_state_dict: " + text):
        model.load_state_dict(state)
    assert all((b.data == 0).all() for _, b in model.named_buffers()) and (model.scale.data == 1).all()


def test_floats_are_cast_with_the_parameters_and_integers_stay():
    model, wide = Outer(), Outer().astype("float64")
    assert wide.first.mean.dtype == "float64" and wide.first.calls.dtype == "int64"
    assert wide.dtype == np.float64
    wide.first.mean.data[...] = np.pi
    model.load_state_dict(wide.state_dict())
    assert model.first.mean.dtype == "float64" and (model.first.mean.data == np.pi).all()
    narrow = {name: array.astype("float16") if array.dtype.kind == "f" else array
              for name, array in wide.state_dict().items()}
    with pytest.warns(UserWarning, match="^load_state_dict: 11 arrays of dtype float16 become float32$"):
        model.load_state_dict(narrow)
    assert model.first.mean.dtype == "float32" and model.first.calls.dtype == "int64"


def test_they_go_where_the_parameters_go(xp):
    device = "cpu" if xp is np else "cuda"
    model = Outer()
    assert model.to(device) is model
    assert all(isinstance(b.data, xp.ndarray) for _, b in model.named_buffers())
    before = model.first.mean.data
    assert model.to(device).first.mean.data is before  # those that are there stay as they are
    assert all(isinstance(b.data, np.ndarray) for _, b in model.to("cpu").named_buffers())


def test_a_checkpoint_has_them(tmp_path):
    model, other = Outer(), Outer()
    model.first.mean.data[...], model.second[0].calls.data[...] = [1, 2, 3], 5
    checkpoint.save(tmp_path / "m.npz", model)
    checkpoint.restore(tmp_path / "m.npz", other)
    assert other.first.mean.data.tolist() == [1, 2, 3] and other.second[0].calls.data == 5
