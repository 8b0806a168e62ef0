"""Several processes that train one model, started by mpiexec: the same weights as one process, one writer,
and every way in which a rank can end."""
import json
import os
import re
import signal
import time

import numpy as np
import pytest

import ranked
from ranked import arrays, without_biases_of_keys
from tinytoken import InputError, backend, group
from tinytoken.group import Group, Ranks
from tinytoken.train import checkpoint

needs_mpi = pytest.mark.skipif(bool(ranked.missing()), reason=ranked.missing() or "MPI is here")
passes_ctrl_c = pytest.mark.skipif(not ranked.MPICH, reason="not MPICH: Ctrl-C at its launcher kills ranks")
SAME = "expected the same on all ranks"
TOO_MANY = "fit: a batch of 4 images does not fit into memory, one of 2 does (no room)"


def lines(text):
    """What a user sees, without the line that says which processes there are, and without what Open MPI's
    launcher says between dashes."""
    text = re.sub(r"^(-{60,}\n).*?\n\1|^\0*\n", "", text.replace("\0", ""), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not re.match(r"\d+ processes: rank 0 is process", line)]


# The same weights

@needs_mpi
@pytest.mark.parametrize("kind, micro", [("vit", ""), ("dynamicvit", ""), ("lookupvit", ""), ("normed", "2")])
@pytest.mark.parametrize("count, dtype, tolerance", [
    (2, "float64", 1e-12), pytest.param(4, "float64", 1e-12, marks=pytest.mark.slow),
    *(pytest.param(count, "float32", 1e-5, marks=pytest.mark.slow) for count in (2, 4))])
def test_ranks_come_to_the_weights_of_one_process(kind, micro, count, dtype, tolerance, tmp_path):
    for ranks, name in ((0, "alone"), (count, "ranks"), (count, "again")):
        code, _, err = ranked.ranks(ranks, "weights", tmp_path, kind, dtype, name, micro)
        assert code == 0, err
    alone, first = arrays(tmp_path, "alone-0"), arrays(tmp_path, "ranks-0")
    expected = without_biases_of_keys(alone)
    for name, array in without_biases_of_keys(first).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance, err_msg=name)
    for name in ("again-0", *(f"ranks-{rank}" for rank in range(1, count))):
        other = arrays(tmp_path, name)
        assert all(other[name].tobytes() == array.tobytes() for name, array in first.items())


@needs_mpi
@pytest.mark.slow
def test_a_loss_of_the_whole_batch_is_computed_on_each_rank(tmp_path):
    for count in (0, 2):
        code, _, err = ranked.ranks(count, "weights", tmp_path, "pooled", "float64", f"of{count}")
        assert code == 0, err
    one, two = arrays(tmp_path, "of0-0"), arrays(tmp_path, "of2-0")
    assert all(np.array_equal(one[name], two[name]) for name in one)


@needs_mpi
def test_weights_that_differ_at_the_start_become_those_of_rank_0(tmp_path):
    code, out, err = ranked.ranks(2, "same_start", tmp_path)
    assert (code, out) == (0, "the same\n"), err


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("images, micro", [(8, 1), (7, 1), (3, 1), (10, 4), (8, 8)])
def test_each_image_is_one_ranks_and_slices_stay_whole(size, images, micro):
    seen, shares = [], []
    for rank in range(size):
        member = Group()
        member.rank, member.size = rank, size
        rows, share = member.rows(images, micro)
        seen += range(images)[rows]
        shares.append(share)
        assert rows.start % micro == 0
    assert sum(shares) == pytest.approx(1)
    assert seen == list(range(images)) * (1 if -(-images // micro) >= size else size)


@needs_mpi
@pytest.mark.parametrize("count, batch_size", [(7, ""), (1, ""), (7, "2")])
def test_ranks_share_out_inference(count, batch_size, tmp_path):
    answers = []
    for ranks in (0, 2):
        code, _, err = ranked.ranks(ranks, "inference", tmp_path, "vit", count, batch_size)
        assert code == 0, err
        answers += [np.load(tmp_path / f"answers-{rank}.npy") for rank in range(max(1, ranks))]
    assert answers[0].shape == (count, 3) and np.array_equal(answers[1], answers[2])
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=1e-13)
    assert not batch_size or np.array_equal(answers[1], answers[0])


# One writer

@needs_mpi
def test_rank_0_alone_prints_and_writes_and_cpus_are_shared(tmp_path):
    code, out, err = ranked.ranks(2, "says", tmp_path)
    assert code == 0 and lines(err) == []
    first, cpus = out.splitlines()
    here, mine = map(int, cpus.split())
    assert first == "rank 0 prints" and mine == max(1, here // 2)
    assert os.listdir(tmp_path) == ["by-rank-0.json"]


@needs_mpi
def test_a_process_that_a_rank_starts_is_alone(tmp_path):
    assert ranked.ranks(2, "children", tmp_path)[:2] == (0, "1\n")


def rows(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(4, 2), (2, 0), (0, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, tmp_path):
    code, _, err = ranked.ranks(before, "run", tmp_path, "0:9:interrupt")
    assert code == 130 and lines(err) == ["stopped: train stopped after step 10 of 20"]
    code, _, err = ranked.ranks(after, "run", tmp_path)
    assert code == 0, err
    assert [row["step"] for row in rows(tmp_path)] == [2, 5, 8, 11, 14, 17, 19]
    assert ranked.ranks(0, "run", tmp_path / "alone")[0] == 0
    mixed, alone = (checkpoint.load(folder / "train.npz")[1]["model"]
                    for folder in (tmp_path, tmp_path / "alone"))
    alone = without_biases_of_keys(alone)
    for name, array in without_biases_of_keys(mixed).items():
        np.testing.assert_allclose(array, alone[name], rtol=0, atol=1e-5, err_msg=name)


# Jobs of a full lesson, shared out

def did(folder):
    """{job: which ranks did it}."""
    found = {}
    for path in sorted(folder.glob("* by *")):
        name, _, rank = path.name.partition(" by ")
        found.setdefault(name, []).append(int(rank))
    return found


@needs_mpi
def test_enough_jobs_are_done_by_one_rank_each_as_if_alone(tmp_path):
    for count, folder in ((0, "alone"), (2, "ranks")):
        code, _, err = ranked.ranks(count, "jobs", tmp_path / folder, 6, 0.1)
        assert code == 0, err
    ranks = did(tmp_path / "ranks")
    assert len(ranks) == 6 and sorted(set(sum(ranks.values(), []))) == [0, 1]
    assert max(map(len, ranks.values())) == 1
    alone, shared = (json.loads((tmp_path / name / "end.json").read_text()) for name in ("alone", "ranks"))
    assert shared == alone and len(set(alone.values())) == 6


@needs_mpi
@pytest.mark.slow
def test_few_jobs_are_done_by_all_ranks(tmp_path):
    assert ranked.ranks(2, "jobs", tmp_path, 5, 0)[0] == 0
    assert did(tmp_path) == {f"arm {i}": [0, 1] for i in range(5)}


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("what, code, said", [
    ("input", 2, ["error: rank 1 of 2: this picture cannot be used"]),
    ("interrupt", 130, ["stopped: by Ctrl-C"]), ("killed", 9, None)])
def test_what_ends_one_rank_ends_all_and_one_process_goes_on_to_the_same_bits(what, code, said, tmp_path):
    """Rank 0 is meanwhile in a job of 100 seconds."""
    began = time.monotonic()
    found, _, err = ranked.ranks(2, "jobs", tmp_path, 6, 0, "0:long", f"1:{what}")
    assert time.monotonic() - began < 60 and found == code, err
    assert said is None or lines(err) == said
    for folder in (tmp_path, tmp_path / "alone"):
        assert ranked.ranks(0, "jobs", folder, 6, 0)[0] == 0
    assert (tmp_path / "end.json").read_bytes() == (tmp_path / "alone" / "end.json").read_bytes()


@needs_mpi
@passes_ctrl_c
def test_ctrl_c_lets_each_rank_end_its_step_and_save_it(tmp_path):
    folder = tmp_path / "checkpoints" / "scenes" / "seed0"
    process = ranked.started(2, "jobs", tmp_path, 6, 1)
    while len(list(folder.glob("arm-*.npz.lock"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, _, err = ranked.ended(process, 60)
    assert code == 130 and re.fullmatch(r"stopped: arm-\d stopped after step [123] of 4", *lines(err)), err
    steps = [checkpoint.load(path)[0]["step"] for path in folder.glob("arm-*.npz")]
    assert len(steps) == 2 and max(steps) < 4


# Every way to end

ENDS = {"input": ("1:6:input", 2, ["error: rank 1 of 2: this picture cannot be used"]),
        "memory": ("1:6:memory", 2, [f"error: rank 1: {TOO_MANY}"]),
        "memory of rank 0": ("0:6:memory", 2, [f"error: rank 0: {TOO_MANY}"]),
        "elsewhere": ("1:6:exit", 2, ["error: rank 1 is at 'the end of the program', and rank 0 at 'a step': "
                                      "all ranks have to do the same, in the same order"]),
        "Ctrl-C": ("1:6:interrupt", 130, ["stopped: train stopped after step 7 of 20"]),
        "other weights": ("1:6:drift", 2, [f"error: the weights of train: rank 1 has other weights than rank "
                                           f"0, {SAME}"])}


@needs_mpi
@pytest.mark.parametrize("fault, code, said", ENDS.values(), ids=ENDS)
def test_all_ranks_end_with_one_line(fault, code, said, tmp_path):
    began = time.monotonic()
    assert ranked.ranks(2, "run", tmp_path, fault) == (code, "", ranked_stderr(said))
    assert time.monotonic() - began < 60
    done = 7 if code == 130 else 4
    assert checkpoint.load(tmp_path / "train.npz")[0]["step"] == done


class ranked_stderr:
    """Equal to what is said on stderr, beside the line about the processes."""

    def __init__(self, said):
        self.said = said

    def __eq__(self, err):
        return lines(err) == self.said

    def __repr__(self):
        return repr(self.said)


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_in_the_program_has_its_traceback_and_its_rank(rank, tmp_path):
    code, _, err = ranked.ranks(2, "run", tmp_path, f"{rank}:6:bug")
    first, *_, last = lines(err)
    assert code == 1 and first == f"rank {rank} of 2: Traceback (most recent call last):"
    assert last == "KeyError: 'a mistake'"


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_the_run_goes_on_to_the_same_bits(rank, tmp_path):
    assert ranked.ranks(2, "run", tmp_path / "whole")[0] == 0
    folder = tmp_path / "killed"
    code, out, err = ranked.ranks(2, "run", folder, f"{rank}:6:killed", seconds=60)
    pid = re.search(rf"rank {rank} is process (\d+) on", err)[1]
    assert code != 0 and pid in out + err.partition("processes:")[2]
    assert checkpoint.load(folder / "train.npz")[0]["step"] == 4
    assert ranked.ranks(2, "run", folder)[0] == 0
    assert (folder / "end.json").read_bytes() == (tmp_path / "whole" / "end.json").read_bytes()


@needs_mpi
@passes_ctrl_c
def test_ctrl_c_at_the_launcher_ends_all_ranks_after_one_step(tmp_path):
    process = ranked.started(2, "slow", tmp_path, 0.2)
    while not (tmp_path / "history.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, out, err = ranked.ended(process, 60)
    stopped = re.search(r"stopped: train stopped after step (\d+) of 20", err)
    assert stopped and code == 130, err
    assert checkpoint.load(tmp_path / "train.npz")[0]["step"] == int(stopped[1])


@needs_mpi
@pytest.mark.parametrize("what, name", [("order", "pictures"), ("picture", "pictures"), ("model", "model"),
                                        pytest.param("rate", "header", marks=pytest.mark.slow)])
def test_ranks_with_something_else_are_refused(what, name, tmp_path):
    code, _, err = ranked.ranks(2, "other", tmp_path, what)
    assert code == 2
    assert lines(err) == [f"error: training of train: rank 1 has other {name} than rank 0, {SAME}"]


OTHER_CODE = """
import sys
from tinytoken import group, program
mine = str(group.launched()) if {code} else "same"
group._digest_of_code = lambda: mine
try:
    program.prepare_streams()
except program.ENDS as error:
    sys.exit(program.ended(error))
print("began")
"""


@needs_mpi
def test_other_code_and_other_arguments_are_refused_at_the_start(tmp_path):
    for code, second, said in ((True, [], "code"), (False, ["more"], "arguments")):
        (tmp_path / "program.py").write_text(OTHER_CODE.format(code=code))
        words = [ranked.sys.executable, tmp_path / "program.py"]
        process = ranked.session(ranked.MPIEXEC, "-n", "1", *words, ":", "-n", "1", *words, *second)
        code, out, err = ranked.ended(process)
        assert (code, out) == (2, "")
        assert lines(err) == [f"error: start: rank 1 has other {said} than rank 0, {SAME}"]


# Without mpiexec, and without MPI

def test_a_process_alone_imports_no_mpi():
    code = ("import sys, numpy as np, tinytoken as tt; from tinytoken import group; "
            "assert group.current().size == 1; "
            "tt.train.infer(tt.models.ViT(8, 4, 8, 1, 2), np.zeros((1, 3, 8, 8), 'float32')); "
            "assert not [name for name in sys.modules if name.startswith('mpi4py')]")
    process = ranked.python("-c", code)
    assert ranked.ended(process)[0] == 0


def test_one_line_says_what_to_install():
    """A launcher has started two processes, and there is no mpi4py: the first of them says it."""
    code = ("import sys; sys.modules['mpi4py'] = None; from tinytoken.__main__ import main; "
            "sys.exit(main(['doctor']))")
    for rank in (0, 1):
        os.environ.update(PMI_SIZE="2", PMI_RANK=str(rank))
        try:
            process = ranked.python("-c", code)
        finally:
            del os.environ["PMI_SIZE"], os.environ["PMI_RANK"]
        status, out, err = ranked.ended(process)
        assert (status, out) == (2, "")
        assert rank or err.startswith("error: 2 processes were started, for which MPI is wanted, but ")
        assert err.endswith("-m pip install 'mpi4py>=4.1' 'mpich>=5')\n") != bool(rank)


@pytest.mark.parametrize("names, expected", [
    ({"PMI_SIZE": "4", "PMI_RANK": "3"}, (4, 3)),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, (2, 0)),
    ({"SLURM_NTASKS": "8", "PMIX_RANK": "5"}, (8, 5)), ({"SLURM_NTASKS": "8"}, (1, 0)),
    ({"PMI_SIZE": "4"}, (1, 0)), ({}, (1, 0))])
def test_launchers_are_known_by_what_they_set(names, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith(group.LAUNCHED)]:
        monkeypatch.delenv(name)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert group.launched() == expected


def test_a_group_of_one_does_nothing():
    alone, x = Group(), np.arange(3.0)
    alone.all_reduce(x)
    alone.broadcast(x)
    alone.same("here", x=1)
    assert x.tolist() == [0, 1, 2] and alone.exchange("here", 5) == [5]
    assert alone.rows(7) == (slice(0, 7), 1.0)
    with pytest.raises(InputError, match="^as it is$"):
        alone.together("here", lambda: (_ for _ in ()).throw(InputError("as it is")))


def test_a_share_of_the_cpus_is_at_least_one(monkeypatch):
    monkeypatch.setattr(backend.sharing, "processes", 1000)
    assert backend.cpu_count() == 1


class OfThreads:
    """A communicator of mpi4py's, as far as a test of messages needs one."""
    rank, size = 1, 2

    def __init__(self, answers):
        self.answers = answers

    def Ibarrier(self):
        return self

    def Test(self):
        return True

    def allgather(self, value):
        return [self.answers.pop(0), value]


def test_what_a_rank_raises_all_raise_with_its_number():
    group_of_two = Ranks.__new__(Ranks)
    group_of_two.comm, group_of_two.rank, group_of_two.size = OfThreads(
        [("work", (None, InputError("no"))), ("elsewhere", None), ("value", {"a": 1})]), 1, 2
    with pytest.raises(InputError, match="^rank 0: no$"):
        group_of_two.together("work", lambda: 1)
    with pytest.raises(InputError, match="^rank 1 is at 'work', and rank 0 at 'elsewhere'"):
        group_of_two.together("work", lambda: 1)
    with pytest.raises(InputError, match="^value: rank 1 has other a than rank 0"):
        group_of_two.same("value", a=2)
