"""``locallearn report``: one page from records, with files of its figures if wanted, refreshed while runs go on if wanted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locallearn.cli.plans import folder_setting
from locallearn.cli.saved import recovered, reindexed
from locallearn.cli.settings import UsageError, compose_settings

_OPTIONS = ("--figures", "--watch")
_EVERY_S = 2.0  # between two looks at the records
_RELOAD_S = 5.0  # between two looks of the open page at its own file


def report(words: list[str]) -> int:
    """Write one page from records."""
    options = [word for word in words if word in _OPTIONS]
    words = [word for word in words if word not in _OPTIONS]
    folders = [word for word in words if "=" not in word and not word.startswith("-")]
    cfg, _ = compose_settings([word for word in words if word not in folders])
    named = cfg.report.records
    if named and (isinstance(named, str) or not isinstance(named, Sequence)):  # one folder, which is no list of letters
        named = [named]
    roots = [Path(str(f)).expanduser() for f in folders or named or [folder_setting(cfg, "runs_dir")]]
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"there is no folder {root} to read records from")
        if os.access(root, os.W_OK):
            recovered(root)
    out = Path(str(cfg.report.out or roots[0] / "report.html")).expanduser()
    if out.suffix not in (".html", ".htm"):
        raise UsageError(
            f"report.out is {out}, expected a name that ends in .html: --figures writes charts as SVG and PDF beside it"
        )
    watched = "--watch" in options
    left_out, problems = _write(roots, out, cfg.report.title, "--figures" in options, watched)
    if not watched and os.access(roots[0], os.W_OK) and not folders and not cfg.report.records:
        reindexed(roots[0])
    for count, what in (
        (left_out, "left out"),
        (problems - left_out, "with values that cannot be used"),
    ):
        if count:
            records = "record" if count == 1 else "records"
            print(f"locallearn: {count} {records} {what}, the page says why", file=sys.stderr)
    print(out, flush=True)
    if watched:
        print("locallearn: the page is written anew whenever records change; Ctrl-C ends this", file=sys.stderr)
        _watch(roots, out, cfg.report.title, "--figures" in options)
    return 0


def _write(roots: Sequence[Path], out: Path, title: str, figures: bool, watched: bool) -> tuple[int, int]:
    """One page of what is there now; how many records it leaves out, and with how many there is a problem."""
    from locallearn.records import scan
    from locallearn.report import write_report

    found = scan(roots)
    running = _running(roots) if watched else []
    if not found.records and not watched:
        raise UsageError("; ".join([f"there are no records in {', '.join(map(str, roots))}", *found.problems[:1]]))
    problems = found.problems
    if watched:  # runs that go on are named at the top
        problems = [text for text in problems if not any(text.startswith(run.path.name) for run in running)]
    reload_s = _RELOAD_S if watched else None
    write_report(found.records, out, title=title, problems=problems, figures=figures, running=running, watch_s=reload_s)
    told = len(found.problems) - len(problems)
    return max(0, found.left_out - told), len(problems)


def _watch(roots: Sequence[Path], out: Path, title: str, figures: bool) -> None:
    """Writes the page again whenever records change, until it is interrupted."""
    from locallearn.records import recover

    seen = _state(roots)
    while True:
        time.sleep(_EVERY_S)
        for root in roots:  # a run that was killed changes nothing by itself, and would go on for ever
            if os.access(root, os.W_OK):
                recover(root)
        state = _state(roots)
        if state == seen:
            continue
        seen = state
        try:
            _write(roots, out, title, figures, watched=True)
        except (UsageError, FileNotFoundError):
            # A run was renamed or a folder taken away while it was read: the next look sees what became of it.
            seen = {}


def _state(roots: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """Times and sizes of what a page is made of."""
    found = {}
    for root in roots:
        for place, _, files in os.walk(root):
            for name in files:
                if name in ("record.json", "metrics.csv", "tune.json", "table.json"):
                    path = os.path.join(place, name)
                    try:
                        status = os.stat(path)
                    except OSError:
                        continue
                    found[path] = (status.st_mtime_ns, status.st_size)
    return found


def _running(roots: Sequence[Path]) -> list[Any]:
    """Records of the runs that have not ended."""
    from locallearn.records import load_record

    found = []
    for root in roots:
        for place in sorted(root.rglob(".*.part")):
            try:
                found.append(load_record(place))
            except (ValueError, OSError):
                continue
    return found
