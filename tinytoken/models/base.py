"""What all models share: the registry, sizes, the output, and what training and the command line call."""
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np

from .. import nn, ops
from ..backend import Array
from ..errors import InputError, expect
from ..registry import Registry
from ..tensor import Tensor
from .options import Options, Sizes, is_number, is_whole, one_of

__all__ = ["Loss", "Model", "Models", "Options", "Output", "Sizes", "create", "cross_entropy_of", "is_number",
           "is_whole", "model", "names", "one_of", "weighted_sum"]


class Models(Registry):
    """{name: class}, the name being the class's in lower case: a checkpoint says the class's name."""

    def __call__(self, name: str) -> Callable:
        def register(cls):
            expect(cls.__name__.lower() == name, "model",
                   f"{cls.__name__} registered as {name!r}, expected {cls.__name__.lower()!r}")
            return super(Models, self).__call__(name)(cls)
        return register


model = Models("model")
Loss: TypeAlias = tuple[Tensor, dict[str, Tensor]]  # a loss, and the parts that it is made of, by name


@dataclasses.dataclass
class Output:
    """What a model returns, in every mode. A method's own output adds to it.

    logits (B, K). tokens: the patch tokens after the final norm, (B, N, D); LookupViT: the compressed ones,
    (B, M, D). attention[l], filled with trace=True: the weights of block l, (B, H, T, T); LookupViT: those of
    its gather, (B, H, M, N)."""
    logits: Tensor
    tokens: Tensor | None = None
    attention: list[Tensor] = dataclasses.field(default_factory=list)


class Model(nn.Module):
    """A model of this package.

    Config: the dataclass of its options; config: those it was made with; build(config) makes its parts.
    task: the name of the task that trains it (tasks/)."""
    Config: type[Options]
    config: Any
    __signature__: ClassVar[inspect.Signature]
    task = "classify"
    whole = False  # whether its loss is of a batch as a whole, not a mean over the pictures
    loss_weights: tuple[float, ...] = (1, 0.5)  # of the parts of `loss`, where there is a teacher

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        if "Config" in vars(cls):  # so that help() shows the options
            cls.__signature__ = inspect.signature(cls.Config)

    def __init__(self, *sizes: Any, **options: Any) -> None:
        try:
            self.config = self.Config(*sizes, **options)
        except TypeError as error:
            if not str(error).startswith(f"{self.Config.__name__}.__init__()"):
                raise
            raise InputError(f"{type(self).__name__}: {str(error).partition(' ')[2]}; it takes "
                             f"{type(self).__signature__}") from None
        self.build(self.config)

    def build(self, c: Any) -> None:
        """Make the parts of a model with the configuration c, a Config."""
        raise NotImplementedError

    def embedding(self, c: Any) -> Any:
        """What turns pictures into tokens, of a model with `Sizes`."""
        return nn.PatchEmbed(c.image_size, c.patch_size, c.dim, c.channels, bias=not c.pre_norm)

    def loss(self, out: Any, targets: Array, teacher: Any = None, *, smoothing: float = 0.0,
             weights: tuple[float, ...] | None = None) -> Loss:
        """The loss of the outputs `out` of this model -> (loss, parts): that of the labels, `class_loss`.

        teacher: the Output of a better model, whose answers are learned too (KL divergence). weights: of the
        two losses then."""
        loss, parts = self.class_loss(out, targets, smoothing=smoothing)
        if teacher is None:
            return loss, parts
        parts["kl"] = ops.kl_divergence(out.logits, teacher.logits)
        return weighted_sum(weights or self.loss_weights, {"class": loss, "kl": parts["kl"]}), parts

    def class_loss(self, out: Any, targets: Array, *, smoothing: float = 0.0) -> Loss:
        """Cross-entropy -> (loss, parts)."""
        return cross_entropy_of(out, targets, smoothing=smoothing)

    def noise(self, size: int, step: int | None, seed: int | None, xp: Any = np) -> dict[str, Array]:
        """What a training step draws for a batch of `size` images: {argument of the call: array (B, ...)}.
        Row i is for image i."""
        return {}

    def show(self, out: Any) -> list[tuple[str, np.ndarray]]:
        """What the model did with a batch of pictures -> [(title, (B, N) array)], a panel each.

        out: the Output of a call with trace=True. Boolean arrays: the patches that it kept; others: weights
        over the patches."""
        return []


def cross_entropy_of(out: Any, targets: Array, *, smoothing: float = 0.0) -> Loss:
    """Cross-entropy of an Output's logits -> (loss, parts)."""
    loss = ops.cross_entropy(out.logits, targets, smoothing=smoothing)
    return loss, {"class": loss}


def weighted_sum(weights: tuple[float, ...], parts: Mapping[str, Tensor]) -> Tensor:
    """The sum of the parts, each times its weight, from first to last."""
    loss: Any = 0
    for weight, part in zip(weights, parts.values()):
        loss = loss + part * weight
    return loss


def create(name: str, **config: Any) -> Model:
    """A new model by its registered name: create("vit", dim=96).

    config: the options of its class. InputError for a name or an option that does not exist."""
    return model.pick(name)(**config)


def names() -> list[str]:
    """The names of all models."""
    return list(model)
