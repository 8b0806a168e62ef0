"""What all models share: the registry, sizes, the output, and the methods that training and the command line
call."""
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .. import nn, ops
from ..backend import Array
from ..errors import InputError, expect
from ..registry import Registry
from ..tensor import Tensor

model = Registry("model")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The configuration of a model of square or other pictures; a model adds what it has of its own.
    image_size: H = W, or (H, W) in pixels. patch_size: pixels. mlp_ratio: hidden width of the MLPs over
    dim."""
    image_size: int | tuple[int, int] = 32
    patch_size: int = 4
    dim: int = 96
    depth: int = 6
    heads: int = 3
    mlp_ratio: float = 4
    num_classes: int = 10
    _: dataclasses.KW_ONLY
    channels: int = 3
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # option: the values that it may have; no field

    def __post_init__(self):
        for name, values in self.choices.items():
            expect(getattr(self, name) in values, self.where,
                   lambda: f"{name} {getattr(self, name)!r}, expected "
                   f"{'one of ' * (len(values) > 2)}{(', ' if len(values) > 2 else ' or ').join(values)}")
        whole = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sizes)
                 if field.type is int}
        expect(not isinstance(self.image_size, (tuple, list)) or len(self.image_size) == 2, self.where,
               lambda: f"image_size {self.image_size!r}, expected H, or (H, W)")
        sides = nn.both_sides(self.image_size)
        for name, size in [*(("image_size", side) for side in sides), *whole.items()]:
            expect(isinstance(size, (int, np.integer)) and size > 0, self.where,
                   f"{name} {getattr(self, name)!r}, expected a positive whole number")
        expect(self.mlp_ratio > 0, self.where, f"mlp_ratio {self.mlp_ratio}, expected a positive number")
        for field in dataclasses.fields(self):  # as JSON gives it back: lists for tuples
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)

    @property
    def where(self):
        """The model's name, for messages."""
        return type(self).__name__.removesuffix("Config")


@dataclasses.dataclass
class Output:
    """What a model returns, in every mode. logits (B, K); tokens: final-norm patch tokens (B, N, D), for
    LookupViT the compressed ones (B, M, D); attention[l], with trace=True: the weights of block l, (B, H, T,
    T), for LookupViT those of the gather, (B, H, M, N). A method's own output adds what the method has."""
    logits: Tensor
    tokens: Tensor | None = None
    attention: list[Tensor] = dataclasses.field(default_factory=list)


class Model(nn.Module):
    """A model of this package. Config: its dataclass; `config` is the one it was made with; build(config)
    makes its parts. task: the name of the task that trains it (tasks/)."""
    Config: type[Sizes]
    task = "classify"
    loss_weights: tuple[float, ...] = (1, 0.5)  # of the parts of `loss` where there is a teacher

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        if "Config" in vars(cls):  # so that help() shows the options
            cls.__signature__ = inspect.signature(cls.Config)

    def __init__(self, *sizes, **options):
        try:
            self.config = self.Config(*sizes, **options)
        except TypeError as error:
            if not str(error).startswith(f"{self.Config.__name__}.__init__()"):
                raise
            raise InputError(f"{type(self).__name__}: {str(error).partition(' ')[2]}; it takes "
                             f"{type(self).__signature__}") from None
        self.build(self.config)

    def build(self, c):
        """Make the parts of a model with the configuration c."""
        raise NotImplementedError

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: Sequence[float] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy -> (loss, parts). out: of this model; teacher: the Output of one that is right more
        often, whose answers are learned too (KL divergence). weights: of both."""
        parts = {"class": ops.cross_entropy(out.logits, targets, smoothing=smoothing)}
        if teacher is None:
            return parts["class"], parts
        parts["kl"] = ops.kl_divergence(out.logits, teacher.logits)
        return weighted_sum(weights or self.loss_weights, parts), parts

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        """What a training step draws for a batch of `size` images, by image number: {argument of the call:
        array (B, ...)}."""
        return {}

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        """What the model did with a batch of pictures, out of trace=True -> [(title, (B, N) array)]: boolean
        ones are the patches that it kept, others are weights over the patches."""
        return []


def weighted_sum(weights, parts):
    """The sum of the parts {name: Tensor}, each times its weight; first to last."""
    loss = 0
    for weight, part in zip(weights, parts.values()):
        loss = loss + part * weight
    return loss


def create(name: str, **config: Any) -> Model:
    """A new model by its registered name: create("vit", dim=96). config: see its class. InputError for a name
    or an option that does not exist."""
    return model.pick(name)(**config)


def names() -> list[str]:
    """The names of all models."""
    return list(model)
