"""``locallearn report``: one page from records."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from locallearn.cli.plans import folder_setting
from locallearn.cli.saved import recovered, reindexed
from locallearn.cli.settings import UsageError, compose_settings


def report(words: list[str]) -> int:
    """Write one page from records."""
    from locallearn.records import scan
    from locallearn.report import write_report

    folders = [word for word in words if "=" not in word and not word.startswith("-")]
    cfg, _ = compose_settings([word for word in words if word not in folders])
    roots = [Path(str(f)).expanduser() for f in folders or cfg.report.records or [folder_setting(cfg, "runs_dir")]]
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"there is no folder {root} to read records from")
        if os.access(root, os.W_OK):
            recovered(root)
    found = scan(roots)
    if not found.records:
        raise UsageError("; ".join([f"there are no records in {', '.join(map(str, roots))}", *found.problems[:1]]))
    if os.access(roots[0], os.W_OK) and not folders and not cfg.report.records:
        reindexed(roots[0])
    out = Path(str(cfg.report.out or roots[0] / "report.html")).expanduser()
    for count, what in (
        (found.left_out, "left out"),
        (len(found.problems) - found.left_out, "with values that cannot be used"),
    ):
        if count:
            records = "record" if count == 1 else "records"
            print(f"locallearn: {count} {records} {what}, the page says why", file=sys.stderr)
    print(write_report(found.records, out, title=cfg.report.title, problems=found.problems))
    return 0
