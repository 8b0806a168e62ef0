"""Training: `fit` with its history and checkpoints, the optimiser, inference."""
from ..backend import products_in
from ..tasks import Classify, Distil, accuracy
from . import checkpoint, optim
from .loop import fit
from .inference import infer, slice_size
from .optim import AdamW
from .parallel import loss_and_grads, share_out
from .run import Run

__all__ = ["AdamW", "Classify", "Distil", "Run", "accuracy", "checkpoint", "fit", "infer", "loss_and_grads",
           "optim", "products_in", "share_out", "slice_size"]
