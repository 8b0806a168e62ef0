"""An arm of an experiment: a recipe for one model, as data. What all arms of an experiment have in common is
a Recipe."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the arms of an experiment share: pictures, sizes, optimiser, seed. steps: of a whole training; lr:
    its learning rate, further_lr: of steps that go on from it. train_pictures, test_pictures: of data that
    are made; size: the side of a picture in pixels, where the data can choose it. prune_before, keep_ratios,
    compressed: of the methods that have them."""
    data: str = "scenes"
    steps: int = 500
    batch: int = 64
    seed: int = 0
    dim: int = 96
    depth: int = 6
    heads: int = 3
    patch: int = 4
    prune_before: tuple = (1, 3, 5)
    keep_ratios: tuple = (0.7, 0.49, 0.343)
    compressed: tuple = (3, 3)
    lr: float = 1e-3
    further_lr: float = 3e-4
    predictor_lr_scale: float = 3.0  # parameters that are new, where the rest of the model is trained already
    weight_decay: float = 0.05
    smoothing: float = 0.0
    train_pictures: int = 16000  # of scenes; CIFAR has 50,000
    test_pictures: int = 2000  # of scenes; CIFAR has 10,000
    precision: str = "fp32"  # of products in training, see backend.products_in
    size: int = 32

    @property
    def further(self):
        """The steps of the second part, where a training has two: a quarter."""
        return self.steps // 4

    @property
    def sizes(self):
        """The sizes of a model, as its config calls them."""
        return dict(patch_size=self.patch, dim=self.dim, depth=self.depth, heads=self.heads)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A recipe for one model.

    model: its registered name, or its class. config: options of its own, or other sizes than the Recipe's.
    task: a registered name or a class; None: the model's own. settings: of the task, {"weights": ...}. steps,
    lr: of this arm alone. start: the arm whose weights it starts from. A training in two parts is two arms.
    offset: the number of its first step, on which batches and draws depend; None: after the start's. teacher:
    the arm that teaches it, where the task wants one; None: its start. new_lr_scale: learning rate of the
    parameters that the start does not have, relative to the others'. fit: further options of train.fit,
    {"average": ...}. pictures: as many to train on, 0: as many as all. beside: the arms that it is compared
    with. phase: what its files are called; None: its name."""
    model: str | type
    config: dict = dataclasses.field(default_factory=dict)
    task: str | type | None = None
    settings: dict = dataclasses.field(default_factory=dict)
    steps: int = 0
    lr: float = 1e-3
    start: str | None = None
    offset: int | None = None
    teacher: str | None = None
    new_lr_scale: float = 1.0
    fit: dict = dataclasses.field(default_factory=dict)
    pictures: int = 0
    beside: tuple = ()
    phase: str | None = None


def first_step(arms, name):
    """The number of an arm's first step."""
    arm = arms[name]
    if arm.offset is not None:
        return arm.offset
    return 0 if arm.start is None else first_step(arms, arm.start) + arms[arm.start].steps
