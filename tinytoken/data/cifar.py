"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the binary archives of https://www.cs.toronto.edu/~kriz/cifar.html.

A binary file is a row of records and nothing else: one label byte (CIFAR-100: the coarse label, then the fine one), then
1024 bytes each of red, green and blue, row by row. So a file is checked by its size and its labels; nothing is unpickled.
An archive is read in memory, only the members named here: nothing is unpacked, so no member can be written anywhere.
"""
import hashlib
import http.client
import lzma
import os
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import InputError, expect

PIXELS = 3 * 32 * 32
DEFAULT_FOLDER = "data"  # where "cifar10" and "cifar100" are looked for when TINYTOKEN_DATA is not set


@dataclass(frozen=True)
class Layout:
    """One of the two data sets: its files, and the size and digest that its archive must have."""
    title: str
    archive: str
    md5: str
    folder: str
    train: tuple
    test: tuple
    records: int  # in each training file; a test file has 10,000
    label_bytes: int  # the last of them is the label
    meta: str
    names: tuple

    @property
    def url(self):
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"
