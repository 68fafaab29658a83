"""What a comparison and a sweep leave beside their records: the printed table, tables in files, the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locallearn.cli.plans import check_folder, folder_setting
from locallearn.cli.settings import UsageError
from locallearn.cli.terminal import printing


@dataclass(frozen=True)
class Outputs:
    """Where the page and the tables go.

    Attributes:
        report: the page's file; ``None``: no page.
        tables: files of tables, whose suffixes choose the formats.
    """

    report: Path | None
    tables: Sequence[Path]

    def check(self) -> None:
        """Refuse places that cannot be written to, before anything is trained."""
        from locallearn.report import check_place
        from locallearn.tables import check_place as check_table

        for table in self.tables:
            check_table(table)
        if self.report is not None:
            check_place(self.report)

    def give(self, records: Sequence[Any], title: str, problems: Sequence[str] = ()) -> None:
        """Write page and tables; only then, since a terminal may fail, print the table, what failed, and the files' places."""
        from locallearn.report import terminal_table, write_comparison, write_report

        if self.report is not None:
            write_report(records, self.report, title=title)
        for table in self.tables:
            write_comparison(records, table)
        console = printing()
        console.print(terminal_table(records, console.width))
        for problem in problems:
            print(f"locallearn: {problem}", file=sys.stderr)
        for place in (*self.tables, *([self.report] if self.report else [])):
            print(place)


def outputs_of(cfg: Any, report: Path | None) -> Outputs:
    """From ``compare.table`` and ``compare.report``, where the latter is not given from ``report``."""
    from locallearn.tables import FORMATS, kind_of

    given = cfg.compare.table
    names = [] if given is None else [given] if isinstance(given, str) else given
    if not hasattr(names, "__iter__") or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            f"compare.table is {given}, expected a file that ends in .{', .'.join(FORMATS)}, or a list of such files"
        )
    tables = [Path(name).expanduser() for name in dict.fromkeys(names)]
    for table in tables:
        kind_of(table)
        check_folder("compare.table", table, folder_setting(cfg, "runs_dir"))
    if cfg.compare.report:
        report = Path(str(cfg.compare.report)).expanduser()
        check_folder("compare.report", report, folder_setting(cfg, "runs_dir"))
    return Outputs(report, tables)
