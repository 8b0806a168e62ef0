"""gradcheck catches every planted mistake, calls it by its kind, and raises no false alarm on the right
ops."""
import functools

import numpy as np
import pytest

from planted import CATALOGUE, HARD, STRAIGHT_THROUGH, gradients
from tinytoken import GradientError, ops
from tinytoken.checking import gradcheck

ALL = {p.name: p for p in CATALOGUE}
RIGHT = {(p.right.name, str(p.settings), len(p.inputs(np.random.default_rng(0)))): p
         for p in CATALOGUE + STRAIGHT_THROUGH}


def check(planted, function, seed=0, **settings):
    return gradcheck(planted.call(function), *planted.inputs(np.random.default_rng(seed)), seed=seed,
                     **settings)


def test_the_catalogue_covers_every_family():
    assert len(CATALOGUE) == len(ALL) >= 40
    families = {p.right.module for p in CATALOGUE}
    assert {f"tinytoken.ops.{f}"
            for f in "arithmetic shape dense norm activation attend select grid loss".split()} <= families


@pytest.mark.parametrize("name", ALL)
def test_every_mistake_is_caught_and_named(name):
    planted = ALL[name]
    with pytest.raises(GradientError) as caught:
        check(planted, planted.wrong)
    assert name in str(caught.value) and caught.value.kind == planted.kind


@pytest.mark.parametrize("seed", (1, 2))
def test_every_mistake_is_caught_for_other_seeds(seed):
    for planted in CATALOGUE:
        with pytest.raises(GradientError):
            check(planted, planted.wrong, seed)
            pytest.fail(f"{planted.name} survives seed {seed}")


hundred_seeds = pytest.mark.parametrize("seeds", [range(10),
                                                  pytest.param(range(10, 100), marks=pytest.mark.slow)])


@hundred_seeds
def test_no_false_alarm_on_100_seeds_of_the_right_ops(seeds):
    assert len(RIGHT) >= 40
    for planted in RIGHT.values():
        for seed in seeds:
            # the others by sample and direction
            check(planted, planted.right, seed, max_elements=6 if seed % 2 else 512)


@hundred_seeds
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a step to where sqrt or log is not defined
def test_no_false_alarm_on_100_seeds_of_hard_inputs(seeds):
    for function, *makers in HARD.values():
        for seed in seeds:
            rng = np.random.default_rng(seed)
            inputs = [make(rng) for make in makers]
            gradcheck(function, *inputs, seed=seed, max_elements=3 if seed % 2 else 512)


def straight_through(planted, function, seed=0):
    """The check of a hard sample: its soft path by differences, then the same gradient from the hard output,
    exactly."""
    inputs = planted.inputs(np.random.default_rng(seed))
    gradcheck(planted.call(function), *inputs)
    upstream = np.random.default_rng(seed + 1).standard_normal(inputs[0].shape)
    soft, hard = (gradients(function, inputs, upstream, **planted.settings, hard=h) for h in (False, True))
    assert all(np.array_equal(s, h)
               for s, h in zip(soft, hard)), "the hard output's gradient is not the soft one's"


def test_straight_through_has_the_soft_gradient_exactly():
    for seed in range(20):
        straight_through(STRAIGHT_THROUGH[0], ops.gumbel_softmax, seed)


@pytest.mark.parametrize("planted", STRAIGHT_THROUGH, ids=lambda p: p.name)
def test_straight_through_mistakes_are_caught(planted):
    with pytest.raises(AssertionError, match="not the soft one's"):
        straight_through(planted, planted.wrong)


def test_a_hard_sample_is_not_to_be_differenced():
    planted = STRAIGHT_THROUGH[0]
    hard = functools.partial(ops.gumbel_softmax, hard=True)
    with pytest.raises(GradientError, match="does not change with this input") as caught:
        check(planted, hard)
    assert caught.value.kind == "flat"
