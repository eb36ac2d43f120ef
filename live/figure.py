"""Remakes docs/live.png: the page in Chromium. The tests use the same page, see tests/test_live.py."""

import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from live.__main__ import Painter, Server  # noqa: E402


@contextmanager
def serving(model):
    """A server of a model, in a thread."""
    with Server(0, Painter(model, device="cpu")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            server.painter.thread.shutdown()


@contextmanager
def chromium(folder, width=1280, height=900):
    """A browser without a window. Downloads go to the folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless", "no-sandbox", "disable-gpu", f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))  # this one: Selenium downloads none
    try:
        resize(browser, width, height)
        yield browser
    finally:
        browser.quit()


def resize(browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def until(condition):
    """Waits until the function `condition` gives something true."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Page:
    """What can be seen of the page and done to it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get("about:blank")  # so that another # loads it anew
        browser.get(address)

    def __getitem__(self, selector):
        return self.browser.find_element("css selector", selector)

    def js(self, script):
        return self.browser.execute_script("return " + script)

    def picture(self, row="hipa"):
        """A data URL"""
        return self[f"[data-row={row}] img"].get_attribute("src")

    def shown(self, prompt, row="hipa", other_than=None):
        """Waits for a picture of this prompt, and until the page rests -> the picture"""
        image = f"[data-row={row}] img"
        until(lambda: (self[image].get_attribute("alt") or "").startswith(prompt + ", "))
        until(lambda: self.picture(row) != other_than and self.js("busy === null"))
        return self.picture(row)


def main():
    prompt, path = "a panda on a blue background", ROOT / "docs" / "live.png"
    with tempfile.TemporaryDirectory() as folder, serving("emoji") as server:
        with chromium(Path(folder), 1088, 1170) as browser:
            page = Page(browser, f"{server.address}#prompt={prompt.replace(' ', '+')}&seed=3&compare=true")
            for _ in range(5):  # the times shown are one reading, of the fifth picture
                page.shown(prompt, "many")
                page.js("Object.values(ROWS).forEach((row) => { row.asked = null; }), changed()")
            page.shown(prompt, "many")
            time.sleep(1)  # until the pictures have faded in
            browser.save_screenshot(str(path))
    Image.open(path).convert("RGB").save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
