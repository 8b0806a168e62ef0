"""The profile counts what runs and changes nothing; the command prints it."""
import itertools
import types

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tinytoken import bench, models, ops, tasks, tensor
from tinytoken.__main__ import main
from tinytoken.experiments import timing

SIZES = dict(image_size=8, dim=12, depth=6, heads=2)


def test_every_op_is_clocked_and_counted():
    job = bench.Job("vit", batch=6, micro=4, **SIZES)
    functions = {op: op.function for op in tensor.registry.values()}
    with bench.timed_ops() as rows:
        job.gradients(threads=1)
    assert {op: op.function for op in tensor.registry.values()} == functions
    assert rows["attention"].calls == 6 * 2 and rows["patchify"].calls == 2  # depth x two micro-batches
    assert sum(row.macs for row in rows.values()) == 3 * 6 * tt.macs(job.model, job.images).total
    assert all(row.forward > 0 for row in rows.values())
    # pictures need no gradient
    assert {name for name, row in rows.items() if row.backward == 0} == {"patchify"}


def test_what_has_no_gradient_counts_once():
    job = bench.Job("dynamicvit", batch=4, micro=4, **SIZES)
    with bench.timed_ops() as rows:
        job.gradients(threads=1)
    teacher = tt.macs(job.task.teacher, job.images).total
    # In training nothing is removed: the student costs a ViT and its predictors, forward and twice that
    # backward.
    predictors = 3 * (1.625 * 4 * 12 ** 2 + 4 * 12 / 2)
    assert sum(row.macs for row in rows.values()) == 4 * (teacher + 3 * (teacher + predictors))


def test_the_clock_changes_no_gradient():
    job = bench.Job("lookupvit", batch=4, micro=2, compressed=(2, 2), **SIZES)
    loss, _ = job.gradients(threads=1)
    plain = job.optimizer.flat.grad.copy()
    with bench.timed_ops():
        assert job.gradients(threads=1)[0] == loss
    assert np.array_equal(job.optimizer.flat.grad, plain)


def test_ops_are_themselves_again_after_an_error():
    function = ops.linear.function
    text = "linear: x (2, 3), weight (5, 4): the last size of x must be the weight's second, (out, in)"
    with refuses(text), bench.timed_ops():
        ops.linear(np.ones((2, 3)), np.ones((5, 4)))
    assert ops.linear.function is function


def test_a_profile_adds_up(monkeypatch):
    """With a clock that ticks once per reading, every clocked call takes one second."""
    ticks = itertools.count()
    for module in (bench, timing):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = bench.profile(bench.Job("vit", batch=4, micro=4, **SIZES), rounds=3)
    assert (found["gradients"], found["adamw"], found["peak"]) == (1, 1, 1024 ** 3)
    assert all(row.forward == row.calls for row in found["ops"].values())
    # A layer norm's vjp, then its three gradients; a linear layer's too, but the first has no use for its
    # input's.
    assert found["ops"]["layer_norm"].backward == 4 * 13 and found["ops"]["linear"].backward == 4 * 26 - 1


def test_profile_text():
    rows = {"gelu": bench.OpTime(2, 0, 0.001, 0.002), "linear": bench.OpTime(4, 3_000_000, 0.01, 0.02)}
    text = bench.profile_text({"ops": rows, "gradients": 0.036, "adamw": 0.004, "peak": 1e9})
    assert text.splitlines() == [
        "op                calls  forward ms  backward ms   share    M MACs  of BLAS peak",
        "linear                4        10.0         20.0  75.0 %         3          10 %",
        "gelu                  2         1.0          2.0   7.5 %         0              ",
        "AdamW                                        4.0  10.0 %",
        "the graph and the rest                       3.0   7.5 %",
        "40 ms on one thread; BLAS peak 2 GFLOP/s (2 per multiply-add)"]


def test_a_job_is_a_step_of_the_models_own_task():
    for name in models.names():
        job = bench.Job(name, batch=2, **SIZES | dict(patch_size=2))
        kind = tasks.task.pick(job.model.task)
        assert type(job.model) is models.model[name] and type(job.task) is kind
        assert job.task.model is job.model
        assert job.draws.keys() == job.task.noise(2, 0, 0).keys()
        assert [len(array) for array in job.batch] == [2, 2]
        assert not kind.taught or type(job.task.teacher) is models.ViT


@pytest.mark.parametrize("model", models.names())
def test_the_command(model, capsys):
    sizes = "--image-size 8 --patch-size 2 --dim 16 --heads 2 --batch 4 --micro 2 --model".split() + [model]
    assert main(["bench", *sizes, "--threads", "1"]) == 0
    step, infer, conditions = capsys.readouterr().out.splitlines()
    assert step.startswith("step ") and infer.startswith("infer ") and infer.endswith(" images/s")
    assert conditions.startswith("float32, batch 4, 1 threads, ")
    assert main(["bench", *sizes, "--profile"]) == 0
    rows = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"linear", "AdamW"} <= rows and {"attention", "window_attention", "conv2d"} & rows


@pytest.mark.parametrize("argument, text", [(["--batch", "0"], "bench: batch 0, expected at least 1"),
                                            (["--heads", "5"], "Attention: heads 5 do not divide dim 96"),
                                            (["--micro", "0"],
                                             "loss_and_grads: micro 0, threads 2: at least 1 each expected")])
def test_refused(argument, text, capsys):
    assert main(["bench", "--threads", "2", *argument]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"
