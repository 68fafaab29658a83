"""``locallearn meters``: what this machine can measure, how well, and why the rest is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from locallearn.cli.settings import UsageError, compose_settings
from locallearn.cli.terminal import printing


def meters(words: list[str]) -> int:
    """Watch every source of joules for some seconds, and say what each can do; ``--json``: for programs."""
    from locallearn.energy import CodeCarbonMeter, NvmlMeter, RaplMeter, ZeusMeter, survey

    cfg, _ = compose_settings([word for word in words if word != "--json"])
    seconds = cfg.meters.seconds
    if type(seconds) not in (int, float) or not 0 < seconds < float("inf"):
        raise UsageError(f"meters.seconds is {seconds}, expected seconds above 0")
    rows = survey([NvmlMeter(), RaplMeter(), ZeusMeter(), CodeCarbonMeter()], seconds)
    measured = [row.source for row in rows if row.reason is None and row.quality == "measured"]
    if "--json" in words:
        print(json.dumps({"seconds": seconds, "measured": measured, "sources": list(map(asdict, rows))}, indent=1))
        return 0
    _print(rows, seconds)
    if measured:
        print(f"measured here: {', '.join(measured)}; meter=measured leaves out what is modelled")
    else:
        print("nothing is measured here: joules are modelled, and no claim about energy can rest on them")
    return 0


def _print(rows: Sequence[Any], seconds: float) -> None:
    """A line for every source."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"sources of joules, watched for {seconds:g} s", title_justify="left")
    for heading in ("source", "figures", "by", "new every", "smallest step", "now", "windows from", "to know"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        usable = row.reason is None
        table.add_row(
            escape(row.source),
            row.quality if usable else "none",
            escape(row.by),
            "" if row.update_s is None else f"{row.update_s * 1e3:.3g} ms",
            "" if row.step_j is None else f"{row.step_j:.3g} J",
            "" if row.power_w is None else f"{row.power_w:.3g} W",
            f"{row.window_s:.3g} s" if usable else "",
            escape(row.reason or "; ".join(row.flags)),
        )
    printing().print(table)
