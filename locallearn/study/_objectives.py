"""What a search looks for: a figure of the validation data, and perhaps costs beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from locallearn.records import COST_COLUMNS, Record

Direction: TypeAlias = Literal["maximize", "minimize"]
"""As Optuna says it."""

ALIASES = {"seconds": "train_s", "flops": "train_flops", "bytes": "activation_peak_bytes", "joules": "energy_j"}
"""Short names of costs."""
MEASURED = ("train_s", "validation_s", "co2_g", "energy_j")
"""Costs that another process on the same device would change; of ``energy_j`` also its single sources."""


@dataclass(frozen=True)
class Objective:
    """One thing that a search looks for.

    Attributes:
        name: a figure of the validation data (``accuracy``), or a cost: one of
            :data:`~locallearn.records.COST_COLUMNS`, ``energy_j`` or ``energy_j/SOURCE``.
        maximise: more is better.
    """

    name: str
    maximise: bool

    @property
    def cost(self) -> bool:
        """Whether it is a cost, not a figure of the validation data."""
        return self.name in COST_COLUMNS or self.name.partition("/")[0] == "energy_j"

    @property
    def measured(self) -> bool:
        """Whether it depends on what else the device does."""
        return self.name.partition("/")[0] in MEASURED

    @property
    def direction(self) -> Direction:
        """As Optuna says it."""
        return "maximize" if self.maximise else "minimize"

    def read(self, record: Record) -> float:
        """The figure of one run.

        Raises:
            ValueError: the record has none.
        """
        figures = record.figures()
        if self.name == "energy_j":
            value = _joules(record)
        else:
            value = figures.get(self.name if self.cost else f"validation/{self.name}")
        if value is None:
            known = [name for name, figure in figures.items() if figure is not None and not name.startswith("test/")]
            raise ValueError(f"the run has no {self.name}; it has {', '.join(known)}")
        return value


def _joules(record: Record) -> float | None:
    """Joules of the sources that measured, together; of the modelled ones where none did.

    The sources of one quality are parts of the machine that do not overlap (boards, processor, memory).
    """
    for quality in ("measured", "modelled"):
        found = [window.get("joules") for window in record.energy() if window.get("quality") == quality]
        known = [float(value) for value in found if isinstance(value, int | float)]
        if known:
            return math.fsum(known)
    return None


def front(values: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> list[int]:
    """Places of those values that no other one beats in one objective without losing in another."""
    signed = [[v if o.maximise else -v for v, o in zip(row, objectives, strict=True)] for row in values]
    return [
        place
        for place, own in enumerate(signed)
        if not any(other != own and all(o >= v for o, v in zip(other, own, strict=True)) for other in signed)
    ]
