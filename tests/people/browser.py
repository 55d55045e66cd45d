"""A headless Chromium, driven by its own protocol (https://chromedevtools.github.io/devtools-protocol)."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
PATIENCE = 60  # seconds without an answer, after which the browser counts as broken
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection, *, width: int, height: int, phone: bool):
        self._connection = connection
        self._number = 0
        self._session: str | None = None
        context = self._send("Target.createBrowserContext")["browserContextId"]  # cookies and storage of its own
        target = self._send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        scale = 2 if phone else 1
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                   mobile=phone)  # fmt: skip
        self._send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def open(self, url: str) -> None:
        self._send("Page.enable")
        self._send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def until(self, condition: str) -> Any:
        """Wait until a JavaScript expression is true; its value."""
        return self.value(
            f"new Promise((resolve) => {{ const look = () => {{ const found = ({condition});"
            " found ? resolve(found) : requestAnimationFrame(look); }; look(); })"
        )

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of its promise."""
        found = self._send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector: str) -> None:
        place = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def type(self, selector: str, text: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self._send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            code = KEYS.get(key, ord(key[0].upper()))
            self._send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                       **(text if kind == "keyDown" else {}))  # fmt: skip

    def swipe(self, selector: str, x: int, y: int) -> None:
        """One finger from the middle of an element by x and y pixels."""
        place = self._middle(selector)
        end = {"x": place["x"] + x, "y": place["y"] + y}
        self._send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        self._send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[end])
        self._send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _middle(self, selector: str) -> dict[str, float]:
        return self.value(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
        )

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": params, **session}))
        while (answer := json.loads(self._connection.recv(timeout=PATIENCE))).get("id") != self._number:
            pass  # events of the page
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]


class Browser:
    def __init__(self, address: str):
        self._address = address
        self._open: list[ClientConnection] = []

    def page(self, *, width: int = 1280, height: int = 800, phone: bool = False) -> Page:
        connection = connect(self._address, max_size=None)
        self._open.append(connection)
        return Page(connection, width=width, height=height, phone=phone)

    def close(self) -> None:
        for connection in self._open:
            connection.close()


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start the browser with a profile in `folder`."""
    assert PROGRAM is not None
    command = [PROGRAM, "--headless=new", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
               "--remote-debugging-port=0", f"--user-data-dir={folder}"]  # fmt: skip
    if os.geteuid() == 0:  # its sandbox refuses root
        command.append("--no-sandbox")
    process = subprocess.Popen([*command, "about:blank"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        found = next(filter(None, (re.search(r"ws://\S+", line) for line in lines)))
        browser = Browser(found.group())
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)
        process.stderr.close()
