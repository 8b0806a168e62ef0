"""Pictures: procedural scenes with exact masks, CIFAR, a folder of images, corruptions, and batches of them.

Every file of this folder is imported, so a new data set needs no line here: @dataset registers it.
"""
from ..registry import import_files
from .batches import Batches, channel_statistics, normalise
from .captions import CaptionedScenes, make_captions
from .cifar import Pictures, download_cifar, find_data, load_cifar
from .corruptions import CORRUPTIONS, corrupt
from .scenes import Scenes, make_scenes
from .sets import dataset, hold_out, load_pictures

__all__ = ["Batches", "CORRUPTIONS", "CaptionedScenes", "Pictures", "Scenes", "channel_statistics", "corrupt",
           "dataset", "download_cifar", "find_data", "hold_out", "load_cifar", "load_pictures",
           "make_captions", "make_scenes", "normalise"]

import_files(__name__, __path__)
