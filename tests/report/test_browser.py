"""The page in a real browser: charts appear, nothing a record holds runs, and nobody is asked for anything."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.records import Record
from locallearn.report import write_report
from tests.report.browser import BROWSER, browser

Make = Callable[..., Record]
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH"),
]


def dom(page: Path) -> str:
    """The page's elements after every chart that is to be seen has been drawn."""
    with browser() as tab:
        tab.open(page, 1280)
        tab.draw_all()
        assert tab.asked() <= {page.as_uri()}
        return str(tab.run("document.documentElement.outerHTML"))


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
    text = dom(page)
    assert "<title>Two rules</title>" in text
    places = placed(page)
    assert drawn(text) == places == 13
    assert text.count('class="main-svg"') >= places
    assert len(re.findall(r'class="js-line"', text)) >= 4


def test_names_with_scripts_stay_text(make: Make, tmp_path: Path) -> None:
    values = {"dataset": NASTY, "net": NASTY, "blocks": [NASTY], "config": {NASTY: NASTY}}
    link = '<a href="javascript:document.title=1">x</a>'
    records = [make(NASTY, 0, **values), make("backprop", 0, **values), make(link, 0, **values)]
    text = dom(write_report(records, tmp_path / "r.html", title="Safe"))
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
    with browser() as tab:
        tab.open(page, 1280, 3000)
        tab.wait("document.querySelectorAll('.plot-container').length >= 2")


# Makes ready to click on every button of every chart and on every dialogue that comes of it; says what the page would open.
CLICKS = """
(() => {
  const opened = [], buttons = new Set();
  window.open = (place) => { opened.push(String(place)); return null; };
  addEventListener("securitypolicyviolation", (event) => opened.push(event.blockedURI));
  document.addEventListener("click", (event) => {
    const link = event.target.closest ? event.target.closest("a[href]") : null;
    if (!link || link.getAttribute("href").startsWith("#")) return;
    if (!link.hasAttribute("download")) opened.push(link.href);
    event.preventDefault();
  }, true);
  window.clickAll = () => {
    for (const one of document.querySelectorAll(".modebar-btn,summary,.chart a,.chart button,[class*=dialog] button")) {
      buttons.add(one.dataset.title || one.getAttribute("data-attr") || one.tagName);
      one.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
    }
    return new Promise((done) => setTimeout(() => done({opened, buttons: [...buttons]}), 2000));
  };
})()
"""


def test_whatever_is_clicked_nothing_is_asked_for_or_sent(make: Make, tmp_path: Path) -> None:
    records = [make(a, seed) for a in ("mono_forward", "backprop") for seed in (0, 1, 2)]
    page = write_report(records, tmp_path / "r.html")
    with browser() as tab:
        tab.open(page, 1280)
        tab.draw_all()
        assert tab.run("document.querySelectorAll('.plot-container').length") > 5
        tab.run(CLICKS)
        for _ in range(3):  # what the first clicks opened is clicked on, too
            found = tab.run("clickAll()")
        asked = tab.asked()
    assert found["opened"] == []
    buttons = {name.lower() for name in found["buttons"]}  # Plotly's versions write them differently
    assert buttons == {"download plot as a png", "zoom", "pan", "zoom in", "zoom out", "reset axes", "summary"}
    assert asked <= {page.as_uri()}


def test_columns_are_sorted_by_what_their_cells_say_first(make: Make, tmp_path: Path) -> None:
    costs = {"pepita": (300, 1200), "mono_forward": (90, 900), "backprop": (120, 1000), "cafo": (5, None)}
    records = [
        make(rule, 0, cost={"train_s": s, "params": n}, energy=[], started=f"2026-01-0{day}T10:00:00+00:00")
        for (rule, (s, n)), day in zip(costs.items(), (2, 4, 1, 3), strict=True)
    ]
    page = write_report(records, tmp_path / "r.html")
    click = """(title, table) => {
      const found = [...document.querySelectorAll("table")].find((t) => t.parentElement.getAttribute("aria-label") === table);
      found.closest("details")?.setAttribute("open", "");
      return new Promise((done) => setTimeout(() => {
        const th = [...found.tHead.rows[0].cells].find((th) => th.textContent.startsWith(title));
        th.querySelector("button").click();
        done([th.getAttribute("aria-sort"), ...[...found.tBodies[0].rows].map((row) => row.dataset.rule)]);
      }, 200));
    }"""
    with browser() as tab:
        tab.open(page, 1280)

        def order(title: str, table: str = "Headline figures") -> list[str]:
            return list(tab.run(f"({click})({title!r}, {table!r})"))

        assert order("Training time") == ["descending", "pepita", "backprop", "mono_forward", "cafo"]
        assert order("Training time") == ["ascending", "cafo", "mono_forward", "backprop", "pepita"]
        assert order("Parameters") == ["descending", "pepita", "backprop", "mono_forward", "cafo"]  # unknown ones last
        assert order("Rule") == ["ascending", "backprop", "cafo", "mono_forward", "pepita"]
        assert order("Started", "Runs") == ["ascending", "backprop", "pepita", "cafo", "mono_forward"]
        assert order("Started", "Runs") == ["descending", "mono_forward", "cafo", "pepita", "backprop"]
