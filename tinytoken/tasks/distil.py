"""Classification with a teacher."""
from collections.abc import Sequence
from typing import Any

from ..tensor import no_grad
from .base import task
from .classify import Classify


@task("distil")
class Distil(Classify):
    """The model's own loss with a teacher's Output: DynamicViT's four losses. teacher: the dense network that
    it starts from; it is run in eval mode and never changed. weights: of the parts of the loss (None: the
    model's)."""
    taught = True

    def __init__(self, model: Any, teacher: Any, smoothing: float = 0.0, weights: Sequence[float] | None = None,
                 drop_path: float = 0.0) -> None:
        super().__init__(model, smoothing, drop_path)
        self.teacher, self.weights = teacher.eval(), model.loss_weights if weights is None else weights
        self.settings: dict = {"smoothing": smoothing, "weights": self.weights} | self.settings

    def __call__(self, images, labels, **draws):
        with no_grad():
            taught = self.teacher(images)
        out = self.model(images, **draws)
        return self.model.loss(out, labels, taught, smoothing=self.smoothing, weights=self.weights)
