"""Convolution and batch norm: against loops over every output, against PyTorch's numbers, multiply-adds,
refusals."""
import itertools

import numpy as np
import pytest

import tinytoken as tt
from small import reference, refuses, same
from tinytoken import bench, nn, ops
from tinytoken.backend import to_numpy

rng = np.random.default_rng(3)
# (batch, channels, height, width, filters, kernel, stride, padding, groups)
SHAPES = [(2, 3, 5, 6, 4, (3, 2), 1, 0, 1), (1, 4, 6, 5, 6, (3, 3), 2, 1, 2),
          (2, 3, 8, 7, 5, (7, 7), 2, 3, 1), (2, 3, 7, 8, 3, (5, 3), (2, 1), (2, 1), 3),
          (1, 2, 4, 4, 4, (2, 2), 2, 0, 2), (2, 6, 5, 4, 6, (1, 1), 1, 0, 1),
          (2, 2, 3, 3, 2, (3, 3), 3, 4, 2), (1, 1, 1, 1, 1, (1, 1), 1, 0, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def arrays(shape):
    B, C, H, W, O, kernel, *_, groups = shape
    return rng.standard_normal((B, C, H, W)), rng.standard_normal((O, C // groups, *kernel)), \
        rng.standard_normal(O)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def by_loops(x, weight, bias, stride, padding, groups):
    (down, across), (top, left) = pair(stride), pair(padding)
    B, C, H, W = x.shape
    O, per, kh, kw = weight.shape
    out = np.zeros((B, O, (H + 2 * top - kh) // down + 1, (W + 2 * left - kw) // across + 1))
    for b, o, r, s in np.ndindex(*out.shape):
        out[b, o, r, s] = bias[o]
        for c, i, j in np.ndindex(per, kh, kw):
            y, z = r * down + i - top, s * across + j - left
            if 0 <= y < H and 0 <= z < W:
                out[b, o, r, s] += weight[o, c, i, j] * x[b, o // (O // groups) * per + c, y, z]
    return out


@shapes
def test_convolution_by_loops(shape, xp):
    x, weight, bias = arrays(shape)
    settings = dict(zip(("stride", "padding", "groups"), shape[6:]))
    out = ops.conv2d(xp.asarray(x), xp.asarray(weight), xp.asarray(bias), **settings)
    assert out.data.flags.c_contiguous
    same(out.numpy(), by_loops(x, weight, bias, *shape[6:]))
    without = ops.conv2d(xp.asarray(x), xp.asarray(weight), **settings)
    same(without.numpy(), out.numpy() - bias[:, None, None])


@shapes
def test_gradients_of_a_convolution_by_loops(shape, xp):
    """It is linear in x, in the weight and in the bias: the gradient at each value is the output for a one
    there, times the upstream gradient."""
    leaves = [tt.Tensor(xp.asarray(a), requires_grad=True) for a in arrays(shape)]
    out = ops.conv2d(*leaves, **dict(zip(("stride", "padding", "groups"), shape[6:])))
    g = rng.standard_normal(out.shape)
    found = tt.grad((out * xp.asarray(g)).sum(), leaves)
    x, weight, bias = (leaf.numpy() for leaf in leaves)
    none = np.zeros_like(bias)

    def one(array, place):
        unit = np.zeros_like(array)
        unit[place] = 1
        return unit
    for place in itertools.islice(np.ndindex(*x.shape), 0, None, 7):
        same(found[0][place], (by_loops(one(x, place), weight, none, *shape[6:]) * g).sum())
    for place in itertools.islice(np.ndindex(*weight.shape), 0, None, 5):
        same(found[1][place], (by_loops(x, one(weight, place), none, *shape[6:]) * g).sum())
    same(to_numpy(found[2]), g.sum(axis=(0, 2, 3)))


@shapes
def test_windows_as_tokens_by_loops(shape, xp):
    x, settings = arrays(shape)[0], dict(kernel=shape[5], stride=shape[6], padding=shape[7])
    (kh, kw), (down, across), (top, left) = (pair(value) for value in settings.values())
    found = ops.unfold(xp.asarray(x), **settings).numpy()
    padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    rows, columns = ((side - taps) // step + 1
                     for side, taps, step in zip(padded.shape[2:], (kh, kw), (down, across)))
    assert found.shape == (len(x), rows * columns, x.shape[1] * kh * kw)
    for r, s in np.ndindex(rows, columns):
        window = padded[:, :, r * down:r * down + kh, s * across:s * across + kw]
        same(found[:, r * columns + s], window.reshape(len(x), -1), 0)


@shapes
def test_folding_back_is_the_adjoint(shape):
    """<U x, y> = <x, U^T y>."""
    x = tt.Tensor(arrays(shape)[0], requires_grad=True)
    out = ops.unfold(x, kernel=shape[5], stride=shape[6], padding=shape[7])
    y = rng.standard_normal(out.shape)
    back, = tt.grad((out * y).sum(), [x])
    assert (out.data * y).sum() == pytest.approx((x.data * back).sum(), rel=1e-12)


@pytest.fixture(scope="module")
def torchs():
    return reference("torch_conv.npz")


@pytest.mark.parametrize("case", range(6))
def test_convolution_is_pytorchs(case, torchs, xp):
    at = lambda name: torchs[f"conv{case}/{name}"]
    leaves = [tt.Tensor(xp.asarray(at(name)), requires_grad=True) for name in ("x", "weight", "bias")]
    settings = {name: at(name).tolist() for name in ("stride", "padding", "groups")}
    out = ops.conv2d(*leaves, **settings)
    same(out.numpy(), at("out"))
    found = tt.grad(out, leaves, gradient=xp.asarray(at("g")))
    for g, name in zip(found, ("x", "weight", "bias")):
        same(to_numpy(g), at("gradient of " + name))


def test_batch_norm_is_pytorchs_with_its_running_statistics(torchs, xp):
    at = lambda name: torchs["norm/" + name]
    norm = nn.BatchNorm2d(3, eps=at("eps").item())
    norm.load_state_dict({name: at(name) for name in ("weight", "bias", "running_mean", "running_var")})
    norm.to("cpu" if xp is np else "cuda")
    for step in range(2):
        x = tt.Tensor(xp.asarray(at(f"{step}/x")), requires_grad=True)
        out = norm.train()(x)
        same(out.numpy(), at(f"{step}/out"))
        found = tt.grad(out, [x, *norm.parameters()], gradient=xp.asarray(at(f"{step}/g")))
        for g, name in zip(found, ("x", "weight", "bias")):
            same(to_numpy(g), at(f"{step}/gradient of {name}"))
        for name, buffer in norm.named_buffers():
            same(to_numpy(buffer.data), at(f"{step}/{name}"))
    same(norm.eval()(x).numpy(), at("eval/out"))


def test_statistics_of_batch_norm_by_numpy(xp):
    x = 3 + 2 * rng.standard_normal((4, 3, 5, 2))
    out, mean, var = ops.batch_norm(xp.asarray(x), xp.ones(3), xp.zeros(3), eps=0.1)
    same(mean.numpy(), x.mean(axis=(0, 2, 3)))
    same(var.numpy(), x.var(axis=(0, 2, 3)))
    same(out.numpy(), (x - x.mean(axis=(0, 2, 3), keepdims=True))
         / np.sqrt(x.var(axis=(0, 2, 3), keepdims=True) + 0.1))


@shapes
def test_macs_are_the_closed_form(shape):
    B, C, H, W, O, kernel, *settings = shape
    x, weight, bias = arrays(shape)
    (height, width) = by_loops(x, weight, bias, *settings).shape[2:]

    class Model(nn.Module):
        def forward(self, images):
            return ops.conv2d(images, weight, stride=settings[0], padding=settings[1], groups=settings[2])
    counted = tt.macs(Model(), x)
    expected = O * height * width * C // settings[2] * kernel[0] * kernel[1]
    assert counted.total == expected and counted.by_op == {"conv2d": expected}
    leaf = tt.Tensor(x, requires_grad=True)
    text = tt.cost.graph_text(Model()(leaf).sum())
    assert text.endswith(f" {B * expected:,} multiply-adds (MACs)")
    with bench.timed_ops() as rows:
        Model()(leaf).sum().backward()
    assert rows["conv2d"].macs == 3 * B * expected  # the vjp counts twice


def ones(*shape):
    return np.ones(shape)


@pytest.mark.parametrize("call, text", [
    (lambda: ops.conv2d(ones(2, 3, 4), ones(2, 3, 1, 1)),
     "conv2d: x (2, 3, 4), weight (2, 3, 1, 1), expected (B, C, H, W) and (O, C / groups, kh, kw)"),
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(2, 3)),
     "conv2d: x (2, 3, 4, 4), weight (2, 3), expected (B, C, H, W) and (O, C / groups, kh, kw)"),
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(2, 4, 1, 1)),
     "conv2d: x (2, 3, 4, 4), weight (2, 4, 1, 1), 1 groups: the weight's second size must be C / groups, "
     "and groups must divide its first"),
    (lambda: ops.conv2d(ones(2, 4, 4, 4), ones(3, 2, 1, 1), groups=2),
     "conv2d: x (2, 4, 4, 4), weight (3, 2, 1, 1), 2 groups: the weight's second size must be C / groups, "
     "and groups must divide its first"),
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(3, 1, 1, 1), groups=2),
     "conv2d: x (2, 3, 4, 4), weight (3, 1, 1, 1), 2 groups: the weight's second size must be C / groups, "
     "and groups must divide its first"),
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(2, 3, 5, 5)),
     "conv2d: x (2, 3, 4, 4), kernel (5, 5), padding 0: the kernel does not fit into the picture"),
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(2, 3, 1, 1), ones(3)),
     "conv2d: bias (3,) for weight (2, 3, 1, 1): expected (2,)"),
    *[(lambda value=value: ops.conv2d(ones(2, 3, 4, 4), ones(2, 3, 1, 1), stride=value),
       f"conv2d: stride {value!r}, expected a whole number from 1, or two")
      for value in (0, -1, 1.5, True, (1, 2, 3), (1, 0), None)],
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(2, 3, 1, 1), padding=(0, -1)),
     "conv2d: padding (0, -1), expected a whole number from 0, or two"),
    (lambda: ops.conv2d(ones(2, 3, 4, 4), ones(2, 3, 1, 1), groups=0),
     "conv2d: groups 0, expected a whole number from 1"),
    (lambda: ops.unfold(ones(3, 4, 4), kernel=2), "unfold: x (3, 4, 4), expected (B, C, H, W)"),
    (lambda: ops.unfold(ones(2, 3, 2, 4), kernel=(5, 3), padding=1),
     "unfold: x (2, 3, 2, 4), kernel (5, 3), padding 1: the kernel does not fit into the picture"),
    *[(lambda name=name, value=value: ops.unfold(ones(2, 3, 4, 4), **dict(kernel=2) | {name: value}),
       f"unfold: {name} {value!r}, expected a whole number from {least}, or two")
      for name, value, least in (("kernel", 0, 1), ("kernel", (1, 2.5), 1), ("stride", 0, 1),
                                 ("padding", -1, 0))],
    (lambda: ops.batch_norm(ones(2, 3), ones(3), ones(3)), "batch_norm: x (2, 3), expected (B, C, H, W)"),
    (lambda: ops.batch_norm(ones(0, 3, 2, 2), ones(3), ones(3)),
     "batch_norm: x (0, 3, 2, 2), expected (B, C, H, W)"),
    (lambda: ops.batch_norm(ones(2, 3, 2, 2), ones(2), ones(3)),
     "batch_norm: weight (2,) for x (2, 3, 2, 2): expected (3,)"),
    (lambda: ops.batch_norm(ones(2, 3, 2, 2), ones(3), ones(3, 1)),
     "batch_norm: bias (3, 1) for x (2, 3, 2, 2): expected (3,)"),
])
def test_what_does_not_fit(call, text):
    with refuses(text):
        call()
