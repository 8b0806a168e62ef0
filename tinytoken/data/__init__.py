"""Pictures: procedural scenes with exact masks, CIFAR from its binary archives, corruptions, and batches of them."""
from .batches import Batches, channel_statistics, normalise
from .cifar import Pictures, download_cifar, find_data, load_cifar
from .corruptions import CORRUPTIONS, corrupt
from .scenes import Scenes, make_scenes

__all__ = ["Batches", "CORRUPTIONS", "Pictures", "Scenes", "channel_statistics", "corrupt", "download_cifar", "find_data",
           "load_cifar", "make_scenes", "normalise"]
