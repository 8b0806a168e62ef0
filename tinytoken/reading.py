"""Files that are read within bounds, a reader for each format: bytes, JSON, JSON lines, .npz.

What sort of file it is and how much it holds, or unpacks to, is checked before anything is allocated for it.
An archive of CIFAR, whose sizes are known, has its reader in data/cifar.py.
"""
import contextlib
import errno
import json
import math
import os
import pathlib
import reprlib
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from .errors import InputError, expect
from .files import FilePath

TEXT = 1 << 28  # bytes of a file of JSON, or of JSON lines
ROOM, TIMES = 1 << 26, 20  # a .npz unpacks to at most so many bytes, and so many times its own


def open_regular(path: FilePath, mode: str = "rb") -> IO[Any]:
    """open(path, mode) of a regular file; OSError for others: to read a pipe or a device might never end."""
    # without O_NONBLOCK, opening a pipe waits for its other end
    opener = lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o644)
    file = open(path, mode, encoding=None if "b" in mode else "utf-8", opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


@contextlib.contextmanager
def opened(path: FilePath, where: str) -> Iterator[IO[bytes]]:
    """Context: the file, open for reading. InputError, which `where` begins, for one that cannot be."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{where}: {path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{where}: {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    with file:
        yield file


def read_bytes(path: FilePath, where: str, most: int = TEXT) -> bytes:
    """What a file holds; InputError for more than `most` bytes."""
    with opened(path, where) as file:
        data = file.read(most + 1)
    expect(len(data) <= most, where, f"{path} has more than {most:,} bytes")
    return data


def read_json(path: FilePath, where: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    return _object(read_bytes(path, where), where, str(path))


def read_rows(path: FilePath, where: str) -> list[tuple[int, bytes, dict[str, Any]]]:
    """[(its number, the line, the JSON object in it)] of a file of such lines, blank ones left out.

    So is a last line that a crash cut off. InputError names the number of any other that cannot be read."""
    *lines, last = read_bytes(path, where).split(b"\n")
    rows = [(number, line, _object(line, where, f"{path}, line {number},"))
            for number, line in enumerate(lines, 1) if line.strip()]
    with contextlib.suppress(InputError):
        rows.append((len(lines) + 1, last, _object(last, where, str(path))))
    return rows


def _object(data, where, what):
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: {what} is not JSON ({reason}): delete it") from error
    expect(isinstance(value, dict), where,
           f"{what} is a {type(value).__name__}, expected a JSON object: delete it")
    return value


def field(where: str, what: FilePath, values: dict[str, Any], name: str, ok: Callable[[Any], bool],
          expected: str) -> Any:
    """values[name], of values that were read from `what`; InputError where it is missing or not `ok`.
    expected: what would be."""
    value = values.get(name)
    expect(ok(value), where, f"{what} has the {name} {reprlib.repr(value)}, expected {expected}")
    return value


def whole(value: Any) -> bool:
    """Whether a value from JSON is a whole number, from 0."""
    return type(value) is int and value >= 0


def finite(value: Any) -> bool:
    """Whether a value from JSON is a number that is finite as a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def numbers(value: Any) -> bool:
    """Whether a value from JSON is an object of numbers; they may be NaN or infinite."""
    return isinstance(value, dict) and all(type(n) is float or finite(n) for n in value.values())


def read_npz(path: FilePath, where: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, all from one opening of it. `where` also names what it should be.

    InputError for a file that is damaged or no .npz, and before anything is allocated: for arrays of Python
    objects, arrays of other sizes than their headers say, and more than TIMES the file's bytes (and ROOM) in
    all, to which weights do not unpack."""
    path = pathlib.Path(path)
    with opened(path, where) as file:
        expect(zipfile.is_zipfile(file), where,
               f"{path} is not a whole .npz file: truncated, or not a {where}")
        try:
            with zipfile.ZipFile(file) as box:
                _check_members(box.infolist(), os.fstat(file.fileno()).st_size, where, path)
                return {name.removesuffix(".npy"): _array(box, name, where, path) for name in box.namelist()}
        except InputError:
            raise
        except Exception as error:  # of a damaged file zipfile, zlib and NumPy raise a dozen different ones
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{where}: {path} is not a readable {where} ({reason})") from error


def _check_members(members, size, where, path):
    """InputError for members that unpack to more than weights would, or in ways that NumPy never writes."""
    unpacked, most = sum(member.file_size for member in members), ROOM + TIMES * size
    expect(unpacked <= most, where,
           f"{path} has {size:,} bytes that unpack to {unpacked:,}, expected at most {most:,}")
    kinds = {member.compress_type for member in members}
    expect(kinds <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}, where,
           f"{path} is compressed in another way than NumPy's")
    expect(len({member.filename for member in members}) == len(members), where,
           f"{path} holds two arrays of one name")


HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _array(box, name, where, path):
    """The array of one member, whose size has to be what its header says."""
    with box.open(name) as member:
        version = np.lib.format.read_magic(member)
        expect(version in HEADERS, where, f"{path} holds {name!r} in version {version} of .npy, expected 1.0")
        shape, by_columns, dtype = HEADERS[version](member)
        expect(not dtype.hasobject, where, f"{path} holds {name!r} of Python objects, expected numbers")
        found, said = box.getinfo(name).file_size - member.tell(), math.prod(shape) * dtype.itemsize
        expect(found == said, where,
               f"{path} holds {name!r} in {found:,} bytes, expected {said:,} for {shape} {dtype}")
        return np.ndarray(shape, dtype, bytearray(member.read()), order="F" if by_columns else "C")
