"""Flat storage: parameters and gradients as views of one buffer each, and what ends that."""
import copy

import numpy as np
import pytest

import tinytoken as tt
from small import SMALL, each_model, loss_of, refuses
from tinytoken import nn
from tinytoken.models import ViT


def test_flatten_lays_parameters_and_gradients_into_views_by_group():
    model = ViT(**SMALL)
    params, before = model.parameters(), model.state_dict()
    for name, p in model.named_parameters():
        p.lr_scale = 0.1 if name.startswith("blocks.0") else 1.0
        p.frozen_steps = 9 if name == "head.weight" else 0
    loss_of(model).backward()
    gradients = {name: p.grad.copy() for name, p in model.named_parameters()}
    flat = nn.flatten(params)
    assert flat.data.shape == flat.grad.shape == (sum(-(-p.size // 64) * 64 for p in params),)
    assert flat.data.dtype == np.float32
    assert [s[2:] for s in flat.segments] == [(0.1, False, 0), (0.1, True, 0), (1.0, False, 0), (1.0, True, 0),
                                              (1.0, True, 9)]
    assert flat.segments[0][0] == 0
    assert all(0 <= b[0] - a[1] < 64 for a, b in zip(flat.segments, flat.segments[1:]))
    address = lambda view, buffer: (view.__array_interface__["data"][0]
                                    - buffer.__array_interface__["data"][0]) // 4
    covered = np.zeros(flat.data.size, int)
    for name, p in model.named_parameters():
        assert np.array_equal(p.data, before[name]) and np.array_equal(p.grad, gradients[name])
        start = address(p.data, flat.data)
        assert p.data.flags.forc and address(p.grad, flat.grad) == start and start % 64 == 0
        around = [s[2:] for s in flat.segments if s[0] <= start and start + p.size <= s[1]]
        assert around == [(p.lr_scale, p.decay, p.frozen_steps)]
        covered[start:start + p.size] += 1
    gaps = covered == 0
    assert covered.max() == 1 and gaps.any() and not flat.data[gaps].any() and not flat.grad[gaps].any()
    tt.optim.AdamW(params, 0.1).step()
    assert not flat.data[gaps].any()  # an optimiser leaves them alone
    before = model.state_dict()
    flat.data[~gaps] += 1
    assert all(np.array_equal(p.data, before[name] + np.float32(1)) for name, p in model.named_parameters())
    model.zero_grad()
    assert (flat.grad == 0).all()
    loss_of(model).backward()
    assert np.abs(flat.grad).max() > 0 and all(np.shares_memory(p.grad, flat.grad) for p in params)


def test_cut_reads_a_buffer_as_the_parameters():
    model = ViT(**SMALL)
    flat = nn.flatten(model.parameters())
    moments = np.arange(float(flat.data.size))
    views = flat.cut(moments)
    assert [v.shape for v in views] == [p.shape for p in model.parameters()]
    assert all(np.shares_memory(v, moments) for v in views)
    numbers = np.concatenate([v.ravel() for v in views])
    assert len(set(numbers)) == len(numbers) == model.parameter_count()
    assert all(v.ravel()[0] % 64 == 0 for v in views)
    assert all(np.array_equal(v, p.data) for v, p in zip(flat.cut(flat.data), model.parameters()))


def test_flatten_again_is_the_same_storage():
    model = ViT(**SMALL)
    flat = nn.flatten(model.parameters())
    assert nn.flatten(model.parameters()) is flat and flat.holds(model.parameters())
    assert not flat.holds(model.parameters()[1:]) and not flat.holds(model.parameters()[::-1])
    part = nn.flatten(model.head.parameters())  # storage of a part takes its parameters out of the whole's
    assert part is not flat and part.holds(model.head.parameters()) and not flat.holds(model.parameters())


@pytest.mark.parametrize("change", [
    lambda m: m.astype("float64"),
    lambda m: m.astype("float32"),
    lambda m: m.load_state_dict({n: a.astype("float64") for n, a in m.state_dict().items()}),
    lambda m: setattr(m.head.bias, "data", m.head.bias.data.copy()),
    lambda m: setattr(m.head.bias, "grad", None),
    lambda m: setattr(m.head.bias, "lr_scale", 0.1),
    lambda m: setattr(m.head.bias, "decay", True),
    lambda m: setattr(m.head.bias, "frozen_steps", 1),
], ids=["float64", "float32", "load float64", "data", "grad", "lr_scale", "decay", "frozen_steps"])
def test_what_re_points_a_parameter_voids_flat_storage(change):
    model = ViT(**SMALL)
    flat = nn.flatten(model.parameters())
    change(model)
    assert not flat.holds(model.parameters())
    again = nn.flatten(model.parameters())
    assert again is not flat and again.holds(model.parameters())


@pytest.mark.parametrize("keep", [
    lambda m: m.to("cpu"),
    lambda m: m.load_state_dict(m.state_dict()),
    lambda m: loss_of(m).backward(),
    lambda m: m.zero_grad(),
    lambda m: m.eval().requires_grad_(False).requires_grad_(True),
    lambda m: copy.deepcopy(m),
], ids=["to", "load", "backward", "zero_grad", "modes", "deepcopy"])
def test_what_leaves_parameters_in_place_keeps_flat_storage(keep):
    model = ViT(**SMALL)
    flat = nn.flatten(model.parameters())
    keep(model)
    assert flat.holds(model.parameters()) and nn.flatten(model.parameters()) is flat
    loss_of(model).backward()
    assert np.abs(flat.grad).max() > 0


@each_model
def test_a_deep_copy_shares_nothing(make):
    model = make()
    model.head.bias.lr_scale, model.head.bias.frozen_steps = 0.5, 4
    model.head.weight.requires_grad = False
    flat, before = nn.flatten(model.parameters()), model.state_dict()
    twin = copy.deepcopy(model)
    assert not flat.holds(twin.parameters()) and flat.holds(model.parameters())
    assert [n for n, _ in twin.named_parameters()] == list(before)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert not np.shares_memory(p.data, q.data) and q.flat is None and q.grad is None
        assert type(q) is nn.Parameter
        assert q.requires_grad == p.requires_grad
        assert (p.lr_scale, p.decay, p.frozen_steps) == (q.lr_scale, q.decay, q.frozen_steps)
        q.data += 1
    assert all(np.array_equal(p.data, before[name]) for name, p in model.named_parameters())


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back():
    model = ViT(**SMALL)
    flat, before = nn.flatten(model.parameters()), model.state_dict()
    assert model.to("cuda") is model and all(p.device == "cuda" for p in model.parameters())
    assert not flat.holds(model.parameters())
    back = copy.deepcopy(model).to("cpu").state_dict()
    assert all(np.array_equal(back[name], a) for name, a in before.items())


def test_flatten_refuses():
    layer = nn.Linear(3, 2)
    for wrong in ([], [tt.Tensor(np.ones(3))], [np.ones(3)]):
        with refuses("flatten: a list of Parameters expected"):
            nn.flatten(wrong)
    with refuses("flatten: a parameter is given twice"):
        nn.flatten([layer.bias, layer.weight, layer.bias])
    layer.bias.data = layer.bias.data.astype("float64")
    with refuses("flatten: parameters of more than one dtype or device"):
        nn.flatten(layer.parameters())
    assert layer.weight.flat is None and layer.bias.flat is None
