"""Planted mistakes: wrong vjps of the kind that students write. gradcheck must catch every one."""
from . import attention, elementwise, hidden, normalised, selection, shapes
from .catalogue import CATALOGUE, STRAIGHT_THROUGH, gradients
from .right import HARD
