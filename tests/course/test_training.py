"""The training runs at the end of the assignments: with the references they work, and feed the
leaderboard."""
import numpy as np
import pytest

import tinytoken as tt
from tinytoken.course import assignment, grade, judge

GIVEN = {name: assignment.find(name) for name in ("a3", "a4")}


def solved(given):
    return (given.folder / given.script).read_text()


@pytest.mark.parametrize("name, steps", [("a3", (2, 2)), ("a4", 2)])
def test_a_short_training_and_the_packages_ops_come_back(name, steps, capsys):
    given, before = GIVEN[name], dict(vars(tt.ops))
    training = assignment.run_file(given.folder / "training.py")
    with judge.Judge(given, 60, {}) as student, np.errstate(all="ignore"):
        board = training.run(student.load(solved(given), None), steps=steps, pictures=(64, 64))
    assert all(isinstance(label, str) and isinstance(value, float) and order in ("asc", "desc") for label,
               value, order in board)
    assert {"a3": 2, "a4": 8}[name] == len(board) and vars(tt.ops) == before
    if name == "a3":
        counted, formula = capsys.readouterr().out.split("multiply-adds: ")[1].split(" counted, ")
        assert formula.startswith(counted + " by your formula")


def test_a_lost_point_or_an_assignment_without_training_has_no_leaderboard(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "_ask_judge", lambda *_: pytest.fail("a judge was started"))
    row = lambda points: grade.Row("1.1", "x", points, 1.0, "visible", "")
    a1 = assignment.find("a1")
    assert grade.leaderboard(a1, a1.folder, grade.Report(a1.name, [row(1.0)])) == []
    assert grade.leaderboard(GIVEN["a3"], GIVEN["a3"].folder,
                             grade.Report("a3_dynamicvit", [row(1.0), row(0.0)])) == []


@pytest.mark.slow
def test_the_leaderboard_of_the_reference():
    given = GIVEN["a3"]
    board = grade.leaderboard(given, given.folder,
                              grade.Report(given.name, [grade.Row("3.1", "x", 1.0, 1.0, "visible", "")]))
    (what, right, better), (_, cost, _) = board
    assert (what, better) == ("accuracy, %", "desc") and right > 40 and cost == 4.23
