"""Tables of a comparison for papers and for programs: figures worked out again here, from the values of the seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import stats

from locallearn.records import Record
from locallearn.report import comparison_table, figures_table, write_comparison
from locallearn.tables import Table, render

Make = Callable[..., Record]
SEEDS = (0, 1, 2, 3, 4)
ACCURACY = {"backprop": (0.971, 0.974, 0.969, 0.972, 0.975), "mono_forward": (0.962, 0.968, 0.959, 0.966, 0.961)}


def _runs(make: Make) -> list[Record]:
    return [
        make(rule, seed, test={"accuracy": accuracy}, validation={"accuracy": 0.9})
        for rule, values in ACCURACY.items()
        for seed, accuracy in zip(SEEDS, values, strict=True)
    ]


def _cells(table: Table, label: str) -> dict[str, list[str]]:
    line = next(line for line in table.lines if next(iter(line)).value == label)
    return {column.key: cell.shown for column, cell in zip(table.columns, line, strict=True)}


def _read(records: list[Record]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(figures_table(records), "csv"), newline="")))


def test_figures_are_those_of_the_textbook(make: Make) -> None:
    rows = {(row["rule"], row["figure"]): row for row in _read(_runs(make))}
    row = rows["mono_forward", "test/accuracy"]
    values, differences = ACCURACY["mono_forward"], [a - b for b, a in zip(*ACCURACY.values(), strict=True)]
    lo, hi = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    found = {key: float(row[key]) for key in ("n", "mean", "std", "difference", "difference_lo", "difference_hi", "p")}
    assert found == pytest.approx(
        {
            **{"n": 5, "mean": statistics.fmean(values), "std": statistics.stdev(values)},
            **{"difference": statistics.fmean(differences), "difference_lo": lo, "difference_hi": hi, "p": 2 / 2**5},
        }
    )
    assert (row["mode"], row["dataset"], row["net"], row["seeds_finished"], row["seeds_run"]) == (
        *("own", "digits", "mlp", "5", "5"),
    )
    assert float(rows["mono_forward", "train_s"]["ratio"]) == pytest.approx(45 / 60)
    assert [
        rows["mono_forward", key]["kind"] for key in ("energy_j/nvml", "energy_j/model", "train_s", "update_flops")
    ] == [
        *("measured", "modelled", "measured", "counted"),
    ]
    assert [
        rows["backprop", key]["unit"] for key in ("energy_j/nvml", "train_s", "update_flops", "activation_peak_bytes")
    ] == [
        *("J", "s", "FLOP", "B"),
    ]
    assert rows["backprop", "test/accuracy"]["difference"] == ""
    shown = rows["mono_forward", "test/accuracy"]["shown"]
    assert shown == f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"


def test_json_holds_the_same_and_every_seed(make: Make) -> None:
    found = json.loads(render(figures_table(_runs(make)), "json"))
    row = next(row for row in found["rows"] if (row["rule"], row["figure"]) == ("backprop", "test/accuracy"))
    assert row["by_seed"] == {str(seed): value for seed, value in zip(SEEDS, ACCURACY["backprop"], strict=True)}
    assert row["n"] == 5
    assert row["notes"] == []


def test_a_reader_sees_what_is_known_and_no_digit_more(make: Make) -> None:
    table = comparison_table(_runs(make))
    assert table.title == "digits · mlp · mode own"
    cells = _cells(table, "mono_forward")
    differences = [100 * (a - b) for b, a in zip(*ACCURACY.values(), strict=True)]
    half = stats.t.ppf(0.975, 4) * statistics.stdev(differences) / math.sqrt(5)
    mean, below = cells["test/accuracy"]
    assert mean == "96.32 ± 0.37"
    centre = statistics.fmean(differences)
    assert below == f"{centre:.2f} [{centre - half:.2f}, {centre + half:.2f}]"
    assert cells["test/accuracy/p"] == ["0.063 (0.063)"]
    assert cells["train_s"][0] == "46.8 ± 1.4"
    assert cells["train_s"][1] == "0.750\N{MULTIPLICATION SIGN}"  # the same for every seed: no interval
    headings = [column.heading for column in table.columns]
    assert "Energy, nvml, measured (kJ)" in headings
    assert "Energy, model, modelled (kJ)" in headings
    assert "Test accuracy (%)" in headings


def test_a_wide_interval_of_a_ratio_does_not_begin_at_nothing(make: Make) -> None:
    runs = [make("backprop", seed, cost={"train_s": 1.0}) for seed in range(3)]
    runs += [make("x", seed, cost={"train_s": seconds}) for seed, seconds in enumerate((2.0, 3.0, 11.0))]
    assert _cells(comparison_table(runs), "x")["train_s"][1] == "4.0\N{MULTIPLICATION SIGN} [0.44, 37]"


def test_who_did_not_arrive_is_counted_and_not_left_out(make: Make) -> None:
    """Mode target: seconds, joules and samples until the target; the mean of who did not arrive is a least one."""

    def target(rule: str, seed: int, arrived: bool) -> Record:
        cost = {"train_s": 50.0 + seed, "samples": 900, "energy_j": {"nvml": 7.0}}
        energy = [{"source": "nvml", "quality": "measured", "joules": 7.0, "reason": None}]
        reached = {"seconds": 10.0 + seed, "samples": 300, "joules": {"nvml": 2.0}} if arrived else {}
        return make(rule, seed, mode="target", target={"accuracy": 0.9, **reached}, cost=cost, energy=energy)

    runs = [target("backprop", seed, True) for seed in range(3)]
    runs += [target("mono_forward", seed, seed > 0) for seed in range(3)]
    runs.append(make("mono_forward", 3, mode="target", target={"accuracy": 0.9}, status="failed"))
    table = comparison_table(runs)
    assert table.title.endswith("mode target 0.9")
    cells = _cells(table, "mono_forward")
    assert cells["n"] == ["3 of 4"]
    least = "\N{GREATER-THAN OR EQUAL TO}"
    assert cells["target/seconds"] == [f"{least} 24.33 (2 of 4 reached)"]  # (50 + 11 + 12) / 3, and no ratio
    assert cells["target/samples"] == [f"{least} 500 (2 of 4 reached)"]
    assert cells["target/joules/nvml"][0].startswith(f"{least} 3.667 (2 of 4")
    assert _cells(table, "backprop")["target/seconds"] == ["11.0 ± 1.0"]
    assert any("not every run reached" in note and "did not finish is left out" in note for note in table.notes)
    assert "target/accuracy" not in cells
    assert any("Seed 3: failed: Block a diverged" in note for line in table.lines for note in line.notes)
    row = next(r for r in _read(runs) if (r["rule"], r["figure"]) == ("mono_forward", "target/seconds"))
    assert (row["target"], row["reached"], row["ratio"], row["std"]) == ("0.9", "2 of 4 reached", "", "")


def test_controls_are_compared_with_plain_backpropagation_and_named_in_words(make: Make) -> None:
    runs = [make("backprop", seed, variant=variant, cost={"train_s": 60.0 if variant is None else 90.0, "samples": 1})
            for variant in (None, "checkpoint=auto", "accumulate=4", "sequential", "checkpoint=auto, sequential")
            for seed in range(3)]  # fmt: skip
    table = comparison_table(runs)
    labels = ["backprop", "backprop · accumulated, 4 parts", "backprop · checkpointed"]
    labels += ["backprop · checkpointed, sequential", "backprop · sequential"]
    assert [next(iter(line)).value for line in table.lines] == labels
    below = [_cells(table, label)["train_s"][1:] for label in labels]
    # Plain backpropagation has no baseline; a control under another schedule is one of that schedule.
    times = "\N{MULTIPLICATION SIGN}"
    assert below == [[], [f"1.50{times}"], [f"1.50{times}"], [f"1.00{times}"], []]


def test_places_stand_on_lines_of_their_own_and_no_run_says_so(make: Make) -> None:
    table = comparison_table([make("backprop", 0), make("backprop", 0, dataset="mnist")])
    assert table.title == ""
    assert [line.group for line in table.lines] == ["digits · mlp · mode own", "mnist · mlp · mode own"]
    assert "no run to show" in render(comparison_table([]), "md")
    assert _read([]) == []
    failed = _read([make("backprop", 0, status="failed", test={}, cost={}, energy=[])])
    assert [(row["figure"], row["seeds_finished"], row["seeds_run"]) for row in failed] == [("", "0", "1")]
    assert "Block a diverged" in failed[0]["notes"]


def test_processes_that_shared_the_machine_are_told_and_not_paired_in_seconds(make: Make) -> None:
    shared = {"cpu": "x", "threads": 1, "workers": 2}
    runs = [make("backprop", 0, hardware={"cpu": "x", "threads": 1}), make("mono_forward", 0, hardware=shared)]
    table = comparison_table(runs)
    assert len(_cells(table, "mono_forward")["train_s"]) == 1
    assert len(_cells(table, "mono_forward")["test/accuracy"]) == 2
    (notes,) = [line.notes for line in table.lines if line.notes]
    assert any("2 processes shared" in note for note in notes)
    assert any("workers" in note and "baseline" in note for note in notes)


@pytest.mark.parametrize("kind", ["csv", "md", "tex", "json"])
def test_a_suffix_chooses(kind: str, make: Make, tmp_path: Path) -> None:
    records = [make("backprop", 0)]
    made = comparison_table if kind in ("md", "tex") else figures_table
    path = write_comparison(records, tmp_path / f"results.{kind}")
    assert path.read_text(encoding="utf-8") == render(made(records), kind)
