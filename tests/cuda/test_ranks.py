"""A group of processes on GPUs: their sums go through NCCL, also inside of a captured step. On the stand-in
this is one process that takes itself for rank 0 of 2, whose other rank has the same; a real device has NCCL
with one process, and with two where there are two devices."""
import numpy as np
import pytest

import ranked
import standin
import tinytoken as tt
from ranked import arrays, without_biases_of_keys
from test_standin import TASKS, batches
from tinytoken import InputError, group
from tinytoken.backend import implementations, module_for, to_numpy
from tinytoken.cuda import nccl
from tinytoken.cuda.capture import Captured
from tinytoken.train import fit
from tinytoken.train.step import stepper


class Mirror:
    """A communicator of mpi4py's whose other ranks always say what this one says."""

    def allgather(self, value):
        return [value] * group.current().size

    def Bcast(self, array):
        pass

    def Ibarrier(self):
        return self

    def Test(self):
        return True

    def Iallreduce(self, mine, total):
        np.copyto(total, 2 * mine)
        return self


def ranks(size, monkeypatch):
    """This process takes itself for rank 0 of so many."""
    made = group.Ranks.__new__(group.Ranks)
    made.comm, made.rank, made.size, made.local_rank = Mirror(), 0, size, 0
    monkeypatch.setattr(group._state, "group", made)
    return made


def trained(name, given, steps=4):
    tt.manual_seed(0)
    task = TASKS[name]("cuda")
    found = fit(task.model, task, given, steps=steps, log_every=2, bar=False)
    return {n: to_numpy(p.data) for n, p in task.model.named_parameters()}, found["loss"]


@pytest.fixture
def mirrored(there, monkeypatch):
    """Rank 0 of 2, on the stand-in."""
    if not standin.in_place_of_cupy():
        pytest.skip("the other rank is the stand-in's")
    standin.sums.clear()
    return ranks(2, monkeypatch)


@pytest.mark.parametrize("name", ["dynamicvit", pytest.param("vit", marks=pytest.mark.slow)])
def test_sums_are_captured_with_the_step(name, mirrored, monkeypatch):
    """Replays launch no sum by themselves, and end where ordinary steps end."""
    weights, loss = trained(name, batches("cuda"))
    called = list(standin.sums)
    monkeypatch.delitem(implementations, (stepper, "cupy"))
    expected, told = trained(name, batches("cuda"))
    values = sum(-(-p.size // 64) * 64 for p in TASKS[name]("cpu").model.parameters())
    assert len(called) == 2 * 3 and set(called[::2]) == {values}  # two ordinary steps, and the captured one
    assert len(standin.sums) - len(called) == 2 * 4
    assert loss == told and all(np.array_equal(weights[n], expected[n]) for n in expected)


def test_two_ranks_with_the_same_rows_are_one_process_with_these_rows(mirrored, monkeypatch):
    given = batches("cuda")

    class Twice(type(given)):
        def chosen(self, step):
            return module_for("cuda").concatenate([super().chosen(step)[:4]] * 2)
    given.__class__, given.ways, given.erase, given.pad, given.flip = Twice, {}, 0, 0, False
    monkeypatch.setitem(TASKS, "plain", lambda device: tt.train.Classify(TASKS["vit"](device).model))
    weights, loss = trained("plain", given)
    monkeypatch.setattr(group._state, "group", group.Group())
    expected, told = trained("plain", given)
    assert loss == pytest.approx(told, rel=1e-5)
    expected = without_biases_of_keys(expected)
    for name, array in without_biases_of_keys(weights).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_where_a_rank_has_no_nccl_sums_go_through_the_host(mirrored, monkeypatch, capsys):
    monkeypatch.setattr(nccl, "_library", lambda: (None, "no NCCL here"))
    x = module_for("cuda").asarray(np.arange(3, dtype="float32"))
    for _ in range(2):
        group.current().all_reduce(x)
    assert to_numpy(x).tolist() == [0, 4, 8] and standin.sums == []
    assert capsys.readouterr().err == "gradients go through the host (rank 0: no NCCL here)\n"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_inside_a_captured_call(dtype, there, monkeypatch):
    alone, xp = ranks(1, monkeypatch), module_for("cuda")

    def tripled(inputs):
        y = inputs[0] * 3
        alone.all_reduce(y)
        return y
    captured = Captured(tripled)
    for i in range(4):
        x = np.arange(5, dtype=dtype) + i
        np.testing.assert_array_equal(to_numpy(captured([xp.asarray(x)])), 3 * x)
    assert captured.graph is not None and nccl.communicator(alone) is not None


def test_each_rank_of_a_machine_has_a_device_of_its_own(mirrored, monkeypatch):
    cuda, used = module_for("cuda").cuda, []
    monkeypatch.setattr(cuda, "runtime", type("Runtime", (), {"getDeviceCount": lambda: 1}), raising=False)
    monkeypatch.setattr(cuda, "Device", lambda number: type("Device", (), {"use": lambda self: used.append(number)})())
    nccl.one_device_each()
    assert used == [0]
    mirrored.local_rank = 1
    with pytest.raises(InputError, match="^device: rank 0 is number 2 on this machine, which has 1: expected at "
                                         "most one process a device, or --device cpu$"):
        nccl.one_device_each()


@pytest.mark.gpu
@pytest.mark.skipif(bool(ranked.missing()), reason=ranked.missing() or "MPI is here")
@pytest.mark.parametrize("kind", ["vit", "lookupvit"])
def test_two_devices_come_to_the_weights_of_one(kind, tmp_path):
    if standin.in_place_of_cupy() or module_for("cuda").cuda.runtime.getDeviceCount() < 2:
        pytest.skip("fewer than two devices")
    for count, name in ((0, "alone"), (2, "ranks"), (2, "again")):
        code, _, err = ranked.ranks(count, "on_gpu", tmp_path, kind, name)
        assert code == 0, err
    alone, first = (without_biases_of_keys(arrays(tmp_path, f"{name}-0")) for name in ("alone", "ranks"))
    for name, array in first.items():
        np.testing.assert_allclose(array, alone[name], rtol=0, atol=1e-4, err_msg=name)
    whole = arrays(tmp_path, "ranks-0")
    for name in ("ranks-1", "again-0"):
        assert all(array.tobytes() == whole[n].tobytes() for n, array in arrays(tmp_path, name).items())
