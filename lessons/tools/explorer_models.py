"""Trains the three small models of the explorer (`tinytoken explore`) on scenes, and writes them.

    python lessons/tools/explorer_models.py                    # about 10 minutes on one core
    python lessons/tools/explorer_models.py --steps 8 --out somewhere

They are trained as `compare` trains its own, at half the width: three quarters of the steps, then the rest
with a smaller learning rate, in which DynamicViT starts from the ViT. LookupViT draws its grid of compressed
tokens anew in each step (lesson 10), since the page asks it at all of them. What is written is what was
measured: the accuracies are those of the rounded weights. An interrupted training goes on where it stopped (--run).
"""
import argparse
import dataclasses
import pathlib
import sys

import numpy as np

import tinytoken as tt
from tinytoken import random
from tinytoken.data import likeness
from tinytoken.experiments import Arm, Recipe, Trial
from tinytoken.explorer import models as explorer
from tinytoken.tasks import Classify, accuracy
from tinytoken.train import Run

RECIPE = Recipe(steps=2000, dim=48, keys_as_queries=True)
MOVES = dict(pad=4)  # the same 16,000 pictures are shown many times
GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
ALL_GRIDS = tuple((n, n) for n in range(1, 9))


class Grids(Classify):
    """Cross-entropy at a grid that is drawn for each step: ClassifyGrids of lesson 10, for one head."""

    def noise(self, size, step, seed, xp=np):
        number = random.integers((1,), len(GRIDS), site="explorer.grid", step=step, seed=seed)
        return {"number": xp.full(size, int(number[0]))}

    def __call__(self, images, labels, number):
        out = self.model(images, compressed=GRIDS[int(number[0])])
        return self.model.loss(out, labels, smoothing=self.smoothing)


def arms(recipe):
    first = dict(steps=recipe.steps - recipe.further, lr=recipe.lr)
    further = dict(steps=recipe.further, lr=recipe.further_lr)
    pruned = dict(prune_before=recipe.prune_before, keep_ratios=recipe.keep_ratios)
    grid = dict(compressed=(4, 4))
    return {"vit-start": Arm("vit", **first), "vit": Arm("vit", start="vit-start", **further),
            "dynamicvit": Arm("dynamicvit", pruned, start="vit-start", new_lr_scale=recipe.predictor_lr_scale,
                              **further),
            "lookupvit-start": Arm("lookupvit", grid, task=Grids, **first),
            "lookupvit": Arm("lookupvit", grid, task=Grids, start="lookupvit-start", **further)}


def measured(trial, models):
    """{name: {"accuracy": ..., "macs": ...}}, of DynamicViT by the share kept, of LookupViT by the grid."""
    one = trial.prepare(trial.test.images[:1])

    def at(model, **call):
        return {"accuracy": accuracy(trial.answers(model, **call), trial.test.labels),
                "macs": tt.macs(model, one, **call).total}

    by_share = {}
    for share in explorer.KEEPS:
        with explorer.keeping(models["dynamicvit"], share):
            by_share[f"{share:.2f}"] = at(models["dynamicvit"])
    by_grid = {f"{m}x{n}": at(models["lookupvit"], compressed=(m, n)) for m, n in ALL_GRIDS}
    return {"vit": {"at": {"": at(models["vit"])}}, "dynamicvit": {"at": by_share},
            "lookupvit": {"at": by_grid}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--out", type=pathlib.Path, default=explorer.HERE, help="default: into the package")
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/explorer"))
    parser.add_argument("--test-pictures", type=int, default=RECIPE.test_pictures)
    args = parser.parse_args()
    recipe = dataclasses.replace(RECIPE, steps=args.steps, test_pictures=args.test_pictures)
    trial = Trial(recipe, arms(recipe), run=Run(args.run), threads=1, bar=sys.stderr.isatty(), **MOVES)
    about = {"data": recipe.data, "classes": list(trial.test.names),
             "mean": list(map(float, trial.batches.mean)), "std": list(map(float, trial.batches.std)),
             "bounds": likeness.bounds(trial.train_set.images), "test_pictures": len(trial.test.images),
             "seed": recipe.seed, "recipe": dataclasses.asdict(recipe) | MOVES | {"grids": GRIDS}, "models": {}}
    trained = {name: trial.train(name)[0] for name in explorer.NAMES}
    explorer.save(args.out, trained, about)
    rounded, _ = explorer.load(args.out)
    about["models"] = {name: values | {"parameters": rounded[name].parameter_count()}
                       for name, values in measured(trial, rounded).items()}
    explorer.save(args.out, rounded, about)
    print(f"wrote {args.out / explorer.WEIGHTS}, {(args.out / explorer.WEIGHTS).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
