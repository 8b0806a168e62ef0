"""A folder of videos by class: which frames are taken, how they are turned and scaled, what is left out and
what is refused. The videos are made with PyAV, which reads them, too."""
import os
import re
import sys

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tinytoken.data import Batches, load_pictures, videos
from tinytoken.data.videos import frames_of, load_videos, read_video
from tinytoken.errors import install

CLASSES = ("jump", "run")


@pytest.fixture(scope="module")
def av():
    pytest.importorskip("PIL.Image", reason="frames are scaled with pillow")
    return pytest.importorskip("av", reason="videos are read with PyAV, which is not installed")


def write(av, path, pictures, codec="ffv1", **more):
    """A video of these pictures (H, W, 3), without loss but for the codec's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream(codec, rate=25)
        (stream.height, stream.width), stream.pix_fmt = pictures[0].shape[:2], more.pop("pix_fmt", "yuv444p")
        for picture in pictures:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        video.mux(stream.encode())
    return path


def numbered(count, size=(24, 32), tint=0):
    """Pictures whose red is ten times their number, and whose blue is the tint."""
    return [np.full((*size, 3), (10 * k, 100, tint), "uint8") for k in range(count)]


def numbers(clip):
    """Which frames a clip has, read off their colours."""
    assert np.ptp(clip[:, 0].reshape(len(clip), -1).astype(int), axis=1).max() <= 4
    return np.rint(clip[:, 0].mean(axis=(1, 2)) / 10).astype(int).tolist()


def write_classes(av, path, count=4):
    for k, name in enumerate(CLASSES):
        for i in range(count):
            write(av, path / name / f"{i}.mkv", numbered(10, tint=100 * k + 10 * i))
    return path


# Which frames

def test_the_middle_frame_of_each_of_equal_parts():
    assert frames_of(8, 8) == list(range(8)) and frames_of(16, 8) == list(range(1, 16, 2))
    assert frames_of(9, 3) == [1, 4, 7] and frames_of(20, 8) == [1, 3, 6, 8, 11, 13, 16, 18]
    assert frames_of(1, 4) == [0] * 4 and frames_of(3, 5) == [0, 0, 1, 2, 2] and frames_of(7, 1) == [3]
    for count in range(1, 60):
        for frames in (1, 2, 5, 8):
            expected = [int(np.floor((i + 0.5) * count / frames)) for i in range(frames)]
            assert frames_of(count, frames) == expected and max(expected) < count


@pytest.mark.parametrize("name, codec, pix_fmt", [
    ("a.mkv", "ffv1", "yuv444p"), ("a.avi", "mpeg4", "yuv420p"), ("a.mp4", "mpeg4", "yuv420p"),
    ("a.mov", "mpeg4", "yuv420p"), ("a.mpg", "mpeg1video", "yuv420p")])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_videos_of_several_formats(av, tmp_path, name, codec, pix_fmt, count):
    """Also of those that do not say how many frames they have, or say it in vain."""
    path = write(av, tmp_path / name, numbered(count), codec, pix_fmt=pix_fmt)
    clip = read_video(path, (16, 16), 8)
    assert clip.shape == (8, 3, 16, 16) and clip.dtype == "uint8"
    np.testing.assert_allclose(clip[:, 0].mean(axis=(1, 2)) / 10, frames_of(count, 8), atol=0.5)
    assert numbers(read_video(path, (12, 20), 3)) == frames_of(count, 3)


def test_frames_are_cut_and_scaled_as_pictures_are(av, tmp_path):
    from PIL import Image
    picture = np.random.default_rng(0).integers(0, 256, (24, 48, 3), "uint8")
    path = write(av, tmp_path / "a.mkv", [picture] * 3, pix_fmt="bgr0")
    assert (read_video(path, (24, 24), 2)[1] == picture[:, 12:36].transpose(2, 0, 1)).all()
    Image.fromarray(picture).save(tmp_path / "a.png")
    for size in ((8, 8), (10, 30)):
        expected = tt.data.folder.read_image(tmp_path / "a.png", size)
        assert (read_video(path, size, 1)[0] == expected).all()


@pytest.mark.parametrize("matrix, turns", [
    ((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)], ids=str)
def test_a_video_is_turned_as_its_file_says(av, tmp_path, matrix, turns):
    """A phone that is held upright writes its frames lying, and how they are to be turned."""
    picture = np.zeros((24, 32, 3), "uint8")
    picture[:12, :16], picture[:12, 16:] = (250, 0, 0), (0, 250, 0)
    path = write(av, tmp_path / "a.mp4", [picture] * 4, "mpeg4", pix_fmt="yuv420p")
    data, (a, b, c, d) = bytearray(path.read_bytes()), matrix
    fixed = lambda *numbers: b"".join((x << 16).to_bytes(4, "big", signed=True) for x in numbers)
    at = data.index(fixed(1, 0, 0, 0, 1, 0), data.index(b"tkhd"))  # the track's matrix, in 16.16 bits
    data[at:at + 20] = fixed(a, b, 0, c, d)
    path.write_bytes(data)
    found = read_video(path, (24, 24), 1)[0].transpose(1, 2, 0).astype(int)
    expected = np.rot90(picture[:, 4:28], -turns)
    assert np.abs(found - expected).max(axis=2)[[4, 4, 19, 19], [4, 19, 4, 19]].max() < 12


# Folders

def test_a_folder_by_class(av, tmp_path):
    write_classes(av, tmp_path / "all", 5)
    train, test = load_pictures(tmp_path / "all", size=16, seed=3)
    assert train.images.shape == (8, 8, 3, 16, 16) and test.images.shape == (2, 8, 3, 16, 16)
    assert train.names == CLASSES and train.moves == {"pad": 4} and train.images.dtype == "uint8"
    for part in (train, test):
        for clip, label in zip(part.images, part.labels):
            assert numbers(clip) == frames_of(10, 8) and clip[:, 2].mean() // 95 == label
    write_classes(av, tmp_path / "parts" / "train", 2), write_classes(av, tmp_path / "parts" / "test", 3)
    train, test = load_videos(tmp_path / "parts", (16, 24), frames=4)
    assert train.images.shape == (4, 4, 3, 16, 24) and test.images.shape == (6, 4, 3, 16, 24)
    images, labels = Batches(train.images, train.labels, 4, **train.moves)(0)
    assert images.shape == (4, 4, 3, 16, 24) and sorted(labels) == [0, 0, 1, 1]


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def test_broken_videos_are_named_left_out_and_counted(av, tmp_path, capsys):
    write_classes(av, tmp_path, 10)
    (tmp_path / "jump" / "0.mkv").write_text("a text")
    (tmp_path / "jump" / "1.mkv").write_bytes(b"")
    half(write(av, tmp_path / "run" / "0.mp4", numbered(20), "mpeg4", pix_fmt="yuv420p"))
    (tmp_path / "run" / "notes.txt").write_text("a text")
    train, test = load_videos(tmp_path, (8, 8))
    assert len(train) + len(test) == 18
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(
        f"{tmp_path}: left out: 3 of 21 videos, which cannot be read (jump/0.mkv, jump/1.mkv, run/0.mp4; of "
        f"the first: ") and "Invalid data" in err and err.endswith(
        "), 1 that are no videos of a class (run/notes.txt)\n")


REFUSED = {
    "text": (lambda path: path.write_text("a text"), "Invalid data found"),
    "empty": (lambda path: path.write_bytes(b""), "Invalid data found"),
    "playlist": (lambda path: path.write_text("ffconcat version 1.0\nfile whole.mp4\n"), "Invalid argument"),
    "folder": (lambda path: path.mkdir(), "directory"),
}


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_no_video(av, tmp_path, make, reason):
    """Nor a list of other files, which FFmpeg by itself would open."""
    write(av, tmp_path / "whole.mp4", numbered(9), "mpeg4", pix_fmt="yuv420p")
    make(tmp_path / "x.mp4")
    text = rf"^here: {re.escape(str(tmp_path))}/x.mp4 is not a video that PyAV can read \(.*{reason}"
    with pytest.raises(tt.InputError, match=text):
        read_video(tmp_path / "x.mp4", (8, 8), where="here")
    if reason == "Invalid argument":
        with av.open(str(tmp_path / "x.mp4")) as video:
            assert len(list(video.decode(video=0))) == 9


def test_a_cut_off_video_of_a_format_that_does_not_tell_is_read_as_a_shorter_one(av, tmp_path):
    path = write(av, tmp_path / "a.avi", [np.random.default_rng(k).integers(0, 256, (24, 32, 3), "uint8")
                                          for k in range(20)], "mpeg4", pix_fmt="yuv420p")
    whole = read_video(path, (24, 24), 4)
    half(path)
    assert 0 < sum(1 for _ in videos._decoded(path)) < 20
    assert (read_video(path, (24, 24), 4) != whole).any()


def test_absurd_sizes_are_refused_before_they_are_decoded(av, tmp_path, monkeypatch):
    path = write(av, tmp_path / "a.mkv", numbered(12))
    for name, most, text in (("MOST_PIXELS", 500, "frames of 32 x 24 pixels, more than 500"),
                             ("MOST_FRAMES", 11, "more than 11 frames")):
        with monkeypatch.context() as changed, pytest.raises(tt.InputError, match=re.escape(text)):
            changed.setattr(videos, name, most)
            read_video(path, (8, 8))
    assert read_video(path, (8, 8)).shape == (8, 3, 8, 8)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_pipes_and_what_is_not_there(av, tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    with refuses(f"videofolder: {tmp_path / 'x.mp4'} is a pipe, expected a file"):
        read_video(tmp_path / "x.mp4", (8, 8))
    with refuses(f"videofolder: {tmp_path / 'y.mp4'} does not exist"):
        read_video(tmp_path / "y.mp4", (8, 8))


def test_what_a_path_is_called_is_no_address(av, tmp_path, monkeypatch):
    """FFmpeg takes "concat:a" for a protocol."""
    monkeypatch.chdir(tmp_path)
    assert read_video(write(av, tmp_path / "concat:a.mkv", numbered(3)).name, (8, 8)).shape == (8, 3, 8, 8)


def test_without_pyav(tmp_path, monkeypatch):
    """A folder is recognised without it, and then says what is missing."""
    pytest.importorskip("PIL.Image", reason="frames are scaled with pillow")
    for name in ("a/x.mp4", "b/x.MKV"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with refuses(f"videofolder reads videos with PyAV, which is not installed: {install('av')}"):
        load_pictures(tmp_path)
    with refuses(f"videofolder: a sort of folder, not one: say which, --data DIR; {videos.VIDEOS.expected}"):
        load_pictures("videofolder")


def test_an_old_pyav_is_refused(av, tmp_path, monkeypatch):
    monkeypatch.setattr(av, "__version__", "17.0.1")
    with refuses(f"videofolder: PyAV 17.0.1, expected 17.1 or later: {install('av>=17.1')}"):
        load_videos(tmp_path)
