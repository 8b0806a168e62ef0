"""Reads what was handed in only if it is a file of its own: no link to another's, no pipe, no device."""
import os
import pathlib
import stat

from ..errors import expect


def read(path: pathlib.Path, most: int = -1) -> bytes:
    """The first `most` bytes (-1: all) of a regular file that has no other name.

    InputError if the file or its folder is a symbolic link, if the file has hard links or is not regular;
    OSError if it cannot be read.
    """
    for each in (path.parent, path):
        expect(not each.is_symlink(), each.name, "is a link: hand in the file itself")
    # It could be another file by now: what was opened is looked at. Without NONBLOCK a pipe would be waited
    # for.
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        expect(stat.S_ISREG(status.st_mode), path.name, "is no regular file")
        expect(status.st_nlink <= 1, path.name, "is a hard link, a file with another name: hand in a copy")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)
