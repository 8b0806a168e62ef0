"""Classification."""
import numpy as np

from ..backend import Array, to_numpy
from ..models.base import Loss
from .base import Task, task


@task("classify")
class Classify(Task):
    """The model's own loss of class labels (B,), or of probabilities (B, K); accuracy."""

    def __call__(self, images: Array, labels: Array, **draws: Array) -> Loss:
        return self.model.loss(self.model(images, **draws), labels, smoothing=self.smoothing)

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        return {"accuracy": accuracy(answers, labels)}


def accuracy(logits: np.ndarray, labels: Array) -> float:
    """The share of images whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == to_numpy(labels)).mean())
