"""Modules: parameters with names, and the layers of a transformer. Class and parameter names follow timm."""
import math
import warnings

import numpy as np

from . import ops, random
from .backend import array_module, device_of, to_device, to_numpy
from .cost import running_modules
from .errors import expect
from .tensor import Tensor, kernel


class Parameter(Tensor):
    """A leaf Tensor that a model learns. decay: weight decay applies (matrices of linear layers). lr_scale: its learning rate
    relative to the others'. Parameters of equal (lr_scale, decay) are neighbours in flat storage."""
    __slots__ = ("decay", "lr_scale", "flat")

    def __init__(self, array, decay=False):
        super().__init__(array, requires_grad=True)
        self.decay, self.lr_scale, self.flat = decay, 1.0, None

    def __deepcopy__(self, memo):
        twin = Parameter(self.data.copy(), self.decay)
        twin.lr_scale, twin.requires_grad = self.lr_scale, self.requires_grad
        return twin


class Module:
    """Something with parameters. Parameters, modules and lists of modules among its attributes are found by name, in the
    order in which they were set. Subclasses write forward(); calling the module runs it."""
    training = True

    def __call__(self, *args, **kwargs):
        stack = running_modules()
        stack.append(self)
        try:
            return self.forward(*args, **kwargs)
        finally:
            stack.pop()

    def children(self):
        """(name, module) of the modules directly inside."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def named_modules(self, prefix=""):
        """(dotted name, module) of this module ('') and all inside."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self):
        """(dotted name, Parameter) of all parameters."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield (f"{prefix}.{name}" if prefix else name), value

    def parameters(self):
        """All parameters, in the order of their names."""
        return [p for _, p in self.named_parameters()]

    def parameter_count(self):
        """How many numbers the model learns."""
        return sum(p.size for p in self.parameters())

    def train(self, mode=True):
        """Set training mode (eval(): inference) here and inside. Returns self."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self):
        """Inference mode. Returns self."""
        return self.train(False)

    def requires_grad_(self, wanted=True):
        """Freeze (False) or unfreeze all parameters. Returns self."""
        for p in self.parameters():
            p.requires_grad = wanted
        return self

    def zero_grad(self):
        """Fill every gradient with zeros."""
        for p in self.parameters():
            if p.grad is not None:
                p.grad[...] = 0

    def astype(self, dtype):
        """Cast all parameters to float32 or float64. Voids flat storage. Returns self."""
        for p in self.parameters():
            p.data, p.grad = p.data.astype(dtype), None
        return self

    def to(self, device):
        """Move all parameters to 'cpu' or 'cuda'; those that are there stay as they are. Returns self.
        A move voids flat storage."""
        for p in self.parameters():
            if p.device != device:
                p.data, p.grad = to_device(p.data, device), None
        return self

    @property
    def dtype(self):
        return next(p.dtype for p in self.parameters())

    def state_dict(self):
        """{name: array}, copies in host memory."""
        return {name: np.array(to_numpy(p.data)) for name, p in self.named_parameters()}

    def load_state_dict(self, state, strict=True):
        """Copy arrays in by name -> (missing, unexpected) names. strict: both must be empty. Shapes must agree always.

        float32 and float64 keep their width (float64 weights make a float64 model); float16 and bfloat16 become float32, with
        a warning; mixed widths raise InputError. Nothing is changed if anything is refused.
        """
        own = dict(self.named_parameters())
        missing, unexpected = [n for n in own if n not in state], [n for n in state if n not in own]
        expect(not strict or not (missing or unexpected), "load_state_dict",
               lambda: f"missing {_some(missing)}; unexpected {_some(unexpected)}")
        arrays = _one_width({name: np.asarray(state[name]) for name in own if name in state})
        wrong = [f"{n} {arrays[n].shape}, expected {own[n].shape}" for n in arrays if arrays[n].shape != own[n].shape]
        expect(not wrong, "load_state_dict", lambda: f"other shapes: {_some(wrong)}")
        for name, array in arrays.items():
            if array.dtype != self.dtype:
                self.astype(array.dtype)
            own[name].data[...] = to_device(array, device_of(own[name].data))
        return missing, unexpected

    def summary(self):
        """A table of the modules that own parameters: name, kind, parameters."""
        rows = []
        for name, module in self.named_modules():
            owned = [p for p in vars(module).values() if isinstance(p, Parameter)]
            if owned:
                rows.append((name or "(model)", type(module).__name__, ", ".join(str(p.shape) for p in owned),
                             sum(p.size for p in owned)))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{n:<{widths[0]}}  {kind:<{widths[1]}}  {shapes:<{widths[2]}}  {size:>10,}" for n, kind, shapes, size in rows]
        return "\n".join(lines + [f"{type(self).__name__}: {self.parameter_count():,} parameters"])


def _some(names, limit=6):
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") if names else "none"


def _one_width(arrays):
    """The arrays in one float width, narrow ones made float32."""
    narrow = [n for n, a in arrays.items() if a.dtype.name in ("float16", "bfloat16")]
    if narrow:
        warnings.warn(f"load_state_dict: {len(narrow)} arrays of dtype {arrays[narrow[0]].dtype} become float32", stacklevel=3)
        arrays = {n: a.astype("float32") if n in narrow else a for n, a in arrays.items()}
    widths = {a.dtype.name for a in arrays.values()}
    expect(widths <= {"float32"} or widths <= {"float64"}, "load_state_dict",
           lambda: f"dtypes {', '.join(sorted(widths))}, expected all float32 or all float64")
    return arrays


# Flat storage

class Flat:
    """Parameters laid into one buffer, gradients into another, ordered by (lr_scale, decay), so that an optimiser, clipping
    and a sum over threads are one pass each. segments: (start, stop, lr_scale, decay) of each group. Each parameter begins at a
    multiple of 64 numbers, where the fastest loads of a GPU can; the gaps are zeros, and stay so."""

    def __init__(self, params):
        first = params[0].data
        expect(all(p.dtype == first.dtype and device_of(p.data) == device_of(first) for p in params), "flatten",
               "parameters of more than one dtype or device")
        xp = array_module(first)
        order = sorted(range(len(params)), key=lambda i: _group(params[i]))
        size = sum(_aligned(p.size) for p in params)
        self.data, self.grad = xp.zeros(size, first.dtype), xp.zeros(size, first.dtype)
        self.groups, self.segments, self.bounds, start = [_group(p) for p in params], [], [None] * len(params), 0
        for i in order:
            start = _aligned(start)
            p, stop = params[i], start + params[i].size
            self.bounds[i] = (start, stop, p.shape)
            if self.segments and self.segments[-1][2:] == _group(p):
                self.segments[-1] = (self.segments[-1][0], stop, *_group(p))
            else:
                self.segments.append((start, stop, *_group(p)))
            start = stop
        self.views, self.grads = self.cut(self.data), self.cut(self.grad)
        for p, view, g in zip(params, self.views, self.grads):
            view[...] = p.data
            if p.grad is not None:
                g[...] = p.grad
            p.data, p.grad, p.flat = view, g, self

    def cut(self, buffer):
        """One view of `buffer` (laid out like data) per parameter, in the order the parameters were given."""
        return [buffer[start:stop].reshape(shape) for start, stop, shape in self.bounds]

    def holds(self, params):
        """True while every parameter and its gradient still are the views that they were given, in the group that it was in."""
        return len(params) == len(self.views) and all(
            p.flat is self and p.data is view and p.grad is g and _group(p) == group
            for p, view, g, group in zip(params, self.views, self.grads, self.groups))


def _group(p):
    return (p.lr_scale, p.decay)


def _aligned(size):
    return -(-size // 64) * 64


def flatten(params):
    """The Flat storage of these parameters: the one they are in if it still holds, else a new one."""
    params = list(params)
    expect(params and all(isinstance(p, Parameter) for p in params), "flatten", "a list of Parameters expected")
    expect(len({id(p) for p in params}) == len(params), "flatten", "a parameter is given twice")
    flat = params[0].flat
    return flat if flat is not None and flat.holds(params) else Flat(params)


# Starting weights. Shared recipes.md: they matter more than learning rate or batch size at this scale.

def xavier(weight, name, parts=1, scale=1.0):
    """Glorot & Bengio 2010, eq. 16: uniform in +-sqrt(6 / (in + out)) x scale. weight (out, in) or, for patches, (out, C, p, p);
    a packed one (qkv) counts as `parts`."""
    out, inputs = len(weight), math.prod(weight.shape[1:])
    bound = scale * math.sqrt(6 / (inputs + out // parts))
    weight.data[...] = (2 * random.uniform(weight.shape, site=name, step=0, xp=array_module(weight.data)) - 1) * bound


def normal(parameter, name, std):
    """Normal draws of standard deviation `std`."""
    parameter.data[...] = random.normal(parameter.shape, site=name, step=0, xp=array_module(parameter.data)) * std


BRANCH_ENDS = ("attn.proj", "mlp.fc2", "gather_proj", "infuse_proj")


def initialise(model, residual_scale=0.3):
    """Xavier for every linear layer and the patch embedding, each from a site of its own name and the default key: a model's
    weights depend on `manual_seed` and on nothing that was made before. The layers that end a residual branch start small."""
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Projection)):
            xavier(module.weight, f"{name}.weight", module.parts, residual_scale if name.endswith(BRANCH_ENDS) else 1.0)


def sincos_positions(grid, dim):
    """(h w, dim) float32: the 2-D sine-cosine table, a quarter of the channels each for sin and cos of row and of column."""
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = (place.reshape(-1, 1) * frequencies for place in np.mgrid[:grid[0], :grid[1]].astype("float64"))
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return np.pad(table, ((0, 0), (0, dim - table.shape[1]))).astype("float32")


def start_positions(grid, dim):
    """The position table that models start from, (h w, dim): the sine-cosine table x 0.7, then learned (shared recipes.md)."""
    return sincos_positions(grid, dim) * 0.7


# Layers

class Linear(Module):
    """x W^T + b. x (..., in_features) -> (..., out_features); weight (out, in). parts: how many matrices it packs."""

    def __init__(self, in_features, out_features, bias=True, parts=1):
        self.parts = parts
        self.weight = Parameter(np.zeros((out_features, in_features), "float32"), decay=True)
        self.bias = Parameter(np.zeros(out_features, "float32")) if bias else None

    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Layer norm over the last axis. x (..., dim) -> (..., dim)."""

    def __init__(self, dim, eps=1e-6):
        self.eps = eps
        self.weight, self.bias = Parameter(np.ones(dim, "float32")), Parameter(np.zeros(dim, "float32"))

    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class GELU(Module):
    """ops.gelu as a layer, for lists of layers."""

    def forward(self, x):
        return ops.gelu(x)


class MLP(Module):
    """Linear, GELU, Linear. x (..., dim) -> (..., dim)."""

    def __init__(self, dim, hidden):
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(ops.gelu(self.fc1(x)))


class Attention(Module):
    """Multi-head self-attention. x (B, T, dim) -> (B, T, dim). keep and official as in ops.attention; `trace`, a list, gets the
    weights (B, H, T, T)."""

    def __init__(self, dim, heads, qkv_bias=True):
        expect(dim % heads == 0, "Attention", f"heads {heads} do not divide dim {dim}")
        self.heads = heads
        self.qkv, self.proj = Linear(dim, 3 * dim, bias=qkv_bias, parts=3), Linear(dim, dim)

    def forward(self, x, keep=None, official=False, trace=None):
        q, k, v = ops.split_heads(self.qkv(x), heads=self.heads, parts=3)
        out = ops.attention(q, k, v, keep, official=official, weights=trace is not None)
        if trace is not None:
            out, weights = out
            trace.append(weights.detach())
        return self.proj(ops.merge_heads(out))


def branch(out, paths, number):
    """What a residual branch adds, out (B, T, D): times paths[:, number] of each image where factors (B, branches) are given. A
    factor of 0 drops the branch for that image (drop path: Huang et al. 2016; train.drop_paths draws them)."""
    return out if paths is None else out * paths[:, number, None, None]


def residual(x, norm, inner, paths, number, *more):
    """A pre-norm residual branch: x + inner(norm x, *more), what is added times paths[:, number] where there are any (see `branch`).
    cuda/ may have a kernel for the whole of it, which gives None for what it does not cover."""
    done = by_kernel("residual", x, norm, inner, None if paths is None else paths[:, number], *more)
    return x + branch(inner(norm(x), *more), paths, number) if done is None else done


def by_kernel(name, x, *given):
    """What the function of cuda/ under this name makes of (x, *given), or None where there is none, or it does not cover them."""
    fast = kernel(name, x)
    return fast(x, *given) if fast else None


class Block(Module):
    """A pre-norm transformer block: x + attention(norm1 x), then x + mlp(norm2 x). x (B, T, dim) -> (B, T, dim). paths (B, 2):
    factors of the two branches, see `branch`."""
    branches = 2

    def __init__(self, dim, heads, mlp_ratio=4.0, qkv_bias=True, eps=1e-6):
        self.norm1, self.attn = LayerNorm(dim, eps), Attention(dim, heads, qkv_bias)
        self.norm2, self.mlp = LayerNorm(dim, eps), MLP(dim, round(dim * mlp_ratio))

    def forward(self, x, keep=None, official=False, trace=None, paths=None):
        x = residual(x, self.norm1, self.attn, paths, 0, keep, official, trace)
        return residual(x, self.norm2, self.mlp, paths, 1)


class Projection(Module):
    """The patch embedding's weight as the convolution it is: (dim, C, p, p), stride p."""
    parts = 1

    def __init__(self, dim, channels, patch):
        self.weight = Parameter(np.zeros((dim, channels, patch, patch), "float32"), decay=True)
        self.bias = Parameter(np.zeros(dim, "float32"))

    def forward(self, patches):
        return ops.linear(patches, self.weight.reshape(len(self.weight), -1), self.bias)


class PatchEmbed(Module):
    """Pictures to tokens. images (B, C, S, S) float -> (B, N, dim), row by row, N = (S / patch_size)^2. Refuses pictures of
    another size or channel count, and integer pixels. Arrays are cast to the weights' dtype."""

    def __init__(self, image_size, patch_size, dim, channels=3):
        expect(image_size % patch_size == 0, "PatchEmbed", f"patch_size {patch_size} does not divide image_size {image_size}")
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.grid = (image_size // patch_size,) * 2
        self.proj = Projection(dim, channels, patch_size)

    def forward(self, images):
        expected = (self.channels, self.image_size, self.image_size)
        expect(len(images.shape) == 4 and len(images) and tuple(images.shape[1:]) == expected, "images",
               lambda: f"{tuple(images.shape)}, expected (B, {', '.join(map(str, expected))})")
        expect(images.dtype.kind == "f", "images",
               lambda: f"dtype {images.dtype}, expected float32: normalise them first (tt.data.normalise)")
        if not isinstance(images, Tensor):
            images = images.astype(self.proj.weight.dtype, copy=False)
        return self.proj(ops.patchify(images, patch=self.patch_size))
