"""A trial: the arms of an experiment, trained on one seed's pictures, and what is noted of each."""
import contextlib

import numpy as np

from .. import random
from ..backend import to_device, to_numpy
from ..cost import macs
from ..data import Batches, load_pictures, normalise
from ..errors import expect
from ..files import claimed
from ..models import model as models
from ..tasks import task as tasks
from ..tensor import no_grad
from ..train import fit, infer
from .arm import first_step


class Trial:
    """The pictures of `recipe` with its seed, and the `arms` {name: Arm} trained on them. run: a train.Run
    for checkpoints, to go on where an interrupted run stopped; None keeps none. Of photographs each batch is
    moved and mirrored, scenes stay; `changes` are further options of Batches."""

    def __init__(self, recipe, arms=None, *, device="cpu", run=None, threads=None, bar=True, **changes):
        self.recipe, self.arms, self.device, self.run = recipe, arms or {}, device, run
        self.threads, self.bar, self.done = threads, bar, {}
        self.train_set, self.test = load_pictures(recipe.data, train=recipe.train_pictures,
                                                  test=recipe.test_pictures,
                                                  seed=recipe.seed, size=recipe.size)
        images, labels = (to_device(array, device)
                          for array in (self.train_set.images, self.train_set.labels))
        self.batches = Batches(images, labels, recipe.batch, seed=recipe.seed, **self.test.moves | changes)

    def new(self, kind, start=None, **config):
        """A model of the recipe's sizes, or others where `config` has them, with the weights of `start` as
        far as it has them, and the seed's otherwise. kind: a registered name, or a class."""
        random.manual_seed(self.recipe.seed)
        kind, pictures = models.pick(kind) if isinstance(kind, str) else kind, self.test
        shape = dict(image_size=square_or_both(pictures.images), num_classes=len(pictures.names))
        model = kind(**shape | self.recipe.sizes | config).to(self.device)
        if start is not None:
            model.load_state_dict(start.state_dict(), strict=False)
        return model

    def train(self, name):
        """Train an arm, and before it what it starts from -> (model, what fit reported). Once: then it is
        remembered."""
        expect(name in self.arms, "trial", lambda: f"no arm {name!r}, expected one of {', '.join(self.arms)}")
        if name not in self.done:
            arm = self.arms[name]
            start = self.train(arm.start)[0] if arm.start else None
            model = self.new(arm.model, start, **arm.config)
            if start is not None:
                known = dict(start.named_parameters())
                for parameter, p in model.named_parameters():
                    p.lr_scale = p.lr_scale if parameter in known else arm.new_lr_scale
            self.done[name] = model, self.fit(arm.phase or name, self.task_of(arm, model, start), arm.steps,
                                              arm.lr,
                                              first_step(self.arms, name), **arm.fit)
        return self.done[name]

    def task_of(self, arm, model, start=None):
        """The task of an arm's model."""
        kind = arm.task or model.task
        kind = tasks.pick(kind) if isinstance(kind, str) else kind
        settings = {"smoothing": self.recipe.smoothing} | arm.settings
        if not kind.taught:
            return kind(model, **settings)
        teacher = self.train(arm.teacher)[0] if arm.teacher else start
        expect(teacher is not None, "trial", lambda: f"an arm of {type(model).__name__} without a teacher, "
               f"which {kind.__name__} wants: give it a teacher or a start, or another task")
        return kind(model, teacher, **settings)

    def fit(self, phase, task, steps, lr, offset=0, **more):
        """Train task.model -> what fit reports. more: further options of fit. Raises Busy where another
        process is training the same phase of the same folder."""
        phase, pictures = phase.replace(" ", "-"), self.train_set
        header = {"classes": list(pictures.names), "mean": self.batches.mean, "std": self.batches.std,
                  "data": self.recipe.data}
        with claimed(self.run.checkpoint(phase)) if self.run else contextlib.nullcontext():
            return fit(task.model, task, self.batches, steps=steps, lr=lr,
                       weight_decay=self.recipe.weight_decay,
                       offset=offset, seed=self.recipe.seed, run=self.run, phase=phase, header=header,
                       bar=self.bar,
                       threads=self.threads, precision=self.recipe.precision, **more)

    def prepare(self, images):
        """uint8 pictures -> what a model takes."""
        return normalise(to_device(images, self.device), self.batches.mean, self.batches.std)

    def answers(self, model, **call):
        """Logits (B, K) of the test pictures, on the host."""
        return infer(model, self.test.images, self.prepare, threads=self.threads, **call)

    def measure(self, model, report, answers=None, **call):
        """What is noted of a trained model: its task's metrics, multiply-adds per picture, parameters, what
        fit reported. answers: to the test pictures, where the caller has them."""
        answers = self.answers(model, **call) if answers is None else answers
        metrics = tasks.pick(model.task).metrics(answers, self.test.labels)
        return metrics | {"macs": macs(model, self.prepare(self.test.images[:1]), **call).total,
                          "parameters": model.parameter_count(), "trained": report}


def square_or_both(images):
    """The image_size of pictures (B, C, H, W)."""
    height, width = images.shape[2:]
    return height if height == width else (height, width)


def kept_on_object(model, test, prepare, patch, most=2000):
    """Scenes only: the mean share of object in the patches that each stage keeps, beside that of all patches
    (chance)."""
    if not hasattr(test, "object_share"):
        return None
    shares, sums = test.object_share(patch)[:most], []
    for a in range(0, len(shares), 128):
        with no_grad():
            kept = model.eval()(prepare(test.images[a:min(a + 128, most)])).kept
        sums.append([np.take_along_axis(shares[a:a + 128], to_numpy(places), axis=1).mean(axis=1).sum()
                     for places in kept])
    return {"all": float(shares.mean()), "stages": [float(s) / len(shares) for s in np.sum(sums, axis=0)]}
