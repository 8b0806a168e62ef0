"""Pictures: procedural scenes with exact masks, CIFAR from its binary archives, and batches of them."""
from .batches import Batches, channel_statistics, normalise
from .cifar import Pictures, download_cifar, find_data, load_cifar
from .scenes import Scenes, make_scenes

__all__ = ["Batches", "Pictures", "Scenes", "channel_statistics", "download_cifar", "find_data", "load_cifar", "make_scenes",
           "normalise"]
