"""Files that are written whole or not at all, and locks against two processes working on the same file.

A file is written beside its target, flushed, and then renamed over it. Only a regular file is replaced: to
rename over a device, a pipe or a folder would destroy it.
"""
import contextlib
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeAlias

from .errors import Busy, InputError, expect

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FilePath: TypeAlias = str | os.PathLike[str]
KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
         stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def kind_of(path: FilePath) -> str:
    """What lies at `path`: one of KINDS, or "nothing". A link counts as what it leads to."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "no regular file")
    except OSError:  # also where a part of the path is no folder: who reads or writes there is told so
        return "nothing"


def check_target(path: FilePath, *endings: str, inputs: Sequence[FilePath] = (),
                 probe: bool = True) -> None:
    """Raise InputError, before the work, for a path that a command should not write its result to.

    That is a name without one of the `endings` (".json"), if any are given, anything that is there and is not
    a regular file, and one of the `inputs`, the files that the command reads. probe: and a file in a folder
    that cannot be written to (see check_writable).
    """
    path = pathlib.Path(path)
    expect(not endings or path.suffix.lower() in endings, f"cannot write {path}",
           f"expected a name that ends in {' or '.join(endings)}")
    _check_replaceable(path)
    for source in inputs:
        same = kind_of(path) != "nothing" and kind_of(source) != "nothing" and os.path.samefile(path, source)
        expect(not same, f"cannot write {path}", f"it is {source}, which is read: give another name")
    if probe:
        check_writable(path.parent)


def _check_replaceable(path):
    kind = kind_of(path)
    expect(kind in ("nothing", "a file"), f"cannot write {path}",
           f"it is {kind}, expected the name of a file")


@contextlib.contextmanager
def replacing(path: FilePath, mode: str = "wb") -> Iterator[IO[Any]]:
    """Context: a file that becomes `path` when the block ends well, and vanishes when it does not.

    Text is UTF-8. A crash at any moment leaves the old file or the new one. What is not a regular file, a
    full disk or an unwritable folder raises InputError naming the path.
    """
    path = pathlib.Path(path)
    _check_replaceable(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        raise


@contextlib.contextmanager
def claimed(path: FilePath) -> Iterator[None]:
    """Context: this process alone works on `path`; Busy where another process is in such a block.

    The claim is a lock on path.lock, so it ends with the process, however that ends. Windows has no such
    locks: there nothing is claimed.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path.parent / f"{path.name}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another process is at work on {path}") from None
            except OSError as error:
                raise InputError(f"cannot write {path}.lock: {error.strerror or error}") from error
        yield


def check_writable(folder: pathlib.Path) -> None:
    """Raise InputError before hours of work, not after them, if the folder cannot be written to.

    Writes a file into it, or, where it does not exist yet, into the nearest folder above it, and removes it.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    probe = nearest / ".tinytoken-writable"
    with replacing(probe) as file:
        file.write(b"\0" * 65536)
    probe.unlink()


def write_json(path: FilePath, value: Any) -> None:
    """JSON, indented, replaced as a whole."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists, NumPy numbers are numbers."""
    return json.loads(json.dumps(value, default=plain_number))


def plain_number(value: Any) -> Any:
    """JSON for a NumPy number."""
    return value.item()
