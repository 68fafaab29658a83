"""The observed run: whose weights gradients reach, how often the engine runs, and what cannot be followed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from locallearn.algorithms.base import Algorithm, Update
from locallearn.audit._copies import held_tensors
from locallearn.audit._replay import Batches, Trajectory, bits
from locallearn.audit._watch import Engine, Operators, address_of, forbidden_deeds, leaves

_KINDS = 6  # steps that are looked at closely


class Border(Trajectory):
    """A run with every instrument on.

    Args:
        original: the rule that this is a copy of; its tensors must not be used.
        batches: what the run gets, whose tensors are nobody's secret.

    Attributes:
        reaches: units that a unit's gradient reaches, by unit.
        calls: how often the engine ran for a unit in one batch, the most there were.
        engine_ran: whether it ran at all.
        deeds: what cannot be followed, in words.
        touched: the original's tensors that were used.
        foreign: operators that are not PyTorch's.
        written: a weight of the label path that the rule has written into; empty: none.
    """

    def __init__(self, original: Algorithm, batches: Batches) -> None:
        super().__init__()
        known = {address_of(t) for value in batches.first for t in (value if isinstance(value, tuple) else (value,))}
        owned = {address_of(t): path for path, t in held_tensors(original).items()}
        self._operators = Operators({a: path for a, path in owned.items() if a and a not in known})
        self._engine = Engine()
        self.reaches: dict[str, set[str]] = {}
        self.calls: dict[str, int] = {}
        self.engine_ran = False
        self.deeds: set[str] = set()
        self.written = ""
        self._path: dict[str, bytes] = {}
        self._kinds: dict[tuple[str, ...], int] = {}
        self._in_batch: dict[str, int] = {}
        self._owner: dict[int, str] = {}
        self._before: dict[str, list[tuple[Tensor | None, int]]] = {}

    @property
    def touched(self) -> set[str]:
        """Paths of the original's tensors that an operator was given."""
        return self._operators.touched

    @property
    def foreign(self) -> set[str]:
        """Operators of other libraries."""
        return self._operators.foreign

    @contextmanager
    def instruments(self, twin: Algorithm) -> Iterator[None]:
        """What has to be on around the whole run."""
        with self._engine.on(), forbidden_deeds(twin) as deeds:
            try:
                yield
            finally:
                self.deeds |= deeds

    def begin(self, twin: Algorithm) -> None:
        """Note who owns what."""
        super().begin(twin)
        for name, party in self._parties.items():
            self.reaches[name] = set()
            self.calls[name] = 0
            self._owner |= {id(p): name for p in party.weights if party.is_unit}

    def asked(self, twin: Algorithm) -> AbstractContextManager[Any]:
        """Before the generator goes on."""
        self._engine.reset()
        self._before = self._gradients()
        self._path = self._label_path(twin)
        return self._operators

    def got(self, twin: Algorithm, update: Update | None) -> None:
        """Walk what the generator differentiated by itself, and what is about to be differentiated."""
        unit = None if update is None else update.unit
        for roots in self._engine.roots:
            reached = {self._owner[id(leaf)] for leaf in leaves(roots) if id(leaf) in self._owner}
            if len(reached) > 1:  # a rule may differentiate several units before it hands over the first
                top = max(reached, key=lambda name: self._parties[name].rank)
                self.reaches[unit if unit in reached else top] |= reached - {unit if unit in reached else top}
        if update is None or update.unit not in self._parties:
            return
        if update.loss is not None and update.gradients is None:
            own = {self._owner[id(leaf)] for leaf in leaves([update.loss.grad_fn]) if id(leaf) in self._owner}
            self.reaches[update.unit] |= own - {update.unit}
        if update.gradients:
            self.reaches[update.unit] |= {self._owner.get(id(p), update.unit) for p in update.gradients} - {update.unit}

    def differentiated(self, twin: Algorithm, unit: str) -> None:
        """Note whose gradients have changed."""
        super().differentiated(twin, unit)
        self._compare_label_path(twin)
        for name, now in self._gradients().items():
            before = self._before[name]
            if name != unit and any(
                a is not b or m != n for (a, m), (b, n) in zip(before, now, strict=True) if b is not None
            ):
                self.reaches[unit].add(name)
        self._in_batch[unit] = self._in_batch.get(unit, 0) + self._engine.calls
        self.engine_ran = self.engine_ran or self._engine.calls > 0

    def failed(self, unit: str, error: RuntimeError) -> bool:
        """A rule that forgot to detach walks a graph again; that shall be told, not crash."""
        return bool(self.reaches[unit])

    def finished(self, twin: Algorithm, number: int) -> None:
        """Count what ran after the last update, too."""
        super().finished(twin, number)
        self._compare_label_path(twin)
        self.engine_ran = self.engine_ran or self._engine.calls > 0
        for unit, calls in self._in_batch.items():
            self.calls[unit] = max(self.calls[unit], calls)
        self._in_batch = {}
        self._kinds.setdefault(tuple(self._operators.names), number)
        self._operators.names.clear()

    def kinds(self) -> set[int]:
        """The first step of every kind, told by the operators that it ran; of too many kinds, some from all over the run."""
        steps = sorted(self._kinds.values())
        return set(steps[:: -(-len(steps) // _KINDS)])

    def _label_path(self, twin: Algorithm) -> dict[str, bytes]:
        return {name: bits([p]) for module in twin.label_path for name, p in module.named_parameters()}

    def _compare_label_path(self, twin: Algorithm) -> None:
        now = self._label_path(twin)
        self.written = self.written or next((name for name in now if now[name] != self._path[name]), "")

    def _gradients(self) -> dict[str, list[tuple[Tensor | None, int]]]:
        return {
            name: [(p.grad, 0 if p.grad is None else p.grad._version) for p in party.weights]
            for name, party in self._parties.items()
            if party.is_unit
        }


def observe(twin: Algorithm, original: Algorithm, run: Any, batches: Batches) -> Border:
    """Train a copy under observation; ``run`` is what trains it."""
    border = Border(original, batches)
    border.begin(twin)
    with border.instruments(twin):
        run(twin, batches, border)
    border.end()
    return border
