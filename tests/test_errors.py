"""The form of every message."""
import shlex
import sys

import numpy as np
import pytest

from tinytoken import errors
from tinytoken.errors import GradientError, GraphError, InputError, expect, install, shape_of, this_python


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


@pytest.mark.parametrize("executable, found, command", [
    ("/env/bin/python3", "/env/bin/python", "python"),               # activated
    ("/env/bin/python3", "/usr/bin/python", "/env/bin/python3"),
    ("/env/bin/python3", None, "/env/bin/python3"),
    ("{here}/.venv/bin/python", "/usr/bin/python", ".venv/bin/python"),
    ("/my env/bin/python", None, "'/my env/bin/python'"),
    ("", "/usr/bin/python", "python")])
def test_a_command_to_paste_starts_this_python(executable, found, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors.sys, "executable", executable.format(here=tmp_path))
    monkeypatch.setattr(errors.shutil, "which", lambda name: found)
    assert this_python() == command
    assert install("pillow", "cupy>=14") == f"{command} -m pip install pillow 'cupy>=14'"


def test_a_command_to_paste_where_the_folder_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(errors.shutil, "which", lambda name: None)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert this_python() == shlex.quote(sys.executable)
