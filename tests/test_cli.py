"""The command line, in this process and in others: what it prints, how it ends, and what it refuses in one
line."""
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tinytoken as tt
from tiny import ROOT, SmallRecipe, bits, everything, python, refused, saved, small_cifar
from tinytoken import __main__, backend, doctor, experiments
from tinytoken.__main__ import main
from tinytoken.course import grade
from tinytoken.data import dataset
from tinytoken.errors import this_python
from tinytoken.experiments import Trial, compare, tables
from tinytoken.train import checkpoint


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Everything happens in an empty folder, at the small recipe's size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYTOKEN_DATA", raising=False)
    monkeypatch.setattr(experiments, "Recipe", SmallRecipe)
    monkeypatch.setattr(compare, "draw", lambda *_: "no picture")


# compare

def test_compare_prints_the_table_and_where_everything_is(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "CuPy cannot be imported"))
    monkeypatch.setattr(backend, "gpu_present", lambda: False)
    assert main(["compare", "--steps", "4", "--seed", "7", "--threads", "1"]) == 0
    out, _ = capsys.readouterr()
    lines = ["", *out.splitlines()]  # no word about a GPU where none is
    rows = ["| model", "|---|---|---|---|---|---|---|", "| ViT", "| DynamicViT", "| LookupViT"]
    assert [line.split(" |")[0] for line in lines[2:7]] == rows
    assert lines[-2:] == ["no picture", "everything is in runs/compare-scenes-7"]
    written = everything(tmp_path / "runs" / "compare-scenes-7")
    assert {"table.json", "history.jsonl", "vit.npz"} <= set(written)


def test_compare_takes_its_options(monkeypatch, capsys):
    seen = {}

    def run(recipe, out, **settings):
        seen.update(recipe=recipe, out=str(out), **settings)
        return {}, "a line"
    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(tables, "table_text", lambda table: "the table")
    options = "--data some/folder --steps 9 --seed 2 --device cpu --threads 3 --out there"
    assert main(["compare", *options.split()]) == 0
    assert seen == {"recipe": SmallRecipe(data="some/folder", steps=9, seed=2), "out": "there",
                    "device": "cpu", "threads": 3}
    assert capsys.readouterr().out == "\nthe table\na line\neverything is in there\n"
    assert main(["compare", "--device", "cpu", "--data", "some/folder"]) == 0
    assert seen["out"] == "runs/compare-folder-0" and seen["threads"] is None
    assert seen["recipe"] == SmallRecipe(data="some/folder")


BAD = {
    "steps": (["--steps", "0"], "compare: 0 steps, expected at least 4"),
    "too many steps": (["--steps", "1" + 20 * "0"],
                       "compare: 100,000,000,000,000,000,000 steps, expected at most 10,000,000"),
    "negative steps": (["--steps", "-3"], "compare: -3 steps, expected at least 4"),
    "seed": (["--seed", "-1"], "random: seed -1, expected 0 <= int < 2**64"),
    "large seed": (["--seed", str(2 ** 64)], f"random: seed {2 ** 64}, expected 0 <= int < 2**64"),
    "threads": (["--threads", "0"], "compare: 0 threads, expected at least 1"),
    "data": (["--data", "nowhere"],
             f"data: nowhere does not exist; expected {dataset.choices()}"),
    "empty folder": (["--data", "."],
                     f"data: . holds no data set that is known here; expected {dataset.choices()}"),
    "no data": (["--data", ""],
                f"data: no name; expected {dataset.choices()}"),
    "no cifar10": (["--data", "cifar10"], "find_data: no CIFAR-10 in data; download it (about 170 MB) with "
                   "PYTHON -c \"from tinytoken.data import download_cifar; "
                   "download_cifar('data', 'cifar10')\" or name a folder that has cifar-10-batches-bin/ or "
                   "cifar-10-binary.tar.gz: --data DIR or TINYTOKEN_DATA=DIR"),
    "cuda": (["--device", "cuda"], "device: cuda asked for, but CuPy finds no usable CUDA device or driver; "
             "`PYTHON -m tinytoken doctor` says how to fix it"),
}


@pytest.mark.parametrize("arguments, text", BAD.values(), ids=BAD)
def test_compare_refuses(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "CuPy finds no usable CUDA device or driver"))
    device = [] if "--device" in arguments else ["--device", "cpu"]
    line = refused(capsys, "compare", *device, *arguments)
    assert line == text.replace("PYTHON", this_python())
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
    line = refused(capsys, "compare", "--device", "cpu", "--data", folder, "--out", "out")
    assert line == text.format(folder)
    assert everything(tmp_path) == before


def test_compare_refuses_a_small_file_of_the_official_layout(capsys, tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(b"\0" * 3073)
    line = refused(capsys, "compare", "--device", "cpu", "--data", tmp_path)
    text = "3,073 bytes, expected 30,730,000: truncated, or not a CIFAR file"
    assert line == f"{tmp_path}/data_batch_1.bin: {text}"
    assert everything(tmp_path) == ["data_batch_1.bin"]


@pytest.mark.parametrize("out, reason", [
    ("file", "cannot write file: .*/?file is a file, expected a folder"),
    ("file/out", "cannot write file/out: .*/file is a file, expected a folder"),
    ("/dev/null", "cannot write /dev/null: /dev/null is a device, expected a folder"),
    ("/proc/tinytoken", r"cannot write /proc/\S+: No such file or directory")])
def test_compare_refuses_a_folder_that_cannot_be_written(out, reason, capsys, tmp_path):
    """Permissions are not asked: root, who may run the tests, has all of them."""
    (tmp_path / "file").write_text("no folder")
    line = refused(capsys, "compare", "--device", "cpu", "--out", out)
    assert re.fullmatch(reason, line)
    assert everything(tmp_path) == ["file"]


def test_compare_refuses_a_checkpoint_of_another_run(capsys, tmp_path):
    command = ["compare", "--device", "cpu", "--out", "out", "--steps"]
    assert main([*command, "4"]) == 0
    capsys.readouterr()
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    belongs = "fit: out/vit-start.npz belongs to another run ({}): choose another --out, or delete it"
    assert refused(capsys, *command, "9") == belongs.format("steps 3 there, 7 now")
    line = refused(capsys, *command, "4", "--seed", "1")  # other pictures, too
    differences = r"seed 0 there, 1 now, mean \[.*\] there, \[.*\] now, std .*"
    assert re.fullmatch(re.escape(belongs).replace(r"\{\}", differences), line)
    for of_no_run in ({}, {"recipe": None}):
        saved(tmp_path / "out" / "vit-start.npz", **of_no_run)
        line = belongs.partition("{")[0] + "steps None there, 3 now, lr None there"
        assert refused(capsys, *command, "4").startswith(line)
    (tmp_path / "out" / "vit-start.npz").write_bytes(files[tmp_path / "out" / "vit-start.npz"])
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_compare_refuses_a_truncated_checkpoint(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vit-start.npz").write_bytes(b"PK\3\4 and no more")
    assert refused(capsys, "compare", "--device", "cpu", "--out", "out") == (
        "checkpoint: out/vit-start.npz is not a whole .npz file: truncated, or not a checkpoint")


def test_argparse_ends_with_2_as_well(capsys):
    for argv in ([], ["train"], ["compare", "--steps", "many"], ["compare", "--device", "tpu"],
                 ["predict", "one.npz"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err


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
        f"`{this_python()} -m tinytoken doctor` says how to fix it")
    assert len(doctor.report().splitlines()) == 10


# Where results are written

@pytest.mark.parametrize("option, ending",
                         [("--csv", ".csv"), ("--json", ".json"), ("--gradescope", ".json")])
def test_a_file_for_points_is_checked_before_anything_is_graded(option, ending, monkeypatch, capsys):
    for name in ("grade_folder", "grade_submission"):
        monkeypatch.setattr(grade, name, lambda *_, **__: pytest.fail("graded"))
    pathlib.Path("model.npz").write_text("weights")
    pathlib.Path("folder" + ending).mkdir()
    what = "--submissions" if option == "--csv" else "--submission"
    for place, reason in (("model.npz", f"expected a name that ends in {ending}"),
                          ("folder" + ending, "it is a folder, expected the name of a file")):
        line = refused(capsys, "grade", "a1", what, ".", option, place)
        assert line == f"cannot write {place}: {reason}"
    assert pathlib.Path("model.npz").read_text() == "weights"


@pytest.mark.parametrize("options, line", [
    ("--submission . --csv p.csv", "--csv is for --submissions"),
    ("--submissions . --csv p.csv --json r.json", "--json is for one --submission"),
    ("--submissions . --csv p.csv --gradescope r.json", "--gradescope is for one --submission"),
    ("--submissions . --csv p.csv --leaderboard", "--leaderboard is for one --submission"),
    ("--submissions . --csv p.csv --hidden", "--hidden is for one --submission"),
    ("--submissions .", "--submissions without --csv: give the file for the points"),
    ("--submission . --leaderboard", "--leaderboard without --gradescope: give the file for the results"),
    ("--submission . --hidden", "--hidden without --gradescope: give the file for the results")])
def test_no_option_of_grade_is_dropped_in_silence(options, line, monkeypatch, capsys):
    for name in ("grade_folder", "grade_submission"):
        monkeypatch.setattr(grade, name, lambda *_, **__: pytest.fail("graded"))
    assert refused(capsys, "grade", "a1", *options.split()) == f"grade: {line}"


def test_the_autograders_zip_is_not_written_over_something_else(capsys):
    pathlib.Path("model.npz").write_text("weights")
    line = refused(capsys, "autograder-zip", "a1", "--out", "model.npz")
    assert line == "cannot write model.npz: expected a name that ends in .zip"
    pathlib.Path("a1.zip").mkdir()
    line = refused(capsys, "autograder-zip", "a1", "--out", "a1.zip")
    assert line == "cannot write a1.zip: it is a folder, expected the name of a file"


@pytest.mark.parametrize("name", ["table.json", "tokens.png"])
def test_compare_sees_before_it_trains_what_it_cannot_write(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / name).mkdir(parents=True)
    monkeypatch.setattr(compare, "Trial", lambda *_, **__: pytest.fail("trained"))
    line = refused(capsys, "compare", "--device", "cpu", "--out", "out")
    assert line == f"cannot write out/{name}: it is a folder, expected the name of a file"


# main itself

def test_every_error_is_one_line(monkeypatch, capsys):
    for error, line in ((tt.InputError("matmul: sizes differ.\n  likely: swap   (lesson 3)"),
                         "matmul: sizes differ. likely: swap (lesson 3)"),
                        (PermissionError(13, "Permission denied", "a/file"),
                         "[Errno 13] Permission denied: 'a/file'"),
                        (OSError("something"), "something"),
                        (MemoryError("allocating 10 bytes\nof 5"),
                         "out of memory: allocating 10 bytes of 5")):
        def run(args, error=error):
            raise error
        monkeypatch.setattr(__main__, "run_doctor", run)
        assert refused(capsys, "doctor") == line


@pytest.mark.parametrize("text, line", [("", "by Ctrl-C"),
                                        ("vit stopped after step 3 of 9", "vit stopped after step 3 of 9")])
@pytest.mark.parametrize("saved", (True, False))
def test_ctrl_c_promises_a_checkpoint_only_where_one_is(saved, text, line, monkeypatch, capsys, tmp_path):
    def run(recipe, out, **settings):
        if saved:
            out.mkdir()
            (out / "vit.npz").touch()
        raise KeyboardInterrupt(*([text] if text else []))
    monkeypatch.setattr(compare, "run", run)
    assert main(["compare", "--out", "out", "--device", "cpu"]) == 130
    promise = ("The same command goes on from the last checkpoint." if saved else
               "There is no checkpoint yet: the same command starts anew.")
    assert capsys.readouterr().err == f"stopped: {line}. {promise}\n"


def test_ctrl_c_in_a_command_that_keeps_nothing(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(__main__, "run_bench", run)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "stopped: by Ctrl-C\n"


@pytest.mark.parametrize("gpu", (True, False))
def test_a_gpu_that_cannot_be_used_is_said_where_one_is(gpu, monkeypatch, capsys):
    monkeypatch.setattr(backend, "cuda_ready", lambda: (False, "reason"))
    monkeypatch.setattr(backend, "gpu_present", lambda: gpu)
    assert backend.announced_device("auto") == backend.announced_device("cpu") == "cpu"
    said = f"running on the CPU: reason; `{this_python()} -m tinytoken doctor` says how to fix it\n"
    assert capsys.readouterr().out == (said if gpu else "")


def test_a_gpu_is_present_where_its_driver_is(monkeypatch):
    for tool, files in ((None, False), ("/bin/nvidia-smi", False), (None, True)):
        monkeypatch.setattr(backend.shutil, "which", lambda name: tool)
        monkeypatch.setattr(backend.os.path, "exists", lambda path: files)
        assert backend.gpu_present() == bool(tool or files)


@pytest.mark.parametrize("argv, text", [
    (["compare", "--out", ""], "argument --out: expected a path, given ''"),
    (["predict", "", "a.png"], "argument checkpoint: expected a path, given ''"),
    (["bench", "--image-size", str(2 ** 30)], "argument --image-size: 1073741824, expected at most 65,536"),
    (["bench", "--dim", "1.5"], "argument --dim: invalid size value: '1.5'")])
def test_paths_and_sizes_are_refused_by_their_option(argv, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"error: {text}\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"tinytoken {tt.__version__}\n"


# In a process of its own

def test_python_m_tinytoken(tmp_path):
    process = python("-m", "tinytoken", "predict", "none.npz", "none.png")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", "error: checkpoint: none.npz does not exist\n")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell's redirections")
@pytest.mark.parametrize("ending, status, said", [
    ("| head -c 1", 141, ""), ("| true", 141, ""), ("2>&1 | true", 141, ""),
    (">&-", 0, ""), (">&- 2>&-", 0, ""), ("2>&-", 0, None),
    pytest.param("> /dev/full", 2, "error: [Errno 28] No space left on device\n",
                 marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full"))])
def test_output_that_nobody_reads(ending, status, said, tmp_path):
    """head has seen enough, or the stream was never open: no traceback, no word, the usual status."""
    # 100 kB do not fit into a pipe: the writer waits for a reader, or learns that there is none. A short text
    # is still in Python's buffer when the command has ended.
    lines = 2 if "full" in ending else 50_000
    (tmp_path / "long.py").write_text("import sys; from tinytoken import __main__, doctor\n"
                                      f"doctor.report = lambda: 'x\\n' * {lines}\n"
                                      "sys.exit(__main__.main(['doctor']))\n")
    command = f"{shlex.quote(sys.executable)} long.py {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})
    assert done.returncode == status and done.stderr == (said or "")


def test_errors_with_both_streams_closed():
    command = f"{shlex.quote(sys.executable)} -m tinytoken predict none.npz none.png >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 2


def test_ctrl_c_on_the_command_line_and_the_same_command_again(tmp_path):
    argv = ["compare", "--steps", "40", "--device", "cpu", "--threads", "2", "--out", "out"]
    process = python("-c", "import tiny, time, sys; from tinytoken.tasks import Classify\n"
                     "Classify.noise = lambda *_: (time.sleep(0.05), {})[1]\n"
                     "sys.exit(tiny.command(sys.argv[1:]))", *argv)
    deadline = time.monotonic() + 60
    # from step 20 of 30 on
    while not (tmp_path / "out" / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "", err
    goes_on = r"The same command goes on from the last checkpoint\."
    stopped = rf"stopped: (\S+) stopped after step (\d+) of \d+\. {goes_on}"
    phase, step = re.fullmatch(stopped, err.splitlines()[-1]).groups()
    files = set(everything(tmp_path / "out"))
    assert {f"{phase}.npz", "history.jsonl"} <= files and "table.json" not in files
    model, header = checkpoint.load_model(f"out/{phase}.npz")
    assert header["step"] == int(step)
    assert np.isfinite(model.eval()(np.zeros((1, 3, 32, 32), "float32")).logits.data).all()

    process = python("-c", "import tiny, sys; sys.exit(tiny.command(sys.argv[1:]))", *argv)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.endswith("everything is in out\n"), err
    assert "Traceback" not in err
    recipe = SmallRecipe(steps=40)
    whole = Trial(recipe, compare.arms(recipe), threads=2, bar=False)
    for phase in ("vit", "dynamicvit", "lookupvit"):
        assert bits(checkpoint.load_model(f"out/{phase}.npz")[0]) == bits(whole.train(phase)[0])


WAITING = """
import sys, tiny
from tinytoken.experiments import trial
load = trial.load_pictures
def load_pictures(*args, **options):
    print("loading", flush=True)
    sys.stdin.read()
    return load(*args, **options)
trial.load_pictures = load_pictures
sys.exit(tiny.command(sys.argv[1:]))
"""


def test_a_second_compare_in_the_same_folder_ends_before_its_work(tmp_path):
    """It says who is at work there; that one goes on, to the bit."""
    argv = ["compare", "--steps", "40", "--device", "cpu", "--threads", "2", "--out", "out"]
    first = python("-c", WAITING, *argv, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "loading\n"
    before = everything(tmp_path)
    second = python("-c", "import tiny, sys; from tinytoken.experiments import trial\n"
                    "trial.load_pictures = None\nsys.exit(tiny.command(sys.argv[1:]))", *argv)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2 and out == "" and everything(tmp_path) == before
    assert re.fullmatch(rf"error: another process is at work on out/table.json: process {first.pid} on \S+, "
                        rf"since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", err.splitlines()[-1]), err
    out, err = first.communicate("go on", timeout=120)
    assert first.returncode == 0 and out.endswith("everything is in out\n"), err
    assert not [name for name in everything(tmp_path) if name.endswith((".lock", ".part"))]
    recipe = SmallRecipe(steps=40)
    whole = Trial(recipe, compare.arms(recipe), threads=2, bar=False)
    assert bits(checkpoint.load_model("out/vit.npz")[0]) == bits(whole.train("vit")[0])
