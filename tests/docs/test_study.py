"""Every row of docs/study.md's table of our runs comes from the records that it names."""

from __future__ import annotations

from tests.docs.comparisons import DOCS, rows_of

PAGE = (DOCS / "study.md").read_text(encoding="utf-8")
RECORDS = DOCS / "records" / "study"


def test_rows_are_those_of_the_records() -> None:
    lines = [
        [cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if "records/study/" in line
    ]
    told = [line[1:] for line in lines if len(line) == 10]
    found = [row for folder in sorted(RECORDS.iterdir()) if folder.is_dir() for row in rows_of(folder)]
    assert sorted(told) == sorted(found)
