"""What is printed: tables and messages that no terminal, pipe or disk can turn into a lost run."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from locallearn.cli import main
from locallearn.cli.terminal import Progress, Steady, printing
from tests.cli.conftest import Cli


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError("Broken pipe")


class Full(io.StringIO):
    """A file on a full disk, which says so when the buffer is written."""

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def _encoded(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")


TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [
        ("ascii", "98 +- 1, 0.5x, -, >= 3, ?"),
        ("latin-1", f"98 ± 1, 0.5{TIMES}, -, >= 3, ?"),
        ("utf-8", f"98 ± 1, 0.5{TIMES}, {DASH}, ≥ 3, 火"),
    ],
)
def test_signs_that_a_terminal_lacks_are_replaced(encoding: str, wanted: str) -> None:
    raw = _encoded(encoding)
    stream = Steady(raw)
    print(f"98 ± 1, 0.5{TIMES}, {DASH}, ≥ 3, 火", file=stream, end="", flush=True)
    assert raw.buffer.getvalue().decode(encoding) == wanted  # type: ignore[attr-defined]
    assert stream.failure is None


@pytest.mark.parametrize("stream", [None, Broken(), Full()])
def test_a_stream_that_fails_falls_silent(stream: io.StringIO | None) -> None:
    steady = Steady(stream)
    for _ in range(2):
        print("x", file=steady, flush=True)
    assert (steady.failure is None) == (stream is None)
    assert not steady.isatty()


@pytest.mark.parametrize(
    ("encoding", "columns", "term"), [("latin-1", "80", "xterm"), ("ascii", "20", "dumb"), ("closed", "80", "xterm")]
)
def test_a_terminal_never_costs_the_report(
    encoding: str, columns: str, term: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a comparison is there whatever becomes of its table."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    words = ["compare", "compare.algorithms=[backprop]", "compare.seeds=[0]", "net.hidden=[8]", "meter=none"]
    words += ["dataset.limit_train=100", "trainer.max_epochs=1", "trainer.probe_samples=0", "trainer.accelerator=cpu"]
    stream = None if encoding == "closed" else _encoded(encoding)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(words) == 0
    assert (tmp_path / "runs" / "report.html").is_file()
    if stream is not None:
        printed = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert "backprop" in printed
        assert printed.splitlines()[-1] == "runs/report.html"


@pytest.mark.parametrize("place", ["folder", "file/page.html"])
def test_a_place_that_cannot_be_written_to_is_told_before_training(place: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    outcome = cli("compare", "compare.algorithms=[backprop]", f"compare.report={place}")
    assert outcome.code == 2
    assert f"the report cannot be written to {place}" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_table_in_a_file_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert printing().width == 200  # rich takes 80 for everything that is no terminal
    monkeypatch.setenv("COLUMNS", "90")
    assert printing().width == 90


def test_a_log_says_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(of="trial") as show:
        show("tune backprop", 1, 3, {"validation/accuracy": 0.5})
        show("tune pepita", 1, 3, {})  # it failed
        show("tune ridge", 1, 3, {"validation/loss": 2.0})
    assert capsys.readouterr().err.splitlines() == [
        "tune backprop: 1 of 3 trials, validation 0.5000",
        "tune pepita: 1 of 3 trials",
        "tune ridge: 1 of 3 trials, validation 2.0000",
    ]
