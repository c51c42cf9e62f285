"""A headless Chromium for tests of pages, and for pictures of them. It speaks the DevTools protocol over a pipe, so that
neither a driver nor a package of Python is needed.

Where there is none, it is installed from Debian's packages, given Debian and root; several processes may try at once.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PACKAGES = ("chromium", "fonts-inter", "fonts-jetbrains-mono")  # the fonts that the report asks for first
PATIENCE = 60.0  # seconds for an answer of the browser
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--no-first-run",
)


class NoBrowser(RuntimeError):
    """There is no browser and no way to install one."""


def find() -> str:
    """Path of a Chromium, which is installed if need be.

    Raises:
        NoBrowser: there is none, and this is not Debian or not root.
        RuntimeError: apt-get could not install it.
    """
    found = _found()
    if found:
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoBrowser(f"wanted one of {', '.join(NAMES)} on the path, or Debian and root to install {PACKAGES[0]}")
    with open(Path(tempfile.gettempdir(), "install-chromium.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of these tests may be at it
        found = _found()
        if not found:
            _apt_get("update")
            _apt_get("install", "--yes", "--no-install-recommends", *PACKAGES)
            found = _found()
    if not found:
        raise RuntimeError(f"apt-get installed {' '.join(PACKAGES)}, but none of {', '.join(NAMES)} is on the path")
    return found


def required() -> str:
    """`find`, for a test: without a way to have a browser it is skipped, but under CI (the variable CI) it fails."""
    try:
        return find()
    except NoBrowser as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def _found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _apt_get(*arguments: str) -> None:
    """Waits up to ten minutes for apt's locks, which anyone on the machine may hold."""
    command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600", *arguments]
    until = time.monotonic() + 600
    while True:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        )
        if done.returncode == 0:
            return
        if "Could not get lock" not in done.stderr or time.monotonic() > until:
            raise RuntimeError(f"{' '.join(command)} returned {done.returncode}:\n{done.stdout}{done.stderr}")
        time.sleep(2)


class Browser:
    """A running Chromium. A context manager: at its end every process of it is gone."""

    def __init__(self, executable: str | None = None) -> None:
        self._executable = executable or find()
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []
        self._buffer = b""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        flags = [*_FLAGS, f"--user-data-dir={self._profile.name}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        # Chromium reads commands from descriptor 3 and writes to 4. Ours are moved up first, out of the way of both.
        (commands, self._write), (self._read, answers) = _pipe(), _pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, commands, 3),
            (os.POSIX_SPAWN_DUP2, answers, 4),
            *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)),
        ]
        self._pid = os.posix_spawn(
            self._executable,
            [self._executable, *flags],
            os.environ | {"TMPDIR": self._profile.name},  # it leaves files there
            file_actions=actions,
            setpgroup=0,
        )
        os.close(commands)
        os.close(answers)
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)  # its own group: it and its children
        os.waitpid(self._pid, 0)
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    @contextmanager
    def open(self, path: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> Iterator[Page]:
        """The file in a window of that many CSS pixels, loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.emulate(dark=dark)
        page.resize(width, height)
        page.send("Page.navigate", url=path.resolve().as_uri())
        page.wait("Page.loadEventFired")
        try:
            yield page
        finally:
            self.send("Target.closeTarget", targetId=target)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command, and its result. What else the browser tells meanwhile is kept in order."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._put(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                break
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError(f"{self._executable} {'ended' if ready else f'said nothing for {PATIENCE:.0f} s'}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def events(self, session: str) -> list[dict[str, Any]]:
        """What a page has told so far."""
        return [event for event in self._events if event.get("sessionId") == session]

    def _put(self, message: bytes) -> None:
        while message:
            message = message[os.write(self._write, message) :]


class Page:
    """A tab. Coordinates are CSS pixels."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self._browser.events(self._session)):
            self._browser._events.append(self._browser.receive())

    def emulate(self, *, dark: bool = False, printed: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="print" if printed else "", features=[scheme])

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, or of the promise that it gives; an error in it is raised here."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"].get("description", str(done["exceptionDetails"])))
        return done["result"].get("value")

    def settle(self) -> None:
        """Until what was asked for is on the screen."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the first element that matches."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        """A key of the keyboard: "Tab", "Enter"."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)
        self.settle()

    @property
    def messages(self) -> list[str]:
        """Errors and warnings of the console, and exceptions that nothing caught."""
        self.settle()
        said = []
        for event in self._browser.events(self._session):
            method, told = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                said.append(details.get("exception", {}).get("description", details["text"]))
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                said.append(" ".join(str(part.get("value", part.get("description"))) for part in told["args"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                said.append(told["entry"]["text"])
        return said

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for."""
        self.settle()
        events = self._browser.events(self._session)
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        """PNG of the window, or of the whole page."""
        self.settle()
        clip = {}
        if full:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": size | {"scale": 1}, "captureBeyondViewport": True}
        shot = self.send("Page.captureScreenshot", format="png", **clip)
        path.write_bytes(base64.b64decode(shot["data"]))


def screenshot(
    path_html: Path,
    path_png: Path,
    width: int,
    height: int,
    *,
    dark: bool = False,
    scale: float = 1,
    full: bool = False,
) -> None:
    """The page as a picture of width x height CSS pixels, each `scale` pixels of the PNG."""
    with Browser() as browser, browser.open(Path(path_html), width=width, height=height, dark=dark) as page:
        page.resize(width, height, scale)
        page.screenshot(Path(path_png), full=full)


def _pipe() -> tuple[int, int]:
    """Read and write end, both above 9 and closed in other programs."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved
