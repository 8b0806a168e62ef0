"""Two machines, as far as one can play them: network namespaces with a host name and an address each, and a
cable (veth) between them. MPICH's launcher enters them with a script in the place of ssh. What they have in
common is the disk."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import ranked
from kills import alive
from tiny import ROOT
from tinytoken.course.processes import descendants
from tinytoken.train import checkpoint

pytestmark = pytest.mark.slow
HOSTS = {f"tinytoken-{letter}{os.getpid()}": f"10.77.0.{1 + i}" for i, letter in enumerate("ab")}
SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
case $1 in {cases} esac
shift
exec ip netns exec $space unshare --uts sh -c "hostname $space; $*"
"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The words before a program that start it once on each host."""
    if ranked.missing():
        pytest.skip(ranked.missing())
    if not ranked.MPICH:
        pytest.skip("MPICH's launcher is wanted, which takes a script in place of ssh")
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces want root, iproute2 and unshare")
    with contextlib.ExitStack() as stack:
        try:
            for space in HOSTS:
                ip("netns", "add", space)
                stack.callback(ip, "netns", "del", space)
            (first, _), (second, _) = HOSTS.items()
            ip("link", "add", "cable", "netns", first, "type", "veth",
               "peer", "name", "cable", "netns", second)
            for space, address in HOSTS.items():
                ip("-n", space, "addr", "add", f"{address}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    ip("-n", space, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        ssh = tmp_path_factory.mktemp("hosts") / "ssh"
        cases = " ".join(f"{address}) space={space};;" for space, address in HOSTS.items())
        ssh.write_text(SSH.format(cases=cases))
        ssh.chmod(0o755)
        yield ("ip", "netns", "exec", first, "unshare", "--uts", "sh", "-c", f'hostname {first}; exec "$@"',
               "sh", ranked.MPIEXEC, "-launcher", "ssh", "-launcher-exec", ssh,
               "-hosts", ",".join(HOSTS.values()), "-ppn", "1")


def started(hosts, *words, other=()):
    """A job of ranked.py on both hosts; other: words before the Python of the second."""
    job = [sys.executable, ranked.__file__, *words]
    return ranked.session(*hosts, "-n", "1", *job, ":", "-n", "1", *other, *job)


def said(err):
    first, *rest = err.splitlines()
    assert re.fullmatch("2 processes: " + ", ".join(rf"rank {rank} is process \d+ on {host}" for rank, host in
                                                    enumerate(HOSTS)), first), err
    return rest


def test_two_hosts_train_as_two_ranks_of_one(hosts, tmp_path):
    code, _, err = ranked.ended(started(hosts, "run", tmp_path / "hosts"))
    assert code == 0 and said(err) == [], err
    assert ranked.ranks(2, "run", tmp_path / "one")[0] == 0
    assert (tmp_path / "hosts" / "end.json").read_bytes() == (tmp_path / "one" / "end.json").read_bytes()


@pytest.mark.parametrize("what", ["pictures", "code"])
def test_another_host_with_something_else_is_refused(what, hosts, tmp_path):
    words, other = ("other", tmp_path, "picture"), ()
    if what == "code":
        shutil.copytree(ROOT / "tinytoken", tmp_path / "tinytoken", ignore=shutil.ignore_patterns("*.pyc"))
        with open(tmp_path / "tinytoken" / "group.py", "a") as file:
            file.write("# another version\n")
        other = ("env", f"PYTHONPATH={tmp_path}:{ROOT / 'tests'}")
    code, out, err = ranked.ended(started(hosts, *words, other=other))
    where = "training of train" if what == "pictures" else "start"
    assert (code, out) == (2, ""), err
    assert [line for line in err.splitlines() if " processes: " not in line] == [
        f"error: {where}: rank 1 has other {what} than rank 0, expected the same on all ranks"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_on_one_host_ends_all(rank, hosts, tmp_path):
    process = started(hosts, "slow", tmp_path, 0.2)
    while not (tmp_path / "train.npz").exists() and process.poll() is None:
        time.sleep(0.05)
    below = descendants(process.pid)
    os.kill(int((tmp_path / f"pid-{rank}").read_text()), signal.SIGKILL)
    began = time.monotonic()
    code, _, err = ranked.ended(process, 60)
    while any(map(alive, below)) and time.monotonic() - began < 10:
        time.sleep(0.05)
    assert code and time.monotonic() - began < 10, err
    assert checkpoint.load(tmp_path / "train.npz")[0]["step"] >= 4
