"""Faster implementations for CuPy arrays: kernels, products by cuBLASLt, captured steps. Deletable: without
this folder the plain functions run. Imported at the first use of a CUDA device; each file registers what it
implements (backend.implementation).

sources/ holds the kernels, a family per file; launcher.py checks and runs them.
"""
from . import capture, data, gemm, mixed, mixed_lookup, nccl, registered

__all__ = ["capture", "data", "gemm", "mixed", "mixed_lookup", "nccl", "registered"]
