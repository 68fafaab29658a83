"""The record: one folder per run that is never changed once the run has ended, and an index rebuilt from the folders.

While it runs, a run owns ``<runs_dir>/.<id>.part/`` by a lock on the file ``.lock`` in it, which the kernel takes back
when the process ends, however it ends. When the run ends its record is completed, then the folder is renamed to
``<runs_dir>/<id>/``, and only then is anything deleted; so a folder with a plain name is always complete, and a kill
between two steps leaves a folder that :func:`recover` finishes. A folder holds

- ``record.json``: what was run, on what, and its figures (:data:`TEMPLATE` lists the keys; unknown is ``null``);
- ``metrics.csv``: ``epoch,step,name,value``, one line per figure logged on the way;
- whatever else the run writes beside them (a checkpoint, the model); files whose names start with a dot are only for
  the time of the run.

Only the standard library is used here, so records can be read where nothing is installed.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import errno
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import numbers
import os
import platform
import re
import secrets
import socket
import sqlite3
import stat
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import IO, Any, Final, NamedTuple

_flock: Callable[[int, int], None] | None
try:
    from fcntl import LOCK_EX, LOCK_NB, flock

    _flock = flock
except ImportError:  # Windows
    _flock = None

__all__ = [
    "CHECKPOINT",
    "COST_COLUMNS",
    "SCHEMA",
    "TEMPLATE",
    "Metric",
    "Quality",
    "Record",
    "RunFolder",
    "Scan",
    "find_records",
    "hardware",
    "load_record",
    "plain_file",
    "read_index",
    "rebuild_index",
    "recover",
    "scan",
    "source",
    "versions",
    "write_file",
]

SCHEMA: Final = 1

CHECKPOINT: Final = "resume.ckpt"
"""Where a run keeps what ``train resume=FOLDER`` goes on from; gone once the run is done."""

COST_COLUMNS: Final = (
    "train_s",
    "validation_s",
    "co2_g",
    "train_flops",
    "update_flops",
    "once_flops",
    "inference_flops",
    "activation_peak_bytes",
    "allocated_peak_bytes",
    "state_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "cache_bytes",
    "params",
    "extra_params",
    "samples",
)
"""The single-number cost columns: seconds, grams, floating-point operations, bytes, counts (docs/studies.md)."""

TEMPLATE: Final[Mapping[str, Any]] = {
    "id": None,
    "schema": SCHEMA,
    "serial": None,
    "algorithm": None,
    "variant": None,
    "dataset": None,
    "net": None,
    "task": None,
    "metric": None,
    "seed": None,
    "status": None,
    "error": None,
    "locality": None,
    "mode": None,
    "validation": {},
    "test": {},
    "cost": {**dict.fromkeys(COST_COLUMNS), "energy_j": {}, "stages": [], "uncounted": []},
    "energy": [],
    "target": None,
    "blocks": [],
    "config": {},
    "command": None,
    "versions": {},
    "hardware": {},
    "source": {},
    "started": None,
    "finished": None,
    "resumed_from": None,
    "parts": [],
    "notes": [],
}
"""Every top-level key of ``record.json`` with its value when nothing is known.

``metric`` names the figure by which the run is judged: ``{"name": "mse", "maximise": false}``; ``null`` means accuracy.
``serial`` counts the runs of one folder in the order of their starts, whatever the clock says. ``docs/records.md``
explains every key.
"""

_ENDINGS = ("done", "failed", "interrupted")
_LOCK = ".lock"
_NESTED = 100  # levels of a record that is no prank
_LARGEST_BYTES = 64 * 2**20
_CHARACTERS = 100_000  # of a text, and of a name
_NAME = 200
_NAMES = ("algorithm", "variant", "dataset", "net", "task", "mode", "status", "locality")
_LONE = re.compile("[\ud800-\udfff]")
_PACKAGES = (
    "locallearn",
    "torch",
    "torchvision",
    "torch_geometric",
    "lightning",
    "hydra-core",
    "optuna",
    "codecarbon",
    "nvidia-ml-py",
    "scikit-learn",
    "numpy",
    "plotly",
)


class Metric(NamedTuple):
    """One line of ``metrics.csv``; ``value`` is ``None`` where the figure was unknown."""

    epoch: int
    step: int
    name: str
    value: float | None


class Quality(NamedTuple):
    """The figure by which runs are judged: ``validation/<name>`` and ``test/<name>``, and whether more of it is better."""

    name: str = "accuracy"
    maximise: bool = True


# ---------------------------------------------------------------------------------------------------- ownership


class _Lock:
    """A lock on a file, held until it is released or the process ends, however that happens.

    It is an ``flock``: two openings of one file exclude each other even inside one process, and containers that share
    process numbers and host names exclude each other, too. On NFS it reaches other machines where the mount passes locks
    on (not with ``local_lock=flock`` or ``nolock``). A forked child, a data loader's worker say, closes its copy at once;
    else a worker that outlives its parent would keep the lock.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle
        _held.add(self)

    @classmethod
    def take(cls, path: Path, wait_s: float = 0.0) -> _Lock | None:
        """The lock; ``None`` when somebody else still holds it after ``wait_s`` seconds.

        Raises:
            OSError: the file cannot be made, or there are no locks here.
        """
        if _flock is None:
            raise OSError(errno.ENOLCK, "this system has no flock", str(path))
        until = time.monotonic() + wait_s
        while True:
            # A link is not followed: it would lead out of the folder. Python opens it closed to programs started later.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                _flock(handle, LOCK_EX | LOCK_NB)
                # Who held it before may have moved or removed the file meanwhile: then this is a lock on nothing.
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return cls(path, handle)
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(handle)
                    return None
                time.sleep(0.005)
            except FileNotFoundError:
                pass
            except BaseException as error:
                os.close(handle)
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(path)
                raise
            os.close(handle)

    def release(self, remove: bool = False) -> None:
        """Lets go; with ``remove`` the file goes, too, while it is still held."""
        if self._handle is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.forget()

    def forget(self) -> None:
        """Closes the file: the lock is gone, unless another process shares this opening."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                os.close(handle)

    def __del__(self) -> None:
        self.forget()


_held: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def _alone(runs_dir: Path, wait_s: float = 5.0) -> Iterator[bool]:
    """Keeps others from numbering runs and writing the index; says whether it could be done.

    Where it cannot (no locks, a read-only folder, somebody who was halted), the work goes on: two runs may then share a
    number, and nothing is lost.
    """
    lock: _Lock | None = None
    with contextlib.suppress(OSError):
        lock = _Lock.take(runs_dir / _LOCK, wait_s)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release(remove=True)


# ---------------------------------------------------------------------------------------------------- writing


class RunFolder:
    """The folder of a run that is going on; exactly one process writes it.

    Make one with :meth:`create`.

    Attributes:
        path: the folder's present place.
        rows: number of figures in ``metrics.csv``.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: _Lock | None = None) -> None:
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
        lock: _Lock | None = None
        try:
            with contextlib.suppress(OSError):  # where there are no locks a run goes on, and recover() leaves it alone
                lock = _Lock.take(path / _LOCK, wait_s=5.0)
            folder = cls(path, data, lock)
            with _alone(runs_dir):
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
        with _naming(path):
            if self._metrics is None:
                self._metrics = path.open("ab", buffering=0)
            end = self._metrics.seek(0, os.SEEK_END)
            try:
                _write_all(self._metrics, _csv_text(rows, header=end == 0))
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
        write_file(self.path / name, _encoded(text))

    def write_with(self, name: str, write: Callable[[Path], None]) -> None:
        """Writes a file of the run in one step: ``write`` is given a place beside it, which then takes its name.

        What stood there before is there until the new file is complete and with the disk.

        Raises:
            OSError: it cannot be written; whatever ``write`` raises, too. Nothing half-written is left.
        """
        path = self.path / name
        aside = self.path / f".{name}"
        with _naming(path), _cleared(aside):
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
        if status not in _ENDINGS:
            raise ValueError(f"a run cannot end with status {status!r}; use one of {', '.join(_ENDINGS)}.")
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
        final = self.path.parent / _stem(self.path)
        if os.path.lexists(final):
            raise FileExistsError(f"the run folder {final} exists already and is left as it is.")
        return final

    def _publish(self) -> Path:
        """The last steps of a run whose record is complete."""
        final = self._final()
        self._close_metrics()
        self.path.rename(final)
        self.path = final
        _tidy(final, done=self._record.get("status") == "done")
        if self._lock is not None:
            self._lock.path = final / _LOCK
            self._lock.release(remove=True)
        return final

    def _close_metrics(self) -> None:
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            metrics.close()


def recover(runs_dir: Path, tell: Callable[[str], None] | None = None) -> list[Path]:
    """Gives the folders of killed runs their final name, and clears away what killed processes left half-written.

    A folder is taken only if its lock can be had, that is if no process works on it any more. Its status becomes
    ``interrupted``, unless the run had ended already and only the new name was missing. Of two that recover at the same
    moment one adopts a folder.

    Args:
        runs_dir: the folder of all runs.
        tell: told one sentence for every folder that nobody owns and that could not be adopted, with the reason.

    Returns:
        The final paths of the folders that were adopted.
    """
    adopted: list[Path] = []
    for path in sorted(runs_dir.glob(".*.part")):
        try:
            final = _adopt(path)
        except (OSError, ValueError) as error:
            if tell is not None and os.path.lexists(path):
                tell(f"{path} is left as it is: {error}")
        else:
            if final is not None:
                adopted.append(final)
    _tidy_all(runs_dir)
    return adopted


def _adopt(path: Path) -> Path | None:
    """Finishes one part folder; ``None`` when its owner lives.

    Raises:
        ValueError: there is nothing to adopt, or it leads elsewhere.
        OSError: it cannot be locked or written.
    """
    if path.is_symlink() or not path.is_dir():
        raise ValueError("it is no folder, or a link to one, and links are not followed.")
    try:
        lock = _Lock.take(path / _LOCK)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise ValueError(
                f"its place has no file locks ({error.strerror}), so nobody can tell whether its process still runs; if it "
                f"does not, rename the folder to {_stem(path)}."
            ) from None
        raise
    if lock is None:
        return None
    try:
        if not os.path.lexists(path / "record.json"):
            raise ValueError(_UNRECORDED)
        if (path / "record.json").is_symlink():
            raise ValueError("its record.json is a link, and links are not followed.")
        data = _read_json(path)
        ended = data.get("status") in _ENDINGS and data.get("id") == _stem(path)
        data["id"] = _stem(path)
        folder = RunFolder(path, data, lock)
        if ended:
            return folder._publish()
        if data.get("status") in _ENDINGS:
            return folder.finish(str(data["status"]), Record(path, data).text("error"))
        return folder.finish("interrupted", "The process was killed before the run ended.")
    except BaseException:
        lock.release(remove=True)
        raise


_UNRECORDED: Final = (
    "it has no record yet: its run is just starting, or was killed before its first record was written. Then nothing "
    "was trained in it, and it can be deleted."
)


def _tidy(folder: Path, done: bool) -> None:
    """Deletes a run's work files, and the checkpoint of one that is done; the caller holds the folder's lock."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            stale = path.name.startswith(".") and path.name != _LOCK
            if (stale or (done and path.name == CHECKPOINT)) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink(missing_ok=True)


def _tidy_all(runs_dir: Path) -> None:
    """The last steps of runs that were killed after they had got their name, and unfinished indices."""
    for path in runs_dir.glob("[!.]*/" + _LOCK):
        folder = path.parent
        if folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            lock = _Lock.take(path)
            if lock is None:
                continue
            with contextlib.suppress(ValueError):
                _tidy(folder, done=_read_json(folder).get("status") == "done")
            lock.release(remove=True)
    if next(runs_dir.glob(".index.*"), None) is None:
        return
    with _alone(runs_dir, wait_s=0.0) as alone:
        for path in runs_dir.glob(".index.*") if alone else ():
            with contextlib.suppress(OSError):
                path.unlink()


def _stem(part: Path) -> str:
    return part.name.removeprefix(".").removesuffix(".part")


def _next_serial(runs_dir: Path) -> int:
    """One more than the largest start counter in the folder: deleted runs leave gaps, and no counter can be lost."""
    largest = 0
    for folder in runs_dir.iterdir():
        with contextlib.suppress(OSError):
            text = (folder / "record.json").read_bytes()
            # Two spaces: the record's own key, not one of its configuration. Reading all of JSON would take ten times as long.
            for found in re.findall(rb'^  "serial": (\d{1,15})\b', text, re.MULTILINE):
                largest = max(largest, int(found))
    return largest + 1


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
    return _encoded(text.getvalue())


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
    write_file(path, _encoded(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))


def _encoded(text: str) -> bytes:
    """UTF-8; a lone surrogate, of a name that is not UTF-8, becomes an escape that JSON reads as what it was."""
    return text.encode("utf-8", "backslashreplace")


def write_file(path: Path, content: bytes) -> None:
    """Writes a file in one step: what stood there before is there until the new content is complete.

    Raises:
        OSError: it cannot be written, with the file's name; nothing half-written is left.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _naming(path), _cleared(aside):
        with aside.open("xb", buffering=0) as file:
            _write_all(file, content)
            os.fsync(file.fileno())
        os.replace(aside, path)


def _write_all(file: IO[bytes], content: bytes) -> None:
    """Writes without a buffer, which would try again, and fail again, when it is closed."""
    while content:
        content = content[file.write(content) :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system say which file they are about: those of a full disk do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def _cleared(aside: Path) -> Iterator[None]:
    """A file that is gone afterwards; that it cannot be deleted hides nothing of why it was not finished."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- reading

# What a target cost, beside the value that was to be reached.
_TO_TARGET = ("seconds", "joules", "samples")


@dataclass(frozen=True)
class Record:
    """A run that has ended, as read from its folder.

    Attributes:
        path: the run's folder.
        data: the content of ``record.json`` as it stands, but for text: half characters are replaced, and what is longer than
            100,000 characters (a name longer than 200) is cut.
    """

    path: Path
    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The run's name, the same as its folder's when it was written."""
        return str(self.data["id"])

    @property
    def algorithm(self) -> str:
        """The learning rule."""
        return str(self.data["algorithm"])

    @property
    def dataset(self) -> str:
        """The data set."""
        return str(self.data["dataset"])

    @property
    def seed(self) -> int:
        """The seed by which runs are paired."""
        return int(self.data["seed"])

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``interrupted``."""
        return str(self.data["status"])

    @property
    def metric(self) -> Quality:
        """The figure by which the run is judged; accuracy where the record names none."""
        part = self.part("metric")
        name = part.get("name")
        return Quality(name, part.get("maximise") is not False) if isinstance(name, str) and name else Quality()

    def text(self, key: str) -> str | None:
        """A top-level entry that should be text; ``None`` where it is missing or something else."""
        value = self.data.get(key)
        return value if isinstance(value, str) else None

    def part(self, key: str) -> Mapping[str, Any]:
        """A top-level entry that should be a mapping; empty where it is missing or something else."""
        return _mapping(self.data.get(key))

    def energy(self) -> list[Mapping[str, Any]]:
        """The energy windows: mappings with ``source``, ``quality``, ``joules``, ``reason``, ``net_joules``..."""
        entries = self.data.get("energy")
        entries = entries if isinstance(entries, list) else []
        return [entry for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("source"), str)]

    @property
    def wanted(self) -> float | None:
        """The value of the metric that ends the run, in mode ``target``."""
        if self.text("mode") != "target":
            return None
        # A run that failed has its settings only.
        of_settings = _mapping(self.part("config").get("compare")).get("target")
        found = _number(self.part("target").get(self.metric.name))
        return _number(of_settings) if found is None else found

    @property
    def arrived(self) -> bool:
        """Whether the run reached its target: then the record says at what cost."""
        return any(self.part("target").get(name) is not None for name in _TO_TARGET)

    @property
    def uncounted(self) -> list[str]:
        """Operators that the counted operations lack, by name."""
        names = self.part("cost").get("uncounted")
        return [str(name)[:_NAME] for name in names] if isinstance(names, list) else []

    def figures(self) -> dict[str, float | None]:
        """Every figure of the run under one flat name; ``None`` is unknown.

        ``validation/<metric>``, ``test/<metric>``, the names of :data:`COST_COLUMNS`, ``energy_j/<source>`` and
        ``energy_net_j/<source>`` in joules, and ``target/<metric>``, ``target/seconds``, ``target/samples``,
        ``target/joules/<source>``. A negative cost is unknown (but for net joules, from which idle ones are taken off).
        """
        flat: dict[str, float | None] = {}
        for part in ("validation", "test"):
            flat |= {f"{part}/{name}": _number(value) for name, value in self.part(part).items()}
        cost = self.part("cost")
        flat |= {name: _cost(cost.get(name)) for name in COST_COLUMNS}
        for window in self.energy():
            flat[f"energy_j/{window['source']}"] = _cost(window.get("joules"))
            if "net_joules" in window:
                flat[f"energy_net_j/{window['source']}"] = _number(window["net_joules"])
        flat |= {f"energy_j/{source}": _cost(value) for source, value in _mapping(cost.get("energy_j")).items()}
        for name, value in self.part("target").items():
            if isinstance(value, Mapping):
                flat |= {f"target/{name}/{source}": _cost(joules) for source, joules in value.items()}
            else:
                flat[f"target/{name}"] = _cost(value) if name in _TO_TARGET else _number(value)
        return flat

    def spent(self) -> dict[str, float | None]:
        """What the whole training cost, under the names of costs to a target: what a run that did not arrive counts with."""
        figures = self.figures()
        joules = {name.partition("/")[2]: value for name, value in figures.items() if name.startswith("energy_j/")}
        return {
            "target/seconds": figures["train_s"],
            "target/samples": figures["samples"],
            **{f"target/joules/{source}": value for source, value in joules.items()},
        }

    def metrics(self) -> list[Metric]:
        """The lines of ``metrics.csv`` in order; empty when there is no such file.

        A last line cut short by a kill is left out.

        Raises:
            ValueError: the file cannot be read, or another line is damaged.
        """
        path = self.path / "metrics.csv"
        try:
            text = plain_file(path).decode("utf-8-sig", errors="replace")
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}); its figures are not shown.") from None
        # Lines end where csv ends them, not at every sign that str.splitlines takes for an end.
        reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        rows: list[Metric] = []
        while True:
            row: list[str] = []
            try:
                if reader.line_num == 0:
                    next(reader)  # the header
                row = next(reader)
                epoch, step, name, value = row
                rows.append(Metric(int(epoch), int(step), _text(name, _NAME), float(value) if value else None))
            except StopIteration:
                break
            except (ValueError, csv.Error) as error:
                cause = _short(repr(row) if row else str(error))
                raise ValueError(
                    f"line {max(1, reader.line_num)} of {path} is damaged: {cause}; wanted epoch,step,name,value."
                ) from None
        return rows


@dataclass(frozen=True)
class Scan:
    """What a search for records found.

    Attributes:
        records: the readable ones, oldest first.
        problems: one sentence for each folder that was left out, and for each record with values that cannot be used.
        left_out: how many folders were left out.
    """

    records: list[Record]
    problems: list[str]
    left_out: int = 0


def load_record(path: Path) -> Record:
    """Reads one run from its folder or from its ``record.json``.

    Raises:
        ValueError: there is no record, or it is damaged; the sentence says what is wrong.
    """
    folder = path.parent if path.name == "record.json" else path
    data = _read_json(folder)
    for key, kind in (("id", str), ("algorithm", str), ("dataset", str), ("status", str), ("seed", int)):
        value = data.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"the record in {folder} has {key!r} = {_short(repr(value))}, wanted {kind.__name__}; it cannot be used."
            )
    short = {key: _text(data[key], _NAME) for key in _NAMES if isinstance(data.get(key), str)}
    return Record(folder, {**data, **short})


def scan(roots: Iterable[Path]) -> Scan:
    """Finds the records below ``roots``, at any depth; the same folder found twice counts once.

    Of two folders whose records have one ``id`` (a copy, say) the first one counts, and a problem names the other.

    Raises:
        ValueError: a root does not exist.
    """
    records: dict[str, Record] = {}
    places: set[Path] = set()
    problems: list[str] = []
    doubts: list[str] = []
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}; give a run's folder or a folder of runs.")
        unread: list[OSError] = []
        for folder in _run_folders(root, unread.append):
            place = folder.resolve()
            if place in places:
                continue
            places.add(place)
            if folder.name.endswith(".part"):
                unended = "the run has not ended yet, or was killed and not recovered."
                recorded = (folder / "record.json").exists()
                problems.append(f"{_LONE.sub('?', folder.name)}: {unended if recorded else _UNRECORDED}")
                continue
            try:
                record = load_record(folder)
            except ValueError as error:
                problems.append(str(error))
                continue
            known = records.setdefault(record.id, record)
            if known is not record:
                problems.append(
                    f"{folder} has the id {record.id!r} of {known.path}; only the first is counted: take one of them out, or "
                    "give it an id of its own."
                )
            doubts += [f"{folder}: {doubt}" for doubt in _doubts(record)]
            try:
                record.metrics()
            except ValueError as error:
                doubts.append(str(error))
        problems += [f"{e.filename} cannot be looked into ({e.strerror}); what is in it is left out." for e in unread]
    return Scan(sorted(records.values(), key=_age), [*problems, *doubts], len(problems))


def find_records(roots: Iterable[Path]) -> list[Record]:
    """The readable records below ``roots``, oldest first; :func:`scan` also says what was left out and why."""
    return scan(roots).records


def _age(record: Record) -> tuple[str, str]:
    return record.text("started") or "", record.id


def _run_folders(root: Path, unreadable: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    for place, folders, files in os.walk(root, onerror=unreadable):
        # A folder that a kill left before its first record has none, and must be told all the same.
        killed = Path(place).name.endswith(".part") and Path(place).name.startswith(".")
        if killed or "record.json" in files or "record.json" in folders:
            folders.clear()
            yield Path(place)
        # Hidden folders are somebody else's, except the one of a run that has not ended.
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name.endswith(".part"))


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    try:
        data = _readable(json.loads(plain_file(path).decode("utf-8-sig")), _NESTED)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no record.json; give the folder of a run.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({_short(str(error))}); the record is damaged.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__} instead of an object; the record is damaged.")
    return data


def plain_file(path: Path, most: int = _LARGEST_BYTES) -> bytes:
    """The content of a file of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a link (which could show any file of this machine), no plain file, too large or not readable.
    """
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no file of its own but a link, a folder or a device")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size:,} bytes, more than the {most:,} that are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(str(error.strerror)) from None


def _readable(value: Any, levels: int) -> Any:
    """What JSON holds, with text that can be written anywhere and shown: see :func:`_text`.

    Raises:
        ValueError: it is nested deeper than ``levels``, which no later reader of the record would survive.
    """
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, (dict, list)):
        return value
    if levels == 0:
        raise ValueError(f"nested deeper than {_NESTED} levels")
    if isinstance(value, list):
        return [_readable(item, levels - 1) for item in value]
    return {_text(key, _NAME): _readable(item, levels - 1) for key, item in value.items()}


def _text(text: str, most: int = _CHARACTERS) -> str:
    """Text of which a lone surrogate has become the sign for what is unreadable, cut where it is endless."""
    text = text if text.isascii() else _LONE.sub("\ufffd", text)
    return text if len(text) <= most else f"{text[:most]}… (cut here, {len(text):,} characters)"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _doubts(record: Record) -> list[str]:
    """What a record holds that cannot be what it should be, and is taken for unknown."""
    data = record.data
    found = []
    for key, empty in TEMPLATE.items():
        value = data.get(key)
        if isinstance(empty, (dict, list)) and value is not None and not isinstance(value, type(empty)):
            found.append((key, value, "an object" if isinstance(empty, dict) else "a list"))
    for key in (
        "variant",
        "net",
        "task",
        "error",
        "locality",
        "mode",
        "command",
        "started",
        "finished",
        "resumed_from",
    ):
        if not isinstance(data.get(key), (str, NoneType)):
            found.append((key, data[key], "text"))
    for key in ("metric", "target"):
        if not isinstance(data.get(key), (dict, NoneType)):
            found.append((key, data[key], "an object"))
    cost = record.part("cost")
    numbers = [
        (f"{part}.{name}", value, _number)
        for part in ("validation", "test")
        for name, value in record.part(part).items()
    ]
    numbers += [(f"cost.{name}", cost.get(name), _cost) for name in COST_COLUMNS]
    numbers += [(f"cost.energy_j.{name}", value, _cost) for name, value in _mapping(cost.get("energy_j")).items()]
    numbers += [(f"energy of {window['source']}", window.get("joules"), _cost) for window in record.energy()]
    for name, value in record.part("target").items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        numbers += [(f"target.{name}.{source}".rstrip("."), one, _number) for source, one in inner]
    for name, value, read in numbers:
        if value is not None and read(value) is None:
            found.append((name, value, "a number, or 0 and above for a cost"))
    sentences = [
        f"{_short(name)} is {_short(repr(value))}, wanted {kind}; it counts as unknown." for name, value, kind in found
    ]
    if not 0 <= record.seed < 2**63:
        sentences.append(f"seed is {record.seed}, which no run has: wanted a whole number from 0 on.")
    if record.status not in _ENDINGS:
        sentences.append(f"status is {_short(repr(record.status))}, wanted one of {', '.join(_ENDINGS)}.")
    return sentences


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _cost(value: Any) -> float | None:
    number = _number(value)
    return None if number is None or number < 0 else number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------------- the index

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
    with _naming(path), _alone(runs_dir), _cleared(aside):
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
        _text(str(record.path.relative_to(runs_dir))),
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
    for folder in _run_folders(runs_dir):
        with contextlib.suppress(FileNotFoundError):  # a run that ends right now is renamed under our feet
            state = (folder / "record.json").stat()
            digest.update(repr((str(folder.relative_to(runs_dir)), state.st_mtime_ns, state.st_size)).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- where it ran


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a run's numbers; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def _source() -> tuple[str | None, bool | None]:
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        # Settings of another repository, from inside a hook say, and programs that watch this one are left out.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(package), *words]
        quiet = {**environment, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=quiet)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed into somebody's project, it is not theirs
        commit = git("rev-parse", "HEAD")
        # What is imported as locallearn, whether git knows it yet or not; not what runs leave in a checkout.
        code = [f":(top){name}" for name in ("locallearn", "conf", "energy", "tasks")]
        return commit, bool(git("status", "--porcelain", "--", *code))
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None, None


def source() -> dict[str, Any]:
    """The code that runs: ``commit`` of the checkout of locallearn, and ``dirty``: whether its code was changed since.

    Both are ``None`` where locallearn is not run from a git checkout of its own: then its version says it. Looked up once
    per process.
    """
    commit, dirty = _source()
    return {"commit": commit, "dirty": dirty}


def hardware(gpus: Sequence[str] = ()) -> dict[str, Any]:
    """What the run ran on: ``cpu``, ``cores``, ``usable_cores``, ``memory_gib``, ``os``, ``machine``, ``gpus``.

    Neither the host's nor the user's name is in it.

    Args:
        gpus: model names of the accelerators used; this module asks no driver.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_gib": _memory_gib(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "gpus": list(gpus),
    }


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
