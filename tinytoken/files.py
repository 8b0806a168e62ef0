"""Files that are written whole or not at all, and locks against two processes working on the same file.

A file is written beside its target, flushed, and then renamed over it. Only a regular file is replaced: to
rename over a device, a pipe or a folder would destroy it.
"""
import contextlib
import errno
import io
import json
import os
import pathlib
import re
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeAlias

from .errors import Busy, InputError, expect
from .group import current

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:
    fcntl = None
    try:
        import msvcrt
    except ImportError:  # Pyodide: in a browser there is no other process
        msvcrt = None

FilePath: TypeAlias = str | os.PathLike[str]
HALF_WRITTEN = r"\.{}\.[a-z0-9_]{{8}}\.part"  # the name of a file that is to become another: see `replacing`
LEFT = 3600  # seconds after which a file that is half-written, and that nobody claims, is somebody's no more
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer
MOMENT = "%Y-%m-%d %H:%M:%S"
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

    Text is UTF-8. A crash at any moment leaves the old file or the new one; what a killed process left
    half-written is removed by the next one, after LEFT seconds or at once under a claim. What is not a
    regular file, a full disk or an unwritable folder raises InputError naming the path. In a group of
    processes rank 0 alone writes: the others get a file that nobody keeps.
    """
    if current().rank:
        yield io.BytesIO() if "b" in mode else io.StringIO()
        return
    path = pathlib.Path(path)
    _check_replaceable(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_half_written(path, LEFT)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
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
def claimed(path: FilePath, wait: bool = False) -> Iterator[None]:
    """Context: this process alone works on `path`. Where another does: Busy, which says who, or `wait`.

    The claim is a lock on path.lock, so it ends with the process, however that ends. What a killed process
    left half-written of `path` is removed at the beginning, and at the end folders that the claim has made
    and that are empty. In a group of processes rank 0 claims for all."""
    if current().rank:
        yield
        return
    path = pathlib.Path(path)
    lock = path.parent / f"{path.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(_remove_empty, [p for p in (path.parent, *path.parent.parents) if not p.exists()])
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(_unlock, _locked(lock, path, wait), lock)
            _remove_half_written(path)
        except OSError as error:
            raise InputError(f"cannot write {lock}: {error.strerror or error}") from error
        yield


def _remove_half_written(path, age=0):
    """Remove what a killed process left of `path`; with `age`, what nobody has written to for so many
    seconds."""
    for name in os.listdir(path.parent):
        if re.fullmatch(HALF_WRITTEN.format(re.escape(path.name)), name):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it, or renamed it
                if not age or time.time() - os.stat(path.parent / name).st_mtime > age:
                    os.unlink(path.parent / name)


def _locked(lock, path, wait):
    """A handle of the lock's file, locked, with a line in the file that says who has it."""
    while True:
        with contextlib.ExitStack() as stack:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            stack.callback(os.close, handle)
            mine = _lock(handle, wait)
            os.lseek(handle, 0, os.SEEK_SET)
            if not mine:
                holder = " ".join(os.read(handle, 200).decode("utf-8", "replace").split())
                raise Busy(f"another process is at work on {path}" + f": {holder}" * bool(holder))
            with contextlib.suppress(FileNotFoundError):  # its last holder has removed it: once more
                if os.path.samestat(os.fstat(handle), os.stat(lock)):
                    line = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime(MOMENT)}\n"
                    # cut after, not before: ext4 flushes a file that was cut to nothing when it is closed
                    os.ftruncate(handle, os.write(handle, line.encode()))
                    stack.pop_all()
                    return handle


def _lock(handle, wait):
    """Lock an open file for this process -> whether it is. wait: until another process's lock ends."""
    while True:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif msvcrt is not None:
                msvcrt.locking(_beyond(handle), msvcrt.LK_NBLCK, 1)
            return True
        except (BlockingIOError, PermissionError):  # of the two systems
            if not wait:
                return False
            time.sleep(0.005)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn("this file system has no locks: another process on the same files goes unnoticed",
                          stacklevel=5)
            return True


def _unlock(handle, lock):
    try:
        if fcntl is not None or msvcrt is None:
            lock.unlink(missing_ok=True)  # while it is locked: who waits for it then finds another file there
        else:
            msvcrt.locking(_beyond(handle), msvcrt.LK_UNLCK, 1)
    finally:
        os.close(handle)
    if fcntl is None:
        with contextlib.suppress(PermissionError):  # somebody else has it open already
            lock.unlink(missing_ok=True)


def _remove_empty(folders):
    with contextlib.suppress(OSError):  # the first that is not empty, or is gone, ends it
        for folder in folders:
            folder.rmdir()


def _beyond(handle):
    """The handle, at a byte that the file does not have. Windows lets nobody read a byte that is locked, and
    the line is to be read."""
    os.lseek(handle, 1 << 30, os.SEEK_SET)
    return handle


def check_writable(folder: pathlib.Path) -> None:
    """Raise InputError before hours of work, not after them, if the folder cannot be written to.

    Writes a file into it, or, where it does not exist yet, into the nearest folder above it, and removes it.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    expect(nearest.is_dir(), f"cannot write {folder}",
           lambda: f"{nearest} is {kind_of(nearest)}, expected a folder")
    probe = nearest / ".tinytoken-writable"
    with claimed(probe, wait=True):
        with replacing(probe) as file:
            file.write(b"\0" * 65536)
        if not current().rank:
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
