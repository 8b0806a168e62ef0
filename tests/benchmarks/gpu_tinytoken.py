"""tinytoken as a contender of gpu.py: a training step as `fit` takes it, a forward pass as `infer` runs it."""
import warnings

from cpu import batch_of, objective_of
from tinytoken.backend import to_device, to_numpy
from tinytoken.cuda.capture import Captured, CapturedStep
from tinytoken.optim import AdamW, loss_and_grads
from tinytoken.tensor import no_grad
from tinytoken.train import products_in


class TinyToken:
    """precision: as of train.products_in. captured: as one CUDA graph; else every kernel is launched by itself."""
    host = staticmethod(to_numpy)

    def __init__(self, precision, captured=True):
        self.precision, self.captured = precision, captured
        warnings.filterwarnings("error", "a .* could not be captured")  # one that is not would be timed in its place

    def train(self, work, arrays, recipe):
        """A function that does a training step -> loss and gradient norm, on the device."""
        objective, batch = on_device(work, arrays), [to_device(array, "cuda") for array in batch_of(arrays)]
        params = objective.model.parameters()
        optimizer = AdamW(params, **recipe)
        with products_in(self.precision, "cuda"):
            take = CapturedStep(lambda arrays: loss_and_grads(objective, params, arrays), optimizer)
        take.run.failed = not self.captured  # goes on with ordinary steps, as fit does where a capture fails

        def step():
            with products_in(self.precision, "cuda"):
                loss, _, norm = take(batch, recipe["lr"])
            return loss, norm
        return step

    def infer(self, work, arrays):
        """A function that gives the logits, on the device."""
        model, images = on_device(work, arrays).model.eval(), to_device(arrays["images"], "cuda")
        forward = lambda given: model(*given).data
        forward = Captured(forward, "a forward pass") if self.captured else forward

        def logits():
            with no_grad(), products_in(self.precision, "cuda"):
                return forward((images,))
        return logits


def on_device(work, arrays):
    """What is minimised, its models on the GPU."""
    objective = objective_of(work, arrays)
    for model in (objective.model, getattr(objective, "teacher", objective.model)):
        model.to("cuda")
    return objective
