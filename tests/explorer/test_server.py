"""The explorer's server: who may ask it, what it reads, how it ends."""
import base64
import io
import json
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from tiny import ROOT, refused
from tinytoken.data.folder import fitted
from tinytoken.explorer import page
from tinytoken.explorer.look import Explorer

testclient = pytest.importorskip("starlette.testclient", reason="the explorer's server needs starlette")
Image = pytest.importorskip("PIL.Image", reason="the explorer reads pictures with pillow")
from tinytoken.explorer import server  # noqa: E402


@pytest.fixture(scope="module")
def client():
    return testclient.TestClient(server.app(Explorer(), "secret"), base_url="http://127.0.0.1:1234")


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_the_page_is_one_file_and_its_script_is_the_one_that_may_run(client):
    answer = client.get("/secret/")
    assert answer.status_code == 200 and len(answer.content) < 100_000
    assert "src=" not in answer.text and "http" not in answer.text.replace("http.server", "")
    policy = answer.headers["content-security-policy"]
    assert policy == page.policy(answer.text) and "default-src 'none'" in policy and "'sha256-" in policy
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_it_answers_a_question(client):
    answer = client.post("/secret/ask", content='{"scene": 4, "keep": 0.5}')
    assert answer.json()["models"]["dynamicvit"]["stages"][0]["kept"]
    wrong = client.post("/secret/ask", content='{"scene": -1}')
    assert wrong.status_code == 400
    assert wrong.text == "explore: scene -1, expected a whole number from 0 to 99"


@pytest.mark.parametrize("method, path", [("get", "/"), ("get", "/secre/"), ("get", "/%C3%A9/"),
                                          ("post", "/secre/ask"), ("post", "/secre/picture")])
def test_without_the_secret_nothing_is_there(client, method, path):
    assert getattr(client, method)(path).status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:1234", "127.0.0.1.evil.example", ""])
def test_another_name_of_this_machine_is_refused(client, host):
    """DNS rebinding: a page of evil.example, whose name now leads here."""
    assert client.get("/secret/", headers={"host": host}).status_code == 400
    assert client.post("/secret/ask", headers={"host": host}, content='{"scene": 4}').status_code == 400
    assert client.get("/secret/", headers={"host": "localhost:9"}).status_code == 200


def test_a_picture_is_cut_and_scaled(client):
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste("blue", (16, 0, 80, 64))
    answer = client.post("/secret/picture", content=file_of(wide, "JPEG")).json()
    seen = client.post("/secret/ask", content=json.dumps(answer)).json()
    assert seen["pixels"] == answer["pixels"] and seen["label"] is None
    pixels = base64.b64decode(json.loads(server.picture_of(file_of(wide), 32))["pixels"])
    wanted = fitted(wide, (32, 32)).transpose(1, 2, 0)
    assert np.array_equal(np.frombuffer(pixels, "uint8").reshape(32, 32, 3), wanted)
    assert (wanted[:, 1:-1] == (0, 0, 255)).all()


def test_what_is_no_picture_is_refused(client):
    formats = ", ".join(server.FORMATS)
    for data in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        answer = client.post("/secret/picture", content=data)
        assert answer.status_code == 400
        assert answer.text == f"explore: the file is not a picture that pillow can read (none of {formats})"
    cut = client.post("/secret/picture", content=file_of(Image.new("RGB", (64, 64)), "BMP")[:200])
    assert cut.status_code == 400 and "truncated" in cut.text


def test_too_much_is_refused(client, monkeypatch):
    assert client.post("/secret/ask", content=b" " * (server.QUESTION + 1)).status_code == 413
    assert client.post("/secret/picture", content=b" " * (server.PICTURE + 1)).status_code == 413
    monkeypatch.setattr(server, "PIXELS", 99)
    answer = client.post("/secret/picture", content=file_of(Image.new("1", (10, 10))))
    assert answer.status_code == 400 and "it has 100 pixels, expected at most 99" in answer.text


def test_the_command_answers_and_ends_in_one_line(tmp_path):
    run = subprocess.Popen([sys.executable, "-m", "tinytoken", "explore", "--no-browser"], cwd=tmp_path,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = run.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:") and len(address.split("/")[3]) >= 20
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b"Explorer of tokens" in answer.read()
        assert run.stdout.readline() == "(for this machine only; Ctrl-C ends it)\n"
        run.send_signal(signal.SIGINT)
        out, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert (run.returncode, out, errors) == (130, "", "stopped: by Ctrl-C\n")


def test_the_command_refuses(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(capsys, "explore", "--no-browser", "--port", port)
    assert line.startswith(f"explore: port {port}: ")
    assert refused(capsys, "explore", "--port", "65536") == "explore: port 65536, expected 0 to 65535"
    assert refused(capsys, "explore", "--pyodide", ROOT) == "explore: --pyodide is for --static"
