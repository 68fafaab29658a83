"""Means, intervals and tests of a handful of numbers, one per seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats

LEAST = 3
"""Fewest values that an interval or a test is made of."""
_EXACT = 16
_DRAWS = 2**16 - 1
_NO_LOGARITHM = "there is no ratio to or of a value that is not above 0"
_TOO_LARGE = "the numbers are too large for this"


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
        lo: lower end of its 95 % t-interval, ``None`` below three seeds.
        hi: upper end of that interval.
        ratio: geometric mean of the per-seed ratios; ``None`` without a common seed or where a value is not above 0.
        ratio_lo: lower end of the ratio's 95 % t-interval, worked out on logarithms.
        ratio_hi: upper end of that interval.
        p: two-sided sign-flip p-value, of the logarithms' differences for a cost and of the differences for anything
            else; ``None`` below three seeds.
        p_least: the smallest value that ``p`` can have with so many seeds.
        p_holm: ``p`` after Holm's correction over the rules of the section; filled in by :func:`compare_table`.
        reason: why something is ``None`` that the number of seeds does not explain, one sentence part.
        equal: whether there are pairs, and both values of every one are the same.
    """

    n: int
    mean: float | None
    lo: float | None
    hi: float | None
    ratio: float | None
    ratio_lo: float | None
    ratio_hi: float | None
    p: float | None = None
    p_least: float | None = None
    p_holm: float | None = None
    reason: str | None = None
    equal: bool = False


def t_interval(values: Iterable[float], *, level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of the mean; of paired differences it is the paired t-interval.

    For a cost give the logarithms, and take the exponential of both ends: the interval of the geometric mean.

    Args:
        values: one number per seed.
        level: wanted coverage, between 0 and 1.

    Returns:
        Lower and upper end, or ``None`` for fewer than three values, of which no interval says anything.

    Raises:
        ValueError: ``level`` is out of range, or a value is not finite.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, but is {level}; 0.95 is usual.")
    data, scale = _scaled(values)
    if data.size < LEAST:
        return None
    if data.min() == data.max():
        return float(data[0]) * scale, float(data[0]) * scale
    half = _quantile(0.5 + level / 2, data.size - 1) * float(data.std(ddof=1)) / math.sqrt(data.size)
    middle = float(data.mean())
    return (middle - half) * scale, (middle + half) * scale


@lru_cache(maxsize=64)
def _quantile(p: float, df: int) -> float:
    return float(stats.t.ppf(p, df))


def _scaled(values: Iterable[float]) -> tuple[npt.NDArray[np.float64], float]:
    """The values divided by the largest of them, so that their squares and sums stay finite; and that one."""
    data = np.asarray(list(values), dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError("statistics need finite values, but at least one is not; leave unknown values out.")
    scale = float(np.abs(data).max()) if data.size else 1.0
    return (data / scale, scale) if scale > 1e100 else (data, 1.0)


def sign_flip_p(differences: Iterable[float]) -> float | None:
    """Two-sided sign-flip p-value: how rarely a mean as far from 0 comes from the same differences with random signs.

    Exact up to 16 differences (all sign assignments), beyond that from 65,535 random ones, always the same. It asks for
    no distribution, only that without an effect a difference and its negative are equally likely.

    Args:
        differences: one number per pair.

    Returns:
        The share of assignments whose sum is at least as far from 0; ``None`` for no differences. It cannot fall below
        :func:`smallest_p`.

    Raises:
        ValueError: a difference is not finite.
    """
    data, _ = _scaled(differences)
    if data.size == 0:
        return None
    exact = data.size <= _EXACT
    sums = np.abs(_signs(data.size) @ data)
    # Sums that are equal on paper differ in their last digits.
    reached = sums >= abs(float(data.sum())) - 1e-9 * float(np.abs(data).sum())
    return float(reached.mean()) if exact else (float(reached.sum()) + 1) / (_DRAWS + 1)


def smallest_p(n: int) -> float | None:
    """The smallest sign-flip p-value that ``n`` pairs can give: 0.25 for three, 0.0625 for five."""
    if n < 1:
        return None
    return 2.0 ** (1 - n) if n <= _EXACT else 1 / (_DRAWS + 1)


@lru_cache(maxsize=8)
def _signs(n: int) -> npt.NDArray[np.float64]:
    """Sign assignments, one a row: all with a first sign of +1 (the others mirror them), or random ones."""
    if n > _EXACT:
        flipped = np.random.default_rng(0).integers(2, size=(_DRAWS, n))
    else:
        flipped = np.arange(2 ** (n - 1))[:, None] >> np.arange(n)[None, :] & 1
        flipped = np.roll(flipped, 1, axis=1)  # the bit that is never set comes first
    return np.asarray(1 - 2 * flipped, dtype=np.float64)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: p-values that may each be read as if there were no others.

    Args:
        ps: p-values of one family; ``None`` is unknown, stays so and does not count.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    before = 0.0
    for rank, (p, i) in enumerate(known):
        before = max(before, min(1.0, (len(known) - rank) * p))
        adjusted[i] = before
    return adjusted


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
    data, scale = _scaled(value for value in by_seed.values() if value is not None)
    if not data.size:
        return Summary(0, None, None)
    if data.min() == data.max():  # exactly, not but for the rounding of a mean
        return Summary(data.size, float(data[0]) * scale, 0.0 if data.size > 1 else None)
    std = float(data.std(ddof=1)) * scale
    return Summary(data.size, float(data.mean()) * scale, std)


def paired(a: Mapping[int, float | None], b: Mapping[int, float | None], *, log: bool = False) -> PairedDifference:
    """Compares ``a`` with the baseline ``b``, seed by seed, over the seeds whose value both know.

    Args:
        a: values by seed.
        b: the baseline's values by seed.
        log: whether they are costs, whose p-value is that of the ratios.

    Returns:
        Mean difference a - b and geometric mean of the ratios a / b, with 95 % t-intervals from three seeds on.
    """
    pairs = [
        (x, y) for seed in sorted(a.keys() & b.keys()) if (x := a[seed]) is not None and (y := b[seed]) is not None
    ]
    if not pairs:
        return PairedDifference(0, None, None, None, None, None, None)
    differences = [x - y for x, y in pairs]
    finite = all(map(math.isfinite, differences))
    lo, hi = (t_interval(differences) if finite else None) or (None, None)
    mean = summarise(enumerate(differences)).mean if finite else None
    reason = None if finite else _TOO_LARGE
    logs: list[float] = []
    if all(x > 0 and y > 0 for x, y in pairs):
        logs = [math.log(x) - math.log(y) for x, y in pairs]
    else:
        reason = _NO_LOGARITHM
    ratio, ends = geometric(logs)
    ratio_lo, ratio_hi = ends or (None, None)
    tested = logs if log else differences if finite else []
    p = sign_flip_p(tested) if len(tested) >= LEAST else None
    least = None if p is None else smallest_p(len(tested))
    equal = all(x == y for x, y in pairs)
    return PairedDifference(len(pairs), mean, lo, hi, ratio, ratio_lo, ratio_hi, p, least, reason=reason, equal=equal)


def geometric(logs: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """The geometric mean of numbers given as logarithms, and its 95 % t-interval; ``None`` for what is too few or large."""
    if not logs:
        return None, None
    try:
        ends = t_interval(logs)
        return math.exp(math.fsum(logs) / len(logs)), None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
    except OverflowError:
        return None, None
