"""How to train DynamicViT on photographs: what of the ViT's weights moves, how strong the ratio loss is, how
long it takes, and where tokens are dropped.

    python lessons/full/dynamicvit_recipe.py --full        # CIFAR-10: 20 epochs, then 3 or 10

All arms start from one ViT, and "ViT, further" goes on from it for as many steps. Every choice is made by
5,000 pictures that are held out of the 50,000; the test pictures are not read. One seed: a difference of less
than half a point says nothing. The command goes on where it was stopped, and the same command in several
terminals shares the arms. Writes dynamicvit_recipe_full_cifar10.json.

What is lost is told apart: "all tokens" is the accuracy of a plain ViT with the arm's weights, which removes
nothing. The rest is lost by the removal.
"""
import dataclasses
import functools

from tinytoken.experiments import Arm, Recipe, kept_in_training, lesson
from tinytoken.tasks import accuracy

here = lesson.begin("dynamicvit_recipe", data="cifar10")
EPOCH, FIRST = here.pick(4, 250, 703), here.pick(1, 1, 20)  # steps of an epoch; epochs of the common start
SHORT, LONG = here.pick((1, 2), (1, 2), (3, 10))  # epochs of the arms
RECIPE = Recipe(data=here.data, choosing=True, train_pictures=here.pick(64, 16000, 45000), test_pictures=16,
                held_out=here.pick(16, 1000, 5000), keys_as_queries=True,
                **here.pick(dict(batch=8, dim=16, depth=3, heads=2, patch=8, prune_before=(1, 2),
                                 keep_ratios=(0.7, 0.49)), {}, {}))
START = f"ViT {FIRST * EPOCH}"


def arm(epochs=SHORT, rate=1.0, frozen=0.0, ratio_weight=2, places=RECIPE.prune_before, options=None, **more):
    """DynamicViT. rate: the learning rate of what the ViT has, as a multiple of further_lr; that of the
    predictors is three times further_lr. frozen: the share of the steps for which the former stays."""
    settings = dict(weights=(1, ratio_weight, 0.5, 0.5)) | (dict(options=options) if options else {})
    return Arm("dynamicvit", dict(prune_before=places, keep_ratios=RECIPE.keep_ratios), start=START,
               settings=settings, steps=epochs * EPOCH, lr=RECIPE.further_lr,
               new_lr_scale=RECIPE.predictor_lr_scale, start_lr_scale=rate,
               frozen_steps=round(frozen * epochs * EPOCH), **more)


def further(epochs):
    return Arm("vit", start=START, steps=epochs * EPOCH, lr=RECIPE.further_lr)


LATER = here.pick((1, 2), (2, 3, 5), (2, 3, 5))
OFFICIAL = dict(frozen=1 / 6, ratio_weight=10)
ARMS = {
    "ViT, further": further(SHORT),
    **{f"frozen first, then x {rate}": arm(rate=rate, **OFFICIAL) for rate in (0.1, 1)},
    "ratio weight 10": arm(ratio_weight=10), "as lesson 07": arm(),
    **{f"frozen first, then x {rate}": arm(rate=rate, **OFFICIAL) for rate in (0.3, 0.01)},
    "ratio weight 5": arm(ratio_weight=5),
    "always frozen": arm(rate=0, ratio_weight=10),
    "frozen first, then x 0.1, weight 5": arm(rate=0.1, frozen=1 / 6, ratio_weight=5),
    "frozen first, then x 0.1, mean weights": arm(rate=0.1, fit=dict(average=0.999), **OFFICIAL),
    "frozen first, then x 0.1, ratio pooled": arm(rate=0.1, options=dict(ratio_norm="pooled"), **OFFICIAL),
    "frozen first, then x 0.1, token KL": arm(rate=0.1, options=dict(token_loss="kl"), **OFFICIAL),
    "frozen first, then x 0.1, dropped later": arm(rate=0.1, places=LATER, **OFFICIAL),
    "ViT, further, long": further(LONG),
    **{f"frozen first, then x {rate}, long": arm(LONG, rate, **OFFICIAL) for rate in (0.1, 0.01)},
    "frozen first, then x 1, long": arm(LONG, **OFFICIAL),
}
# the ViT of lookupvit_headline.py: of the same --out, it is trained once
STARTS = {START: Arm("vit", steps=FIRST * EPOCH, lr=RECIPE.lr, phase="headline ViT")}


@functools.cache
def the_trial():
    return here.trial(RECIPE, here.seed, STARTS | {
        name: dataclasses.replace(arm, phase=f"recipe {name}") for name, arm in ARMS.items()})


def train(name):
    """Train an arm -> what is noted of it."""
    trial = the_trial()
    model, report = trial.train(name)
    row = trial.measure(model, report)
    if hasattr(model, "keep_ratios"):
        plain = trial.new("vit", model)
        row |= {"all_tokens": accuracy(trial.answers(plain), trial.test.labels), "targets": model.keep_ratios,
                "ratios": kept_in_training(trial, model)}
    return row


chosen = here.pick([START, *ARMS], [START, "ViT, further", "as lesson 07"], [START, *ARMS])
SETTINGS = dataclasses.asdict(RECIPE) | {"first": FIRST, "epochs": [SHORT, LONG], "epoch": EPOCH}
rows = here.each({name: functools.partial(train, name) for name in chosen}, SETTINGS)
print(f"{'arm':<42}{'held-out, %':>13}{'all tokens, %':>15}{'M MACs':>9}   kept in training (target)")
for name, row in rows.items():
    kept = ", ".join(f"{share:.3f} ({target:.3f})"
                     for share, target in zip(row.get("ratios", ()), row.get("targets", ())))
    whole = f"{100 * row['all_tokens']:.2f}" if "all_tokens" in row else ""
    print(f"{name:<42}{100 * row['accuracy']:>13.2f}{whole:>15}{row['macs'] / 1e6:>9.2f}   {kept}")
here.measured(rows=rows, seed=here.seed, recipe=SETTINGS)
here.end()
