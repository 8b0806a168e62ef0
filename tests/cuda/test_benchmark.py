"""What can be said of tests/benchmarks/gpu.py without a GPU: what is timed and in which order, the formulas
of the rooflines, what a file keeps, who is refused, tinytoken's side on the stand-in for CuPy, PyTorch's on
the CPU."""
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import cpu
import emulate
import gpu
import gpu_kernels
import standin
import tinytoken as tt
from gpu_kernels import Kernels, Launch, twins
from gpu_tinytoken import TinyToken
from tinytoken.cuda import gemm, launcher

SIZES = dict(image_size=8, patch_size=4, dim=32, depth=1, heads=2, num_classes=3)
MORE = {"ViT": {}, "LookupViT": {"compressed": (1, 1)},
        "DynamicViT": {"prune_before": (0,), "keep_ratios": (0.5,)}}
TOYS = {kind: cpu.Work(f"toy {kind}", kind, SIZES | more, 2) for kind, more in MORE.items()}
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


# What is timed

def test_targets_come_first_and_everything_once():
    names = [one.name for one in gpu.step_works()]
    assert names[:6] == [f"{kind} {sizes}, 64 tokens" for kind, sizes in (
        ("ViT", "192, batch 256"), ("ViT", "96, batch 128"), ("LookupViT", "192, batch 256"),
        ("DynamicViT", "192, batch 256"),
        ("LookupViT", "96, batch 128"), ("DynamicViT", "96, batch 128"))]
    assert len(names) == len(set(names)) == 3 * 3 * 3 * 2 and len({one.name for one in gpu.inference_works()}) == 3 * 3 * 2 * 2
    for one in gpu.step_works() + gpu.step_works(quick=True) + gpu.inference_works():
        assert one.config["dim"] / one.config["heads"] in launcher.CONSTANTS["HEAD_DIM"]
        assert (32 / one.config["patch_size"]) ** 2 == int(one.name.split()[-2])


def test_parts():
    bench, inspected = types.SimpleNamespace(), types.SimpleNamespace(products=None)
    keys = [key for key, _ in gpu.plan(bench, inspected)]
    parts = [key.split()[0] for key in keys]
    assert list(dict.fromkeys(parts)) == ["steps", "kernels", "inference"] and parts[-1] == "steps"
    assert parts[:7] == ["steps"] * 6 + ["kernels"]
    assert len(set(keys)) == len(keys) == 54 + 36 + len(launcher.kernels()) + 1
    assert {key.split()[0] for key, _ in gpu.plan(bench, inspected, only="inference")} == {"inference"}
    assert len(gpu.plan(bench, inspected, only="steps")) == 54


@pytest.mark.parametrize("sizes, peer, limit", [
    (("ViT", 192, 256, 64), "torch eager", 0.4), (("ViT", 96, 128, 64), "torch graph", 0.8),
    (("LookupViT", 192, 256, 64), "torch compile", 1.0), (("DynamicViT", 96, 128, 64), "torch compile", 0.7),
    (("ViT", 192, 128, 64), "torch eager", None), (("ViT", 96, 128, 256), "torch graph", None),
    (("ViT", 192, 256, 64), "tinytoken fp32", None)])
def test_limits_are_the_issues(sizes, peer, limit):
    assert gpu.limit(gpu.work(*sizes), peer) == limit


# Timing, with contenders that compute nothing

class Call:
    """A contender and its call: what it gives, and how long it takes by the fake clock."""
    host = staticmethod(np.asarray)

    def __init__(self, seconds, loss=2.0, norm=3.0, error=None):
        self.seconds, self.out, self.error = seconds, (loss, norm), error

    def train(self, *_):
        return self

    def __call__(self):
        if self.error:
            raise RuntimeError(self.error)
        return self.out


def bench(monkeypatch, results=None, order=None, **contenders):
    def clock(call, repeats):
        if order is not None:
            order.append((call, repeats))
        return call.seconds
    monkeypatch.setattr(gpu, "arrays_of", lambda one: ({}, 7))
    names = {name.replace("_", " "): call for name, call in contenders.items()}
    return gpu.Bench(results or gpu.Results(None, {}),
                     {name: (lambda call=call: call) for name, call in names.items()}, clock, 3,
                     lambda compiled=False: None)


def test_a_row_and_its_targets(monkeypatch):
    order = []
    one, calls = gpu.work("ViT", 96, 128, 64), dict(tinytoken_bf16=Call(0.001), torch_eager=Call(0.004),
                                                    torch_compile=Call(0.00125))
    row = bench(monkeypatch, order=order, **calls).measure(one, "train", "steps x")
    assert row["repeats"] == 50 and row["macs"] == 7 and row["ms"]["train"]["torch eager"] == [4.0] * 3 and row["skipped"] == {}
    assert row["ratio"]["train"] == {"torch eager": [0.25] * 3, "torch compile": pytest.approx([0.8] * 3)}
    assert [(t["against"], t["limit"], t["met"]) for t in row["targets"]] == [("torch eager", 0.4, True),
                                                                              ("torch compile", 0.7, False)]
    a, b, c = calls.values()
    # a round's order turns
    assert [call for call, repeats in order if repeats == 50] == [a, b, c, b, c, a, c, a, b]
    text = gpu.report([row | {"key": "steps x"}])
    assert "| ViT 96, batch 128, 64 tokens: torch eager | 0.40 | 0.25 [0.25, 0.25] | yes |" in text
    assert "| ViT 96, batch 128, 64 tokens: torch compile | 0.70 | 0.80 [0.80, 0.80] | NO |" in text
    assert "| ViT 96, batch 128, 64 tokens train | 1.000 [1.000, 1.000] | 4.000 [4.000, 4.000] | 1.250 [1.250, 1.250] |" in text


@pytest.mark.parametrize("wrong, said", [
    (dict(loss=2.05), "computes something else than torch eager: {'loss': 0.02"),
    (dict(norm=3.2), "'norm': 0.06"),
    (dict(loss=np.nan), "'loss': nan"), (dict(error="out of\n memory"), "RuntimeError: out of memory")])
def test_what_fails_or_disagrees_is_not_timed(wrong, said, monkeypatch):
    order, bad, results = [], Call(0.001, **wrong), gpu.Results(None, {})
    tried = bench(monkeypatch, results, order, tinytoken_bf16=bad, torch_eager=Call(0.002),
                  torch_graph=Call(0.001, loss=2.03, norm=3.1))
    row = tried.measure(gpu.work("ViT", 192, 256, 64), "train", "steps x")
    assert said in row["skipped"]["tinytoken bf16"] and bad not in [call for call, _ in order]
    assert list(row["median_ms"]["train"]) == ["torch eager",
                                               "torch graph"] and row["ratio"] == {"train": {}} and row["targets"] == []
    assert f"skipped: steps x: tinytoken bf16: {row['skipped']['tinytoken bf16']}" in gpu.report([row | {"key": "steps x"}])


def test_one_that_fails_while_it_is_timed_is_left_out(monkeypatch):
    class Late(Call):
        seconds = property(lambda self: 1 / 0, lambda self, value: None)
    row = bench(monkeypatch, tinytoken_bf16=Call(1.0),
                torch_eager=Late(1.0)).measure(gpu.work("ViT", 192, 256, 64), "train", "steps x")
    assert list(row["ms"]["train"]) == ["tinytoken bf16"] and "ZeroDivisionError" in row["skipped"]["torch eager"] and row["repeats"] == 5


def test_a_lost_device_ends_the_run_and_is_remembered(monkeypatch):
    broken, tried = Call(1.0, error="illegal address"), bench(monkeypatch, tinytoken_bf16=Call(1.0))
    # from then on nothing works
    tried.contenders = {gpu.OURS: lambda: (setattr(tried, "free", broken), broken)[1]}
    with pytest.raises(SystemExit, match="the device is lost after tinytoken bf16"):
        tried.measure(gpu.work("ViT", 192, 256, 64), "train", "steps x")
    assert "tinytoken bf16" in tried.results.failed("steps x")


def test_logits_agree_by_their_median_picture():
    logits = np.random.default_rng(0).standard_normal((1, 5, 3))
    near, far, strange = logits + 0.01, logits.copy(), logits + 0.2
    far[0, 0] += 9  # one picture of five
    found = gpu.agreement_of("infer", "ViT",
                             {"near": near, "torch eager": logits, "far": far, "strange": strange})["of"]
    assert found["near"]["logits"] < 0.05 and found["far"]["logits"] == 0 and found["strange"]["logits"] > 0.05


# What a file keeps

ABOUT = {name: 1 for name in gpu.SAME}


class Time:
    """Jobs that take so many seconds each, of a clock that only they move."""
    now = 0.0

    def todo(self, *seconds):
        return [(f"steps {i}", functools.partial(self.work, i, s)) for i, s in enumerate(seconds)]

    def work(self, i, seconds):
        self.now += seconds
        return {"number": i}


def test_a_run_ends_in_time_and_the_next_goes_on(tmp_path):
    path, clock = tmp_path / "out.json", Time()
    left = gpu.go(clock.todo(20, 25, 10, 10), gpu.Results(path, ABOUT), 1, lambda: clock.now, bar=False)
    assert left == 2 and clock.now == 45  # the third might take 25 seconds as well
    results, clock = gpu.Results(path, ABOUT), Time()
    assert gpu.go(clock.todo(20, 25, 10, 10), results, 1, lambda: clock.now,
                  bar=False) == 0 and clock.now == 20
    rows = results.data["rows"]
    assert [(row["key"], row["number"], row["seconds"]) for row in rows] == [
        ("steps 0", 0, 20), ("steps 1", 1, 25), ("steps 2", 2, 10), ("steps 3", 3, 10)]
    assert gpu.Results(path, ABOUT).data["rows"] == rows


@pytest.mark.parametrize("first, minutes, left", [(100, 0.5, 1), (40, 1, 0)])
def test_one_row_is_always_begun_and_each_part_has_its_own_longest(first, minutes, left):
    clock = Time()
    todo = clock.todo(first) + [("kernels x", functools.partial(clock.work, 1, 1))]
    assert gpu.go(todo, gpu.Results(None, ABOUT), minutes, lambda: clock.now, bar=False) == left


def test_rows_of_other_conditions_are_not_mixed(tmp_path):
    gpu.Results(tmp_path / "out.json", ABOUT).write()
    with pytest.raises(SystemExit, match=r"belongs to other conditions \(driver 1 there, 2 now\): choose "
                                         r"another --out"):
        gpu.Results(tmp_path / "out.json", ABOUT | {"driver": 2})


def test_what_two_runs_did_not_survive_is_not_tried_again(tmp_path):
    for failed in ({}, {}, {"torch compile": "two runs ended in the middle of it"}):
        results = gpu.Results(tmp_path / "out.json", ABOUT)
        assert results.failed("steps x") == failed
        results.begin("steps x", "torch compile")  # and the process dies
    results.begin()
    assert gpu.Results(tmp_path / "out.json", ABOUT).data["broken_off"] == [["steps x", "torch compile"]]


# Rooflines

def launched(name, *arguments, blocks=1, constants=()):
    kernel = launcher.kernels()[name]
    return Launch(launcher.Kernel(kernel.name, kernel.family, kernel.parameters, constants), blocks, 32,
                  list(arguments), 0)


def test_formulas_by_hand():
    n, zeros = 1000, functools.partial(np.zeros, dtype="float32")
    one = launched("adamw", zeros(n), zeros(n), zeros(n), zeros(n), None, zeros(1), zeros(5), n, 1, 0, 0,
                   0.9, 0.999, 1e-8)
    # four arrays read and written, six more numbers
    assert (one.bytes, one.operations) == (4 * 4 * n * 2 + 4 + 20, 18 * n)
    # 2 pictures, 3 heads, 17 tokens, head dimension 16
    half = functools.partial(np.zeros, dtype="uint16")
    one = launched("bf16_attention_forward", half((2, 17, 144)), zeros((2, 17)), half((2, 17, 48)),
                   zeros((2, 3, 17)), zeros((2, 3, 17)),
                   3, 17, True, 0.25, blocks=6, constants=(("HEAD_DIM", 16),))
    assert one.bytes == 2 * 2 * 17 * 144 + 4 * 2 * 17 + 2 * 2 * 17 * 48 + 2 * 4 * 6 * 17
    assert one.operations == 6 * (2 * (2 * 17 * 17 * 16) + 6 * 17 * 17)
    one = launched("sum_parts", zeros((5, 20)), *[zeros(8)] * 2, 20, 5, 8, 8, True)
    assert (one.bytes, one.operations) == (4 * (5 * 8 + 2 * 8), 5 * 8)
    one = launched("bf16_sum", half((30, 16)), zeros((5, 64)), 64, 0, 30, 16, 6, blocks=5)
    assert one.bytes == 2 * 30 * 16 + 4 * 5 * 16


def test_every_kernel_has_a_formula():
    assert gpu_kernels.OPERATIONS.keys() == launcher.kernels().keys() >= gpu_kernels.BYTES.keys()


def test_copies_lie_as_the_arrays_do():
    packed, alone = np.arange(48.0, dtype="float32").reshape(2, 4, 6), np.float32(3)
    view = packed[:, :, 2:4].transpose(1, 0, 2)
    a, b, c, d = twins([view, None, view, alone])
    assert a is c and a is not view and b is None and d is alone
    assert np.array_equal(a, view) and a.strides == view.strides and not np.shares_memory(a, packed)
    assert twins([np.zeros((), "float32")])[0].shape == ()


@pytest.fixture
def idle(monkeypatch):
    """The stand-in, where launches and products write zeros: for what they are called with."""
    def launch(kernel, blocks, threads, arguments, shared):
        for array, (*_, written) in zip(arguments, kernel.parameters):
            if written and array is not None:
                array[...] = 0

    def multiply(plan, a, b, out, bias, add):
        out[...] = 0
    monkeypatch.setattr(gemm, "plan", functools.cache(lambda *what: type("Plan", (), {"sizes": what[:3]})()))
    monkeypatch.setattr(gemm, "library", lambda: "some")
    with standin.installed(kernels=True), launcher.running_on(launch), gemm.running_on(multiply):
        tt._kernels()
        yield types.SimpleNamespace(launch=launch, multiply=multiply)


def test_every_kernel_is_found_in_what_runs_and_can_be_repeated(idle):
    took = lambda call, repeats: (call(), 1e-3)[1]
    kernels = Kernels(TOYS.values(), took, 2, l2=1000, size=16, copied=1000, launch=idle.launch,
                      multiply=idle.multiply)
    assert kernels.notes[0].launches.keys() == launcher.kernels().keys()
    rows = [kernels.kernel(name) for name in launcher.kernels()]
    assert all(row["bytes"] > 0 and row["copies"] <= 64 and row["share"][0] > 0 for row in rows)
    products = kernels.products()["products"]
    # the block's, those of the patches and of the head
    assert sum(row["times"] for row in products) == 4 * 3 + 2 + 3
    first = next(row for row in products if row["sizes"] == (2 * 5, 96, 32))
    assert first["operations"] == 2 * 10 * 96 * 32 and first["bytes"] == 2 * (10 * 32 + 96 * 32 + 10 * 96
                                                                              + 96) and first["times"] == 1
    text = gpu.report([{"key": "kernels", **row} for row in rows]
                      + [{"key": "products", "products": products}])
    assert all(f"\n| {name} | " in text for name in launcher.kernels()) and text.count("(10, 32) (96, 32) + "
                                                                                       "bias, bf16 to bf16") == 1


def test_the_share_of_the_roofline(idle):
    kernels = Kernels((), None, 3, l2=100, launch=idle.launch)
    kernels.ceilings = types.SimpleNamespace(rate=lambda name,
                                             clock: {"bytes": 2e12, "fp32": 4e13, "bf16": 8e14}[name])
    kernels.gap, x = 1e-6, standin.ndarray(np.zeros(10, "float32"))
    took = iter((160e-6, 150e-6, 170e-6))
    kernels.clock = lambda call, repeats: next(took)
    # 40 us of bytes, 25 of operations; two copies
    row = kernels.measured(lambda a: a.fill(0), (x,), 80_000_000, 10 ** 9, "fp32")
    assert (row["bound"], row["copies"],
            row["us"][0]) == ("bytes", 2, pytest.approx(80)) and row["roofline_us"] == pytest.approx(40)
    assert row["share"][0] == pytest.approx(0.5) and row["met"] is False
    took = iter((100e-6, 100e-6, 100e-6))
    row = kernels.measured(lambda a: a.fill(0), (x,), 80_000, 32 * 10 ** 9, "bf16")  # 40 us of operations
    assert row["bound"] == "bf16" and row["share"][0] == pytest.approx(0.8) and row["met"] is True
    took = iter([3e-6 * 30] * 3)
    # 2 us, as twice a launch that does nothing
    row = kernels.measured(lambda a: a.fill(0), (x,), 10 ** 4, 8 * 10 ** 7, "fp32")
    assert row["copies"] == 2 and row["share"][0] < 0.7 and row["met"] is None


# tinytoken's side, and PyTorch's

@pytest.fixture
def emulator(monkeypatch):
    with emulate.stand_in(monkeypatch) as found:
        yield found


@pytest.mark.slow
@pytest.mark.skipif(emulate.compiler is None, reason="no C++ compiler to run the kernels with")
def test_tinytoken_is_timed_as_it_trains_and_infers(emulator):
    ways = {gpu.OURS: TinyToken("bf16"), "tinytoken bf16 launched": TinyToken("bf16", captured=False),
            "in float32": Plain()}
    count = {}

    def clock(call, repeats):
        emulator.launches.clear()
        call()
        count.setdefault(len(count), [name for name, *_ in emulator.launches])
        return 1.0
    makers = {name: (lambda way=way: way) for name, way in ways.items()}
    tried = gpu.Bench(gpu.Results(None, ABOUT), makers, clock, 2, lambda compiled=False: None)
    row = tried.measure(TOYS["ViT"], "train", "steps toy")
    assert row["skipped"] == {} and list(row["ms"]["train"]) == list(ways) and row["macs"] > 0
    gaps = row["agreement"]["of"]
    assert gaps["tinytoken bf16 launched"] == {"loss": 0, "norm": 0} and 0 < gaps["in float32"]["loss"] < 0.02
    assert count[0] == [] and "bf16_attention_backward" in count[1]  # a graph launches nothing by itself
    count.clear()
    row = tried.measure(TOYS["ViT"], "infer", "inference toy")
    assert row["skipped"] == {} and count[0] == [] and "bf16_attention_forward" in count[1]


def test_a_step_that_is_not_captured_is_no_contender(emulator, monkeypatch):
    class Nosy(tt.train.Classify):
        def __call__(self, images, labels):
            float(images.sum())
            return super().__call__(images, labels)
    monkeypatch.setattr(cpu, "Classify", Nosy)
    tried = gpu.Bench(gpu.Results(None, ABOUT), {gpu.OURS: lambda: TinyToken("bf16")}, None, 2,
                      lambda compiled=False: None)
    row = tried.measure(TOYS["ViT"], "train", "steps toy")
    assert "a training step could not be captured (RuntimeError: the current stream is capturing" in row["skipped"][gpu.OURS]
    assert row["ms"] == {"train": {}}


class Plain:
    """tinytoken on NumPy, in float32."""
    host = staticmethod(np.asarray)

    def train(self, work, arrays, recipe):
        task, (batch, draws) = cpu.task_of(work, arrays), cpu.batch_of(arrays)
        optimizer = tt.train.AdamW(task.model.parameters(), **recipe)
        loss = lambda: tt.train.loss_and_grads(task, optimizer.params, batch, threads=1, draws=draws)[0]
        return lambda: (loss(), optimizer.step())

    def infer(self, work, arrays):
        return lambda: cpu.task_of(work, arrays).model.eval()(arrays["images"]).logits.data


@needs_torch
@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.filterwarnings("ignore")
def test_pytorch_computes_the_same(kind, monkeypatch):
    monkeypatch.setattr(gpu, "RECIPE", gpu.RECIPE | {"lr": 1e-3})  # so that updates show
    peers = importlib.import_module("peers_torch")
    contenders = {"torch eager": lambda: peers.OnDevice("eager", "cpu"), gpu.OURS: Plain}
    tried = gpu.Bench(gpu.Results(None, ABOUT), contenders, lambda call, repeats: 1.0, 2,
                      lambda compiled=False: None)
    for mode in ("train", "infer"):
        row = tried.measure(TOYS[kind], mode, f"{mode} {kind}")
        assert row["skipped"] == {} and len(row["ms"][mode]) == 2
    call, first = gpu.prepared(Plain(), "train", TOYS[kind], cpu.arrays_of(TOYS[kind])[0])
    assert first[-1, 0] < 0.95 * first[0, 0]


# The whole script

class Event:
    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass


@pytest.mark.slow
def test_the_script_from_end_to_end(idle, monkeypatch, tmp_path, capsys):
    cuda, torch = standin.modules()["cupy"].cuda, types.SimpleNamespace(__version__="2",
                                                                        version=types.SimpleNamespace(cuda="13"))
    cupy, freed, asked = sys.modules["cupy"], [], []
    cuda.Event, cuda.get_elapsed_time = Event, lambda start, stop: 1e3 * (stop.at - start.at)
    cuda.runtime = types.SimpleNamespace(getDeviceProperties=lambda _: {"name": b"A GPU",
                                                                        "l2CacheSize": 1000},
                                         runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13010)
    pool = types.SimpleNamespace(free_all_blocks=lambda: freed.append(1))
    monkeypatch.setattr(cupy, "cuda", cuda, raising=False)
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool, raising=False)
    torch.cuda = types.SimpleNamespace(is_available=lambda: True, set_stream=asked.append,
                                       default_stream=lambda: 0,
                                       empty_cache=lambda: None)
    torch.compiler = types.SimpleNamespace(reset=lambda: asked.append("reset"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(gemm, "library", lambda: types.SimpleNamespace(cublasLtGetVersion=lambda: 130800))
    monkeypatch.setattr(gpu, "CONTENDERS",
                        {gpu.OURS: lambda: Both(1), "torch eager": lambda: Both(1),
                         "torch graph": lambda: 1 / 0})
    for which in ("step_works", "inference_works"):
        monkeypatch.setattr(gpu, which, lambda quick: list(TOYS.values()))
    monkeypatch.setattr(gpu, "work", lambda kind, *sizes: TOYS[kind])
    monkeypatch.setattr(gpu, "Kernels",
                        functools.partial(Kernels, size=16, copied=1000, launch=idle.launch,
                                          multiply=idle.multiply))
    path, printed = tmp_path / "out.json", []
    for only in ([], ["--only", "steps"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(path), *only])
        gpu.main()
        printed.append(capsys.readouterr().out)
    found = json.loads(path.read_text())
    assert found["about"]["gpu"] == "A GPU" and found["about"]["versions"]["torch"] == "2" and len(found["about"]["sources"]) == 12
    assert len(found["rows"]) == 3 + 3 + len(launcher.kernels()) + 1 and freed and "reset" in asked
    assert all("skipped: " + row["key"] + ": torch graph: ZeroDivisionError" in printed[0]
               for row in found["rows"] if "ms" in row)
    assert printed[0] == printed[1] and "are left" not in printed[0]  # nothing was missing the second time


class Both(Call):
    def infer(self, *_):
        return lambda: np.ones((2, 3))


# What is missing

def test_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu, "cuda_ready", lambda: (False, "CuPy finds no CUDA device"))
    assert gpu.lacking(None) == gpu.lacking("kernels") == "no GPU: CuPy finds no CUDA device"
    monkeypatch.setattr(gpu, "cuda_ready", lambda: (True, ""))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu.lacking("kernels") == "" and gpu.lacking(None).startswith("no PyTorch (")
    assert gpu.lacking(None).endswith("; --only kernels does without")
    monkeypatch.setitem(sys.modules, "torch",
                        types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False)))
    assert gpu.lacking("steps") == "PyTorch finds no GPU; --only kernels does without" and gpu.lacking("kernels") == ""


def test_without_a_gpu_the_script_ends_before_any_work():
    if gpu.cuda_ready()[0]:
        pytest.skip("there is a GPU")
    root = pathlib.Path(gpu.__file__).parents[2]
    done = subprocess.run([sys.executable, gpu.__file__, "--quick"], capture_output=True, text=True,
                          env={"PYTHONPATH": str(root)})
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("gpu.py: no GPU: ") and done.stderr.count("\n") == 1
