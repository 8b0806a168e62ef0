"""The losses of masks with a query for each class (Zhang et al. 2022, arXiv 2210.05844, section 3.2): whether
the class is there, and where. Weights and what is averaged are the official code's. And which patches are
edges."""
from typing import Any

from .. import ops
from ..backend import Array, array_module
from ..data.batches import IGNORE
from ..tensor import Tensor

ABSENT = 0.1  # weight of a class that is not there
ALPHA, GAMMA = 0.25, 2  # of the focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5)


def of_pairs(values: Tensor, present: Array) -> Tensor:
    """The mean of values (B, K) over the batch's pairs of picture and class where the class is there."""
    count = array_module(present).maximum(present.sum(), 1)
    return (values * (present / count).astype(values.dtype)).sum()


def presence_loss(logits: Tensor, present: Array, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of class logits (B, K, K + 1): query k answers k where its class is there, else K, with
    weight ABSENT. A mean with these weights. present (B, K): bool."""
    xp, (batch, classes) = array_module(present), present.shape
    labels = xp.where(present, xp.arange(classes), classes)
    wanted = (labels[:, :, None] == xp.arange(classes + 1)) * (1 - smoothing) + smoothing / (classes + 1)
    weights = xp.where(present, 1.0, ABSENT)
    wanted = wanted * (weights * (weights.size / weights.sum()))[:, :, None]
    return ops.cross_entropy(logits.reshape(batch * classes, -1),
                             wanted.reshape(batch * classes, -1).astype(logits.dtype))


def focal_loss(logits: Tensor, targets: Array) -> Tensor:
    """(B, P, K) logits of P pixels, targets 0 or 1 -> (B, K): -alpha_t (1 - p_t)^2 log p_t, mean over pixels.

    p_t: the probability of what is right; alpha_t: ALPHA for ones, 1 - ALPHA for zeros."""
    sign, alpha = 2 * targets - 1, ALPHA * targets + (1 - ALPHA) * (1 - targets)
    towards = logits * sign
    return (ops.log_sigmoid(towards) * ops.sigmoid(-towards) ** GAMMA * -alpha).mean(axis=1)


def dice_loss(logits: Tensor, targets: Array) -> Tensor:
    """(B, P, K) -> (B, K): 1 - (2 sum p t + 1) / (sum p + sum t + 1), p = sigmoid(logits) (Milletari et al.
    2016, arXiv 1606.04797, with the usual 1)."""
    p = ops.sigmoid(logits)
    return 1 - ((p * targets).sum(axis=1) * 2 + 1) / (p.sum(axis=1) + targets.sum(axis=1) + 1)


def mask_loss(steps: list[tuple[Tensor, Tensor]], labels: Array, grid: Any, *, smoothing: float = 0.0,
              weights: tuple[float, float, float] = (1, 20, 1)) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over a MaskDecoder's steps -> (loss, parts summed over the steps).

    labels (B, H, W); a pixel with data.batches.IGNORE belongs to no mask. grid: of the masks, which are
    resized. weights: of the presence of a class, and of the focal and the Dice loss of its mask."""
    xp, classes = array_module(labels), steps[0][1].shape[2]
    targets = labels.reshape(len(labels), -1, 1) == xp.arange(classes)
    present, targets = targets.any(axis=1), targets.astype(steps[0][1].dtype)
    parts: Any = {"class": 0, "mask": 0, "dice": 0}
    for logits, masks in steps:
        masks = ops.resize(masks, grid=grid, size=labels.shape[1:])
        parts["class"] += presence_loss(logits, present, smoothing) * weights[0]
        parts["mask"] += of_pairs(focal_loss(masks, targets), present) * weights[1]
        parts["dice"] += of_pairs(dice_loss(masks, targets), present) * weights[2]
    return parts["class"] + parts["mask"] + parts["dice"], parts


def edge_patches(labels: Array, grid: tuple[int, int]) -> Array:
    """(B, N) bool: the patches, of `grid` rows and columns, with pixels of more than one class. labels (B, H,
    W); pixels with the label IGNORE count nowhere."""
    xp, (rows, columns) = array_module(labels), grid
    cells = labels.reshape(len(labels), rows, labels.shape[1] // rows, columns, -1).swapaxes(2, 3)
    cells = cells.reshape(len(labels), rows * columns, -1).astype("int64")
    there, most = cells != IGNORE, cells.max() + 1
    return xp.where(there, cells, -1).max(axis=2) > xp.where(there, cells, most).min(axis=2)
