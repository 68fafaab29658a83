"""Runs of a copy of a rule, driven as the training loop drives it, with the same random numbers every time."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.algorithms.base import Algorithm, Update
from locallearn.audit._copies import duplicate
from locallearn.batch import Batch

Optimizers = Callable[[Algorithm], dict[str, Optimizer]]
Context = Callable[[], AbstractContextManager[Any]]

_EPOCH = 3
"""Batches after which an epoch ends in an audit."""


# -- random numbers -------------------------------------------------------------------------------------------------------
class Randomness:
    """All random numbers that a rule could draw: PyTorch's, NumPy's, Python's, and generators that its modules keep.

    Args:
        algorithm: whose classes' modules are searched for generators of their own.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        kinds = {kind for module in algorithm.modules() for kind in type(module).__mro__}
        spaces: list[Any] = [vars(kind) for kind in kinds]
        spaces += [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds} if name in sys.modules]
        own = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
        held = {id(v): v for space in spaces for v in list(space.values()) if isinstance(v, own)}
        self._own = [(generator, _state(generator)) for generator in held.values()]

    @contextmanager
    def repeated(self, seed: int = 0) -> Iterator[None]:
        """The same numbers in every such block, and outside of it all generators as they were before."""
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        numpy, python = np.random.get_state(), random.getstate()
        now = [_state(generator) for generator, _ in self._own]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            for generator, state in self._own:
                _set_state(generator, state)
            try:
                yield
            finally:
                np.random.set_state(numpy)
                random.setstate(python)
                for (generator, _), state in zip(self._own, now, strict=True):
                    _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


# -- batches --------------------------------------------------------------------------------------------------------------
class Batches:
    """So many steps' batches, made anew from copies for every run, so that nobody else's data are changed.

    Of every five steps two hand out the same object twice, one an old batch as a new object, and two new ones: other
    rows in another order, moved a little. A graph comes as it is, in turn as the same object and as a new one.

    Args:
        given: what the user gave.
        count: steps.
    """

    def __init__(self, given: Sequence[Batch], count: int) -> None:
        self._given = [_cloned(batch) for batch in given]
        self._count = count
        self.first = self._given[0]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        last: Batch | None = None
        for number in range(self._count):
            turn, given = number % 5, self._given[(number // 5) % len(self._given)]
            if last is not None and turn in (1, 4):
                yield last
                continue
            varied = turn in (2, 3) and not given.context and given.rows is None
            last = _varied(given, number) if varied else _cloned(given)
            yield last


def part(value: Any, rows: Tensor) -> Any:
    """These rows of a tensor; anything else as it is."""
    return value[rows.to(value.device)] if isinstance(value, Tensor) else value


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """These samples of a batch without a context."""
    inputs, targets, index, source = (part(t, rows) for t in (batch.inputs, batch.targets, batch.index, batch.source))
    return Batch(inputs, targets, batch.context, batch.rows, index, source)


def moved(inputs: Tensor, seed: int, size: float = 0.1) -> Tensor:
    """Inputs moved at random by a share of their deviation; those that are no floats in another order."""
    generator = torch.Generator().manual_seed(seed)
    if not inputs.is_floating_point():
        mixed: Tensor = part(inputs, torch.randperm(len(inputs), generator=generator))
        return mixed
    noise = torch.randn(inputs.shape, generator=generator).to(inputs.device, inputs.dtype)
    spread = inputs.detach().float().std() if inputs.numel() > 1 else torch.ones(())
    return inputs + noise * (size * spread).to(inputs.device, inputs.dtype)


def _cloned(batch: Batch) -> Batch:
    def copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    parts: list[Any] = [tuple(map(copy, v)) if isinstance(v, tuple) else copy(v) for v in batch]
    return Batch(*parts)


def _varied(batch: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(batch.inputs), generator=generator)
    some = (
        torch.rand(len(rows), generator=generator) < 0.2
    )  # here and there a sample comes twice and another is left out
    rows[some] = torch.randint(len(rows), (len(rows),), generator=generator)[some]
    chosen = rows_of(batch, rows)
    return chosen._replace(inputs=moved(chosen.inputs, seed))


# -- who holds what -------------------------------------------------------------------------------------------------------
@dataclass
class Party:
    """A unit, or a block that no unit holds, with what belongs to it.

    Attributes:
        name: of the unit or the block.
        rank: place in the forward pass; what is in no block comes after all of them.
        blocks: indices of the blocks that it holds weights of.
        weights: what its optimizer steps.
        tensors: these, and weights and buffers of its blocks, without what runs from the labels alone.
        is_unit: whether an optimizer steps it.
    """

    name: str
    rank: int
    blocks: tuple[int, ...]
    weights: list[Tensor]
    tensors: list[Tensor]
    is_unit: bool = True


def stages(algorithm: Algorithm) -> dict[str, nn.Module]:
    """The network's blocks and its readout, by name."""
    named: dict[str, nn.Module] = dict(zip(algorithm.blocks.names, algorithm.blocks, strict=True))
    return named if algorithm.blocks.readout is None else {**named, "readout": algorithm.blocks.readout}


def parties(algorithm: Algorithm) -> dict[str, Party]:
    """Units in their order, then blocks that no unit holds."""
    spared = {id(t) for module in algorithm.label_path for t in (*module.parameters(), *module.buffers())}
    held = stages(algorithm)
    depth, taken = len(algorithm.blocks), set()
    result: dict[str, Party] = {}
    for place, (unit, groups) in enumerate(algorithm.units().items()):
        weights: list[Tensor] = [p for group in groups for p in group["params"]]
        own = {id(p) for p in weights}
        inside = [i for i, stage in enumerate(held.values()) if any(id(p) in own for p in stage.parameters())]
        taken.update(inside)
        result[unit] = Party(unit, min(inside, default=depth + 1 + place), tuple(inside), weights, list(weights))
    for index, (name, stage) in enumerate(held.items()):
        holders = [party for party in result.values() if index in party.blocks]
        if index not in taken and (any(True for _ in stage.parameters()) or any(True for _ in stage.buffers())):
            name = name if name not in result else f"{name} of the network"
            holders = [Party(name, index, (index,), [], [], is_unit=False)]
            result[name] = holders[0]
        for party in holders:
            party.tensors += [*stage.parameters(), *stage.buffers()]
    for party in result.values():
        party.blocks = tuple(i for i in party.blocks if i < depth)
        party.tensors = [t for t in {id(t): t for t in party.tensors}.values() if id(t) not in spared]
    return result


def perturb(tensors: Iterable[Tensor], seed: int = 1, size: float = 0.3, integers: bool = False) -> None:
    """Change every tensor of floats by that share of its size; what is nowhere negative stays so, but for weights.

    ``integers``: change whole numbers, too.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if not tensor.is_floating_point():
            if integers and not tensor.is_complex():
                _exchange(tensor, generator)
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        with torch.no_grad():
            if not isinstance(tensor, nn.Parameter) and bool((tensor >= 0).all()):  # a variance, perhaps
                tensor.mul_((size * noise).exp()).add_(noise.abs(), alpha=0.0 if bool(tensor.any()) else 0.1)
                continue
            rms = float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else 0.0
            # A matrix of zeros gets the size of a drawn one: what depends on it must be loud enough to be heard.
            drawn = tensor[0].numel() ** -0.5 if tensor.ndim > 1 and tensor.numel() else 0.3
            tensor.add_(noise, alpha=size * (rms if rms > 0 else drawn))


def _exchange(tensor: Tensor, generator: torch.Generator) -> None:
    """Give every whole number the value of another one of its row, so that indices stay valid; a constant becomes one more.

    What is sorted may be offsets of rows (a sparse matrix's), which in another order would lead out of memory: it stays.
    """
    values = tensor.detach().cpu()
    if values.numel() and bool((values == values.flatten()[0]).all()):
        if values.dtype is not torch.bool:
            tensor.add_(1)
    elif values.ndim and not torch.equal(values.flatten().sort(stable=True).values, values.flatten()):
        others = torch.randint(values.shape[-1], values.shape, generator=generator)
        chosen = values.gather(-1, others)
        tensor.copy_(values.roll(1, -1) if torch.equal(chosen, values) else chosen)


# -- runs -----------------------------------------------------------------------------------------------------------------
class Observer:
    """Is told where a run stands. Does nothing."""

    def asked(self, twin: Algorithm) -> AbstractContextManager[Any] | None:
        """Before the generator goes on; what it returns is entered while it runs."""

    def got(self, twin: Algorithm, update: Update | None) -> None:
        """The generator has yielded this, or has come to its end."""

    def differentiated(self, twin: Algorithm, unit: str) -> None:
        """Gradients are there, the unit has not been stepped yet."""

    def failed(self, unit: str, error: RuntimeError) -> bool:
        """The backward pass has failed; true: go on without this step."""
        return False

    def finished(self, twin: Algorithm, number: int) -> None:
        """The batch is over."""


@dataclass
class Driver:
    """The training loop: a unit is differentiated, stepped and its gradients set to zero, then the generator goes on.

    Args:
        randomness: what is repeated in every run.
        optimizers: makes the optimizers of a copy.
        context: entered while the generator runs, as a strategy enters its precision.
    """

    randomness: Randomness
    optimizers: Optimizers
    context: Context

    def run(self, twin: Algorithm, batches: Iterable[Batch], observer: Observer, seed: int = 0) -> None:
        """Train a copy on these batches."""
        with self.randomness.repeated(seed):
            optimizers = self.optimizers(twin)
            twin.train()
            for number, batch in enumerate(batches):
                updates = _epoch(twin, batch, ends=number % _EPOCH == _EPOCH - 1)
                while True:
                    update = self._ask(twin, updates, observer)
                    observer.got(twin, update)
                    if update is None:
                        break
                    if update.unit not in optimizers:
                        raise ValueError(
                            f"updates() yields unit {update.unit!r}, and units() has only {', '.join(optimizers)}"
                        )
                    self._step(twin, update, optimizers[update.unit], observer)
                    del update
                observer.finished(twin, number)

    def _ask(self, twin: Algorithm, updates: Iterator[Update], observer: Observer) -> Update | None:
        with self.context():
            entered = observer.asked(twin)
            if entered is None:
                return next(updates, None)
            with entered:
                return next(updates, None)

    def _step(self, twin: Algorithm, update: Update, optimizer: Optimizer, observer: Observer) -> None:
        skipped = False

        def closure() -> Any:
            nonlocal skipped
            try:
                update.backward()
            except RuntimeError as error:
                if not observer.failed(update.unit, error):
                    raise
                skipped = True
            observer.differentiated(twin, update.unit)
            if skipped:
                raise _Skipped
            return update.loss

        with suppress(_Skipped):
            optimizer.step(closure)
        optimizer.zero_grad()


def _epoch(twin: Algorithm, batch: Batch, ends: bool) -> Iterator[Update]:
    """The updates of one batch, and what is due at an epoch's end behind them, under the same instruments."""
    yield from twin.updates(batch)
    if ends:
        twin.end_epoch()


class _Skipped(Exception):
    """A step that cannot be made."""


def bits(tensors: Iterable[Tensor]) -> bytes:
    """A digest of exact values: NaN equals NaN, and the two zeros are one."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        value = tensor.detach()
        value = (value + 0) if value.is_floating_point() or value.is_complex() else value
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        if value.is_meta:  # shapes only: differentiation in forward mode works some of them out beforehand
            continue
        value = value if value.layout is torch.strided else value.to_dense()
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


@dataclass
class Trajectory(Observer):
    """What becomes of every party, batch by batch, as digests: gradients at every step, then all that it holds.

    Args:
        hold: states of the label path after every batch, to be held to; ``None``: they are noted.
        kick: a party to be changed before the first batch and, once more, after batch ``again``.
        integers: whether its whole numbers are changed, too.
        still: note and hold the rule's averages, too.

    Attributes:
        course: digests by party, one per batch.
        labels: states of the label path after every batch.
        infinite: first batch and unit whose gradient is not finite, by unit.
        broken: parties that hold a weight which is not finite at the end.
    """

    hold: list[list[Tensor]] | None = None
    kick: str | None = None
    again: int = -1
    integers: bool = True
    still: bool = False
    course: dict[str, list[bytes]] = field(default_factory=dict)
    labels: list[list[Tensor]] = field(default_factory=list)
    infinite: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    _steps: dict[str, list[bytes]] = field(default_factory=dict)
    _parties: dict[str, Party] = field(default_factory=dict)
    _number: int = 0

    def begin(self, twin: Algorithm) -> None:
        """Before the first batch."""
        self._parties = parties(twin)
        self.course = {name: [] for name in self._parties}
        # What depends on a matrix of zeros would be hidden until it has learned.
        held = (t for party in self._parties.values() for t in party.tensors if isinstance(t, nn.Parameter))
        perturb((t for t in held if t.ndim > 1 and not bool(t.any())), size=1.0)
        if self.kick is not None:
            perturb(self._parties[self.kick].tensors, size=1.0, integers=self.integers)

    def differentiated(self, twin: Algorithm, unit: str) -> None:
        """Note the gradients of this unit."""
        party = self._parties[unit]
        gradients = [p.grad for p in party.weights if p.grad is not None]
        present = bytes(p.grad is not None for p in party.weights)
        self._steps.setdefault(unit, []).append(present + bits(gradients))
        if unit not in self.infinite and not all(bool(g.isfinite().all()) for g in gradients):
            self.infinite[unit] = self._number

    def finished(self, twin: Algorithm, number: int) -> None:
        """Note what every party holds, and bring the label path to where it has to be."""
        for name, party in self._parties.items():
            self.course[name].append(b"".join([*self._steps.get(name, []), bits(party.tensors)]))
        self._steps, self._number = {}, number + 1
        averages = twin.averages if self.still else ()
        path = [p for module in (*twin.label_path, *averages) for p in module.parameters()]
        if self.hold is None:
            self.labels.append([t.detach().clone() for t in path])
        else:
            with torch.no_grad():
                for tensor, value in zip(path, self.hold[number], strict=True):
                    tensor.copy_(value)
        if self.kick is not None and number == self.again:
            perturb(self._parties[self.kick].tensors, seed=2, integers=self.integers)

    def end(self) -> None:
        """After the last batch."""
        self.broken = {
            name
            for name, party in self._parties.items()
            if not all(bool(t.isfinite().all()) for t in party.tensors if t.is_floating_point())
        }


def follow(
    algorithm: Algorithm, driver: Driver, batches: Batches, observer: Trajectory
) -> tuple[Trajectory, Algorithm]:
    """Train a fresh copy and note what becomes of it."""
    twin = duplicate(algorithm)
    observer.begin(twin)
    driver.run(twin, batches, observer)
    observer.end()
    return observer, twin
