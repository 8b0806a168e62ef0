"""What lessons on captions with a frozen encoder share: how an encoder learns from the pictures alone, and
the encoder that sees nothing."""
import copy
from typing import Any

import numpy as np

from .. import nn, ops
from ..backend import Array, array_module, to_device
from ..data.captions import COLOURS, KINDS
from ..models import Describer, Output
from ..models.base import Loss
from ..tasks import Task
from ..tensor import Tensor
from ..train import infer
from .trial import Trial


class Attributes(Task):
    """The binary cross-entropy of the questions of data.captions.attribute_names, of each classifier that the
    model has. Labels (B, A): 1 for yes."""

    def __call__(self, images: Array, labels: Array, **draws: Array) -> Loss:
        out = self.model(images, **draws)
        heads = [out.logits, getattr(out, "lookup_logits", None)]
        loss = sum(ops.binary_cross_entropy(logits, labels) for logits in heads if logits is not None)
        return loss, {"questions": loss}

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        """F1, of all yeses together: of the questions to number, and of those to place."""
        said, true, numbers = answers > 0, labels > 0, 3 * (len(COLOURS) + len(KINDS))
        f1 = lambda part: float(2 * (said & true)[:, part].sum() / (said.sum(0) + true.sum(0))[part].sum())
        return {"number_f1": f1(slice(0, numbers)), "place_f1": f1(slice(numbers, None))}


class Blind(nn.Module):
    """An encoder that sees nothing: images (B, ...) -> one token of `dim` zeros."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def forward(self, images: Array) -> Output:
        tokens = Tensor(array_module(images).zeros((len(images), 1, self.dim), "float32"))
        return Output(tokens[:, 0], tokens)  # it has no classes to answer: its logits are zeros, too


def of_attributes(trial: Trial) -> Trial:
    """The same trial of captions with the attributes for labels, for encoders."""
    other = copy.copy(trial)
    other.batches = copy.copy(trial.batches)
    other.batches.labels = to_device(trial.train_set.attributes, trial.device)
    return other


def written(describer: Describer, trial: Trial, beam: int = 1) -> np.ndarray:
    """The captions (B, t) that a Describer writes for the test pictures, on the host."""
    return infer(describer, trial.test.images, trial.prepare, batch_size=250, read=Tensor, beam=beam)
