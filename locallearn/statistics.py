"""Numbers over seeds: means, spreads, bootstrap intervals, and differences to the baseline paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from locallearn.records import Quality, Record

__all__ = [
    "Figure",
    "PairedDifference",
    "Row",
    "Summary",
    "bootstrap_interval",
    "compare_table",
    "paired",
    "summarise",
]

# Settings that may differ between runs of one group without making them different experiments: places, what is measured
# beside training, and those of other commands.
_FREE_SETTINGS = frozenset(
    {
        *("data_dir", "dataset.data_dir", "runs_dir", "resume"),
        *("meter", "logger", "trainer.probe_samples", "trainer.checkpoint_s"),
        *("compare", "tune", "report", "bench", "hydra"),
    }
)


@dataclass(frozen=True)
class Summary:
    """``n`` values, their mean and their sample standard deviation (``None`` below two values)."""

    n: int
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class PairedDifference:
    """A quantity against the baseline, over the seeds both have.

    Attributes:
        n: number of common seeds.
        mean: mean of the per-seed differences, ``None`` without a common seed.
        lo: lower end of its 95 % bootstrap interval, ``None`` below two seeds.
        hi: upper end of that interval.
        ratio: mean of the per-seed ratios; ``None`` without a common seed or when a baseline value is 0.
        ratio_lo: lower end of the ratio's interval.
        ratio_hi: upper end of that interval.
    """

    n: int
    mean: float | None
    lo: float | None
    hi: float | None
    ratio: float | None
    ratio_lo: float | None
    ratio_hi: float | None


@dataclass(frozen=True)
class Figure:
    """One quantity of one group of runs.

    Attributes:
        by_seed: the known values by seed.
        summary: their number, mean and spread.
        interval: 95 % bootstrap interval of the mean, ``None`` below two seeds.
        paired: the comparison with the baseline's group, ``None`` where there is none or for the baseline itself.
    """

    by_seed: Mapping[int, float]
    summary: Summary
    interval: tuple[float, float] | None
    paired: PairedDifference | None


@dataclass(frozen=True)
class Row:
    """A group of runs that differ only in their seed.

    Attributes:
        dataset: data set.
        net: network, empty when the records do not say.
        task: task, empty when the records do not say.
        algorithm: learning rule.
        variant: what else sets the group apart (the records' ``variant``, and settings that only some runs of a seed have),
            ``None`` for nothing.
        mode: protocol mode (``own``, ``matched``, ``target``), ``None`` when the records do not say.
        records: one record per seed, ordered by seed.
        figures: figures by the names of :meth:`Record.figures`; a name is here when one record knows its value.
        notes: sentences to print beside the numbers.
    """

    dataset: str
    net: str
    task: str
    algorithm: str
    variant: str | None
    mode: str | None
    records: tuple[Record, ...]
    figures: Mapping[str, Figure]
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """The rule, with its variant where there is one."""
        return self.algorithm if self.variant is None else f"{self.algorithm} · {self.variant}"

    @property
    def place(self) -> str:
        """Data set and network, and the task where it is not the usual one."""
        task = "" if self.task == "classification" else self.task
        return " · ".join(filter(None, (self.dataset, self.net, task)))

    @property
    def metric(self) -> Quality:
        """The figure by which its runs are judged."""
        return self.records[-1].metric


def bootstrap_interval(
    values: Iterable[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean, widened for few values.

    The plain percentile interval is too narrow for a handful of seeds (at five it covers about 83 % when asked for
    95 %). The expanded percentile interval reads the bootstrap distribution at tail probability
    Φ(-t·√(n/(n-1))), t being Student's quantile with n-1 degrees of freedom, instead of (1-level)/2. It never leaves
    the range of the values, so below about six of them it still covers less than it says.

    Source: Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279, section on interval
    adjustments.

    Args:
        values: one number per seed.
        level: wanted coverage, between 0 and 1.
        resamples: number of bootstrap samples.
        seed: of the resampling; the same values always give the same interval.

    Returns:
        Lower and upper end, or ``None`` for fewer than two values.

    Raises:
        ValueError: ``level`` or ``resamples`` is out of range, or a value is not finite.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, but is {level}; 0.95 is usual.")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, but is {resamples}; 10000 is usual.")
    data = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError("a bootstrap interval needs finite values, but at least one is not; leave unknown values out.")
    if data.size < 2:
        return None
    if data.min() == data.max():
        return float(data[0]), float(data[0])
    t = _student_quantile(0.5 + level / 2, data.size - 1)
    tail = NormalDist().cdf(-t * math.sqrt(data.size / (data.size - 1)))
    lo, hi = np.quantile(_weights(data.size, resamples, seed) @ data, [tail, 1.0 - tail])
    return float(lo), float(hi)


@lru_cache(maxsize=8)
def _weights(n: int, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Share of each of ``n`` values in each bootstrap mean, shape ``(resamples, n)``."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples) / n


@lru_cache(maxsize=64)
def _student_quantile(p: float, df: int) -> float:
    """Student's quantile for ``p`` > 1/2, by bisection on the integrated density."""
    lo, hi = 0.0, 1.0
    while _student_cdf(hi, df) < p:
        hi *= 2.0
    for _ in range(60):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if _student_cdf(middle, df) < p else (lo, middle)
    return (lo + hi) / 2


def _student_cdf(x: float, df: int) -> float:
    # With t = √df·tan θ the density becomes cos^(df-1) θ on a finite range, which the trapezoid rule likes.
    end, steps = math.atan(x / math.sqrt(df)), 2000
    density = np.cos(np.linspace(0.0, end, steps + 1)) ** (df - 1)
    area = float(density.sum() - (density[0] + density[-1]) / 2) * end / steps
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)
    return 0.5 + math.exp(log_scale) * area


def summarise(values: Iterable[tuple[int, float | None]]) -> Summary:
    """Mean and sample standard deviation over seeds; unknown values are left out and not counted.

    Args:
        values: pairs of seed and value.

    Raises:
        ValueError: a seed occurs twice, whose spread would say nothing about other seeds.
    """
    by_seed: dict[int, float | None] = {}
    for seed, value in values:
        if seed in by_seed:
            raise ValueError(
                f"seed {seed} occurs more than once; give one value per seed, for a spread over repeated seeds is none."
            )
        by_seed[seed] = value
    known = [value for value in by_seed.values() if value is not None]
    if not known:
        return Summary(0, None, None)
    return Summary(len(known), float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None)


def paired(a: Mapping[int, float | None], b: Mapping[int, float | None]) -> PairedDifference:
    """Compares ``a`` with the baseline ``b``, seed by seed, over the seeds whose value both know.

    Args:
        a: values by seed.
        b: the baseline's values by seed.

    Returns:
        Mean difference a - b and mean ratio a / b with their 95 % bootstrap intervals.
    """
    pairs = [
        (x, y) for seed in sorted(a.keys() & b.keys()) if (x := a[seed]) is not None and (y := b[seed]) is not None
    ]
    if not pairs:
        return PairedDifference(0, None, None, None, None, None, None)
    differences = [x - y for x, y in pairs]
    lo, hi = bootstrap_interval(differences) or (None, None)
    mean = float(np.mean(differences))
    if any(y == 0 for _, y in pairs):
        return PairedDifference(len(pairs), mean, lo, hi, None, None, None)
    ratios = [x / y for x, y in pairs]
    ratio_lo, ratio_hi = bootstrap_interval(ratios) or (None, None)
    return PairedDifference(len(pairs), mean, lo, hi, float(np.mean(ratios)), ratio_lo, ratio_hi)


def compare_table(records: Iterable[Record], baseline: str = "backprop") -> list[Row]:
    """Groups finished runs by data set, network, task, mode, rule and variant; compares each group with the baseline.

    Runs of one seed with different settings (a sweep's) are different experiments: the group is split by these settings,
    which its rows name. Of several runs with the same group and seed the newest is taken, and a note says so; they are
    never pooled. Runs that did not end with ``done``, and benchmarks, are left out. The baseline is the group of the same
    data set, network, task and mode whose rule is ``baseline``, of the same variant or of none; of several the one whose
    settings differ least from the row's, and then a note names it.

    Returns:
        Rows ordered by data set, network, task, mode; the baseline first, then by rule, variant and settings.
    """
    groups: dict[tuple[str, str, str, str, str, str], list[Record]] = {}
    for record in records:
        if record.status == "done" and not record.part("bench"):
            net, task, mode, variant = (record.text(name) or "" for name in ("net", "task", "mode", "variant"))
            key = (record.dataset, net, task, mode, record.algorithm, variant)
            groups.setdefault(key, []).append(record)
    newest = {
        (*key, settings): _newest(part) for key, group in groups.items() for settings, part in _apart(group).items()
    }
    rows = []
    for row in sorted(newest, key=lambda row: (*row[:4], row[4] != baseline, *row[4:])):
        kept, notes = newest[row]
        *place, mode, algorithm, variant, settings = row
        reference: Sequence[Record] | None = None
        found = [k for k in newest if k[:5] == (*place, mode, baseline) and k[5] in (variant, "")]
        if found and algorithm != baseline:
            nearest = min(found, key=lambda k: (k[5] != variant, _distance(kept[-1], newest[k][0][-1]), k))
            reference = newest[nearest][0]
            if sum(k[5] == nearest[5] for k in found) > 1:
                notes = (*notes, f"Its baseline is {baseline} with {nearest[6] or 'its other settings'}.")
        said = ", ".join(filter(None, (variant, settings))) or None
        rows.append(Row(*row[:3], algorithm, said, mode or None, kept, _figures(kept, reference), notes))
    return rows


def _apart(group: Sequence[Record]) -> dict[str, list[Record]]:
    """The group, split by the settings in which runs of one seed differ; keys name them, ``""`` where nothing differs."""
    flats = [_flat(record) for record in group]
    names: set[str] = set()
    for seed in {record.seed for record in group}:
        same = [flat for flat, record in zip(flats, group, strict=True) if record.seed == seed]
        names.update(_differing(same))
    told: list[str] = []
    for name in sorted(names, key=lambda name: (not name.endswith("._target_"), name)):
        # Another optimizer has other settings of its own, which need not be told unless two runs differ in them alone.
        implied = f"{name.rpartition('.')[0]}._target_" in told
        if not implied or _kinds(flats, [*told, name]) > _kinds(flats, told):
            told.append(name)
    parts: dict[str, list[Record]] = {}
    for flat, record in zip(flats, group, strict=True):
        label = ", ".join(_setting(name, flat[name]) for name in told if name in flat)
        parts.setdefault(label, []).append(record)
    return parts


def _kinds(flats: Sequence[Mapping[str, str]], names: Sequence[str]) -> int:
    return len({tuple(flat.get(name) for name in names) for flat in flats})


def _setting(name: str, value: str) -> str:
    """As it would be typed; of a class its last name."""
    value = {"None": "null", "True": "true", "False": "false"}.get(value, value.strip("'"))
    owner, _, key = name.rpartition(".")
    return f"{owner}={value.rpartition('.')[2]}" if key == "_target_" else f"{name}={value}"


def _distance(one: Record, other: Record) -> int:
    """In how many settings two runs of different rules differ, those of the rules left out."""
    return sum(not name.startswith("algorithm.") for name in _differing([_flat(one), _flat(other)]))


def _newest(group: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    """One record per seed, and what must be said about the choice."""
    by_seed: dict[int, list[Record]] = {}
    for record in group:
        by_seed.setdefault(record.seed, []).append(record)
    kept = tuple(
        max(by_seed[seed], key=lambda record: (record.text("finished") or "", record.id)) for seed in sorted(by_seed)
    )
    notes = [
        f"Seed {seed} was run {len(same)} times; only the newest run is counted."
        for seed, same in sorted(by_seed.items())
        if len(same) > 1
    ]
    differing = _differing([_flat(record) for record in kept])
    if differing:
        shown = ", ".join(differing[:5]) + (" …" if len(differing) > 5 else "")
        notes.append(f"Its runs differ in more than the seed ({shown}); the spread mixes both.")
    return kept, tuple(notes)


def _differing(flats: Sequence[Mapping[str, str]]) -> list[str]:
    """Names whose values are not the same in all of these settings."""
    names = {name for flat in flats for name in flat}
    return sorted(name for name in names if len({flat.get(name, "") for flat in flats}) > 1)


def _flat(record: Record) -> dict[str, str]:
    """The settings of a run that make it the experiment it is, by dotted name."""
    return dict(_leaves(record.part("config")))


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key == "seed" or name in _FREE_SETTINGS:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, repr(value)


def _figures(records: Sequence[Record], reference: Sequence[Record] | None) -> dict[str, Figure]:
    base = _by_seed(reference or ())
    result: dict[str, Figure] = {}
    for name, values in _by_seed(records).items():
        comparison = paired(values, base.get(name, {})) if reference is not None else None
        interval = bootstrap_interval(values.values())
        result[name] = Figure(
            values, summarise(values.items()), interval, comparison if comparison and comparison.n else None
        )
    return result


def _by_seed(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.figures().items():
            if value is not None:
                values.setdefault(name, {})[record.seed] = value
    return values
