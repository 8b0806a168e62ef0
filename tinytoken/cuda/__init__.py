"""Fused kernels for the ops, on CuPy arrays. Deletable: without it the plain ops run. Imported at the first use of a CUDA device.

sources/ holds the kernels, a family per file; launcher.py checks and runs them; registered.py makes them implementations of ops.
"""
from ..backend import faster
from . import capture, data, gemm, mixed, mixed_lookup, registered


def register():
    """Put the kernels in place for CuPy arrays. `tinytoken.plain()` switches them off."""
    registered.register()
    faster.update(captured_run=capture.CapturedRun, captured=capture.Captured, residual=mixed.residual, precision=gemm.precision,
                  gather_branch=mixed_lookup.gather, infuse_branch=mixed_lookup.infuse,
                  random_bits=data.random_bits, gather_pictures=data.gather_pictures, erase_boxes=data.erase_boxes,
                  mix_pictures=data.mix_pictures)
