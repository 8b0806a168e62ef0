"""All methods by what they thin: the models of lessons/related/00_family.py and lessons/full/family.py, and
why a registered model has no row there.

Every method has 64 tokens of a picture or clip (or starts with as many), the width of the ViT and as many
blocks: also the pyramids, which have one stage here; but ConvNeXt and Swin, whose decisions are made in the
last stage but one, have two, the last of one block. Another method is another line.
"""
import dataclasses
import fnmatch
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..backend import Array, array_module, to_device
from ..cost import macs
from ..data.referring import LENGTH
from ..errors import expect
from ..train import infer, loss_and_grads
from .arm import Arm, Recipe
from .timing import interleaved, peak_of_arrays
from .trial import Trial

ALL = "ViT"  # the first row of each table: the dense model
ROWS, MLP_ROWS = "rows: tokens are removed", "rows of the MLP: others take a fast path"


@dataclasses.dataclass(frozen=True)
class Method:
    """thins: rows, keys, input or nothing, and how. model: its registered name. config: its options beside
    the recipe's sizes. dense: of a method that starts from another row's model, that row."""
    thins: str
    model: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dense: str = ""

    @property
    def kind(self) -> str:
        """Which of these it thins: the first word."""
        return self.thins.replace(":", " ").replace(";", " ").split()[0]

    @property
    def base(self) -> str:
        """The row that it is compared with."""
        return self.dense or ALL


def pictures(recipe: Recipe) -> dict[str, Method]:
    """{name: Method} of those that say what is in a picture."""
    D, L, keep = recipe.dim, recipe.depth, dict(keep_ratios=recipe.keep_ratios)
    stages = dict(depths=(L - 1, 1))
    deciding = stages | keep | dict(prune_before=(1, 2, 3))
    return {
        ALL: Method("nothing", "vit"),
        "DynamicViT .7": Method(ROWS, "dynamicvit", keep | dict(prune_before=recipe.prune_before), ALL),
        "LookupViT 3x3": Method("rows: few tokens do the work", "lookupvit",
                                dict(compressed=recipe.compressed)),
        "ToMe": Method("rows: tokens are merged", "tome", dict(r=8)),
        "STViT 3x3": Method("rows: semantic tokens", "stvit", dict(semantic=(3, 3))),
        "STViT-R": Method("rows in four blocks; the map is recovered", "stvitr",
                          dict(embed_dim=D, depths=(L,))),
        "Shunted": Method("keys: merged at two rates", "shuntedtransformer",
                          dict(dims=(D,), depths=(L,), heads=4, rates=((4, 2),))),
        "LeMeViT": Method("keys: meta tokens", "lemevit",
                          dict(dims=(D, D), depths=(1, L - 1), attn_type=("C", "D"))),
        "Swin": Method("keys: those of a window", "swin", stages),
        "T2T-ViT": Method("input: windows become tokens in steps", "t2tvit", dict(token_dim=D // 6)),
        "ViT-FOD": Method("nothing; one more block on critical tokens", "vitfod"),
        "DynamicSwin .7": Method(MLP_ROWS, "dynamicswin", deciding, "Swin"),
        "ConvNeXt": Method("nothing; it has no attention", "convnext", stages),
        "DynamicConvNeXt .7": Method(MLP_ROWS, "dynamicconvnext", deciding, "ConvNeXt"),
    }


def pixels(recipe: Recipe) -> dict[str, Method]:
    """Those that answer for every pixel."""
    D, L = recipe.dim, recipe.depth
    return {
        ALL: Method("nothing", "segmenter"),
        "ViT, linear decoder": Method("nothing", "segvit", dict(decoder="linear")),
        "SegViT": Method("nothing; masks by queries", "segvit"),
        "SegViT, shrunk": Method("rows: every second one goes on, both ways", "segvit",
                                 dict(shrink="strided")),
        "SegViT, shrunk++": Method("rows: the same, and those at edges", "segvit",
                                   dict(shrink="edges", extra=8)),
        "LookupViT 3x3": Method("rows: few tokens do the work", "segmenter",
                                dict(backbone="lookupvit", options=dict(compressed=recipe.compressed))),
        "DoViT": Method("rows: sure tokens leave early", "dovit"),
        "STViT-R": Method("rows in four blocks; the map is recovered", "segmenter",
                          dict(backbone="stvitr", options=dict(embed_dim=D, depths=(1, L, 1)))),
    }


def clips(recipe: Recipe) -> dict[str, Method]:
    """Those that say what each actor of a clip does."""
    pruned = {f"EVAD {rate}": Method("rows: tokens of other frames than the key frame are removed", "evad",
                                     dict(keep_rates=rate), ALL) for rate in (0.8, 0.6)}
    return {ALL: Method("nothing", "evad", dict(keep_rates=1.0)), **pruned}


def sentences(recipe: Recipe) -> dict[str, Method]:
    """Those that draw the mask of what a sentence means."""
    of = lambda *ratios: dict(prune_before=(1, 3), keep_ratios=ratios)
    pruned = {f"VLTP {last}": Method("rows: tokens wait that the sentence does not speak of", "vltp",
                                     of(first, last), ALL) for first, last in ((0.7, 0.5), (0.5, 0.25))}
    return {ALL: Method("nothing", "vltp", of(1.0, 1.0)), **pruned}


# by data: the methods as a function of the recipe, and the metric
FACES = {"scenes": (pictures, "accuracy"), "pixel_scenes": (pixels, "mIoU"),
         "actor_clips": (clips, "accuracy"), "referring": (sentences, "mIoU")}

CONTROL = "a control: lessons 7 and 14 have it"
# registered models without a row: why
ELSEWHERE = {
    "atvit": "it thins nothing; what it adds to a ViT is for attacks (lesson related/08)",
    "lvvit": "a ViT with labels for its tokens: another recipe, not another cost",
    "dynamiclvvit": "DynamicViT with an LV-ViT in the ViT's place",
    "videovit": "lesson 15 measures it on clips", "videolookupvit": "LookupViT on clips: lesson 15",
    **dict.fromkeys(("randomtokens", "classattention", "centretokens", "learnedtokens", "pooledtokens",
                     "randompaths", "fastpath"), CONTROL)}


def recipe_of(data: str, **sizes: Any) -> Recipe:
    """A recipe in which there are 64 tokens: clips have four slots, so their patches are larger."""
    return Recipe(data=data, patch=8 if data == "actor_clips" else 4, **sizes)


def questions(data: str, labels: Array) -> list[Mapping[str, Array]]:
    """What a model is asked beside pictures with these labels, once or several times: {argument: array with a
    row for each picture}."""
    if data == "actor_clips":
        return [{"boxes": labels[:, :, :4]}]
    if data == "referring":
        return [{"words": labels[:, s, :LENGTH]} for s in range(labels.shape[1])]
    return [{}]


def asked(trial: Trial, count: int | None = None) -> list[Mapping[str, Array]]:
    """The questions about the first `count` test pictures of a trial (None: all), on its device."""
    return [{name: to_device(values, trial.device) for name, values in question.items()}
            for question in questions(trial.recipe.data, trial.test.labels[:count])]


def answers(trial: Trial, model: Any) -> np.ndarray:
    """The model's answers to the test pictures, (B, ...), or (B, questions, ...) where there are several."""
    each = [trial.answers(model, beside=question) for question in asked(trial)]
    return np.stack(each, axis=1) if len(each) > 1 else each[0]


def inference(trial: Trial, models: Mapping[str, Any], size: int,
              threads: int | None = None) -> dict[str, Callable[[], np.ndarray]]:
    """{name: a function that answers the first question about `size` test pictures} of {name: model}."""
    images, beside = trial.prepare(trial.test.images[:size]), asked(trial, size)[0]
    return {name: functools.partial(infer, model, images, threads=threads, beside=beside)
            for name, model in models.items()}


def megabytes(trial: Trial, method: Method, model: Any, dense: Any) -> dict[str, float]:
    """{call: the most that its arrays take on one thread, in MB} of a training step, forward and backward
    pass, and of inference with 128 pictures; nothing is known of a GPU's arrays. dense: the model of the
    method's base, its teacher where it wants one."""
    if trial.device != "cpu":
        return {}
    task, batch = trial.task_of(Arm(method.model), model, dense), trial.batches(0)
    draws = task.noise(len(batch[0]), 0, trial.recipe.seed, array_module(batch[0]))
    step = functools.partial(loss_and_grads, task, model.train().parameters(), batch, threads=1, draws=draws)
    step()  # flat storage is made
    run, = inference(trial, {"": model}, 128, threads=1).values()
    return {"step": peak_of_arrays(step), "inference": peak_of_arrays(run)}


def seconds(trial: Trial, models: Mapping[str, Any],
            rounds: Mapping[str, int]) -> dict[str, dict[str, list[float]]]:
    """Seconds of the models' inference, {pictures at a time: {model: by round}}. rounds: how many, by the
    pictures at a time."""
    return {size: interleaved(inference(trial, models, int(size)), count) for size, count in rounds.items()}


def memory(trial: Trial, methods: Mapping[str, Method], models: Mapping[str, Any]) -> dict[str, Any]:
    """`megabytes` of each method, of which there are `models`; nothing on a GPU."""
    found = {name: megabytes(trial, each, models[name], models[each.base]) for name, each in methods.items()}
    return {name: each for name, each in found.items() if each}


def costs(trial: Trial, methods: Mapping[str, Method], rounds: Mapping[str, int]) -> dict[str, Any]:
    """What untrained models of the methods cost, {what: {method: figure}}, as `beside_base` reads it. rounds:
    as `seconds` takes them."""
    made = {name: trial.new(each.model, **each.config) for name, each in methods.items()}
    picture = trial.prepare(trial.test.images[:1])
    return {"macs": {name: macs(model, picture).total for name, model in made.items()},
            "seconds": seconds(trial, made, rounds), "megabytes": memory(trial, methods, made)}


def beside_base(cost: Mapping[str, Any], methods: Mapping[str, Method]) -> dict[str, dict[str, float]]:
    """{method: what it costs over what its base costs}. cost: "macs" {method: how many}; "seconds" {pictures
    at a time: {method: by round}}, of which the ratio is how many times as fast it is, the median of the
    rounds; "megabytes" {method: as `megabytes` says}, of which the step's count."""
    found = {}
    for name, each in methods.items():
        row = found[name] = {"macs": cost["macs"][name] / cost["macs"][each.base]}
        for size, taken in cost["seconds"].items():
            row[size] = statistics.median(b / a for a, b in zip(taken[name], taken[each.base]))
        if cost["megabytes"].get(name):
            row["memory"] = cost["megabytes"][name]["step"] / cost["megabytes"][each.base]["step"]
    return found


def reached(results: Mapping[str, Any], path: str, metric: str) -> float:
    """What an arm of a lesson's results reached, in percent, the mean over its seeds. path: where its rows
    are, "rows/ViT"; in a part of it * stands for anything, "by_seed/*/ViT". NaN where they note another
    metric. Rows with "M macs" are in percent already."""
    found: list[Any] = [results]
    for step in path.split("/"):
        children = [one[name] for one in found for name in fnmatch.filter(one, step)]
        found = [row for child in children for row in (child if isinstance(child, list) else [child])]
    expect(found, "family", f"no rows at {path!r}")
    return statistics.mean(row.get(metric, math.nan) * (1 if "M macs" in row else 100) for row in found)


def above_base(results: Mapping[str, Any], methods: Mapping[str, Method]) -> dict[str, list[float]]:
    """{method: points above its base, by seed}, of the results of lessons/full/family.py."""
    rows, metric = results["rows"], results["metric"]
    return {name: [100 * (a[metric] - b[metric]) for a, b in zip(rows[name], rows[each.base])]
            for name, each in methods.items() if name != each.base}
