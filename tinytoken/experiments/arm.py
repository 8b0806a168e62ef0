"""An arm of an experiment: how one model is trained, as data. What all its arms share is a Recipe."""
import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the arms of an experiment share: pictures, sizes, optimiser, seed.

    steps: of a whole training. lr: its learning rate; further_lr: that of steps that go on from it.
    train_pictures, test_pictures: how many, of data that are made. size: the side of a picture in pixels,
    where the data can choose it. held_out: how many of the training pictures no arm is trained on, to choose
    a recipe by; choosing: these are asked in place of the test pictures. keys_as_queries: how models start,
    see nn.initialise. prune_before, keep_ratios, compressed: of the methods that have them."""
    data: str = "scenes"
    steps: int = 500
    batch: int = 64
    seed: int = 0
    dim: int = 96
    depth: int = 6
    heads: int = 3
    patch: int = 4
    prune_before: tuple[int, ...] = (1, 3, 5)
    keep_ratios: tuple[float, ...] = (0.7, 0.49, 0.343)
    compressed: tuple[int, int] = (3, 3)
    lr: float = 1e-3
    further_lr: float = 3e-4
    predictor_lr_scale: float = 3.0  # of new parameters, where the rest of the model is trained already
    weight_decay: float = 0.05
    smoothing: float = 0.1
    keys_as_queries: bool = False
    train_pictures: int = 16000  # of scenes; CIFAR has 50,000
    test_pictures: int = 2000  # of scenes; CIFAR has 10,000
    precision: str = "fp32"  # of products in training, see backend.products_in
    size: int = 32
    held_out: int = 0
    choosing: bool = False

    @property
    def further(self) -> int:
        """The steps of the second part of a training in two parts: a quarter."""
        return self.steps // 4

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of a model and how its weights start, as its config calls them."""
        return dict(patch_size=self.patch, dim=self.dim, depth=self.depth, heads=self.heads,
                    keys_as_queries=self.keys_as_queries)


@dataclasses.dataclass(frozen=True)
class Arm:
    """How one model is trained. A training in two parts is two arms.

    model: its registered name, or its class. config: options of its own, or other sizes than the Recipe's.
    task: a registered name or a class; None: the model's own. settings: of the task, {"weights": ...}.
    steps, lr: of this arm alone. fit: further options of train.fit, {"average": ...}. phase: what its files
    are called; None: its name.

    start: the arm whose weights it starts from. offset: where its steps begin to count, on which batches and
    draws depend; None: after the start's. teacher: the arm that teaches it, where the task wants one; None:
    its start. new_lr_scale: the lr_scale of the parameters that the start does not have; start_lr_scale and
    frozen_steps (see nn.Parameter): of those that it has.

    A Trial does not read the other two; whoever makes the Trial does. pictures: how many to train on, for
    which a Trial of its own is made; 0: as many as the Recipe says. beside: the arms to compare it with."""
    model: str | type
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: str | type | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    lr: float = 1e-3
    start: str | None = None
    offset: int | None = None
    teacher: str | None = None
    new_lr_scale: float = 1.0
    start_lr_scale: float = 1.0
    frozen_steps: int = 0
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: int = 0
    beside: tuple[str, ...] = ()
    phase: str | None = None


def first_step(arms: Mapping[str, Arm], name: str) -> int:
    """Where the steps of an arm begin to count."""
    arm = arms[name]
    if arm.offset is not None:
        return arm.offset
    return 0 if arm.start is None else first_step(arms, arm.start) + arms[arm.start].steps
