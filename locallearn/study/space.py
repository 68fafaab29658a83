"""What a search may draw from: ranges of numbers, and choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

import optuna


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may take in a search; both ends are drawn, too.

    Attributes:
        low: smallest value.
        high: largest value.
        log: search on a logarithmic scale.
        step: distance between the values; ``None``: 1 for whole numbers, else none.
        whole: draw whole numbers only.

    Raises:
        ValueError: an empty or endless range, a logarithmic one that does not stay above zero or has steps, a step that
            does not lead from one end to the other, or ends that are not whole where whole numbers are asked for.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf or (self.log and self.low <= 0):
            raise ValueError(
                f"a search range from {self.low} to {self.high}{' on a log scale' if self.log else ''} cannot be searched: "
                "expected finite numbers with low < high, and low above 0 for log"
            )
        numbers = [number for number in (self.low, self.high, self.step) if number is not None]
        if self.whole and not all(float(number).is_integer() for number in numbers):
            raise ValueError(f"whole numbers are drawn here, so {' and '.join(map(str, numbers))} have to be whole")
        if self.step is None:
            return
        if self.log:
            raise ValueError(f"a search range with log has no step: take out log, or step={self.step}")
        # In decimals, as they were written: 0.3 is three steps of 0.1, whatever the processor thinks of it.
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        if not 0 < self.step < math.inf or (high - low) % step != 0:
            raise ValueError(
                f"steps of {self.step} do not lead from {self.low} to {self.high}: choose a step above 0 that does"
            )

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What Optuna draws from."""
        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    @property
    def extremes(self) -> tuple[str, ...]:
        """Its ends, as :func:`words` writes them."""
        kind = int if self.whole else float
        return text(kind(self.low)), text(kind(self.high))


@dataclass(frozen=True)
class Choices:
    """Values that a setting may take in a search, as they stand behind the equals sign: ``("adam", "[8,8]", "null")``.

    Raises:
        ValueError: fewer than two, or one of them twice.
    """

    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            raise ValueError(
                f"the choices are {', '.join(self.values) or 'none'}; expected at least two, each of them once"
            )

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What Optuna draws from."""
        return optuna.distributions.CategoricalDistribution(self.values)

    @property
    def extremes(self) -> tuple[str, ...]:
        """All of them."""
        return self.values


Space: TypeAlias = Mapping[str, Range | Choices]
"""What may be drawn, by setting."""


def text(value: object) -> str:
    """A drawn value as it stands behind the equals sign; a number to its last digit."""
    return value if isinstance(value, str) else repr(value)


def words(drawn: Mapping[str, object]) -> list[str]:
    """Drawn values as ``KEY=VALUE``."""
    return [f"{key}={text(value)}" for key, value in drawn.items()]


def corners(space: Space) -> list[list[str]]:
    """Settings that reach every end and every choice of a space: all first ones, all last ones, and each other one."""
    first = {key: part.extremes[0] for key, part in space.items()}
    last = {key: part.extremes[-1] for key, part in space.items()}
    between = [{**first, key: value} for key, part in space.items() for value in part.extremes[1:-1]]
    return [words(point) for point in (first, last, *between)]
