"""One table: for every op of tinytoken.ops, inputs that are small, odd and generic, and settings for each of
its branches.

The tests beside this file run over the table: gradients against finite differences, damaged gradients,
float32 against float64, and what the engine asks of every op. A new op needs its lines here; without them the
suite fails. All sizes of an array differ, so that an exchanged axis cannot pass unseen; there are no ties and
no kinks near a value.
"""
import dataclasses
import math
import zlib

import numpy as np

from tinytoken import backend, ops, tensor

REGISTERED = {name: op for (module, name), op in tensor.registry.items() if module.startswith(ops.__name__)}


# Makers of inputs: functions of a random generator

def normal(*shape, std=1.0):
    return lambda rng: std * rng.standard_normal(shape)


def positive(*shape):
    return lambda rng: rng.uniform(0.5, 2.0, shape)


def away(*shape, least=0.2):
    """Normal draws with at least that distance from zero, where relu bends and a quotient ends."""
    def make(rng):
        x = rng.standard_normal(shape)
        return x + np.copysign(least, x)
    return make


def distinct(*shape):
    """A random order of numbers 0.1 apart: a maximum is never in doubt."""
    return lambda rng: 0.1 * rng.permutation(math.prod(shape)).reshape(shape)


def probabilities(*shape):
    def make(rng):
        x = rng.uniform(0.2, 1.0, shape)
        return x / x.sum(axis=-1, keepdims=True)
    return make


def gumbel(*shape):
    return lambda rng: rng.gumbel(size=shape)


def soft_keep(*shape):
    return lambda rng: rng.uniform(0.1, 0.9, shape)


def integers(*shape, high):
    return lambda rng: rng.integers(high, size=shape)


def given(values, dtype="float64"):
    return lambda rng: np.array(values, dtype)


# The table

@dataclasses.dataclass(frozen=True)
class Case:
    """inputs: a maker, a number or None per array argument. fixed: the arguments whose gradient finite
    differences cannot see (hard masks). smooth=False: none can be differenced (a hard sample); the other
    tests still run it."""
    name: str
    note: str
    inputs: tuple
    settings: dict
    fixed: tuple = ()
    smooth: bool = True

    @property
    def op(self):
        return REGISTERED[self.name]

    @property
    def id(self):
        return f"{self.name}: {self.note}" if self.note else self.name

    def arrays(self, dtype="float64", xp=np):
        """The inputs, the same at each call; floats as `dtype`."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        made = [make(rng) if callable(make) else make for make in self.inputs]
        return [xp.asarray(a.astype(dtype) if a.dtype.kind == "f" else a) if backend.is_array(a) else a
                for a in made]

    def moving(self, arrays):
        """The positions of the arguments that have a gradient to compare."""
        floats = [i for i, a in enumerate(arrays) if backend.is_array(a) and a.dtype.kind == "f"]
        return [i for i in floats if self.op.variadic or self.op.arrays[i] not in self.fixed]

    def names(self, positions):
        return [f"input {i}" if self.op.variadic else self.op.arrays[i] for i in positions]

    def settings_for(self, arrays):
        """The settings, with the arrays in them (an index) of the inputs' array module."""
        xp = backend.array_module(*arrays)
        return {name: _moved(value, xp) for name, value in self.settings.items()}

    def function(self, arrays, op=None):
        """A function of the moving arguments alone."""
        op, positions, settings = op or self.op, self.moving(arrays), self.settings_for(arrays)

        def run(*moving):
            whole = list(arrays)
            for i, value in zip(positions, moving):
                whole[i] = value
            return op(*whole, **settings)
        return run


def _moved(value, xp):
    if isinstance(value, tuple):
        return tuple(_moved(part, xp) for part in value)
    return xp.asarray(value) if backend.is_array(value) else value


def case(name, note, *inputs, fixed=(), smooth=True, **settings):
    return Case(name, note, inputs, settings, fixed, smooth)


BOXES = given([[[0.3, 0.2, 2.9, 2.1], [-2, 1, 1.4, 2.6], [3.1, -1.5, 4.9, 0.4]],
               [[1.2, 1.1, 1.9, 1.7], [0, 0, 4, 3], [2.2, 0.4, 2.2, 1.9]]])
HARD = given([[1, 0, 1, 1]])               # one image
HARD3 = given([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])  # three: some kept, one kept, none kept
ONE, THREE = (1, 2, 4, 3), (3, 1, 4, 2)    # (B, H, T, d)
CROSS_Q, CROSS_K = (1, 2, 3, 5), (1, 2, 4, 5)

arithmetic = [
    case("add", "", normal(2, 3), normal(2, 3)),
    case("add", "both broadcast", normal(2, 1, 3), normal(4, 1)),
    case("add", "a number", normal(2, 3), 2.5),
    case("add", "0-d", normal(), normal(2)),
    case("subtract", "", normal(2, 3), normal(2, 3)),
    case("subtract", "both broadcast", normal(3, 1), normal(2, 1, 4)),
    case("multiply", "", normal(2, 3), normal(2, 3)),
    case("multiply", "both broadcast", normal(2, 1, 3), normal(4, 1)),
    case("multiply", "a number", 2.5, normal(2, 3)),
    case("divide", "", normal(2, 3), away(2, 3, least=0.5)),
    case("divide", "both broadcast", normal(2, 1, 3), away(4, 1, least=0.5)),
    case("negative", "", normal(2, 3)),
    case("power", "1", normal(2, 3), exponent=1),
    case("power", "2", normal(2, 3), exponent=2),
    case("power", "3", normal(2, 3), exponent=3),
    case("power", "4", normal(2, 3), exponent=4),
    case("power", "-1.5", positive(2, 3), exponent=-1.5),
    case("exp", "", normal(2, 3)),
    case("log", "", positive(2, 3)),
    case("sqrt", "", positive(2, 3)),
    *[case(name, note, (distinct if name == "max" else normal)(2, 3, 4), **settings)
      for name in ("sum", "mean", "max")
      for note, settings in (("all", {}), ("all, keepdims", {"keepdims": True}), ("one axis", {"axis": 1}),
                             ("last axis, keepdims", {"axis": -1, "keepdims": True}),
                             ("two axes", {"axis": (0, -1)}))],
]
activation = [
    case("gelu", "", normal(2, 7, std=2)),
    case("gelu", "far out", given([-6.5, -3.25, 0.125, 5.5])),
    case("relu", "", away(3, 5)),
    case("sigmoid", "", normal(2, 5, std=2)),
    case("log_sigmoid", "", normal(2, 5, std=2)),
    case("tanh", "", normal(2, 5)),
]
shape = [
    case("reshape", "", normal(2, 3, 4), shape=(4, 6)),
    case("reshape", "-1", normal(2, 3, 4), shape=(3, -1)),
    case("transpose", "reversed", normal(2, 3, 4)),
    case("transpose", "axes", normal(2, 3, 4), axes=(1, -1, 0)),
    case("concat", "axis 1", normal(2, 1, 3), normal(2, 4, 3), normal(2, 2, 3), axis=1),
    case("concat", "axis -1", normal(2, 3), normal(2, 5), axis=-1),
    case("concat", "one array, axis 0", normal(2, 3)),
    case("index", "slices", normal(4, 3, 5), key=(slice(1, 3), slice(None), slice(None, None, -2))),
    case("index", "a number", normal(4, 3), key=2),
    case("index", "None and ...", normal(2, 3, 4), key=(None, Ellipsis, -1)),
    case("index", "rows, one twice", normal(4, 3), key=np.array([2, 0, 2])),
    case("index", "pairs, one twice", normal(4, 3), key=(np.array([1, 3, 1, 0]), np.array([2, 0, 2, 2]))),
    case("index", "array and slice", normal(2, 4, 3),
         key=(slice(None), np.array([[3, 1], [1, 0]]), slice(1, None))),
    case("index", "a mask", normal(4, 3), key=np.array([True, False, True, True])),
    case("pad", "", normal(2, 3), widths=((1, 0), (0, 2))),
    case("broadcast_to", "", normal(3, 1), shape=(2, 3, 4)),
]
dense = [
    case("matmul", "2-D", normal(2, 3), normal(3, 4)),
    case("matmul", "many rows, one matrix", normal(2, 3, 4), normal(4, 5)),
    case("matmul", "batches", normal(2, 3, 4), normal(2, 4, 5)),
    case("matmul", "one matrix, many", normal(3, 4), normal(2, 4, 5)),
    case("matmul", "batches broadcast", normal(2, 1, 3, 4), normal(3, 4, 2)),
    case("linear", "", normal(2, 3, 4), normal(5, 4), normal(5)),
    case("linear", "no bias", normal(3, 4), normal(5, 4), None),
    case("linear", "one row", normal(4), normal(5, 4), normal(5)),
    case("embedding", "one row twice", normal(5, 3), given([[1, 4], [0, 4]], int)),
]
norm = [
    case("softmax", "", normal(2, 5, std=2)),
    case("softmax", "axis 1", normal(2, 3, 4), axis=1),
    case("log_softmax", "", normal(2, 5, std=2)),
    case("log_softmax", "axis 0", normal(3, 2, 4), axis=0),
    case("layer_norm", "", normal(2, 3, 5), normal(5), normal(5)),
    case("layer_norm", "eps", normal(2, 5), normal(5), normal(5), eps=0.5),
    case("layer_norm", "no weight, no bias", normal(3, 5), None, None, eps=0.1),
    case("layer_norm", "no bias", normal(3, 5), normal(5), None),
    case("layer_norm", "no weight", normal(3, 5), None, normal(5)),
    case("layer_norm", "one row", normal(5), normal(5), normal(5)),
]
conv = [
    case("conv2d", "", normal(2, 3, 4, 5), normal(4, 3, 3, 2), normal(4)),
    case("conv2d", "one place", normal(2, 3, 4, 2), normal(5, 3, 1, 1), normal(5)),
    case("conv2d", "padding, no bias", normal(2, 3, 4, 3), normal(2, 3, 3, 3), None, padding=1),
    case("conv2d", "stride that leaves a rest", normal(2, 3, 6, 4), normal(4, 3, 3, 2), normal(4), stride=2),
    case("conv2d", "stride and padding per axis", normal(2, 3, 5, 4), normal(4, 3, 2, 3), normal(4),
         stride=(1, 2), padding=(0, 2)),
    case("conv2d", "stride beyond the kernel", normal(2, 2, 5, 7), normal(3, 2, 1, 2), normal(3),
         stride=(2, 3)),
    case("conv2d", "groups", normal(2, 6, 3, 4), normal(9, 2, 2, 3), normal(9), padding=1, groups=3),
    case("conv2d", "depthwise", normal(2, 3, 4, 5), normal(3, 1, 3, 2), normal(3), stride=(1, 2),
         padding=(1, 0), groups=3),
    case("conv2d", "depthwise, no bias", normal(2, 4, 3, 5), normal(4, 1, 3, 3), None, padding=1, groups=4),
    case("conv2d", "depthwise, two filters each", normal(2, 3, 4, 5), normal(6, 1, 2, 3), normal(6),
         groups=3),
    case("unfold", "", normal(2, 3, 4, 5), kernel=3),
    case("unfold", "padding, stride", normal(2, 3, 5, 4), kernel=3, stride=2, padding=1),
    case("unfold", "per axis, a rest", normal(2, 2, 4, 7), kernel=(3, 2), stride=(1, 2), padding=(1, 0)),
    case("unfold", "stride beyond the kernel", normal(1, 3, 5, 6), kernel=(1, 2), stride=(2, 3)),
    case("batch_norm", "", normal(2, 3, 2, 4), normal(3), normal(3)),
    case("batch_norm", "eps", normal(3, 4, 1, 2), normal(4), normal(4), eps=0.5),
]
attend = [
    *[case("split_heads", f"{parts} parts", normal(2, 3, 4 * parts), heads=2, parts=parts)
      for parts in (1, 2, 3)],
    case("merge_heads", "", normal(2, 3, 5, 4)),
    case("attention", "", *[normal(*ONE)] * 3),
    case("attention", "three images", *[normal(*THREE)] * 3),
    case("attention", "weights", *[normal(*ONE)] * 3, weights=True),
    case("attention", "cross", normal(*CROSS_Q), normal(*CROSS_K), normal(*CROSS_K)),
    case("attention", "soft keep", *[normal(*THREE)] * 3, soft_keep(3, 4)),
    case("attention", "soft keep, weights", *[normal(*ONE)] * 3, soft_keep(1, 4), weights=True),
    case("attention", "soft keep, large logits", *[normal(*ONE, std=2.5)] * 3, soft_keep(1, 4)),
    case("attention", "soft keep, cross", normal(*CROSS_Q), normal(*CROSS_K), normal(*CROSS_K),
         soft_keep(1, 4),
         sees_itself=False),
    case("attention", "soft keep, not itself", *[normal(*ONE)] * 3, soft_keep(1, 4), sees_itself=False),
    case("attention", "hard keep", *[normal(*THREE)] * 3, HARD3, fixed=("keep",)),
    case("attention", "hard keep, weights", *[normal(*ONE)] * 3, HARD, fixed=("keep",), weights=True),
    case("attention", "hard keep, not itself", *[normal(*THREE)] * 3, HARD3, fixed=("keep",),
         sees_itself=False),
    case("attention", "official, soft keep", *[normal(*THREE)] * 3, soft_keep(3, 4), official=True),
    case("attention", "official, hard keep", *[normal(*THREE)] * 3, HARD3, official=True),
    case("attention", "official, weights", *[normal(*ONE)] * 3, soft_keep(1, 4), official=True, weights=True),
    case("attention", "official, not itself", *[normal(*ONE)] * 3, HARD, official=True, sees_itself=False),
    case("lookup_gather", "", normal(*CROSS_Q), normal(*CROSS_K), normal(*CROSS_K)),
    case("lookup_gather", "three images", normal(3, 1, 2, 5), normal(3, 1, 4, 5), normal(3, 1, 4, 5)),
    *[case("lookup_infuse", reuse, positive(1, 2, 3, 4), normal(1, 2, 3, 4), normal(1, 2, 3, 5), reuse=reuse)
      for reuse in ("probs", "renorm", "resoftmax")],
]
select = [
    case("gumbel_softmax", "", normal(2, 3, 2), gumbel(2, 3, 2)),
    case("gumbel_softmax", "tau", normal(2, 5), gumbel(2, 5), tau=0.7),
    case("gumbel_softmax", "hard", normal(2, 3, 2), gumbel(2, 3, 2), tau=0.7, hard=True, smooth=False),
    case("take_tokens", "one row twice", normal(2, 5, 3), given([[4, 0, 4, 1], [2, 1, 0, 3]], int)),
    case("put_tokens", "one row twice", normal(2, 4, 3), given([[4, 0, 4, 1], [2, 1, 0, 3]], int), length=5),
]
grid = [
    case("patchify", "", normal(2, 3, 4, 6), patch=2),
    case("resize", "smaller", normal(2, 12, 3), grid=(3, 4), size=(2, 3)),
    case("resize", "larger", normal(1, 6, 2), grid=(2, 3), size=(3, 5)),
    case("resize", "not antialiased", normal(2, 20, 3), grid=(4, 5), size=(2, 3), antialias=False),
    case("roi_align", "", normal(2, 12, 3), BOXES, fixed=("boxes",), grid=(3, 4), size=2),
    case("roi_align", "one sample", normal(2, 20, 2), BOXES, fixed=("boxes",), grid=(4, 5), size=3, samples=1),
]
window = [
    *[case(name, note, normal(*shape), **dict(grid=(4, 6), window=(2, 3)) | settings)
      for name, shapes in (("cut_windows", [(2, 24, 3), (2, 24, 3), (1, 15, 2)]),
                           ("join_windows", [(8, 6, 3), (8, 6, 3), (6, 4, 2)]))
      for shape, (note, settings) in zip(shapes, (
          ("", {}), ("shifted", dict(shift=(1, 2))),
          ("shifted, filled up", dict(grid=(3, 5), window=(2, 2), shift=(1, 0)))))],
    case("cut_overlapping", "", normal(2, 20, 3), grid=(4, 5), window=(3, 2), count=(2, 3)),
    case("cut_overlapping", "one window", normal(2, 12, 2), grid=(3, 4), window=(2, 3), count=(1, 1)),
    case("max_in_windows", "parts that share rows", normal(3, 20, 2), window=(5, 4), parts=(3, 2)),
    case("max_in_windows", "the whole window", normal(2, 6, 3), window=(2, 3), parts=(1, 1)),
    case("relative_bias", "", normal(15, 4), window=(2, 3)),
    case("window_attention", "", *[normal(2, 3, 4, 5)] * 3, normal(3, 4, 4), grid=(2, 4), window=(2, 2)),
    case("window_attention", "shifted", *[normal(8, 1, 6, 3)] * 3, normal(1, 6, 6), grid=(4, 6),
         window=(2, 3), shift=(1, 2)),
    case("window_attention", "shifted, filled up", *[normal(12, 2, 4, 3)] * 3, normal(2, 4, 4), grid=(3, 5),
         window=(2, 2), shift=(1, 1)),
]
loss = [
    case("cross_entropy", "labels", normal(3, 5), integers(3, high=5)),
    case("cross_entropy", "labels, smoothing", normal(3, 5), integers(3, high=5), smoothing=0.2),
    case("cross_entropy", "soft targets", normal(3, 5), probabilities(3, 5)),
    case("cross_entropy", "soft targets, smoothing", normal(3, 5), probabilities(3, 5), smoothing=0.2),
    case("cross_entropy", "targets that do not sum to 1", normal(3, 5), positive(3, 5)),
    case("binary_cross_entropy", "", normal(2, 3, 4, std=2), soft_keep(2, 3, 4)),
    case("binary_cross_entropy", "labels", normal(3, 5, std=2), integers(3, 5, high=2)),
    case("kl_divergence", "", normal(3, 5), normal(3, 5)),
    case("mse", "all", normal(2, 3, 4), normal(2, 3, 4)),
    case("mse", "one axis", normal(2, 3, 4), normal(2, 3, 4), axis=-1),
    case("mse", "two axes", normal(2, 3, 4), normal(2, 3, 4), axis=(1, 2)),
]

CASES = [*arithmetic, *activation, *shape, *dense, *norm, *conv, *attend, *select, *grid, *window, *loss]
IDS = [c.id for c in CASES]
