"""The folder of a run that is going on."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import numbers
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from locallearn.records._files import cleared, encoded, naming, write_all, write_file
from locallearn.records._keys import CHECKPOINT, ENDINGS, LOCK, SCHEMA, TEMPLATE
from locallearn.records._lock import Lock, alone


class RunFolder:
    """The folder of a run that is going on; exactly one process writes it.

    Make one with :meth:`create`.

    Attributes:
        path: the folder's present place.
        rows: number of figures in ``metrics.csv``.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: Lock | None = None) -> None:
        self.path = path
        self.rows = 0
        self._record = record
        self._lock = lock
        self._metrics: IO[bytes] | None = None

    @classmethod
    def create(cls, runs_dir: Path, record: Mapping[str, Any]) -> RunFolder:
        """Makes a new folder with ``record.json`` at status ``running``.

        Args:
            runs_dir: the folder of all runs; made when missing.
            record: what is known at the start, in the keys of :data:`TEMPLATE`; ``algorithm``, ``dataset`` and
                ``seed`` are required. ``id``, ``schema``, ``serial``, ``status`` and ``started`` are filled in here.

        Raises:
            ValueError: a required key is missing or a value cannot be written as JSON.
            OSError: the folder cannot be made or written; then there is none.
        """
        for key, kind in (("algorithm", str), ("dataset", str), ("seed", int)):
            if not isinstance(record.get(key), kind):
                raise ValueError(
                    f"a new record needs {key!r} as {kind.__name__}, but got {record.get(key)!r}; give it to create()."
                )
        now = datetime.now(UTC)
        data = _plain(_merge(copy.deepcopy(dict(TEMPLATE)), record), "")
        data |= {"schema": SCHEMA, "status": "running", "started": _stamp(now)}
        # For whoever looks at a run that is going on; the lock, not this, says whether it still is. Removed at the end.
        data["process"] = {"pid": os.getpid(), "host": socket.gethostname()}
        what = (record["algorithm"], record["dataset"], f"s{record['seed']}")
        stem = "-".join([f"{now:%Y%m%d-%H%M%S}", *map(_safe, what)])
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            data["id"] = f"{stem}-{secrets.token_hex(3)}"
            path = runs_dir / f".{data['id']}.part"
            if os.path.lexists(runs_dir / data["id"]):
                continue
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        lock: Lock | None = None
        try:
            with contextlib.suppress(OSError):  # where there are no locks a run goes on, and recover() leaves it alone
                lock = Lock.take(path / LOCK, wait_s=5.0)
            folder = cls(path, data, lock)
            with alone(runs_dir):
                folder.update({"serial": _next_serial(runs_dir)})
        except BaseException:
            if lock is not None:
                lock.release(remove=True)
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        return folder

    def update(self, values: Mapping[str, Any]) -> None:
        """Merges ``values`` into the record (mappings key by key, anything else replaced) and writes it in one step.

        Raises:
            ValueError: a value cannot be written as JSON.
            OSError: it cannot be written; the record is as it was before.
        """
        merged = _plain(_merge(self._record, values), "")
        _write_json(self.path / "record.json", merged)
        self._record = merged

    def log(self, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        """Appends figures to ``metrics.csv``; they are with the operating system when this returns.

        Args:
            epoch: counted from 0.
            step: batches seen so far.
            values: figure by name, e.g. ``{"block/0/loss": 0.3}``; ``None`` for unknown.

        Raises:
            OSError: they cannot be written; the file is as it was before.
        """
        path = self.path / "metrics.csv"
        rows = [(epoch, step, name, "" if value is None else repr(float(value))) for name, value in values.items()]
        with naming(path):
            if self._metrics is None:
                self._metrics = path.open("ab", buffering=0)
            end = self._metrics.seek(0, os.SEEK_END)
            try:
                write_all(self._metrics, _csv_text(rows, header=end == 0))
            except OSError:
                with contextlib.suppress(OSError):  # half a line would spoil what comes after it
                    self._metrics.truncate(end)
                raise
        self.rows += len(rows)

    def take_over(self, earlier: Path, rows: int | None, step: int) -> list[int]:
        """Begins ``metrics.csv`` with figures that an earlier part of this run has logged; called before :meth:`log`.

        Args:
            earlier: folder of the earlier part.
            rows: how many figures belong to what was saved there; ``None``: those up to ``step``.
            step: batches seen when it was saved.

        Returns:
            The epochs that are there, counted from 0.
        """
        kept = list(_raw_rows(earlier / "metrics.csv"))
        kept = kept[:rows] if rows is not None else [row for row in kept if int(row[1]) <= step]
        if kept:
            write_file(self.path / "metrics.csv", _csv_text(kept, header=True))
        self.rows = len(kept)
        return sorted({int(row[0]) for row in kept})

    def write_text(self, name: str, text: str) -> None:
        """Writes a further file of the run, e.g. ``config.yaml``.

        Raises:
            ValueError: ``name`` is not a plain file name or belongs to the record itself.
        """
        if Path(name).name != name or name in ("", ".", "..", "record.json", "metrics.csv"):
            raise ValueError(
                f"{name!r} cannot be a file of a run; use a plain file name other than record.json and metrics.csv."
            )
        write_file(self.path / name, encoded(text))

    def write_with(self, name: str, write: Callable[[Path], None]) -> None:
        """Writes a file of the run in one step: ``write`` is given a place beside it, which then takes its name.

        What stood there before is there until the new file is complete and with the disk.

        Raises:
            OSError: it cannot be written; whatever ``write`` raises, too. Nothing half-written is left.
        """
        path = self.path / name
        aside = self.path / f".{name}"
        with naming(path), cleared(aside):
            write(aside)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)

    def finish(self, status: str, error: str | None = None) -> Path:
        """Ends the run: writes its status, renames the folder to its final name and returns the new path.

        Only then the checkpoint of a run that is done is deleted, and the lock let go of.

        Args:
            status: ``"done"``, ``"failed"`` or ``"interrupted"``.
            error: why it did not end well, one sentence.

        Raises:
            ValueError: the status is another word.
            FileExistsError: a folder of the final name exists; it is left alone.
            OSError: the record cannot be written, or the folder not renamed.
        """
        if status not in ENDINGS:
            raise ValueError(f"a run cannot end with status {status!r}; use one of {', '.join(ENDINGS)}.")
        self._final()
        self._close_metrics()
        self._record.pop("process", None)
        self.update({"status": status, "error": error, "finished": _stamp(datetime.now(UTC))})
        return self._publish()

    def abandon(self) -> Path:
        """Lets go of a folder that could not be finished: the next :func:`recover` finds it. Returns its path."""
        self._close_metrics()
        if self._lock is not None:
            self._lock.release()
        return self.path

    def _final(self) -> Path:
        # By the folder's own name: what a record calls itself may lead anywhere.
        final = self.path.parent / stem(self.path)
        if os.path.lexists(final):
            raise FileExistsError(f"the run folder {final} exists already and is left as it is.")
        return final

    def _publish(self) -> Path:
        """The last steps of a run whose record is complete."""
        final = self._final()
        self._close_metrics()
        self.path.rename(final)
        self.path = final
        tidy(final, done=self._record.get("status") == "done")
        if self._lock is not None:
            self._lock.path = final / LOCK
            self._lock.release(remove=True)
        return final

    def _close_metrics(self) -> None:
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            metrics.close()


def tidy(folder: Path, done: bool) -> None:
    """Deletes a run's work files, and the checkpoint of one that is done; the caller holds the folder's lock."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            stale = path.name.startswith(".") and path.name != LOCK
            if (stale or (done and path.name == CHECKPOINT)) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink(missing_ok=True)


def stem(part: Path) -> str:
    return part.name.removeprefix(".").removesuffix(".part")


def _next_serial(runs_dir: Path) -> int:
    """One more than the largest start counter in the folder: deleted runs leave gaps, and no counter can be lost."""
    largest = 0
    # A folder that is renamed while a listing goes on may not be in it; it is renamed once, so it is in one of two.
    names = {_run_name(path) for _ in range(2) for path in runs_dir.iterdir()}
    for name in names:
        for folder in (runs_dir / f".{name}.part", runs_dir / name):  # in the order in which a run has them
            with contextlib.suppress(OSError):
                text = (folder / "record.json").read_bytes()
                # Two spaces: the record's own key, none of its configuration. Reading all of JSON takes ten times as long.
                for found in re.findall(rb'^  "serial": (\d{1,15})\b', text, re.MULTILINE):
                    largest = max(largest, int(found))
                break
    return largest + 1


def _run_name(path: Path) -> str:
    """Name of a run, whether its folder has it already or is that of a run that goes on."""
    return path.name[1:-5] if path.name.startswith(".") and path.name.endswith(".part") else path.name


def _raw_rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """The figures of a ``metrics.csv`` as text, up to the first line that is damaged or cut."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    while True:
        try:
            if reader.line_num == 0:
                next(reader)  # the header
            epoch, step, name, value = next(reader)
            int(epoch), int(step), float(value or 0)
        except (StopIteration, csv.Error, ValueError):
            return
        yield epoch, step, name, value


def _csv_text(rows: Iterable[Sequence[Any]], header: bool) -> bytes:
    text = io.StringIO(newline="")
    if header:
        text.write("epoch,step,name,value\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return encoded(text.getvalue())


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("._")[:40] or "unnamed"


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def _plain(value: Any, where: str) -> Any:
    """Turns ``value`` into strict JSON types: numbers that are not finite become ``None``."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"the record's {where!r} is a {type(value).__name__}, which JSON cannot hold; give numbers, text or lists."
    )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_file(path, encoded(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))
