"""The whole way of an assignment, by the script that does it for all four."""
import pathlib

import pytest

from tinytoken.course.assignment import run_file

PATH = pathlib.Path(__file__).parents[2] / "lessons" / "assignments" / "try_all.py"
try_all = run_file(PATH)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a1", "a2", "a3", "a4"])
def test_from_copy_to_points(name, tmp_path, capsys):
    assert try_all.main([name, "--out", str(tmp_path)]) == 0
    assert f"{name}: the untouched copy 0 of 25" in capsys.readouterr().out


def test_pasting_finds_each_place():
    assert try_all.pasted("def f():\n    raise NotImplementedError('Exercise 1.1: x')\n",
                          "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\n") == "def f():\n    return 1\n"
    assert try_all.pasted('raise NotImplementedError("Exercise 3.5: a teacher\'s x")\n',
                          "### BEGIN SOLUTION\na = 1\n### END SOLUTION\n") == "a = 1\n"
    with pytest.raises(SystemExit, match="more solutions"):
        try_all.pasted("", "### BEGIN SOLUTION\na = 1\n### END SOLUTION\n")
