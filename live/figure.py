"""Remakes docs/live.png: the page in Chromium. The tests use the same browser, see tests/test_live.py."""

import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def chromium(folder):
    """A browser without a window, 1440 x 900. Downloads go to the folder."""
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
        size = {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield browser
    finally:
        browser.quit()


def until(condition):
    """Waits until the function `condition` gives something true."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def main():
    path, start = ROOT / "docs" / "live.png", [sys.executable, "live", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser:
        browser.get(server.stdout.readline().strip() + "#prompt=a+panda+on+a+blue+background&seed=3&compare=on")
        until(lambda: browser.execute_script("return ROWS.many.answer && !busy"))
        for _ in range(4):  # the times shown are medians of five
            browser.execute_script("for (const row in ROWS) ROWS[row].asked = null; return changed()")
        time.sleep(1)  # until the pictures have faded in
        browser.save_screenshot(str(path))
    server.terminate()
    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main()
