"""Several processes that do one thing together: a Group of them, or this process alone.

`mpiexec -n 4 python -m tinytoken ...` starts a program four times. Each of the four, its *rank* being 0 to 3,
does the same in the same order, but for what they share out: the rows of a batch, the pictures of a test set.
Rank 0 alone writes files and prints. Where no such launcher has started it, a process is a group of one, and
MPI is not even imported.

What the ranks tell each other goes through MPI (mpi4py); gradients on GPUs through NCCL, see cuda/nccl.py.
"""
import atexit
import contextlib
import hashlib
import math
import os
import pathlib
import platform
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np

from . import backend
from .backend import Array, array_module, faster, to_numpy
from .errors import InputError, expect, install

# How launchers tell a process (how many there are, which one it is): MPICH, Intel MPI and Slurm's pmi2; Open
# MPI; Slurm's pmix.
LAUNCHERS = (("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
             ("SLURM_NTASKS", "PMIX_RANK"))
LAUNCHED = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "HYDI_")  # how the names of all that they tell begin
PACKAGES = ("mpi4py>=4.1", "mpich>=5")
MOMENT = 1.0  # seconds that rank 0 has to say first what all ranks are about to say
DRAIN = 0.5  # seconds that the launcher has to pass on what was said last; the end cuts it off
STEP = 5.0  # seconds that the other ranks have to end a step and to save it
PATIENCE = 1e-4  # seconds that a rank looks for the others without a pause, and then sleeps at a time
Value = TypeVar("Value")


class Group:
    """This process alone; and what every group can do. rank: this process's number, from 0. size: how many
    there are. local_rank: its number among those on this machine."""
    rank, size, local_rank = 0, 1, 0

    def exchange(self, where: str, value: Any = None) -> list[Any]:
        """The value of each rank, by rank. where: what this is, in words. InputError on all ranks where they
        are not at the same place of the program."""
        return [value]

    def all_reduce(self, array: Array) -> None:
        """Replace the array, in place, by the sum of all ranks'. All get the same bits."""

    def broadcast(self, array: Array) -> None:
        """Replace the array, in place, by rank 0's."""

    def meet(self, seconds: float) -> None:
        """Wait until all ranks are here, but not longer than so many seconds."""

    def abort(self, code: int) -> None:
        """End the processes of all ranks, now."""

    def together(self, where: str, function: Callable[[], Value]) -> list[Value]:
        """What function() returns on each rank, by rank. What it raises on one, all ranks raise."""
        if self.size == 1:
            return [function()]
        mine, error = None, None
        try:
            mine = function()
        except Exception as raised:
            error = raised
        results = self.exchange(where, (mine, error and _plain(error)))
        for rank, (_, problem) in enumerate(results):
            if problem and rank == self.rank and error and not isinstance(error, (InputError, MemoryError)):
                raise error  # a mistake in the program: its traceback is wanted
            if problem:
                raise _agreed(type(problem)(f"rank {rank}: {problem}")) from error
        return [value for value, _ in results]

    def agreed(self, where: str, function: Callable[[], Value]) -> Value:
        """function() as rank 0 has it, on every rank: its value, or what it raised. The others do not call
        it: for what depends on files, which may change meanwhile."""
        if self.size == 1:
            return function()
        value, error = None, None
        if self.rank == 0:
            try:
                value = function()
            except Exception as raised:
                error = raised
        value, problem = self.exchange(where, (value, error))[0]
        if problem:
            raise _agreed(problem) from error
        return value

    @contextlib.contextmanager
    def leading(self, where: str, context: AbstractContextManager[Value]) -> Iterator[Value]:
        """Context: rank 0 alone enters this one, and all have its value, or what it raised."""
        with contextlib.ExitStack() as stack:
            yield self.agreed(where, lambda: stack.enter_context(context))

    def same(self, where: str, **mine: Any) -> None:
        """InputError, on all ranks, that says which of these values are others on another rank than on
        rank 0."""
        first, *rest = self.exchange(where, mine)
        for rank, there in enumerate(rest, 1):
            other = [name for name in mine if there[name] != first[name]]
            if other:
                raise _agreed(InputError(f"{where}: rank {rank} has other {' and '.join(other)} than rank 0, "
                                         f"expected the same on all ranks"))

    def rows(self, images: int, micro: int = 1) -> tuple[slice, float]:
        """Which of so many images are this rank's, and its share of what is added up. Slices of `micro`
        images stay whole; where there are fewer of them than ranks, every rank does all."""
        slices = -(-images // micro)
        if slices < self.size:
            return slice(0, images), 1 / self.size
        first, last = (min(images, micro * (slices * n // self.size)) for n in (self.rank, self.rank + 1))
        return slice(first, last), (last - first) / images


class Ranks(Group):
    """The processes of an MPI communicator of mpi4py's."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        here = socket.gethostname()
        self.places = comm.allgather((here, os.getpid(), _cpus()))
        neighbours = [rank for rank, (host, *_) in enumerate(self.places) if host == here]
        self.local_rank = neighbours.index(self.rank)
        # a launcher may bind each process to CPUs of its own
        self.on_my_cpus = sum(bool(self.places[rank][2] & _cpus()) for rank in neighbours)

    def exchange(self, where, value=None):
        self._wait(self.comm.Ibarrier())
        # mpi4py pickles: the ranks are processes of one user, who run the same code
        found = self.comm.allgather((where, value))
        places = [place for place, _ in found]
        for rank, place in enumerate(places):
            if place != places[0]:
                raise _agreed(InputError(f"rank {rank} is at {place!r}, and rank 0 at {places[0]!r}: all "
                                         f"ranks have to do the same, in the same order"))
        return [value for _, value in found]

    def _wait(self, request, seconds=math.inf):
        """MPI's own calls keep a CPU busy while they wait, which another process may want, perhaps the one
        that is waited for; so this rank sleeps in between."""
        began = time.perf_counter()
        while not request.Test() and (waited := time.perf_counter() - began) < seconds:
            if waited > PATIENCE:
                time.sleep(PATIENCE)

    def meet(self, seconds):
        self._wait(self.comm.Ibarrier(), seconds)

    def all_reduce(self, array):
        fast = faster(Ranks.all_reduce, array_module(array), self, array)
        if fast:
            return fast(self, array)
        host = to_numpy(array)
        total = np.empty_like(host, order="C")
        self._wait(self.comm.Iallreduce(np.ascontiguousarray(host), total))
        array[...] = array_module(array).asarray(total)

    def broadcast(self, array):
        host = np.ascontiguousarray(to_numpy(array)).reshape(-1)
        self.comm.Bcast(host.view("uint8"))
        array[...] = array_module(array).asarray(host.reshape(array.shape))

    def abort(self, code):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        time.sleep(DRAIN)
        # MPI's own line about it would be a second one
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        atexit.unregister(self.leave)  # MPICH's Abort returns, and Python would go on to its end
        self.comm.Abort(code)
        os._exit(code)

    def leave(self) -> None:
        """At the end of the program: wait for the others. One that is elsewhere hears of it."""
        while True:
            try:
                self.exchange("the end of the program")
                return
            except InputError:
                pass

    def __str__(self):
        ranks = ", ".join(f"rank {rank} is process {pid} on {host}"
                          for rank, (host, pid, _) in enumerate(self.places[:8]))
        return f"{self.size} processes: {ranks}" + ", ..." * (self.size > 8)


class _State:
    group: Group | None = None
    stderr: Any = None  # where a rank that prints nothing says its last words


_state = _State()


def current() -> Group:
    """The group that this process belongs to. The first call lets MPI begin, where a launcher has started
    several processes; InputError says what is missing for that, or what is not the same on all of them."""
    if _state.group is None:
        _state.group = _begun() if launched()[0] > 1 else Group()
    return _state.group


def alone() -> AbstractContextManager[Any]:
    """Context: this process is a group of one, for what each rank does by itself."""
    current()
    return backend.swapped(_state, "group", Group())


@contextlib.contextmanager
def apart(where: str) -> Iterator[None]:
    """Context: each rank is a group of one and works for itself, until all have come to the end of it. What
    one raises ends the others at once, but for Ctrl-C, after which each may end its step first."""
    group = current()
    try:
        with alone():
            yield
    except KeyboardInterrupt:
        group.meet(STEP)
        raise
    group.exchange(where)


def launched() -> tuple[int, int]:
    """(how many processes a launcher has started of this program, which of them this is): (1, 0) without
    one."""
    for size, rank in LAUNCHERS:
        words = [os.environ.get(name, "") for name in (size, rank)]
        if all(word.isdigit() for word in words):
            return int(words[0]), int(words[1])
    return 1, 0


def launcher() -> str | None:
    """The mpiexec beside this Python, where pip puts it, or else on the PATH; None where there is none."""
    places = os.path.dirname(sys.executable), os.environ.get("PATH", "")
    return shutil.which("mpiexec", path=os.pathsep.join(places))


def _begun():
    size, rank = launched()
    try:
        import mpi4py
        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the second: no library of MPI is found
        raise InputError(f"{size} processes were started, for which MPI is wanted, but "
                         f"{' '.join(str(error).split())} ({install(*PACKAGES)})") from error
    library = MPI.Get_library_version().partition("\n")[0].partition(",")[0].strip()
    expect(MPI.COMM_WORLD.size == size, "MPI",
           f"{size} processes were started, and {library} knows of {MPI.COMM_WORLD.size}: expected the "
           f"mpiexec of the same library ({install(*PACKAGES)})")
    _state.group = group = Ranks(MPI.COMM_WORLD)
    for name in [name for name in os.environ if name.startswith(LAUNCHED)]:
        del os.environ[name]  # processes that this one starts belong to no group
    backend.sharing.processes = group.on_my_cpus
    atexit.register(group.leave)
    sys.excepthook = crashed
    group.same("start", **{"code": _digest_of_code(), "arguments": sys.argv[1:],
                           "versions": [platform.python_version(), np.__version__]})
    return group


def speak_for_all() -> None:
    """From now on rank 0 alone prints, and it says first which processes there are."""
    group = current()
    if group.rank and not _state.stderr:
        _state.stderr = sys.stderr
        sys.stdout, sys.stderr = (open(os.devnull, "w", encoding="utf-8") for _ in range(2))
    elif group.size > 1:
        print(group, file=sys.stderr, flush=True)


def last_words(error: BaseException) -> tuple[str, Any]:
    """How a line begins that says what the program ends with, and the stream for it; None for the stream
    where another rank says the line.

    All ranks may be about to say the same: rank 0 is first, and ends the others with itself."""
    group = _state.group
    if group is None:
        return "", None if launched()[1] else sys.stderr  # MPI is missing, on all ranks
    if group.size == 1:
        return "", sys.stderr
    if group.rank:
        time.sleep(min(5.0, MOMENT + 0.1 * group.rank))
    known = getattr(error, "agreed", False) or isinstance(error, KeyboardInterrupt)
    return "" if known else f"rank {group.rank} of {group.size}: ", _state.stderr or sys.stderr


def end(code: int) -> int:
    """End all ranks with this exit code, if there are others -> the code."""
    if _state.group is not None and _state.group.size > 1:
        _state.group.abort(code)
    return code


def crashed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """The last of a rank that raised what nobody expects: its traceback, and the end of all ranks."""
    begins, stream = last_words(error)
    if stream is not None:
        text = begins + "".join(traceback.format_exception(kind, error, trace))
        print(text, end="", file=stream, flush=True)
    end(1)


def _agreed(error):
    """The error, which every rank raises: rank 0 will say it."""
    error.agreed = True
    return error


def _plain(error):
    """An error as the other ranks can have it: InputError or MemoryError, with one line."""
    if isinstance(error, (InputError, MemoryError)):
        return type(error)(str(error))
    return InputError(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _cpus():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}


def _digest_of_code():
    """Of all sources of this package, and of the script that Python was started with."""
    package = pathlib.Path(__file__).parent
    paths = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".h"))
    main = getattr(sys.modules["__main__"], "__file__", None)
    found = hashlib.blake2b(digest_size=16)
    for path in [*paths, *([pathlib.Path(main)] if main else [])]:
        found.update(f"{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def digest(*arrays: Array) -> str:
    """Of the arrays' bytes, dtypes and shapes: the same for the same contents."""
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        host = np.ascontiguousarray(to_numpy(array))
        found.update(f"{host.dtype}{host.shape}".encode())
        found.update(host.reshape(-1).view("uint8").data)
    return found.hexdigest()
