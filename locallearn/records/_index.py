"""An index of many records, which is only a cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Any

from locallearn.records._files import cleared, naming
from locallearn.records._keys import COST_COLUMNS, SCHEMA
from locallearn.records._lock import alone
from locallearn.records._reading import Record, readable_text, run_folders, scan

_INDEX_TEXT = ("id", "algorithm", "variant", "dataset", "net", "task", "status", "error", "locality", "mode", "started")
_INDEX_NUMBERS = ("validation_accuracy", "test_accuracy", *COST_COLUMNS)


def rebuild_index(runs_dir: Path) -> Path:
    """Writes ``<runs_dir>/index.sqlite`` anew from the folders and returns its path.

    Table ``runs`` has one row per readable record: ``path`` (relative to ``runs_dir``), the descriptive keys,
    ``seed``, ``validation_accuracy``, ``test_accuracy``, the columns of :data:`COST_COLUMNS` and ``energy_j`` (JSON,
    joules by source). Written aside and put in place in one step, so parallel rebuilds only replace each other.

    Raises:
        ValueError: ``runs_dir`` does not exist.
        OSError: the index cannot be written.
    """
    fingerprint = _fingerprint(runs_dir)  # before reading: a run that ends meanwhile makes this index stale, not wrong
    rows = [_index_row(record, runs_dir) for record in scan([runs_dir]).records]
    columns = [f"{name} TEXT" for name in ("path", *_INDEX_TEXT)] + ["seed INTEGER"]
    columns += [f"{name} REAL" for name in _INDEX_NUMBERS] + ["energy_j TEXT"]
    path = runs_dir / "index.sqlite"
    aside = runs_dir / f".index.{secrets.token_hex(4)}.sqlite"
    # Alone, so that recover() may delete what it finds of an index while it is alone itself.
    with naming(path), alone(runs_dir), cleared(aside):
        try:
            with contextlib.closing(sqlite3.connect(aside)) as base, base:
                base.execute(f"CREATE TABLE runs ({', '.join(columns)})")
                base.execute("CREATE TABLE built (fingerprint TEXT)")
                base.executemany(f"INSERT INTO runs VALUES ({', '.join('?' * len(columns))})", rows)
                base.execute("INSERT INTO built VALUES (?)", (fingerprint,))
        except sqlite3.Error as error:  # a full or read-only disk, in SQLite's words
            raise OSError(errno.EIO, str(error), str(path)) from error
        os.replace(aside, path)
    return path


def read_index(runs_dir: Path) -> list[dict[str, Any]]:
    """The rows of the index, oldest run first; rebuilt first when it is missing, damaged or not up to date.

    Raises:
        ValueError: ``runs_dir`` does not exist.
    """
    path = runs_dir / "index.sqlite"
    rows = _index_rows(path, _fingerprint(runs_dir))
    if rows is None:
        rows = _index_rows(rebuild_index(runs_dir), None)
    return rows or []


def _index_rows(path: Path, fingerprint: str | None) -> list[dict[str, Any]] | None:
    """The rows of an index file; ``None`` when it cannot be read or was built from other folders."""
    if not path.is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as base:
            base.row_factory = sqlite3.Row
            built = base.execute("SELECT fingerprint FROM built").fetchone()
            if fingerprint is not None and (built is None or built[0] != fingerprint):
                return None
            return [dict(row) for row in base.execute("SELECT * FROM runs ORDER BY started, id")]
    except sqlite3.Error:
        return None


def _index_row(record: Record, runs_dir: Path) -> list[Any]:
    figures = record.figures()
    figures |= {f"{part}_accuracy": figures.get(f"{part}/accuracy") for part in ("validation", "test")}
    joules = {name.partition("/")[2]: value for name, value in figures.items() if name.startswith("energy_j/")}
    return [
        readable_text(str(record.path.relative_to(runs_dir))),
        *(record.text(name) for name in _INDEX_TEXT),
        record.seed if abs(record.seed) < 2**63 else None,  # SQLite's whole numbers have 64 bits
        *(figures[name] for name in _INDEX_NUMBERS),
        json.dumps(joules),
    ]


def _fingerprint(runs_dir: Path) -> str:
    """Changes with every record added, removed or rewritten below ``runs_dir``, and with this module's schema."""
    if not runs_dir.is_dir():
        raise ValueError(f"there is no folder {runs_dir}; give the folder of the runs.")
    digest = hashlib.sha256(repr((SCHEMA, _INDEX_TEXT, _INDEX_NUMBERS)).encode())
    for folder in run_folders(runs_dir):
        with contextlib.suppress(FileNotFoundError):  # a run that ends right now is renamed under our feet
            state = (folder / "record.json").stat()
            digest.update(repr((str(folder.relative_to(runs_dir)), state.st_mtime_ns, state.st_size)).encode())
    return digest.hexdigest()
