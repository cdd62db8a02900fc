"""A headless Chromium, spoken to by its DevTools protocol over two pipes: a page is opened, asked and photographed.

Takes a page's file and how it is looked at; gives what it drew, what its console said, and the addresses that it asked for.
"""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--remote-debugging-pipe", "about:blank"),
)
LEGIBLE = 8.0  # CSS pixels: the size of the smallest font in a picture
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true); 0"
SMALLEST = """Math.min(1000, ...[...document.querySelectorAll('svg text')].map(one => {
    const matrix = one.getScreenCTM()
    return Math.hypot(matrix.a, matrix.b) * parseFloat(getComputedStyle(one).fontSize) }))"""


class Look(NamedTuple):
    """How a page is looked at: width and height in CSS pixels, and the scheme that the reader's system has."""

    width: int
    height: int = 900
    dark: bool = False


class Seen(NamedTuple):
    """`said`: errors and warnings of the console. `asked`: addresses besides the page's own. `widest`: of the document, in CSS
    pixels. `colours`: red, green and blue of what is behind the text, and of the text. `smallest`: of the fonts in
    pictures, in CSS pixels. `png`: the page, whole."""

    said: list[str]
    asked: list[str]
    widest: int
    colours: tuple[list[int], list[int]]
    smallest: float
    texts: str
    png: bytes

    def check(self, look: Look) -> None:
        """What every page of ours is: silent, whole by itself, no wider than the window, in the reader's colours, legible."""
        assert not self.said
        assert not self.asked
        assert self.widest <= look.width, "it scrolls sideways"
        back, ink = self.colours
        dark, light = (back, ink) if look.dark else (ink, back)
        assert max(dark) < 80
        assert min(light) > 200
        assert self.smallest >= LEGIBLE


class Chromium:
    """One that runs. Messages go out and come in as JSON, each ended by a zero byte."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of, self._rest, self._last = to, of, b"", 0
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable", **self._session)

    def see(self, page: Path, look: Look, before: str = "0") -> Seen:
        """Open `page` and look at it. `before`: JavaScript that is run when it has been loaded (to open what is folded)."""
        self._events = []
        metrics = {"width": look.width, "height": look.height, "deviceScaleFactor": 1, "mobile": look.width < 600}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if look.dark else "light"}]
        self._call("Emulation.setDeviceMetricsOverride", **metrics, **self._session)
        self._call("Emulation.setEmulatedMedia", features=scheme, **self._session)
        self._call("Page.navigate", url=page.resolve().as_uri(), **self._session)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._message())
        self._value(before)
        widest = self._value("document.documentElement.scrollWidth")
        colours = [self._value(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")]
        back, ink = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
        smallest = self._value(SMALLEST)
        texts = self._value("document.body.innerText")
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True, **self._session)["data"]
        return Seen([*self._said()], [*self._asked(page)], widest, (back, ink), smallest, texts, base64.b64decode(shot))

    def _said(self) -> Iterator[str]:
        for event in self._events:
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                yield str(told["exceptionDetails"])
            elif event["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                yield str(told["args"])
            elif event["method"] == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                yield str(told["entry"]["text"])

    def _asked(self, page: Path) -> Iterator[str]:
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if url != page.resolve().as_uri() and not url.startswith("data:"):
                    yield url

    def _value(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True, **self._session)["result"][
            "value"
        ]

    def _call(self, method: str, sessionId: str | None = None, **params: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if sessionId is not None:
            message["sessionId"] = sessionId
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._last:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not (more := os.read(self._of, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """A Chromium of one's own, ended when it is left. `profile`: a folder for what it writes."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def as_3_and_4() -> None:
        high = [os.dup(to_read), os.dup(from_write)]
        for number, wanted in zip(high, (3, 4), strict=True):
            os.dup2(number, wanted)

    running = subprocess.Popen(
        [str(CHROMIUM), *FLAGS[:-1], f"--user-data-dir={profile}", FLAGS[-1]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=as_3_and_4,
        start_new_session=True,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Chromium(to_write, from_read)
    finally:
        os.close(to_write)
        os.close(from_read)
        running.terminate()
        running.wait(30)
