"""tinytoken as a contender of gpu.py: a training step as `fit` takes it, a forward pass as `infer` runs
it."""
import dataclasses
import itertools
import warnings

from cpu import batch_of, task_of
from tinytoken.backend import is_array, products_in, to_device, to_numpy
from tinytoken.cuda.capture import Captured, CapturedSteps
from tinytoken.errors import expect
from tinytoken.tensor import no_grad
from tinytoken.train import AdamW
from tinytoken.train.step import Work

STEPS = 1 << 14  # more than are ever timed: a captured step reads its rates in a table that is made before


@dataclasses.dataclass
class OneBatch(Work):
    """A run whose steps all have one batch and its draws, handed over in each as other batches would be."""
    draws: dict = dataclasses.field(default_factory=dict)

    def noise(self, size, step):
        expect(not is_array(step), "OneBatch", "the draws are not made on the device")
        return self.draws


class TinyToken:
    """precision: as of backend.products_in. captured: as one CUDA graph; else launch by launch."""
    host = staticmethod(to_numpy)

    def __init__(self, precision, captured=True):
        self.precision, self.captured = precision, captured
        # what is not captured would be timed in its place
        warnings.filterwarnings("error", "a .* could not be captured")

    def train(self, work, arrays, recipe):
        """A function that does a training step -> loss and gradient norm, on the device."""
        task, (batch, draws) = on_device(work, arrays), batch_of(arrays)
        batch = [to_device(array, "cuda") for array in batch]
        draws = {name: to_device(array, "cuda") for name, array in draws.items()}
        optimizer, number = AdamW(task.model.parameters(), **recipe), itertools.count()
        with products_in(self.precision, "cuda"):
            rates = [recipe["lr"]] * STEPS
            take = CapturedSteps(OneBatch(task, lambda step: batch, optimizer, rates, draws=draws))
        take.replay.failed = not self.captured  # then all steps are ordinary ones

        def step():
            with products_in(self.precision, "cuda"):
                loss, _, norm = take(next(number))
            return loss, norm
        return step

    def infer(self, work, arrays):
        """A function that gives the logits, on the device."""
        model, images = on_device(work, arrays).model.eval(), to_device(arrays["images"], "cuda")
        forward = lambda given: model(*given).logits.data
        forward = Captured(forward, "a forward pass") if self.captured else forward

        def logits():
            with no_grad(), products_in(self.precision, "cuda"):
                return forward((images,))
        return logits


def on_device(work, arrays):
    """The task, its models on the GPU."""
    task = task_of(work, arrays)
    for model in (task.model, getattr(task, "teacher", task.model)):
        model.to("cuda")
    return task
