"""What a run writes is read again: no figure lies in a record unseen."""

from __future__ import annotations

import copy
import io
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from locallearn.energy import ReplayMeter
from locallearn.records import Record, load_record, rebuild_index, scan
from locallearn.report import _page, terminal_table, write_report
from locallearn.study.train import run
from tests.study.conftest import MakePlan

# What is kept for people and their own scripts, and shown nowhere.
KEPT = {
    "energy.*.detail*": "what a meter was made of",
    "energy.*.by": "shown of modelled figures (tests/report/test_quality.py); here they are measured",
    "energy.*.joules": "the same numbers as cost.energy_j, which the tables read",
    **dict.fromkeys([f"parts.*.hardware.{key}" for key in ("cores", "memory_gib", "os")], "decides no number"),
    **dict.fromkeys([f"parts.*.versions.{key}" for key in ("hydra-core", "optuna", "plotly")], "decides no number"),
    "error": "shown of runs that did not finish",
    "beginning": "null here; of runs that begin with another's weights rows and notes tell by it (tests/cli/test_identity.py)",
    "blocks.*": "the order of the curves, which a changed name leaves as it is",
}
KEPT_METRICS = {
    r"cost/.*": "costs so far, by epoch",
    r"validation/loss": "what the metric of the task stands for",
    r"lr.*": "learning rates, by epoch",
}


def _leaves(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if at and not children:
        yield at
    for key, child in children:
        yield from _leaves(child, (*at, key))


def _others(value: Any) -> list[Any]:
    """Other values of the same kind, the first of them the likeliest to be seen."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 7 + 5, 0]
    if isinstance(value, str):
        return [f"{value}~", "done"]
    return [["~"], {"~": "~"}, "~", 123.0, [{"~": "~", "hardware": {"cpu": "~"}}]]


def _seen(records: list[Record], runs: Path) -> str:
    """Everything that is shown of records: page, table, index, figures."""
    terminal = io.StringIO()
    Console(file=terminal, width=300).print(terminal_table(records))
    page = write_report(records, runs.parent / "r.html").read_text(encoding="utf-8")
    return "\n".join([page, terminal.getvalue(), *(repr(record.figures()) for record in records)])


@pytest.fixture
def runs(make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in mode target: one of a seed, a newer one of the same seed, and a baseline; pages without Plotly's script."""
    monkeypatch.setattr(_page, "plotly", lambda: "")
    for algorithm, rate in (("forward_forward", 0.1), ("forward_forward", 0.1), ("backprop", 0.1)):
        plan = make_plan(
            algorithm,
            max_epochs=1,
            meters=[ReplayMeter([(0, 0), (1e9, 1e9)])],
            mode="target",
            target=0.01,
            probe_samples=50,
            config={"optimizer": {"lr": rate}},
            command="locallearn compare",
        )
        run(plan)
    return tmp_path / "runs"


def test_every_key_of_a_record_is_read_by_somebody(runs: Path) -> None:
    """Each value in turn is changed, and something that people look at must change with it."""
    records = scan([runs]).records
    victim = records[1]
    assert victim.algorithm == "forward_forward"
    data = json.loads((victim.path / "record.json").read_text(encoding="utf-8"))
    assert data["target"]["joules"] == {"replay": pytest.approx(data["cost"]["energy_j"]["replay"], rel=1)}
    part = {key: data[key] for key in ("hardware", "versions", "source", "started") if key in data}
    data |= {"parts": [{**copy.deepcopy(part), "epochs": 2}], "resumed_from": "x"}  # as of a run that went on
    victim = Record(victim.path, copy.deepcopy(data))
    before, unread = _seen([records[0], victim, records[2]], runs), []
    for way in _leaves(data):
        name = ".".join(map(str, way))
        if any(re.fullmatch(kept.replace(".", r"\.").replace("*", ".*"), name) for kept in KEPT):
            continue
        place = data
        for key in way[:-1]:
            place = place[key]  # type: ignore[index]
        value = place[way[-1]]  # type: ignore[index]
        for other in _others(value):
            place[way[-1]] = other  # type: ignore[index]
            changed = Record(victim.path, copy.deepcopy(data))
            place[way[-1]] = value  # type: ignore[index]
            if _seen([records[0], changed, records[2]], runs) != before:
                break
        else:
            unread.append(name)
    assert unread == []


def test_every_logged_name_is_drawn(runs: Path) -> None:
    for record in scan([runs]).records:
        lines = (record.path / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        before = _seen([record], runs)
        for i, line in enumerate(lines[1:], start=1):
            epoch, step, name, _ = line.split(",")
            if any(re.fullmatch(kept, name) for kept in KEPT_METRICS):
                continue
            changed = [*lines[:i], f"{epoch},{step},{name},0.123456\n", *lines[i + 1 :]]
            (record.path / "metrics.csv").write_text("".join(changed), encoding="utf-8")
            assert _seen([load_record(record.path)], runs) != before, name
        (record.path / "metrics.csv").write_text("".join(lines), encoding="utf-8")


def test_the_index_has_a_column_for_every_figure_of_fixed_name(runs: Path) -> None:
    with closing(sqlite3.connect(rebuild_index(runs))) as base:
        base.row_factory = sqlite3.Row
        rows = [dict(row) for row in base.execute("SELECT * FROM runs ORDER BY started")]
    for row, record in zip(rows, scan([runs]).records, strict=True):
        figures = record.figures()
        names = [name for name in figures if "/" not in name]
        assert {name: row[name] for name in names} == {name: figures[name] for name in names}
