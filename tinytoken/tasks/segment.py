"""Segmentation: a class for each pixel. Labels (B, H, W); a pixel with the label IGNORE counts nowhere."""
import numpy as np

from ..backend import Array, to_numpy
from ..data.batches import IGNORE
from ..nn import both_sides
from .base import task
from .classify import Classify
from .distil import Distil


@task("segment")
class Segment(Classify):
    """A Segmenter's own loss, which is of pixels; mIoU and boundary F1."""

    def labels(self, size: int) -> np.ndarray:
        return np.zeros((size, *both_sides(self.model.config.image_size)), "uint8")

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        classes, answers, labels = answers.shape[-1], answers.argmax(axis=-1), to_numpy(labels)
        return {"mIoU": mean_iou(answers, labels, classes),
                "boundary_f1": boundary_f1(answers, labels, classes)}


@task("segment_taught")
class SegmentTaught(Distil):
    """The same with a teacher, a Segmenter for pictures of the same size."""
    labels, metrics = Segment.labels, staticmethod(Segment.metrics)


def mean_iou(answers: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean intersection over union of answers (B, H, W), classes of pixels.

    Of a class: the pixels that are both answered so and labelled so, divided by those that are either, of all
    pictures together (the PASCAL VOC challenge: Everingham et al. 2010, IJCV 88; Long et al. 2015, arXiv
    1411.4038, section 5). The mean is over the classes that occur in the answers or in the labels, the
    background among them."""
    there = labels != IGNORE
    pairs = labels[there].astype("int64") * classes + answers[there]
    counts = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    either = counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal()
    return float((counts.diagonal()[either > 0] / either[either > 0]).mean())


def boundary_f1(answers: np.ndarray, labels: np.ndarray, classes: int, reach: float = 1) -> float:
    """How well answers (B, H, W) follow the outlines: the BF score (Csurka et al. 2013, BMVC, "What is a good
    evaluation measure for semantic segmentation?").

    The boundary of a class: its pixels with a neighbour above, below, left or right that has another class.
    Precision: the share of the answers' boundary that is at most `reach` pixels (between centres) from the
    labels'; recall: of the labels' from the answers'; F1 = 2 P R / (P + R). It is 0 where one of the two has
    no boundary, and 1 where the class has the same pixels in both. The mean over the classes that a picture
    has in its answers or labels, then over the pictures."""
    there, summed, count = labels != IGNORE, np.zeros(len(labels)), np.zeros(len(labels))
    for k in range(classes):
        masks = [(each == k) & there for each in (answers, labels)]
        found, wanted = (mask & near(there & ~mask, 1) for mask in masks)
        right, met = (total(a & near(b, reach)) for a, b in ((found, wanted), (wanted, found)))
        below = right * total(wanted) + met * total(found)
        score = np.where(below > 0, 2 * right * met / np.maximum(below, 1), total(masks[0] ^ masks[1]) == 0)
        present = total(masks[0] | masks[1]) > 0
        summed, count = summed + score * present, count + present
    return float((summed[count > 0] / count[count > 0]).mean())


def near(mask: np.ndarray, reach: float) -> np.ndarray:
    """(B, H, W): the pixels that are at most `reach` from one of the mask's."""
    most, out, (height, width) = int(reach), np.zeros_like(mask), mask.shape[1:]
    wide = np.pad(mask, ((0, 0), (most, most), (most, most)))
    for down, across in np.ndindex(2 * most + 1, 2 * most + 1):
        if (down - most) ** 2 + (across - most) ** 2 <= reach ** 2:
            out |= wide[:, down:down + height, across:across + width]
    return out


def total(masks: np.ndarray) -> np.ndarray:
    """Pixels of each mask, (B,)."""
    return masks.sum(axis=(1, 2))
