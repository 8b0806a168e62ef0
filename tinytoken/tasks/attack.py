"""Pictures that are changed a little, within a bound, so that a model errs: a measurement of robustness, on
models that were trained here. Each method goes up the gradient of an objective in the picture.

FGSM: Goodfellow et al. 2015, arXiv 1412.6572. PGD: Madry et al. 2018, arXiv 1706.06083. MI-FGSM: Dong et al.
2018, arXiv 1710.06081. DIM: Xie et al. 2019, arXiv 1803.06978. TI: Dong et al. 2019, arXiv 1904.02884.
"""
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import ops, random
from ..backend import Array, array_module
from ..errors import expect, shape_of
from ..tensor import Tensor, grad

METHODS = ("fgsm", "pgd", "mifgsm", "dim", "ti", "noise")
KERNEL = 5  # of TI, in pixels; 15 in the paper, for pictures of 299
SMALLEST = 0.875  # of DIM: the side of a picture after it was resized, as a share


def perturb(objective: Callable[[Tensor], Tensor], images: Array, eps: float, method: str = "mifgsm", *,
            steps: int = 10, pgd_step: float = 2 / 255, decay: float = 1.0, seed: int = 0) -> Array:
    """Pictures (B, C, H, W) from 0 to 1 -> others within eps of them, also from 0 to 1.

    objective(x): the sum over the pictures of what is to grow, a loss; where a model wants pictures
    normalised, it does that. method: "fgsm": one step; "pgd": steps of pgd_step, back into the bound after
    each; "mifgsm": steps of eps / steps along gradients that add up, each divided by its mean size, `decay`
    of what was before; "dim": the same, and half of the steps see the pictures smaller, in a random place;
    "ti": as "mifgsm", with blurred gradients; "noise": every value moves by eps up or down, at random, a
    control. InputError for another method, a negative eps, or pictures that are not from 0 to 1."""
    expect(method in METHODS, "perturb", f"method {method!r}, expected one of {', '.join(METHODS)}")
    expect(eps >= 0 and isinstance(steps, int) and steps > 0, "perturb",
           f"eps {eps!r}, steps {steps!r}: expected eps >= 0 and at least one step")
    xp = array_module(images)
    fits = images.ndim == 4 and images.dtype.kind == "f" and bool(((0 <= images) & (images <= 1)).all())
    expect(fits, "perturb", lambda: f"{shape_of('images', images)} {images.dtype} from {images.min()} to "
                                    f"{images.max()}, expected (B, C, H, W) floats from 0 to 1")
    if method == "noise":
        signs = 2 * random.integers(images.shape, 2, site="attack.noise", step=0, seed=seed, xp=xp) - 1
        return (images + eps * signs).clip(0, 1).astype(images.dtype)
    steps = 1 if method == "fgsm" else steps
    size, x, total = pgd_step if method == "pgd" else eps / steps, images, 0
    for step in range(steps):
        leaf = Tensor(x, requires_grad=True)
        g = grad(objective(moved(leaf, step, seed) if method == "dim" else leaf), leaf)
        if method == "ti":
            K = blur(g.shape[2]), blur(g.shape[3])
            g = xp.asarray(K[0], g.dtype) @ g @ xp.asarray(K[1].T, g.dtype)
        if method in ("mifgsm", "dim", "ti"):
            total = g = total * decay + g / xp.maximum(abs(g).mean(axis=(1, 2, 3), keepdims=True), 1e-30)
        x = (x + size * xp.sign(g)).clip(images - eps, images + eps).clip(0, 1).astype(images.dtype)
    return x


def moved(x: Tensor, step: int, seed: int) -> Tensor:
    """In half of the steps the pictures, resized to a random smaller side, at a random place on black."""
    u = random.uniform(4, site="attack.dim", step=step, seed=seed)
    if u[0] < 0.5:
        return x
    for axis, place in ((2, u[2]), (3, u[3])):
        side = x.shape[axis]
        small = math.ceil(side * (SMALLEST + (1 - SMALLEST) * u[1]))
        first, matrix = math.floor(place * (side - small + 1)), np.zeros((side, side))
        matrix[first:first + small] = ops.resize_matrix((side, 1), (small, 1))
        matrix = array_module(x.data).asarray(matrix, x.dtype)
        x = ops.matmul(matrix, x) if axis == 2 else ops.matmul(x, matrix.T)
    return x


def blur(side: int) -> np.ndarray:
    """(side, side): the matrix of a Gaussian over KERNEL pixels, of three standard deviations at its ends."""
    away = abs(np.subtract.outer(np.arange(side), np.arange(side)))
    reach = KERNEL // 2
    kernel = np.exp(-0.5 * (3 * away / reach) ** 2) * (away <= reach)
    return kernel / np.exp(-0.5 * (3 * np.arange(-reach, reach + 1) / reach) ** 2).sum()


def of_last(out: Any, labels: Array) -> Tensor:
    """An objective: the cross-entropy of the logits, summed over the pictures."""
    return ops.cross_entropy(out.logits, labels) * len(labels)


def of_all_blocks(out: Any, labels: Array) -> Tensor:
    """The self-ensemble of Naseer et al.: the sum of an ATViT's blocks."""
    total: Any = 0
    for logits in out.by_block:
        total = total + ops.cross_entropy(logits, labels) * len(labels)
    return total
