"""The process in which a submission runs: it holds the submission and NumPy, and nothing it is checked with.

judge.py starts this file by its path, so it imports nothing of the package. Both sides speak through a Peer:
a message is a line of JSON, in which arrays stand by number, and then the bytes of those arrays. Nothing in a
message is ever run, so all that a submission can send is numbers, which the judge compares.
"""
import ast
import builtins
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

MOST, HEAD = 2**28, 2**25  # bytes of a message, and of its line of JSON
DTYPE = re.compile(r"[<>|=][biufc]\d{1,2}")
PLAIN = (bool, int, float, str, type(None))


class Ended(Exception):
    """The other process has ended, or what it sent is no message."""


class Raised(Exception):
    """What a function raised in the other process. kind: the name of its type."""

    def __init__(self, text: str, kind: str):
        self.args, self.kind = (text,), kind

    def __str__(self) -> str:
        return str(self.args[0])


def raised(kind: str, text: str) -> Raised:
    """The exception to raise here; also a ValueError, say, if `kind` is the name of an error of Python's."""
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception) and known is not Exception:
        return type(kind, (Raised, known), {})(text, kind)
    return Raised(text, kind)


class Peer:
    """One end of two pipes. While it waits for an answer, it does what the other end asks.

    An object that is not plain numbers, text, arrays, lists, tuples or dicts stays where it is and is lent
    under a number. Subclasses say what they lend and what they do with what they are lent.
    """

    def __init__(self, source: Any, sink: Any):
        self.source, self.sink = source, sink
        self.lent: list[Any] = []
        self.numbers: dict[int, int] = {}  # id of an object -> its place in `lent`, which keeps it alive

    def ask(self, **request: Any) -> Any:
        """Send a request and return the other end's answer; Raised if it raised, Ended if it is gone."""
        self.send(request)
        while True:
            message = self.receive()
            if "answer" in message:
                return message["answer"]
            if "raised" in message:
                raise raised(*map(str, message["raised"]))
            self.serve(message)

    def serve(self, request: dict[str, Any]) -> None:
        """Do what was asked, and send the answer or what was raised."""
        try:
            reply = {"answer": self.do(request)}
        except Ended:
            raise
        except BaseException as error:  # a submission may raise anything, SystemExit too
            reply = {"raised": [getattr(error, "kind", type(error).__name__), _text(error)]}
        try:
            self.send(reply | self.notes())
        except (TypeError, ValueError, RecursionError, MemoryError) as error:  # an answer that cannot be sent
            self.send({"raised": [type(error).__name__, _text(error)]})

    def do(self, request: dict[str, Any]) -> Any:
        raise NotImplementedError

    def notes(self) -> dict[str, Any]:
        """What goes with every answer."""
        return {}

    def lend(self, value: Any) -> dict[str, Any]:
        """The JSON for an object that stays here."""
        number = self.numbers.setdefault(id(value), len(self.lent))
        if number == len(self.lent):
            self.lent.append(value)
        kind = f"{value.dtype} array" if type(value) is np.ndarray else type(value).__name__
        return {"lent": number, "kind": kind}

    def borrowed(self, number: int, kind: str) -> Any:
        """What stands here for an object that stays on the other side."""
        raise NotImplementedError

    def send(self, message: dict[str, Any]) -> None:
        """Write a message. ValueError if it is too long."""
        arrays: list[np.ndarray] = []
        packed = {key: self.pack(value, arrays) for key, value in message.items()}
        head = json.dumps([packed, [[array.dtype.str, array.shape] for array in arrays]]).encode() + b"\n"
        size = sum(array.nbytes for array in arrays)
        if size > MOST or len(head) > HEAD:
            raise ValueError(f"too much in one call: {size} bytes of arrays, at most {MOST}, and {len(head)} "
                             f"of all else, at most {HEAD}")
        try:
            self.sink.write(b"".join([head, *(array.tobytes() for array in arrays)]))
            self.sink.flush()
        except OSError as error:
            raise Ended from error

    def receive(self) -> dict[str, Any]:
        """Read a message. Ended where there is none, or where it is not of this form."""
        try:
            packed, shapes = json.loads(self.source.readline(HEAD))
            arrays = [self._array(str(dtype), tuple(map(int, shape))) for dtype, shape in shapes]
            return {key: self.unpack(value, arrays) for key, value in packed.items()}
        except (OSError, ValueError, TypeError, KeyError, LookupError, AttributeError, RecursionError,
                MemoryError, OverflowError) as error:
            raise Ended("no message") from error

    def _array(self, dtype, shape):
        if not DTYPE.fullmatch(dtype) or min(shape, default=0) < 0:
            raise ValueError(dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > MOST:
            raise ValueError(size)
        return np.frombuffer(bytearray(self.source.read(size)), dtype).reshape(shape)

    def pack(self, value: Any, arrays: list[np.ndarray]) -> Any:
        """The JSON for a value; its arrays are appended to `arrays`."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, np.generic) and DTYPE.fullmatch(value.dtype.str):
            return {"scalar": self.pack(np.array(value), arrays)}
        if type(value) is np.ndarray and DTYPE.fullmatch(value.dtype.str):
            arrays.append(value)
            return {"array": len(arrays) - 1}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [self.pack(v, arrays) for v in value]}
        if type(value) is dict:
            return {"dict": [[self.pack(k, arrays), self.pack(v, arrays)] for k, v in value.items()]}
        return self.lend(value)

    def unpack(self, packed: Any, arrays: list[np.ndarray]) -> Any:
        """The value of what `pack` made."""
        if not isinstance(packed, dict):
            return packed
        if "lent" in packed:
            return self.borrowed(int(packed["lent"]), str(packed["kind"]))
        (form, content), = packed.items()
        if form == "yours":
            return self.lent[content]
        if form == "array":
            return arrays[content]
        if form == "scalar":
            return self.unpack(content, arrays)[()]
        if form == "dict":
            return {self.unpack(key, arrays): self.unpack(value, arrays) for key, value in content}
        return {"list": list, "tuple": tuple}[form](self.unpack(value, arrays) for value in content)


class Child(Peer):
    """The submission's end. It lends anything, and calls what the judge lends it."""

    def __init__(self, source: Any, sink: Any):
        super().__init__(source, sink)
        self.functions: dict[int, Callable[..., Any]] = {}  # the judge's, by its numbers
        self.theirs: dict[int, int] = {}  # id of such a function -> its number
        self.kept: dict[int, np.ndarray] = {}  # the judge's arrays of this call
        self.before: dict[int, bytes] = {}
        self.depth = 0

    def serve(self, request: dict[str, Any]) -> None:
        self.depth += 1
        try:
            super().serve(request)
        finally:
            self.depth -= 1
            if not self.depth:
                self.kept, self.before = {}, {}

    def do(self, request: dict[str, Any]) -> Any:
        if request["do"] == "load":
            return load(**request["job"])
        value = self.lent[request["of"]]
        if request["do"] == "get":
            return getattr(value, request["name"])
        if request["do"] == "list":
            return list(value)
        return value(*request["args"], **request["kwargs"])

    def notes(self) -> dict[str, Any]:
        return {"changed": [number for number, array in self.kept.items()
                            if array.tobytes() != self.before[number]]}

    def lend(self, value: Any) -> dict[str, Any]:
        return {"yours": self.theirs[id(value)]} if id(value) in self.theirs else super().lend(value)

    def borrowed(self, number: int, kind: str) -> Any:
        if number not in self.functions:
            def function(*args, **kwargs):
                return self.ask(of=number, args=args, kwargs=kwargs)
            self.functions[number] = function
            self.theirs[id(function)] = number
        return self.functions[number]

    def unpack(self, packed: Any, arrays: list[np.ndarray]) -> Any:
        """As above; an array of the judge's that comes twice in a call is one array here, too."""
        if isinstance(packed, dict) and "number" in packed:
            number = packed["number"]
            if "array" in packed:
                self.kept[number] = arrays[packed["array"]]
                self.before[number] = self.kept[number].tobytes()
            return self.kept[number]
        if isinstance(packed, dict) and "generator" in packed:
            bits = np.random.PCG64()
            bits.state = packed["generator"]
            return np.random.Generator(bits)
        return super().unpack(packed, arrays)


def load(source: str, name: str, taken: list[int], given: dict[str, Any], forbidden: list[str],
         roots: list[str]) -> dict[str, Any]:
    """Run the statements `taken` of a submission, where the names `given` are there -> all names then there.

    The submission has the builtins that are not `forbidden`, and imports from `roots`.
    """
    # Here only the first part of a name is checked. NumPy imports some of its parts when they are first used,
    # and such an import is made in the submission's name.
    def guarded(name, globals=None, locals=None, fromlist=(), level=0):
        if name.split(".")[0] not in roots or level:
            raise ModuleNotFoundError(f"a submission may not import {name}")
        return builtins.__import__(name, globals, locals, fromlist, level)
    kept = {name: value for name, value in vars(builtins).items() if name not in forbidden}
    kept |= {"__import__": guarded, "__build_class__": builtins.__build_class__}
    tree = ast.parse(source)
    tree.body = [tree.body[place] for place in taken]
    space = {**given, "__name__": "submission", "__builtins__": kept}
    exec(compile(tree, name, "exec"), space)
    return {name: value for name, value in space.items()
            if not name.startswith("__") and not isinstance(value, types.ModuleType)}


def _text(error, most=600):
    """What an exception says, in a few lines."""
    try:
        return str(error).strip()[:most] or "no message"
    except BaseException as second:  # an exception of the submission's own class
        return f"no message: {type(second).__name__}"


def limit(limits: dict[str, int]) -> None:
    """Limit processor time, memory, file sizes and processes of this process, where the platform can.

    limits: names and values of resource.setrlimit.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in limits.items():
        if hasattr(resource, name):
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # processor time ends with a signal (soft), and a second later with the process (hard)
            new_hard = value + 1 if name == "RLIMIT_CPU" and value != hard else value
            try:
                resource.setrlimit(kind, (value, new_hard))
            except (ValueError, OSError):  # macOS refuses some
                pass


def _leave_the_network(new_user=0x10000000, new_network=0x40000000):
    """Linux: move to a new network namespace, one without a way out. No effect where refused."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if libc.unshare(new_network) != 0:
            libc.unshare(new_user | new_network)


def main() -> None:
    """Do what the judge asks until it closes the pipe. Arguments: the limits, and folders to import from."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.path += sys.argv[2:]
    limit(json.loads(sys.argv[1]))
    _leave_the_network()
    child = Child(source, sink)
    while True:
        try:
            child.serve(child.receive())
        except Ended:
            return


if __name__ == "__main__":
    main()
