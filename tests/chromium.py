"""A headless Chromium for the tests of pages, what serves the pages, and what they ask of it."""
import contextlib
import functools
import http.server
import shutil
import subprocess
import sys
import threading

import pytest


def missing():
    """Why there is no browser to test with; "" where there is one."""
    try:
        import selenium_axe_python  # noqa: F401
        import selenium  # noqa: F401
    except ImportError as error:
        return f"no browser: {error}"
    return "" if shutil.which("chromium") and shutil.which("chromedriver") else "no chromium and chromedriver"


FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars""".split()
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # nobody else is asked


def started(folder):
    """A browser with its data in `folder`."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def files_of(folder):
    """Context: the address of a local web server for a folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def explorer(folder):
    """Context: the address of `tinytoken explore`, started in a folder."""
    with subprocess.Popen([sys.executable, "-m", "tinytoken", "explore", "--no-browser"], text=True,
                          stdout=subprocess.PIPE, cwd=folder) as run:
        try:
            yield run.stdout.readline().strip()
        finally:
            run.terminate()


def size(browser, width, height=1600, dark=False):
    """The width of the window in pixels of a page, also those that a window of the desktop cannot have."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})


def settled(browser, form=None, seconds=120):
    """Wait until the page has answered, in this form if one is said."""
    from selenium.webdriver.support.ui import WebDriverWait
    ready = "let d = document.body.dataset; return d.busy === 'false' && "
    WebDriverWait(browser, seconds, 0.05).until(lambda b: b.execute_script(
        ready + (f"d.form === {form!r}" if form else "'form' in d")))


def errors(browser):
    """What the console says that is no more than a word."""
    return [entry["message"] for entry in browser.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")]


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "there is one")
