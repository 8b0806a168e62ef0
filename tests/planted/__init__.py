"""Planted mistakes: wrong vjps of the kind that students write. gradcheck must catch every one."""
from . import attention, elementwise, normalised, selection, shapes
from .catalogue import CATALOGUE, STRAIGHT_THROUGH, gradients
