"""The explorer's page in a browser: it answers as Python does, by keyboard alone, readable, without errors."""
import base64
import contextlib
import os
import time

import numpy as np
import pytest

import chromium
from tiny import ROOT
from tinytoken.explorer import models, static
from tinytoken.explorer.look import Explorer

pytestmark = [pytest.mark.slow, chromium.needs_browser,
              pytest.mark.filterwarnings("default::ResourceWarning")]
PYODIDE = os.environ.get("TINYTOKEN_PYODIDE")  # a folder with Pyodide and its NumPy


@pytest.fixture(scope="module")
def explorer():
    return Explorer()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = chromium.started(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with chromium.explorer(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def page(browser, address):
    chromium.size(browser, 1280)
    browser.get(address)
    chromium.settled(browser, "native")
    return browser


@pytest.fixture
def serve(tmp_path):
    """A function: write the static form, with this folder of Pyodide's -> its address."""
    with contextlib.ExitStack() as servers:
        def start(pyodide, explorer):
            static.write(tmp_path / "out", pyodide, explorer)
            return servers.enter_context(chromium.files_of(tmp_path / "out"))
        yield start


def move(browser, name, value):
    """Move a slider, as a pointer would."""
    browser.execute_script("let s = document.getElementById(arguments[0]); s.value = arguments[1];"
                           "s.dispatchEvent(new Event('input'))", name, value)
    chromium.settled(browser)


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def shares(browser):
    """The table of the page: (classes, 3) in percent."""
    rows = browser.execute_script("return [...document.getElementById('classes').rows].map(row =>"
                                  "[...row.cells].slice(1).map(cell => parseFloat(cell.textContent)))")
    return np.array(rows)


def agree(browser, explorer, **asked):
    """What the page holds and shows is what Python says: probabilities to 1e-4, multiply-adds, tokens."""
    there, wanted = browser.execute_script("return reply.models"), explorer.look(**asked)["models"]
    for name in models.NAMES:
        gaps = np.subtract(there[name]["probabilities"], wanted[name]["probabilities"])
        assert np.abs(gaps).max() < 1e-4 and there[name]["macs"] == wanted[name]["macs"]
    assert there["dynamicvit"]["stages"] == wanted["dynamicvit"]["stages"]
    table = np.array([wanted[name]["probabilities"] for name in models.NAMES]).T
    assert np.abs(shares(browser) - 100 * table).max() <= 0.06


def test_it_classifies_as_python_does_and_the_sliders_change_it(page, explorer):
    agree(page, explorer, scene=0)
    before = text(page, "keep-text"), text(page, "dynamicvit-macs")
    move(page, "keep", 0)
    assert text(page, "keep-text") == "0.30 (of 64: 19, 5, 1)" and before[0] == "0.70 (of 64: 44, 31, 21)"
    assert text(page, "dynamicvit-macs") != before[1]
    agree(page, explorer, scene=0, keep=0.3)
    move(page, "grid", 6)
    assert text(page, "grid-text") == "6 × 6 = 36"
    agree(page, explorer, scene=0, keep=0.3, grid=6)
    assert chromium.errors(page) == []


def test_the_keyboard_is_enough(page, explorer):
    """Every control is reached by Tab, in order; arrows move sliders and the brush, space and Enter press."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        for key in keys:
            ActionChains(page).send_keys(key).perform()
        time.sleep(0.05)
        chromium.settled(page)

    def focused():
        return page.execute_script("let e = document.activeElement;"
                                   "return e.id || e.getAttribute('aria-label')")
    reached = []
    for _ in range(20):
        press(Keys.TAB)
        reached.append(focused())
    assert [name for name in reached if name and "Colour" not in name] == [
        "picture", "scene", "before", "after", "file", "brush", "clear", "keep", "grid", "block", "token"]
    page.execute_script("document.activeElement.blur(); document.getElementById('picture').focus()")
    press(Keys.TAB, Keys.TAB, Keys.TAB, Keys.ENTER)  # the next scene
    agree(page, explorer, scene=1)
    page.execute_script("document.getElementById('keep').focus()")
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    agree(page, explorer, scene=1, keep=0.8)
    page.execute_script("document.getElementById('picture').focus()")
    press(Keys.ARROW_LEFT, Keys.ARROW_UP, " ")
    drawn = explorer.look(scene=1)["pixels"]
    pixels = np.frombuffer(base64.b64decode(drawn), "uint8").reshape(32, 32, 3).copy()
    pixels[15:17, 15:17] = 225, 60, 55
    agree(page, explorer, pixels=base64.b64encode(pixels.tobytes()).decode(), keep=0.8)
    assert chromium.errors(page) == []


def test_a_file_of_the_users(page, explorer):
    page.find_element("id", "file").send_keys(str(ROOT / "tinytoken" / "data" / "samples" / "star.png"))
    time.sleep(0.5)
    chromium.settled(page)
    assert text(page, "vit-answer").startswith("star") and text(page, "caption").startswith("Your picture.")
    page.find_element("id", "file").send_keys(str(ROOT / "pyproject.toml"))
    time.sleep(0.5)
    assert "is not a picture that pillow can read" in text(page, "error")
    assert all("400" in line for line in chromium.errors(page))


def test_a_picture_is_dropped(page, explorer):
    page.execute_script("""
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], "star.png", {type: "image/png"}));
        document.getElementById("picture").dispatchEvent(new DragEvent("drop", {dataTransfer, cancelable: true}));
        """, base64.b64encode((ROOT / "tinytoken" / "data" / "samples" / "star.png").read_bytes()).decode())
    time.sleep(0.5)
    chromium.settled(page)
    assert text(page, "vit-answer").startswith("star") and text(page, "caption").startswith("Your picture.")
    agree(page, explorer, pixels=page.execute_script("return source.pixels"))
    assert chromium.errors(page) == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible_and_fits(page, width, dark):
    from selenium_axe_python import Axe
    chromium.size(page, width, dark=dark)
    axe = Axe(page)
    axe.inject()
    found = axe.run()["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_without_pyodide_it_says_so_and_shows_the_recorded_scenes(browser, explorer, serve):
    browser.get(serve(None, explorer))  # this browser asks nobody else
    chromium.settled(browser, "without")
    assert text(browser, "state").startswith("Pyodide cannot be loaded here (")
    assert "6 recorded scenes" in text(browser, "state")
    agree(browser, explorer, scene=0)
    move(browser, "keep", 4)
    browser.execute_script("document.getElementById('after').click()")
    chromium.settled(browser)
    agree(browser, explorer, scene=1, keep=0.5)
    assert not browser.find_element("id", "file").is_enabled()
    assert all(f"{static.DISTRIBUTION}pyodide.mjs" in line for line in chromium.errors(browser))


@pytest.mark.skipif(not PYODIDE, reason="TINYTOKEN_PYODIDE names no folder with Pyodide and its NumPy")
def test_pyodide_says_what_python_says(browser, explorer, serve):
    browser.get(serve(PYODIDE, explorer))
    chromium.settled(browser, "pyodide", 300)
    assert text(browser, "state") == "The models run in this browser, by Pyodide and this package."
    agree(browser, explorer, scene=0)
    move(browser, "keep", 2)
    move(browser, "grid", 5)
    agree(browser, explorer, scene=0, keep=0.4, grid=5)
    browser.execute_script("document.getElementById('clear').click()")
    chromium.settled(browser)
    pixels = browser.execute_script("return source.pixels")
    agree(browser, explorer, pixels=pixels, keep=0.4, grid=5)
    assert chromium.errors(browser) == []
