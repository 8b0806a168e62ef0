"""Files that are whole or not there, whatever happens while they are written; claims on them; values as
JSON."""
import errno
import json
import os
import stat

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
    with pytest.raises(tt.InputError, match=rf"^cannot write {tmp_path}/file/\S+: "):
        files.check_target(path, ".json")
    files.check_target(path, ".json", probe=False)
    files.check_target(tmp_path / "new" / "model")  # any ending
    assert left_in(tmp_path) == ["file"]


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
        with refuses(f"another process is at work on {path}"), files.claimed(path):
            pass
        with files.claimed(path.parent / "other.npz"):
            pass
    with pytest.raises(ZeroDivisionError), files.claimed(path):
        1 / 0
    with files.claimed(path):
        pass
    assert issubclass(tt.errors.Busy, tt.InputError)


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "model.npz"
    process = python("-c", "import sys, time; from tinytoken.files import claimed\n"
                     "with claimed(sys.argv[1]):\n    print('mine', flush=True)\n    time.sleep(60)", path)
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(tt.errors.Busy), files.claimed(path):
        pass
    process.kill()
    process.communicate()
    with files.claimed(path):
        pass


def test_a_claim_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(tt.InputError,
                       match=rf"^cannot write {tmp_path}/file/m.npz.lock: (File exists|Not a directory)$"):
        with files.claimed(tmp_path / "file" / "m.npz"):
            pass


def test_where_no_locks_are_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)  # Windows
    with files.claimed(tmp_path / "a.npz"), files.claimed(tmp_path / "a.npz"):
        assert not list(tmp_path.iterdir())


def test_a_folder_is_tried_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new" / "folder")
    assert left_in(tmp_path) == []
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(tt.InputError,
                       match=rf"^cannot write {tmp_path}/file/\S+: (File exists|Not a directory)$"):
        files.check_writable(tmp_path / "file" / "folder")


def test_values_as_json_gives_them_back():
    value = {"a": (1, 2), "b": np.float32(0.5), "c": [np.int64(3), None], "d": {"e": np.bool_(True)}}
    assert files.as_json(value) == {"a": [1, 2], "b": 0.5, "c": [3, None], "d": {"e": True}}
    with pytest.raises(ValueError):
        files.as_json({"a": np.ones(3)})
