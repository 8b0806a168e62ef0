"""A folder of videos by class: byclass.py says how it may look. PyAV (the extra `video`) reads them.

Of a video with n frames, in the order in which they are shown, a clip of T has the frames number
floor((i + 1/2) n / T), i = 0 ... T - 1: the middle one of each of T equal parts. Of fewer than T frames some
are taken more than once. The frames are counted by decoding them: what a file says of their number may be
missing or wrong.

A video that cannot be read to its end is left out. One that is cut off is seen only where its format tells:
of MP4 and MOV it is an error, AVI, MKV and WebM just end earlier, and the clip is of what is there.
"""
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError, expect, install
from ..files import kind_of
from . import byclass
from .cifar import Pictures
from .clips import FRAMES
from .folder import fitted, pillow
from .sets import dataset

VIDEOS = byclass.Kind("video", (".mp4", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mpeg", ".mpg", ".ogv",
                                ".webm", ".wmv"), "PyAV", 1)
FORMATS = "mov,matroska,avi,flv,mpeg,ogg,asf"  # no other: a playlist would make FFmpeg open other files
OLDEST = (17, 1)  # PyAV: with such a list of formats, FFmpeg before 8.1 crashes at .mpg files
MOST_PIXELS, MOST_FRAMES = 2 ** 26, 200_000  # of a frame, and frames of a video; more is no video of a class


@dataclasses.dataclass(frozen=True)
class Videos(Pictures):
    """A labelled set of B clips of T frames: images (B, T, 3, H, W) uint8; labels (B,) int64, indices into
    `names`."""
    moves: ClassVar[dict] = {"pad": 4}  # all frames alike; mirrored, what goes left would go right


def frames_of(count: int, frames: int) -> list[int]:
    """The numbers of the `frames` frames that are taken of `count`, see the top of this file."""
    return [(2 * i + 1) * count // (2 * frames) for i in range(frames)]


def read_video(path: str | os.PathLike, size: tuple[int, int], frames: int = FRAMES,
               where: str = "videofolder") -> np.ndarray:
    """A clip of the video at `path` -> (frames, 3, H, W) uint8. size: (H, W); where: who asks, for messages.

    Frames are turned upright, and then cut and scaled as folder.read_image does it. InputError for what PyAV
    cannot read, for more than MOST_PIXELS in a frame or MOST_FRAMES frames, and for pipes and devices."""
    _pyav(where)
    kind = kind_of(path)
    expect(kind in ("a file", "a folder", "nothing"), where, f"{path} is {kind}, expected a file")
    try:
        wanted = frames_of(sum(1 for _ in _decoded(path)), frames)
        taken = {k: fitted(_upright(frame), size) for k, frame in enumerate(_decoded(path)) if k in wanted}
        return np.stack([taken[k] for k in wanted])
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: {path} does not exist") from error
    except Exception as error:  # of a damaged file: FFmpegError, ValueError, OSError, KeyError, ...
        raise InputError(f"{where}: {path} is not a video that PyAV can read ({error})") from error


def _pyav(where):
    try:
        import av
    except ImportError:
        raise InputError(f"{where} reads videos with PyAV, which is not installed: {install('av')}") from None
    expect(tuple(map(int, av.__version__.split(".")[:2])) >= OLDEST, where,
           f"PyAV {av.__version__}, expected {'.'.join(map(str, OLDEST))} or later: {install('av>=17.1')}")
    pillow(where)
    return av


def _decoded(path) -> Iterator[Any]:
    """The frames of a video, one after another."""
    av = _pyav("videofolder")
    with av.open(f"file:{os.fspath(path)}", options={"format_whitelist": FORMATS}) as video:
        stream = video.streams.best("video")
        if stream is None:
            raise ValueError("no pictures in it")
        codec, count = stream.codec_context, 0
        if codec.width * codec.height > MOST_PIXELS:
            raise ValueError(f"frames of {codec.width} x {codec.height} pixels, more than {MOST_PIXELS:,}")
        codec.options = {"max_pixels": str(MOST_PIXELS)}  # of later frames, too; av.open would not hand it on
        codec.thread_count = 1  # files are shared out to threads
        for count, frame in enumerate(video.decode(stream), start=1):
            if count > MOST_FRAMES:
                raise ValueError(f"more than {MOST_FRAMES:,} frames")
            yield frame
        if count == 0:
            raise ValueError("no frames in it")


def _upright(frame):
    """A frame as a picture of pillow's, turned as its file says that it is to be shown."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def load_videos(path: str | os.PathLike, size: tuple[int, int] = (32, 32), frames: int = FRAMES,
                seed: int = 0) -> tuple[Videos, Videos]:
    """Read a folder of videos by class -> (train, test).

    size: the frames' (H, W). frames: of a clip. seed: of the split, where there is one. byclass.load says
    the rest."""
    _pyav("videofolder")  # refuses here, not once for each video
    train, test = byclass.load(pathlib.Path(path), VIDEOS, lambda file: read_video(file, size, frames),
                               (frames, 3, *size), seed)
    return Videos(*train), Videos(*test)


def _recognised(path):
    return byclass.recognised(path, VIDEOS)


@dataset("videofolder", recognises=_recognised, layout=VIDEOS.layouts)
def videofolder(place: Any, *, seed: int, size: int, **_: Any) -> tuple[Videos, Videos]:
    """A folder of videos by class."""
    expect(place is not None, "videofolder",
           f"a sort of folder, not one: say which, --data DIR; {VIDEOS.expected}")
    return load_videos(place, (size, size), seed=seed)
