"""DynamicViT on photographs, in the recipe that dynamicvit_recipe.py chose: what does it lose, and does it
choose better than simpler rules?

    python lessons/full/dynamicvit_headline.py --full        # CIFAR-10, 3 seeds

All arms of a seed start from one ViT, trained for 20 epochs, and get the same further steps of the same
optimiser; the ViT itself goes on for as long, and is what the others are compared with. The controls of
lesson 07 keep the same number of tokens at the same places. 5,000 of the 50,000 pictures are left out of
training: the recipe was chosen by them. The bounds were set before the first run. The command goes on where
it was stopped, and the same command in several terminals shares the arms. Writes
dynamicvit_headline_full_cifar10.json.

What is lost is told apart: "all tokens" is the accuracy of a plain ViT with the arm's weights, which removes
nothing. The rest is lost by the removal.
"""
import dataclasses
import functools

from tinytoken.experiments import (Arm, Recipe, difference, interval_text, kept_in_training, lesson, packed,
                                   spread_text, unpacked)
from tinytoken.tasks import accuracy

here = lesson.begin("dynamicvit_headline", data="cifar10")
EPOCH, FIRST, FURTHER = here.pick(4, 250, 703), here.pick(1, 1, 20), here.pick(1, 2, 3)  # steps; epochs
RECIPE = Recipe(data=here.data, train_pictures=here.pick(64, 16000, 45000),
                test_pictures=here.pick(64, 2000, 10000), held_out=here.pick(16, 1000, 5000),
                keys_as_queries=True,
                **here.pick(dict(batch=8, dim=16, depth=3, heads=2, patch=8, prune_before=(1, 2)), {}, {}))
START, VIT, D7, D5 = "ViT", "ViT, further", "DynamicViT .7", "DynamicViT .5"
EXACT, LEARNED = (1, 0, 0.5, 0.5), (1, 10, 0.5, 0.5)  # weights of the losses: class, ratio, KL, token


def arm(model, rho=None, weights=EXACT, **more):
    """An arm that goes on from START. rho: its keep ratio, if it drops tokens."""
    places, config, settings = RECIPE.prune_before, {}, {}
    if rho:
        config = dict(prune_before=places, keep_ratios=tuple(rho ** (s + 1) for s in range(len(places))))
        settings = dict(weights=weights)
    return Arm(model, config, settings=settings, start=START, steps=FURTHER * EPOCH,
               lr=RECIPE.further_lr, **dict(new_lr_scale=RECIPE.predictor_lr_scale) | more)


CONTROLS = {"random tokens": "randomtokens", "class attention": "classattention",
            "fixed centre": "centretokens", "average pooling": "pooledtokens"}
LEARNED_SET = "fixed, learned .5"
ARMS = {VIT: arm("vit"), D7: arm("dynamicvit", 0.7, LEARNED), D5: arm("dynamicvit", 0.5, LEARNED),
        **{f"{name} .5": arm(model, 0.5) for name, model in CONTROLS.items()},
        LEARNED_SET: arm("learnedtokens", 0.5, LEARNED, new_lr_scale=100.0)}
ARMS = {name: dataclasses.replace(arm, phase=f"headline {name}") for name, arm in ARMS.items()}
# the ViT of lookupvit_headline.py: of the same --out, it is trained once
ARMS[START] = Arm("vit", steps=FIRST * EPOCH, lr=RECIPE.lr, phase="headline ViT")
seeds = [here.seed + i for i in range(here.pick(1, 1, 3))]


@functools.cache
def trial_of(seed):
    return here.trial(RECIPE, seed, ARMS)


def train(name, seed):
    """Train an arm -> what is noted of it. "right": a bit for each test picture, 1 where its answer is right,
    in hexadecimal."""
    trial = trial_of(seed)
    model, report = trial.train(name)
    logits = trial.answers(model)
    row = trial.measure(model, report, logits)
    row["right"] = packed(logits.argmax(axis=1) == trial.test.labels)
    if hasattr(model, "keep_ratios"):
        row |= {"targets": model.keep_ratios,
                "all_tokens": accuracy(trial.answers(trial.new("vit", model)), trial.test.labels)}
    if getattr(model, "score_predictor", None):
        row["ratios"] = kept_in_training(trial, model)
    return row


SETTINGS = dataclasses.asdict(RECIPE) | {"first": FIRST, "further": FURTHER, "epoch": EPOCH}
done = here.each({f"seed{seed} {name}": functools.partial(train, name, seed)
                  for seed in seeds for name in (START, *ARMS)}, SETTINGS)
rows = {name: [done[f"seed{seed} {name}"] for seed in seeds] for name in ARMS}
pictures = len(trial_of(seeds[0]).test.labels)
answers = {name: [unpacked(row.pop("right"), pictures) for row in rows[name]] for name in ARMS}
below = {name: difference(answers[VIT], answers[name]) for name in ARMS if name != VIT}
above = {name: difference(answers[D5], answers[name]) for name in ARMS if name.endswith(".5") and name != D5}

print(f"{'arm':<22}{'accuracy, %':>14}{'all tokens, %':>15}{'M MACs':>9}{'below the ViT [95 %]':>24}")
for name, by_seed in rows.items():
    gap = interval_text(*below[name]) if name in below else ""
    whole = spread_text([100 * row["all_tokens"] for row in by_seed]) if "all_tokens" in by_seed[0] else ""
    print(f"{name:<22}{spread_text([100 * row['accuracy'] for row in by_seed]):>14}{whole:>15}"
          f"{by_seed[0]['macs'] / 1e6:>9.2f}{gap:>24}")
here.claim("DynamicViT .7: points below the ViT that was trained as long", below[D7][0], high=0.5)
for name in (D7, D5):
    apart = max(abs(share - target) for row in rows[name]
                for share, target in zip(row["ratios"], row["targets"]))
    here.claim(f"{name}: largest distance of a kept share from its target", apart, high=0.02)
for name, gap in above.items():
    here.claim(f"DynamicViT .5: points above {name}", gap[0], low=0)
here.measured(rows=rows, below=below, above=above, seeds=seeds, recipe=SETTINGS)
here.end()
