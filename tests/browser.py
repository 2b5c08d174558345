"""A headless Chromium for tests of pages, driven by Selenium.

Browser and chromedriver are the system's (packages chromium and chromium-driver): nothing is
downloaded, and tests are skipped where one is missing.
"""

import shutil
import time
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")
START_SECONDS = 180
GROUP = pytest.mark.xdist_group("browser")  # one browser for all
NEEDED = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER),
    reason=f"no {'chromedriver (package chromium-driver)' if _CHROMIUM else 'chromium'}: "
    "the pages are not tested in a browser",
)


class _PatientService(webdriver.ChromeService):
    """A chromedriver that may take minutes to start, as on a busy machine."""

    _end = 0.0

    def start(self):
        self._end = time.monotonic() + START_SECONDS
        super().start()
        self._end = 0.0  # the end of the process is seen at once

    def is_connectable(self):
        while not super().is_connectable() and time.monotonic() < self._end:
            self.assert_process_still_running()
            time.sleep(0.1)
        return super().is_connectable()


@contextmanager
def started():
    """A browser with one window; see the fixture `window`."""
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, _PatientService(_DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver, width=1280, height=900):
    """Sets the size of the page; a window itself is at least 500 pixels wide."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(driver, condition):
    """Waits until an expression of JavaScript is true."""
    WebDriverWait(driver, 60).until(
        lambda driver: driver.execute_script(f"return Boolean({condition})"), f"never: {condition}"
    )


def find(driver, selector):
    """The first element that a CSS selector matches."""
    return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver, selector):
    """The visible text of each element that a CSS selector matches."""
    return [element.text.strip() for element in driver.find_elements(By.CSS_SELECTOR, selector)]


def problems(driver):
    """Warnings and errors in the console since the last call."""
    log = driver.get_log("browser")
    return [entry["message"] for entry in log if entry["level"] in {"SEVERE", "WARNING"}]
