"""Every row of docs/study.md's table of our runs comes from the records that it names."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from locallearn.records import Record, scan

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "study.md").read_text(encoding="utf-8")
RECORDS = DOCS / "records" / "study"


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def rows_of(folder: Path) -> list[list[str]]:
    """One row per rule of a comparison: mode, rule, accuracy, samples, operations and bytes, and how many seeds."""
    rules: dict[tuple[str, str], list[Record]] = {}
    for record in scan([folder]).records:
        assert record.status == "done"
        rules.setdefault((record.algorithm, record.text("variant") or ""), []).append(record)
    base = {r.seed: r.data["cost"]["train_flops"] for (rule, _), rs in rules.items() if rule == "backprop" for r in rs}
    rows = []
    for (rule, variant), records in rules.items():
        costs = {record.seed: record.data["cost"] for record in records}
        assert len(costs) == len(records)
        flops = [cost["train_flops"] for cost in costs.values()]
        ratio = np.exp(np.mean([np.log(cost["train_flops"] / base[seed]) for seed, cost in costs.items()]))
        target = (records[0].data.get("target") or {}).get("accuracy")
        mode = f"{records[0].text('mode')}{f' {100 * target:.0f} %' if target else ''}"
        rows.append(
            [
                mode,
                f"{rule}{f' ({variant})' if variant and rule != 'backprop' else ''}",
                _cell([100 * record.data["test"]["accuracy"] for record in records], 2),
                _cell([cost["samples"] / 1000 for cost in costs.values()], 0),
                _cell([value / 1e12 for value in flops], 2),
                f"{ratio:.2f}",
                f"{next(iter(costs.values()))['activation_peak_bytes'] / 2**20:.2f}",
                str(len(records)),
                f"[records](records/study/{folder.name})",
            ]
        )
    return rows


def test_rows_are_those_of_the_records() -> None:
    lines = [
        [cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if "records/study/" in line
    ]
    told = [line[1:] for line in lines if len(line) == 10]
    found = [row for folder in sorted(RECORDS.iterdir()) if folder.is_dir() for row in rows_of(folder)]
    assert sorted(told) == sorted(found)


def test_every_target_was_reached_by_every_seed() -> None:
    """The page has no censored run to tell of."""
    for record in scan([RECORDS]).records:
        if record.text("mode") == "target":
            assert record.data["target"]["seconds"] is not None
