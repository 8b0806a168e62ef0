"""Fused kernels for the ops, on CuPy arrays. Deletable: without it the plain ops run. Imported at the first use of a CUDA device.

sources/ holds the kernels, a family per file; launch.py checks and runs them; registered.py makes them implementations of ops.
"""
from .registered import register  # noqa: F401
