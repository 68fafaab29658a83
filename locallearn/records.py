"""The record: one folder per run that is never changed once the run has ended, and an index rebuilt from the folders.

While it runs, a run owns ``<runs_dir>/.<id>.part/``; when it ends the folder is renamed to ``<runs_dir>/<id>/``, so a
folder with a plain name is always complete. A folder holds

- ``record.json``: what was run, on what, and its figures (:data:`TEMPLATE` lists the keys; unknown is ``null``);
- ``metrics.csv``: ``epoch,step,name,value``, one line per figure logged on the way;
- whatever else the run writes beside them (the resolved configuration, a checkpoint).

Only the standard library is used here, so records can be read where nothing is installed.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import importlib.metadata
import json
import math
import numbers
import os
import platform
import re
import secrets
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

__all__ = [
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
    "read_index",
    "rebuild_index",
    "recover",
    "scan",
    "versions",
]

SCHEMA: Final = 1

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
    "started": None,
    "finished": None,
    "resumed_from": None,
    "notes": [],
}
"""Every top-level key of ``record.json`` with its value when nothing is known.

``metric`` names the figure by which the run is judged: ``{"name": "mse", "maximise": false}``; ``null`` means accuracy.
"""

_ENDINGS = ("done", "failed", "interrupted")
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


# ---------------------------------------------------------------------------------------------------- writing


class RunFolder:
    """The folder of a run that is going on; exactly one process writes it.

    Make one with :meth:`create`. ``path`` is the folder's present place.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record
        self._metrics: TextIO | None = None

    @classmethod
    def create(cls, runs_dir: Path, record: Mapping[str, Any]) -> RunFolder:
        """Makes a new folder with ``record.json`` at status ``running``.

        Args:
            runs_dir: the folder of all runs; made when missing.
            record: what is known at the start, in the keys of :data:`TEMPLATE`; ``algorithm``, ``dataset`` and
                ``seed`` are required. ``id``, ``schema``, ``status`` and ``started`` are filled in here.

        Raises:
            ValueError: a required key is missing or a value cannot be written as JSON.
        """
        for key, kind in (("algorithm", str), ("dataset", str), ("seed", int)):
            if not isinstance(record.get(key), kind):
                raise ValueError(
                    f"a new record needs {key!r} as {kind.__name__}, but got {record.get(key)!r}; give it to create()."
                )
        now = datetime.now(UTC)
        stem = f"{now:%Y%m%d-%H%M%S}-{_safe(record['algorithm'])}-{_safe(record['dataset'])}-s{record['seed']}"
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            name = f"{stem}-{secrets.token_hex(3)}"
            path = runs_dir / f".{name}.part"
            if (runs_dir / name).exists():
                continue
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        data = _merge(copy.deepcopy(dict(TEMPLATE)), record)
        data |= {"id": name, "schema": SCHEMA, "status": "running", "started": _stamp(now)}
        # Who is writing, so that a killed run can be told from one that is still going; removed at the end.
        data["process"] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "birth": _birth(os.getpid()),
        }
        folder = cls(path, data)
        folder.update({})
        return folder

    def update(self, values: Mapping[str, Any]) -> None:
        """Merges ``values`` into the record (mappings key by key, anything else replaced) and writes it in one step.

        Raises:
            ValueError: a value cannot be written as JSON.
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
        """
        if self._metrics is None:
            self._metrics = (self.path / "metrics.csv").open("a", encoding="utf-8", newline="")
            if self._metrics.tell() == 0:
                self._metrics.write("epoch,step,name,value\n")
        rows = csv.writer(self._metrics, lineterminator="\n")
        rows.writerows(
            (epoch, step, name, "" if value is None else repr(float(value))) for name, value in values.items()
        )
        self._metrics.flush()

    def write_text(self, name: str, text: str) -> None:
        """Writes a further file of the run, e.g. ``config.yaml``.

        Raises:
            ValueError: ``name`` is not a plain file name or belongs to the record itself.
        """
        if Path(name).name != name or name in ("", ".", "..", "record.json", "metrics.csv"):
            raise ValueError(
                f"{name!r} cannot be a file of a run; use a plain file name other than record.json and metrics.csv."
            )
        _write_text(self.path / name, text)

    def finish(self, status: str, error: str | None = None) -> Path:
        """Ends the run: writes its status, renames the folder to its final name and returns the new path.

        Args:
            status: ``"done"``, ``"failed"`` or ``"interrupted"``.
            error: why it did not end well, one sentence.

        Raises:
            ValueError: the status is another word.
            FileExistsError: a folder of the final name exists; it is left alone.
        """
        if status not in _ENDINGS:
            raise ValueError(f"a run cannot end with status {status!r}; use one of {', '.join(_ENDINGS)}.")
        final = self.path.parent / str(self._record["id"])
        if final.exists():
            raise FileExistsError(f"the run folder {final} exists already and is left as it is.")
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self._record.pop("process", None)
        self.update({"status": status, "error": error, "finished": _stamp(datetime.now(UTC))})
        self.path.rename(final)
        self.path = final
        return final


def recover(runs_dir: Path) -> list[Path]:
    """Gives the folders of killed runs their final name, with status ``interrupted``.

    A folder is taken only when its process ran on this machine and is gone; another machine's run is left alone.

    Returns:
        The final paths of the folders that were adopted.
    """
    adopted: list[Path] = []
    for path in sorted(runs_dir.glob(".*.part")):
        try:
            data = _read_json(path)
        except ValueError:
            continue  # killed before its first record was written, or damaged: there is nothing to adopt
        process = data.get("process")
        if not isinstance(process, dict) or process.get("host") != socket.gethostname() or _alive(process):
            continue
        # Another process may adopt the same folder at the same moment; whoever renames first has it.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            adopted.append(RunFolder(path, data).finish("interrupted", "The process was killed before the run ended."))
    return adopted


def _alive(process: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a part folder still runs; when it cannot be told, it does."""
    pid = process.get("pid")
    if not isinstance(pid, int) or pid <= 0 or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    birth = process.get("birth")
    # Process numbers are used again after a restart, so the same number is not yet the same process.
    return birth is None or birth == _birth(pid)


def _birth(pid: int) -> str | None:
    """A word that only this life of ``pid`` has (boot and start tick); ``None`` where /proc does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot}:{fields[19]}" if fields[0] != "Z" else "gone"


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
    _write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Record:
    """A run that has ended, as read from its folder.

    Attributes:
        path: the run's folder.
        data: the content of ``record.json``, as it stands.
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

    def figures(self) -> dict[str, float | None]:
        """Every figure of the run under one flat name; ``None`` is unknown.

        ``validation/<metric>``, ``test/<metric>``, the names of :data:`COST_COLUMNS`, ``energy_j/<source>`` and
        ``energy_net_j/<source>`` in joules, and ``target/<metric>``, ``target/seconds``, ``target/joules``,
        ``target/samples``.
        """
        flat: dict[str, float | None] = {}
        for part in ("validation", "test"):
            flat |= {f"{part}/{name}": _number(value) for name, value in self.part(part).items()}
        cost = self.part("cost")
        flat |= {name: _number(cost.get(name)) for name in COST_COLUMNS}
        for window in self.energy():
            flat[f"energy_j/{window['source']}"] = _number(window.get("joules"))
            if "net_joules" in window:
                flat[f"energy_net_j/{window['source']}"] = _number(window["net_joules"])
        flat |= {f"energy_j/{source}": _number(value) for source, value in _mapping(cost.get("energy_j")).items()}
        flat |= {f"target/{name}": _number(value) for name, value in self.part("target").items()}
        return flat

    def metrics(self) -> list[Metric]:
        """The lines of ``metrics.csv`` in order; empty when there is no such file.

        A last line cut short by a kill is left out.

        Raises:
            ValueError: another line is damaged.
        """
        path = self.path / "metrics.csv"
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        except OSError:
            return []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        rows: list[Metric] = []
        for number, row in enumerate(csv.reader(lines[1:]), start=2):
            try:
                epoch, step, name, value = row
                rows.append(Metric(int(epoch), int(step), name, float(value) if value else None))
            except ValueError:
                raise ValueError(
                    f"line {number} of {path} is damaged: {row!r}; wanted epoch,step,name,value."
                ) from None
        return rows


@dataclass(frozen=True)
class Scan:
    """What a search for records found.

    Attributes:
        records: the readable ones, oldest first.
        problems: one sentence for each folder that was left out.
    """

    records: list[Record]
    problems: list[str]


def load_record(path: Path) -> Record:
    """Reads one run from its folder or from its ``record.json``.

    Raises:
        ValueError: there is no record, or it is damaged; the sentence says what is wrong.
    """
    folder = path.parent if path.name == "record.json" else path
    data = _read_json(folder)
    for key, kind in (("id", str), ("algorithm", str), ("dataset", str), ("status", str), ("seed", int)):
        if not isinstance(data.get(key), kind) or isinstance(data.get(key), bool):
            raise ValueError(
                f"the record in {folder} has {key!r} = {data.get(key)!r}, wanted {kind.__name__}; it cannot be used."
            )
    return Record(folder, data)


def scan(roots: Iterable[Path]) -> Scan:
    """Finds the records below ``roots``, at any depth; the same run found twice counts once.

    Raises:
        ValueError: a root does not exist.
    """
    records: dict[str, Record] = {}
    problems: list[str] = []
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"there is no folder {root}; give a run's folder or a folder of runs.")
        for folder in _run_folders(root):
            if folder.name.endswith(".part"):
                problems.append(f"{folder.name}: the run has not ended yet, or was killed and not recovered.")
                continue
            try:
                record = load_record(folder)
            except ValueError as error:
                problems.append(str(error))
            else:
                records.setdefault(record.id, record)
    return Scan(sorted(records.values(), key=_age), problems)


def find_records(roots: Iterable[Path]) -> list[Record]:
    """The readable records below ``roots``, oldest first; :func:`scan` also says what was left out and why."""
    return scan(roots).records


def _age(record: Record) -> tuple[str, str]:
    return record.text("started") or "", record.id


def _run_folders(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        if "record.json" in files:
            folders.clear()
            yield Path(place)
        # Hidden folders are somebody else's, except the one of a run that has not ended.
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name.endswith(".part"))


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no record.json; give the folder of a run.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); the record is damaged.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__} instead of an object; the record is damaged.")
    return data


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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
    """
    fingerprint = _fingerprint(runs_dir)  # before reading: a run that ends meanwhile makes this index stale, not wrong
    rows = [_index_row(record, runs_dir) for record in scan([runs_dir]).records]
    columns = [f"{name} TEXT" for name in ("path", *_INDEX_TEXT)] + ["seed INTEGER"]
    columns += [f"{name} REAL" for name in _INDEX_NUMBERS] + ["energy_j TEXT"]
    path = runs_dir / "index.sqlite"
    aside = runs_dir / f".index.{secrets.token_hex(4)}.sqlite"
    try:
        with contextlib.closing(sqlite3.connect(aside)) as base, base:
            base.execute(f"CREATE TABLE runs ({', '.join(columns)})")
            base.execute("CREATE TABLE built (fingerprint TEXT)")
            base.executemany(f"INSERT INTO runs VALUES ({', '.join('?' * len(columns))})", rows)
            base.execute("INSERT INTO built VALUES (?)", (fingerprint,))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
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
        str(record.path.relative_to(runs_dir)),
        *(record.text(name) for name in _INDEX_TEXT),
        record.seed,
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
