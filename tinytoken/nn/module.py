"""Modules: parameters and buffers by name, training and inference mode, state dicts."""
import contextlib
import contextvars
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

import numpy as np

from ..backend import FLOATS, Array, device_of, native_array, swapped, to_device, to_numpy
from ..cost import running_modules
from ..errors import expect, some_of
from ..tensor import Tensor


class Parameter(Tensor):
    """A leaf Tensor that a model learns.

    decay: whether weight decay applies to it (to matrices of linear layers). lr_scale: its learning rate,
    relative to the others'; for the first frozen_steps steps of an optimiser it is 0. flat: the Flat storage
    that it lies in, if any; parameters of equal (lr_scale, decay, frozen_steps) are neighbours there."""
    __slots__ = ("decay", "lr_scale", "frozen_steps", "flat")

    def __init__(self, array: Array, decay: bool = False) -> None:
        check_room(array.size, take=True)
        super().__init__(array, requires_grad=True)
        self.decay, self.lr_scale, self.frozen_steps = decay, 1.0, 0
        self.flat: Any = None

    def __deepcopy__(self, memo):
        twin = Parameter(self.data.copy(), self.decay)
        twin.lr_scale, twin.frozen_steps = self.lr_scale, self.frozen_steps
        twin.requires_grad = self.requires_grad
        return twin


_room: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("room", default=None)


@contextlib.contextmanager
def at_most(values: int) -> Iterator[None]:
    """Context: the parameters made in it may have so many values in all; InputError for one more.

    For sizes that come from a file: a depth of 10^9 ends at the first block that the file cannot fill."""
    token = _room.set([values])
    try:
        yield
    finally:
        _room.reset(token)


def check_room(values: int, take: bool = False) -> None:
    """InputError if `at_most` leaves no room for so many values more. take: they have it now."""
    room = _room.get()
    if room is not None:
        expect(values <= room[0], "parameters",
               f"{values:,} more are asked for, and the weights that are there have room for {room[0]:,}")
        room[0] -= values if take else 0


def zeros(*shape: int) -> np.ndarray:
    """Zeros in float32 for a parameter of this shape, if `at_most` leaves room for it."""
    check_room(math.prod(shape))
    return np.zeros(shape, "float32")


class Buffer:
    """An array of a module's state that is not learned: a running mean, for example.

    It has no gradient, and no optimiser changes it. It is saved, loaded and moved with the parameters; if it
    holds floats, it is cast with them, too."""

    def __init__(self, array: Array) -> None:
        self.data = native_array(array)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)

    def follow(self, value: Array, momentum: float) -> None:
        """Move by `momentum` of the way to `value`, as a running mean does; inside `noted`, note it only."""
        if _noting.notes is not None:
            _noting.notes.append((self, value, momentum))
            return
        self.data *= 1 - momentum
        self.data += momentum * value

    def __repr__(self):
        return f"Buffer({self.data}, shape {self.shape}, {self.dtype})"


Note: TypeAlias = tuple[Buffer, Array, float]  # the arguments of a call of Buffer.follow


class _Noting(threading.local):
    notes: list[Note] | None = None


_noting = _Noting()


def noted() -> contextlib.AbstractContextManager[list[Note]]:
    """Context -> a list: buffers do not follow what this thread computes, and the list says what they were to
    follow."""
    return swapped(_noting, "notes", [])


def follow_all(notes: Sequence[Sequence[Note]], shares: Sequence[float]) -> None:
    """Let the buffers follow what the slices of a batch noted, once each: the mean of the slices' values,
    added up in their order. shares: each slice's part of the images."""
    expect(len({tuple(id(buffer) for buffer, _, _ in slice) for slice in notes}) == 1, "buffers",
           "slices of one batch that update other buffers, or in another order")
    for updates in zip(*notes):
        buffer, _, momentum = updates[0]
        buffer.follow(sum(value * share for (_, value, _), share in zip(updates, shares)), momentum)


class Module:
    """Something with parameters. Subclasses write forward(); calling the module runs it.

    Parameters, buffers, modules and lists of modules among its attributes have names, in the order in which
    they were set."""
    training = True

    def __call__(self, *args, **kwargs):
        stack = running_modules()
        stack.append(self)
        try:
            return self.forward(*args, **kwargs)
        finally:
            stack.pop()

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """(name, module) of the modules directly inside."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """(dotted name, module) of this module ('') and all inside."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, Parameter) of all parameters."""
        return self._named(Parameter)

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        """(dotted name, Buffer) of all buffers."""
        return self._named(Buffer)

    def _named(self, classes):
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, classes):
                    yield (f"{prefix}.{name}" if prefix else name), value

    def parameters(self) -> list[Parameter]:
        """All parameters, in the order of their names."""
        return [p for _, p in self.named_parameters()]

    def parameter_count(self) -> int:
        """How many values the model learns."""
        return sum(p.size for p in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """Set training mode (eval(): inference) here and inside. Returns self."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Inference mode. Returns self."""
        return self.train(False)

    def requires_grad_(self, wanted: bool = True) -> Self:
        """Freeze (False) or unfreeze all parameters. Returns self."""
        for p in self.parameters():
            p.requires_grad = wanted
        return self

    def zero_grad(self) -> None:
        """Fill every gradient with zeros."""
        for p in self.parameters():
            if p.grad is not None:
                p.grad[...] = 0

    def astype(self, dtype: str | np.dtype) -> Self:
        """Cast all parameters and float buffers to float32 or float64. Returns self.

        The parameters leave flat storage. InputError for another dtype: of float16 or int the values would
        be others, and no op would take them."""
        try:
            name = np.dtype(dtype).name
        except TypeError:  # none at all
            name = repr(dtype)
        expect(name in FLOATS, "astype", f"{name}, expected float32 or float64")
        for p in self.parameters():
            p.data, p.grad = p.data.astype(dtype), None
        for _, buffer in self.named_buffers():
            if buffer.dtype.kind == "f":
                buffer.data = buffer.data.astype(dtype)
        return self

    def to(self, device: str) -> Self:
        """Move all parameters and buffers to 'cpu' or 'cuda'. Returns self.

        Those that are there already stay as they are; those that move leave flat storage."""
        for p in self.parameters():
            if p.device != device:
                p.data, p.grad = to_device(p.data, device), None
        for _, buffer in self.named_buffers():
            buffer.data = to_device(buffer.data, device)
        return self

    @property
    def dtype(self) -> np.dtype:
        """That of the parameters."""
        return next(p.dtype for p in self.parameters())

    def state_dict(self) -> dict[str, np.ndarray]:
        """{name: array} of parameters and buffers, copies in host memory."""
        return {name: np.array(to_numpy(p.data), order="C") for name, p in self._named((Parameter, Buffer))}

    def load_state_dict(self, state: Mapping[str, np.ndarray],
                        strict: bool = True) -> tuple[list[str], list[str]]:
        """Copy arrays in by name -> (missing, unexpected) names, which must be empty if `strict`.

        Shapes must always agree. float32 and float64 keep their width (float64 weights make a float64 model);
        float16 and bfloat16 become float32, with a warning; mixed widths raise InputError. Nothing is changed
        if anything is refused.
        """
        expect(isinstance(state, Mapping), "load_state_dict",
               lambda: f"a {type(state).__name__}, expected arrays by name")
        own = dict(self._named((Parameter, Buffer)))
        missing = [n for n in own if n not in state]
        unexpected = [n for n in state if n not in own]
        expect(not strict or not (missing or unexpected), "load_state_dict",
               lambda: f"missing {some_of(missing)}; unexpected {some_of(unexpected)}")
        arrays = _one_width({name: native_array(state[name]) for name in own if name in state}, own)
        wrong = [f"{n} {arrays[n].shape}, expected {own[n].shape}" for n in arrays
                 if arrays[n].shape != own[n].shape]
        fits = any(entry.startswith(("head", "pos_embed")) for entry in wrong)
        expect(not wrong, "load_state_dict", lambda: f"other shapes: {some_of(wrong)}",
               "tt.models.load_weights, which resizes pos_embed and can leave out the head (new_head=True)"
               if fits else "")
        width = next((a.dtype for a in arrays.values() if a.dtype.kind == "f"), self.dtype)
        if width != self.dtype:
            self.astype(width)
        for name, array in arrays.items():
            own[name].data[...] = to_device(array, device_of(own[name].data))
        return missing, unexpected

    def summary(self) -> str:
        """A table of the modules that own parameters: name, class, shapes, how many values."""
        rows = []
        for name, module in self.named_modules():
            owned = [p for p in vars(module).values() if isinstance(p, Parameter)]
            if owned:
                rows.append((name or "(model)", type(module).__name__, ", ".join(str(p.shape) for p in owned),
                             sum(p.size for p in owned)))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{name:<{widths[0]}}  {cls:<{widths[1]}}  {shapes:<{widths[2]}}  {size:>10,}"
                 for name, cls, shapes, size in rows]
        return "\n".join(lines + [f"{type(self).__name__}: {self.parameter_count():,} parameters"])


def _one_width(arrays, own):
    """The arrays with all floats in one width, narrow ones made float32.

    own: the parameters and buffers that they are for; a buffer of integers takes its own dtype alone."""
    whole = [n for n in arrays if own[n].dtype.kind != "f"]
    wrong = [f"{n} {arrays[n].dtype}, expected {own[n].dtype}" for n in whole
             if arrays[n].dtype != own[n].dtype]
    expect(not wrong, "load_state_dict", lambda: f"other dtypes: {some_of(wrong)}")
    narrow = [n for n, a in arrays.items() if a.dtype.name in ("float16", "bfloat16")]
    if narrow:
        warnings.warn(f"load_state_dict: {len(narrow)} arrays of dtype {arrays[narrow[0]].dtype} become "
                      f"float32", stacklevel=3)
        arrays = {n: a.astype("float32") if n in narrow else a for n, a in arrays.items()}
    widths = {a.dtype.name for n, a in arrays.items() if n not in whole}
    expect(widths <= {"float32"} or widths <= {"float64"}, "load_state_dict",
           lambda: f"dtypes {', '.join(sorted(widths))}, expected all float32 or all float64")
    return arrays
