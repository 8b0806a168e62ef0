"""When compiled ops run and when they do not; threads; the first compilation."""
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import tinytoken as tt
from house import ROOT
from tinytoken import backend, doctor, ops
from tinytoken.compiled import launcher, registered
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.tasks import Classify
from tinytoken.threads import share_out
from tinytoken.train import AdamW, infer, loss_and_grads

pytest.importorskip("numba", exc_type=ImportError)
LARGE = np.random.default_rng(0).standard_normal((8, 20, 96)).astype("float32")


def compiled_runs():
    """Whether this thread would run a compiled gelu of a large array."""
    return backend.faster(ops.gelu, np, LARGE) is registered.gelu


def test_large_arrays_run_compiled_and_small_ones_plain():
    assert compiled_runs()
    assert backend.faster(ops.gelu, np, LARGE[0]) is None and LARGE[0].size < launcher.LEAST
    assert backend.faster(ops.gelu, np, LARGE.astype(int)) is None
    assert (ops.gelu(LARGE).data == registered.gelu(LARGE)[0]).all()


def test_plain_switches_them_off_in_threads_that_share_work_too():
    with tt.plain():
        assert not compiled_runs()
        assert share_out(lambda _: compiled_runs(), range(4), threads=2) == [False] * 4
        assert (ops.gelu(LARGE).data == ops.gelu.function(LARGE)[0]).all()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(compiled_runs()))
        thread.start()
        thread.join()
        assert elsewhere == [True]  # it shares nothing
    assert share_out(lambda _: compiled_runs(), range(4), threads=2) == [True] * 4


# Each in a process of its own: what a fresh one loads, says and computes

CODE = """
import sys
import numpy as np
import tinytoken as tt
from tinytoken import ops
assert "numba" not in sys.modules
x = np.random.default_rng(0).standard_normal((8, 20, 96)).astype("float32")
ops.gelu(x[0, :2])
assert "numba" not in sys.modules
out = ops.gelu(x).data
print((out == ops.gelu.function(x)[0]).all(), "numba" in sys.modules)
from tinytoken.doctor import compiled
print(compiled())
"""


def python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          env=environment, cwd=os.sep)  # the current folder would be searched first
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_first_use_says_once_that_it_compiles_and_the_next_process_does_not(tmp_path):
    first, said = python(CODE, NUMBA_CACHE_DIR=str(tmp_path))
    assert said == "tinytoken: compiling ops for this CPU; they are kept for the next time\n"
    second, nothing = python(CODE, NUMBA_CACHE_DIR=str(tmp_path))
    assert nothing == "" and first == second
    assert first.splitlines() == ["False True", doctor.compiled()]
    assert doctor.compiled().startswith("on: Numba ")


def test_an_environment_variable_switches_them_off():
    out, said = python(CODE, TINYTOKEN_COMPILED="0")
    assert said == "" and out.splitlines() == ["True False", "off: TINYTOKEN_COMPILED=0"]


WITHOUT = """import sys
sys.modules["numba"] = None
""" + CODE.replace('assert "numba" not in sys.modules\n', "").replace(', "numba" in sys.modules', "")


def test_without_numba_the_plain_ops_run():
    out, said = python(WITHOUT)
    same, off = out.splitlines()
    assert said == "" and same == "True" and off.startswith("off: Numba is not installed: ")
    assert off.endswith(f"-m pip install '{doctor.NUMBA}'")


def test_a_numba_that_cannot_be_imported_is_said_once(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs another\\nNumPy')")
    code = CODE.replace(', "numba" in sys.modules', "").replace("out = ", "ops.gelu(x)\nout = ")
    out, said = python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    reason = "Numba cannot be used (Numba needs another NumPy)"
    assert said == f"tinytoken: {reason}; the plain ops run\n"
    assert out.splitlines() == ["True", f"off: {reason}"]


def test_without_the_folder_the_plain_ops_run(tmp_path):
    without = shutil.ignore_patterns("compiled", "__pycache__")
    shutil.copytree(ROOT / "tinytoken", tmp_path / "tinytoken", ignore=without)
    code = CODE.replace("import numpy", """
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]  # finds the folder
import numpy""", 1)
    out, said = python(code, PYTHONPATH=str(tmp_path))
    assert said == "" and out.splitlines() == ["True False", "off: this tinytoken has no folder compiled/"]


AT_ONCE = """
import threading
import numpy as np
from tinytoken import ops
x = np.random.default_rng(0).standard_normal((8, 20, 96)).astype("float32")
start, out = threading.Barrier(4), []

def work():
    start.wait()
    y, vjp = ops.layer_norm.function(x)
    y = ops.layer_norm(ops.gelu(x)).data
    out.append(y)
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert len(out) == 4 and all((one == out[0]).all() for one in out)
"""


def test_threads_that_all_come_first_compile_once(tmp_path):
    _, said = python(AT_ONCE, NUMBA_CACHE_DIR=str(tmp_path))
    assert said == "tinytoken: compiling ops for this CPU; they are kept for the next time\n"


def test_where_nothing_can_be_kept_it_compiles_for_this_process_alone(monkeypatch):
    from tinytoken.compiled import kernels
    calls = []

    def njit(cache=False, **options):
        calls.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function
    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels.compiled(max) is max and calls == [True, False]


# The same bits

SIZES = dict(image_size=16, patch_size=2, dim=32, depth=2, heads=2)
MODELS = {"ViT": lambda: ViT(**SIZES),
          "DynamicViT": lambda: DynamicViT(**SIZES, prune_before=(1,), keep_ratios=(.7,)),
          "LookupViT": lambda: LookupViT(**SIZES, compressed=(3, 3))}


def trained(make, threads):
    """(weights after 3 steps of two slices each, logits)."""
    tt.manual_seed(0)
    model, rng = make().train(), np.random.default_rng(1)
    images, labels = rng.standard_normal((16, 3, 16, 16)).astype("float32"), np.arange(16) % 10
    task, optimizer = Classify(model), AdamW(model.parameters(), 1e-3, clip=1.0)
    for step in range(3):
        loss_and_grads(task, optimizer.params, (images, labels), 8, threads, task.noise(16, step, 0))
        optimizer.step()
    return optimizer.flat.data, infer(model, images, batch_size=8, threads=threads)


@pytest.mark.parametrize("name", MODELS)
def test_one_thread_or_two_give_the_same_bits_in_every_run(name):
    runs = [trained(MODELS[name], threads) for threads in (1, 2, 2)]
    for weights, logits in runs[1:]:
        assert (weights == runs[0][0]).all() and (logits == runs[0][1]).all()
    with tt.plain():
        _, plain = trained(MODELS[name], 2)
    assert (plain != runs[0][1]).any()  # else nothing was compared
    np.testing.assert_allclose(runs[0][1], plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_as_by_the_plain_ops(name):
    """Logits, loss and gradients, in float64."""
    tt.manual_seed(0)
    model = MODELS[name]().astype("float64").train()
    images, labels = np.random.default_rng(0).standard_normal((16, 3, 16, 16)), np.arange(16) % 10
    draws, params = Classify(model).noise(16, 0, 0), model.parameters()
    results = []
    for context in (backend.using_implementations(None), tt.plain()):
        with context:
            loss, _ = loss_and_grads(Classify(model), params, (images, labels), 8, 2, draws)
            results.append([loss, infer(model, images), *(p.grad.copy() for p in params)])
    largest = max(abs(g).max() for g in results[1][2:])
    for mine, plain in zip(*results, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-10, atol=1e-10 * largest)


def test_logits_of_float32_are_as_right_as_the_plain_ones():
    tt.manual_seed(0)
    model = ViT(dim=96, depth=6, heads=4)
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32))
    exact = infer(model.astype("float64"), images)
    mine = infer(model.astype("float32"), images.astype("float32"))
    with tt.plain():
        plain = infer(model, images.astype("float32"))
    errors = [abs(logits - exact).max() for logits in (mine, plain)]
    assert errors[0] <= max(1.5 * errors[1], 1.2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_one_image_has_the_same_bits_on_one_thread_or_two(name):
    """Its products are then shared by BLAS."""
    tt.manual_seed(0)
    sizes = dict(image_size=32, patch_size=4, dim=192, depth=2, heads=3)
    more = {"ViT": {}, "DynamicViT": dict(prune_before=(1,), keep_ratios=(.7,)), "LookupViT": {}}[name]
    model = getattr(tt.models, name)(**sizes, **more)
    image = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype("float32")
    one, *others = [infer(model, image, threads=threads) for threads in (1, 2, 2, 3)]
    assert all((other == one).all() for other in others)
