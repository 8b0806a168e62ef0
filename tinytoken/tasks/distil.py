"""Classification with a teacher."""
from collections.abc import Mapping
from typing import Any

from ..backend import Array
from ..models.base import Loss
from ..tensor import no_grad
from .base import task
from .classify import Classify


@task("distil")
class Distil(Classify):
    """The model's own loss with a teacher's Output: for DynamicViT, the paper's four losses.

    teacher: a trained model, for DynamicViT the dense network that it starts from; it runs in eval mode and
    is never changed. weights: of the parts of the loss (None: the model's). options: of the model's loss,
    for DynamicViT {"ratio_norm": "pooled"}; then a batch is not cut into slices."""
    taught = True

    def __init__(self, model: Any, teacher: Any, smoothing: float = 0.0,
                 weights: tuple[float, ...] | None = None, drop_path: float = 0.0,
                 options: Mapping[str, str] | None = None) -> None:
        super().__init__(model, smoothing, drop_path)
        self.options = dict(options or {})
        self.whole = self.whole or "pooled" in self.options.values()
        self.teacher = teacher.eval()
        self.weights = model.loss_weights if weights is None else weights
        self.settings = {"smoothing": smoothing, "weights": self.weights} | self.settings
        self.settings |= {"options": self.options} if self.options else {}

    def __call__(self, images: Array, labels: Array, **draws: Array) -> Loss:
        with no_grad():
            taught = self.teacher(images)
        out = self.model(images, **draws)
        return self.model.loss(out, labels, taught, smoothing=self.smoothing, weights=self.weights,
                               **self.options)
