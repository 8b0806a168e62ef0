"""gradcheck: is the gradient that backward() computes the slope that the forward pass has?"""
from .check import Checked, Report, gradcheck

__all__ = ["Checked", "Report", "gradcheck"]
