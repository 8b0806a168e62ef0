"""Means, spreads and intervals, as numbers and as text."""
import types

import numpy as np
import pytest

from tinytoken.experiments import (difference, interval_text, over_chance, packed, range_text, spread_text,
                                   told_apart, unpacked)


def test_difference_is_paired_with_students_interval():
    rng = np.random.default_rng(0)
    right = [rng.random(1000) < 0.8 for _ in range(3)]
    worse = [a & (rng.random(1000) < share) for a, share in zip(right, (0.99, 0.98, 0.97))]
    gaps = [100 * (b.mean() - a.mean()) for a, b in zip(right, worse)]
    middle, low, high = difference(worse, right)
    assert middle == pytest.approx(np.mean(gaps)) and high - middle == pytest.approx(middle - low)
    assert high - middle == pytest.approx(4.303 * np.std(gaps, ddof=1) / 3 ** 0.5, rel=1e-3)
    middle, low, high = difference(worse[:1], right)  # as many seeds as both have: over the pictures then
    share = -gaps[0] / 100
    assert middle == pytest.approx(gaps[0])
    assert high - middle == pytest.approx(1.96 * 100 * (share * (1 - share) / 1000) ** 0.5)


def test_two_classes_are_told_apart_by_their_logits_alone():
    pictures = types.SimpleNamespace(names=("a", "b", "c"), labels=np.array([0, 2, 1, 2, 0]))
    logits = np.array([[2.0, 9, 1], [3, 9, 4], [0, 0, 0], [5, 0, 4], [1, 0, 1]])
    assert told_apart(logits, pictures, "a", "c").tolist() == [True, True, False, False]
    assert told_apart(logits, pictures, "c", "a").tolist() == [True, True, False, True]  # a tie
    assert told_apart(logits, pictures, "b", "c").shape == (3,)


@pytest.mark.parametrize("values, form, text", [
    ([3.0], ".1f", "3.0"), ([1.0, 2.0, 3.0], "+.1f", "+2.0 ± 1.0"), ([0.25, 0.5], ".3f", "0.375 ± 0.177"),
    ([1.0, None, 3.0], ".1f", "2.0 ± 1.4 (2 of 3)"), ([None, 4.0], ".1f", "4.0 (1 of 2)"),
    ([None, None], ".1f", "not known")])
def test_mean_and_spread_as_text(values, form, text):
    assert spread_text(values, form) == text


def test_a_median_is_written_with_its_ends():
    assert range_text([690.04, 439.6, 742.4]) == "690 (440 to 742)"
    assert range_text([0.0, 0.0, 24.4], ".1f") == "0.0 (0.0 to 24.4)"


def test_a_difference_and_its_interval_as_text():
    assert interval_text(-1.1, -1.92, 0.29) == "-1.1 [-1.9, +0.3]"
    assert interval_text(0.0, 0.0, 0.0) == "+0.0 [+0.0, +0.0]"


def test_shares_of_object_over_chance():
    seeds = [{"on_object": {"all": 0.1, "stages": [0.2, 0.3]}},
             {"on_object": {"all": 0.2, "stages": [0.2, 0.5]}}]
    assert over_chance(seeds) == pytest.approx([1.5, 2.75])
    assert over_chance([*seeds[:1], {"on_object": None}, {}]) == pytest.approx([2, 3])
    assert over_chance([{}, {"on_object": None}]) == []


@pytest.mark.parametrize("count", [1, 8, 13])
def test_right_answers_go_through_a_text(count):
    right = np.random.default_rng(count).random(count) < 0.6
    assert len(packed(right)) == 2 * -(-count // 8)
    back = unpacked(packed(right), count)
    assert back.dtype == bool and np.array_equal(back, right)
