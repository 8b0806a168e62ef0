"""Counter-based random numbers: Philox4x32-10.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".

A draw is a pure function of (seed, site, step, element). There is no state, so NumPy and CuPy give the same
bits, a resumed run draws what an uninterrupted one draws, and more micro-batches or threads change nothing.
`site` names the place that draws (a string is hashed with crc32; by convention the module's path), `step` is
the trainer's step. A draw without a step takes the count of such draws since `manual_seed` as its step, so
that two calls differ.
"""
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from .backend import Array, array_module, faster, is_array, to_numpy
from .errors import expect

MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_default: dict[str, Any] = {"seed": 0, "draws": itertools.count()}
Shape: TypeAlias = int | Sequence[int]


def manual_seed(seed: int) -> None:
    """Set the default seed, 0 <= int < 2**64, and count the draws without a step from zero again."""
    _check_seed(seed)
    _default.update(seed=seed, draws=itertools.count())


def philox4x32(counter: Sequence[Any], key: Sequence[int], rounds: int = 10) -> tuple[Array, ...]:
    """The block cipher. counter: four uint32 arrays, key: two ints -> four uint32 arrays of that shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A 32 x 32 bit product needs 64 bits; its two halves are the cipher's mixing.
        p0, p1 = c0.astype("uint64") * MULTIPLIER[0], c2.astype("uint64") * MULTIPLIER[1]
        high0, low0 = (p0 >> 32).astype("uint32"), p0.astype("uint32")
        high1, low1 = (p1 >> 32).astype("uint32"), p1.astype("uint32")
        c0, c1 = high1 ^ c1 ^ k0, low1
        c2, c3 = high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def bits(shape: Shape, *, site: str | int, step: Any = None, seed: int | None = None, xp: Any = np) -> Array:
    """Uniform uint32. Element i is word i % 4 of the block with counter (i // 4, site, step, 0).

    step: an int, or a uint32 array (1,) on a GPU, which the kernels of cuda/ read when they run; InputError
    for an array where they do not draw.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    seed = _default["seed"] if seed is None else seed
    step = next(_default["draws"]) if step is None else step
    # surrogates: a site may hold the name of a folder, which need not be text
    site = zlib.crc32(site.encode("utf-8", "surrogatepass")) if isinstance(site, str) else site
    _check_seed(seed)
    seed, size = int(seed), math.prod(shape)  # a NumPy integer would make the words 64 bits wide
    on_device = is_array(step)
    fast = faster(bits, xp, shape, site=site, step=step, seed=seed, xp=xp)
    expect(fast or not on_device, "random", "the step's number lies on a GPU, and is asked for by the host")
    expect(0 <= site < 2**32 and (on_device or 0 <= step < 2**32), "random",
           lambda: f"site {site} and step {step} must fit in 32 bits")
    if fast:
        return fast(shape, site=site, step=step, seed=seed, xp=xp)
    block = xp.arange((size + 3) // 4, dtype="uint32")
    constant = [xp.full(block.shape, word, dtype="uint32") for word in (site, step, 0)]
    words = philox4x32((block, *constant), (seed & 0xFFFFFFFF, seed >> 32))
    return xp.stack(words, axis=-1).reshape(-1)[:size].reshape(shape)


def uniform(shape: Shape, *, site: str | int, step: Any = None, seed: int | None = None, xp: Any = np,
            dtype: str = "float32") -> Array:
    """Uniform in (0, 1), both ends excluded: ((bits >> 9) + 0.5) * 2**-23.

    23 bits, since with 24 the largest value would round to 1.
    """
    draw = bits(shape, site=site, step=step, seed=seed, xp=xp)
    return ((draw >> 9).astype(dtype) + 0.5) * 2.0**-23


def normal(shape: Shape, *, site: str | int, step: Any = None, seed: int | None = None, xp: Any = np,
           dtype: str = "float32") -> Array:
    """Standard normal by Box and Muller (1958): sqrt(-2 log u1) cos(2 pi u2)."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    pair = uniform((*shape, 2), site=site, step=step, seed=seed, xp=xp, dtype=dtype)
    return xp.sqrt(-2 * xp.log(pair[..., 0])) * xp.cos(2 * math.pi * pair[..., 1])


def gumbel(shape: Shape, *, site: str | int, step: Any = None, seed: int | None = None, xp: Any = np,
           dtype: str = "float32") -> Array:
    """Standard Gumbel, -log(-log u): always finite, since 0 < u < 1 (see `uniform`)."""
    return -xp.log(-xp.log(uniform(shape, site=site, step=step, seed=seed, xp=xp, dtype=dtype)))


def integers(shape: Shape, high: int, *, site: str | int, step: Any = None, seed: int | None = None,
             xp: Any = np) -> Array:
    """int64 in [0, high): (bits * high) >> 32. No value's probability is off 1 / high by more than 2**-32."""
    expect(0 < high <= 2**32, "random.integers", f"high is {high}, expected 1 to 2**32")
    draw = bits(shape, site=site, step=step, seed=seed, xp=xp).astype("uint64")
    return ((draw * high) >> 32).astype("int64")


def uniform_of(array: Array, shape: Shape, *, site: str | int) -> Array:
    """`uniform` draws, on the array's device, that are a function of its contents: the same array, the same
    draws. On a GPU this waits for the array."""
    checksum = zlib.crc32(to_numpy(array).tobytes())
    return uniform(shape, site=site, step=checksum, seed=0, xp=array_module(array))


def permutation(n: int, *, site: str | int, step: Any = None, seed: int | None = None,
                xp: Any = np) -> Array:
    """A random order of 0 .. n-1 as int64: the order of n draws of 64 bits, too many bits for ties."""
    draw = bits((n, 2), site=site, step=step, seed=seed, xp=xp).astype("uint64")
    return xp.argsort((draw[:, 0] << 32) | draw[:, 1], kind="stable").astype("int64")


def _check_seed(seed):
    expect(isinstance(seed, (int, np.integer)) and 0 <= seed < 2**64, "random",
           f"seed {seed!r}, expected 0 <= int < 2**64")
