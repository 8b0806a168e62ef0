"""How much of the multiply-adds that a pyramid with two paths saves shows on the clock?

    python lessons/full/two_paths_speed.py --full      # a quiet machine, about five minutes

Inference of ConvNeXt and Swin beside their dynamic forms at keep ratios .7 and .5, with random weights (how
many positions take the slow path does not depend on them), one picture at a time and 128. Rounds are
interleaved. The share that shows is (1 - time / dense time) / (1 - multiply-adds / dense multiply-adds), a
median of rounds with its quartiles. The bound was set before the first run. Writes two_paths_speed_full.json.
"""
import functools

import numpy as np

import tinytoken as tt
from tinytoken import models
from tinytoken.experiments import lesson
from tinytoken.experiments.timing import interleaved, shown_on_the_clock, shown_text
from tinytoken.train import infer

here = lesson.begin("two_paths_speed")
ROUNDS, BATCHES = here.pick(1, 5, 9), here.pick((1, 2), (1, 128), (1, 128))
PLACES, STEPS = (1, 2, 3), (0.0, 0.2, 0.4)
SIZES = {  # maps of 16 x 16, 8 x 8 and 4 x 4 positions; decisions in the second stage
    "ConvNeXt, narrow": ("convnext", dict(dims=(24, 48, 96))),
    "ConvNeXt, wide": ("convnext", dict(dims=(96, 192, 384))),
    "Swin, wide": ("swin", dict(embed_dim=96, heads=(3, 6, 12), window_size=4))}
chosen = here.pick(["ConvNeXt, narrow"], list(SIZES), list(SIZES))


def measure(kind, options, batch):
    """As shown_on_the_clock, of the dense form and of the others."""
    options = options | dict(image_size=32, patch_size=2, depths=(1, 6, 1))
    forms = {"dense": models.create(kind, **options)}
    for ratio in (0.7, 0.5):
        forms[f"keep {ratio}"] = models.create(f"dynamic{kind}", **options, prune_before=PLACES,
                                               keep_ratios=tuple(ratio - step for step in STEPS))
    images = np.random.default_rng(here.seed).standard_normal((batch, 3, 32, 32)).astype("float32")
    macs = {form: tt.macs(model, images[:1]).total for form, model in forms.items()}
    runs = {form: functools.partial(infer, model, images) for form, model in forms.items()}
    return shown_on_the_clock(macs, interleaved(runs, ROUNDS))


rows = here.each({f"{name}, batch {batch}": functools.partial(measure, *SIZES[name], batch)
                  for name in chosen for batch in BATCHES}, {"rounds": ROUNDS})
for name, forms in rows.items():
    print(f"{name}: {shown_text(forms)}")
for name in chosen:
    here.claim(f"{name}, batch {BATCHES[-1]}, keep 0.7: share of the saved MACs that shows",
               rows[f"{name}, batch {BATCHES[-1]}"]["keep 0.7"]["shows"][1], low=0.8)
here.measured(rows=rows, rounds=ROUNDS)
here.end()
