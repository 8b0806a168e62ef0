"""Files that are whole or not there, whatever happens while they are written; claims on them; values as
JSON."""
import concurrent.futures
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import dynamicvit, python, vit
from tinytoken import files
from tinytoken.train import checkpoint


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(name, code):
    def raise_it(*_, **__):
        raise OSError(code, os.strerror(code))
    return lambda monkeypatch: monkeypatch.setattr(os, name, raise_it)


FAILURES = {"disk full at the flush": (fails("fsync", errno.ENOSPC), "No space left on device"),
            "read-only at the rename": (fails("replace", errno.EROFS), "Read-only file system")}


@pytest.mark.parametrize("fail, reason", FAILURES.values(), ids=FAILURES)
def test_a_failing_write_leaves_the_old_file_and_nothing_else(fail, reason, tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    checkpoint.save(path, vit()[0], step=1)
    old = path.read_bytes()
    fail(monkeypatch)
    with refuses(f"cannot write {path}: {reason}"):
        checkpoint.save(path, dynamicvit()[0], step=2)
    with refuses(f"cannot write {tmp_path / 'other.json'}: {reason}"):
        files.write_json(tmp_path / "other.json", {})
    assert path.read_bytes() == old and left_in(tmp_path) == ["model.npz"]


FULL_DISK = """
import resource, sys, tinytoken as tt
model = tt.models.ViT(8, 4, 64, 2, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    tt.checkpoint.save(sys.argv[1], model)
except tt.InputError as error:
    print(error)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint(tmp_path):
    """Really: the system refuses to let a file grow beyond 100 kB."""
    path = tmp_path / "model.npz"
    checkpoint.save(path, vit()[0])
    old = path.read_bytes()
    out, err = python("-c", FULL_DISK, path).communicate(timeout=60)
    assert (out, err) == (f"cannot write {path}: File too large\n", "")
    assert path.read_bytes() == old and left_in(tmp_path) == ["model.npz"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_replacing_passes_on_what_is_no_fault_of_the_disk(error, tmp_path):
    with pytest.raises(error), files.replacing(tmp_path / "a.txt", "w") as file:
        file.write("half")
        raise error
    assert left_in(tmp_path) == []


def test_replacing_makes_folders_and_an_ordinary_file(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    files.write_json(path, {"x": [1, 2.5]})
    files.write_json(path, {"x": [1, None]})
    assert json.loads(path.read_text()) == {"x": [1, None]} and path.read_text().endswith("}\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and left_in(path.parent) == ["c.json"]


def test_the_new_file_is_not_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.replacing(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("place",
                         ["file/model.npz", "file/deep/model.npz", "folder", "/proc/tinytoken/model.npz"])
def test_a_place_that_cannot_be_written(place, tmp_path):
    """Permissions are not asked: root, who may run the tests, has all of them."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    path = tmp_path / place
    reasons = ("File exists|Not a directory|No such file or directory"
               "|it is a folder, expected the name of a file")
    with pytest.raises(tt.InputError, match=rf"^cannot write {path}: ({reasons})$"):
        checkpoint.save(path, vit()[0])
    assert left_in(tmp_path) == ["file", "folder"] and left_in(tmp_path / "folder") == []


def special(tmp_path):
    """{what kind_of says: such a path}. The device is a link to one: nothing is lost if this fails."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to(os.devnull)
    return {f"a {name}": tmp_path / name for name in ("pipe", "folder", "device")}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_only_a_regular_file_is_replaced(tmp_path):
    """A rename over them would destroy them."""
    for kind, path in special(tmp_path).items():
        assert files.kind_of(path) == kind
        before = os.lstat(path)
        with refuses(f"cannot write {path}: it is {kind}, expected the name of a file"):
            files.write_json(path, {})
        with refuses(f"cannot write {path}.json: it is {kind}, expected the name of a file"):
            path.with_name(path.name + ".json").symlink_to(path)
            files.check_target(f"{path}.json", ".json")
        assert os.lstat(path) == before
    assert files.kind_of(tmp_path / "none") == files.kind_of(tmp_path / "pipe" / "none") == "nothing"


def test_a_target_in_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "a.json"
    with pytest.raises(tt.InputError, match=rf"^cannot write {tmp_path}/file: {tmp_path}/file is a file, "
                                            "expected a folder$"):
        files.check_target(path, ".json")
    files.check_target(path, ".json", probe=False)
    files.check_target(tmp_path / "new" / "model")  # any ending
    assert left_in(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_removed_by_the_next_without_a_claim_later(tmp_path):
    names = {name: tmp_path / f".{name}.part"
             for name in ("a.txt.abcdefgh", "a.txt.ab_defg1", "b.txt.abcdefgh")}
    for left in names.values():
        left.write_text("half")
    then = time.time() - files.LEFT - 1
    for name in ("a.txt.abcdefgh", "b.txt.abcdefgh"):
        os.utime(names[name], (then, then))
    with files.replacing(tmp_path / "a.txt", "w") as file:
        file.write("whole")
    assert left_in(tmp_path) == sorted([".a.txt.ab_defg1.part", ".b.txt.abcdefgh.part", "a.txt"])
    with files.claimed(tmp_path / "a.txt"):
        assert ".a.txt.ab_defg1.part" not in left_in(tmp_path)
    ahead = tmp_path / ".a.txt.abcdefgh.part"
    ahead.write_text("half")
    os.utime(ahead, (time.time() + 9999,) * 2)  # by another machine's clock
    with files.claimed(tmp_path / "a.txt"):
        assert not ahead.exists()


def test_text_is_utf8(tmp_path):
    with files.replacing(tmp_path / "a.txt", "w") as file:
        file.write("\u03bb")
    assert (tmp_path / "a.txt").read_bytes() == b"\xce\xbb"


def test_a_link_to_a_file_counts_as_a_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "link.json").symlink_to("a.json")
    (tmp_path / "nowhere.json").symlink_to("none")
    for name in ("link.json", "nowhere.json"):
        files.check_target(tmp_path / name, ".json")
        files.write_json(tmp_path / name, 1)
        assert (tmp_path / name).read_text() == "1\n"
    assert (tmp_path / "a.json").read_text() == "old"


def test_an_output_has_the_ending_of_its_kind(tmp_path):
    for name in ("a.png", "a.PNG", "deep/a.b.jpg"):
        files.check_target(tmp_path / name, ".png", ".jpg")
    for name in ("model.npz", "png", ".png", "a.png.npz", "a.", ""):
        with refuses(f"cannot write {tmp_path / name}: expected a name that ends in .png or .jpg"):
            files.check_target(tmp_path / name, ".png", ".jpg")


def test_an_output_is_not_an_input(tmp_path):
    (tmp_path / "a.png").write_text("picture")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to("a.png")
    for name in ("a.png", "hard.png", "soft.png", "../" + tmp_path.name + "/a.png"):
        with refuses(f"cannot write {tmp_path / name}: it is {tmp_path / 'a.png'}, which is read: "
                     "give another name"):
            files.check_target(tmp_path / name, ".png", inputs=(tmp_path / "none", tmp_path / "a.png"))
    (tmp_path / "b.png").write_text("another")
    for name in ("b.png", "new.png"):
        files.check_target(tmp_path / name, ".png", inputs=(tmp_path / "none", tmp_path / "a.png"))


# Claims, and values as JSON

def test_a_claim_is_for_one_at_a_time_and_ends_with_its_block(tmp_path):
    path = tmp_path / "a" / "model.npz"
    with files.claimed(path):
        assert path.parent.exists() and not path.exists()
        with pytest.raises(tt.errors.Busy), files.claimed(path):
            pass
        with files.claimed(path.parent / "other.npz"):
            pass
    with pytest.raises(ZeroDivisionError), files.claimed(path):
        1 / 0
    with files.claimed(path):
        pass
    assert issubclass(tt.errors.Busy, tt.InputError)


def test_a_claim_leaves_nothing_behind_but_what_was_written(tmp_path):
    with files.claimed(tmp_path / "a" / "b" / "model.npz"):
        assert left_in(tmp_path / "a" / "b") == ["model.npz.lock"]
    assert left_in(tmp_path) == []
    with files.claimed(tmp_path / "a" / "b" / "model.npz"):
        (tmp_path / "a" / "b" / "model.npz").write_text("weights")
        (tmp_path / "a" / "empty").mkdir()
    assert left_in(tmp_path / "a" / "b") == ["model.npz"] and left_in(tmp_path / "a") == ["b", "empty"]
    (tmp_path / "mine").mkdir()
    with files.claimed(tmp_path / "mine" / "model.npz"):  # who did not make a folder does not remove it
        pass
    assert left_in(tmp_path) == ["a", "mine"]


HOLDER = """
import sys, time
from tinytoken.files import claimed, replacing
with claimed(sys.argv[1]), replacing(sys.argv[1]) as file:
    file.write(b"half")
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_claim_says_who_has_it_and_ends_with_its_process(tmp_path):
    """However it ends; the next one finds nothing in the way, and removes what it had half written."""
    path = tmp_path / "model.npz"
    for name in (".model.npz.original", ".model.npz.abcdefg.part", ".other.npz.abcdefgh.part"):
        (tmp_path / name).write_text("another's")
    before = left_in(tmp_path)
    process = python("-c", HOLDER, path)
    assert process.stdout.readline() == "mine\n"
    text = (rf"^another process is at work on {path}: process {process.pid} on {socket.gethostname()}, "
            rf"since {time.strftime('%Y')}-\d\d-\d\d \d\d:\d\d:\d\d$")
    for _ in range(2):  # to be refused changes nothing
        with pytest.raises(tt.errors.Busy, match=text), files.claimed(path):
            pass
    process.kill()
    process.communicate()
    assert len(left_in(tmp_path)) == len(before) + 2  # the half, and the file of the lock
    (tmp_path / "model.npz.lock").write_text("a longer line than those that are written here: " * 3)
    with files.claimed(path):
        assert left_in(tmp_path) == sorted([*before, "model.npz.lock"])
        text = text.replace(str(process.pid), str(os.getpid()))
        with pytest.raises(tt.errors.Busy, match=text), files.claimed(path):
            pass
    assert left_in(tmp_path) == before


def counted(path, times):
    """Add 1 to the number in a file, so many times, with a pause between reading and writing."""
    for _ in range(times):
        with files.claimed(path, wait=True):
            number = int(path.read_text())
            time.sleep(0)
            path.write_text(str(number + 1))


def test_those_that_wait_for_a_claim_take_turns(tmp_path):
    """The lock's file is removed after each turn: one that waits at a removed file must not think it is its
    turn."""
    path = tmp_path / "number"
    path.write_text("0")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = [pool.submit(counted, path, 100) for _ in range(4)]
        assert [future.result(timeout=60) for future in done] == [None] * 4
    assert path.read_text() == "400" and left_in(tmp_path) == ["number"]


def test_to_wait_for_a_claim_is_to_wait(tmp_path):
    path, order = tmp_path / "a.npz", []

    def second():
        with files.claimed(path, wait=True):
            order.append("second")
    with files.claimed(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_claim_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(tt.InputError,
                       match=rf"^cannot write {tmp_path}/file/m.npz.lock: (File exists|Not a directory)$"):
        with files.claimed(tmp_path / "file" / "m.npz"):
            pass


def test_a_claim_does_not_follow_a_link(tmp_path):
    (tmp_path / "letter").write_text("dear")
    (tmp_path / "m.npz.lock").symlink_to(tmp_path / "letter")
    with pytest.raises(tt.InputError, match="^cannot write .*m.npz.lock: "):
        with files.claimed(tmp_path / "m.npz"):
            pass
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="^this file system has no locks: another process on the same "):
        with files.claimed(tmp_path / "a.npz"):
            pass
    fails = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(fails))
    with refuses(f"cannot write {tmp_path / 'a.npz.lock'}: {os.strerror(errno.EIO)}"):
        with files.claimed(tmp_path / "a.npz"):
            pass


class Msvcrt:
    """Windows' locks, of one byte at the file's position, made of POSIX ones."""
    LK_NBLCK, LK_UNLCK = object(), object()

    def __init__(self):
        self.places = []

    def locking(self, handle, mode, count):
        self.places.append((os.lseek(handle, 0, os.SEEK_CUR), count))
        try:
            fcntl.flock(handle, fcntl.LOCK_UN if mode is self.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


def test_a_claim_on_windows(tmp_path, monkeypatch):
    """What is locked is no byte of the line that says whose it is, since there nobody could read it."""
    windows, path = Msvcrt(), tmp_path / "a.npz"
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", windows, raising=False)
    for _ in range(2):
        with files.claimed(path):
            with pytest.raises(tt.errors.Busy, match=rf"a.npz: process {os.getpid()} on .*, since \d"):
                with files.claimed(path):
                    pass
    test_to_wait_for_a_claim_is_to_wait(tmp_path)
    assert left_in(tmp_path) == []
    assert {place > 10_000 for place, _ in windows.places} == {True} and {n for _, n in windows.places} == {1}


def test_a_folder_is_tried_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new" / "folder")
    assert left_in(tmp_path) == []
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(tt.InputError,
                       match=rf"^cannot write {tmp_path}/file/folder: {tmp_path}/file is a file, expected a "
                             "folder$"):
        files.check_writable(tmp_path / "file" / "folder")


def test_values_as_json_gives_them_back():
    value = {"a": (1, 2), "b": np.float32(0.5), "c": [np.int64(3), None], "d": {"e": np.bool_(True)}}
    assert files.as_json(value) == {"a": [1, 2], "b": 0.5, "c": [3, None], "d": {"e": True}}
    with pytest.raises(ValueError):
        files.as_json({"a": np.ones(3)})
