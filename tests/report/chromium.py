"""A headless Chromium that is driven through the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_LAUNCH = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
           "os.execvp(sys.argv[3], sys.argv[3:])")


def executable() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `messages` has the errors and warnings of the console, and uncaught exceptions."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest = send, receive, b""
        self._id, self._session = 0, ""
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._seen: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True},
                                   )["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Network.emulateNetworkConditions", {
            "offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(0, deadline - time.time()))
            if not ready or not (data := os.read(self._receive, 1 << 20)):
                raise TimeoutError("chromium does not answer")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _call(self, method: str, params: Any = None, seconds: float = 60) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params or {}}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data):]
        deadline = time.time() + seconds
        while True:
            found = self._next(deadline)
            if found.get("id") == self._id:
                assert "error" not in found, found["error"]
                return found["result"]
            self._event(found)

    def _event(self, found: dict[str, Any]) -> None:
        method, params = found.get("method", ""), found.get("params", {})
        self._seen.append(method)
        if method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"])[:600])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.messages.append(str(params["entry"])[:600])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.messages.append(str(params["args"])[:600])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
                "data:"):
            self.requests.append(params["request"]["url"][:200])

    def open(self, path: pathlib.Path, width: int = 1280, height: int = 900,
             dark: bool = False) -> None:
        """Open a file in a window of a size in CSS pixels, and wait until it is drawn."""
        self.messages.clear()
        self.requests.clear()
        self.window(width, height, dark)
        self._seen.clear()
        self._call("Page.navigate", {"url": path.as_uri()})
        deadline = time.time() + 60
        while "Page.loadEventFired" not in self._seen:
            self._event(self._next(deadline))
        self.settle()

    def window(self, width: int, height: int, dark: bool) -> None:
        """Set the size of the window and the preferred colour scheme."""
        self._call("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        self._call("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})

    def settle(self) -> None:
        """Wait until three frames are drawn."""
        self.run("new Promise((done) => { let n = 0; const next = () => ++n > 3 ? done(1) : "
                 "requestAnimationFrame(next); next(); })")

    def run(self, code: str) -> Any:
        """Evaluate an expression in the page, and return its value (a promise's result)."""
        found = self._call("Runtime.evaluate", {
            "expression": code, "awaitPromise": True, "returnByValue": True})
        assert "exceptionDetails" not in found, str(found["exceptionDetails"])[:600]
        return found["result"].get("value")

    def key(self, name: str) -> None:
        """Press and release a key, such as "ArrowRight"."""
        code = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", {
                "type": kind, "key": name, "code": name, "windowsVirtualKeyCode": code})
        self.settle()

    def picture(self, path: pathlib.Path, whole: bool = False) -> None:
        """Write a screenshot of the window, or of the whole page, as PNG."""
        more: dict[str, Any] = {}
        if whole:
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        data = self._call("Page.captureScreenshot", {"format": "png", **more})["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def started(folder: pathlib.Path) -> Iterator[Browser]:
    """Context manager: start Chromium with a new profile in a folder, and yield its tab."""
    path = executable()
    assert path is not None
    to_read, send = os.pipe()
    receive, to_write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(to_read), str(to_write), path, "--headless=new",
         "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
         f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    os.close(to_read)
    os.close(to_write)
    try:
        browser = Browser(send, receive)
        yield browser
        browser._session = ""
        browser._call("Browser.close")
    finally:
        os.close(send)
        os.close(receive)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
