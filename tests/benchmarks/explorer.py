"""How long a step of the explorer's sliders takes in Chromium, from the key to the painted answer.

    python tests/benchmarks/explorer.py [--steps N] [--pyodide FOLDER] [--out FILE.json]

A step: an arrow key moves the slider of DynamicViT's keep ratio or of LookupViT's grid by one; it begins at the
time stamp of the input event and ends when the frame that shows the answer has been painted. The form `native`
has the models behind a server of this machine (`tinytoken explore`). `pyodide` runs them in the browser; it
needs a folder with Pyodide and its NumPy, and says "not measured" without one. Other processes disturb this.
"""
import argparse
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
import chromium  # noqa: E402
from timing import quartiles  # noqa: E402
from tinytoken.experiments.timing import machine  # noqa: E402
from tinytoken.explorer import static  # noqa: E402
from tinytoken.files import check_target, write_json  # noqa: E402

LIMIT = 300  # milliseconds that a step may take in the native form
FIRST = 3  # steps before those that count
# In a frame in which the page is no longer busy, the answer is drawn; a message that is sent then arrives after
# the frame was painted.
WATCH = """
window.steps = [];
document.addEventListener("input", event => {
  const painted = new MessageChannel();
  painted.port1.onmessage = () => window.steps.push(performance.now() - event.timeStamp);
  const frame = () => document.body.dataset.busy === "false" ? painted.port2.postMessage(0)
    : requestAnimationFrame(frame);
  requestAnimationFrame(frame);
}, {capture: true});
"""


def there_and_back(count, low, high, start):
    """`count` times the arrow key that leads from `start` up to `high`, down to `low`, and so on."""
    from selenium.webdriver.common.keys import Keys
    at, step = start, 1
    for _ in range(count):
        step = -1 if at == high else 1 if at == low else step
        at += step
        yield Keys.ARROW_RIGHT if step > 0 else Keys.ARROW_LEFT


def text(browser, name):
    """What the page says of a slider, from its answer."""
    return browser.execute_script("return document.getElementById(`${arguments[0]}-text`).textContent", name)


def measured(browser, count):
    """{slider: {"median", "quartiles", "lowest", "highest", "steps"}} in milliseconds, of an open page."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait
    browser.execute_script(WATCH)
    found = {}
    for name in ("keep", "grid"):
        slider = browser.find_element("id", name)
        low, high, start = (int(slider.get_attribute(what)) for what in ("min", "max", "value"))
        browser.execute_script("window.steps.length = 0; arguments[0].focus()", slider)
        shown = [text(browser, name)]
        for done, key in enumerate(there_and_back(count + FIRST, low, high, start), start=1):
            ActionChains(browser, duration=0).send_keys(key).perform()
            WebDriverWait(browser, 60, 0.02).until(
                lambda b, done=done: b.execute_script("return window.steps.length") == done)
            shown.append(text(browser, name))
            if shown[-1] == shown[-2]:
                sys.exit(f"a step of {name} has changed nothing: {shown[-1]}")
        times = browser.execute_script("return window.steps")[FIRST:]
        middle, *quarters = (round(value, 1) for value in quartiles(times))
        found[name] = {"steps": len(times), "median": middle, "quartiles": quarters,
                       "lowest": round(min(times), 1), "highest": round(max(times), 1)}
    if said := chromium.errors(browser):
        sys.exit(f"the page reports {said[0]}")
    return found


def forms(browser, count, pyodide, folder):
    """{form: what was measured, or None}."""
    with chromium.explorer(folder) as address:
        browser.get(address)
        chromium.settled(browser, "native")
        found = {"native": measured(browser, count), "pyodide": None}
    if pyodide:
        static.write(folder / "static", pyodide)
        with chromium.files_of(folder / "static") as address:
            began = time.perf_counter()
            browser.get(address)
            chromium.settled(browser, "pyodide", 300)
            start = {"version": static.VERSION, "seconds_to_start": round(time.perf_counter() - began, 1)}
            found["pyodide"] = start | measured(browser, count)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of each slider (default: 40)")
    parser.add_argument("--pyodide", type=pathlib.Path, help="a folder with Pyodide and its NumPy")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if chromium.missing():
        sys.exit(chromium.missing())
    if options.out:
        check_target(options.out, ".json")
    with tempfile.TemporaryDirectory() as folder:
        browser = chromium.started(pathlib.Path(folder, "profile"))
        try:
            chromium.size(browser, 1280)
            found = forms(browser, options.steps, options.pyodide, pathlib.Path(folder))
            version = browser.capabilities["browserVersion"]
        finally:
            browser.quit()
    for form, sliders in found.items():
        if sliders is None:
            print(f"{form:<8} not measured: no --pyodide")
            continue
        for name in ("keep", "grid"):
            at = sliders[name]
            print(f"{form:<8} {name}: {at['median']:.0f} ms, quartiles {at['quartiles']}, {at['lowest']:.0f} to "
                  f"{at['highest']:.0f} ms, {at['steps']} steps")
    slowest = max(found["native"][name]["highest"] for name in ("keep", "grid"))
    print(f"native: {'every step is under' if slowest < LIMIT else 'NOT every step is under'} {LIMIT} ms")
    if options.out:
        write_json(options.out, {"limit": LIMIT, "slowest_native": slowest, "forms": found,
                                 "chromium": version, "machine": machine("cpu")})


if __name__ == "__main__":
    main()
