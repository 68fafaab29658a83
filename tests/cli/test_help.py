"""What a new user sees first: help, names, completion."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from locallearn import __version__
from locallearn.cli import main

_PYTHON = f"{shlex.quote(sys.executable)} -W ignore -m locallearn.cli"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["train", "--help"], ["compare", "-h"]])
def test_help_fits_a_screen_and_shows_three_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    examples = text.partition("Examples:")[2].partition("\n\n")[0].strip().splitlines()
    assert len(examples) >= 3
    for command in ("train", "compare", "report", "audit", "bench", "data", "meters"):
        assert f"  locallearn {command}" in text


def test_every_example_of_the_help_can_be_composed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    examples = capsys.readouterr().out.partition("Examples:")[2].partition("\n\n")[0].strip().splitlines()
    for example in examples:
        command, *words = shlex.split(example)[1:]
        # A sweep's list is composed value by value; the first of every list stands for the others here.
        single = [word.partition(",")[0] if "-m" in words else word for word in words if word != "-m"]
        assert main([command, "--cfg", *single]) == 0, example


def test_cfg_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["train", "--cfg", "algorithm=backprop", "seed=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["algorithm"]["_target_"] == "locallearn.algorithms.Backprop"
    assert printed["seed"] == 7
    assert "hydra" not in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def _complete(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setattr(sys, "argv", ["locallearn"])
    capsys.readouterr()
    assert main(["-sc", "query=bash"]) == 0
    return set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("locallearn tr", {"train"}),
        ("locallearn re", {"report"}),
        ("locallearn train alg", {"algorithm=", "algorithm."}),
        ("locallearn train algorithm=mo", {"algorithm=mono_forward"}),
        ("locallearn train net=mlp dataset=fash", {"dataset=fashion_mnist"}),
        ("locallearn compare compare.mo", {"compare.mode="}),
        ("locallearn train optimizer.l", {"optimizer.lr="}),
    ],
)
def test_completion(
    line: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _complete(line, monkeypatch, capsys)
    assert expected <= found
    assert all(word.startswith(line.split()[-1]) for word in found)


def test_completion_of_nothing_offers_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"train", "compare", "report", "audit", "bench", "data"} <= _complete("locallearn ", monkeypatch, capsys)


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash at /bin/bash")
def test_a_real_bash_takes_the_completion_script_and_completes_with_it(tmp_path: Path) -> None:
    command = tmp_path / "locallearn"
    command.write_text(f'#!/bin/sh\nexec {_PYTHON} "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    script = """
        set -e
        eval "$(locallearn -sc install=bash)"
        function_name=$(complete -p locallearn | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        COMP_LINE="locallearn train algorithm=mo"; COMP_POINT=${#COMP_LINE}; COMP_CWORD=2
        COMP_WORDS=(locallearn train algorithm=mo)
        set +e
        $function_name
        echo "REPLY:${COMPREPLY[*]}"
    """
    environment: dict[str, Any] = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    assert "REPLY:algorithm=mono_forward" in done.stdout
