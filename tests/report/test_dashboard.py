"""What the page answers: verdicts, fronts, targets, energy, searches, students; its files; and how it stands in a browser."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from locallearn.cli import report as command
from locallearn.records import Record, RunFolder
from locallearn.report import write_report
from locallearn.report._charts import cost_charts, memory_charts, paired_charts, short
from locallearn.report._columns import AT_LEAST, TIMES, UNKNOWN, columns
from locallearn.report._distilled import read_distilled
from locallearn.report._ends import own_ends
from locallearn.report._energy import energy_charts, per_sample
from locallearn.report._styles import styles
from locallearn.report._sweeps import parallel_chart
from locallearn.report._targets import target_charts
from locallearn.report._tuning import read_searches
from locallearn.report._vector import _draw, draw
from locallearn.report._verdicts import verdict
from locallearn.statistics import compare_table
from tests.report.browser import BROWSER, OVERLAPS, Tab, browser
from tests.report.varied import RULES, many, search, students, varied

Make = Callable[..., Record]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")


# -- sentences --------------------------------------------------------------------------------------------------------
def _verdict(make: Make, accuracies: dict[str, Sequence[float]], **values: Any) -> str:
    made = [
        make(rule, seed, **{"test": {"accuracy": accuracy}, "validation": {"accuracy": accuracy}, **values})
        for rule, of in accuracies.items()
        for seed, accuracy in enumerate(of)
    ]
    rows = compare_table(made, "backprop")
    return verdict(rows, columns(rows), "backprop").sentence


def test_a_certain_win_says_by_how_much_and_at_what_cost(make: Make) -> None:
    said = _verdict(make, {"backprop": (0.90, 0.91, 0.92), "mono_forward": (0.95, 0.961, 0.97)})
    assert said.startswith(
        "mono_forward beats backprop by 5.03 points in test accuracy (95 % interval [+4.89, +5.18], 3 pairs)"
    )
    assert f"0.750{TIMES} the time" in said
    assert f"0.767{TIMES} the joules (nvml, measured)" in said
    assert f"0.345{TIMES} the peak activations" in said


def test_what_the_interval_holds_is_not_called_a_win(make: Make) -> None:
    said = _verdict(make, {"backprop": (0.90, 0.91, 0.92), "mono_forward": (0.91, 0.905, 0.925)})
    assert "mono_forward and backprop cannot be told apart in test accuracy: +0.33 points" in said
    assert "beats" not in said
    two = _verdict(make, {"backprop": (0.90, 0.91), "mono_forward": (0.99, 0.99)}, dataset="other")
    assert "nothing is certain" in two
    assert "beats" not in two


def test_a_tie_of_few_pairs_is_not_called_equal(make: Make) -> None:
    few = _verdict(make, {"backprop": (0.9, 0.9), "mono_forward": (0.9, 0.9)})
    assert few.startswith("mono_forward and backprop have the same test accuracy over 2 pairs: fewer than three pairs")
    three = _verdict(make, {"backprop": (0.9, 0.9, 0.9), "mono_forward": (0.9, 0.9, 0.9)}, dataset="other")
    assert three.startswith("mono_forward and backprop have the same test accuracy over 3 pairs;")
    crossed = _verdict(make, {"backprop": (0.75, 0.5), "mono_forward": (0.5, 0.75)}, dataset="crossed")
    assert crossed.startswith(
        "mono_forward and backprop have the same mean test accuracy over 2 pairs: fewer than three"
    )


def test_a_rule_without_some_of_its_figures_is_placed_last(make: Make) -> None:
    """Its mean is that of the runs that have one, which flatters as survivors do."""
    made = [make("backprop", seed, test={"accuracy": 0.5}, validation={"accuracy": 0.5}) for seed in range(4)]
    made += [make("a", seed, test={"accuracy": 0.4}, validation={"accuracy": 0.4}) for seed in range(4)]
    for seed, value in enumerate((0.9, 0.9, 0.9, None)):
        made.append(make("b", seed, test={"accuracy": value}, validation={"accuracy": value}))
    rows = compare_table(made, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.best is not None
    assert (found.best.label, getattr(found.rival, "label", None)) == ("backprop", "a")
    assert found.sentence.endswith("1 finished run has no accuracy (b).")
    chart = cost_charts(rows, columns(rows), styles(rows, "backprop"))[0]
    assert "The front leaves out 1 of 3 rows: b (1 finished run has no accuracy)." in chart.note
    assert chart.table[-1][-1] == "not placed: 1 finished run has no accuracy"


def test_what_lacks_is_named(make: Make) -> None:
    """A figure may lack in one part of the data alone, in every run, or without an entry of its own."""

    def said(seeds: Sequence[int], **parts: Any) -> str:
        values = {"test": {"accuracy": 0.5}, "validation": {"accuracy": 0.5}}
        made = [make("backprop", seed, **values) for seed in range(3)]
        made += [make("b", seed, **(values | parts if seed in seeds else values)) for seed in range(3)]
        rows = compare_table(made, "backprop")
        return verdict(rows, columns(rows), "backprop").sentence

    nothing: dict[str, Any] = {"accuracy": None}
    assert said((1, 2), validation=nothing).endswith("2 finished runs have no validation accuracy (b).")
    assert said((1,), test=nothing).endswith("1 finished run has no test accuracy (b).")
    alone = "backprop reaches 50.00 % test accuracy, the only one of 2 rows with such a figure (95 % interval "
    for parts, lack in (
        ({"test": nothing, "validation": nothing}, "3 finished runs have no accuracy (b)."),
        ({"test": {}, "validation": {}}, "3 finished runs have no accuracy (b)."),
        ({"test": nothing}, "3 finished runs have no test accuracy (b)."),
        ({"test": {}}, "there is no test accuracy (b)."),
    ):
        found = said((0, 1, 2), **parts)
        assert found.startswith(alone)
        assert found.endswith(lack)
    unasked = said((0, 1, 2), validation={})
    assert unasked.startswith("b and backprop have the same test accuracy over 3 pairs")
    assert "finished" not in unasked


def test_who_is_best_is_told_among_those_that_lost_no_seed(make: Make) -> None:
    """The mean of what a seed is lacking of is that of survivors, and may be the best."""

    def said(*rules: str, **values: Any) -> str:
        made = [make("lost", 3, status="failed", **values)]
        for rule, accuracy in {"backprop": 0.9, "a": 0.8, "b": 0.7, "lost": 0.95}.items():
            for seed in range(3 if rule in rules else 0):
                told = {"accuracy": accuracy + seed / 1000}
                made.append(make(rule, seed, test=told, validation=told, **values))
        rows = compare_table(made, "backprop")
        return verdict(rows, columns(rows), "backprop").sentence

    of_two = said("backprop", "a", "lost")
    assert of_two.startswith("backprop beats a, the only other one with figures for all seeds, by 10.00 points")
    of_three = said("backprop", "a", "b", "lost", dataset="three")
    assert of_three.startswith(
        "backprop beats a, of the 2 others with figures for all seeds the best by validation accuracy, by 10.00 points"
    )
    assert said("a", "lost", dataset="one").startswith(
        "a reaches 80.10 % test accuracy, the only one of 2 rows with figures for all seeds"
    )
    assert said("a", "b", "lost", dataset="both").startswith(
        "a has the highest validation accuracy of 2 rows with figures for all seeds, and 80.10 % test accuracy; its interval"
    )


@pytest.mark.parametrize(("near", "whole", "better"), [(0.95, 0.5, False), (0.5, 0.6, True)])
def test_a_baseline_is_called_better_for_its_figure_alone(make: Make, near: float, whole: float, better: bool) -> None:
    """The one with the nearest settings lost a seed, the other one none."""
    made = [make("backprop", 3, status="failed", config={"optimizer": {"lr": 1}})]
    for rule, lr, accuracy in (("backprop", 1, near), ("backprop", 2, whole), ("mono", 1, 0.96)):
        for seed in range(3):
            told = {"accuracy": accuracy}
            made.append(make(rule, seed, test=told, validation=told, config={"optimizer": {"lr": lr}}))
    rows = compare_table(made, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert (found.better is not None) == better
    told = "; the best one with figures for all seeds is backprop · optimizer.lr=2, with 60.00 % validation accuracy."
    assert (told in found.sentence) == better
    assert ("the best one" in found.sentence) == better


def test_a_difference_that_is_none_when_rounded_is_not_told_as_none(make: Make) -> None:
    rules = {"backprop": (0.9, 0.91, 0.92), "mono_forward": (0.90001, 0.910011, 0.920012)}
    made = [make(rule, seed, test={"accuracy": value}) for rule, of in rules.items() for seed, value in enumerate(of)]
    rows = compare_table(made, "backprop")
    chart, *_ = paired_charts(rows, columns(rows), styles(rows, "backprop"), "backprop")
    assert chart.table[0][2:4] == ("+0.001", "[+0.0009, +0.001]")
    assert verdict(rows, columns(rows), "backprop").sentence.startswith(
        "mono_forward beats backprop by 0.001 points in test accuracy (95 % interval [+0.0009, +0.001], 3 pairs)"
    )


def test_costs_are_those_that_both_rows_know(make: Make) -> None:
    """Another row's card and meter hide nothing."""
    told = [{"source": "wall", "quality": "measured", "joules": 7.0, "reason": None}]
    card = {"energy": told, "cost": {"train_s": 1.0, "activation_peak_bytes": 10, "allocated_peak_bytes": 90}}
    made = [make(rule, seed) for rule in ("backprop", "mono_forward") for seed in range(3)]
    made += [make("x", seed, test={"accuracy": 0.1}, **card) for seed in range(3)]
    rows = compare_table([*made], "backprop")
    said = verdict(rows, columns(rows), "backprop").sentence
    assert f"0.767{TIMES} the joules (nvml, measured) and 0.345{TIMES} the peak activations." in said
    some = [make("backprop", seed, variant="v") for seed in range(3)]
    some += [make("x", seed, variant="v", energy=[], cost={"train_s": 30.0}) for seed in range(2)]
    rows = compare_table([*some, make("x", 2, variant="v")], "backprop")
    assert f"{TIMES} the joules (nvml, measured; over 1 pair)" in verdict(rows, columns(rows), "backprop").sentence
    # Nor does a chart lose two of three rows for the sake of one.
    rows = compare_table(made, "backprop")
    titles = [chart.title for chart in cost_charts(rows, columns(rows), styles(rows, "backprop"))]
    assert titles[-1] == "Test accuracy against peak activations"


def _target(make: Make, of: dict[str, Sequence[float | None]], joules: bool = False, **values: Any) -> str:
    """The verdict over runs to a target: seconds by seed, ``None`` for one that did not arrive."""
    made = []
    for rule, seconds in of.items():
        for seed, taken in enumerate(seconds):
            reached = (
                None
                if taken is None
                else {"accuracy": 0.9, "seconds": taken, "samples": 100, "joules": {"nvml": 2 * taken}}
            )
            target = reached or {"accuracy": 0.9}
            if not joules and reached:
                del reached["joules"]
            # The rule that overshoots the target by most is not the one that was sought.
            last = {"accuracy": 0.9 + len(rule) / 1000}
            if not joules:
                values |= {"energy": [], "cost": {"train_s": 9.0, "activation_peak_bytes": 1000}}
            made.append(make(rule, seed, mode="target", target=target, test=last, validation=last, **values))
    rows = compare_table(made, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.metric is not None
    assert found.metric.key == ("target/joules/nvml" if joules else "target/seconds")
    return found.sentence


def test_in_mode_target_the_sentence_is_about_what_it_cost(make: Make) -> None:
    rules: dict[str, Sequence[float | None]] = {
        "backprop": (2.0, 2.2, 2.4),
        "quick": (1.0, 1.12, 1.2),
        "slowest": (9.0, 9.1, 9.2),
    }
    said = _target(make, rules)
    assert said.startswith(
        f"quick, the one of the 2 others with the least time to target, takes 0.503{TIMES} of what backprop does in time to "
        "the target, accuracy 0.9 (a ratio paired by seed, 95 % interval [0.490, 0.516], 3 pairs"
    )
    assert "accuracy (" not in said
    measured = _target(make, rules, joules=True, dataset="measured")
    assert f"takes 0.503{TIMES} of what backprop does in joules (nvml, measured) to the target" in measured
    assert f"0.503{TIMES} [0.490, 0.516] the time to the target" in measured
    assert measured.count("joules") == 1  # and not a second time those of the whole training


def test_in_mode_target_joules_are_those_to_it_and_the_headline_where_every_run_has_them(
    make: Make, tmp_path: Path
) -> None:
    def run(rule: str, seed: int, joules: float | None, quality: str = "measured", **values: Any) -> Record:
        target = {"accuracy": 0.9, "seconds": 9.0 + seed, "joules": {} if joules is None else {"a/b": joules}}
        energy = [{"source": "a/b", "quality": quality, "joules": 50.0, "reason": None}]
        return make(rule, seed, mode="target", target=target, energy=energy, **values)

    made = [run("backprop", seed, 10.0) for seed in range(3)] + [run("x", seed, 5.0) for seed in range(3)]
    page = write_report([*made, make("x", 0, net="cnn")], tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"<td>0.500{TIMES}<small>measured</small></td>" in page.partition('id="glance"')[2].partition("</nav>")[0]
    some = [*made[:3], *(run("x", seed, None if seed else 5.0, variant="v") for seed in range(3))]
    rows = compare_table(some, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.sentence.startswith(
        "x · v and backprop cannot be told apart in time to the target, accuracy 0.9: 1.00"
    )
    assert f"0.500{TIMES} the joules to the target (a/b, measured; over 1 pair)" in found.sentence


def test_in_mode_target_the_mean_is_that_of_the_table(make: Make, tmp_path: Path) -> None:
    """By geometric means the first of them would be quicker."""
    made = [
        make(
            rule, seed, mode="target", target={"accuracy": 0.9, "seconds": seconds}, energy=[], cost={"train_s": 200.0}
        )
        for rule, of in (("a", (1.0, 10.0, 100.0)), ("b", (20.0, 20.0, 20.5)))
        for seed, seconds in enumerate(of)
    ]
    rows = compare_table(made, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.sentence.startswith(
        "b reaches the target, accuracy 0.9, in 3 of 3 runs, first of 2 rows: time to target 20.2 s; its interval of the "
        "geometric mean [19.5, 20.9] overlaps that of a."
    )
    page = write_report([*made[:3], make("x", 0, net="cnn")], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<td>37 s<small>time to target</small></td>" in page
    assert "time to target 37 s." in page
    assert '37 <span class="sd">± 55</span>' in page


def test_in_mode_target_seconds_of_another_machine_are_not_ranked(make: Make) -> None:
    there = {"hardware": {"cpu": "another"}}

    def said(others: dict[str, dict[str, Any]], dataset: str) -> str:
        made = [_arrived(make, "backprop", seed, 10.0 + seed, dataset=dataset) for seed in range(3)]
        for rule, values in others.items():
            taken = values.pop("seconds")
            made += [_arrived(make, rule, seed, taken + seed, dataset=dataset, **values) for seed in range(3)]
        rows = compare_table(made, "backprop")
        return verdict(rows, columns(rows), "backprop").sentence

    three = said({"a": {"seconds": 1.0, **there}, "b": {"seconds": 8.0}}, "three")
    assert three.startswith(f"b, the only other one whose time to target can be compared, takes 0.817{TIMES} of what")
    strange = " The time to target of a is not of the same machine, and not ranked."
    assert three.endswith(strange)
    four = said({"a": {"seconds": 1.0, **there}, "b": {"seconds": 8.0}, "c": {"seconds": 9.0}}, "four")
    assert four.startswith(
        "b, of the 2 others whose time to target can be compared the one with the least time to target,"
    )
    two = said({"a": {"seconds": 1.0, **there}}, "two")
    assert two == f"backprop reaches the target, accuracy 0.9, in 3 of 3 runs: time to target 11 s.{strange}"
    # Without the baseline the machine of most rows counts.
    made = [_arrived(make, rule, seed, 9.0, **there) for rule in "bc" for seed in range(3)]
    rows = compare_table([*made, *(_arrived(make, "a", seed, 1.0) for seed in range(3))], "backprop")
    found = verdict(rows, columns(rows), "backprop").sentence
    assert found.startswith("b reaches the target, accuracy 0.9, in 3 of 3 runs, first of 2 rows: time to target 9 s; ")
    assert found.endswith(strange)


def test_in_mode_target_a_baseline_on_another_machine_is_not_called_better(make: Make) -> None:
    made = [
        _arrived(make, rule, seed, seconds + seed / 10, config={"optimizer": {"lr": lr}}, hardware={"cpu": cpu})
        for rule, lr, seconds, cpu in (
            ("backprop", 0.1, 1.0, "y"),
            ("backprop", 0.2, 3.0, "x"),
            ("a", 0.2, 2.0, "x"),
        )
        for seed in range(3)
    ]
    rows = compare_table(made, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.better is None
    assert found.best is not None
    assert found.best.label == "a"


def test_in_mode_target_what_is_unknown_is_told(make: Make) -> None:
    """A simulated estimate has no honest seconds."""
    untimed = [_arrived(make, "x", seed, None) for seed in range(3)]
    rows = compare_table(untimed, "backprop")
    assert verdict(rows, columns(rows), "backprop").sentence.startswith(
        "x reaches the target, accuracy 0.9, in 3 of 3 runs, alone here; its time to target is unknown."
    )
    rows = compare_table([*untimed, *(_arrived(make, "backprop", seed, 2.0) for seed in range(3))], "backprop")
    assert verdict(rows, columns(rows), "backprop").sentence == (
        "backprop reaches the target, accuracy 0.9, in 3 of 3 runs: time to target 2 s. The time to target of x is unknown."
    )
    failed = [make(f"y{i}", 0, mode="target", config={"compare": {"target": 0.9}}, status="failed") for i in range(4)]
    rows = compare_table([*untimed, *failed], "backprop")
    assert verdict(rows, columns(rows), "backprop").sentence.endswith(
        "4 seeds did not finish; y0 reached the target in 0 of 1 runs; y1 reached the target in 0 of 1 runs; y2 reached the "
        "target in 0 of 1 runs; 1 more did not reach it in every run."
    )


def test_in_mode_target_without_a_comparison_the_doubt_is_told(make: Make) -> None:
    def said(of: dict[str, Sequence[float | None]], dataset: str) -> tuple[str, str]:
        made = [
            _arrived(make, rule, seed, taken, dataset=dataset) for rule, t in of.items() for seed, taken in enumerate(t)
        ]
        rows = compare_table(made, "backprop")
        found = verdict(rows, columns(rows), "backprop")
        return found.sentence.partition("time to target ")[2], found.certainty

    none = " There is no backprop to compare with."
    assert said({"a": (0.35, 0.352), "b": (0.11, 0.85)}, "few") == (
        f"0.351 s; n = 2, so nothing is certain.{none}",
        "too few seeds",
    )
    assert said({"a": (1.0, 1.1, 1.2), "b": (2.0, 3.0)}, "second") == (
        f"1.10 s; b, next to it, has too few seeds for an interval.{none}",
        "too few seeds",
    )
    told, certainty = said({"a": (1.0, 1.1, 1.2), "b": (1.1, 1.2, 1.3)}, "overlap")
    assert "s; its interval of the geometric mean [0.87, 1.38] overlaps that of b." in told
    assert certainty == "intervals overlap"
    told, certainty = said({"a": (1.0, 1.1, 1.2), "b": (8.0, 8.1, 8.2)}, "apart")
    assert "lies apart from that of b." in told
    assert certainty == "intervals apart"
    assert said({"a": (1.0, 1.1, 1.2)}, "alone") == (f"1.10 s.{none}", "nothing to compare")
    told, certainty = said({"a": (0.0, 1.1, 1.2), "b": (8.0, 8.1, 8.2)}, "zero")
    assert "; no interval on a logarithmic scale, for a value is not above 0, so nothing is certain." in told
    assert certainty == "no interval"


def _arrived(make: Make, rule: str, seed: int, seconds: float | None, **values: Any) -> Record:
    """A run that reached its target, without joules, after so many seconds, if anybody knows how many."""
    timed = {} if seconds is None else {"seconds": seconds}
    target = {"accuracy": 0.9, "samples": 100, **timed}
    return make(rule, seed, **{"mode": "target", "target": target, "energy": [], "cost": {}, **values})


def test_in_mode_target_who_arrives_comes_before_what_it_cost(make: Make) -> None:
    said = _target(make, {"backprop": (2.0, 2.2, 2.4), "quick": (1.0, None, None)})
    assert said.startswith(
        "backprop reaches the target, accuracy 0.9, in 3 of 3 runs, first of 2 rows: time to target 2.20 s."
    )
    assert "Where runs did not arrive there is no ratio." in said
    assert "quick reached the target in 1 of 3 runs" in said
    nobody = _target(make, {"backprop": (None, None), "quick": (None, None)}, dataset="nobody")
    assert nobody.startswith("No run reached the target, accuracy 0.9.")
    few = _target(make, {"backprop": (2.0,), "quick": (1.0,)}, dataset="few")
    assert "over 1 pair: fewer than three pairs, so nothing is certain" in few
    chosen: dict[str, Sequence[float | None]] = {"backprop": (2.0, 2.2), "late": (1.0, None), "quick": (1.5, 1.6)}
    assert _target(make, chosen, dataset="one").startswith("quick, the only other one whose runs all arrived, takes")
    assert _target(make, {**chosen, "slow": (8.0, 8.0)}, dataset="more").startswith(
        "quick, of the 2 others whose runs all arrived the one with the least time to target, takes"
    )
    alike = _target(make, {"backprop": (2.0, 2.2, 2.4), "quick": (2.1, 2.0, 2.6)}, dataset="alike")
    assert alike.startswith("quick and backprop cannot be told apart in time to the target, accuracy 0.9: 1.0")


def test_in_mode_target_a_baseline_with_better_settings_is_named(make: Make) -> None:
    made = [
        make(
            rule,
            seed,
            mode="target",
            target={"accuracy": 0.9, "seconds": seconds + seed / 10},
            config={"optimizer": {"lr": lr}},
        )
        for rule, lr, seconds in (("backprop", 0.1, 1.0), ("backprop", 0.2, 3.0), ("a", 0.2, 2.0))
        for seed in range(3)
    ]
    rows = compare_table(made, "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.better is found.best
    assert f"a takes 0.677{TIMES} of what backprop · optimizer.lr=0.2 does" in found.sentence
    assert found.sentence.endswith("the best one is backprop · optimizer.lr=0.1, with 1.10 s.")


def test_what_failed_is_named_with_its_settings(make: Make, tmp_path: Path) -> None:
    made = [make("backprop", seed, config={"optimizer": {"lr": lr}}) for seed in (0, 1) for lr in (0.1, 0.2)]
    made.append(make("backprop", 0, status="failed", error="diverged", config={"optimizer": {"lr": 9.0}}))
    page = write_report(made, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<b>backprop · optimizer.lr=9</b> on digits, seed 0" in page.partition("<main")[0]
    assert '<td class="left wrap">backprop · optimizer.lr=9</td><td>0</td>' in page


def test_nobody_reaches_the_baseline(make: Make) -> None:
    rules = {"backprop": (0.95, 0.96, 0.97), "a": (0.90, 0.911, 0.92), "b": (0.8, 0.81, 0.82)}
    said = _verdict(make, rules)
    assert said.startswith(
        "backprop beats a, the best of the 2 others by validation accuracy, by 4.97 points in test accuracy"
    )


def _sweep(make: Make, rule: str, of: dict[float, tuple[float, float]]) -> list[Record]:
    """Three seeds of every setting of a rule, with its validation and test accuracy."""
    return [
        make(
            rule,
            seed,
            config={"optimizer": {"lr": lr}},
            validation={"accuracy": validation + seed / 1000},
            test={"accuracy": test + seed / 1000 + (rule == "b" and seed == 1) / 2000},
        )
        for lr, (validation, test) in of.items()
        for seed in range(3)
    ]


def test_settings_are_chosen_by_validation_and_the_sentence_says_so(make: Make) -> None:
    """Of a sweep the setting with the best test figure is the best by luck; the baseline has settings, too."""
    made = _sweep(make, "b", {0.1: (0.90, 0.99), 0.2: (0.95, 0.93), 0.3: (0.91, 0.92)})
    rows = compare_table([*made, *_sweep(make, "backprop", {0.2: (0.94, 0.90), 0.5: (0.96, 0.91)})], "backprop")
    found = verdict(rows, columns(rows), "backprop")
    assert found.rival is not None
    assert found.rival.label == "b · optimizer.lr=0.2"
    assert found.best is not None
    assert found.best.label == "backprop · optimizer.lr=0.5"
    assert found.better is found.best
    assert found.sentence.startswith(
        "b · optimizer.lr=0.2, the best of the 3 others by validation accuracy, beats backprop · optimizer.lr=0.2 by 3.02 "
        "points in test accuracy"
    )
    assert found.sentence.endswith(
        "That is the backprop whose settings are nearest to its own; the best one is backprop · optimizer.lr=0.5, with 96.10 % "
        "validation accuracy."
    )
    without = [make("b", 0, test={"accuracy": 0.5}, config={"optimizer": {"lr": 0.7}})]
    rows = compare_table([*made, *without], "backprop")
    said = verdict(rows, columns(rows), "backprop")
    assert said.sentence.startswith("b · optimizer.lr=0.1 has the highest test accuracy of 4 rows")
    assert said.chosen_by == "test accuracy (not every row has a validation figure)"


def test_without_a_baseline_intervals_are_compared(make: Make) -> None:
    apart = _verdict(make, {"a": (0.90, 0.911, 0.92), "b": (0.8, 0.81, 0.82)})
    assert "a has the highest validation accuracy of 2 rows, and 91.03 % test accuracy" in apart
    assert "lies apart from that of b" in apart
    assert "There is no backprop to compare with." in apart
    assert "overlaps that of b" in _verdict(make, {"a": (0.90, 0.91, 0.92), "b": (0.89, 0.9, 0.93)}, dataset="other")
    small = {"task": "reconstruction", "metric": {"name": "mse", "maximise": False}, "net": "autoencoder"}
    rows = compare_table(
        [
            make(a, s, test={"mse": v}, validation={"mse": v}, **small)
            for a, v in (("a", 0.02), ("b", 0.01))
            for s in (0, 1, 2)
        ]
    )
    assert "b has the lowest validation MSE of 2 rows" in verdict(rows, columns(rows), "backprop").sentence


def _own(make: Make, rule: str, epochs: int, seed: int = 0, **schedule: Any) -> Record:
    config = {"schedule": {"monitor": None, "restore_best": True, **schedule}, "trainer": {"max_epochs": 20}}
    return make(rule, seed, epochs=[epochs], config=config)


def test_mode_own_says_what_ended_the_runs(make: Make) -> None:
    def said(*records: Record) -> str:
        return own_ends(compare_table(records, "backprop"), "accuracy")

    patient = [_own(make, "a", epochs, seed, patience=1) for seed, epochs in enumerate((20, 7, 9))]
    assert said(*patient) == (
        "Every run ends once validation accuracy has not improved for 1 validation, or after all epochs (20), as 1 of 3 "
        "did."
    )
    whole = _own(make, "backprop", 20, patience=None, restore_best=False)
    ends = "after all epochs (20), for there is no stopping rule, and its last weights are kept"
    assert said(whole) == f"Every run ends {ends}."
    assert said(*patient, whole).startswith(
        f"Not all runs end by the same rule: 1 run (backprop) {ends}; 3 runs (a) once"
    )
    closed = [_own(make, "ridge", 1, seed, patience=5) for seed in (0, 1)]
    sooner = "sooner than after 5 validations without improvement or all epochs (20)"
    assert said(*closed) == f"Every run ends {sooner}."
    assert said(*closed, *patient).startswith("Not all runs end by the same rule: 3 runs (a) once")
    assert f"; 2 runs (ridge) {sooner}" in said(*patient, *closed)
    assert said(_own(make, "ridge", 1, patience=None)) == "Every run ends sooner than after all epochs (20)."
    unwatched = [_own(make, "b", 20, patience=None, monitor=m) for m in (None, "validation/loss")]
    assert said(*unwatched) == "Every run ends after all epochs (20), for there is no stopping rule."
    assert "do not say" in said(make("a", 9))
    assert said(make("a", 9, status="failed")) == ""


def test_a_front_says_how_many_rows_it_leaves_out(make: Make) -> None:
    made = [make(rule, seed) for rule in ("backprop", "a") for seed in range(3)]
    rows = compare_table([*made, make("a", 3, status="failed"), make("a", 0, variant="v")], "backprop")
    chart, *_ = cost_charts(rows, columns(rows), styles(rows, "backprop"))
    assert "The front leaves out 1 of 3 rows: a (not every seed finished)." in chart.note
    assert "flattered by luck" in chart.note
    rows = compare_table(made, "backprop")
    chart, *_ = cost_charts(rows, columns(rows), styles(rows, "backprop"))
    assert "leaves out" not in chart.note
    assert "flattered" not in chart.note


def test_an_interval_column_says_why_there_is_no_interval(make: Make) -> None:
    """And not why there is no ratio to the baseline."""

    def run(rule: str, seed: int, taken: float, **target: Any) -> Record:
        cost = {"train_s": taken}
        return make(rule, seed, mode="target", energy=[], target={"accuracy": 0.9, **target}, cost=cost)

    made = [run("backprop", seed, 5.0 + seed, seconds=1.0) for seed in range(3)]
    made += [run("few", seed, 7.0 + seed) for seed in (0, 1)]
    made += [run("zero", seed, float(seed)) for seed in range(3)]
    rows = compare_table(made, "backprop")
    (time,) = cost_charts(rows, columns(rows), styles(rows, "backprop"))
    told = {line[0]: line[5] for line in time.table}
    assert told["few"] == "none, n = 2"
    assert told["zero"].startswith("no interval on a logarithmic scale, for a value is not above 0; 0 of 3 reached")


def test_a_front_of_seconds_is_that_of_one_machine(make: Make) -> None:
    """What is counted goes with every machine."""
    made = [make("backprop", seed) for seed in range(3)]
    made += [make("x", seed, hardware={"cpu": "another"}) for seed in range(3)]
    rows = compare_table(made, "backprop")
    *_, time, activations = cost_charts(rows, columns(rows), styles(rows, "backprop"))
    why = "its training time is not of the same machine"
    assert f"The front leaves out 1 of 2 rows: x ({why})." in time.note
    assert [line[-1] for line in time.table] == ["on it", f"not placed: {why}"]
    assert len(time.figure["data"][0]["x"]) == 1
    (shown,) = [trace for trace in time.figure["data"] if trace["name"] == "backprop" and "text" in trace]
    assert f"<br>Training time {time.table[0][4]} s<br>" in shown["text"][0]
    assert "leaves out" not in activations.note


def test_the_top_names_what_failed_and_every_comparison_has_a_line(tmp_path: Path) -> None:
    page = write_report(varied(tmp_path / "runs"), tmp_path / "r.html").read_text(encoding="utf-8")
    top = page.partition("<main")[0]
    assert "4 runs did not finish" in top
    assert "layer3&#x27; diverged" in top
    assert page.count('<tr data-section="') == page.count('<section id="s') == 6
    assert "36 finished runs, 9 rules, 6 comparisons" in top
    assert "Rows without figures for all of their seeds come after the others." in page


def test_a_run_that_another_one_went_on_with_is_none_that_did_not_finish(make: Make, tmp_path: Path) -> None:
    first = make("backprop", 0, status="interrupted")
    whole = make("backprop", 0, resumed_from=first.id)
    page = write_report([first, whole], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "did not finish" not in page
    assert write_report([first], tmp_path / "r.html").read_text(encoding="utf-8").count("1 run did not finish") == 1
    again = write_report([first], tmp_path / "r.html", running=[whole]).read_text(encoding="utf-8")
    assert "1 run going on" in again
    assert "did not finish" not in again


def test_of_more_runs_that_go_on_than_are_named_the_others_are_counted(make: Make, tmp_path: Path) -> None:
    running = [make("backprop", seed) for seed in range(9)]
    page = write_report([], tmp_path / "r.html", running=running).read_text(encoding="utf-8")
    assert "9 runs going on" in page
    assert "<li>and 3 more</li>" in page


# -- styles -----------------------------------------------------------------------------------------------------------
def test_rules_have_hues_and_settings_markers_and_dashes(make: Make) -> None:
    made = [make(f"rule{i}", 0, variant=v) for i in range(9) for v in ("a", "b", "c")] + [make("backprop", 0)]
    rows = compare_table(made, "backprop")
    found = styles(rows, "backprop")
    hues = {row.algorithm: {found[r.label].colour for r in rows if r.algorithm == row.algorithm} for row in rows}
    assert all(len(of) == 1 for of in hues.values())
    assert len({next(iter(of)) for of in hues.values()}) == 10
    for i in range(9):
        own = [found[row.label] for row in rows if row.algorithm == f"rule{i}"]
        assert len({style.symbol for style in own}) == len({style.dash for style in own}) == 3


# -- charts -----------------------------------------------------------------------------------------------------------
def test_runs_that_never_arrived_are_drawn_as_such(make: Make) -> None:
    def run(seed: int, seconds: float | None) -> Record:
        reached = {} if seconds is None else {"seconds": seconds}
        return make(
            "x",
            seed,
            energy=[],
            cost={"train_s": 45 * (1 + seed / 50)},
            mode="target",
            target={"accuracy": 0.97, **reached},
        )

    rows = compare_table([run(0, 10.0), run(1, 12.0), run(2, None)])
    chart, *_ = target_charts(rows, columns(rows), styles(rows, "backprop"))
    arrived, censored = chart.figure["data"]
    assert (arrived["x"], censored["x"]) == ([10.0, 12.0], [pytest.approx(45.0 * 1.04)])
    assert censored["marker"]["symbol"] == "triangle-right-open"
    assert chart.table == [
        ("x", "2 of 3 reached", f"{AT_LEAST} 22.9", f"10.0 (seed 0), 12.0 (seed 1), {AT_LEAST} 46.8 (seed 2)")
    ]


def test_rows_that_differ_in_a_late_setting_have_names_that_differ(make: Make) -> None:
    """On every axis that names them, and in the sentence."""
    alike = ", ".join(f"optimizer.a_setting_number_{i}=0.00{i}" for i in range(4))
    told = {"accuracy": 0.9, "seconds": 1.0}
    made = [make("backprop", seed, mode="target", target=told) for seed in range(3)]
    for n in (4, 5):
        variant = f"{alike}, trainer.max_epochs={n}"
        made += [make("x", s, mode="target", target={**told, "seconds": n + s}, variant=variant) for s in range(3)]
    rows = compare_table(made, "backprop")
    shown, style = columns(rows), styles(rows, "backprop")
    charts = [*paired_charts(rows, shown, style, "backprop"), *memory_charts(rows, shown, style)]
    charts += [*target_charts(rows, shown, style), *energy_charts(rows, shown)]
    for chart in charts:
        names = {name for trace in chart.figure["data"] for name in trace["y"]}
        assert len(names) == len({line[0] for line in chart.table}), chart.title
    said = verdict(rows, shown, "backprop").sentence
    assert said.startswith("x · optimizer.a_setting_number_0=0.000, …, trainer.max_epochs=4, the one of the 2 others")


def test_names_are_cut_no_further_than_they_stay_different() -> None:
    one, other = (f"{'a' * 60}{middle}{'b' * 60}" for middle in "xy")
    found = short([one, other, "c", one])
    assert list(found) == [one, other, "c"]
    assert found["c"] == "c"
    assert found[one] != found[other]
    assert short([one])[one] == f"{'a' * 45}…{'b' * 45}"
    assert short(["x · " + ", ".join("abcdefghijklmnopqrstuvwxyz" * 2)]).popitem()[1].count("…") == 1


def test_joules_stand_by_source_and_per_sample(make: Make) -> None:
    cost = {"train_s": 10.0, "samples": 500, "energy_j": {"nvml": 50.0, "model": 5.0}}
    energy = [
        {"source": "nvml", "quality": "measured", "joules": 50.0, "reason": None},
        {"source": "model", "quality": "modelled", "by": "time", "joules": 5.0, "reason": None},
    ]
    rows = [per_sample(row) for row in compare_table([make("x", s, cost=cost, energy=energy) for s in (0, 1, 2)])]
    assert rows[0].figures["sample_energy_j/nvml"].centre == pytest.approx(0.1)
    (chart,) = energy_charts(rows, columns(rows))
    hatched = {trace["name"]: trace["marker"]["pattern"]["shape"] for trace in chart.figure["data"]}
    assert hatched == {"nvml, measured": "", "model, modelled (time)": "/"}
    assert {line[1]: line[4:] for line in chart.table} == {
        "nvml": ("50 J", UNKNOWN, "100 mJ"),
        "model": ("5 J", UNKNOWN, "10.0 mJ"),
    }
    none = [per_sample(row) for row in compare_table([make("y", 0, cost={**cost, "samples": 0}, energy=energy)])]
    assert not any(key.startswith("sample_energy_j") for key in none[0].figures)
    # A bar is as long as the number beside it.
    rows = compare_table([make("z", s, cost={}, energy=[{**energy[0], "joules": 10.0**s}]) for s in (0, 1, 2)])
    (chart,) = energy_charts(rows, columns(rows))
    assert (chart.figure["data"][0]["x"], chart.table[0][4]) == ([37.0], "37 ± 55 J")


def test_parallel_coordinates_have_a_scale_per_setting() -> None:
    points = [
        (f"run {i}", {"optimizer.lr": lr, "net.kind": kind}, 90.0 + i)
        for i, (lr, kind) in enumerate([(1e-4, "a"), (1e-3, "b"), (1e-2, "a"), (1e-2, "c")])
    ]
    chart = parallel_chart("t", points, "accuracy", False)
    assert chart is not None
    drawn = {trace["name"]: trace["y"] for trace in chart.figure["data"]}
    assert drawn["run 1"] == pytest.approx(
        [0.5, 0.5, 1 / 3]
    )  # half way on a logarithmic scale, the second of three words
    assert drawn["run 3"] == pytest.approx([1.0, 1.0, 1.0])
    assert [trace["name"] for trace in chart.figure["data"]][-1] == "run 3"  # the best is drawn above the others
    assert parallel_chart("t", points[:3], "accuracy", False) is None
    assert parallel_chart("t", [(n, {"optimizer.lr": s["optimizer.lr"]}, v) for n, s, v in points], "a", False) is None


@pytest.mark.parametrize("lower", [False, True])
def test_of_many_experiments_the_best_are_drawn_and_their_number_is_told(lower: bool) -> None:
    points = [(f"run {i}", {"a": i, "b": i % 7}, float(-i if lower else i)) for i in range(400)]
    chart = parallel_chart("t", points, "accuracy", lower)
    assert chart is not None
    assert [trace["name"] for trace in chart.figure["data"]] == [f"run {i}" for i in range(100, 400)]
    assert len(chart.table) == 300
    assert "Of 400 experiments the 300 best are here." in chart.note


# -- searches and students --------------------------------------------------------------------------------------------
def test_validations_of_every_trial_are_drawn_and_pruned_ones_marked(make: Make, tmp_path: Path) -> None:
    def trial(number: int, state: str, steps: Sequence[float], **other: Any) -> dict[str, Any]:
        told = {str(step): value for step, value in enumerate(steps, 1)}
        return {"number": number, "state": state, "params": {}, "values": [steps[-1]], "intermediate": told, **other}

    trials = [
        trial(0, "COMPLETE", (0.5, 0.6, 0.8)),
        trial(1, "PRUNED", (0.4, 0.3)),
        {"number": 2, "state": "FAIL", "params": {}, "values": None, "intermediate": {}},
        trial(3, "COMPLETE", (0.7, None, 0.9)),
    ]
    search(tmp_path / "runs", studies=[{"algorithm": "a", "trials": trials, "best": [3]}])
    (found,), problems = read_searches([make("a")])
    assert problems == []
    chart = next(chart for chart in found.charts if chart.title == "Validations of every trial")
    lines, crosses, best = chart.figure["data"]
    assert lines["x"] == [1, 2, 3, None, 1, 2, None, 1, 3, None]
    assert lines["y"] == [50, 60, 80, None, 40, 30, None, 70, 90, None]
    assert (crosses["x"], crosses["y"], crosses["text"], crosses["marker"]["symbol"]) == ([2], [30], ["trial 1"], "x")
    assert (best["x"], best["y"], best["line"]["width"]) == ([1, 3], [70, 90], 3)
    assert chart.table[1] == ("a, 1", "pruned", "2", "40.00 %", "30.00 %")
    assert [path.suffix for path in draw(chart, tmp_path / "lines")] == [".svg", ".pdf"]


def test_a_long_search_is_drawn_with_few_points(make: Make, tmp_path: Path) -> None:
    told = {str(step): 0.5 for step in range(60)}
    trials = [{"number": n, "state": "COMPLETE", "params": {}, "intermediate": told} for n in range(2000)]
    search(tmp_path / "runs", studies=[{"algorithm": "a", "trials": trials, "best": []}])
    (found,), _ = read_searches([make("a")])
    (chart,) = [chart for chart in found.charts if chart.title == "Validations of every trial"]
    assert sum(x is not None for x in chart.figure["data"][0]["x"]) == 4000
    assert "Of long lines 2 points are drawn." in chart.note
    assert len(json.dumps(chart.figure)) < 150_000


@pytest.mark.parametrize("lower", [False, True])
def test_of_many_trials_the_best_of_every_rule_are_in_the_tables(lower: bool, make: Make, tmp_path: Path) -> None:
    def study(rule: str) -> dict[str, Any]:
        values = [(100 - n if lower else n) / 1000 for n in range(100)]
        trials = [
            {"number": n, "state": "COMPLETE", "params": {}, "values": [v], "intermediate": {"1": v}}
            for n, v in enumerate(values)
        ]
        return {"algorithm": rule, "trials": trials, "best": [99]}

    aims = [{"name": "mse" if lower else "accuracy", "direction": "minimize" if lower else "maximize"}]
    search(tmp_path / "runs", studies=[study("a"), study("b")], objectives=aims)
    (found,), _ = read_searches([make("a")])
    for chart in found.charts[:2]:
        assert [line[0] for line in chart.table] == [f"{rule}, {n}" for rule in "ab" for n in range(60, 100)]
        assert chart.note.endswith(" Of more than 40 trials of a rule the 40 best are in the table.")
    assert len(found.charts[0].figure["data"][0]["x"]) == 100
    assert "the best of many is flattered by luck" in found.sentence


def test_a_search_of_very_many_trials_is_counted_as_a_whole(make: Make, tmp_path: Path) -> None:
    trials = [{"number": n, "state": "COMPLETE", "params": {}, "values": [n / 3000]} for n in range(2500)]
    shares = {"accuracy": {f"s{i}": 0.01 * i for i in range(20)}}
    aims = [{"name": "accuracy", "direction": "maximize"}, {"name": "train_s", "direction": "minimize"}]
    search(tmp_path / "runs", studies=[{"algorithm": "a", "trials": trials, "best": [2499], "importances": shares}])
    (found,), _ = read_searches([make("a")])
    assert "(2500 trials, 0 pruned" in found.sentence
    history, importances = found.charts
    points, line = history.figure["data"]
    assert (points["x"][0], len(points["x"]), line["x"][-1]) == (500, 2000, 2499)
    assert "Of more than 2000 trials of a rule the 2000 best are drawn." in history.note
    assert importances.note.endswith("Of more than 15 settings the 15 that explain most are shown.")
    pairs = [{**one, "values": [one["number"], one["number"]]} for one in trials[:50]]
    search(tmp_path / "runs", studies=[{"algorithm": "a", "trials": pairs, "best": [*range(50)]}], objectives=aims)
    (found,), _ = read_searches([make("a")])
    assert "Of more than 12 best trials of a rule the first 12 are in the table." in found.sentence
    assert "Of more than 40 trials of a rule in it the first 40 are in the table." in found.charts[1].note
    third = [*aims, {"name": "params", "direction": "minimize"}]
    search(tmp_path / "runs", studies=[{"algorithm": "a", "trials": pairs, "best": [0]}], objectives=third)
    chart = read_searches([make("a")])[0][0].charts[1]
    assert chart.title == "The first two objectives"
    assert chart.note == "Filled marks are the Pareto set of all 3 objectives."


def test_a_search_has_its_history_importances_and_best_settings(make: Make, tmp_path: Path) -> None:
    record = make("backprop", 0)
    path = search(tmp_path / "runs")
    text = write_report([record], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Every rule has a budget of 30 trials, sampler tpe, pruner median." in text
    charts = json.loads(text.partition('id="charts">')[2].partition("</script>")[0])
    (history,) = [c for c in charts if c["layout"]["xaxis"].get("title", {}).get("text") == "trial"]
    data = json.loads(path.read_text(encoding="utf-8"))
    trials = data["studies"][0]["trials"]
    best = max(t["values"][0] for t in trials if t["state"] == "COMPLETE")
    line = next(t for t in history["data"] if t["name"] == "backprop, best so far")
    assert line["y"][-1] == pytest.approx(100 * best)
    assert all(a <= b for a, b in zip(line["y"], line["y"][1:], strict=False))
    assert {"backprop, pruned", "backprop"} <= {t["name"] for t in history["data"]}
    (shares,) = [c for c in charts if "share of the variation" in str(c["layout"])]
    assert shares["data"][0]["x"] == pytest.approx([80.0, 15.0, 5.0])


def test_trials_are_in_no_comparison(make: Make, tmp_path: Path) -> None:
    kept, trial = make("backprop", 0), make("backprop", 1000, dataset="other")
    path = search(tmp_path / "runs")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["studies"][0]["trials"][0]["records"] = [trial.id]
    path.write_text(json.dumps(data), encoding="utf-8")
    text = write_report([kept, trial], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "1 finished run, 1 rule, 1 comparison" in text
    assert "1 trial of tuning is in no comparison." in text


@pytest.mark.parametrize(
    "broken",
    ["", "[]", '{"schema": 2}', '{"schema": 1, "studies": 7}', '{"schema": 1, "studies": [{"trials": [1, {}]}]}'],
)
def test_a_search_or_students_that_cannot_be_read_stop_nothing(broken: str, make: Make, tmp_path: Path) -> None:
    record = make("backprop", 0)
    for path in (search(tmp_path / "runs"), students(record)):
        path.write_text(broken, encoding="utf-8")
    text = write_report([record], tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"{students(record)} is left out" in text
    assert "backprop" in text


def test_students_of_every_depth_have_a_line(make: Make) -> None:
    record = make("backprop", 0)
    students(record)
    ((chart,), problems) = read_distilled(compare_table([record]))
    assert not problems
    assert [line[:2] for line in chart.table] == [
        *(("teacher", "0"), ("svd, 0.25 of the size", "1"), ("svd, 0.25 of the size", "2")),
        *(("snnk, 0.25 of the size", "1"), ("snnk, 0.25 of the size", "2")),
    ]
    assert chart.table[1] == (
        *("svd, 0.25 of the size", "1", "97.00", "97.00", "1.00", "700,000"),
        *(f"0.429{TIMES}", f"0.5{TIMES}", f"0.6{TIMES}"),
    )


def test_a_picture_of_many_lines_names_as_many_as_there_is_room_for_and_says_so() -> None:
    figure = Figure()
    lines = [{"type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, i], "name": f"line {i}"} for i in range(40)]
    _draw(figure, {"data": lines, "layout": {}})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"line {i}" for i in range(25)]
    assert legend.get_title().get_text() == "the first 25 of 40 names"


def test_what_lies_on_a_heatmap_is_drawn_on_its_cells() -> None:
    figure = Figure()
    heat = {"type": "heatmap", "z": [[0, 1, 2], [3, 4, 5]], "x": [0, 8, 16], "y": ["1", "2"]}
    dots = {"type": "scatter", "mode": "markers", "x": [8, 16], "y": ["2", "2"]}
    _draw(figure, {"data": [heat, dots], "layout": {}})
    (line,) = figure.axes[0].lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [1, 1])


# -- files ------------------------------------------------------------------------------------------------------------
def test_every_figure_is_a_vector_and_every_table_a_file(make: Make, tmp_path: Path) -> None:
    few = {"cost": {"train_s": 3.0}, "energy": [], "curves": {"validation/accuracy": [0.5, 0.9]}}
    made = [make(rule, seed, **few) for rule in ("backprop", "mono_forward") for seed in (0, 1, 2)]
    text = write_report(made, tmp_path / "r.html", figures=True).read_text(encoding="utf-8")
    folder = tmp_path / "r_figures"
    charts = text.partition('<script type="application/json"')[0].count("data-chart=")
    assert charts == 4
    for end in ("svg", "pdf"):
        assert len(list(folder.glob(f"*.{end}"))) == charts
    for path in folder.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert root.findall(".//{http://www.w3.org/2000/svg}path")
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))
    assert (
        len(list(folder.glob("*.csv"))) == len(list(folder.glob("*.tex"))) == charts + 2
    )  # the headline, and the runs
    assert all(r"\toprule" in path.read_text(encoding="utf-8") for path in folder.glob("*.tex"))
    links = [link for link in re.findall(r'href="([^"#]+)"', text) if link.startswith("r_figures")]
    assert len(links) == 4 * charts
    assert all((tmp_path / link).is_file() for link in links)
    time_chart = next(path for path in folder.glob("*accuracy-against-training-time.svg"))
    assert "mono_forward" in time_chart.read_text(encoding="utf-8")  # names stay text


def test_watch_writes_the_page_again_when_records_change(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("backprop", 0)
    page, seen = tmp_path / "runs" / "report.html", []

    def look(_: float) -> None:
        """Between two looks something changes, and at last the user ends it."""
        seen.append(page.read_text(encoding="utf-8"))
        if len(seen) == 1:
            make("mono_forward", 0)
        elif len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", look)
    with pytest.raises(KeyboardInterrupt):
        command.report(["--watch", str(tmp_path / "runs")])
    assert 'data-watch="5"' in seen[0]
    assert "1 finished run," in seen[0]
    assert "2 finished runs," in seen[1]
    assert seen[2] == seen[1]
    monkeypatch.undo()
    assert command.report([str(tmp_path / "runs")]) == 0
    assert "data-watch" not in page.read_text(encoding="utf-8").partition("<head>")[0]


def test_watch_sees_that_a_run_was_killed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(
        tmp_path / "runs", {"algorithm": "backprop", "dataset": "digits", "net": "mlp", "seed": 0}
    )
    page, seen = tmp_path / "runs" / "report.html", []

    def look(_: float) -> None:
        seen.append(page.read_text(encoding="utf-8"))
        if len(seen) == 2:
            raise KeyboardInterrupt
        assert folder._lock is not None
        folder._lock.release()  # as the system does for a process that is gone

    monkeypatch.setattr(command.time, "sleep", look)
    with pytest.raises(KeyboardInterrupt):
        command.report(["--watch", str(tmp_path / "runs")])
    assert "1 run going on" in seen[0]
    assert "going on" not in seen[1]
    assert "interrupted" in seen[1]
    assert "left out" not in capsys.readouterr().err  # of the run that went on, which is no problem


# -- in a browser -----------------------------------------------------------------------------------------------------
def _rows(tab: Tab) -> set[str]:
    """Rules of the rows that are to be seen."""
    shown = "[...document.querySelectorAll('section[data-place] tr[data-rule]')].filter((row) => row.checkVisibility())"
    return set(tab.run(f"{shown}.map((row) => row.dataset.rule)"))


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_forty_varied_runs_stand_without_overlaps_and_requests(width: int, tmp_path: Path) -> None:
    page = write_report(varied(tmp_path / "runs"), tmp_path / "r.html")
    assert page.stat().st_size < 3_000_000
    with browser() as tab:
        tab.open(page, width)
        tab.draw_all()
        found = tab.run(OVERLAPS)
        assert found["texts"] > 1500
        assert found["overlaps"] == []
        assert found["beyond"] == []
        assert not found["sideways"]
        # A table scrolls in no direction in a wide window, and never downwards.
        assert width < 600 or found["tables"] == []
        # In a narrow one its cells stand below each other, each with its heading.
        bare = "[...document.querySelectorAll('.cards td')].filter((c) => c.checkVisibility() && !c.dataset.h).length"
        assert width > 600 or tab.run(f"{bare}") == 0
        assert tab.asked() == {page.as_uri()}
        assert tab.complaints() == []


@needs_browser
def test_a_thousand_runs_open_and_are_filtered_sorted_and_chosen(tmp_path: Path) -> None:
    page = write_report(many(tmp_path / "runs"), tmp_path / "r.html")
    assert page.stat().st_size < 10_000_000
    with browser() as tab:
        tab.open(page, 1280)
        tab.wait("document.querySelector('[data-section]')")
        assert _rows(tab) == set(RULES)
        # by rule, with the keyboard's means: labels and boxes
        tab.run(
            "[...document.querySelectorAll('#filter label')].find((l) => l.textContent.trim() === 'pepita')"
            ".querySelector('input').click()"
        )
        assert _rows(tab) == {"pepita"}
        tab.run("[...document.querySelectorAll('#filter button')].find((b) => b.textContent === 'Show all').click()")
        assert _rows(tab) == set(RULES)
        # by text
        tab.run("found = document.querySelector('[type=search]'); found.value = 'cafo data_3'; null")
        tab.run("found.dispatchEvent(new Event('input'))")
        assert _rows(tab) == {"cafo"}
        assert tab.run("[...document.querySelectorAll('[data-section]')].filter((r) => !r.hidden).length") == 1
        assert tab.run("document.querySelector('#filter output').textContent").endswith("in 1 comparisons")
        tab.run("[...document.querySelectorAll('#filter button')].find((b) => b.textContent === 'Show all').click()")
        # sorted by a column, up and down
        values = "[...document.querySelectorAll('.glance tbody tr')].map((r) => parseFloat(r.cells[2].textContent))"
        click = "document.querySelectorAll('.glance thead th')[2].querySelector('button').click()"
        tab.run(click)
        down = tab.run(values)
        tab.run(click)
        assert (down, tab.run(values)) == (sorted(down, reverse=True), sorted(down))
        assert tab.run(OVERLAPS)["overlaps"] == []
        assert tab.asked() == {page.as_uri()}
        assert tab.complaints() == []


@needs_browser
def test_columns_and_runs_are_chosen_and_names_stand_at_the_lines(make: Make, tmp_path: Path) -> None:
    made = [
        make(
            rule,
            seed,
            cost={
                "train_s": 3.0,
                **{f"{n}_bytes": 1e6 for n in ("state", "gradient", "optimizer", "cache", "activation_peak")},
                **dict.fromkeys(("params", "extra_params", "samples", "inference_flops", "update_flops"), 7e6),
            },
        )
        for rule in ("backprop", "x")
        for seed in (0, 1)
    ]
    page = write_report(made, tmp_path / "r.html")
    with browser() as tab:
        tab.open(page, 1280)
        tab.draw_all()
        headings = (
            "[...document.querySelectorAll('table[data-columns] thead th')].filter((t) => t.checkVisibility()).length"
        )
        before = tab.run(headings)
        tab.run("document.querySelector('.choices').parentElement.open = true")
        tab.run("[...document.querySelectorAll('.choices input')].find((b) => !b.checked).click()")
        assert tab.run(headings) == before + 1
        drawn = "document.querySelectorAll('.chooser .main-svg').length"
        assert tab.run("document.querySelectorAll('.chooser [data-choice]:not([hidden])').length") == 1
        tab.run(
            "(() => { const s = document.querySelector('.choose'); s.value = '2'; s.dispatchEvent(new Event('change')); })()"
        )
        assert tab.run("document.querySelector('.chooser [data-choice]:not([hidden])').dataset.choice") == "2"
        tab.draw_all()
        assert tab.run(drawn) > 0
        assert tab.run("document.querySelectorAll('.chart[data-labelled] .annotation-text').length") > 4
        # What can be done with a mouse can be done with the keyboard: all of it is a button, a box, a list or a summary.
        assert tab.run("document.querySelectorAll('[onclick], div[tabindex]:not(.scroll)').length") == 0


@needs_browser
def test_names_that_are_cut_stay_apart(make: Make, tmp_path: Path) -> None:
    """Some differ at their ends, some in the middle alone."""
    variants = [f"trainer.max_epochs_of_a_training={n}" for n in (4, 5)]
    variants += [f"schedule.first={n}, and_much_that_all_of_them_have={n - n}" for n in (1, 2)]
    made = [
        make(
            "mono_forward", 0, variant=variant, energy=[], cost={"train_s": 2.0 + 3 * i}, test={"accuracy": 0.9 - i / 9}
        )
        for i, variant in enumerate(variants)
    ]
    with browser() as tab:
        tab.open(write_report(made, tmp_path / "r.html"), 1280)
        tab.draw_all()
        charts: list[list[str]] = tab.run(
            "[...document.querySelectorAll('.chart[data-labelled]')].map((c) => "
            "[...c.querySelectorAll('.annotation-text')].map((a) => a.textContent))"
        )
    named = [names for names in charts if len(names) == len(variants)]
    assert named
    for names in named:
        assert len(set(names)) == len(names)
        assert any("…" in name for name in names)
