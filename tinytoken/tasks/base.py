"""What every task is: a batch -> a loss; outputs -> metrics."""
from typing import Any

import numpy as np

from .. import random
from ..backend import Array
from ..errors import expect
from ..registry import Registry
from ..tensor import Tensor

task = Registry("task")


class Task:
    """task(images, labels, **draws) -> (loss, parts), a mean over the images, which may be cut from a batch.
    drop_path: the rate of `drop_paths`.

    taught: whether it wants a teacher, task(model, teacher). settings: what a checkpoint is to say of it."""
    taught = False

    def __init__(self, model: Any, smoothing: float = 0.0, drop_path: float = 0.0) -> None:
        expect(0 <= drop_path < 1, "drop_path", f"{drop_path}, expected 0 <= rate < 1")
        self.model, self.smoothing, self.drop_path = model, smoothing, drop_path
        self.settings: dict = {"smoothing": smoothing} | ({"drop_path": drop_path} if drop_path else {})

    def noise(self, size: int, step: int, seed: int, xp: Any = np) -> dict[str, Array]:
        """What is drawn for a batch, by image number, before it is cut: {argument of the model: array (size,
        ...)}."""
        draws = self.model.noise(size, step, seed, xp)
        return draws | ({"paths": drop_paths(self.model, self.drop_path, size, step, seed, xp)}
                        if self.drop_path else {})

    def __call__(self, images: Array, labels: Array, **draws: Array) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        """{name: number} of answers (B, ...) to images with these labels, in host memory."""
        raise NotImplementedError


def drop_paths(model, rate, size, step, seed, xp=np):
    """Factors (B, depth, branches) of the residual branches of model.blocks, for drop path (stochastic depth:
    Huang et al. 2016, section 3): 0 with a probability that rises evenly from 0 in the first block to `rate`
    in the last, else 1 / (1 - it), so that the mean is 1. Each branch of each image is drawn by itself."""
    depth, branches = len(model.blocks), model.blocks[0].branches
    dropped = (xp.arange(depth, dtype="float32") * (rate / max(1, depth - 1)))[:, None]
    draw = random.uniform((size, depth, branches), site="tinytoken.train.drop_paths", step=step, seed=seed,
                          xp=xp)
    return (draw >= dropped) / (1 - dropped)
