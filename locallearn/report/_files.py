"""What a page reads beside the records: curves, and pictures."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from html import escape

from locallearn.records import Metric, Record, plain_file
from locallearn.report._charts import Curves
from locallearn.report._curves import JOULES, LOSS, PASSES, SECONDS, passes_by
from locallearn.statistics import Row, age

# What keeps a page of hundreds of runs small: curves per block or layer of rows, of single runs, and bytes of pictures.
_BLOCK_LINES = 1_000
_RUN_LINES = 300
_PICTURE_BYTES = 1_500_000
_PICTURE = "reconstructions.png"
PICTURE_NOTE = "Test images above, what the network made of them below; of every rule its newest run."
# Curves of parts of a network, which a very large page leaves out.
_DETAILS = ("block/", "unit/", "layer/")
_PNG = b"\x89PNG\r\n\x1a\n"

# By seed the curves of single runs, their values in lists of one.
Runs = dict[int, Curves]


def read_curves(rows: Sequence[Row]) -> tuple[list[Curves], list[Runs], list[str]]:
    """For every row: name of the curve, epoch, the seeds' values; the same of its runs alone; and what could not be read."""
    result: list[Curves] = []
    single: list[Runs] = []
    problems: list[str] = []
    for row in rows:
        curves: dict[str, dict[int, list[float]]] = {}
        runs: Runs = {}
        for record in row.records:
            try:
                metrics = record.metrics()
            except ValueError as error:
                problems.append(str(error))
                continue
            own = _curves(record, metrics, f"validation/{row.metric.name}")
            for name, values in own.items():
                for epoch, of in values.items():
                    curves.setdefault(name, {}).setdefault(epoch, []).extend(of)
            details = {name: values for name, values in own.items() if name.startswith(_DETAILS)}
            if details:
                runs[record.seed] = details
        result.append(curves)
        # Of one run the row's means say the same.
        single.append(runs if len(row.records) > 1 else {})
    kept, said = _limited(single)
    return result, kept, [*problems, *said]


def _limited(single: Sequence[Runs]) -> tuple[list[Runs], list[str]]:
    """As many single runs as there is room for, of every rule the first before of any the second, and what is left out."""
    kept: list[Runs] = [{} for _ in single]
    lines = 0
    for turn in range(max(map(len, single), default=0)):
        for own, runs in zip(kept, single, strict=True):
            for seed, curves in list(runs.items())[turn : turn + 1]:
                if lines + len(curves) <= _RUN_LINES:
                    own[seed] = curves
                    lines += len(curves)
    every, shown = (sum(map(len, some)) for some in (single, kept))
    if shown == every:
        return kept, []
    left = f"The curves per block of {every - shown} of {every} single runs"
    return kept, [f"{left}, to keep the page small; report fewer runs at once."]


def _curves(record: Record, metrics: Sequence[Metric], judged_by: str) -> dict[str, dict[int, list[float]]]:
    """The curves of a run that the page draws."""
    wanted = (judged_by, LOSS, SECONDS)
    found: dict[str, dict[int, list[float]]] = {}
    # Several lines of one epoch: the last one counts.
    last = {(m.name, m.epoch): m.value for m in metrics if m.value is not None and math.isfinite(m.value)}
    for (name, epoch), value in last.items():
        if name in wanted or name.startswith((*_DETAILS, JOULES)):
            found.setdefault(name, {})[epoch] = [value]
    steps = {m.epoch: m.step for m in metrics if m.name == LOSS}
    for epoch, step in steps.items():
        if (passes := passes_by(record, step)) is not None:
            found.setdefault(PASSES, {})[epoch] = [passes]
    return found


def limit_blocks(rows: Sequence[Row], curves: list[Curves]) -> list[str]:
    """Drops the curves per block and layer of rows for which a very large page has no room, and says so."""
    lines, dropped = 0, 0
    for i, known in enumerate(curves):
        if lines + len(known) > _BLOCK_LINES:
            curves[i] = {name: values for name, values in known.items() if not name.startswith(_DETAILS)}
            dropped += 1
        lines += len(curves[i])
    if not dropped:
        return []
    return [
        f"The curves per block of {dropped} of {len(rows)} rules, to keep the page small; report fewer runs at once."
    ]


def read_pictures(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """For every row the reconstructions of its newest run that kept some, as a figure; and what could not be shown."""
    figures: list[str] = []
    problems: list[str] = []
    used, dropped = 0, 0
    for row in rows:
        figures.append("")
        kept = [record for record in row.records if os.path.lexists(record.path / _PICTURE)]
        if not kept:
            continue
        newest = max(kept, key=lambda record: age(record, kept))
        path = newest.path / _PICTURE
        try:
            content = plain_file(path, _PICTURE_BYTES)
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"{path} cannot be read ({error}).")
            continue
        if used + len(content) > _PICTURE_BYTES:
            dropped += 1
            continue
        if not content.startswith(_PNG):
            problems.append(f"{path} is not a PNG picture.")
            continue
        used += len(content)
        name = f"{row.label}, seed {newest.seed}"
        figures[-1] = (
            f'<figure><h4>{escape(name)}</h4><img class="picture" alt="Reconstructions by {escape(name)}: test images above, '
            f'what the network made of them below" src="data:image/png;base64,{base64.b64encode(content).decode()}"></figure>'
        )
    if dropped:
        problems.append(
            f"The reconstructions of {dropped} of {len(rows)} rules, to keep the page small; report fewer runs at once."
        )
    return figures, problems
