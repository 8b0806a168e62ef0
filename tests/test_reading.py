"""Readers with bounds: what is read, and what is refused before anything is allocated for it.

The harmful inputs are small here: sizes that are only claimed, and limits that are lowered."""
import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tinytoken import reading

ARRAYS = {"a/x": np.arange(6.0).reshape(2, 3), "b": np.array("a text"), "scalar": np.float32(2.5),
          "order": np.asfortranarray(np.eye(3, 4)), "none": np.zeros((0, 4), "int64"),
          "big-endian": np.arange(4, dtype=">f4")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


# What sort of file

def pipe(path):
    os.mkfifo(path)


UNREADABLE = {"none": (lambda path: None, "does not exist"),
              "folder": (os.mkdir, "cannot be read: Is a directory"),
              "pipe": (pipe, "cannot be read: not a regular file"),
              "device": (lambda path: path.symlink_to("/dev/zero"), "cannot be read: not a regular file"),
              "link to itself": (lambda path: path.symlink_to(path),
                                 "cannot be read: Too many levels of symbolic links")}


@pytest.mark.parametrize("read", [reading.read_bytes, reading.read_json, reading.read_rows, reading.read_npz])
@pytest.mark.parametrize("make, text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_regular_file_is_refused_at_once(make, text, read, path):
    make(path)
    with refuses(f"who: {path} {text}"):
        read(path, "who")


def test_a_name_that_no_file_can_have():
    with refuses("who: a\0b cannot be read: embedded null byte"):
        reading.read_bytes("a\0b", "who")


def test_a_pipe_is_not_written_to_either(path):
    pipe(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a regular file"):
        reading.open_regular(path, "ab")
    os.close(reader)


# Texts and JSON

def test_bytes_up_to_a_limit(path):
    path.write_bytes(b"12345")
    assert reading.read_bytes(path, "who") == reading.read_bytes(path, "who", 5) == b"12345"
    with refuses(f"who: {path} has more than 4 bytes"):
        reading.read_bytes(path, "who", 4)


def test_an_object_of_json(path):
    path.write_text('{"a": [1, null]}')
    assert reading.read_json(path, "who") == {"a": [1, None]}
    for text, reason in ((b"", "is not JSON"), (b"{", "is not JSON"), (b'{"a": "\xff"}', "is not JSON"),
                         (b"[" * 100_000, "is not JSON"), (b"[1]", "is a list"), (b"1", "is a int"),
                         (b"9" * 5000, "is not JSON")):
        path.write_bytes(text)
        with pytest.raises(tt.InputError, match=f"^who: {path} {reason}.*: delete it$"):
            reading.read_json(path, "who")


def test_rows_and_a_last_one_that_was_cut_off(path):
    for end in (b"", b'{"a": ', b"\0\0\0", b"\xff", b"[1]"):
        path.write_bytes(b'{"a": 1}\n\n{"a": 2}\r\n' + end)
        assert reading.read_rows(path, "who") == [(1, b'{"a": 1}', {"a": 1}), (3, b'{"a": 2}\r', {"a": 2})]
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert [row for *_, row in reading.read_rows(path, "who")] == [{"a": 1}, {"a": 2}]
    path.write_bytes(b"")
    assert reading.read_rows(path, "who") == []


@pytest.mark.parametrize("line, reason", [
    (b'{"a": ', "is not JSON (JSONDecodeError: "), (b'{"a": "\xff"}', "is not JSON (UnicodeDecodeError: "),
    (b"[1]", "is a list, expected a JSON object"), (b"null", "is a NoneType, expected a JSON object"),
    ('{"a": 1}'.encode("utf-16"), "is not JSON (UnicodeDecodeError: ")])
def test_another_row_that_cannot_be_read_is_refused_by_its_number(line, reason, path):
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(tt.InputError) as caught:
        reading.read_rows(path, "who")
    assert str(caught.value).startswith(f"who: {path}, line 2, {reason}")
    assert str(caught.value).endswith(": delete it")


@pytest.mark.parametrize("ok, good, bad", [
    (reading.whole, [0, 5, 10**9], [-1, 1.0, True, "1", None, [1], float("nan")]),
    (reading.finite, [0, -1.5, 10**9], [float("inf"), float("nan"), True, "1", None, 10**400]),
    (reading.numbers, [{}, {"a": 1, "b": -0.5, "c": float("inf")}],
     [{"a": 10**400}, {"a": True}, {"a": "1"}, {"a": None}, [1], None, 1]),
])
def test_kinds_of_values(ok, good, bad):
    assert [bool(ok(value)) for value in good] == [True] * len(good)
    assert [bool(ok(value)) for value in bad] == [False] * len(bad)
    for value in bad:
        with pytest.raises(tt.InputError, match="^who: what has the x .*, expected better$"):
            reading.field("who", "what", {"x": value}, "x", ok, "better")
    assert reading.field("who", "what", {"x": good[0]}, "x", ok, "better") == good[0]


# Arrays

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_as_numpy_gives_them(save, path):
    with open(path, "wb") as file:
        save(file, **ARRAYS)
    found = reading.read_npz(path, "who")
    with np.load(path) as box:
        assert list(found) == box.files
        for name, array in found.items():
            assert array.dtype == box[name].dtype and array.shape == box[name].shape
            assert np.array_equal(array, box[name])


def npy(array, **changes):
    """The bytes of a .npy file. changes: of what its header says."""
    file, description = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array) | changes
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue() + array.tobytes()


def write(path, *members, compression=zipfile.ZIP_STORED):
    """A zip of (name, bytes)."""
    with zipfile.ZipFile(path, "w", compression) as box:
        for name, data in members:
            box.writestr(name, data)


ONE = npy(np.ones(3))
DISHONEST = {
    "a shape of terabytes": (("x.npy", npy(np.ones(3), shape=(10**6, 10**6))),
                             r"holds 'x.npy' in 24 bytes, expected 8,000,000,000,000 for "
                             r"\(1000000, 1000000\) float64"),
    "a shape beyond int64": (("x.npy", npy(np.ones(3), shape=(2**32, 2**32))),
                             r"holds 'x.npy' in 24 bytes, expected 147,\S+ for .*"),
    "too few": (("x.npy", ONE[:-8]), r"holds 'x.npy' in 16 bytes, expected 24 for \(3,\) float64"),
    "too many": (("x.npy", ONE + b"\0"), r"holds 'x.npy' in 25 bytes, expected 24 for \(3,\) float64"),
    "negative": (("x.npy", npy(np.ones(1), shape=(-1, -1))), r"is not a readable who \(ValueError: .*"),
    "objects": (("x.npy", npy(np.ones(3), descr="|O")), "holds 'x.npy' of Python objects, expected numbers"),
    "another version": (("x.npy", b"\x93NUMPY\3\0" + ONE[8:]),
                        r"holds 'x.npy' in version \(3, 0\) of .npy, expected 1.0"),
    "a long header": (("x.npy", b"\x93NUMPY\2\0" + (20_000).to_bytes(4, "little") + b" " * 20_000),
                      r"is not a readable who \(ValueError: Header info length (.|\n)*"),
    "no array": (("x.npy", b"a text of some length"),
                 r"is not a readable who \(ValueError: .*magic string.*"),
}


@pytest.mark.parametrize("member, text", DISHONEST.values(), ids=DISHONEST)
def test_an_array_of_another_size_than_it_says(member, text, path):
    write(path, ("good.npy", ONE), member)
    with pytest.raises(tt.InputError, match=rf"^who: {path} {text}$"):
        reading.read_npz(path, "who")


def test_what_unpacks_to_far_more_is_refused_before_it_is_unpacked(path, monkeypatch):
    """8 MB that unpack to 6 GB, a thousand times smaller."""
    monkeypatch.setattr(reading, "ROOM", 50_000)
    with open(path, "wb") as file:
        np.savez_compressed(file, a=np.zeros(400_000), b=np.zeros(400_000))
    size = path.stat().st_size
    assert size < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(tt.InputError, match=rf"^who: {path} has {size:,} bytes that unpack to 6,400,\d+, "
                                                rf"expected at most {50_000 + 20 * size:,}$"):
            reading.read_npz(path, "who")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(reading, "TIMES", 10_000)
    assert len(reading.read_npz(path, "who")["a"]) == 400_000


def test_weights_and_moments_are_far_from_the_limit():
    """Those that start at zero, compressed: 64 MB are always allowed, and 20 times the file."""
    assert (reading.ROOM, reading.TIMES) == (64 * 2**20, 20)


def test_other_zips(path):
    write(path, ("x.npy", ONE), compression=zipfile.ZIP_BZIP2)
    with refuses(f"who: {path} is compressed in another way than NumPy's"):
        reading.read_npz(path, "who")
    with pytest.warns(UserWarning, match="Duplicate name"):
        write(path, ("x.npy", ONE), ("x.npy", ONE))
    with refuses(f"who: {path} holds two arrays of one name"):
        reading.read_npz(path, "who")
    path.write_text(json.dumps({}))
    with refuses(f"who: {path} is not a whole .npz file: truncated, or not a who"):
        reading.read_npz(path, "who")
