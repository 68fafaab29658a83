"""Rows of comparisons as the pages show them, made from the records beside the pages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from locallearn.records import Record, scan

DOCS = Path(__file__).parents[2] / "docs"


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _arrived(record: Record) -> bool:
    return record.text("mode") != "target" or record.data["target"].get("seconds") is not None


def rows_of(folder: Path) -> list[list[str]]:
    """One row per rule of a comparison: mode, rule, accuracy, samples, operations and bytes, and how many seeds.

    Ratios are those of pairs in which both arrived at the target; who did not counts with all that it spent.
    """
    rules: dict[tuple[str, str], list[Record]] = {}
    for record in scan([folder]).records:
        assert record.status == "done"
        rules.setdefault((record.algorithm, record.text("variant") or ""), []).append(record)
    base = {r.seed: r for (rule, _), rs in rules.items() if rule == "backprop" for r in rs}
    rows = []
    for (rule, variant), records in rules.items():
        costs = {record.seed: record.data["cost"] for record in records}
        assert len(costs) == len(records)
        flops = [cost["train_flops"] for cost in costs.values()]
        pairs = [(r, base[r.seed]) for r in records if _arrived(r) and _arrived(base[r.seed])]
        spent = np.array([[r.data["cost"]["train_flops"] for r in pair] for pair in pairs])
        ratio = np.exp(np.mean(np.log(spent[:, 0] / spent[:, 1])))
        arrived = sum(_arrived(record) for record in records)
        target = (records[0].data.get("target") or {}).get("accuracy")
        mode = f"{records[0].text('mode')}{f' {100 * target:g} %' if target else ''}"
        rows.append(
            [
                mode,
                f"{rule}{f' ({variant})' if variant and rule != 'backprop' else ''}",
                _cell([100 * record.data["test"]["accuracy"] for record in records], 2),
                _cell([cost["samples"] / 1000 for cost in costs.values()], 0),
                _cell([value / 1e12 for value in flops], 2),
                f"{ratio:.2f}",
                f"{next(iter(costs.values()))['activation_peak_bytes'] / 2**20:.2f}",
                str(len(records)) if arrived == len(records) else f"{len(records)}, {arrived} arrived",
                f"[records]({folder.relative_to(DOCS).as_posix()})",
            ]
        )
    return rows
