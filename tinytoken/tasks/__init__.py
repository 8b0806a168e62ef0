"""Tasks: what a model is trained for. Every file of this folder is imported: @task registers one."""
from ..registry import import_files
from .base import Task, drop_paths, task
from .caption import Caption, corpus_scores
from .classify import Classify, accuracy
from .distil import Distil
from .segment import Segment, SegmentTaught, boundary_f1, mean_iou

__all__ = ["Caption", "Classify", "Distil", "Segment", "SegmentTaught", "Task", "accuracy", "boundary_f1",
           "corpus_scores", "drop_paths", "mean_iou", "task"]

import_files(__name__, __path__)
