"""The command line, in this process and in others: what it prints, how it ends, and what it refuses in one line."""
import importlib.metadata
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest

import tinytoken as tt
from tiny import RECIPE, SmallRecipe, bits, python, small_cifar
from tinytoken import __main__, backend, checkpoint, compare, doctor, models, predict, train
from tinytoken.__main__ import main
from tinytoken.data import Batches, make_scenes, scenes

Image = pytest.importorskip("PIL.Image", reason="predict reads pictures with pillow")
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
KINDS = {"ViT": {}, "DynamicViT": dict(prune_before=(1,), keep_ratios=(0.5,)), "LookupViT": dict(compressed=(2, 2))}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Everything happens in an empty folder, at the small recipe's size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYTOKEN_DATA", raising=False)
    monkeypatch.setattr(compare, "Recipe", SmallRecipe)
    monkeypatch.setattr(compare, "draw", lambda *_: "no picture")


def saved(path, kind="ViT", **more):
    """A checkpoint as compare leaves it."""
    tt.manual_seed(1)
    model = RECIPE.model(getattr(models, kind), **KINDS[kind])
    for p in model.parameters():
        p.data += 0.1
    checkpoint.save(path, model, **dict(classes=list(scenes.NAMES), mean=MEAN, std=STD) | more)
    return model


def picture(path, size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype("uint8")
    Image.fromarray(pixels).save(path)
    return pixels


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys, *argv):
    """The one line on stderr that main(argv) ends with; it must end with 2 and print nothing else."""
    assert main([str(argument) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


# compare

def test_compare_prints_the_table_and_where_everything_is(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "CuPy cannot be imported (No module named 'cupy')"))
    assert main(["compare", "--steps", "4", "--seed", "7", "--threads", "1"]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:2] == ["running on the CPU: CuPy cannot be imported (No module named 'cupy')", ""]
    rows = ["| model", "|---|---|---|---|---|---|---|", "| ViT", "| DynamicViT", "| LookupViT", "| LookupViT, both heads"]
    assert [line.split(" |")[0] for line in lines[2:8]] == rows
    assert lines[-2:] == ["no picture", "everything is in runs/compare-scenes-7"]
    assert {"table.json", "history.jsonl", "vit.npz"} <= set(everything(tmp_path / "runs" / "compare-scenes-7"))


def test_compare_takes_its_options(monkeypatch, capsys):
    seen = {}

    def run(recipe, out, **settings):
        seen.update(recipe=recipe, out=str(out), **settings)
        return {}, "a line"
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "table_text", lambda table: "the table")
    assert main("compare --data some/folder --steps 9 --seed 2 --device cpu --threads 3 --out there".split()) == 0
    assert seen == {"recipe": SmallRecipe(data="some/folder", steps=9, seed=2), "out": "there", "device": "cpu", "threads": 3}
    assert capsys.readouterr().out == "\nthe table\na line\neverything is in there\n"
    assert main(["compare", "--device", "cpu", "--data", "some/folder"]) == 0
    assert (seen["out"], seen["threads"], seen["recipe"]) == ("runs/compare-folder-0", None, SmallRecipe(data="some/folder"))


BAD = {
    "steps": (["--steps", "0"], "compare: 0 steps, expected at least 4"),
    "negative steps": (["--steps", "-3"], "compare: -3 steps, expected at least 4"),
    "seed": (["--seed", "-1"], "random: seed -1, expected 0 <= int < 2**64"),
    "large seed": (["--seed", str(2 ** 64)], f"random: seed {2 ** 64}, expected 0 <= int < 2**64"),
    "threads": (["--threads", "0"], "compare: 0 threads, expected at least 1"),
    "data": (["--data", "nowhere"], "find_data: no CIFAR-10 or CIFAR-100 in nowhere; download it (about 170 MB) with python -c "
             "\"from tinytoken.data import download_cifar; download_cifar('data', 'cifar10')\" or name a folder that has "
             "cifar-10-batches-bin/ or cifar-10-binary.tar.gz: --data DIR or TINYTOKEN_DATA=DIR"),
    "no data": (["--data", ""], None),
    "no cifar10": (["--data", "cifar10"], None),
    "cuda": (["--device", "cuda"], "device: cuda asked for, but CuPy finds no usable CUDA device or driver; "
             "`python -m tinytoken doctor` says how to fix it"),
}


@pytest.mark.parametrize("arguments, text", BAD.values(), ids=BAD)
def test_compare_refuses(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "CuPy finds no usable CUDA device or driver"))
    device = [] if "--device" in arguments else ["--device", "cpu"]
    line = refused(capsys, "compare", *device, *arguments)
    assert line == text if text else line.startswith("find_data: no ")
    assert everything(tmp_path) == []


@pytest.mark.parametrize("size, label, text", [
    (100, 0, "{}/data_batch_1.bin: 100 bytes, expected 24,584: truncated, or not a CIFAR file"),
    (24584, 77, "{}: data_batch_1.bin: record 0 has label 77, expected 0 to 9"),
])
def test_compare_refuses_a_damaged_cifar(size, label, text, capsys, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    folder, _, _ = small_cifar(tmp_path / "data", monkeypatch)
    file = folder / "data_batch_1.bin"
    file.write_bytes(bytes([label]) + file.read_bytes()[1:size])
    before = everything(tmp_path)
    assert refused(capsys, "compare", "--device", "cpu", "--data", folder, "--out", "out") == text.format(folder)
    assert everything(tmp_path) == before


def test_compare_refuses_a_small_file_of_the_official_layout(capsys, tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(b"\0" * 3073)
    line = refused(capsys, "compare", "--device", "cpu", "--data", tmp_path)
    assert line == f"{tmp_path}/data_batch_1.bin: 3,073 bytes, expected 30,730,000: truncated, or not a CIFAR file"
    assert everything(tmp_path) == ["data_batch_1.bin"]


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/tinytoken"])
def test_compare_refuses_a_folder_that_cannot_be_written(out, capsys, tmp_path):
    """Permissions are not asked: root, who may run the tests, has all of them."""
    (tmp_path / "file").write_text("no folder")
    line = refused(capsys, "compare", "--device", "cpu", "--out", out)
    assert re.fullmatch(r"cannot write \S*(file|proc)/\S+: (File exists|Not a directory|No such file or directory)", line)
    assert everything(tmp_path) == ["file"]


def test_compare_refuses_a_checkpoint_of_another_run(capsys, tmp_path):
    command = ["compare", "--device", "cpu", "--out", "out", "--steps"]
    assert main([*command, "4"]) == 0
    capsys.readouterr()
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    belongs = "fit: out/vit-start.npz belongs to another run ({}): choose another --out, or delete it"
    assert refused(capsys, *command, "9") == belongs.format("steps 3 there, 7 now")
    line = refused(capsys, *command, "4", "--seed", "1")  # other pictures, too
    assert re.fullmatch(re.escape(belongs).replace(r"\{\}", r"seed 0 there, 1 now, mean \[.*\] there, \[.*\] now, std .*"), line)
    for of_no_run in ({}, {"recipe": None}):
        saved(tmp_path / "out" / "vit-start.npz", **of_no_run)
        assert refused(capsys, *command, "4").startswith(belongs.partition("{")[0] + "steps None there, 3 now, lr None there")
    (tmp_path / "out" / "vit-start.npz").write_bytes(files[tmp_path / "out" / "vit-start.npz"])
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_compare_refuses_a_truncated_checkpoint(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vit-start.npz").write_bytes(b"PK\3\4 and no more")
    assert refused(capsys, "compare", "--device", "cpu", "--out", "out") == (
        "checkpoint: out/vit-start.npz is not a whole .npz file: truncated, or not a checkpoint")


def test_argparse_ends_with_2_as_well(capsys):
    for argv in ([], ["train"], ["compare", "--steps", "many"], ["compare", "--device", "tpu"], ["predict", "one.npz"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err


# predict

@pytest.mark.parametrize("kind", KINDS)
def test_predict_prints_all_classes_and_writes_the_picture(kind, capsys, tmp_path):
    model = saved("model.npz", kind)
    pixels = picture("cat.png", (32, 32))
    assert main(["predict", "model.npz", "cat.png"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\w+) +(\d+\.\d) %", line).groups() for line in lines]
    shares = [float(share) for _, share in found]
    assert sorted(name for name, _ in found) == sorted(scenes.NAMES) and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    logits = model.eval()(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)[None]).data[0].astype("float64")
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert dict(found) == {name: f"{100 * share:.1f}" for name, share in zip(scenes.NAMES, expected)}
    if kind == "ViT":
        assert last == "a ViT keeps every token: no picture written" and everything(tmp_path) == ["cat.png", "model.npz"]
    else:
        assert last == "picture: cat.tokens.png"
        with Image.open("cat.tokens.png") as written:
            columns = 2 if kind == "DynamicViT" else 3
            assert written.format == "PNG" and written.size == (round(1.9 * 110 * columns), round(2.15 * 110))


def test_predict_takes_the_central_square_of_any_picture(tmp_path):
    pixels = picture("wide.png", (64, 32))
    assert np.array_equal(predict.read_picture("wide.png", 32), pixels[:, 16:48].transpose(2, 0, 1)[None])
    Image.new("RGBA", (10, 50), (255, 0, 0, 128)).save("tall.png")
    image = predict.read_picture("tall.png", 32)
    assert image.shape == (1, 3, 32, 32) and image.dtype == "uint8" and (image[0, 0] == 255).all()


def test_predict_writes_where_it_is_told(capsys, tmp_path):
    saved("model.npz", "LookupViT")
    picture("cat.png")
    assert main("predict model.npz cat.png --out there/it.png".split()) == 0
    assert capsys.readouterr().out.endswith("picture: there/it.png\n") and (tmp_path / "there" / "it.png").stat().st_size > 1000


def test_predict_without_matplotlib_or_pillow(capsys, tmp_path, monkeypatch):
    saved("model.npz", "DynamicViT")
    picture("cat.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["predict", "model.npz", "cat.png"]) == 0
    out, _ = capsys.readouterr()
    assert out.endswith(" %\nno picture written: matplotlib is not installed (pip install 'tinytoken-vit[plot]')\n")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refused(capsys, "predict", "model.npz", "cat.png") == (
        "predict reads pictures with pillow, which is not installed: pip install 'tinytoken-vit[plot]'")
    assert everything(tmp_path) == ["cat.png", "model.npz"]


def bomb(path):
    """A PNG that claims to be 100,000 x 100,000 pixels."""
    picture("small.png")
    data = bytearray(pathlib.Path("small.png").read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def half(path):
    picture(path)
    path.write_bytes(path.read_bytes()[:1500])


PICTURES = {
    "missing": (lambda path: None, ".*No such file or directory.*"),
    "text": (lambda path: path.write_text("a text"), "cannot identify image file .*"),
    "folder": (lambda path: path.mkdir(), ".*Is a directory.*"),
    "half": (half, ".*"),
    "huge": (bomb, "Image size .* exceeds limit.*"),
}


@pytest.mark.parametrize("make, reason", PICTURES.values(), ids=PICTURES)
def test_predict_refuses_what_is_no_picture(make, reason, capsys, tmp_path):
    saved("model.npz", "DynamicViT")
    make(tmp_path / "x.png")
    before = everything(tmp_path)
    line = refused(capsys, "predict", "model.npz", tmp_path / "x.png")
    assert re.fullmatch(rf"predict: {tmp_path}/x.png is not a picture that pillow can read \({reason}\)", line)
    assert everything(tmp_path) == before


def test_predict_refuses_a_picture_without_a_name(capsys):
    saved("model.npz")
    assert "is not a picture that pillow can read" in refused(capsys, "predict", "model.npz", ".")


def test_predict_refuses_checkpoints(capsys, tmp_path):
    picture("cat.png")
    np.savez("arrays.npz", a=np.ones(3))
    checkpoint.save("bare.npz", RECIPE.model(models.ViT))
    for path, text in (("none.npz", "checkpoint: none.npz does not exist"),
                       ("cat.png", "checkpoint: cat.png is not a whole .npz file: truncated, or not a checkpoint"),
                       ("arrays.npz", "checkpoint: arrays.npz is not a 'tinytoken checkpoint 1' (its header says None)"),
                       ("bare.npz", "predict: bare.npz does not say its classes and pixel statistics: train it with `compare`")):
        assert refused(capsys, "predict", path, "cat.png") == text
    assert everything(tmp_path) == ["arrays.npz", "bare.npz", "cat.png"]


def test_predict_refuses_a_place_that_cannot_be_written(capsys, tmp_path):
    saved("model.npz", "DynamicViT")
    picture("cat.png")
    assert re.fullmatch("cannot write cat.png/tokens.png: (File exists|Not a directory)",
                        refused(capsys, "predict", "model.npz", "cat.png", "--out", "cat.png/tokens.png"))
    assert everything(tmp_path) == ["cat.png", "model.npz"]


# doctor

NO_DRIVER = ("No nvidia-smi here, so probably no NVIDIA driver; with one: "
             "pip install 'tinytoken-vit[cuda13]' (driver 580 or newer) or [cuda12]")


def test_doctor_prints_what_it_found(capsys, monkeypatch):
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "CuPy cannot be imported (No module named 'cupy')"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda name: {"matplotlib": "9.8", "pillow": "7.6"}.get(name))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["doctor"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ["Python", "NumPy", "BLAS", "settings", "CPUs", "allocator", "GPU", "pictures"]
    assert rows["Python"].startswith(sys.version.split()[0])
    assert rows["NumPy"] == np.__version__ and rows["BLAS"] == backend.blas_description()
    assert "OMP_NUM_THREADS=3" in rows["settings"] and rows["CPUs"] == f"{backend.cpu_count()} may be used"
    assert rows["allocator"] == f"for training and inference: {backend.prepare_cpu()}"
    assert rows["pictures"] == "matplotlib 9.8 and pillow 7.6"
    assert rows["GPU"] == f"none in use: CuPy cannot be imported (No module named 'cupy'). {NO_DRIVER}"


def test_doctor_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "9.8" if name == "matplotlib" else None)
    for name in backend.blas_environment():
        monkeypatch.delenv(name)
    assert "matplotlib 9.8 and pillow missing: pip install 'tinytoken-vit[plot]'" in doctor.report()
    assert "no OPENBLAS_, OMP_, MKL_ or MALLOC_ variable is set" in doctor.report()


@pytest.mark.parametrize("said, advice", [
    ("580.65.06\n", "Driver 580.65.06: pip install 'tinytoken-vit[cuda13]'"),
    ("610.10\n610.10\n", "Driver 610.10: pip install 'tinytoken-vit[cuda13]'"),
    ("579.99\n", "Driver 579.99: pip install 'tinytoken-vit[cuda12]'"),
    ("", "nvidia-smi is here but names no driver version: is the driver loaded?"),
    ("NVIDIA-SMI has failed\n", "nvidia-smi is here but names no driver version: is the driver loaded?"),
    (subprocess.TimeoutExpired("nvidia-smi", 20),
     "nvidia-smi is here but cannot be run (Command 'nvidia-smi' timed out after 20 seconds)"),
    (PermissionError(13, "Permission denied"), "nvidia-smi is here but cannot be run ([Errno 13] Permission denied)"),
])
def test_doctor_gives_the_pip_line_for_the_driver(said, advice, monkeypatch):
    def run(command, **_):
        assert command == ["/bin/nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if isinstance(said, Exception):
            raise said
        return types.SimpleNamespace(stdout=said)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor.advice() == advice


def test_doctor_on_a_machine_with_a_gpu(monkeypatch):
    runtime = types.SimpleNamespace(getDeviceProperties=lambda number: {"name": b"H100"})
    cupy = types.SimpleNamespace(__version__="14.2", cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(backend, "cuda_ready", lambda: (True, ""))
    monkeypatch.setattr(backend, "module_for", lambda device: cupy)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.gpu() == "H100, CuPy 14.2"


@pytest.mark.parametrize("wheels, driver, advice", [
    (["cupy-cuda12x", "cupy-cuda13x"], "580.65", "pip uninstall cupy-cuda12x cupy-cuda13x, then install one. Driver 580.65: "
     "pip install 'tinytoken-vit[cuda13]'"),
    (["cupy-cuda13x"], "535.1", "Driver 535.1: pip uninstall cupy-cuda13x, then pip install 'tinytoken-vit[cuda12]'"),
    (["cupy-cuda13x"], "580.65", "Driver 580.65: pip install 'tinytoken-vit[cuda13]'")])
def test_doctor_says_which_wheel_has_to_go(wheels, driver, advice, monkeypatch):
    monkeypatch.setattr(backend, "cupy_wheels", lambda: wheels)
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "reason"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=driver + "\n"))
    assert doctor.gpu() == f"none in use: reason. {advice}"


BROKEN_CUPY = r"""
try:
    raise OSError("libcuda.so.1: cannot open\nshared object file")
except OSError as error:
    raise ImportError("\n=====\nFailed to import CuPy.\n") from error
"""


def test_a_broken_cupy_is_one_line(tmp_path, monkeypatch, capsys):
    """CuPy without a driver's libraries raises a page of text."""
    (tmp_path / "cupy.py").write_text(BROKEN_CUPY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(backend, "cuda_ready", backend.cuda_ready.__wrapped__)  # without its memory
    assert refused(capsys, "compare", "--device", "cuda") == (
        "device: cuda asked for, but CuPy cannot be imported (libcuda.so.1: cannot open shared object file); "
        "`python -m tinytoken doctor` says how to fix it")
    assert len(doctor.report().splitlines()) == 8


def test_doctor_reads_versions():
    assert doctor._version("numpy") == importlib.metadata.version("numpy") and doctor._version("no-such-package") is None


# main itself

def test_every_error_is_one_line(monkeypatch, capsys):
    for error, line in ((tt.InputError("matmul: sizes differ.\n  likely: swap   (lesson 3)"),
                         "matmul: sizes differ. likely: swap (lesson 3)"),
                        (PermissionError(13, "Permission denied", "a/file"), "[Errno 13] Permission denied: 'a/file'"),
                        (OSError("something"), "something"),
                        (MemoryError("allocating 10 bytes\nof 5"), "out of memory: allocating 10 bytes of 5")):
        def run(args, error=error):
            raise error
        monkeypatch.setattr(__main__, "run_doctor", run)
        assert refused(capsys, "doctor") == line


@pytest.mark.parametrize("text, line", [("", "by Ctrl-C"), ("vit stopped after step 3 of 9", "vit stopped after step 3 of 9")])
def test_ctrl_c_is_130(text, line, monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt(*([text] if text else []))
    monkeypatch.setattr(__main__, "run_compare", run)
    assert main(["compare"]) == 130
    assert capsys.readouterr().err == f"stopped: {line}. The same command goes on from the last checkpoint.\n"


# In a process of its own

def test_python_m_tinytoken(tmp_path):
    process = python("-m", "tinytoken", "predict", "none.npz", "none.png")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", "error: checkpoint: none.npz does not exist\n")


def test_ctrl_c_on_the_command_line_and_the_same_command_again(tmp_path):
    argv = ["compare", "--steps", "40", "--device", "cpu", "--threads", "2", "--out", "out"]
    process = python("-c", "import tiny, time, sys; from tinytoken import train\n"
                     "train.Classify.noise = lambda *_: (time.sleep(0.05), ())[1]\n"
                     "sys.exit(tiny.command(sys.argv[1:]))", *argv)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "history.jsonl").exists() and time.monotonic() < deadline:  # from step 20 of 30 on
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "", err
    stopped = r"stopped: (\S+) stopped after step (\d+) of \d+\. The same command goes on from the last checkpoint\."
    phase, step = re.fullmatch(stopped, err.splitlines()[-1]).groups()
    files = set(everything(tmp_path / "out"))
    assert {f"{phase}.npz", "history.jsonl"} <= files and "table.json" not in files
    model, header = checkpoint.load_model(f"out/{phase}.npz")
    assert header["step"] == int(step) and np.isfinite(model.eval()(np.zeros((1, 3, 32, 32), "float32")).data).all()

    process = python("-c", "import tiny, sys; sys.exit(tiny.command(sys.argv[1:]))", *argv)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.endswith("everything is in out\n"), err
    assert "Traceback" not in err
    recipe = SmallRecipe(steps=40)
    data = make_scenes(recipe.train_pictures, seed=0)
    batches = Batches(data.images, data.labels, recipe.batch)
    whole, _ = compare.train_all(recipe, batches, data.names, train.Run("whole"), "cpu", 2, bar=False)
    for name, phase in (("ViT", "vit"), ("DynamicViT", "dynamicvit"), ("LookupViT", "lookupvit")):
        assert bits(checkpoint.load_model(f"out/{phase}.npz")[0]) == bits(whole[name])
