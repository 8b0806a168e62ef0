"""Segmentation's metrics, by hand and by brute force, and its tasks."""
import math

import numpy as np
import pytest

from tinytoken import models, tasks
from tinytoken.data.batches import IGNORE
from tinytoken.tasks import Distil, Segment, SegmentTaught, boundary_f1, mean_iou
from tinytoken.tasks.segment import near


def maps(seed, classes=4, shape=(3, 7, 9)):
    """(answers, labels) in patches of 2 x 2 or so, some pixels without a label."""
    rng = np.random.default_rng(seed)
    answers, labels = (rng.integers(0, classes, (shape[0], 4, 5)) for _ in "al")
    answers, labels = (each.repeat(2, 1).repeat(2, 2)[:, :7, :9] for each in (answers, labels))
    labels = np.where(rng.random(shape) < 0.5, answers, labels)
    labels[rng.random(shape) < 0.1] = IGNORE
    return answers, labels.astype("uint8")


# mIoU

def test_intersection_over_union_by_hand():
    labels, answers = np.array([[[0, 0, 1], [0, 1, 1]]]), np.array([[[0, 1, 1], [0, 0, 1]]])
    assert mean_iou(answers, labels, 2) == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert mean_iou(answers, labels, 5) == mean_iou(answers, labels, 2)  # three classes that do not occur
    assert mean_iou(np.where(answers == 1, 4, answers), labels, 5) == pytest.approx(2 / 4 / 3)
    labels[0, 0, 1] = labels[0, 1, 1] = IGNORE  # where it was wrong
    assert mean_iou(answers, labels, 2) == 1


@pytest.mark.parametrize("seed", range(3))
def test_intersection_over_union_by_loops(seed):
    answers, labels = maps(seed)
    pixels = [(a, t) for a, t in zip(answers.flat, labels.flat) if t != IGNORE]
    scores = []
    for k in range(6):
        either = sum(k in pixel for pixel in pixels)
        if either:
            scores.append(sum(pixel == (k, k) for pixel in pixels) / either)
    assert len(scores) == 4 and mean_iou(answers, labels, 6) == pytest.approx(np.mean(scores))


# Boundary F1

def square(top, left, side=4, size=10):
    out = np.zeros((1, size, size), "int64")
    out[0, top:top + side, left:left + side] = 1
    return out


def test_boundaries_by_hand():
    label = square(3, 3)
    assert boundary_f1(label, label, 2) == 1
    assert boundary_f1(square(3, 4), label, 2) == 1  # off by one pixel everywhere: within reach
    assert boundary_f1(square(3, 3, 4) * 0, label, 2) == 0  # class 1 is not found; the background has no edge
    assert boundary_f1(label * 0, label * 0, 2) == 1 and boundary_f1(label * 0, label * 0 + 1, 2) == 0
    # the right outline of the wrong class: the background's is right, both classes of the object are 0
    assert boundary_f1(2 * label, label, 3) == pytest.approx(1 / 3)
    # a column of height 4, two to the right: no pixel of the object's edge is met but by the inner side
    wide = square(3, 3, 4)
    wide[0, 3:7, 7:10] = 1  # 4 x 7 in place of 4 x 4
    found, wanted = 2 * 7 + 2 * 2, 12  # pixels of the edges: the outline to the border of the picture is none
    assert boundary_f1(wide, label, 2, reach=0) < boundary_f1(wide, label, 2) < 1 and found > wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reach", [0, 1, 1.5, 2])
def test_boundaries_by_brute_force(seed, reach):
    answers, labels = maps(seed)
    pictures = []
    for answer, label in zip(answers, labels):
        places = [place for place in np.ndindex(*label.shape) if label[place] != IGNORE]

        def edge(classes, k):
            inside = {place for place in places if classes[place] == k}
            return inside, [(r, c) for r, c in inside
                            if any(beside in places and beside not in inside
                                   for beside in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)))]
        scores = []
        for k in range(4):
            (of_answer, found), (of_label, wanted) = edge(answer, k), edge(label, k)
            if not of_answer | of_label:
                continue
            hit = lambda ones, others: sum(any(math.dist(one, other) <= reach for other in others)
                                           for one in ones)
            if found and wanted:
                precision, recall = hit(found, wanted) / len(found), hit(wanted, found) / len(wanted)
                scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
            else:
                scores.append(float(of_answer == of_label))
        pictures.append(np.mean(scores))
    # two of the classes do not occur
    assert boundary_f1(answers, labels, 6, reach) == pytest.approx(np.mean(pictures))


def test_near_is_a_disc():
    dot = np.zeros((1, 7, 7), bool)
    dot[0, 3, 3] = True
    assert [near(dot, reach).sum() for reach in (0, 1, 1.5, 2)] == [1, 5, 9, 13]
    dot[0, 0, 0] = True  # a corner: nothing comes round from the other side
    assert not near(dot, 2)[0, 5:, :2].any() and not near(dot, 2)[0, 0, 5:].any()


# The tasks

def test_the_two_tasks(xp):
    model = models.Segmenter(image_size=8, num_classes=3, dim=8, depth=1, heads=2)
    assert model.task == "segment" and tasks.task.pick("segment") is Segment
    assert issubclass(SegmentTaught, Distil) and tasks.task.pick("segment_taught") is SegmentTaught
    task, images = Segment(model), np.zeros((2, 3, 8, 8), "float32")
    assert task.labels(2).shape == (2, 8, 8) and task(images, task.labels(2))[0].item() > 0
    answers, goal = maps(0)
    logits = np.eye(4)[answers]
    for task in (Segment, SegmentTaught):
        assert task.metrics(logits, xp.asarray(goal)) == {"mIoU": mean_iou(answers, goal, 4),
                                                          "boundary_f1": boundary_f1(answers, goal, 4)}
