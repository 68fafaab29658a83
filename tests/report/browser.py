"""A browser driven through a pipe, by the standard library alone: pages at any width, what they ask for, what they show."""

from __future__ import annotations

import base64
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

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page in a browser of its own."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest, self._count = send, receive, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", session=False, url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", session=False, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    _session: str | None = None

    def __call__(self, method: str, *, session: bool = True, **params: Any) -> dict[str, Any]:
        """A command of the browser's protocol and its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + 90
        while b"\0" not in self._rest:
            assert select.select([self._receive], [], [], max(0.0, end - time.monotonic()))[0], "the browser is silent"
            self._rest += os.read(self._receive, 1 << 16)
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Load a page of the disk in a window of so many pixels, and wait for it."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url=page.as_uri())
        self.loaded(1)

    def loads(self) -> int:
        """How many pages this tab has loaded so far."""
        return sum(event.get("method") == "Page.loadEventFired" for event in self.events)

    def loaded(self, times: int) -> None:
        """Wait until it has loaded so many, and until the last one can draw."""
        while self.loads() < times:
            self.events.append(self._next())
        self.wait("window.Plotly || !document.getElementById('charts')")

    def another(self) -> Tab:
        """A new tab of the same browser."""
        return Tab(self._send, self._receive)

    def run(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        answer = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.1)

    def draw_all(self) -> None:
        """Have every chart drawn that is not behind a choice, wherever it is on the page."""
        self.run(_VISIBLE)
        self.run("dispatchEvent(new Event('beforeprint'))")
        places = "[...document.querySelectorAll('[data-chart]')].filter((p) => p.offsetParent)"
        self.wait(f"{places}.every((p) => p.dataset.settled)")

    def picture(self, path: Path, height: int) -> None:
        """The page from its top as a PNG."""
        size = {"x": 0, "y": 0, "width": self.run("innerWidth"), "height": height, "scale": 1}
        answer = self("Page.captureScreenshot", clip=size, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def asked(self) -> set[str]:
        """Addresses that the page asked for, beside its own file."""
        known = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return {address for address in known if not address.startswith(("data:", "blob:"))}

    def complaints(self) -> list[str]:
        """Errors of the page's scripts, and what its policy stopped."""
        found = [
            str(e["params"]["exceptionDetails"]) for e in self.events if e.get("method") == "Runtime.exceptionThrown"
        ]
        logged = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        return found + [entry["text"] for entry in logged if entry["level"] == "error"]


@contextmanager
def browser() -> Iterator[Tab]:
    """A browser for one page; it is ended afterwards."""
    assert BROWSER is not None
    profile = tempfile.mkdtemp()
    commands, answers = os.pipe(), os.pipe()

    def numbered() -> None:  # the browser reads commands from 3 and answers on 4
        reading, writing = os.dup(commands[0]), os.dup(answers[1])
        high = [os.dup2(reading, 100), os.dup2(writing, 101)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [BROWSER, *options, f"--user-data-dir={profile}"],
        preexec_fn=numbered,
        close_fds=False,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Tab(commands[1], answers[0])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for end in (*commands, *answers):
            os.close(end)
        shutil.rmtree(profile, ignore_errors=True)


# Parts far from the window are laid out, too.
_VISIBLE = """
document.head.append(Object.assign(document.createElement("style"),
  {textContent: "section{content-visibility:visible!important}"}))
"""

# Pairs of texts whose boxes overlap, and texts beyond the window's right edge. Boxes are those of lines of text, of
# everything that is to be seen; what lies in a closed menu or behind a choice is not.
OVERLAPS = """
(() => {
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script,style,noscript,.skip,.modebar,.hoverlayer,#filter .menu")) continue;
    if (!parent.checkVisibility({checkOpacity: true, checkVisibilityCSS: true, contentVisibilityAuto: true})) continue;
    const cut = parent.closest(".cut");
    const limit = cut ? cut.getBoundingClientRect().right : Infinity;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) {
      if (r.width > 1 && r.height > 1) boxes.push({l: r.left, r: Math.min(r.right, limit), t: r.top, b: r.bottom, node,
        of: parent.closest("text") || node, text: node.textContent.trim().slice(0, 40)});
    }
  }
  const found = [], cells = new Map(), size = 200;
  for (const box of boxes) {
    for (let x = Math.floor(box.l / size); x <= box.r / size; x++)
      for (let y = Math.floor(box.t / size); y <= box.b / size; y++) {
      const key = x + "," + y;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(box);
    }
  }
  const seen = new Set();
  for (const cell of cells.values()) for (let i = 0; i < cell.length; i++) for (let j = i + 1; j < cell.length; j++) {
    const [a, b] = [cell[i], cell[j]];
    if (a.of === b.of) continue;
    const w = Math.min(a.r, b.r) - Math.max(a.l, b.l), h = Math.min(a.b, b.b) - Math.max(a.t, b.t);
    // Lines of text stand closer than their boxes are high.
    if (w > 1.5 && h > 0.25 * Math.min(a.b - a.t, b.b - b.t)) {
      const where = a.node.parentElement.closest("figure,section,div[id]");
      const pair = `${a.text} | ${b.text} | ${where ? (where.querySelector("h2,h4") || {}).textContent || where.id : ""}`;
      if (!seen.has(pair)) { seen.add(pair); found.push(pair); }
    }
  }
  const wide = boxes.filter((b) => b.r > innerWidth + 1 && !b.node.parentElement.closest(".scroll,pre"));
  return {texts: boxes.length, overlaps: found, beyond: wide.map((b) => b.text),
    sideways: document.documentElement.scrollWidth > innerWidth + 1,
    // Tables that are to be seen and wider than their place, and any that scrolls downwards.
    tables: [...document.querySelectorAll(".scroll")].filter((s) => s.checkVisibility({contentVisibilityAuto: true}) &&
      (s.scrollWidth > s.clientWidth + 1 || s.scrollHeight > s.clientHeight + 1)).map((s) => s.getAttribute("aria-label"))};
})()
"""
