"""A browser for tests, headless: Chrome's protocol over a pipe (https://chromedevtools.github.io/devtools-protocol)."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    " ": (32, " "),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    "End": (35, ""),
}


class Browser:
    """Raises FileNotFoundError where there is none."""

    def __init__(self, folder):
        program = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not program:
            raise FileNotFoundError
        (its_in, self.to), (self.back, its_out) = os.pipe(), os.pipe()
        its_in, its_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (its_in, its_out))  # clear of 3 and 4
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        self.process = subprocess.Popen([program, *options], pass_fds=(3, 4), stderr=subprocess.DEVNULL,
                                        preexec_fn=lambda: (os.dup2(its_in, 3), os.dup2(its_out, 4)))  # fmt: skip
        self.number, self.rest, self.problems = itertools.count(1), b"", []

    def call(self, method, session=None, **params):
        """The result of a command; what a page throws in the meantime is kept in `problems`."""
        number = next(self.number)
        what = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.to, json.dumps(what).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.back, 1 << 16) or b"{}\0"
            message, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(message)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") and "status of 400" not in str(
                message
            ):
                self.problems.append(message["params"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def close(self):
        self.process.kill()
        self.process.wait()


class Tab:
    def __init__(self, browser, url, width=1280, height=800, scheme="light"):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.look(width, height, scheme)
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def look(self, width, height, scheme):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def js(self, text):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (text, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, text, seconds=120):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(text):
            assert time.monotonic() < end, f"never true: {text}"
            time.sleep(0.05)

    def press(self, key, times=1):
        code, text = KEYS[key]
        event = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def mouse(self, kind, x, y):
        event = {"x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **event)

    def click(self, x, y):
        self.mouse("Pressed", x, y)
        self.mouse("Released", x, y)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
