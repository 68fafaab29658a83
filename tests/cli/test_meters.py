"""``locallearn meters``: what this machine can measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import locallearn.energy
from locallearn.cli import main
from locallearn.energy import ReplayMeter


def _replaying(monkeypatch: pytest.MonkeyPatch, **meters: Callable[[], Any]) -> None:
    """Replaces meters; the others find nothing quickly."""
    nothing: dict[str, Callable[[], Any]] = {
        name: (lambda name=name: ReplayMeter([(0, 0), (1e-9, 0)], source=name))
        for name in ("NvmlMeter", "RaplMeter", "ZeusMeter", "CodeCarbonMeter")
    }
    for name, make in {**nothing, **meters}.items():
        monkeypatch.setattr(locallearn.energy, name, make)


def test_sources_qualities_and_reasons_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replaying(
        monkeypatch,
        NvmlMeter=lambda: ReplayMeter([(0, 0), (1e6, 70e6)], source="nvml:0 A board"),
        CodeCarbonMeter=lambda: ReplayMeter([(0, 0), (1e6, 20e6)], source="codecarbon:[ram]", quality="modelled"),
    )
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["meters", "meters.seconds=0.05"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "measured" in rows["nvml:0 A board"]
    assert " W" in rows["nvml:0 A board"]
    assert "modelled" in rows["codecarbon:[ram]"]
    assert "none" in rows["RaplMeter"]
    assert "the replayed trace ends" in rows["RaplMeter"]
    assert out.splitlines()[-1].startswith("measured here: nvml:0 A board;")


def test_the_same_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _replaying(monkeypatch, NvmlMeter=lambda: ReplayMeter([(0, 0), (1e6, 70e6)], source="nvml:0 A board"))
    assert main(["meters", "--json", "meters.seconds=0.05"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seconds"], found["measured"]) == (0.05, ["nvml:0 A board"])
    sources = {row["source"]: row for row in found["sources"]}
    assert set(sources) == {"nvml:0 A board", "RaplMeter", "ZeusMeter", "CodeCarbonMeter"}
    assert sources["nvml:0 A board"]["power_w"] == pytest.approx(70, rel=0.2)
    assert sources["nvml:0 A board"]["reason"] is None
    assert sources["RaplMeter"]["power_w"] is None
    assert "the replayed trace ends" in sources["RaplMeter"]["reason"]


def test_where_nothing_is_measured_the_last_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _replaying(monkeypatch)
    assert main(["meters", "meters.seconds=0.01"]) == 0
    assert "nothing is measured here" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("seconds", ["0", "-3", "soon", ".inf"])
def test_seconds_that_are_none(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meters", f"meters.seconds={seconds}"]) == 2
    assert "meters.seconds is" in capsys.readouterr().err
