"""Tasks: what a model is trained for. Every file of this folder is imported: @task registers one."""
from ..registry import import_files
from .base import Task, drop_paths, task
from .classify import Classify, accuracy
from .distil import Distil

__all__ = ["Classify", "Distil", "Task", "accuracy", "drop_paths", "task"]

import_files(__name__, __path__)
