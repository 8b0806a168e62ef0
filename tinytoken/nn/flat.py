"""Flat storage: parameters, their gradients and an optimiser's moments, each in one buffer."""
from collections.abc import Iterable
from typing import Any

from ..backend import Array, array_module, device_of
from ..errors import expect
from .module import Parameter


class Flat:
    """Parameters in one buffer, their gradients in another.

    So an optimiser, clipping and a sum over threads are one pass each. Parameters are ordered by (lr_scale,
    decay, frozen_steps); segments: (start, stop, lr_scale, decay, frozen_steps) of each such group. Each
    parameter begins at a multiple of 64 elements, where the fastest loads of a GPU can begin; the gaps are
    zeros, and stay zeros. A matrix that lies column by column goes on so: a product whose operand lies in
    another order has other last bits.
    """

    def __init__(self, params: list[Parameter]) -> None:
        first = params[0].data
        expect(all(p.dtype == first.dtype and device_of(p.data) == device_of(first) for p in params),
               "flatten", "parameters of more than one dtype or device")
        xp = array_module(first)
        size = sum(_aligned(p.size) for p in params)
        self.data, self.grad = xp.zeros(size, first.dtype), xp.zeros(size, first.dtype)
        self.groups = [_group(p) for p in params]
        self.segments: list[tuple[int, int, float, bool, int]] = []
        self.bounds: list[Any] = [None] * len(params)  # (start, stop, shape, order) of each parameter
        start = 0
        for i in sorted(range(len(params)), key=self.groups.__getitem__):
            start, group = _aligned(start), self.groups[i]
            stop = start + params[i].size
            self.bounds[i] = (start, stop, params[i].shape, _order(params[i].data))
            if self.segments and self.segments[-1][2:] == group:
                self.segments[-1] = (self.segments[-1][0], stop, *group)
            else:
                self.segments.append((start, stop, *group))
            start = stop
        self.views, self.grads = self.cut(self.data), self.cut(self.grad)
        for p, view, g in zip(params, self.views, self.grads):
            view[...] = p.data
            if p.grad is not None:
                g[...] = p.grad
            p.data, p.grad = view, g
            p.flat = self

    def cut(self, buffer: Array) -> list[Array]:
        """One view of `buffer` (laid out like data) per parameter, in the order of `params`."""
        return [buffer[start:stop].reshape(shape, order=order) for start, stop, shape, order in self.bounds]

    def by_rows(self, buffer: Array) -> Array:
        """A copy of `buffer`, laid out like data, in which every parameter lies row by row: for files, which
        say nothing of how a matrix lay in memory."""
        rows = buffer.copy()
        for part, (start, stop, *_) in zip(self.cut(buffer), self.bounds):
            rows[start:stop] = part.reshape(-1)
        return rows

    def take_rows(self, buffer: Array, rows: Array) -> None:
        """Set `buffer` to what `by_rows` made of it."""
        rows = buffer[...] = array_module(buffer).array(rows)
        for part, (start, stop, shape, _) in zip(self.cut(buffer), self.bounds):
            part[...] = rows[start:stop].reshape(shape)

    def holds(self, params: list[Parameter]) -> bool:
        """True while each of `params` is still in its place: the same views, in the same group."""
        return len(params) == len(self.views) and all(
            p.flat is self and p.data is view and p.grad is g and _group(p) == group
            for p, view, g, group in zip(params, self.views, self.grads, self.groups))


def _group(p):
    return (p.lr_scale, p.decay, p.frozen_steps)


def _order(array):
    """numpy's letter: "F" where the first index runs fastest, as in columns; else "C"."""
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def _aligned(size):
    return -(-size // 64) * 64


def flatten(params: Iterable[Parameter]) -> Flat:
    """The Flat storage of these parameters: the one they are in if it still holds, else a new one."""
    params = list(params)
    expect(params and all(isinstance(p, Parameter) for p in params), "flatten",
           "a list of Parameters expected")
    expect(len({id(p) for p in params}) == len(params), "flatten", "a parameter is given twice")
    flat = params[0].flat
    return flat if flat is not None and flat.holds(params) else Flat(params)
