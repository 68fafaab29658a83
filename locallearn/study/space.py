"""What a search may draw from: ranges of numbers and choices, some of them only where others were drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

import optuna

When: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""Settings, and what has to have been drawn for each of them: ``(("optimizer", ("sgd", "muon")),)``."""


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may take in a search; both ends are drawn, too.

    Attributes:
        low: smallest value.
        high: largest value.
        log: search on a logarithmic scale.
        step: distance between the values; ``None``: 1 for whole numbers, else none.
        whole: draw whole numbers only.
        when: drawn only where all of these hold; empty: always.

    Raises:
        ValueError: an empty or endless range, a logarithmic one that does not stay above zero or has steps, a step that
            does not lead from one end to the other, or ends that are not whole where whole numbers are asked for.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False
    when: When = ()

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

    Attributes:
        values: all of them.
        when: drawn only where all of these hold; empty: always.

    Raises:
        ValueError: fewer than two, or one of them twice.
    """

    values: tuple[str, ...]
    when: When = ()

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


def ordered(space: Space) -> dict[str, Range | Choices]:
    """The same space, every setting behind those that its drawing depends on.

    Raises:
        ValueError: a condition on something that is not in the space, is a range, or never has the value; or conditions
            that lead back to where they started.
    """
    for key, part in space.items():
        for parent, values in part.when:
            known = space.get(parent)
            if not isinstance(known, Choices):
                raise ValueError(
                    f"{key} is drawn when {parent} is {' or '.join(values)}, but no choices of it are searched"
                )
            strange = [value for value in values if value not in known.values]
            if strange:
                raise ValueError(
                    f"{key} is drawn when {parent} is {strange[0]}, which is none of its choices {', '.join(known.values)}"
                )
    placed: dict[str, Range | Choices] = {}
    while len(placed) < len(space):
        free = [key for key in space if key not in placed and all(parent in placed for parent, _ in space[key].when)]
        if not free:
            raise ValueError(
                f"the conditions of {', '.join(key for key in space if key not in placed)} go round in a circle"
            )
        placed.update((key, space[key]) for key in free)
    return placed


def holds(part: Range | Choices, drawn: Mapping[str, object]) -> bool:
    """Whether a setting is to be drawn where these have been drawn already."""
    return all(drawn.get(parent) in values for parent, values in part.when)


def corners(space: Space) -> list[list[str]]:
    """Settings that reach every end and every choice of a space: all first ones, all last ones, and each one left out."""
    space = ordered(space)
    points = [_point(space, {key: part.extremes[end] for key, part in space.items()}) for end in (0, -1)]
    reached = {pair for point in points for pair in point.items()}
    first = {key: part.extremes[0] for key, part in space.items()}
    for key, part in space.items():
        for value in part.extremes:
            if (key, value) not in reached:
                points.append(_point(space, {**first, **_ancestors(space, key), key: value}))
                reached.update(points[-1].items())
    return [words(point) for point in points]


def _ancestors(space: Space, key: str) -> dict[str, str]:
    """What has to be drawn for ``key`` to be drawn."""
    found: dict[str, str] = {}
    for parent, values in space[key].when:
        found |= {**_ancestors(space, parent), parent: values[0]}
    return found


def _point(space: Space, wanted: Mapping[str, str]) -> dict[str, str]:
    """Those of the wanted values whose conditions hold."""
    point: dict[str, str] = {}
    for key, part in space.items():
        if holds(part, point):
            point[key] = wanted[key]
    return point
