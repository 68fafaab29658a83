"""Which runs the page is about: their folders, commands and provenance, and those that did not finish."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from locallearn.records import SCHEMA, Record
from locallearn.report._charts import clipped, plain_text
from locallearn.report._columns import UNKNOWN
from locallearn.report._html import Book, count, plain_table, scrolled, texts
from locallearn.statistics import Row, labelled

# Configurations shown on a page of hundreds of runs, and signs of what records may fill it with.
_CONFIGS = 100
_CONFIG_CHARACTERS = 20_000
_ERROR_CHARACTERS = 2_000
_NAMED = 6  # runs that the top of the page names


def link(record: Record, page: Path) -> str:
    """The way from the page to a run's folder, as a link; no scheme can be in it, for it is a quoted path."""
    way = os.path.relpath(os.path.abspath(record.path), os.path.abspath(page.parent))
    return quote(os.fsencode(Path(way).as_posix() + "/"), safe="/") if not os.path.isabs(way) else ""


def device(record: Record) -> str:
    """Where a run computed: its graphics card's name, or ``cpu``."""
    trainer = record.part("config").get("trainer")
    wanted = trainer.get("accelerator") if isinstance(trainer, Mapping) else None
    cards = texts(record.part("hardware").get("gpus"))
    return "cpu" if wanted == "cpu" or not cards else cards[0]


def facets(records: Sequence[Record], label: str, place: str) -> str:
    """Attributes of a table's row, by which the page's script filters."""
    first = records[0]
    values = {
        "label": plain_text(label),
        "dataset": first.dataset,
        "net": first.text("net") or "not stated",
        "rule": first.algorithm,
        "mode": first.text("mode") or "not stated",
        "device": "\t".join(sorted({device(record) for record in records})),
        "seed": "\t".join(str(seed) for seed in sorted({record.seed for record in records})),
        "find": f"{label} {place}",
    }
    return "".join(f' data-{key}="{escape(value)}"' for key, value in values.items())


def unfinished_runs(
    records: Sequence[Record], running: Sequence[Record], rows: Sequence[Row]
) -> list[tuple[Record, str]]:
    """Runs that ended without being done and that no other run went on with, with the labels of their rows.

    Of a run whose seed another one stands for, it is that of its rule with the variant.
    """
    labels = {record.id: row.label for row in rows for record in (*row.records, *row.missing)}
    resumed = {record.text("resumed_from") for record in (*records, *running)}
    return [
        (record, labels.get(record.id) or labelled(record.algorithm, record.text("variant")))
        for record in records
        if record.status != "done" and record.id not in resumed
    ]


def failures(lost: Sequence[tuple[Record, str]], running: Sequence[Record]) -> str:
    """What the top of the page says of runs that did not finish and of those that go on."""
    parts = []
    if running:
        items = "".join(f"<li>{escape(_progress(record))}</li>" for record in running[:_NAMED])
        items += f"<li>and {len(running) - _NAMED} more</li>" if len(running) > _NAMED else ""
        parts.append(
            f'<div class="alert calm"><p><b>{count(len(running), "run")} going on.</b></p><ul>{items}</ul></div>'
        )
    if lost:
        kinds = Counter(record.status for record, _ in lost)
        said = ", ".join(f"{n} {status}" for status, n in kinds.items())
        items = "".join(
            f"<li><b>{escape(label)}</b> on {escape(record.dataset)}, seed {record.seed}, "
            f"{escape(record.status)}: {escape(_short(record.text('error') or 'no reason was recorded'))}</li>"
            for record, label in lost[:_NAMED]
        )
        more = f"<li>and {len(lost) - _NAMED} more</li>" if len(lost) > _NAMED else ""
        parts.append(
            f'<div class="alert"><p><b>{count(len(lost), "run")} did not finish</b> ({escape(said)}); '
            f'<a href="#unfinished">all of them with their reasons</a>.</p><ul>{items}{more}</ul></div>'
        )
    return "".join(parts)


def _progress(record: Record) -> str:
    try:
        lines = record.metrics()
    except ValueError:
        lines = []
    told = f"{labelled(record.algorithm, record.text('variant'))} on {record.dataset}, seed {record.seed}"
    if not lines:
        return f"{told}: no epoch yet"
    name = f"validation/{record.metric.name}"
    last = [line for line in lines if line.name == name and line.value is not None]
    value = f", validation {record.metric.name} {last[-1].value:.4g}" if last else ""
    return f"{told}: epoch {lines[-1].epoch}{value}"


def _short(text: str, most: int = 160) -> str:
    return clipped(" ".join(text.split()), most)


def unfinished(
    lost: Sequence[tuple[Record, str]], records: Sequence[Record], problems: Sequence[str], page: Path
) -> str:
    """Runs that failed or were interrupted, and what is left out, with the reasons."""
    foreign = sum(record.data.get("schema") != SCHEMA for record in records)
    words = list(dict.fromkeys(problems))
    if foreign:
        words.append(f"{count(foreign, 'record')} of another schema than {SCHEMA}: what is unknown here is not shown.")
    parts = []
    if lost:
        lines = "".join(
            f'<tr{facets([record], record.algorithm, record.id)}><th scope="row">{_linked(record, page)}</th>'
            f'<td class="left wrap">{escape(label)}</td><td>{record.seed}</td>'
            f'<td class="left">{escape(record.status)}</td><td class="left wrap">'
            f"{escape(_short(record.text('error') or 'No reason was recorded.', _ERROR_CHARACTERS))}</td></tr>"
            for record, label in lost
        )
        head = (
            '<thead><tr><th scope="col">Run</th><th scope="col" class="left">Rule</th><th scope="col">Seed</th>'
            '<th scope="col" class="left">Status</th>'
            '<th scope="col" class="left">Why</th></tr></thead>'
        )
        parts.append(
            '<h2 id="unfinished">Runs that did not finish</h2>'
            "<p class='note'>They are in no mean above. A rule's row counts a seed that did not finish, unless another run of "
            "it did.</p>" + scrolled(f"{head}<tbody>{lines}</tbody>", "Runs that did not finish", "cards wide")
        )
    if words:
        items = "".join(f"<li>{escape(word)}</li>" for word in words)
        parts.append(f'<h2>Left out</h2><ul class="plain">{items}</ul>')
    return "".join(parts)


def _linked(record: Record, page: Path) -> str:
    way = link(record, page)
    return f'<a href="{escape(way)}">{escape(record.id)}</a>' if way else escape(record.id)


_HEADER = ("Run", "Rule", "Seed", "Status", "Epochs", "Started (UTC)", "Resumed from", "Command")


def provenance(records: Sequence[Record], rows: Sequence[Row], page: Path, book: Book) -> str:
    """On what and with what everything ran, every run with its folder and command, and configurations."""
    if not records:
        return ""
    book.section = "runs"
    lines: list[Sequence[str]] = [_line(record) for record in records]
    book.tables.append((book.section, "runs", _HEADER, lines))
    head = "".join(f'<th scope="col">{word}</th>' for word in _HEADER)
    body = "".join(
        f'<tr{facets([record], record.algorithm, record.id)}><th scope="row">{_linked(record, page)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:-1])
        + f'<td class="left"><code>{escape(line[-1])}</code></td></tr>'
        for record, line in zip(records, lines, strict=True)
    )
    table = scrolled(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", "Runs", "wide runs")
    notes = [f"{record.id}: {note}" for record in records for note in texts(record.data.get("notes"))]
    begun = [f"{record.id}: {record.begins_with_in_words}" for record in records if record.begins_with is not None]
    return (
        "<h2 id='runs'>Provenance</h2>"
        f"<details data-name='runs'><summary>Runs, their folders and commands ({len(lines)})</summary>{table}</details>"
        + _settings(records, "hardware", "Hardware")
        + _settings(records, "versions", "Versions")
        + _settings(records, "source", "Source")
        + _settings(records, "precision", "Arithmetic")
        + _listed("Weights that training began with (run, beginning of their SHA-256)", begun)
        + _listed("Notes", notes)
        + "".join(_stages(row) for row in rows[:_CONFIGS])
        + "".join(_config(row) for row in rows[:_CONFIGS])
        + (
            "<p class='note'>Further configurations, and costs per stage, are in the runs' folders.</p>"
            if len(rows) > _CONFIGS
            else ""
        )
    )


def _listed(title: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    items = "".join(f"<li>{escape(entry)}</li>" for entry in entries)
    return f'<details><summary>{escape(title)}</summary><ul class="plain">{items}</ul></details>'


def _line(record: Record) -> tuple[str, ...]:
    return (
        record.id,
        record.algorithm,
        str(record.seed),
        record.status,
        ", ".join(texts(record.data.get("epochs"))) or UNKNOWN,
        (record.text("started") or "")[:19].replace("T", " "),
        _earlier(record),
        record.text("command") or UNKNOWN,
    )


def _earlier(record: Record) -> str:
    """The run that this one went on with, and when and how long its parts ran."""
    parts = record.data.get("parts")
    told = [
        f"{str(part.get('started'))[:19].replace('T', ' ')} for {part.get('epochs')} epochs"
        for part in (parts if isinstance(parts, list) else [])
        if isinstance(part, Mapping)
    ]
    return "; ".join([record.text("resumed_from") or UNKNOWN, *told])


def _settings(records: Sequence[Record], key: str, title: str) -> str:
    """The distinct contents of ``key``, each with the number of records that have it."""
    counts: dict[str, int] = {}
    for record in records:
        text = settled(record.part(key))
        counts[text] = counts.get(text, 0) + 1
    if not any(record.part(key) for record in records):
        return ""
    parts = []
    for text, n in counts.items():
        values = json.loads(text)
        words = ", ".join(f"{name} {_word(value)}" for name, value in values.items()) or "not recorded"
        parts.append(f"<li>{count(n, 'run')}: {escape(words)}</li>")
    return f'<h3>{title}</h3><ul class="plain">{"".join(parts)}</ul>'


def _stages(row: Row) -> str:
    """What every stage of a training cost, of the row's last run; empty where the record does not say."""
    stages = row.newest.part("cost").get("stages")
    lines = [stage for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    if not lines:
        return ""
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = [(str(number), *(_word(line.get(name)) for name in names)) for number, line in enumerate(lines, start=1)]
    title = f"Cost per stage: {' · '.join(filter(None, (row.place, row.label)))}, seed {row.newest.seed}"
    return f"<details><summary>{escape(title)}</summary>{plain_table(('Stage', *names), table, title)}</details>"


def _config(row: Row) -> str:
    first = (row.records or row.missing)[0]
    text = json.dumps(first.part("config"), indent=2, ensure_ascii=False)
    if len(text) > _CONFIG_CHARACTERS:
        text = text[:_CONFIG_CHARACTERS] + "\n… cut here; the whole is in the run's folder"
    place = " · ".join(filter(None, (row.place, row.terms if row.mode else "", row.label)))
    return (
        f"<details><summary>Configuration: {escape(place)}, seed {first.seed}</summary>"
        f'<pre tabindex="0"><code>{escape(text)}</code></pre></details>'
    )


def settled(part: Mapping[str, Any]) -> str:
    return json.dumps(part, sort_keys=True, ensure_ascii=False)


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
