"""Takes the picture of the explorer that the README begins with, lessons/results/explorer.png.

    python lessons/tools/explorer_picture.py                   # needs Chromium and its driver
    python lessons/tools/explorer_picture.py --width 390 --dark --out phone.png

The page is `tinytoken explore`'s, in the headless Chromium of the tests, 1280 pixels wide. Chromium's pictures
have 16 million colours; of these 256 are kept, which makes the file a third as large.
"""
import argparse
import io
import pathlib
import sys
import tempfile

from tinytoken.files import check_target, replacing

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
import chromium  # noqa: E402

SCENE, BOTTOM = 1, "main > section:nth-child(3)"  # what is shown: from the page's top to the end of the models


def picture(width, dark):
    """The page as a PNG of Chromium's, from its top to the end of the models."""
    with tempfile.TemporaryDirectory() as folder, chromium.explorer(folder) as address:
        browser = chromium.started(folder)
        try:
            chromium.size(browser, width, 4000, dark)
            browser.get(address)
            chromium.settled(browser, "native")
            browser.execute_script("goTo(arguments[0])", SCENE)
            chromium.settled(browser)
            bottom = browser.execute_script("return document.querySelector(arguments[0])"
                                            ".getBoundingClientRect().bottom", BOTTOM)
            chromium.size(browser, width, int(bottom) + 8, dark)
            return browser.get_screenshot_as_png()
        finally:
            browser.quit()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "lessons" / "results" / "explorer.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    if chromium.missing():
        sys.exit(chromium.missing())
    check_target(options.out, ".png")
    from PIL import Image
    shot = Image.open(io.BytesIO(picture(options.width, options.dark))).convert("RGB")
    with replacing(options.out) as file:
        shot.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    print(f"{options.out}: {shot.width} x {shot.height}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
