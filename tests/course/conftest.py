"""A small assignment: one exercise with two cases, so that a test may grade it in a second."""
import pytest

from tinytoken.course import assignment

SETTINGS = """
name = "b1_doubling"
title = "Διπλάσιο"
imports = ["math", "numpy"]
tinytoken = []
seconds = 10

[[exercise]]
number = "1.1"
title = "twice"
names = ["double"]
lesson = "01"

[[exercise]]
number = "1.2"
title = "four times"
names = ["fourfold"]
lesson = "01"
"""
SCRIPT = '''# %% [markdown]
# # Doubling
# Write your code where `raise NotImplementedError` stands.

# %%
import numpy as np

# %%
def double(x):
    """2 x"""
    ### BEGIN SOLUTION
    return x + x
    ### END SOLUTION


def fourfold(x):
    """4 x"""
    ### BEGIN SOLUTION
    return double(double(x))
    ### END SOLUTION

# %%
if __name__ == "__main__":
    print(double(np.ones(3)))
'''
TESTS = '''
import numpy as np
import pytest

from tinytoken.course.checks import close


@pytest.mark.points(2, number="1.1", hint="δύο")
def test_twice(student):
    close(student.double(np.arange(3.0)), np.array([0.0, 2.0, 4.0]))


@pytest.mark.points(1, number="1.2", visibility="hidden")
def test_four_times(student):
    close(student.fourfold(np.arange(3.0)), np.array([0.0, 4.0, 8.0]))
'''


@pytest.fixture
def doubling(tmp_path):
    """The assignment b1_doubling, in an instructor's folder."""
    folder = tmp_path / "b1_doubling"
    (folder / "tests").mkdir(parents=True)
    for name, text in (("assignment.toml", SETTINGS), ("b1_doubling.py", SCRIPT), ("tests/test_b1.py", TESTS),
                       ("references.py", "def double(x):\n    return 2 * x\n")):
        (folder / name).write_text(text, encoding="utf-8")
    return assignment.load(folder)
