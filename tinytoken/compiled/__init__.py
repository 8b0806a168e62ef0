"""Faster implementations for NumPy arrays: the loops of some ops compiled by Numba (extra `fast`). Deletable:
without this folder, or without Numba, the plain functions run. Imported by tinytoken where Numba is; each
file registers what it implements (backend.implementation).

kernels.py holds the loops; launcher.py says which calls they take, and imports them, and Numba, at the first.
registered.py has the ops; branches.py and lookup.py what spans several.
"""
from . import branches, lookup, registered
from .launcher import why_not

__all__ = ["branches", "lookup", "registered", "why_not"]
