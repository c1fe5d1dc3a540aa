"""A headless Chromium driven through its DevTools protocol over a pair of pipes: standard library only, no network.

`python tests/browser/chromium.py PAGE.html OUT.png [--width 400] [--dark] [--top] [--run SCRIPT]` takes a picture.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--disable-dev-shm-usage", "--remote-debugging-pipe")
PATIENCE = 300.0
"""Seconds to wait for anything: a busy machine is no fault of a page."""
PIPES = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
"""Chromium reads commands from descriptor 3 and writes answers to 4."""


def find() -> str | None:
    """Chromium's path, or Chrome's."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """One page: what went wrong on it, and what can be done to it."""

    def __init__(self, read: int, write: int) -> None:
        self._from, self._to, self._number = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0), 0
        self._buffer = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        """Errors, warnings and uncaught exceptions of the console, and failed loads."""
        self.loaded: list[str] = []
        """Every address that was asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; its answer. Events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = self._from.read(1 << 16)
            if not chunk:
                raise RuntimeError("the browser ended")
            self._buffer += chunk
        head, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(head)
        if "method" in message:
            self.events.append(message)
            self._complain(message["method"], message["params"])
        return message

    def _complain(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.loaded.append(params["request"]["url"])
        elif method == "Network.loadingFailed":
            self.complaints.append(f"could not load: {params['errorText']}")

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file at a size and in a colour scheme; returns when it is loaded and laid out."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + PATIENCE
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{page} did not load in {PATIENCE:.0f} s")
            self._receive()
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is awaited."""
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in out:
            details = out["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return out["result"].get("value")

    def _middle(self, selector: str) -> tuple[float, float]:
        x, y = self.js(f"""(() => {{
            const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{ block: "center", inline: "center" }});
            const box = e.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];
        }})()""")
        return x, y

    def hover(self, selector: str) -> None:
        """The pointer over the middle of the first element that fits."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key by its name: Tab, Enter, ArrowRight, Escape, a letter."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
                 "ArrowRight": 39, "ArrowDown": 40, " ": 32}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        about: dict[str, Any] = {"key": key, "code": "Space" if key == " " else key}
        about["windowsVirtualKeyCode"] = codes.get(key, ord(key[0].upper()))
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page, or of what is in view."""
        self.call("Page.bringToFront")
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(program: str | None = None) -> Iterator[Page]:
    """A page of a browser of its own, with an empty profile that goes with it."""
    program = program or find()
    if program is None:
        raise FileNotFoundError("no chromium, chromium-browser or google-chrome on PATH")
    read, chromium_writes = os.pipe()
    chromium_reads, write = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (chromium_reads, chromium_writes)]  # out of the way of 3 and 4
    os.close(chromium_reads)
    os.close(chromium_writes)
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [sys.executable, "-IS", "-c", PIPES, *map(str, high), program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in high:
            os.close(fd)
        try:
            page = Page(read, write)
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """Take a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", help="PAGE.html OUT.png, one pair or several")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--top", action="store_true", help="only what is in view")
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--run", default="", help="JavaScript before the picture")
    args = parser.parse_args()
    with browser() as page:
        for source, out in zip(args.jobs[::2], args.jobs[1::2], strict=True):
            page.open(Path(source), args.width, args.height, args.dark)
            if args.run:
                page.js(args.run)
            page.picture(Path(out), whole=not args.top)
            wide = page.js("document.documentElement.scrollWidth")
            print(out, f"{wide} px wide of {args.width}", *page.complaints)


if __name__ == "__main__":
    main()
