"""Trials: models trained on one seed's pictures with the same steps of the same optimiser, and what is noted of each. What the
lessons that compare models share.
"""
import contextlib
import dataclasses
import math
import pathlib
import statistics

from . import backend, checkpoint, compare, random
from .cost import macs
from .data import Batches, normalise
from .train import Run, accuracy, fit, infer


class Trial:
    """The pictures of `recipe` (a compare.Recipe) with its seed, and the models trained on them. folder: for checkpoints, to go
    on where an interrupted run stopped; None keeps none. Of photographs each batch is moved and mirrored, scenes stay; `changes`
    are further options of Batches."""

    def __init__(self, recipe, device="cpu", folder=None, bar=True, **changes):
        self.recipe, self.device, self.bar, self.run = recipe, device, bar, None
        if folder is not None:
            folder = pathlib.Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")  # wherever it is, weights stay out of version control
            self.run = Run(folder / f"seed{recipe.seed}", every=100)
        train, self.test = compare.load_pictures(recipe)
        images, labels = (backend.to_device(array, device) for array in (train.images, train.labels))
        self.batches = Batches(images, labels, recipe.batch, seed=recipe.seed, **recipe.moves | changes)

    def new(self, kind, start=None, sizes=(), **options):
        """A model of the recipe's sizes, or others where `sizes` (by the recipe's names) has them, with the weights of `start` as
        far as it has them, and the seed's otherwise."""
        random.manual_seed(self.recipe.seed)
        model = dataclasses.replace(self.recipe, **dict(sizes)).model(kind, **options).to(self.device)
        if start is not None:
            model.load_state_dict(start.state_dict(), strict=False)
        return model

    def fit(self, phase, objective, steps, lr, offset=0, **more):
        """Train objective.model -> what fit reports. more: further options of fit. Raises Busy where another process is training
        the same phase of the same folder."""
        phase = phase.replace(" ", "-")
        with checkpoint.claimed(self.run.checkpoint(phase)) if self.run else contextlib.nullcontext():
            return fit(objective.model, objective, self.batches, steps=steps, lr=lr, weight_decay=self.recipe.weight_decay,
                       offset=offset, seed=self.recipe.seed, run=self.run, phase=phase, bar=self.bar,
                       precision=self.recipe.precision, **more)

    def prepare(self, images):
        """uint8 pictures -> what a model takes."""
        return normalise(backend.to_device(images, self.device), self.batches.mean, self.batches.std)

    def answers(self, model, **call):
        """Logits (B, K) of the test pictures, on the host."""
        return infer(model, self.test.images, self.prepare, **call)

    def measure(self, model, trained, logits=None, **call):
        """What is noted of a trained model: accuracy, multiply-adds per picture, parameters, what fit reported. logits: its answers,
        where the caller has them."""
        logits = self.answers(model, **call) if logits is None else logits
        return {"accuracy": accuracy(logits, self.test.labels),
                "macs": macs(model, self.prepare(self.test.images[:1]), **call).total,
                "parameters": model.parameter_count(), "trained": trained}


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % quantiles for so many seeds


def difference(right, than):
    """Points of accuracy of one arm above another, paired: (mean, low, high) with a 95 % interval. right, than: for each seed
    whether each test picture was answered rightly (B,); as many seeds as both have. The interval is Student's over the
    seeds, of one seed the normal one over the pictures (which says nothing of how another seed would have come out)."""
    pairs = [100.0 * (a.astype(float) - b) for a, b in zip(right, than)]
    gaps = [pair.mean() for pair in pairs]
    reach = (STUDENT[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1
             else 1.96 * pairs[0].std() / math.sqrt(len(pairs[0])))
    middle = statistics.mean(gaps)
    return float(middle), float(middle - reach), float(middle + reach)
