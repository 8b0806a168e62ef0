"""A trial: the arms of an experiment, trained on one seed's pictures, and what is noted of each."""
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import random
from ..backend import Array, array_module, to_device, to_numpy
from ..cost import macs
from ..data import Batches, hold_out, likeness, load_pictures, normalise
from ..errors import expect
from ..group import current
from ..models import model as models
from ..tasks import Task
from ..tasks import task as tasks
from ..tensor import no_grad
from ..train import Run, fit, infer
from .arm import Arm, Recipe, first_step


class Trial:
    """The pictures of `recipe` with its seed, and the `arms` {name: Arm} trained on them.

    pictures: (training, test) pictures in place of the recipe's own. run: a train.Run for checkpoints, to go
    on where an interrupted run stopped; None keeps none. Photographs are moved and mirrored in each batch,
    scenes are not. changes: further options of Batches."""

    def __init__(self, recipe: Recipe, arms: Mapping[str, Arm] | None = None, *,
                 pictures: tuple[Any, Any] | None = None, device: str = "cpu",
                 run: Run | None = None, threads: int | None = None, bar: bool = True,
                 **changes: Any) -> None:
        expect(arms is None or isinstance(arms, Mapping), "Trial", f"arms {arms!r}, expected {{name: Arm}}")
        self.recipe, self.arms = recipe, arms or {}
        self.device, self.run = device, run
        self.threads, self.bar = threads, bar
        self.done: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.training: list[str] = []  # the arms that are being trained, each for the one before
        expect(recipe.held_out or not recipe.choosing, "Trial",
               "choosing by 0 pictures: held_out says how many")
        self.train_set, self.test = pictures or load_pictures(
            recipe.data, train=recipe.train_pictures + recipe.held_out, test=recipe.test_pictures,
            seed=recipe.seed, size=recipe.size)
        if recipe.held_out:
            self.train_set, held_out = hold_out(self.train_set, recipe.held_out)
            self.test = held_out if recipe.choosing else self.test
        expect(len(self.train_set.images) >= recipe.batch, "Trial",
               lambda: f"{len(self.train_set.images)} pictures of {recipe.data} to train on, expected at "
                       f"least {recipe.batch}, a batch")
        images = to_device(self.train_set.images, device)
        labels = to_device(self.train_set.labels, device)
        self.batches = Batches(images, labels, recipe.batch, seed=recipe.seed, **self.test.moves | changes)

    def new(self, kind: str | type, start: Any = None, **config: Any) -> Any:
        """A new model. kind: its registered name, or its class.

        It has the recipe's sizes, or others where `config` has them; and the weights of the model `start` as
        far as it has them, the seed's otherwise."""
        random.manual_seed(self.recipe.seed)
        model_class, images = _class(models, kind), self.test.images
        shape = dict(image_size=square_or_both(images), num_classes=len(self.test.names))
        if images.ndim == 5:
            expect(hasattr(model_class.Config, "frames"), "trial",
                   f"clips for {model_class.__name__}, a model of pictures; expected a model of clips")
            shape["frames"] = images.shape[1]
        model = model_class(**shape | self.recipe.sizes | config).to(self.device)
        if start is not None:
            model.load_state_dict(start.state_dict(), strict=False)
        return model

    def train(self, name: str) -> tuple[Any, dict[str, Any]]:
        """Train an arm, and before it what it starts from -> (model, what fit reported).

        It is trained once; then the two are remembered. In a group of processes all ranks call this: what one
        has trained apart, all have from its checkpoint."""
        expect(name in self.arms, "trial", lambda: f"no arm {name!r}, expected one of {', '.join(self.arms)}")
        expect(name not in self.training, "trial", f"arm {name!r} starts from, or is taught by, itself")
        if any(current().exchange(f"arm {name}", name not in self.done)):
            self.training.append(name)
            try:
                self.done[name] = self._trained(name, self.arms[name])
            finally:
                self.training.remove(name)
        return self.done[name]

    def _trained(self, name, arm):
        start = self.train(arm.start)[0] if arm.start else None
        model = self.new(arm.model, start, **arm.config)
        if start is not None:
            known = dict(start.named_parameters())
            for parameter, p in model.named_parameters():
                p.lr_scale = arm.start_lr_scale if parameter in known else arm.new_lr_scale
                p.frozen_steps = arm.frozen_steps if parameter in known else 0
        task = self.task_of(arm, model, start)
        first = first_step(self.arms, name)
        return model, self.fit(arm.phase or name, task, arm.steps, arm.lr, first, **arm.fit)

    def task_of(self, arm: Arm, model: Any, start: Any = None) -> Task:
        """The task of an arm's model. start: the model that it started from."""
        task = _class(tasks, arm.task or model.task)
        settings = {"smoothing": self.recipe.smoothing} | arm.settings
        if not task.taught:
            return task(model, **settings)
        teacher = self.train(arm.teacher)[0] if arm.teacher else start
        expect(teacher is not None, "trial",
               lambda: f"an arm of {type(model).__name__} without a teacher, which {task.__name__} wants: "
                       f"give it a teacher or a start, or another task")
        return task(model, teacher, **settings)

    def fit(self, phase: str, task: Task, steps: int, lr: float, offset: int = 0,
            **more: Any) -> dict[str, Any]:
        """Train task.model -> what fit reports. more: further options of fit.

        Raises Busy where another process is training the same phase in the same folder."""
        phase, recipe = phase.replace(" ", "-"), self.recipe
        header = {"classes": list(self.train_set.names), "mean": self.batches.mean, "std": self.batches.std,
                  "data": recipe.data, **({"bounds": self.bounds} if self.run else {})}
        return fit(task.model, task, self.batches, steps=steps, lr=lr, weight_decay=recipe.weight_decay,
                   offset=offset, seed=recipe.seed, run=self.run, phase=phase, header=header, bar=self.bar,
                   threads=self.threads, precision=recipe.precision, **more)

    @functools.cached_property
    def bounds(self) -> dict[str, list[float]]:
        """How the training pictures are, for checkpoints: `predict` warns of others."""
        return likeness.bounds(self.train_set.images)

    def prepare(self, images: Array) -> Array:
        """uint8 pictures -> what a model takes."""
        return normalise(to_device(images, self.device), self.batches.mean, self.batches.std)

    def answers(self, model: Any, **call: Any) -> np.ndarray:
        """Logits (B, K) of the test pictures, on the host."""
        return infer(model, self.test.images, self.prepare, threads=self.threads, **call)

    def measure(self, model: Any, report: Any, answers: np.ndarray | None = None,
                task: str | type | None = None, **call: Any) -> dict[str, Any]:
        """What is noted of a trained model: its metrics, multiply-adds per picture, parameters, fit's report.

        answers: to the test pictures, where the caller has them. task: a registered name or a class, for an
        arm that has a task of its own; None: the model's. call: further arguments of the model."""
        answers = self.answers(model, **call) if answers is None else answers
        metrics = _class(tasks, task or model.task).metrics(answers, self.test.labels)
        return metrics | {"macs": macs(model, self.prepare(self.test.images[:1]), **call).total,
                          "parameters": model.parameter_count(), "trained": report}


def _class(registry, name_or_class):
    return registry.pick(name_or_class) if isinstance(name_or_class, str) else name_or_class


def square_or_both(images: Array) -> int | tuple[int, int]:
    """The image_size of pictures (B, C, H, W) or clips (B, T, C, H, W)."""
    height, width = images.shape[-2:]
    return height if height == width else (height, width)


def kept_on_object(model: Any, test: Any, prepare: Callable[[Array], Array], patch: int,
                   most: int = 2000) -> dict[str, Any] | None:
    """Scenes only: the mean share of object in the patches that each stage keeps, and in all (chance).

    None for other pictures. most: how many of the test pictures are looked at."""
    if not hasattr(test, "object_share"):
        return None
    shares, sums = test.object_share(patch)[:most], []
    for a in range(0, len(shares), 128):
        with no_grad():
            kept = model.eval()(prepare(test.images[a:min(a + 128, most)])).kept
        sums.append([np.take_along_axis(shares[a:a + 128], to_numpy(places), axis=1).mean(axis=1).sum()
                     for places in kept])
    return {"all": float(shares.mean()), "stages": [float(s) / len(shares) for s in np.sum(sums, axis=0)]}


def kept_in_training(trial: Trial, model: Any, batches: int = 20) -> list[float]:
    """The share of tokens that each stage of a DynamicViT keeps in train mode, over the first `batches`
    batches. The model is left in eval mode."""
    shares = []
    with no_grad():
        for step in range(batches):
            images, _ = trial.batches(step)
            out = model.train()(images, **model.noise(len(images), step, seed=1, xp=array_module(images)))
            shares.append([float(to_numpy(decision.data).mean()) for decision in out.decisions])
    model.eval()
    return np.mean(shares, axis=0).tolist()


def read_alike(model: Any, images: Array) -> list[float]:
    """How alike a LookupViT's compressed tokens read: by block, the mean cosine between the weights of two of
    them, over heads and prepared images (B, C, H, W). 1: all read the same. The model is left in eval
    mode."""
    with no_grad():
        out, found = model.eval()(images, trace=True), []
    for rows in (to_numpy(A.data) for A in out.attention):  # (B, H, M, N)
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        alike, m = rows @ rows.swapaxes(-1, -2), rows.shape[2]
        found.append(float((alike.sum(axis=(-1, -2)) - m).mean() / (m * (m - 1))))
    return found
