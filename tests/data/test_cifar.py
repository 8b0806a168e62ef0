"""Reading and fetching CIFAR, on archives of the right layout with few records: what is read, what is
refused, what is left."""
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import tarfile
import threading
import time
import tracemalloc

import numpy as np
import pytest

from small import refuses
from tinytoken.data import cifar
from tinytoken.data.cifar import LAYOUTS, download_cifar, find_data, load_cifar
from tinytoken.errors import InputError

RECORDS = 12  # in each file, instead of 10,000 or 50,000
KINDS = ("cifar10", "cifar100")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The official layouts, with files of RECORDS records; no setting of the caller's is seen."""
    monkeypatch.delenv("TINYTOKEN_DATA", raising=False)
    for kind, layout in LAYOUTS.items():
        few = {split: dict.fromkeys(getattr(layout, split), RECORDS) for split in ("train", "test")}
        monkeypatch.setitem(LAYOUTS, kind, dataclasses.replace(layout, **few))


def make_files(kind, seed=0):
    """{file name: its bytes} of a random data set."""
    layout, rng = LAYOUTS[kind], np.random.default_rng(seed)
    files = {}
    for name in (*layout.train, *layout.test):
        table = rng.integers(0, 256, (RECORDS, layout.label_bytes + cifar.PIXELS), dtype="uint8")
        table[:, :layout.label_bytes] %= 10
        files[name] = table.tobytes()
    return files


def write_folder(kind, dest, files=None):
    folder = dest / LAYOUTS[kind].folder
    folder.mkdir(parents=True)
    for name, content in (files or make_files(kind)).items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(kind, dest, files=None, extra=()):
    """`extra`: TarInfo objects put in front. The files come in reverse order, and among strangers."""
    layout, path = LAYOUTS[kind], dest / LAYOUTS[kind].archive
    dest.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for info in extra:
            tar.addfile(info)
        for name, content in {"readme.html": b"<p>",
                              **dict(reversed((files or make_files(kind)).items()))}.items():
            info = tarfile.TarInfo(f"{layout.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def check_content(kind, loaded, files):
    layout = LAYOUTS[kind]
    for pictures, names in zip(loaded, (layout.train, layout.test)):
        raw = np.frombuffer(b"".join(files[name] for name in names),
                            "uint8").reshape(-1, layout.label_bytes + cifar.PIXELS)
        assert len(pictures) == RECORDS * len(names)
        assert pictures.images.dtype == "uint8" and pictures.labels.dtype == "int64"
        assert (pictures.labels == raw[:, layout.label_bytes - 1]).all()  # CIFAR-100: the fine label
        row, column = 5, 17
        for channel in range(3):
            expected = raw[:, layout.label_bytes + 1024 * channel + 32 * row + column]
            assert (pictures.images[:, channel, row, column] == expected).all()
        assert pictures.names == layout.names


@pytest.mark.parametrize("kind, train, test", [("cifar10", 50_000, 10_000), ("cifar100", 50_000, 10_000)])
def test_the_official_sizes(monkeypatch, kind, train, test):
    monkeypatch.undo()
    layout = LAYOUTS[kind]
    assert sum(layout.train.values()) == train and sum(layout.test.values()) == test
    assert set(cifar._sizes(layout).values()) == ({30_730_000} if kind == "cifar10"
                                                  else {153_700_000, 30_740_000})
    assert len(set(layout.names)) == len(layout.names) == int(kind[5:])
    assert layout.url == f"https://www.cs.toronto.edu/~kriz/cifar-{kind[5:]}-binary.tar.gz"


@pytest.mark.parametrize("kind", KINDS)
def test_folder_parent_and_archive_read_alike(tmp_path, kind):
    files = make_files(kind)
    folder = write_folder(kind, tmp_path / "a", files)
    archive = write_archive(kind, tmp_path / "b", files)
    for path in (folder, folder.parent, str(folder.parent), archive, archive.parent):
        check_content(kind, load_cifar(path, kind), files)


def test_the_folder_comes_before_the_archive(tmp_path):
    files = make_files("cifar10", seed=1)
    write_archive("cifar10", tmp_path)
    write_folder("cifar10", tmp_path, files)
    check_content("cifar10", load_cifar(tmp_path), files)


def test_names_are_read_where_the_file_is_there(tmp_path):
    names = [f"name{i}" for i in range(10)]
    files = make_files("cifar10") | {"batches.meta.txt": ("\n".join(names) + "\n\n").encode()}
    folder, archive = write_folder("cifar10", tmp_path, files), write_archive("cifar10", tmp_path, files)
    for path in (folder, archive):
        assert all(pictures.names == tuple(names) for pictures in load_cifar(path))
    (folder / "batches.meta.txt").write_text("just one")
    with pytest.raises(InputError, match=r"batches-bin/batches.meta.txt: 2 class names found, expected 10"):
        load_cifar(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path, kind, change):
    files = make_files(kind)
    name, content = next(iter(files.items()))
    files[name] = content[:change] if change < 0 else content + b"\0"
    folder, archive = write_folder(kind, tmp_path, files), write_archive(kind, tmp_path, files)
    sizes = f"{len(content) + change:,} bytes, expected {len(content):,}: truncated, or not a CIFAR file$"
    with pytest.raises(InputError, match=f"^{folder / name}: {sizes}"):
        load_cifar(folder, kind)
    with pytest.raises(InputError, match=f"^{archive}: {folder.name}/{name}: {sizes}"):
        load_cifar(archive, kind)


@pytest.mark.parametrize("kind, label", [("cifar10", 10), ("cifar100", 100)])
def test_a_label_out_of_range_is_refused(tmp_path, kind, label):
    files = make_files(kind)
    *_, name = files
    record = LAYOUTS[kind].label_bytes + cifar.PIXELS
    content = bytearray(files[name])
    content[7 * record + LAYOUTS[kind].label_bytes - 1] = label
    folder = write_folder(kind, tmp_path, files | {name: bytes(content)})
    with pytest.raises(InputError, match=f"{name}: record 7 has label {label}, expected 0 to {label - 1}$"):
        load_cifar(folder, kind)


def test_missing_files_are_named(tmp_path):
    files = make_files("cifar10")
    del files["data_batch_3.bin"]
    folder, archive = write_folder("cifar10", tmp_path, files), write_archive("cifar10", tmp_path, files)
    with pytest.raises(InputError, match=r"data_batch_3.bin: no such file, expected one of 36,876 bytes"):
        load_cifar(folder)
    with pytest.raises(InputError,
                       match=r"gz: data_batch_3.bin missing, expected in its folder cifar-10-batches-bin/"):
        load_cifar(archive)


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b[:-4],
    lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:],
    lambda b: b"<html>not found</html>", lambda b: b"",
], ids=["half", "end", "bit", "foreign", "empty"])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    archive = write_archive("cifar10", tmp_path)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(InputError,
                       match=f"^{archive}: {archive.stat().st_size:,} bytes that are not a whole .tar.gz"):
        load_cifar(tmp_path)


@pytest.mark.parametrize("kind_of_link", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_link_in_place_of_a_file_is_refused(tmp_path, kind_of_link):
    link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    link.type, link.linkname = kind_of_link, "/etc/passwd"
    write_archive("cifar10", tmp_path, extra=[link])
    with pytest.raises(InputError,
                       match="its member cifar-10-batches-bin/data_batch_1.bin is a link or a folder"):
        load_cifar(tmp_path)


def test_strange_members_are_passed_over_and_nothing_is_written(tmp_path):
    names = ["../evil", "/tmp/evil", "cifar-10-batches-bin/../../evil",
             "cifar-10-batches-bin/data_batch_1.bin.pkl"]
    files = make_files("cifar10")
    write_archive("cifar10", tmp_path / "x", files, extra=[tarfile.TarInfo(name) for name in names])
    check_content("cifar10", load_cifar(tmp_path / "x"), files)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("what", ["names", "stranger", "global header", "end"])
def test_a_small_archive_that_unpacks_to_far_more_is_refused_while_it_is_read(what, tmp_path, monkeypatch):
    """64 MB in the place of 3 GB, with a limit of 1 MB beside the pictures."""
    monkeypatch.setattr(cifar, "OTHERS", 2**20)
    path, most = write_archive("cifar10", tmp_path), sum(cifar._sizes(LAYOUTS["cifar10"]).values()) + 2**20
    info = tarfile.TarInfo({"names": "cifar-10-batches-bin/batches.meta.txt"}.get(what, "stranger"))
    info.type, info.size = (tarfile.XGLTYPE if what == "global header" else tarfile.REGTYPE), 64 * 2**20
    with gzip.open(path) as file:
        rest = file.read()
    with gzip.open(path, "wb") as file:
        file.write(rest + bytes(info.size) if what == "end" else info.tobuf() + bytes(info.size) + rest)
    assert path.stat().st_size < 500_000
    text = (f"unpacks to more than {most:,} bytes, which is more than a CIFAR archive" if what != "names"
            else "cifar-10-batches-bin/batches.meta.txt: 67,108,864 bytes, expected at most 65,536")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"^{path}: {text}$"):
            load_cifar(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_names_beyond_a_limit_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(InputError, match="^load_cifar: .*.tar.gz cannot be read: not a regular file$"):
        load_cifar(tmp_path)
    folder = write_folder("cifar10", tmp_path)
    (folder / "batches.meta.txt").write_bytes(b"a" * 65_537)
    with pytest.raises(InputError, match="^load_cifar: .*batches.meta.txt has more than 65,536 bytes$"):
        load_cifar(folder)


def test_no_module_here_can_unpickle():
    for module in pathlib.Path(cifar.__file__).parent.glob("*.py"):
        text = module.read_text()
        assert "import pickle" not in text and "allow_pickle" not in text and "extractall" not in text


@pytest.mark.parametrize("call", [lambda: load_cifar(".", "cifar11"), lambda: download_cifar(".", "mnist")])
def test_an_unknown_kind_is_refused(call):
    with pytest.raises(InputError, match="cifar: kind is '.*', expected one of cifar10, cifar100"):
        call()


def test_no_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: load_cifar(tmp_path), lambda: find_data(str(tmp_path)), lambda: find_data("cifar10"),
                 find_data):
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert "download_cifar('data', 'cifar10')" in message and "TINYTOKEN_DATA=DIR" in message
        assert "--data DIR" in message
    with pytest.raises(InputError, match="no CIFAR-100 in data; .*(.|\n)*cifar-100-binary.tar.gz"):
        find_data("cifar100")


def test_find_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ten = write_folder("cifar10", tmp_path / "data")
    hundred = write_archive("cifar100", tmp_path / "elsewhere")
    assert find_data("cifar10") == (pathlib.Path("data") / ten.name, "cifar10")
    assert find_data(str(ten)) == (ten, "cifar10")
    assert find_data(tmp_path / "elsewhere") == find_data(hundred) == (hundred, "cifar100")
    monkeypatch.setenv("TINYTOKEN_DATA", "cifar10")
    assert find_data() == find_data("cifar10") == (pathlib.Path("data") / ten.name, "cifar10")
    monkeypatch.setenv("TINYTOKEN_DATA", str(tmp_path / "elsewhere"))
    assert find_data() == find_data("cifar100") == (hundred, "cifar100")
    assert find_data(str(tmp_path / "data")) == (ten, "cifar10")
    with pytest.raises(InputError, match="no CIFAR-10 in .*elsewhere"):
        find_data("cifar10")
    write_folder("cifar100", tmp_path / "data")
    with pytest.raises(InputError, match="data holds both CIFAR-10 and CIFAR-100; give one of .*batches-bin, "
                                         ".*100-binary"):
        find_data(tmp_path / "data")


# Downloads: a server of our own on 127.0.0.1, with time limits.

class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path.endswith("cut.tar.gz"):  # promises more than it sends
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
        elif self.path.endswith("hang.tar.gz"):
            self.server.released.wait(10)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                         functools.partial(Handler, directory=folder)) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.released.set()
            server.shutdown()
            thread.join(10)


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_then_load(tmp_path, monkeypatch, no_proxy):
    files = make_files("cifar10")
    archive, dest = write_archive("cifar10", tmp_path / "remote", files), tmp_path / "new" / "dest"
    monkeypatch.setattr(cifar, "TIMEOUT", 10)
    with serving(archive.parent) as host:
        got = download_cifar(dest, "cifar10", url=f"{host}/{archive.name}", checksum=md5(archive))
    assert got == dest / archive.name and left_in(dest) == [archive.name]
    check_content("cifar10", load_cifar(dest), files)
    # The server is gone: an archive that is there already is not fetched again, a damaged one is.
    assert download_cifar(dest, "cifar10", url=f"{host}/{archive.name}", checksum=md5(archive)) == got
    got.write_bytes(b"damaged")
    with pytest.raises(InputError, match="download_cifar: http://127.0.0.1.*refused"):
        download_cifar(dest, "cifar10", url=f"{host}/{archive.name}", checksum=md5(archive))
    assert left_in(dest) == [archive.name]


@pytest.mark.parametrize("name, reason", [
    ("cifar-10-binary.tar.gz",
     "has MD5 [0-9a-f]{32}, expected c32a1d4ab5d03f1284b67883e8d87530: damaged, or another file"),
    ("cut.tar.gz", "has MD5 [0-9a-f]{32}, expected c32a"),
    ("nothing.tar.gz", "404"),
    ("hang.tar.gz", "timed out"),
])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, no_proxy, name, reason):
    write_archive("cifar10", tmp_path / "remote")
    monkeypatch.setattr(cifar, "TIMEOUT", 0.2 if name.startswith("hang") else 10)
    with serving(tmp_path / "remote") as host:
        with pytest.raises(InputError, match=f"download_cifar: {host}/{name}.*{reason}"):
            download_cifar(tmp_path / "dest", "cifar10", url=f"{host}/{name}")
    assert left_in(tmp_path / "dest") == []


def test_nothing_is_downloaded_where_the_archive_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_fetch", lambda *_: pytest.fail("downloaded"))
    target = tmp_path / cifar.LAYOUTS["cifar10"].archive
    target.mkdir()
    with refuses(f"cannot write {target}: it is a folder, expected the name of a file"):
        cifar.download_cifar(tmp_path)


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch, no_proxy):
    def interrupted(url, file):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(cifar, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_cifar(tmp_path / "dest")
    assert left_in(tmp_path / "dest") == []


def test_one_process_downloads_at_a_time_and_what_a_killed_one_left_is_removed(tmp_path, monkeypatch):
    calls, began = [], threading.Event()

    def fetch(url, file):
        calls.append(url)
        began.set()
        time.sleep(0.2)
        file.write(b"all of it")
        return "its sum"
    monkeypatch.setattr(cifar, "_fetch", fetch)
    monkeypatch.setattr(cifar, "_md5", lambda path: {b"all of it": "its sum"}[path.read_bytes()])
    (tmp_path / ".cifar-10-binary.tar.gz.a1b2c3d4.part").write_bytes(b"half")
    download = functools.partial(download_cifar, tmp_path, url="somewhere", checksum="its sum")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(download)
        assert began.wait(10) and download() == first.result(10)
    assert calls == ["somewhere"] and left_in(tmp_path) == ["cifar-10-binary.tar.gz"]


def test_an_unwritable_place_and_a_bad_address_are_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="download_cifar: https://www.cs.toronto.edu/.* to "
                                         ".*file/cifar-10-binary.tar.gz: "):
        download_cifar(tmp_path / "file")
    with pytest.raises(InputError, match="download_cifar: nowhere to .*: unknown url type"):
        download_cifar(tmp_path, url="nowhere")


REAL = pathlib.Path(os.environ.get("TINYTOKEN_DATA") or "data")


@pytest.mark.skipif(not (REAL / "cifar-10-batches-bin").is_dir(), reason=f"no CIFAR-10 in {REAL}")
def test_the_real_pictures(monkeypatch):
    monkeypatch.undo()
    train, test = load_cifar(REAL)
    assert train.images.shape == (50_000, 3, 32, 32) and test.images.shape == (10_000, 3, 32, 32)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.names == LAYOUTS["cifar10"].names
    mean = test.images.mean(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(mean, (0.494, 0.485, 0.450), atol=0.01)
