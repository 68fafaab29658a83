"""The page in a real browser: charts appear, nothing a record holds runs, and nobody is asked for anything."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.records import Record
from locallearn.report import _page, write_report

Make = Callable[..., Record]
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")


def dom(page: Path, profile: Path, height: int = 12_000) -> str:
    """The page's elements after its scripts have run."""
    assert BROWSER is not None
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += f" --disable-component-update --disable-sync --window-size=1280,{height} --virtual-time-budget=20000"
    options += f" --log-net-log={profile}.json"
    command = [BROWSER, *options.split(), f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    for _ in range(3):  # on a machine with other work the browser's own clock may run out before a chart is drawn
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        if drawn(text):
            break
    return text


def drawn(text: str) -> int:
    """Number of charts that Plotly has drawn."""
    return len(re.findall(r'class="plot-container', text))


def placed(page: Path) -> int:
    """Number of charts that are to be seen: those of runs that are not chosen are drawn when they are."""
    body = page.read_text().partition('<script type="application/json"')[0]
    hidden = re.findall(r'<div data-choice="\d+" hidden>(.*?)</figure></div></div>', body, re.DOTALL)
    return body.count("data-chart=") - sum(part.count("data-chart=") for part in hidden)


def test_every_chart_is_drawn_and_every_block_has_its_line(make: Make, tmp_path: Path) -> None:
    records = [make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1)]
    page = write_report(records, tmp_path / "r.html", title="Two rules")
    text = dom(page, tmp_path / "profile")
    assert "<title>Two rules</title>" in text
    places = placed(page)
    assert drawn(text) == places == 13
    assert text.count('class="main-svg"') >= places
    assert len(re.findall(r'class="js-line"', text)) >= 4


def test_names_with_scripts_stay_text(make: Make, tmp_path: Path) -> None:
    values = {"dataset": NASTY, "net": NASTY, "blocks": [NASTY], "config": {NASTY: NASTY}}
    link = '<a href="javascript:document.title=1">x</a>'
    records = [make(NASTY, 0, **values), make("backprop", 0, **values), make(link, 0, **values)]
    text = dom(write_report(records, tmp_path / "r.html", title="Safe"), tmp_path / "profile")
    assert "<title>Safe</title>" in text
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "<img" not in body
    assert not re.search(r"<a [^>]*javascript:", body)
    assert not re.search(r"<[a-z]+ [^>]*\bonerror=", re.sub(r'"[^"]*"', '""', body))
    assert drawn(text) > 5


def test_five_hundred_runs_open(make: Make, tmp_path: Path) -> None:
    records = [make(f"rule_{i}", seed, logged=12) for i in range(100) for seed in range(5)]
    page = write_report(records, tmp_path / "r.html")
    assert page.stat().st_size < 8_000_000
    assert drawn(dom(page, tmp_path / "profile", 3000)) >= 2


# Clicks on every button of every chart and on every dialogue that comes of it, and writes down what the page would open.
CLICKS = """
"use strict";
(() => {
  const opened = [];
  window.open = (place) => { opened.push(String(place)); return null; };
  addEventListener("securitypolicyviolation", (event) => opened.push(event.blockedURI));
  document.addEventListener("click", (event) => {
    const link = event.target.closest ? event.target.closest("a[href]") : null;
    if (!link || link.getAttribute("href").startsWith("#")) return;
    if (!link.hasAttribute("download")) opened.push(link.href);
    event.preventDefault();
  }, true);
  const note = document.createElement("pre");
  const buttons = new Set();
  const clicks = () => {
    for (const one of document.querySelectorAll(".modebar-btn,summary,.chart a,.chart button,[class*=dialog] button")) {
      buttons.add(one.dataset.title || one.getAttribute("data-attr") || one.tagName);
      one.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
    }
    note.id = "clicked";
    note.textContent = JSON.stringify({opened, buttons: [...buttons]});
    document.body.append(note);
  };
  for (const after of [3000, 6000, 9000]) setTimeout(clicks, after);
})();
"""


def test_whatever_is_clicked_nothing_is_asked_for_or_sent(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_page, "SCRIPT", _page.SCRIPT + CLICKS)
    records = [make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)]
    page = write_report(records, tmp_path / "r.html")
    text = dom(page, tmp_path / "profile")
    assert drawn(text) > 5
    found = json.loads(html.unescape(text.rpartition('<pre id="clicked">')[2].partition("</pre>")[0]))
    assert found["opened"] == []
    buttons = {name.lower() for name in found["buttons"]}  # Plotly's versions write them differently
    assert buttons == {"download plot as a png", "zoom", "pan", "zoom in", "zoom out", "reset axes", "summary"}
    log = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8", errors="replace"))
    kinds = {number: name for name, number in log["constants"]["logEventTypes"].items()}
    asked = {
        event["params"]["url"]
        for event in log["events"]
        if kinds[event["type"]] == "URL_REQUEST_START_JOB" and "url" in event.get("params", {})
    }
    own = {address for address in asked if address.startswith(("file:", "data:", "blob:", "chrome"))}
    # The browser's own wishes (is there a new version?) are not the page's.
    assert not [address for address in asked - own if "google" not in address]
