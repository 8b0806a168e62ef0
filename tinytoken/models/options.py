"""Options of models: what is checked of all, and the sizes of those with one width."""
import dataclasses
import math
import numbers
from typing import Any, ClassVar

import numpy as np

from .. import nn
from ..errors import expect


def is_number(value: Any) -> bool:
    """A whole or broken number, of Python or NumPy; no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """A whole number, of Python or NumPy; no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def one_of(value: Any, *values: Any) -> bool:
    """Whether it is one of the values. (An array would be compared element by element.)"""
    return not isinstance(value, np.ndarray) and value in values


def check_ratios(c: Any, ratios: tuple[float, ...], falling: bool = True) -> None:
    """InputError for shares to keep, of a configuration or a call, that are not from 0 to 1. falling: or that
    rise."""
    c.check(all(0 < r <= 1 for r in ratios), f"keep_ratios {ratios}, expected 0 < ratio <= 1")
    c.check(not falling or list(ratios) == sorted(ratios, reverse=True),
            f"keep_ratios {ratios} rise; they are of the original number of tokens, so they cannot")


class Options:
    """A configuration of a model, the base of its dataclass. It has image_size: H = W, or (H, W), in pixels,
    patch_size and channels.

    choices: {option: the values that it may have}. positive: the options that are positive whole numbers;
    by_stage: those that are tuples of such, or None."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    positive: ClassVar[tuple[str, ...]] = ()
    by_stage: ClassVar[tuple[str, ...]] = ()
    image_size: int | tuple[int, int]
    patch_size: int
    channels: int

    def __post_init__(self, *_: Any) -> None:
        choices: dict[str, tuple[str, ...]] = {}  # those of the classes above, too
        for cls in reversed(type(self).__mro__):
            choices |= vars(cls).get("choices", {})
        for name, values in choices.items():
            expected = f"one of {', '.join(values)}" if len(values) > 2 else " or ".join(values)
            self.check(one_of(getattr(self, name), *values),
                       f"{name} {getattr(self, name)!r}, expected {expected}")
        self.check(not isinstance(self.image_size, (tuple, list)) or len(self.image_size) == 2,
                   f"image_size {self.image_size!r}, expected H, or (H, W)")
        sizes = [("image_size", side) for side in nn.both_sides(self.image_size)]
        sizes += [(name, getattr(self, name)) for name in self.positive]
        for name in self.by_stage:
            value = getattr(self, name)
            self.check(value is None or isinstance(value, (tuple, list)) and value,
                       f"{name} {value!r}, expected a number for each stage")
            sizes += [(name, each) for each in value or ()]
        for name, size in sizes:
            self.check(is_whole(size) and size > 0,
                       f"{name} {getattr(self, name)!r}, expected a positive whole number")
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            self.check(field.type is not bool or one_of(value, True, False),
                       f"{field.name} {value!r}, expected True or False")
            self.check(not field.name.endswith("mlp_ratio") or is_number(value) and 0 < value < math.inf,
                       f"{field.name} {value!r}, expected a positive number")
            if isinstance(value, list):  # a config read from JSON has lists for tuples
                self.settle(field.name, tuple(value))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one picture as the model takes it, (channels, H, W)."""
        return (self.channels, *nn.both_sides(self.image_size))

    def settle(self, name: str, value: Any) -> None:
        """Set an option while the configuration is made; later it cannot be changed."""
        object.__setattr__(self, name, value)

    def check(self, ok: Any, message: str) -> None:
        """InputError with the model's name and the message unless ok."""
        expect(ok, type(self).__name__.removesuffix("Config"), message)


@dataclasses.dataclass(frozen=True)
class Sizes(Options):
    """The options that every model with one width has; a model's own configuration adds to them.

    patch_size: in pixels. mlp_ratio: the hidden width of the MLPs, divided by dim. keys_as_queries: how the
    attention's weights start, see nn.initialise."""
    image_size: int | tuple[int, int] = 32
    patch_size: int = 4
    dim: int = 96
    depth: int = 6
    heads: int = 3
    mlp_ratio: float = 4
    num_classes: int = 10
    _: dataclasses.KW_ONLY
    channels: int = 3
    keys_as_queries: bool = False
    pre_norm = False  # fixed here; ColumnConfig makes an option of it
    positive: ClassVar[tuple[str, ...]] = ("patch_size", "dim", "depth", "heads", "num_classes", "channels")
