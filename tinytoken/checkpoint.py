"""Checkpoints: one .npz with arrays and a JSON header. No pickle. Written beside the target, flushed, then renamed over it, so
that a crash at any moment leaves the old file or the new one, whole."""
import contextlib
import json
import os
import pathlib
import tempfile
import zipfile

import numpy as np

from . import models
from .backend import to_numpy
from .errors import Busy, InputError, expect

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "tinytoken checkpoint 1"


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Context: a file that becomes `path` when the block ends well, and vanishes when it does not. A full disk or an unwritable
    folder raises InputError naming the path."""
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, mode) as file:
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
def claimed(path):
    """Context: no other process is in such a block for the same path; Busy where one is. The claim is a lock on path.lock, so it
    ends with the process, however that ends. Windows has no such locks: there nothing is claimed."""
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


def write_json(path, value):
    """JSON, indented, replaced as a whole."""
    with replacing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def save(path, model, optimizer=None, **header):
    """Write the model's kind, config and weights, the optimiser's moments if given, and whatever JSON `header` adds."""
    header |= {"format": FORMAT, "model": type(model).__name__, "config": model.config}
    arrays = {f"model/{name}": array for name, array in model.state_dict().items()}
    if optimizer is not None:
        moments, header["optimizer_steps"] = optimizer.state()
        arrays |= {f"optimizer/{name}": to_numpy(array) for name, array in moments.items()}
    with replacing(path) as file:
        np.savez(file, header=np.array(json.dumps(header, default=plain_number)), **arrays)


def plain_number(value):
    """JSON for a NumPy number among the settings."""
    return value.item()


def as_json(value):
    """The value as it comes back from a header: tuples are lists, NumPy numbers are numbers."""
    return json.loads(json.dumps(value, default=plain_number))


def load(path):
    """(header, {group: {name: array}}) of a checkpoint. InputError says what is wrong with a file that is not one."""
    path = pathlib.Path(path)
    expect(path.exists(), "checkpoint", f"{path} does not exist")
    groups = {"model": {}, "optimizer": {}}
    try:
        with open(path, "rb") as file:
            expect(zipfile.is_zipfile(file), "checkpoint", f"{path} is not a whole .npz file: truncated, or not a checkpoint")
            file.seek(0)
            with np.load(file, allow_pickle=False) as box:
                header = json.loads(str(box["header"])) if "header" in box.files else {}
                expect(header.get("format") == FORMAT, "checkpoint",
                       f"{path} is not a {FORMAT!r} (its header says {header.get('format')!r})")
                expect({"model", "config"} <= header.keys(), "checkpoint", f"{path} does not say its model and config")
                for name in box.files:
                    if name != "header":
                        group, _, rest = name.partition("/")
                        groups[group][rest] = box[name]
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy raise a dozen kinds for a damaged file
        raise InputError(f"checkpoint: {path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    return header, groups


def load_model(path):
    """The model that a checkpoint holds -> (model, header)."""
    header, groups = load(path)
    kind = models.BY_NAME.get(header["model"])
    expect(kind is not None, "checkpoint", f"{path} holds a {header['model']!r}, expected one of {', '.join(models.BY_NAME)}")
    try:
        model = kind(**header["config"])
    except TypeError as error:  # an option that this version does not know
        raise InputError(f"checkpoint: {path} does not describe a {header['model']}: {error}") from error
    model.load_state_dict(groups["model"])
    return model, header


def restore(path, model, optimizer=None):
    """Load a checkpoint into a model (and optimiser) made as the saved one was -> header. A checkpoint of another kind or size of
    model is refused, and nothing is changed."""
    header, groups = load(path)
    given = (header["model"], header["config"])
    expected = (type(model).__name__, as_json(model.config))
    expect(given == expected, "checkpoint", f"{path} holds {_describe(*given)}, expected {_describe(*expected)}")
    if optimizer is not None:
        expect(groups["optimizer"], "checkpoint",
               f"{path} holds no optimiser moments: it is a finished model, not a run to go on with")
        optimizer.load_state(groups["optimizer"], header["optimizer_steps"])
    model.load_state_dict(groups["model"])
    return header


def _describe(kind, config):
    return f"{kind}({', '.join(f'{k}={v}' for k, v in config.items())})"
