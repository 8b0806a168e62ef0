"""Referring segmentation: the mask of the object that a sentence means (data/referring.py)."""
from typing import Any

import numpy as np

from .. import nn, random
from ..backend import Array, array_module, to_numpy
from ..models.base import Loss
from .base import Task, task


@task("refer")
class Refer(Task):
    """A model's own loss of the mask of one of a picture's sentences, drawn anew for each step.

    Labels (B, S, length + H W): for each of S sentences its words, then 1 for each pixel of what it means, 0
    for the others, row by row. The model takes `words` (B, length) and gives logits (B, H, W)."""

    def noise(self, size: int, step: int, seed: int, xp: Any = np) -> dict[str, Array]:
        which = random.uniform((size,), site="tinytoken.tasks.refer.which", step=step, seed=seed, xp=xp)
        return super().noise(size, step, seed, xp) | {"which": which}

    def labels(self, size: int) -> np.ndarray:
        height, width = nn.both_sides(self.model.config.image_size)
        return np.zeros((size, 1, self.model.config.length + height * width), "uint8")

    def __call__(self, images: Array, labels: Array, which: Array,  # type: ignore[override]
                 **draws: Array) -> Loss:
        """which (B,), from 0 to 1: the sentence that is learned."""
        xp, length = array_module(labels), self.model.config.length
        rows = labels[xp.arange(len(labels)), (which * labels.shape[1]).astype("int64")]
        out = self.model(images, words=rows[:, :length], **draws)
        return self.model.loss(out, rows[:, length:].reshape(out.logits.shape), smoothing=self.smoothing)

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        """Of logits answers (B, S, H, W) for all sentences. "mIoU": intersection over union of the pixels
        with logits above 0 and those of the object, the mean over sentences; "oIoU": the sum of the
        intersections over that of the unions (Yu et al. 2016, arXiv 1608.00272; Wu et al. 2020, arXiv
        2008.01187)."""
        found = (answers > 0).reshape(*answers.shape[:2], -1)
        true = to_numpy(labels)[:, :, -found.shape[2]:] > 0
        both, either = (found & true).sum(axis=2), (found | true).sum(axis=2)
        return {"mIoU": float((both / np.maximum(either, 1)).mean()),
                "oIoU": float(both.sum() / np.maximum(either.sum(), 1))}
