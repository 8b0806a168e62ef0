"""What each actor of a clip does, whose box in the key frame is given. Labels (B, P, 5): of each actor its
box (left, top, right, bottom) in pixels, and its action's number, -1 for nobody."""
import numpy as np

from ..backend import Array, to_numpy
from ..models.base import Loss
from ..nn import both_sides
from .base import Task, task


@task("actions")
class Actions(Task):
    """The model's own loss of the actors' actions; the share of the actors that are answered right."""

    def labels(self, size: int) -> np.ndarray:
        config, rows = self.model.config, np.zeros((size, 1, 5), "int64")
        rows[:, :, 2:4] = both_sides(config.image_size)[::-1]
        rows[:, 0, 4] = np.arange(size) % config.num_classes
        return rows

    def __call__(self, clips: Array, labels: Array, **draws: Array) -> Loss:
        out = self.model(clips, boxes=labels[:, :, :4], **draws)
        return self.model.loss(out, labels[:, :, 4], smoothing=self.smoothing)

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        actions = to_numpy(labels)[:, :, 4]
        return {"accuracy": float((answers.argmax(axis=2) == actions)[actions >= 0].mean())}
