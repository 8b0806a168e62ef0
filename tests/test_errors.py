"""The form of every message."""
import numpy as np
import pytest

from tinytoken.errors import GradientError, GraphError, InputError, expect, shape_of


def message(**kwargs):
    with pytest.raises(InputError) as error:
        expect(False, "matmul", **kwargs)
    return str(error.value)


def test_what_was_found_the_likely_cause_and_the_lesson():
    assert message(found="a (2, 3) @ b (4, 5)") == "matmul: a (2, 3) @ b (4, 5)"
    assert message(found="x", likely="k.swapaxes(-1, -2)") == "matmul: x\n  likely: k.swapaxes(-1, -2)"
    text = "matmul: x\n  likely: k.swapaxes(-1, -2)   (lesson 03)"
    assert message(found="x", likely="k.swapaxes(-1, -2)", lesson="03") == text
    assert message(found="x", lesson="03") == "matmul: x\n  see lesson 03"


def test_a_message_is_only_made_when_it_is_needed():
    expect(True, "matmul", lambda: 1 / 0)
    assert message(found=lambda: "made " + "late") == "matmul: made late"


def test_shapes_are_named():
    assert shape_of("a", np.zeros((8, 16, 4))) == "a (8, 16, 4)"
    assert shape_of("a", np.zeros(())) == "a ()"


def test_kinds_of_errors():
    """A wrong argument is a ValueError; a wrong gradient fails a test as an assertion does."""
    assert issubclass(InputError, ValueError) and issubclass(GradientError, AssertionError)
    assert issubclass(GraphError, RuntimeError)
