"""Records as no run writes them: each way through scan, index, page and terminal stays open, and the bad one is named."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from locallearn.records import Record, read_index, rebuild_index, scan
from locallearn.report import _page, terminal_table, write_report

Make = Callable[..., Record]
FULL: dict[str, Any] = {
    "variant": "v",
    "task": "classification",
    "metric": {"name": "accuracy", "maximise": True},
    "validation": {"accuracy": 0.5, "loss": 1.0},
    "config": {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "trainer": {"accelerator": "cpu"}},
    "versions": {"torch": "2.6"},
    "hardware": {"cpu": "a chip", "gpus": ["a card"], "threads": 1},
    "source": {"commit": "abc", "dirty": True},
    "precision": {"trainer": "32-true"},
    "parts": [{"hardware": {"cpu": "b"}, "started": "2026"}],
    "serial": 3,
    "notes": ["a note"],
    "command": "locallearn train",
    "locality": "layer-local",
    "mode": "target",
    "target": {"accuracy": 0.9, "seconds": 3.0, "samples": 5, "joules": {"nvml": 7.0}},
}
BENCH = {"what": "step", "title": "t", "columns": ["a", "b"], "rows": [["1", "2"]]}
# Values as JSON writes them; Python's reader takes all of these.
WILD = [
    *(
        "null",
        "true",
        "-1",
        "2e308",
        "1e308",
        "-1e308",
        "5e-324",
        "NaN",
        "Infinity",
        "-Infinity",
        str(2**70),
        "1" + "0" * 400,
    ),
    *(
        '""',
        '"text"',
        '"\\ud800"',
        '"a\\nb\\u0000\\u001b[31m"',
        '"</script><b>"',
        '"[/red]"',
        '"../../x"',
        json.dumps("x" * 300_000),
    ),
    *(
        "[]",
        "{}",
        "[[[]]]",
        '[null, 1, "x", {}]',
        '{"a": {"b": [1]}}',
        '{"\\udfff/\\n": "\\udfff"}',
        "[" * 60 + "]" * 60,
    ),
]


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a record."""
    if at:
        yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _paths(child, (*at, key))


def _mutated(data: dict[str, Any], choose: random.Random) -> str:
    """The record with one to three values replaced by wild ones, as text."""
    data = copy.deepcopy(data)
    marks: dict[str, str] = {}
    for _ in range(choose.choice((1, 1, 2, 3))):
        *way, last = choose.choice(list(_paths(data)))
        place: Any = data
        for key in way:
            place = place[key]
        mark = f"@{len(marks)}@"
        marks[mark] = choose.choice(WILD)
        place[last] = mark
    text = json.dumps(data)
    for mark, wild in marks.items():
        text = text.replace(f'"{mark}"', wild)
    return text


def _through(runs: Path, out: Path) -> tuple[str, str]:
    """Every stage once; the page's and the terminal's text."""
    found = scan([runs])
    with closing(sqlite3.connect(rebuild_index(runs))) as base:
        assert base.execute("SELECT count(*) FROM runs").fetchone() == (len(found.records),)
    assert len(read_index(runs)) == len(found.records)
    page = write_report(found.records, out, problems=found.problems).read_text(encoding="utf-8")
    terminal = io.StringIO()
    Console(file=terminal, width=100).print(terminal_table(found.records))
    return page, terminal.getvalue()


@pytest.fixture
def runs(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two sound runs; pages are written without Plotly's script, which takes the time."""
    monkeypatch.setattr(_page, "plotly", lambda: "")
    make("backprop", 0, **FULL)
    make("mono_forward", 0, picture=b"\x89PNG\r\n\x1a\n", **FULL)
    return tmp_path / "runs"


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_record_stops_nothing(seed: int, runs: Path, make: Make, tmp_path: Path) -> None:
    choose = random.Random(seed)
    victims = [make("x", 1, **FULL), make("bench", 2, **{**FULL, "bench": BENCH})]
    sound = [json.loads((victim.path / "record.json").read_text(encoding="utf-8")) for victim in victims]
    for _ in range(8):
        for victim, data in zip(victims, sound, strict=True):
            (victim.path / "record.json").write_text(text := _mutated(data, choose), encoding="utf-8")
        try:
            page, terminal = _through(runs, tmp_path / "r.html")
        except Exception as error:
            error.add_note(text[:3000])
            raise
        assert "mono_forward" in page
        assert "mono_forward" in terminal


@pytest.mark.parametrize("seed", range(2))
def test_mutated_metrics_stop_nothing(seed: int, runs: Path, make: Make, tmp_path: Path) -> None:
    choose = random.Random(seed)
    wild = [
        "",
        "x",
        "1e308",
        "-1e308",
        "nan",
        "inf",
        '"',
        "\0",
        str(2**70),
        "9" * 5000,
        "y" * 200_000,
        '"a\nb"',
        "\ufeff",
        ",",
    ]
    victims = [make("x", 1, **FULL), make("x", 2, **FULL)]
    lines = (victims[0].path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    for _ in range(10):
        for victim in victims:
            fields = [line.split(",") for line in lines]
            for _ in range(choose.choice((1, 3))):
                line = choose.choice(fields)
                line[choose.randrange(len(line))] = choose.choice(wild)
            text = "\n".join(map(",".join, fields)) + "\n"
            (victim.path / "metrics.csv").write_bytes(text.encode() + choose.choice((b"", b"\xff\xfe", b"\n\n")))
        page, _ = _through(runs, tmp_path / "r.html")
        assert "mono_forward" in page


NAMED: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
    "nothing at all": lambda data: "",
    "half a record": lambda data: json.dumps(data)[:500],
    "nested ten thousand deep": lambda data: '{"config":' + "[" * 10_000 + "]" * 10_000 + "}",
    "nested two hundred deep": lambda data: json.dumps({**data, "config": json.loads("[" * 200 + "]" * 200)}),
    "a seed too large": lambda data: json.dumps({**data, "seed": 2**70}),
    "not UTF-8": lambda data: b"\xff\xfe" + json.dumps(data).encode("utf-16-le"),
    "seconds as text": lambda data: json.dumps({**data, "cost": {"train_s": "12"}}),
    "a count below zero": lambda data: json.dumps({**data, "cost": {"params": -5}}),
    "no number": lambda data: json.dumps({**data, "test": {"accuracy": float("nan")}}),
    "a config that is a list": lambda data: json.dumps({**data, "config": [1]}),
    "a status of its own": lambda data: json.dumps({**data, "status": "fine"}),
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_is_bad_is_named(kind: str, runs: Path, make: Make, tmp_path: Path) -> None:
    bad = make("x", 1)
    text = NAMED[kind](json.loads((bad.path / "record.json").read_text(encoding="utf-8")))
    (bad.path / "record.json").write_bytes(text.encode() if isinstance(text, str) else text)
    problems = scan([runs]).problems
    assert [bad.path.name in problem for problem in problems] == [True]
    page, _ = _through(runs, tmp_path / "r.html")
    assert bad.path.name in page.partition("<h2>Left out</h2>")[2].partition("</ul>")[0]


def test_a_byte_order_mark_is_no_damage(runs: Path, make: Make) -> None:
    path = make("x", 1).path / "record.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert scan([runs]).problems == []
    assert len(scan([runs]).records) == 3


@pytest.mark.parametrize("name", ["record.json", "metrics.csv", "reconstructions.png"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_only_plain_files_are_read(kind: str, name: str, runs: Path, make: Make, tmp_path: Path) -> None:
    """A link could show any file of this machine, a pipe never ends."""
    run = make("x", 1, picture=b"\x89PNG\r\n\x1a\nmine")
    secret = tmp_path / "secret"
    (run.path / name).replace(secret)
    secret.write_bytes(secret.read_bytes().replace(b"mine", b"HUSH") + (b"HUSH" if name == "metrics.csv" else b""))
    place = run.path / name
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(secret)
    page, _ = _through(runs, tmp_path / "r.html")
    assert f"{place} cannot be read (it is no file of its own but a link, a folder or a device)" in page
    assert "SFVTSA" not in page  # HUSH in base64
    assert "HUSH" not in page


def test_odd_file_names_and_a_second_folder_of_one_id(runs: Path, make: Make, tmp_path: Path) -> None:
    run = make("x", 1)
    copied = runs / os.fsdecode(b"copy \xff <b>")
    copied.mkdir()
    (copied / "record.json").write_bytes((run.path / "record.json").read_bytes())
    (problem,) = scan([runs]).problems
    assert f"the id {run.id!r}" in problem
    assert len(scan([runs]).records) == 3
    page, _ = _through(runs, tmp_path / "r.html")
    assert "copy \\udcff &lt;b&gt;" in page
    (run.path / "record.json").unlink()
    _through(runs, tmp_path / "r.html")


def test_a_record_of_ten_megabytes_makes_a_small_page(runs: Path, make: Make, tmp_path: Path) -> None:
    make("x" * 1_000_000, 1, net="y" * 1_000_000, error="z" * 10_000_000, config={"k" * 1_000_000: "v" * 10_000_000})
    page, _ = _through(runs, tmp_path / "r.html")
    assert len(page) < 1_000_000
