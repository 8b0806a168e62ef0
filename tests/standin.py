"""A stand-in for CuPy whose arrays lie in host memory and behave as if they did not. For what can be found
out without a GPU: whether code hands NumPy arrays to the device's ops, reads device values on the host, or
asks for a function that CuPy lacks.

It also captures graphs: what is computed between begin_capture and end_capture is undone, and repeated by
launch(), on the same memory with the same numbers. So a step that is frozen wrongly, with a rate or a batch
of the step that was captured, shows.

It computes with NumPy, so it says nothing of CuPy's own kernels: those are for the tests marked gpu on a GPU.
`python -m pytest -m gpu --standin` runs the bodies of those tests on it.
"""
import contextlib
import ctypes
import sys
import time
import types

import numpy as np

from tinytoken import backend
from tinytoken.tensor import plain

# of what NumPy has and this project might reach for
LACKS = {"vecdot", "frompyfunc", "char", "vectorize", "nditer"}
# CuPy's wrappers of it refuse to be captured
CUBLAS = {"matmul", "dot", "vdot", "inner", "tensordot", "einsum"}
counts = {"reads": 0, "copies": 0}  # device to host, host to device
capturing = []  # the Graph that is being captured, or nothing


class Graph:
    """cupy.cuda.Graph, of what compute() ran and Emulator launched meanwhile."""

    def __init__(self):
        self.calls, self.before = [], []

    def changes(self, *arrays):
        """These are about to be written in place: a capture does nothing, so they are put back when it
        ends."""
        self.before += [(array, array.copy()) for array in arrays]

    def undo(self):
        for array, old in reversed(self.before):
            array[...] = old

    def launch(self, stream=None):
        for call in self.calls:
            call()


def compute(function, args, options):
    """function(*args, **options) on the arrays' memory, and noted if a graph is being captured."""
    host, settings, out = unwrapped(args), unwrapped(options), options.get("out")
    outs = [] if out is None else [one.host for one in (out if isinstance(out, tuple) else (out,))]
    if capturing:
        if name_of(function) in CUBLAS:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        capturing[0].changes(*outs)
    result = wrapped(function(*host, **settings), out)
    if capturing:
        inputs = [a for a in flat(host) if isinstance(a, np.ndarray)] + [getattr(function, "__self__", None)]
        made = [] if out is not None else [r.host for r in flat(result) if isinstance(r, ndarray)]
        # views are nothing to do
        made = [m for m in made
                if not any(isinstance(a, np.ndarray) and np.may_share_memory(m, a) for a in inputs)]

        def again():
            for old, new in zip(made, (np.asarray(n) for n in flat(function(*host, **settings)))):
                old[...] = new
        capturing[0].calls += [again] if made or outs else []
    return result


def name_of(function):
    """Of a function, a ufunc's method or an array's."""
    return getattr(getattr(function, "__self__", None), "__name__", function.__name__)


def flat(value):
    return [leaf for one in value for leaf in flat(one)] if isinstance(value, (tuple, list)) else [value]


def in_place(call, *arrays):
    """call() writes into these NumPy arrays."""
    if capturing:
        capturing[0].changes(*arrays)
        capturing[0].calls.append(call)
    call()


def synchronous(what):
    """Count a read or a copy: a capture forbids both."""
    if capturing:
        raise RuntimeError("the current stream is capturing, so synchronous API calls are disallowed")
    counts[what] += 1


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray."""
    __array_priority__ = 100

    def __init__(self, host):
        self.host = host

    shape, dtype, ndim, size = (property(lambda self, name=name: getattr(self.host, name))
                                for name in ("shape", "dtype", "ndim", "size"))
    nbytes, flags, strides, itemsize = (property(lambda self, name=name: getattr(self.host, name))
                                        for name in (
        "nbytes", "flags", "strides", "itemsize"))
    T = property(lambda self: ndarray(self.host.T))
    data = property(lambda self: types.SimpleNamespace(ptr=self.host.ctypes.data))

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if not all(isinstance(x, (ndarray, np.ndarray, np.generic, int, float)) for x in inputs):
            return NotImplemented
        if method not in ("__call__", "at") or ufunc.__name__ in LACKS:
            raise TypeError(f"CuPy has no {ufunc.__name__}.{method}")
        return compute(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function, types, args, options):
        if not all(issubclass(one, (ndarray, np.ndarray)) for one in types):
            return NotImplemented
        if function.__name__ in LACKS or not function.__module__.startswith("numpy"):
            raise TypeError(f"CuPy has no {function.__name__}")
        return compute(function, args, options)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self.host, name)
        return lambda *args, **options: compute(method, args, options)

    def __getitem__(self, key):
        place = self.index(key)
        return compute(lambda host: host[place], (self,), {})

    def __setitem__(self, key, value):
        place, new = self.index(key), unwrapped(value)
        in_place(lambda: self.host.__setitem__(place, new), self.host)

    def index(self, key):
        """A key as NumPy takes it. One that is a condition makes a result whose size the host has to read."""
        parts = key if isinstance(key, tuple) else (key,)
        for part in parts:
            if isinstance(part, ndarray) and part.dtype == bool:
                synchronous("reads")
            if isinstance(part, np.ndarray):  # CuPy lets it pass, and copies it
                synchronous("copies")
        raw = tuple(part.host if isinstance(part, ndarray) else part for part in parts)
        # which gives an element as a view, as CuPy does
        return raw if any(part is Ellipsis for part in raw) else (*raw, Ellipsis)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def get(self):
        synchronous("reads")
        return self.host.copy()

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def __format__(self, form):
        return format(self.get()[()], form)

    def __repr__(self):
        return repr(self.get())

    __float__, __int__, __bool__, __index__ = (lambda self, kind=kind: kind(self.get())
                                               for kind in (float, int, bool, int))
    __hash__ = None


def unwrapped(value):
    """Arguments as NumPy takes them. A NumPy array among them is refused, as CuPy refuses it."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type <class 'numpy.ndarray'> {value.shape}")
    if isinstance(value, dict):
        return {name: unwrapped(one) for name, one in value.items()}
    return type(value)(map(unwrapped, value)) if type(value) in (tuple, list) else value


def wrapped(result, out=None):
    """What NumPy gave, on the device: a reduction of everything is a 0-d array there."""
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    if isinstance(result, (tuple, list)):
        return type(result)(map(wrapped, result))
    return ndarray(np.asarray(result)) if isinstance(result, (np.ndarray, np.generic)) else result


def copied(value, *args, **options):
    """cupy.asarray and cupy.array: the one way for a NumPy array to the device."""
    if isinstance(value, (np.ndarray, np.generic)):
        synchronous("copies")
        return ndarray(np.array(value, *args, **options))
    return wrapped(np.array(unwrapped(value), *args, **options))


class Ufunc:
    """cupy's ufunc: called, or `at`."""

    def __init__(self, ufunc):
        self.ufunc = ufunc

    def __call__(self, *args, **options):
        return compute(self.ufunc, args, options)

    def at(self, target, key, *values):
        place, new = target.index(key), unwrapped(values)
        in_place(lambda: self.ufunc.at(target.host, place, *new), target.host)


class Module(types.ModuleType):
    """cupy: NumPy's functions for the arrays above."""
    ndarray, asarray, array, float32, float64, newaxis, pi, inf = ndarray, None, None, np.float32, np.float64, None, np.pi, np.inf

    def __getattr__(self, name):
        if name in LACKS or name.startswith("_"):
            raise AttributeError(f"module 'cupy' has no attribute '{name}'")
        function = getattr(np, name)
        return Ufunc(function) if isinstance(function, np.ufunc) else lambda *args, **options: compute(function, args, options)


class Communicator:
    """cupy.cuda.nccl.NcclCommunicator, of ranks that all have the same."""

    def __init__(self, size, number, rank):
        assert number == b"a number" and 0 <= rank < size
        self.size = size

    def allReduce(self, source, target, count, kind, operation, stream):
        assert (source, operation, stream) == (target, "sum", Stream.ptr)
        memory = np.ctypeslib.as_array((kind * count).from_address(target))
        in_place(lambda: np.multiply(memory, self.size, out=memory), memory)
        sums.append(count)


sums = []  # how many values each call of allReduce had


class Stream:
    """cupy.cuda.Stream, of which there is one."""
    ptr = 1

    def __init__(self, non_blocking=False):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record(self):
        return "event"

    def wait_event(self, event):
        assert event == "event"

    def is_capturing(self):
        return bool(capturing)

    def begin_capture(self):
        capturing.append(Graph())

    def end_capture(self):
        graph = capturing.pop()
        graph.undo()
        return graph


class Event:
    """cupy.cuda.Event: a moment of the host's clock."""

    def record(self):
        self.moment = time.perf_counter()

    def synchronize(self):
        pass


def modules():
    """{name: module} for sys.modules."""
    cupy = Module("cupy")
    cupy.__version__, cupy.is_available = "a stand-in", lambda: True
    cupy.asarray = lambda value, *args, **options: value if isinstance(value, ndarray) and not args and not options else copied(
        value, *args, **options)
    cupy.array = copied
    cupyx, scipy, special = (types.ModuleType(name)
                             for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.special"))
    cupyx.scatter_add = lambda target, index, values: in_place(lambda: np.add.at(target.host, index.host,
                                                                                 values.host), target.host)
    cupy.cuda = types.SimpleNamespace(Stream=Stream, MemoryPool=lambda: types.SimpleNamespace(malloc=None),
                                      get_current_stream=Stream,
                                      Device=lambda number=0: types.SimpleNamespace(use=lambda: None, attributes={"MaxSharedMemoryPerBlockOptin": 227 * 1024},
                                                                           synchronize=lambda: None),
                                      using_allocator=lambda malloc: contextlib.nullcontext(), Event=Event,
                                      get_elapsed_time=lambda start, stop: 1e3 * (stop.moment - start.moment))
    nccl = types.ModuleType("cupy.cuda.nccl")
    nccl.NcclCommunicator, nccl.get_unique_id, nccl.NcclError = Communicator, lambda: b"a number", RuntimeError
    nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM = ctypes.c_float, ctypes.c_double, "sum"
    cupy.cuda.nccl, cupy.cuda.runtime = nccl, types.SimpleNamespace(getDeviceCount=lambda: 1)
    cupy.lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(
        as_strided=lambda x, shape,
        strides: ndarray(np.lib.stride_tricks.as_strided(x.host, shape, strides))))
    special.erf = lambda x: ndarray(np.asarray(backend.erf(x.host)))
    cuda = types.ModuleType("cupy.cuda")
    vars(cuda).update(vars(cupy.cuda))
    cupy.cuda = cuda
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl, "cupyx": cupyx, "cupyx.scipy": scipy, "cupyx.scipy.special": special}


def in_place_of_cupy():
    """Whether it is installed now."""
    return isinstance(sys.modules.get("cupy"), Module)


@contextlib.contextmanager
def installed(kernels=False):
    """Context: `--device cuda` is the stand-in, and the counts begin at 0. Ops are plain, but with
    kernels=True those of tinytoken.cuda run: the caller says on what (launcher.running_on)."""
    before = {name: sys.modules.get(name) for name in modules()}
    sys.modules.update(modules())
    backend.cuda_ready.cache_clear()
    counts.update(reads=0, copies=0)
    try:
        with contextlib.nullcontext() if kernels else plain():
            yield counts
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        backend.cuda_ready.cache_clear()
