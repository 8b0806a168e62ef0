"""How much of the multiply-adds that DoViT saves shows on the clock, one picture at a time and many?

    python lessons/full/passing_speed.py --full      # a quiet machine, about two minutes

Inference of DoViT beside a ViT with the same decoder. Weights are random, so the masks of what goes on are
given: the share of the patches that goes on is drawn for each picture, evenly from half to one and a half
times its mean, and the patches at random. Pictures with about as many patches are computed together, and
`bucket` says how many "about" is: with 1 nothing is computed in vain, with a larger one there are fewer and
larger groups. Rounds are interleaved. The share that shows is (1 - time / dense time) / (1 - multiply-adds /
dense multiply-adds), a median of rounds with its quartiles. The bounds were set before the first run. Writes
passing_speed_full.json.
"""
import functools

import numpy as np

from tinytoken import macs, models, no_grad
from tinytoken.experiments import lesson
from tinytoken.experiments.timing import interleaved, shown_on_the_clock, shown_text
from tinytoken.threads import share_out
from tinytoken.train import slice_size

here = lesson.begin("passing_speed")
ROUNDS, BATCHES = here.pick(1, 9, 21), here.pick((1, 2), (1, 128), (1, 128))
SIZES = here.pick(dict(dim=24, depth=4, heads=2), dict(dim=96, depth=6), dict(dim=96, depth=6))
EXITS, SHARES = (1, 3), {"half, then a third": (0.5, 0.33), "a third, then a sixth": (0.33, 0.17)}
BUCKETS = {1: (1,), BATCHES[1]: (1, 8, 16, 32)}
rng = np.random.default_rng(here.seed)
dense = models.create("segmenter", **SIZES).eval()
dovit = models.create("dovit", exits=EXITS, **SIZES).eval()


def masks(shares, batch):
    """For each exit (batch, N): of a picture, the patches first in a random order, which all exits share."""
    order = rng.random((batch, dovit.num_patches)).argsort(axis=1).argsort(axis=1)
    of_picture = rng.uniform(0.5, 1.5, (batch, 1)) if batch > 1 else 1
    return [(order < np.rint(share * of_picture * dovit.num_patches)).astype("float32") for share in shares]


def answer(model, images, keep=None, **call):
    """All pictures, in slices as `infer` makes them."""
    size = slice_size(len(images))

    def one(a):
        given = {} if keep is None else {"keep": [each[a:a + size] for each in keep]}
        with no_grad():
            return model(images[a:a + size], **given, **call)
    return share_out(one, range(0, len(images), size))


def measure(shares, batch):
    """As shown_on_the_clock, of the dense model and of DoViT with each bucket."""
    images, keep = rng.standard_normal((batch, 3, 32, 32)).astype("float32"), masks(shares, batch)
    ways: dict = {"dense": (dense, {})}
    ways |= {f"bucket {n}": (dovit, dict(keep=keep, bucket=n)) for n in BUCKETS[batch]}
    # what is counted is what is computed, in vain or not
    cost = {name: macs(model, images, **call).total for name, (model, call) in ways.items()}
    times = interleaved({name: functools.partial(answer, model, images, **call)
                         for name, (model, call) in ways.items()}, ROUNDS)
    return shown_on_the_clock(cost, times)


rows = {f"{name}, batch {batch}": measure(shares, batch)
        for batch in BATCHES for name, shares in SHARES.items()}
for name, ways in rows.items():
    print(f"{name}: {shown_text(ways)}")
for batch, least in zip(BATCHES, (0, 0.5)):
    here.claim(f"batch {batch}, half and then a third go on: share of the saved MACs that shows, best bucket",
               max(row["shows"][1] for way, row in rows[f"{next(iter(SHARES))}, batch {batch}"].items()
                   if way != "dense"), low=least)
here.measured(rows=rows, rounds=ROUNDS, exits=EXITS, shares=SHARES, sizes=SIZES)
here.end()
