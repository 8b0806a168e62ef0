"""Every option of every model, in every precision, with the kernels in place against the plain ops: a
training step's loss and gradients, and what the model answers. Whatever is offered is listed here, or the
first tests fail: a model, an option, a choice of an option, an argument of a call."""
import dataclasses
import functools
import inspect
import itertools
import re

import numpy as np
import pytest

import tinytoken as tt
from tinytoken.backend import module_for, products_in, to_device, to_numpy
from tinytoken.cuda.gemm import PRECISIONS
from tinytoken.cuda.weights import Weights
from tinytoken.models import Sizes, lookupvit, model
from tinytoken.tasks import task as tasks
from tinytoken.train import loss_and_grads

MODELS = {name: kind for name, kind in model.items() if kind.__module__.startswith("tinytoken.")}
SIZES = dict(image_size=16, patch_size=4, dim=32, depth=2, heads=2, mlp_ratio=2, num_classes=3)  # 16 patches

# The options that a model has, of these, are what it is tried with first ...
FIRST = {"exits": (1,), "complementary": False, "prune_before": (1,), "keep_ratios": (0.5,),
         "compressed": (2, 2), "r": 2, "prune_in": (0,), "decoder_dim": 16, "decoder_heads": 2, "hidden": 16}
FIRST_DECIDES = {option: FIRST[option] for option in ("prune_before", "keep_ratios")}
CLIPS = {"frames": 4, "compressed": (1, 2, 2)}
PYRAMIDS = {"depths": (4, 1), "layer_scale": 0.25}  # of 1e-6, their default, nothing would be seen
# ... and then each of these, if it has all of its options. drop_path is the task's.
LOOKUP = [dict(zip(("reuse", "norm", "classifiers"), values))
          for values in itertools.product(lookupvit.REUSE, ("qk", "pre"), ("both", "compressed"))]
TOKENS = [{"distilled": True}, {"reg_tokens": 3}, {"no_embed_class": True}, {"qk_norm": True},
          {"layer_scale": 0.5}, {"pre_norm": True}, {"eps": 0.1},
          {"pool": "mean", "class_token": True, "final_norm": "pooled"}, {"final_norm": "none"},
          {"distilled": True, "reg_tokens": 2, "no_embed_class": True, "qk_norm": True, "layer_scale": 0.5,
           "pre_norm": True, "eps": 0.1, "drop_path": 0.5}]
CHANGES = [{}, {"drop_path": 0.5}, {"image_size": (16, 8)}, {"channels": 1}, {"qkv_bias": False},
           {"pool": "mean"}, {"official": True}, *TOKENS,
           {"depth": 3, "prune_before": (1, 2), "keep_ratios": (0.7, 0.4)},
           {"depth": 3, "prune_before": (1, 2), "keep_ratios": (0.7, 0.4), "official": True},
           {"compressed": (1, 1)}, {"compressed": (3, 2)}, {"compressed": (4, 4)}, {"lookup_mlp_ratio": 1.0},
           {"frames": 2}, {"frames": 3, "tubelet": (1, 8, 8)}, {"frames": 4, "compressed": (2, 3, 1)},
           {"r": 0}, {"r": (3, 0)}, {"r": 8}, {"qkv_bias": True, "skip_lam": 3.0, "stem_dim": 8}, *LOOKUP,
           {"dims": (16, 24), "layer_scale": 0.0}, {"window_size": 2}, {"window_size": 4, "image_size": (48, 16)},
           {"depths": (1, 2, 1), "dims": (16, 24, 40), "layer_scale": 1e-6},
           {"depths": (1, 4, 1), "embed_dim": 16, "heads": (1, 4, 2)},
           {"rates": ((2, 2), 1), "mlp_ratios": (1, 2), "stem_convs": 1, "heads": (4, 2)},
           {"rates": (1, (2, 1)), "depths": (1, 1), "dims": (16, 24), "heads": 2},
           {"semantic": (1, 1), "base": 0}, {"semantic": (2, 3), "queries": "learned", "shortcut": False},
           {"queries": "pooled", "layer_scale": 0.5},
           {"dumbbell": 4, "semantic_stage": 1, "depths": (1, 4), "seeds": 1, "reach": 2, "window_size": 2},
           {"use_global": False, "relative_pos": True, "shortcut": True, "embed_dim": 32},
           {"depths": (3, 1), "prune_before": (1, 2), "keep_ratios": (0.3, 0.6)},
           {"depths": (3, 1), "prune_before": (1, 2), "keep_ratios": (0.3, 0.6), "stale": False},
           {"tokens_type": "transformer", "token_dim": 8, "qkv_bias": True},
           {"splits": ((5, 2, 2), (3, 2, 1))},
           {"meta_tokens": 3}, {"depths": (1, 1, 2), "dims": (16, 16, 32), "attn_type": ("C", "D2", "S"),
                                "head_dim": 8},
           {"complementary": True, "depth": 3, "alpha": 0.5, "critical": "random"}, {"eta": 0.4},
           {"critical": "none"}, {"exits": (1, 2), "depth": 3, "official": True},
           {"tau": 0.2, "aggregate": 0.5}, {"choose": "constant", "length": 3}, {"choose": "random"},
           {"choose": "class", "depth": 3, "reactivate": 3},
           {"prune_in": (0, 1), "keep_rates": (0.8, 0.6), "key_weight": 4.0, "tubelet": (1, 4, 4)},
           *({"rule": rule} for rule in ("random", "frames", "global")),
           {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 1, "hidden": 8}, {"decoder_depth": 0},
           {"width": 16}, {"read": (1,), "stages": 1, "decoder": "dot"}, {"new_classes": 1, "layers": 1},
           {"shrink": "strided", "placed": True},
           {"shrink": "strided", "decoder": "linear"}, {"shrink": "edges", "extra": 3},
           {"shrink": "average", "decoder": "mlp"}, {"shrink": "random", "extra": 2},
           {"backbone": "dynamicvit", "options": FIRST_DECIDES}, {"backbone": "lookupvit"},
           {"backbone": "swin"}, {"backbone": "convnext", "options": {"layer_scale": 0.25}},
           {"backbone": "stvitr", "options": {"depths": (4, 1)}},
           {"backbone": "dynamicswin", "options": FIRST_DECIDES | {"depths": (2, 1)}},
           *({"backbone": name, "options": FIRST_DECIDES | PYRAMIDS | {"depths": (2, 1)}}
             for name in ("dynamicconvnext", "randompaths", "fastpath"))]
# Arguments of a model's call, by the modes in which they are tried; the task gives the others.
EVAL_CALLS = [{}, {"trace": True}, {"refined": False}, {"mean_of_heads": True}, {"compressed": (3, 3)},
              {"keep": "half"}, {"compressed": (2, 3, 1)}, {"tau": 0.2}, {"keep": "half", "bucket": 2},
              {"ratios": (0.75,)}, {"hide": True}]
TRAIN_CALLS = [{"trace": True}, {"hard": False}, {"keep": "half"}, {"compressed": (3, 3)},
               {"compressed": (2, 3, 1)}, {"tau": 0.2}, {"ratios": (0.75,)}, {"hide": True}]
BY_TASK = {"noise", "paths", "words", "draw", "boxes"}


def options(kind):
    """{name: field} of what its configuration has beside the sizes of all models."""
    common = {field.name for field in dataclasses.fields(Sizes)} - {"image_size", "channels"}
    return {field.name: field for field in dataclasses.fields(kind.Config) if field.name not in common}


def cases(name):
    """The changes that a model is tried with."""
    known = {field.name for field in dataclasses.fields(MODELS[name].Config)} | {"drop_path"}
    sides = 3 if "frames" in known else 2  # of a grid
    return [change for change in CHANGES
            if change.keys() <= known and len(change.get("compressed", range(sides))) == sides]


def by_default(name, change, precision):
    """Whether a case is in the default run: in bf16, of every configuration the first model, and of LOOKUP a
    half with all pairs of reuse and norm; of the rest what comes first."""
    config = MODELS[name].Config
    first = name == next(other for other, kind in MODELS.items() if kind.Config is config)
    half = change not in LOOKUP or sum(LOOKUP.index(change) // n for n in (1, 2, 4)) % 2 == 0
    return not change or precision == "bf16" and first and half


def label(name, change):
    return " ".join([name, *(f"{option}={value}" for option, value in change.items())]).replace(" ", "-")


def configured(name, change):
    """Its configuration."""
    known = options(MODELS[name])
    first = FIRST | (PYRAMIDS if "depths" in known else CLIPS if "frames" in known else {})
    mine = {option: value for option, value in first.items() if option in known}
    return SIZES | mine | {option: value for option, value in change.items() if option != "drop_path"}


# Nothing is left out

@pytest.mark.parametrize("name", MODELS)
def test_every_option_is_tried_with_every_choice(name):
    tried = values_of(name, cases(name))
    assert {option for option, values in tried.items() if len(values) < 2} == set(), "list them in CHANGES"
    for option, field in options(MODELS[name]).items():
        if field.type is str:
            with pytest.raises(tt.InputError) as refused:
                tt.models.create(name, **configured(name, {option: "?"}))
            assert tried[option] == choices(str(refused.value)), f"{option}: list all in CHANGES"


def values_of(name, changes):
    """{option: its values} in these cases of a model, as text."""
    return {option: {str(configured(name, change).get(option, field.default)) for change in changes}
            for option, field in options(MODELS[name]).items()}


def test_the_default_run_has_every_choice_in_bf16():
    for config in {kind.Config for kind in MODELS.values()}:
        name = next(name for name, kind in MODELS.items() if kind.Config is config)
        often = [change for change in cases(name) if by_default(name, change, "bf16")]
        assert values_of(name, often) == values_of(name, cases(name))


def choices(message):
    """What a message says is expected."""
    return set(re.split(", | or ", re.search(r"expected (?:one of )?(.*)", message)[1]))


def test_choices_are_read_off_the_message():
    assert choices("ViT: pool '?', expected token or mean") == {"token", "mean"}
    assert choices("LookupViT: reuse '?', expected one of a, b, c") == {"a", "b", "c"}


def test_every_change_is_of_some_model():
    assert [change for change in CHANGES if not any(change in cases(name) for name in MODELS)] == []


@pytest.mark.parametrize("name", MODELS)
def test_every_argument_of_a_call_is_tried(name):
    tried = BY_TASK | {argument for call in EVAL_CALLS + TRAIN_CALLS for argument in call}
    assert arguments(MODELS[name]) <= tried, "list them in EVAL_CALLS or TRAIN_CALLS"


def arguments(kind):
    """The arguments of its call beside the pictures: what it hands on (**options), the class above takes."""
    found = set()
    for owner in kind.__mro__:
        if "forward" in vars(owner):
            parameters = inspect.signature(owner.forward).parameters.values()
            found |= {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
            if all(p.kind != p.VAR_KEYWORD for p in parameters):
                break
    return found - {"self", "images", "clips"}


# What is tried

def made(name, change, seed=0):
    """(task, batch, draws), on the device."""
    tt.manual_seed(seed)
    config = configured(name, change)
    network = tt.models.create(name, **config).to("cuda")
    kind, rng = tasks.pick(network.task), np.random.default_rng(1)
    teacher = (dense(network, config).to("cuda"),) if kind.taught else ()
    task = kind(network, *teacher, smoothing=0.1, drop_path=change.get("drop_path", 0.0))
    images = rng.standard_normal((3, *network.config.input_shape)).astype("float32")
    # of pictures, of their pixels, or sentences with masks
    labels = rng.integers(0, 2 if network.task == "refer" else 3, task.labels(3).shape)
    batch = [to_device(array, "cuda") for array in (images, labels)]
    return task, batch, task.noise(3, 0, 0, module_for("cuda"))


def dense(network, config):
    """Its teacher: the model that it is a form of, with the same options; of a Segmenter, one with that
    backbone."""
    backbone = getattr(network, "backbone", None)
    forms = type(backbone or network).__mro__
    kind = next(kind for kind in forms if kind in MODELS.values() and kind.task == "classify")
    taken = inspect.signature(kind.Config).parameters
    if backbone is not None:
        mine = {option: value for option, value in network.config.options.items() if option in taken}
        return type(network)(**config | {"backbone": kind.__name__.lower(), "options": mine})
    return kind(**{option: value for option, value in config.items() if option in taken})


def trained(name, change, precision):
    """A training step's loss and gradients {name: array}, as `fit` computes them: see cuda.capture."""
    task, batch, draws = made(name, change)
    params = task.model.train().parameters()
    with products_in(precision, "cuda"), Weights(tt.nn.flatten(params)).in_use():
        loss, _ = loss_and_grads(task, params, batch, draws=draws)
    return float(loss), {n: to_numpy(p.grad) for n, p in task.model.named_parameters()}


def answered(name, change, precision):
    """{mode and call: logits} of all calls, and of those with trace=True the weights; of a pyramid, which
    has none to keep, the maps of all calls."""
    task, (images, _), draws = made(name, change)
    draws.pop("which", None)  # for the task alone
    network, found = task.model, {}
    for training, calls in ((False, EVAL_CALLS), (True, TRAIN_CALLS)):
        for call in calls:
            if not call.keys() <= arguments(type(network)) or refused(network, call):
                continue
            call = call | {argument: halves(network) for argument, value in call.items() if value == "half"}
            # in eval mode the draws of RandomTokens and RandomPaths depend on every bit; nothing is dropped
            noise = {argument: draw for argument, draw in draws.items() if argument == "noise"}
            drawn = draws if training else noise if "random" in str((name, change)) else {}
            with products_in(precision, "cuda"), tt.no_grad():
                out = network.train(training)(images, **drawn, **call)
            where, of = ("train" if training else "eval", *call), getattr(out, "features", out)
            found |= {(*where, "logits"): out.logits.numpy()} | {
                (*where, i): kept.numpy() for i, kept in enumerate(getattr(of, "maps", of.attention))}
    return found


def refused(network, call):
    """Whether this model has no such call: two heads' mean of one head, a larger grid than the pictures', as
    many shares as it has no places."""
    if "ratios" in call:
        return len(call["ratios"]) != len(network.config.prune_before)
    if "compressed" in call:
        grid, own = call["compressed"], network.patch_embed.grid
        return len(grid) != len(own) or not all(n <= most for n, most in zip(grid, own))
    if "hide" in call:
        return network.config.official
    return "mean_of_heads" in call and network.config.classifiers != "both"


def halves(network):
    """Forced decisions, a mask per stage: as many patches are kept in every image, and not the same."""
    rng, shape = np.random.default_rng(2), (3, network.num_patches)
    places = to_device(rng.permuted(np.broadcast_to(np.arange(shape[1]), shape), axis=1), "cuda")
    counts = network.counts if hasattr(network, "counts") else [8] * len(
        getattr(network.config, "exits", None) or network.config.prune_before)
    return [places < count for count in counts]


LOSS = {"fp32": 2e-5, "tf32": 2e-3, "bf16": 0.01}  # relative gaps that are allowed
LARGEST = {"fp32": 1e-4, "tf32": 0.02, "bf16": 0.05}  # of the largest gradient of a layer, or of the logits


# Layers before a ReLU: rounding to bf16 moves a value by about 0.4 % of the values' spread, so that about as
# many are switched on or off. Single elements of a gradient jump; the gap's length is about the root of that
# share, 6 % of the gradient's.
# VLTP has such layers in three transformers, one after another, of which the last reads few tokens. EVAD's
# largest values of a box, besides: where another of 49 is the largest, the slope goes to other tokens.
SWITCHED = {"segvit": 0.1, "atvit": 0.1, "evad": 0.2, "vltp": 0.2}


@functools.cache
def plain(function, name, number):
    with tt.plain():
        return function(name, cases(name)[number], "fp32")


CASES = [pytest.param(name, number, precision, id=label(name, change) + f"-{precision}",
                      marks=[] if by_default(name, change, precision) else pytest.mark.slow)
         for name in MODELS for number, change in enumerate(cases(name)) for precision in PRECISIONS]


@pytest.mark.parametrize("name, number, precision", CASES)
def test_a_step_is_near_the_plain_one(name, number, precision, there):
    loss, gradients = trained(name, cases(name)[number], precision)
    assert any(kernel.startswith("bf16_") for kernel, *_ in there) == (precision == "bf16")
    expected, plain_gradients = plain(trained, name, number)
    assert loss == pytest.approx(expected, rel=LOSS[precision]) and gradients.keys() == plain_gradients.keys()
    switched = name in SWITCHED and precision == "bf16"
    size, share = ((np.linalg.norm, SWITCHED[name]) if switched else
                   (lambda g: np.abs(g).max(), LARGEST[precision]))
    layer, largest = lambda parameter: parameter.rpartition(".")[0], {}
    for n, g in plain_gradients.items():  # a bias of keys has none: no softmax sees what they have in common
        largest[layer(n)] = max(largest.get(layer(n), 1e-5), size(g))
    for n, g in gradients.items():
        assert size(g - plain_gradients[n]) <= share * largest[layer(n)], n


@pytest.mark.parametrize("name, number, precision", CASES)
def test_answers_are_near_the_plain_ones(name, number, precision, there):
    found, expected = answered(name, cases(name)[number], precision), plain(answered, name, number)
    assert found.keys() == expected.keys() and ("eval", "trace", 1) in found
    for what, one in expected.items():
        tolerance = LARGEST[precision] * np.abs(one).max()
        np.testing.assert_allclose(found[what], one, rtol=0, atol=tolerance, err_msg=str(what))
