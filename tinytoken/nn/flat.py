"""Flat storage: parameters, their gradients and an optimiser's moments, each in one buffer."""
from collections.abc import Iterable

from ..backend import array_module, device_of
from ..errors import expect
from .module import Parameter


class Flat:
    """Parameters laid into one buffer, gradients into another, ordered by (lr_scale, decay), so that an
    optimiser, clipping and a sum over threads are one pass each. segments: (start, stop, lr_scale, decay) of
    each group. Each parameter begins at a multiple of 64 numbers, where the fastest loads of a GPU can; the
    gaps are zeros, and stay so."""

    def __init__(self, params):
        first = params[0].data
        expect(all(p.dtype == first.dtype and device_of(p.data) == device_of(first) for p in params),
               "flatten",
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
        """True while every parameter and its gradient still are the views that they were given, in the group
        that it was in."""
        return len(params) == len(self.views) and all(
            p.flat is self and p.data is view and p.grad is g and _group(p) == group
            for p, view, g, group in zip(params, self.views, self.grads, self.groups))


def _group(p):
    return (p.lr_scale, p.decay)


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
