"""What an audit does, in order, and what it has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch

from locallearn.algorithms.base import Algorithm, Locality
from locallearn.audit._border import Border, observe
from locallearn.audit._copies import Unfollowable, duplicate
from locallearn.audit._effects import Effects, sgd
from locallearn.audit._replay import (
    Batches,
    Context,
    Driver,
    Observer,
    Optimizers,
    Party,
    Randomness,
    Trajectory,
    follow,
    parties,
    stages,
)
from locallearn.batch import Batch

_T = TypeVar("_T")


@dataclass
class Findings:
    """What was found of a rule.

    Attributes:
        algorithm: it.
        parties: units, and blocks that no unit holds.
        border: the observed run.
        since: first batch in which a change of one party is seen in another, by both names.
        depends: later parties that change what becomes of a party, by party; not those that do so through another.
        crossings: pairs of blocks (earlier, later): an error crosses a border without autograd's edge.
        exact: pairs of blocks (earlier, later): the steps of the first are the gradient of the output's loss all the same.
        transported: weights whose step changes with the network's matrices though no activation does.
        uncarried: weights whose step does not change whatever feedback weights are zero.
        backward: whether the backward pass of a unit of several blocks was looked at.
        infinite: unit whose gradient is not finite, and when.
        limits: what could not be seen of this rule.
    """

    algorithm: Algorithm
    parties: dict[str, Party]
    border: Border
    since: dict[tuple[str, str], int] = field(default_factory=dict)
    depends: dict[str, list[str]] = field(default_factory=dict)
    crossings: list[tuple[str, str]] = field(default_factory=list)
    exact: list[tuple[str, str]] = field(default_factory=list)
    transported: set[str] = field(default_factory=set)
    uncarried: set[str] = field(default_factory=set)
    backward: bool = False
    infinite: tuple[str, int] | None = None
    limits: list[str] = field(default_factory=list)

    @property
    def reaches(self) -> bool:
        """Whether a graph or a gradient crosses from one unit into another."""
        return any(self.border.reaches.values())

    def directly(self, party: Party) -> list[str]:
        """Later parties whose change arrives sooner than through another one that is later than this party, too."""
        when = {
            later.name: self.since[later.name, party.name]
            for later in self.parties.values()
            if later.rank > party.rank and (later.name, party.name) in self.since
        }
        direct: list[str] = []
        for name in sorted(when, key=lambda name: when[name]):
            ways = [max(self.since[name, other], when[other]) for other in direct if (name, other) in self.since]
            if not any(when[name] > way for way in ways):
                direct.append(name)
        return [name for name in self.parties if name in direct]

    @property
    def spanning(self) -> list[str]:
        """Units of several blocks."""
        return [name for name, party in self.parties.items() if len(party.blocks) > 1]

    @property
    def groups(self) -> int:
        """Number of groups of blocks that no unit joins."""
        group = {i: {i} for party in self.parties.values() for i in party.blocks}
        for party in self.parties.values():
            for a, b in pairwise(party.blocks):
                joined = group[a] | group[b]
                group.update(dict.fromkeys(joined, joined))
        return len({id(members) for members in group.values()})


@dataclass
class _Walk(Observer):
    """A training that is looked at before some of its steps, until there is an answer."""

    driver: Driver
    batches: Sequence[Batch]
    look: Callable[[Effects], Any]
    steps: set[int]
    whole: bool
    answer: Any = None

    def look_at(self, twin: Algorithm, number: int) -> None:
        if not self.answer and number < len(self.batches) and (not self.steps or number in self.steps):
            self.answer = self.look(Effects(twin, self.driver, self.batches[number], self.whole, seed=number))

    def finished(self, twin: Algorithm, number: int) -> None:
        self.look_at(twin, number + 1)


class Examination:
    """One audit.

    Args:
        algorithm: the rule.
        given: its batches.
        batches: steps after the warm-up.
        warmup: steps before.
        optimizers: makes optimizers; ``None``: SGD.
        context: entered whenever the rule runs.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        given: Sequence[Batch],
        batches: int,
        warmup: int,
        optimizers: Optimizers | None,
        context: Context,
    ) -> None:
        self._algorithm = algorithm
        self._batches = Batches(given, warmup + batches)
        self._warmup = warmup
        self._optimizers = optimizers
        self._driver = Driver(Randomness(algorithm), optimizers or partial(sgd, alike=False), context)

    def run(self) -> Findings:
        """Do all of it.

        Raises:
            Unfollowable: the rule does something that cannot be looked into.
        """
        self._check_label_path()
        found = self._observed()
        found.depends = {name: [] for name in found.parties}
        if found.reaches:
            return found
        trained = self._trajectories(found)
        try:
            state = duplicate(trained)
        except Unfollowable:  # it keeps a graph between batches, perhaps
            state = self._algorithm
        effects = Effects(state, self._driver, self._batches.first)
        self._label_path(effects)
        self._backward(found, effects)
        return found

    def _observed(self) -> Findings:
        """The watched run, with smaller steps where it diverges."""
        smaller: list[Optimizers] = [partial(sgd, lr=rate) for rate in (1e-3, 1e-5)]
        while True:
            border = observe(duplicate(self._algorithm), self._algorithm, self._driver.run, self._batches)
            if (not border.infinite and not border.broken) or not smaller or any(border.reaches.values()):
                break
            self._driver.optimizers = smaller.pop(0)
        if border.touched:
            raise Unfollowable(
                f"its copy used {', '.join(sorted(border.touched)[:3])} of the original: a global variable, a class or "
                "something else that a copy shares with it leads back there"
            )
        if border.deeds:
            raise Unfollowable(f"it {', '.join(sorted(border.deeds))}, which cannot be followed")
        if border.written:
            raise Unfollowable(f"it writes into {border.written} of its label path, which only an optimizer may")
        found = Findings(self._algorithm, parties(self._algorithm), border)
        if border.infinite:
            found.infinite = next(iter(border.infinite.items()))
        elif border.broken:
            found.infinite = (min(border.broken), len(self._batches))
        if border.foreign:
            found.limits.append(f"what happens inside of these operators: {', '.join(sorted(border.foreign))}")
        return found

    def _trajectories(self, found: Findings) -> Algorithm:
        """Runs with one later party changed; returns a copy that has trained."""
        border = found.border
        plain, trained = self._follow()
        if plain.course != border.course:
            again, _ = self._follow()
            if again.course != plain.course:
                raise Unfollowable(
                    "two runs with the same random numbers differ: it reads something that cannot be put back (a clock, a "
                    "file, a global variable), or the device does not give the same sums twice"
                )
            raise Unfollowable("it does something else while it is watched")
        hold = plain.labels
        first = min(party.rank for party in found.parties.values()) if found.parties else 0
        for later in found.parties.values():
            if later.rank == first or not later.tensors:
                continue
            other = self._kicked(found, later, hold)
            for name in found.parties:
                course = zip(plain.course[name], other.course[name], strict=True)
                when = next((i for i, (a, b) in enumerate(course) if a != b), None)
                if when is not None:
                    found.since[later.name, name] = when
        found.depends = {name: found.directly(party) for name, party in found.parties.items()}
        return trained

    def _kicked(self, found: Findings, later: Party, hold: list[list[torch.Tensor]]) -> Trajectory:
        """A run with this party changed; whole numbers among its buffers are left where other ones cannot be run with."""
        whole = any(not t.is_floating_point() for t in later.tensors)
        try:
            return self._follow(hold, later.name)[0]
        except (RuntimeError, IndexError, ValueError):
            if not whole:
                raise
        found.limits.append(f"what hangs on the whole numbers among the buffers of {later.name!r}")
        return self._follow(hold, later.name, integers=False)[0]

    def _through_averages(self, found: Findings) -> bool:
        """Whether blocks answer to the next one only, and to nothing of later ones once the rule's averages are held still."""
        names = list(stages(self._algorithm))
        if not self._algorithm.averages or any(names.index(b) - names.index(a) != 1 for a, b in found.crossings):
            return False
        plain, _ = self._follow(still=True)
        for later in found.parties.values():
            if later.tensors:
                other, _ = self._follow(hold=plain.labels, kick=later.name, still=True)
                if any(
                    plain.course[name] != other.course[name]
                    for name, party in found.parties.items()
                    if party.rank < later.rank
                ):
                    return False
        return True

    def _follow(
        self,
        hold: list[list[torch.Tensor]] | None = None,
        kick: str | None = None,
        integers: bool = True,
        still: bool = False,
    ) -> tuple[Trajectory, Algorithm]:
        return follow(
            self._algorithm,
            self._driver,
            self._batches,
            Trajectory(hold, kick, self._warmup - 1 if self._warmup else -1, integers, still),
        )

    # -- one batch ---------------------------------------------------------------------------------------------------
    def _backward(self, found: Findings, effects: Effects) -> None:
        """How errors travel, where they do."""
        ran, many = found.border.engine_ran, len(self._algorithm.blocks) > 1
        claim = self._algorithm.locality
        if ran:
            lost = effects.overwritten()
            if lost:
                raise Unfollowable(
                    f"it overwrites {min(lost)} with what it keeps elsewhere, so what later blocks hold cannot be changed"
                )
        if effects.strangers():
            raise Unfollowable("none of its steps changes with the network's weights, so they are found elsewhere")
        if found.spanning and found.groups == 1 and ran:
            found.backward = True
            found.transported = effects.transports()
            if not found.transported and claim is Locality.FEEDBACK:
                if effects.mirrored:
                    found.limits.append(
                        "whether feedback weights learned from noise take another way in some of the steps"
                    )
                else:
                    found.transported = self._along_the_way(lambda at: at.transports(), set(), whole=True)
                found.uncarried = effects.uncarried()
                if not effects.mirrored:
                    found.exact = effects.exact(lambda one, other: True)
        elif many and (not ran or any(found.depends.values())):
            apart = self._apart(found, everywhere=not ran)
            found.crossings = effects.crossings(apart)
            if not found.crossings and claim is not Locality.GLOBAL:
                found.crossings = self._along_the_way(lambda at: at.crossings(apart), found.border.kinds())
                found.exact = self._along_the_way(lambda at: at.exact(apart), found.border.kinds())
            if found.crossings and self._through_averages(found):
                found.crossings = []
        else:
            return
        if not effects.pinned:
            found.limits.append(
                "which operators belong to the forward pass: none changes with the inputs and not with the targets"
            )

    def _along_the_way(self, look: Callable[[Effects], _T], steps: set[int], whole: bool = False) -> _T:
        """The first answer that is not empty, from step to step of a training; the last one is asked twice in a row.

        Args:
            look: what is asked of one batch.
            steps: which ones; empty: all.
            whole: of all samples, instead of a few.
        """
        walk = _Walk(self._driver, list(self._batches), look, steps, whole)
        twin = duplicate(self._algorithm)
        walk.look_at(twin, 0)
        self._driver.run(twin, walk.batches, walk)
        if not walk.answer:
            walk.answer = look(Effects(twin, self._driver, walk.batches[-1], whole=whole, times=2))
        return cast(_T, walk.answer)

    def _apart(self, found: Findings, everywhere: bool) -> Callable[[str, str], bool]:
        names = list(stages(self._algorithm))
        holders = {
            name: {party.name for party in found.parties.values() if self._holds(party, names.index(name))}
            for name in names
        }
        return lambda one, other: (everywhere and other != "readout") or not holders[one] & holders[other]

    def _holds(self, party: Party, index: int) -> bool:
        own = {id(p) for p in party.tensors}
        return any(id(p) in own for p in list(stages(self._algorithm).values())[index].parameters())

    # -- what runs from the labels -------------------------------------------------------------------------------------
    def _check_label_path(self) -> None:
        network = {id(t) for s in stages(self._algorithm).values() for t in (*s.parameters(), *s.buffers())}
        for module in self._algorithm.label_path:
            if any(id(t) in network for t in (*module.parameters(), *module.buffers())):
                raise Unfollowable("its label path holds weights of the network itself, so it sees more than labels")

    def _label_path(self, effects: Effects) -> None:
        if self._algorithm.label_path:
            seen = effects.label_path_sees()
            if seen:
                raise Unfollowable(
                    f"its label path does not run from the labels alone: what it computes changes with {seen}"
                )
