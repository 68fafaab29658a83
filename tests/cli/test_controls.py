"""``compare.controls``: which controls are added, with which settings, and what is said of those that cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locallearn.cli.arms import Arm, arms_of, controls_of, once
from locallearn.cli.settings import UsageError, compose_settings
from tests.cli.conftest import Cli

ReadRecords = Callable[[Path], list[dict[str, Any]]]
CHECKPOINTED, ACCUMULATED = "backprop(checkpoint=auto)", "backprop(accumulate=4)"


@pytest.mark.parametrize(
    ("wanted", "there", "added"),
    [
        (False, ["mono_forward"], []),
        (None, ["mono_forward"], []),
        (True, ["mono_forward"], ["backprop", "deep_supervision", CHECKPOINTED, ACCUMULATED]),
        (True, ["backprop", "mono_forward"], ["deep_supervision", CHECKPOINTED, ACCUMULATED]),
        (True, ["backprop", "deep_supervision", "backprop(checkpoint=2)"], [ACCUMULATED]),
        (True, ["backprop(accumulate=8)"], ["backprop", "deep_supervision", CHECKPOINTED]),
        (True, ["backprop(accumulate=1)", "deep_supervision"], [CHECKPOINTED, ACCUMULATED]),
        (["accumulated", "accumulated"], ["pepita"], [ACCUMULATED]),
        (["backprop"], ["backprop(optimizer.lr=0.1)"], []),
        # Controls are those of the backpropagation that is compared, with its own settings.
        (
            ["checkpointed"],
            ["backprop(optimizer=sgd,optimizer.lr=0.1)"],
            ["backprop(optimizer=sgd,optimizer.lr=0.1,checkpoint=auto)"],
        ),
        # What learns from a part of the batch is no plain backpropagation.
        (["backprop"], ["backprop(keep=0.5)"], ["backprop"]),
    ],
)
def test_controls_are_added_once(wanted: Any, there: list[str], added: list[str]) -> None:
    assert [arm.text for arm in controls_of(wanted, [Arm(text) for text in there]).values()] == added


@pytest.mark.parametrize(
    ("words", "run"),
    [
        # Of a control nobody said that it is another experiment.
        (
            ['compare.algorithms=["backprop(accumulate=1)"]', "compare.controls=[backprop,checkpointed]"],
            ["backprop(accumulate=1)", "backprop(checkpoint=auto)"],
        ),
        (
            ['compare.algorithms=["deep_supervision(smoothing=0)",ridge]', "compare.controls=[deep_supervision]"],
            ["deep_supervision(smoothing=0)", "ridge"],
        ),
        # Nor of the baseline, nor of a network without its device.
        (["algorithm=backprop", "algorithm.accumulate=1"], ["backprop(accumulate=1)"]),
        (["algorithm=backprop", "algorithm.accumulate=2"], ["backprop", "backprop(accumulate=2)"]),
        (
            [
                *("net=physical", "dataset=vowels"),
                'compare.algorithms=["physical_ff(net.device.map=twin)","physical_ff(net.device.map=optical,theta=4)"]',
            ],
            [
                *("physical_ff(net.device.map=twin)", "physical_ff(net.device.map=optical,theta=4)"),
                "physical_ff(net.device=null)",
            ],
        ),
        # Different all the same: by its name, by what watches it, by when it ends.
        (["compare.algorithms=[backprop,mono_forward]"], ["backprop", "mono_forward"]),
        (['compare.algorithms=[backprop,"backprop(meter=none)"]'], ["backprop", "backprop(meter=none)"]),
        (
            ['compare.algorithms=[backprop,"backprop(compare.mode=matched)"]'],
            ["backprop", "backprop(compare.mode=matched)"],
        ),
    ],
)
def test_what_was_added_is_run_once(words: list[str], run: list[str]) -> None:
    base, _, arms, shared = arms_of("compare", words)
    every = [*arms, *controls_of(base.compare.controls, arms).values()]
    composed = {arm.text: compose_settings([*shared, *arm.overrides]) for arm in every}
    assert [arm.text for arm in once(every, composed, [0])] == run


def test_a_word_that_is_no_control_is_refused() -> None:
    for wanted in ("all", ["memory"], 3, {"backprop": 1, "x": 2}):
        with pytest.raises(
            UsageError, match="expected true for all, false for none, or a list of backprop, deep_superv"
        ):
            controls_of(wanted, [Arm("backprop")])


def test_all_controls_are_run_with_what_is_set_for_backpropagation(
    cli: Cli, tmp_path: Path, read_records: ReadRecords
) -> None:
    words = ("compare.seeds=[0]", "compare.algorithms=[backprop,mono_forward]", "compare.table=t.md")
    outcome = cli("compare", *words, "compare.controls=true", 'compare.overrides={backprop:["optimizer.lr=3e-3"]}')
    assert outcome.code == 0
    assert outcome.err.count("left out") == 0
    found = {(r["algorithm"], r["variant"]): r for r in read_records(tmp_path / "runs")}
    backprop = [("backprop", None), ("backprop", "checkpoint=auto"), ("backprop", "accumulate=4")]
    assert set(found) == {*backprop, ("mono_forward", None), ("deep_supervision", None)}
    rates = {key: record["config"]["optimizer"]["lr"] for key, record in found.items()}
    assert {rates[key] for key in backprop} == {3e-3}
    assert {rates[key] for key in set(found) - set(backprop)} == {1e-3}
    # Checkpointing changes no number, which makes it a control of memory alone.
    assert found[backprop[1]]["validation"] == found[backprop[0]]["validation"]
    for label in ("backprop · checkpointed", "backprop · accumulated, 4 parts"):
        assert label in outcome.out
        assert label in (tmp_path / "t.md").read_text(encoding="utf-8")


def test_a_control_that_cannot_be_run_is_left_out_in_one_sentence_or_refused_where_it_is_named(
    cli: Cli, tmp_path: Path, read_records: ReadRecords
) -> None:
    """A graph is one batch: it cannot pass in parts."""
    words = ("dataset=generated_graph", "dataset.graph.nodes=200", "compare.algorithms=[backprop]", "compare.seeds=[0]")
    refused = cli("compare", *words, "compare.controls=[deep_supervision,accumulated]")
    assert refused.code == 2
    assert refused.err == (
        "locallearn: the control accumulated cannot be run here: accumulate is 4, but a graph is one batch whose nodes see one "
        "another: it cannot pass in parts\n"
    )
    assert not (tmp_path / "runs").exists()
    outcome = cli("compare", *words, "compare.controls=true")
    assert outcome.code == 0
    told = [line for line in outcome.err.splitlines() if line.startswith("locallearn: ")]
    assert len(told) == 1
    assert told[0].startswith(
        "locallearn: the control accumulated is left out: accumulate is 4, but a graph is one batch"
    )
    assert [(r["algorithm"], r["variant"]) for r in read_records(tmp_path / "runs")] == [
        *(("backprop", None), ("deep_supervision", None), ("backprop", "checkpoint=auto")),
    ]
