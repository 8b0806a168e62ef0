"""What runs in a training step or a forward pass must not read device memory from the host, and must be
written for both array modules: read off the sources, so that it holds where no GPU is."""
import ast
import inspect
import pathlib

import pytest

import house

FILES = [house.File(house.PACKAGE / name)
         for name in ("graph.py", "tensor.py", "random.py", "data/batches.py", "data/mix.py")]
FILES += [house.File(path) for folder in ("nn", "ops", "models", "tasks", "train")
          for path in sorted((house.PACKAGE / folder).glob("*.py"))]

# Functions that may, and why.
OF_MODELS = ("__init__", "__post_init__", "build", "show")  # a model is made on the host, and shown there
MAY = {
    "made once, on the host": {
        "nn/module.py": {"zeros", "check_room"}, "nn/init.py": {"sincos_positions", "sinusoids"},
        "ops/grid.py": {"resize_matrix", "_cubic"}, "ops/window.py": {"_distances", "seen_in_windows"},
        "models/pruning.py": {"Deciding.decide_by"}, "tasks/base.py": {"Task.labels"},
        "models/t2tvit.py": {"TokenPerformer.start"},
        "models/keyframe.py": {"positions_on"}, "models/keyrules.py": {"spread_out"},
        "models/controls.py": {"PooledTokens.put_back", "means_of_parts", "morton_order"},
        "data/batches.py": {"Batches.__init__", "channel_statistics"}, "data/mix.py": {"beta_quantiles"}},
    "weights that are read from a file": {
        "models/formats.py": {"_read_safetensors", "options_of"},
        "models/weights.py": {"_asked_for", "_positions"}},
    "types and shapes, no values": {
        "models/column.py": {"ColumnConfig.prefix"}, "models/tome.py": {"matching"},
        "models/options.py": {"one_of"}, "nn/module.py": {"Module.astype"}, "ops/select.py": {"top_k"},
        "ops/grid.py": {"_are_sides"}, "ops/window.py": {"_check"},
        "tensor.py": {"Tensor.__init__", "Op._setting", "Op._float_dtype", "Op._raw", "Op._wrap",
                      "_as_array", "refuse"},
        "ops/shape.py": {"_index_array", "swapaxes"}, "graph.py": {"_checked", "watched"},
        "ops/dense.py": {"_"}, "random.py": {"bits", "_check_seed"}},
    "asked for by the caller": {
        "tensor.py": {"Tensor.numpy", "Tensor.item", "Tensor.__float__", "Tensor.__int__", "Tensor.__bool__",
                      "Tensor.__array__", "Tensor.__format__"},
        "nn/module.py": {"Module.state_dict"}, "models/pruning.py": {"places_of"},
        "tasks/caption.py": {"Caption.metrics", "corpus_scores"},
        "tasks/attack.py": {"perturb", "moved", "blur"}},
    "a host branch, or what a run reads every so many steps": {
        "models/passing.py": {"Waiting.encode_kept", "Waiting.groups"},  # at inference, once for each exit
        "train/parallel.py": {"loss_and_grads"}, "train/step.py": {"Losses.read"},
        "train/inference.py": {"infer"}, "train/checkpoint.py": {"save", "_check_finite"},
        "tasks/classify.py": {"accuracy"}, "data/mix.py": {"mixed"},
        "tasks/refer.py": {"Refer.labels", "Refer.metrics"},
        "tasks/actions.py": {"Actions.labels", "Actions.metrics"},
        "tasks/segment.py": {"Segment.labels", "Segment.metrics", "mean_iou", "boundary_f1", "near"},
        "random.py": {"uniform_of"}},  # by two controls and a rule, where nothing was drawn for them
}


def reads(node):
    """What in this node would read values on the host, or belongs to one array module."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute) and name in ("get", "item", "tolist") and not node.args:
            yield f".{name}()"
        if isinstance(node.func, ast.Name) and name in ("float", "int", "bool", "to_numpy"):
            yield f"{name}(...)"
        if name in ("einsum", "nonzero", "argwhere", "flatnonzero", "unique"):
            yield f"{name}: its result's size or its speed depends on the values"
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
        yield f"np.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Compare, ast.BoolOp)):
        yield "an index that is a condition"


def found(tree):
    """{(qualified name of the outermost function, "Class.method" for methods): what was found in it}."""
    places = {}
    for node in tree.body:
        functions = [(node.name, node)] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef):
            functions = [(f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef)]
        for name, function in functions:
            what = [reason for part in function.body for inner in ast.walk(part) for reason in reads(inner)]
            if what:
                places[name] = what
    return places


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_nothing_in_a_step_reads_on_the_host(file):
    allowed = set().union(*(names.get(file.name, set()) for names in MAY.values()))
    places = found(file.tree)
    if file.name.startswith("models/"):
        places = {name: what for name, what in places.items() if name.rpartition(".")[2] not in OF_MODELS}
    assert {name: what for name, what in places.items() if name not in allowed} == {}
    assert allowed <= places.keys(), f"no longer needed: {sorted(allowed - places.keys())}"


@pytest.mark.parametrize("line, reason", [
    ("return x.get()", ".get()"), ("return float(x)", "float(...)"),
    ("return x[x > 0]", "an index that is a condition"),
    ("return xp.einsum('ij->i', x)", "einsum: its result's size or its speed depends on the values"),
    ("return np.exp(x)", "np.exp"), ("if x.sum().item() > 0:\n        return x", ".item()"),
    ("return xp.nonzero(x)", "nonzero: its result's size or its speed depends on the values")])
def test_the_check_sees(line, reason):
    assert reason in found(ast.parse(f"def f(x):\n    {line}\n"))["f"]


def test_files_are_there():
    assert all(pathlib.Path(file.path).exists() for file in FILES) and len(FILES) > 15


def of_the_module(node):
    """Whether it is `xp.name` or `array_module(...).name`."""
    if not isinstance(node, ast.Attribute):
        return False
    called = isinstance(node.value, ast.Call)
    owner = node.value.func if called else node.value
    return isinstance(owner, ast.Name) and owner.id == ("array_module" if called else "xp")


def test_cupy_has_what_the_code_takes_from_it():
    """Runs wherever CuPy is installed: it needs no device for this."""
    cupy = pytest.importorskip("cupy")
    files = [*FILES, house.File(house.PACKAGE / "backend.py")]
    nodes = [(file.name, node) for file in files for node in ast.walk(file.tree)]
    taken = {(name, node.attr) for name, node in nodes if of_the_module(node)}
    assert len(taken) > 50 and {one for one in taken if not hasattr(cupy, one[1])} == set()
    calls = [(name, node) for name, node in nodes if isinstance(node, ast.Call) and of_the_module(node.func)]
    functions = {attr: getattr(cupy, attr) for _, attr in taken}
    known = {attr: inspect.signature(function).parameters for attr, function in functions.items()
             if callable(function) and not isinstance(function, (cupy.ufunc, type))}
    assert {(name, node.func.attr, word.arg) for name, node in calls for word in node.keywords
            if node.func.attr in known and word.arg and word.arg not in known[node.func.attr]} == set()
