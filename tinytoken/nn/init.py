"""Starting weights: at this scale they matter more than the learning rate or the batch size."""
import math
import re

import numpy as np

from .. import random
from ..backend import array_module
from .conv import Conv2d
from .layers import Linear, Projection
from .module import Module, Parameter, check_room


def xavier(weight: Parameter, name: str, parts: int = 1, scale: float = 1.0) -> None:
    """Glorot & Bengio 2010, eq. 16: uniform in +-sqrt(6 / (in + out)) x scale.

    weight (out, in) or, for patches, (out, C, p, p). parts: how many matrices are packed in it (qkv: 3); each
    counts by itself."""
    out, inputs = len(weight), math.prod(weight.shape[1:])
    bound = scale * math.sqrt(6 / (inputs + out // parts))
    draw = random.uniform(weight.shape, site=name, step=0, xp=array_module(weight.data))
    weight.data[...] = (2 * draw - 1) * bound


def he(weight: Parameter, name: str) -> None:
    """He et al. 2015, arXiv 1502.01852, eq. 10, for layers that ReLU follows: uniform in +-sqrt(6 / in), so
    of variance 2 / in. weight (O, C / groups, kh, kw): in = C / groups x kh x kw."""
    bound = math.sqrt(6 / math.prod(weight.shape[1:]))
    draw = random.uniform(weight.shape, site=name, step=0, xp=array_module(weight.data))
    weight.data[...] = (2 * draw - 1) * bound


def normal(parameter: Parameter, name: str, std: float) -> None:
    """Normal draws of standard deviation `std`."""
    draw = random.normal(parameter.shape, site=name, step=0, xp=array_module(parameter.data))
    parameter.data[...] = draw * std


BRANCH_ENDS = re.compile(r"(attn\.proj(_[xc])?|attention\d\.proj|mlp\.(fc2|[23])|(gather|infuse)_proj"
                         r"|fast_path\.1|fastmlp\.fc1\.1)$")


def initialise(model: Module, residual_scale: float = 0.3, keys_as_queries: bool = False) -> None:
    """Xavier for every linear layer and the patch embedding; the layers that end a residual branch are scaled
    down by `residual_scale`. He for convolutions.

    keys_as_queries: the projections to keys start as copies of those to queries, in each module that has such
    a pair and says so with `tie_keys`. Then a token first reads what is like it: q . k is a square length for
    two equal tokens. (With weights of their own the first scores are unrelated to the tokens' likeness.)

    Each layer draws from a site of its own name with the default key: a model's weights depend on
    `manual_seed` and on nothing that was made before."""
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Projection)):
            scale = residual_scale if BRANCH_ENDS.search(name) else 1.0
            xavier(module.weight, f"{name}.weight", module.parts, scale)
        elif isinstance(module, Conv2d):
            he(module.weight, f"{name}.weight")
    for _, module in model.named_modules() if keys_as_queries else ():
        if hasattr(module, "tie_keys"):
            module.tie_keys()


def sincos_positions(grid: tuple[int, ...], dim: int) -> np.ndarray:
    """The sine-cosine table of a grid (h, w), (h w, dim) float32: a quarter of the channels each for sin and
    cos of column and of row. Of a grid (t, h, w) of a clip, (t h w, dim): a sixth each, those of the time
    last."""
    check_room(math.prod(grid) * dim)
    channels = dim // (2 * len(grid))
    frequencies = 10000.0 ** (-np.arange(channels) / channels)
    angles = [place.reshape(-1, 1) * frequencies for place in np.indices(grid).astype("float64")]
    table = np.concatenate([wave(angle) for angle in angles[::-1] for wave in (np.sin, np.cos)], axis=1)
    return np.pad(table, ((0, 0), (0, dim - table.shape[1]))).astype("float32")


def start_positions(grid: tuple[int, ...], dim: int) -> np.ndarray:
    """The position table that models start from, (h w, dim) or (t h w, dim): the sine-cosine table x 0.7,
    then learned."""
    return sincos_positions(grid, dim) * 0.7


def sinusoids(places: int, dim: int) -> np.ndarray:
    """The table of Vaswani et al. 2017, section 3.5, (places, dim) float32: place p has sin(p f) in even
    channels and cos(p f) in odd ones, f falling from 1 to nearly 1 / 10,000."""
    angles = np.arange(places)[:, None] * 10000.0 ** (-(np.arange(dim) // 2 * 2) / dim)
    return np.where(np.arange(dim) % 2, np.cos(angles), np.sin(angles)).astype("float32")
