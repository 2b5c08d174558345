"""A headless Chromium, driven through chromedriver by the W3C's WebDriver protocol: plain HTTP.

Both come from the distribution's packages (chromium, chromium-driver); no Python package is needed.
"""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of a reference
ENTER, ESCAPE, ARROW_DOWN, ARROW_RIGHT = "\ue007", "\ue00c", "\ue015", "\ue014"
_ANSWER = 60  # seconds


def missing():
    """Which program is missing; none if all are there."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return "chromium"
    return None if shutil.which("chromedriver") else "chromedriver (package chromium-driver)"


class Browser:
    """One window.

    Args:
        size: width and height in pixels.
        dark: prefer dark pages.
    """

    def __init__(self, size=(1280, 900), dark=False):
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._start(size, dark)
        except BaseException:
            self.close()
            raise

    def _start(self, size, dark):
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        else:
            raise RuntimeError("chromedriver ended before it listened")
        self._address = f"http://127.0.0.1:{found[1]}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += [f"--window-size={size[0]},{size[1]}", "--hide-scrollbars"]
        arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
        options = {"args": arguments}
        if shutil.which("chromium"):
            options["binary"] = shutil.which("chromium")
        wanted = {
            "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        }
        self._session = ""
        self._session = "/session/" + self._post("/session", capabilities=wanted)["sessionId"]

    def _call(self, method, path, body=None):
        request = urllib.request.Request(
            self._address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(json.load(error)["value"]["message"]) from None

    def _post(self, path, **body):
        return self._call("POST", path, body)

    def open(self, address):
        """Goes to a page and waits until it is loaded."""
        self._post(self._session + "/url", url=address)

    def run(self, script, *arguments):
        """What a script returns."""
        return self._post(self._session + "/execute/sync", script=script, args=list(arguments))

    def find(self, selector):
        """The first element, as a reference."""
        found = self._post(self._session + "/element", using="css selector", value=selector)
        return found[ELEMENT]

    def type(self, selector, keys):
        """Types into an element, without emptying it."""
        self._post(f"{self._session}/element/{self.find(selector)}/value", text=keys)

    def click(self, selector):
        """Clicks an element as a person would: it must be visible."""
        self._post(f"{self._session}/element/{self.find(selector)}/click")

    def press(self, key):
        """Presses a key where the focus is."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._post(
            self._session + "/actions", actions=[{"type": "key", "id": "keys", "actions": keys}]
        )

    def texts(self, selector):
        """The visible text of each element."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())",
            selector,
        )

    def wait(self, condition):
        """Waits until an expression of JavaScript holds."""
        end = time.monotonic() + _ANSWER
        while not self.run(f"return Boolean({condition})"):
            if time.monotonic() > end:
                raise AssertionError(f"never held: {condition}")
            time.sleep(0.05)

    def problems(self):
        """What the console complained of since the last call."""
        entries = self._post(self._session + "/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in {"SEVERE", "WARNING"}]

    def screenshot(self, path):
        """The window as PNG."""
        content = self._call("GET", self._session + "/screenshot")
        path.write_bytes(base64.b64decode(content))

    def close(self):
        """Ends the browser."""
        if getattr(self, "_session", ""):
            with contextlib.suppress(RuntimeError, OSError):
                self._call("DELETE", self._session)
        self._driver.terminate()
        self._driver.wait(timeout=10)
        self._driver.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
