"""Tasks: what a model is trained for. Every file of this folder is imported: @task registers one."""
import importlib
import pkgutil

from .base import Task, drop_paths, task
from .classify import Classify, accuracy
from .distil import Distil

__all__ = ["Classify", "Distil", "Task", "accuracy", "drop_paths", "task"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
