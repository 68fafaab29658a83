"""Accuracies of students on docs/distill.md are means over the teachers whose tables lie beside the page."""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "distill.md").read_text(encoding="utf-8")
FOLDERS = {"MNIST 3\u00d71000": "distill_mnist", "CNN": "distill_mnist_cnn"}
METHODS = ("eugen", "snnk", "svd", "low_rank")


def _found(folder: str) -> dict[tuple[str, str], list[float]]:
    """Test accuracies in percent with all layers replaced, by share and method; the teachers' under their name."""
    found: dict[tuple[str, str], list[float]] = {}
    for table in sorted((DOCS / "records" / folder).glob("*/students.csv")):
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
        last = max(int(row["depth"]) for row in rows)
        for row in rows:
            if row["method"] == "teacher" or int(row["depth"]) == last:
                size = f"{100 * float(row['size']):g} %" if row["size"] else ""
                found.setdefault((size, row["method"]), []).append(100 * float(row["test_accuracy"]))
    return found


@pytest.mark.parametrize("network", FOLDERS)
def test_students_are_those_of_the_tables(network: str) -> None:
    found = _found(FOLDERS[network])
    assert all(len(values) == 3 for values in found.values())
    after = PAGE.partition("| network | size | `eugen` | `snnk` | `svd` | `low_rank` |")[2].partition("\n\n")[0]
    lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in after.splitlines()[2:]]
    told = {row[1]: row[2:] for row in lines if row[0] == network}
    sizes = sorted({size for size, _ in found if size}, key=lambda size: float(size[:-2]))
    assert list(told) == sizes
    for size in sizes:
        wanted = [_spread(found[size, method]) for method in METHODS]
        assert told[size] == wanted
    assert re.search(rf"{network}( \([^)]*\))?: {_spread(found['', 'teacher'])}", PAGE)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
