"""Records as they are read, whatever they hold."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from locallearn.records._files import plain_file
from locallearn.records._keys import COST_COLUMNS, ENDINGS, SHARES, TEMPLATE, UNRECORDED, Metric, Quality

_NESTED = 100  # levels of a record that is no prank
_CHARACTERS = 100_000  # of a text, and of a name
_NAME = 200
_NAMES = ("algorithm", "variant", "dataset", "net", "task", "mode", "status", "locality")
_LONE = re.compile("[\ud800-\udfff]")


_ROUNDING = 1e-6  # of a share that was summed in float32
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

    @property
    def begins_with(self) -> str | None:
        """What tells the weights that training began with from others: their digest; ``None`` where they were drawn.

        An older record has the name alone, which may have come to stand for other weights: it is no digest's like.
        """
        known = self.part("beginning").get("weights")
        named = self.part("config").get("init_from")
        return known if isinstance(known, str) and known else None if named is None else f"unknown weights of {named}"

    @property
    def begins_with_in_words(self) -> str:
        """The same for a reader: the run that the weights are from, where it is known, and the beginning of their digest."""
        run, known = self.part("beginning").get("run"), self.begins_with or "null"
        short = known if " " in known else known[:8]
        return f"{run} ({short})" if isinstance(run, str) and run else short

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
            flat |= {f"{part}/{name}": _quality(name)(value) for name, value in self.part(part).items()}
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
                rows.append(Metric(int(epoch), int(step), readable_text(name, _NAME), float(value) if value else None))
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
    data = read_json(folder)
    for key, kind in (("id", str), ("algorithm", str), ("dataset", str), ("status", str), ("seed", int)):
        value = data.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"the record in {folder} has {key!r} = {_short(repr(value))}, wanted {kind.__name__}; it cannot be used."
            )
    short = {key: readable_text(data[key], _NAME) for key in _NAMES if isinstance(data.get(key), str)}
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
        for folder in run_folders(root, unread.append):
            place = folder.resolve()
            if place in places:
                continue
            places.add(place)
            if folder.name.endswith(".part"):
                unended = "the run has not ended yet, or was killed and not recovered."
                recorded = (folder / "record.json").exists()
                problems.append(f"{_LONE.sub('?', folder.name)}: {unended if recorded else UNRECORDED}")
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


def run_folders(root: Path, unreadable: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    for place, folders, files in os.walk(root, onerror=unreadable):
        # A folder that a kill left before its first record has none, and must be told all the same.
        killed = Path(place).name.endswith(".part") and Path(place).name.startswith(".")
        if killed or "record.json" in files or "record.json" in folders:
            folders.clear()
            yield Path(place)
        # Hidden folders are somebody else's, except the one of a run that has not ended.
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name.endswith(".part"))


def read_json(folder: Path) -> dict[str, Any]:
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


def _readable(value: Any, levels: int) -> Any:
    """What JSON holds, with text that can be written anywhere and shown: see :func:`readable_text`.

    Raises:
        ValueError: it is nested deeper than ``levels``, which no later reader of the record would survive.
    """
    if isinstance(value, str):
        return readable_text(value)
    if not isinstance(value, (dict, list)):
        return value
    if levels == 0:
        raise ValueError(f"nested deeper than {_NESTED} levels")
    if isinstance(value, list):
        return [_readable(item, levels - 1) for item in value]
    return {readable_text(key, _NAME): _readable(item, levels - 1) for key, item in value.items()}


def readable_text(text: str, most: int = _CHARACTERS) -> str:
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
    for key in ("metric", "target", "beginning"):
        if not isinstance(data.get(key), (dict, NoneType)):
            found.append((key, data[key], "an object"))
    cost = record.part("cost")
    numbers = [
        (f"{part}.{name}", value, _quality(name))
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
            found.append((name, value, "a share of 1" if read is _share else "a number, or 0 and above for a cost"))
    sentences = [
        f"{_short(name)} is {_short(repr(value))}, wanted {kind}; it counts as unknown." for name, value, kind in found
    ]
    if not 0 <= record.seed < 2**63:
        sentences.append(f"seed is {record.seed}, which no run has: wanted a whole number from 0 on.")
    if record.status not in ENDINGS:
        sentences.append(f"status is {_short(repr(record.status))}, wanted one of {', '.join(ENDINGS)}.")
    return sentences


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _quality(name: str) -> Callable[[Any], float | None]:
    """What reads a metric or loss of this name."""
    return _share if name in SHARES else _number


def _share(value: Any) -> float | None:
    number = _number(value)
    return None if number is None or not -_ROUNDING <= number <= 1 + _ROUNDING else number


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
