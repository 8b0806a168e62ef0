"""LookupViT on clips: does it keep the accuracy of a ViT for clips at half the cost, and what does it see?

    python lessons/full/clips.py --full         # 3 seeds, 5,000 steps each; about 4 hours on one core

The clips are made (tinytoken/data/clips.py): eleven actions, of which no single frame tells any. Every arm
sees the same clips in the same order, moved by up to 2 pixels, all frames of a clip alike, and gets the same
steps of the same optimiser. The bounds were set before the first run. The command goes on where it was
stopped, and the same command in several terminals shares the arms. Writes clips_full.json, and pictures.

Two controls show that time is what is read. A ViT of the key frames alone has to stay at chance. And where
the frames of the test clips are shuffled, left and right are one and the same: asked which of the two a clip
is, every model has to be at chance, 50 %. So with the other pairs of opposites.

The picture "slopes" has time and memory of models that are not trained, over the number of tubelets, of clips
of 2 to 32 frames with tubelets of 2 x 4 x 4: of the ViT, of LookupViT with 9 compressed tokens for each
tubelet in time, and with 36 in all.
"""
import dataclasses
import functools

import numpy as np

from tinytoken import random
from tinytoken.data.clips import OPPOSITES
from tinytoken.errors import expect
from tinytoken.experiments import (Arm, Recipe, arms_text, difference, lesson, packed, timing, told_apart,
                                   unpacked)
from tinytoken.models import VideoLookupViT, VideoViT
from tinytoken.train import infer, loss_and_grads

here = lesson.begin("clips")
expect(here.data == "scenes", "clips", f"--data {here.data}: the clips are made, expected no --data")
STEPS = here.pick(4, 300, 5000)
RECIPE = Recipe(data="clips", dim=64, depth=4, heads=2, patch=8,
                train_pictures=here.pick(32, 4000, 24000), test_pictures=here.pick(64, 1000, 10000),
                **here.pick(dict(batch=8), {}, {}))
LR, MOVES, GRID = 2e-3, dict(pad=2), (2, 2, 2)
VIT, LOOKUP, ONE_WAY, KEY = "VideoViT", "VideoLookupViT 2x2x2", "no way back", "key frame"
NARROWER = "VideoViT, narrower"  # of LookupViT's multiply-adds


def arm(model, **config):
    return Arm(model, config, steps=STEPS, lr=LR)


CLIPS = {VIT: arm("videovit"), LOOKUP: arm("videolookupvit", compressed=GRID),
         NARROWER: arm("videovit", dim=42), ONE_WAY: arm("videolookupvit", compressed=GRID, reuse="none")}
ARMS = {name: dataclasses.replace(arm, phase=f"clips {name}")
        for name, arm in (CLIPS | {KEY: arm("vit")}).items()}
SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS, "lr": LR} | MOVES


@functools.lru_cache(maxsize=1)  # the clips of a seed are most of the memory
def trial_of(seed):
    return here.trial(RECIPE, seed, ARMS, **MOVES)


def key_frames_of(trial):
    """The same with the key frames alone."""
    return here.trial(RECIPE, trial.recipe.seed, ARMS, **MOVES,
                      pictures=(trial.train_set.key_frames(), trial.test.key_frames()))


def which(logits, test):
    """{pair: the share of its clips for which the logit of the right one is larger}, in %; chance is 50."""
    return {" or ".join(pair): 100 * float(told_apart(logits, test, *pair).mean()) for pair in OPPOSITES}


def train(name, seed):
    """Train an arm -> what is noted of it. "right": a bit for each test clip, 1 where its answer is right, in
    hexadecimal."""
    trial = trial_of(seed) if name != KEY else key_frames_of(trial_of(seed))
    model, report = trial.train(name)
    logits, test = trial.answers(model), trial.test
    row = trial.measure(model, report, logits)
    right = logits.argmax(axis=1) == test.labels
    row |= {"right": packed(right), "which": which(logits, test),
            "by_action": {action: float(right[test.labels == k].mean())
                          for k, action in enumerate(test.names)}}
    if name != KEY:
        logits = infer(model, test.shuffled(seed).images, trial.prepare, threads=trial.threads)
        row["shuffled"] = {"accuracy": float((logits.argmax(axis=1) == test.labels).mean()),
                           "which": which(logits, test)}
    return row


done = here.each({f"seed{seed} {name}": functools.partial(train, name, seed)
                  for seed in here.seeds for name in ARMS}, SETTINGS)
rows = {name: [done[f"seed{seed} {name}"] for seed in here.seeds] for name in ARMS}
answers = {name: [unpacked(row.pop("right"), RECIPE.test_pictures) for row in rows[name]] for name in ARMS}
above = {name: difference(answers[LOOKUP], answers[name]) for name in ARMS if name != LOOKUP}
mean_of = lambda name, read: float(np.mean([read(row) for row in rows[name]]))

print(arms_text(rows, above, "LookupViT"))
for name in CLIPS:
    texts = [f"{pair} {mean_of(name, lambda row: row['which'][pair]):.0f} % "
             f"(shuffled {mean_of(name, lambda row: row['shuffled']['which'][pair]):.0f} %)"
             for pair in rows[name][0]["which"]]
    print(f"{name}: {', '.join(texts)}; all eleven, shuffled: "
          f"{100 * mean_of(name, lambda row: row['shuffled']['accuracy']):.1f} %")
here.claim(f"{LOOKUP}: MACs, of the VideoViT's", rows[LOOKUP][0]["macs"] / rows[VIT][0]["macs"], high=0.5)
here.claim(f"{LOOKUP}: points above the VideoViT", above[VIT][0], low=-1.0)
here.claim(f"{NARROWER}: MACs, of LookupViT's", rows[NARROWER][0]["macs"] / rows[LOOKUP][0]["macs"],
           low=1)
here.claim(f"{LOOKUP}: points above {NARROWER}", above[NARROWER][0], low=0)
here.claim(f"{LOOKUP}: points above {ONE_WAY}", above[ONE_WAY][0], low=0)
here.claim("key frame alone: accuracy, %", 100 * mean_of(KEY, lambda row: row["accuracy"]),
           low=7.5, high=10.7)
for name in (VIT, LOOKUP):
    here.claim(f"{name}: left or right, %", mean_of(name, lambda row: row["which"]["left or right"]), low=90)
    here.claim(f"{name}: left or right of shuffled frames, %",
               mean_of(name, lambda row: row["shuffled"]["which"]["left or right"]), low=46.5, high=53.5)


# Time and memory over the number of tokens

FRAMES = here.pick((2, 4), (2, 4, 8, 16, 32), (2, 4, 8, 16, 32))
SCALED = {"VideoViT": lambda times: (VideoViT, {}),  # of the tubelets' steps in time
          "LookupViT, 9 for each time": lambda times: (VideoLookupViT, dict(compressed=(times, 3, 3))),
          "LookupViT, 36 in all": lambda times: (VideoLookupViT, dict(compressed=(1, 6, 6)))}


def scaled(name, frames):
    """A model for clips of so many frames, and one such clip."""
    kind, config = SCALED[name](frames // 2)
    model = kind(frames, dim=64, depth=4, heads=2, num_classes=11, **config)
    return model, random.normal((1, *model.config.input_shape), site="lesson.clips.clip", step=0)


def memory_of(model, clip):
    """The most memory that the arrays of a training step with one clip take at a time, in MB."""
    loss = lambda clip, label: model.loss(model.train()(clip), label)
    step = functools.partial(loss_and_grads, loss, model.parameters(), (clip, np.zeros(1, int)), threads=1)
    step()  # flat storage is made
    return timing.peak_of_arrays(step)


def slope(values):
    """Of a line through the last three points in a double logarithmic plot."""
    tokens = np.array([32 * frames for frames in FRAMES])
    return float(np.polyfit(np.log(tokens[-3:]), np.log(values[-3:]), 1)[0])


models = {(name, frames): scaled(name, frames) for name in SCALED for frames in FRAMES}
taken = timing.interleaved({key: functools.partial(infer, *pair, threads=1) for key, pair in models.items()},
                           rounds=here.pick(1, 5, 9))
grown = {name: {"milliseconds": [1e3 * min(taken[name, frames]) for frames in FRAMES],  # other work only adds
                "megabytes": [memory_of(*models[name, frames]) for frames in FRAMES]} for name in SCALED}
slopes = {name: {what: slope(values) for what, values in by.items()} for name, by in grown.items()}
for name, by in slopes.items():
    print(f"{name}: slope of the time {by['milliseconds']:.2f}, of the memory {by['megabytes']:.2f}")
if len(FRAMES) > 2:
    for what in ("milliseconds", "megabytes"):
        for name in list(SCALED)[1:]:
            here.claim(f"{name}: slope of {what} below the VideoViT's",
                       slopes["VideoViT"][what] - slopes[name][what], low=0.1)


def draw_slopes(figure):
    tokens = [32 * frames for frames in FRAMES]
    for axis, (what, title) in zip(figure.subplots(1, 2), (("milliseconds", "inference of a clip, ms"),
                                                           ("megabytes", "a training step, MB"))):
        for name, by in grown.items():
            axis.loglog(tokens, by[what], "o-", label=f"{name}: slope {slopes[name][what]:.2f}")
        axis.set(xlabel="tubelets", title=title, xticks=tokens, xticklabels=tokens)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


here.picture("slopes", draw_slopes)
here.measured(rows=rows, above=above, seeds=here.seeds, recipe=SETTINGS, grown=grown, slopes=slopes,
              tubelets=[32 * frames for frames in FRAMES])
here.end()
