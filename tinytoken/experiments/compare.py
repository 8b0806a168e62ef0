"""The main job: a ViT, a DynamicViT and a LookupViT trained side by side, with a table and a picture.

The table says what they cost and reach; the picture shows what they looked at. All get as many steps of the
same optimiser, in two parts: three quarters of the steps, then the last quarter with a smaller learning rate.
DynamicViT has no first part of its own. It starts from the ViT's, which is also its teacher, and learns in
the last quarter what to drop, while ViT and LookupViT simply go on: none is ahead by longer training.
"""
import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from .. import backend, plot
from ..backend import products_in, to_numpy
from ..errors import expect, install
from ..files import check_target, claimed, write_json
from ..random import manual_seed
from ..tensor import no_grad
from ..train import Run
from .arm import Arm, Recipe
from .timing import images_per_second, machine, peak_memory
from .trial import Trial, kept_on_object

MOST_STEPS = 10_000_000  # training holds a learning rate for each
SHOWN = {"ViT": "vit", "DynamicViT": "dynamicvit", "LookupViT": "lookupvit"}  # the model's name: its arm


def arms(recipe: Recipe) -> dict[str, Arm]:
    """The arms {phase: Arm}, in the order of their training."""
    first: dict[str, Any] = dict(steps=recipe.steps - recipe.further, lr=recipe.lr)
    further: dict[str, Any] = dict(steps=recipe.further, lr=recipe.further_lr)
    pruned = dict(prune_before=recipe.prune_before, keep_ratios=recipe.keep_ratios)
    grid = dict(compressed=recipe.compressed)
    return {"vit-start": Arm("vit", **first),
            "vit": Arm("vit", start="vit-start", **further),
            "dynamicvit": Arm("dynamicvit", pruned, start="vit-start",
                              new_lr_scale=recipe.predictor_lr_scale, **further),
            "lookupvit-start": Arm("lookupvit", grid, **first),
            "lookupvit": Arm("lookupvit", grid, start="lookupvit-start", **further)}


def run(recipe: Recipe, out: str | os.PathLike, device: str = "auto", every: int = 200,
        threads: int | None = None, bar: bool = True) -> tuple[dict[str, Any], str]:
    """Run the comparison: write the checkpoints, history.jsonl, table.json and tokens.png into the folder
    `out` -> (table, a line that says where the picture is).

    What an interrupted run has finished there is not done again. Busy, which says who, where another process
    is at work on it."""
    began = time.perf_counter()
    out, device = pathlib.Path(out), backend.choose_device(device)
    expect(recipe.steps >= 4, "compare", f"{recipe.steps} steps, expected at least 4")
    expect(recipe.steps <= MOST_STEPS, "compare", f"{recipe.steps:,} steps, expected at most {MOST_STEPS:,}")
    expect(threads is None or threads >= 1, "compare", f"{threads} threads, expected at least 1")
    products_in(recipe.precision, device)  # refuses now what training would
    manual_seed(recipe.seed)  # refuses a bad one before any work
    check_target(out / "table.json", ".json")
    check_target(out / "tokens.png", ".png", probe=False)  # the same folder
    # for the whole run, so that a second one ends before its work and not between two arms
    with claimed(out / "table.json"), claimed(out / "tokens.png"):
        trial = Trial(recipe, arms(recipe), device=device, run=Run(out, every), threads=threads, bar=bar)
        expect(trial.train_set.labels.ndim == 1, "compare",
               lambda: f"{recipe.data} has labels {trial.train_set.labels.shape}, expected a class of each "
                       f"picture")
        # All ranks of a group train each arm together. Whole arms would take two ranks 55 to 57 % of the time
        # that one takes, in the best order (by `training` in lessons/results/compare_scenes_seed*.json, since
        # arms wait for their start), and together they take 52 to 55 % (lesson 17).
        training = {phase: trial.train(phase)[1] for phase in trial.arms}
        trained = {name: trial.train(phase)[0] for name, phase in SHOWN.items()}
        table = measure(trial, trained)
        seconds = round(time.perf_counter() - began, 1)
        table |= {"training": training, "this_call": {"seconds": seconds, "peak_memory_mb": peak_memory()}}
        write_json(out / "table.json", table)
        return table, draw(trial, trained, out / "tokens.png")


def measure(trial: Trial, trained: dict[str, Any]) -> dict[str, Any]:
    """The table: a row per trained model, and what it was measured on."""
    ways: dict[str, tuple[Any, dict]] = {name: (model, {}) for name, model in trained.items()}
    sample = trial.prepare(trial.test.images[:128])
    threads = trial.threads if trial.device == "cpu" else 1
    speeds = {size: images_per_second(ways, sample[:size], threads) for size in (1, 128)}
    rows = []
    for name, model in trained.items():
        row = trial.measure(model, None)
        del row["trained"]
        speed = {str(size): speeds[size][name] for size in speeds}
        rows.append({"model": name, **row, "images_per_second": speed})
    kept = kept_on_object(trained["DynamicViT"], trial.test, trial.prepare, trial.recipe.patch)
    return {"rows": rows, "test_pictures": len(trial.test.images), "recipe": dataclasses.asdict(trial.recipe),
            "machine": machine(trial.device), "kept_on_object": kept}


def draw(trial: Trial, trained: dict[str, Any], path: str | os.PathLike, count: int = 6) -> str:
    """Write tokens.png -> a line that says so, or how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return (f"no tokens.png: matplotlib is not installed ({install('matplotlib')}); "
                "run the command again for it, nothing is trained twice")
    test, images = trial.test, trial.prepare(trial.test.images[:count])
    panels: list[tuple[str, Any]] = []
    predictions: dict[str, Sequence[str]] = {}
    for name, model in trained.items():
        with no_grad():
            out = model.eval()(images, trace=True)
        panels += model.show(out)
        predictions[name] = [test.names[k] for k in to_numpy(out.logits.data).argmax(axis=1)]
    labels = [test.names[k] for k in test.labels[:count]]
    plot.tokens(path, test.images[:count], labels, predictions, panels, trial.recipe.patch)
    return f"picture: {path}"
