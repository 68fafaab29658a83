"""A page that loads itself again keeps what was chosen on it, and waits for whoever is using it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from locallearn.records import Record
from locallearn.report import write_report
from tests.report.browser import BROWSER, Tab, browser

Make = Callable[..., Record]
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH"),
]

# The page thinks that it lies behind another one, and so does not load itself again, until the test brings it to the front:
# every test has the time it needs, however short the interval is.
BEHIND = "window.behind = true; Object.defineProperty(document, 'hidden', {get: () => window.behind});"
FRONT = "setTimeout(() => { window.behind = false; document.dispatchEvent(new Event('visibilitychange')); }); null"
SECTION = "const section = [...document.querySelectorAll('section')].find((s) => s.dataset.place.startsWith('digits'));"
HELD = "document.querySelector('.held:not([hidden])')"
MENU = "document.querySelector('#filter details')"
COLUMNS = "document.querySelector('.choices').parentElement"


def _in_section(what: str) -> str:
    return f"(() => {{ {SECTION} {what} }})()"


def _records(make: Make, *more: Record) -> list[Record]:
    names = ("state", "gradient", "optimizer", "cache", "activation_peak")
    cost = {
        "train_s": 3.0,
        **{f"{name}_bytes": 1e6 for name in names},
        **dict.fromkeys(("params", "extra_params", "samples", "inference_flops", "update_flops"), 7e6),
    }
    return [*more, *(make(rule, seed, cost=cost) for rule in ("backprop", "x", "y") for seed in (0, 1))]


@pytest.fixture
def page(make: Make, tmp_path: Path) -> Path:
    return write_report(_records(make), tmp_path / "r.html", watch_s=0.1)


@pytest.fixture
def tab(page: Path) -> Iterator[Tab]:
    with browser() as tab:
        tab("Page.addScriptToEvaluateOnNewDocument", source=BEHIND)
        tab.open(page, 1280)
        tab.wait("document.querySelector('.choices')")
        yield tab


def _reload(tab: Tab) -> None:
    """Let the page load itself again, and wait for it."""
    loads = tab.loads()
    tab.run(FRONT)
    tab.loaded(loads + 1)
    tab.wait(f"{_in_section('return section;')} && document.querySelector('.chart[data-settled]')")


def _more(make: Make, tmp_path: Path) -> None:
    """Replace the page by one with a comparison before the others, a rule and a seed more."""
    write_report(
        [make("backprop", 0, dataset="another"), *_records(make), make("a", 0), make("x", 2)],
        tmp_path / "r.html",
        watch_s=0.1,
    )


def test_the_order_of_a_table_is_kept(tab: Tab, make: Make, tmp_path: Path) -> None:
    click = "section.querySelectorAll('table[data-columns] thead th')[0].querySelector('button').click();"
    rules = "return [...section.querySelectorAll('table[data-columns] tbody tr')].map((row) => row.dataset.rule);"
    tab.run(_in_section(click + click))
    assert tab.run(_in_section(rules)) == ["y", "x", "backprop"]
    _more(make, tmp_path)
    _reload(tab)
    assert tab.run(_in_section(rules)) == ["y", "x", "backprop", "a"]
    tab.run(_in_section(click))
    _reload(tab)
    assert tab.run(_in_section(rules)) == ["a", "backprop", "x", "y"]


def test_chosen_columns_are_kept(tab: Tab, make: Make, tmp_path: Path) -> None:
    headings = (
        "return [...section.querySelectorAll('table[data-columns] thead th')].filter((t) => !t.matches('.off'))"
        ".map((t) => t.dataset.name);"
    )
    before = tab.run(_in_section(headings))
    box = "[...document.querySelectorAll('.choices input')].filter((b) => {}).pop().click();"
    tab.run(box.replace("{}", "!b.checked") + box.replace("{}", "b.defaultChecked"))
    chosen = tab.run(_in_section(headings))
    assert len(set(before) ^ set(chosen)) == 2
    # One of the runs that come in is larger: units of headings change.
    _more(make, tmp_path)
    _reload(tab)
    assert tab.run(_in_section(headings)) == chosen


def test_open_details_are_kept(tab: Tab, make: Make, tmp_path: Path) -> None:
    opened = (
        "[...document.querySelectorAll('details[open]')].map((d) => [(d.closest('figure') || d).querySelector('h4, summary'),"
        "(d.closest('section') || d).querySelector('h2')].map((e) => e && e.textContent))"
    )
    tab.run(_in_section("section.querySelectorAll('figure details')[2].open = true;"))
    tab.run("document.querySelector('details[data-name=runs]').open = true")
    figure, runs = tab.run(opened)
    assert figure[1].startswith("digits")
    _more(make, tmp_path)
    _reload(tab)
    assert tab.run(opened) == [figure, [runs[0].replace("6", "9"), None]]
    tab.wait("document.querySelector('details[open] table[data-ready]')")


def test_the_chosen_run_is_kept(tab: Tab, make: Make, tmp_path: Path) -> None:
    choose = (
        "const c = section.querySelector('.choose'); c.selectedIndex = [...c.options].findIndex((o) => o.textContent === '{}');"
        "c.dispatchEvent(new Event('change'));"
    )
    run = (
        "const shown = section.querySelector('.chooser [data-choice]:not([hidden])');"
        "return section.querySelector(`option[value='${shown.dataset.choice}']`).textContent;"
    )
    tab.run(_in_section(choose.replace("{}", "x, seed 1")))
    _reload(tab)
    assert tab.run(_in_section(run)) == "x, seed 1"
    # The mean is known by its rule: a seed that comes in is in it.
    tab.run(_in_section(choose.replace("{}", "x, mean of 2 seeds")))
    _more(make, tmp_path)
    _reload(tab)
    assert tab.run(_in_section(run)) == "x, mean of 3 seeds"


def test_what_was_read_stands_where_it_stood(tab: Tab, make: Make, tmp_path: Path) -> None:
    top = _in_section("return section.querySelectorAll('figure')[5].getBoundingClientRect().top;")
    tab.run(_in_section("section.querySelectorAll('figure')[5].scrollIntoView(); scrollBy(0, 60);"))
    tab.wait(_in_section("return section.querySelectorAll('figure')[5].querySelector('[data-settled]');"))
    before = tab.run(top)
    assert before < 0
    _more(make, tmp_path)
    _reload(tab)
    assert tab.run(top) == pytest.approx(before, abs=2)


def test_a_long_table_stays_whole_and_a_new_tab_begins_anew(tab: Tab, page: Path, make: Make, tmp_path: Path) -> None:
    write_report([*_records(make), *(make("x", seed) for seed in range(2, 40))], page, watch_s=0.1)
    _reload(tab)
    whole = "[...document.querySelectorAll('button.all')].find((b) => b.textContent === 'Show all 44 rows')"
    tab.run(f"{whole}.click()")
    tab.run("document.querySelector('details[data-name=runs]').open = true")
    _reload(tab)
    assert not tab.run(f"Boolean({whole})")
    new = tab.another()
    new("Page.addScriptToEvaluateOnNewDocument", source=BEHIND)
    new.open(page, 1280)
    assert new.run(f"Boolean({whole})")
    assert new.run("document.querySelectorAll('details[open]').length") == 0


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (f"{MENU}.open = true", f"{MENU}.open = false"),
        (f"{COLUMNS}.open = true", f"{COLUMNS}.open = false"),
        ("document.querySelector('[type=search]').focus()", "document.querySelector('[type=search]').blur()"),
    ],
    ids=["filter", "columns", "search"],
)
def test_a_page_that_is_used_waits(tab: Tab, begin: str, end: str) -> None:
    tab.run(f"window.used = true; {begin}; {FRONT}")
    tab.wait(f"!window.used || !window.behind && {HELD}")
    assert tab.run("window.used")
    tab.run(f"setTimeout(() => {{ {end}; }}); null")
    tab.loaded(2)


def test_a_page_behind_another_waits_until_it_is_shown(tab: Tab) -> None:
    tab.wait(HELD)  # it would have loaded itself
    assert tab.loads() == 1
    _reload(tab)
    assert tab.loads() == 2


def test_the_interval_begins_with_the_last_chart(make: Make, tmp_path: Path) -> None:
    # Whenever a timer of the page's interval begins: charts that are being drawn, and those that are done.
    noted = """
        window.begun = [];
        const begin = window.setTimeout, many = (what) => document.querySelectorAll(what).length;
        window.setTimeout = (what, after) => {
          if (after === 3457000) window.begun.push([many("[data-drawn]:not([data-settled])"), many("[data-settled]")]);
          return begin(what, after);
        };
    """
    page = write_report(_records(make), tmp_path / "r.html", watch_s=3457)
    with browser() as tab:
        tab("Page.addScriptToEvaluateOnNewDocument", source=noted)
        tab.open(page, 1280)
        tab.draw_all()
        done = tab.run("document.querySelectorAll('[data-settled]').length")
        assert done > 5
        tab.wait("window.begun.length > 1")
        assert tab.run("window.begun[window.begun.length - 1]") == [0, done]


def test_a_page_that_is_not_watched_keeps_the_filter_alone(make: Make, tmp_path: Path) -> None:
    page = write_report(_records(make), tmp_path / "r.html")
    with browser() as tab:
        tab.open(page, 1280)
        tab.wait("document.querySelector('.choices')")
        tab.run(_in_section("section.querySelector('thead button').click();"))
        tab.run("document.querySelector('figure details').open = true")
        tab.run(
            "found = document.querySelector('[type=search]'); found.value = 'x'; found.dispatchEvent(new Event('input'))"
        )
        tab("Page.reload")
        tab.loaded(2)
        tab.wait("document.querySelector('.choices')")
        assert tab.run("document.querySelector('[type=search]').value") == "x"
        assert tab.run("document.querySelectorAll('th[aria-sort], details[open], .held').length") == 0
        assert tab.run("history.scrollRestoration") == "auto"
        assert tab.complaints() == []
