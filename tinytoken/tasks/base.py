"""What every task is: a batch -> a loss; outputs -> metrics."""
from typing import Any

import numpy as np

from .. import random
from ..backend import Array
from ..errors import expect
from ..models.base import Loss
from ..registry import Registry

task = Registry("task")


class Task:
    """task(images, labels, **draws) -> (loss, parts), means over the images: a batch may be cut into slices,
    unless the task is `whole`.

    taught: whether it wants a teacher, task(model, teacher). drop_path: the rate of `drop_paths`. settings:
    what a checkpoint is to say of the task."""
    taught = False
    whole = False

    def __init__(self, model: Any, smoothing: float = 0.0, drop_path: float = 0.0) -> None:
        expect(0 <= drop_path < 1, "drop_path", f"{drop_path}, expected 0 <= rate < 1")
        self.model, self.whole = model, self.whole or getattr(model, "whole", False)  # not all are Models
        self.smoothing, self.drop_path = smoothing, drop_path
        self.settings: dict = {"smoothing": smoothing} | ({"drop_path": drop_path} if drop_path else {})

    def noise(self, size: int, step: int, seed: int, xp: Any = np) -> dict[str, Array]:
        """What is drawn for a batch of `size` images before it is cut: {argument of the model: array (size,
        ...)}. Row i is for image i."""
        draws = self.model.noise(size, step, seed, xp)
        if self.drop_path:
            draws = draws | {"paths": drop_paths(self.model, self.drop_path, size, step, seed, xp)}
        return draws

    def labels(self, size: int) -> np.ndarray:
        """Labels such as `size` images may have, to try or to time a step with."""
        return np.arange(size) % self.model.config.num_classes

    def __call__(self, images: Array, labels: Array, **draws: Array) -> Loss:
        raise NotImplementedError

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        """{metric: its value} of answers (B, ...) to images with these labels, in host memory."""
        raise NotImplementedError


def drop_paths(model: Any, rate: float, size: int, step: int, seed: int, xp: Any = np) -> Array:
    """Factors (B, depth, branches) of the residual branches of model.blocks, for drop path (stochastic depth:
    Huang et al. 2016, section 3).

    A factor is 0 with a probability p that rises evenly from 0 in the first block to `rate` in the last, else
    1 / (1 - p), so that the mean is 1. Each branch of each image is drawn by itself."""
    depth, branches = len(model.blocks), max(block.branches for block in model.blocks)
    dropped = (xp.arange(depth, dtype="float32") * (rate / max(1, depth - 1)))[:, None]
    draw = random.uniform((size, depth, branches), site="tinytoken.train.drop_paths", step=step, seed=seed,
                          xp=xp)
    return (draw >= dropped) / (1 - dropped)
