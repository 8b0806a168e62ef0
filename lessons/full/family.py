"""The family in one table: what each method thins, what it costs, how fast it is, and what it reaches.

    python lessons/full/family.py --full                        # 14 methods for pictures, 3 seeds
    python lessons/full/family.py --full --data pixel_scenes    # 8 that answer for every pixel
    python lessons/full/family.py --full --data actor_clips     # EVAD: what each actor of a clip does
    python lessons/full/family.py --full --data referring       # VLTP: the mask of what a sentence means

The methods are those of tinytoken/experiments/family.py. They get the same steps of the same optimiser on the
same scenes, in two parts as in `compare`: three quarters of the steps, then a quarter at a smaller learning
rate. A method that wants a teacher, and one that drops tokens of a dense model of its own, has no first part:
it starts from the dense model's, which also teaches it.

The recipe is short, and one for all: the table says what a method costs and whether it learns, not what it
could reach with a recipe of its own, at another size. That is what the lessons are about.

The same command in several terminals, each on a CPU of its own (taskset), shares the arms, and goes on where
it was stopped. Speeds are of inference with the first seed's weights, in rounds in which every method has its
turn; the ratio to the ViT is taken inside a round. They are measured last, by one process, within a minute;
the machine has to be idle otherwise. To measure them again, delete the part speeds.json and give the command
again. Memory: the most that the arrays of a call take on one thread. Writes family_full.json, of other data
family_full_DATA.json, from which lessons/report.py makes the tables.
"""
import dataclasses
import functools

from tinytoken.errors import expect
from tinytoken.experiments import Arm, family, lesson
from tinytoken.experiments.tables import family_text

here = lesson.begin("family")
expect(here.data in family.FACES, "family", f"--data {here.data}, expected {' or '.join(family.FACES)}")
# after 240 steps the answers for pixels, clips and sentences are hardly above chance
RECIPE = family.recipe_of(here.data, steps=here.pick(4, 100, 240 if here.data == "scenes" else 1000),
                          batch=here.pick(8, 64, 64),
                          dim=here.pick(24, 64, 64), heads=here.pick(3, 2, 2),
                          # it takes long to draw clips
                          train_pictures=here.pick(32, 4000, 4000 if here.data == "actor_clips" else 16000),
                          test_pictures=here.pick(128, 500, 2000))
methods_of, METRIC = family.FACES[here.data]
FAMILY = methods_of(RECIPE)
SPEEDS = {"1": here.pick(2, 9, 31), "128": here.pick(2, 5, 9)}  # rounds, by pictures at a time
first, further = (dict(steps=RECIPE.steps - RECIPE.further, lr=RECIPE.lr),
                  dict(steps=RECIPE.further, lr=RECIPE.further_lr, new_lr_scale=RECIPE.predictor_lr_scale))
ARMS = {}
for name, method in FAMILY.items():
    start = f"{method.dense or name}, start"
    ARMS.setdefault(start, Arm(method.model, method.config, phase=f"family {start}", **first))
    ARMS[name] = Arm(method.model, method.config, start=start, phase=f"family {name}", **further)
trial_of = functools.cache(lambda seed: here.trial(RECIPE, seed, ARMS))


def train(name, seed):
    """Train an arm -> what is noted of it."""
    trial = trial_of(seed)
    model, report = trial.train(name)
    return trial.measure(model, report, family.answers(trial, model))


def trained():
    """{method: its model} with the first seed's weights."""
    return {name: trial_of(here.seed).train(name)[0] for name in FAMILY}


def speeds():
    return family.seconds(trial_of(here.seed), trained(), SPEEDS)


def memory():
    return family.memory(trial_of(here.seed), FAMILY, trained())


SETTINGS = dataclasses.asdict(RECIPE) | {"family": {name: vars(each) for name, each in FAMILY.items()}}
done = here.each({f"seed{seed} {name}": functools.partial(train, name, seed)
                  for seed in here.seeds for name in FAMILY}, SETTINGS)
rows = {name: [done[f"seed{seed} {name}"] for seed in here.seeds] for name in FAMILY}
# when all arms are done: another terminal that shares them waits for this one
megabytes = here.each({"memory": memory}, SETTINGS)["memory"]
seconds = here.each({"speeds": speeds}, SETTINGS | {"rounds": SPEEDS})["speeds"]
here.measured(rows=rows, thins={name: each.thins for name, each in FAMILY.items()}, seeds=here.seeds,
              metric=METRIC, recipe=SETTINGS, seconds=seconds, megabytes=megabytes)
print(family_text(here.results))
here.end()
