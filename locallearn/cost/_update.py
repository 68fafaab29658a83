"""What one update costs when it has settled, what is done once beside it, and what is kept alive meanwhile."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from locallearn.algorithms._selection import rows_of
from locallearn.algorithms.base import Algorithm, Update
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.cost._bytes import Alive, activation_bytes, bytes_of, cache_bytes, storages
from locallearn.cost._flops import counting

_PATIENCE = 8
"""Further steps over which the mean is taken where two steps on the same batch do not cost the same."""

_SHORT = 100
"""Entries of a list beyond which it is data, in which nobody keeps a generator."""


@dataclass(frozen=True)
class StageCost:
    """What the units cost that train together.

    A step on ``n`` rows that have come before takes ``step_flops + n * row_flops``; a row is one sample, on a graph a node.
    That is exact for the batch that was measured; where the work does not grow evenly (every pair of samples is compared,
    or a part of so many goes on), other sizes can be measured, too.

    Attributes:
        units: that train in this stage.
        row_flops: operations for every row of a batch.
        step_flops: operations of a step whatever the number of its rows: products of weights with weights, say.
        once_flops: operations done once in the stage, however many samples there are: a graph's aggregate, first
            estimates, a closed form that is solved when the epoch ends. Zero where nothing is kept.
        fill_flops: operations done once for every row of the training set: frozen activations that are kept.
        rows: of the batch that was measured.
        activation_peak_bytes: peak bytes kept alive for gradients, for the whole batch.
        gradient_bytes: peak bytes of gradients of parameters, held at once.
        cache_bytes: what the rule keeps from one step to the next beside weights and buffers, after these batches, and by how
            much its buffers have grown meanwhile (the sums of a closed form).
        steady: whether a step on the same batch always takes the same work; else the figures are means over some steps.
        sizes: operations of a settled step by the number of its rows, where others were measured, too.
    """

    units: tuple[str, ...]
    row_flops: float
    step_flops: float
    once_flops: float
    fill_flops: float
    rows: int
    activation_peak_bytes: int
    gradient_bytes: int
    cache_bytes: int
    steady: bool
    sizes: Mapping[int, float] = field(default_factory=dict)

    @property
    def update_flops(self) -> float:
        """Operations of a settled step per row of the batch that was measured."""
        return self.row_flops + self.step_flops / self.rows

    def once(self, rows: int) -> float:
        """Operations done once for a training set of so many rows."""
        return self.once_flops + rows * self.fill_flops

    def training(self, steps: int, rows: int, distinct: int, batches: Mapping[int, int] | None = None) -> float:
        """Operations of a whole stage.

        Args:
            steps: batches.
            rows: of all batches together.
            distinct: rows of the training set.
            batches: how many of these batches there were by the number of their rows, where sizes were measured.
        """
        if not steps:
            return 0.0
        uneven = sum(
            (batches or {}).get(size, 0) * (flops - self.step_flops - size * self.row_flops)
            for size, flops in self.sizes.items()
        )
        return steps * self.step_flops + rows * self.row_flops + uneven + self.once(distinct)


@dataclass(frozen=True)
class UpdateCost:
    """Cost of one whole update: forward passes, local backward passes, heads and feedback of every unit.

    Attributes:
        flops: floating point operations per row of the batch (a sample, on a graph a node) of a step that has settled, two
            per multiply-accumulate: matrix products, convolutions, attention and recurrent layers, as counted by
            :class:`~locallearn.cost.FlopCounter` (elementwise work is left out). Of several stages the sum: what it takes
            that every unit learns once from one row.
        activation_peak_bytes: peak bytes kept alive for gradients, for the whole batch: by graphs, or by a rule that hands
            over gradients of its own from one update to the next. Of several stages the largest.
        samples: rows of the batch.
        stages: one after the other.
        state_bytes: weights and buffers, what the rule added included.
        inference_flops: operations of one prediction per row, by the rule's own inference on an input that it has not seen
            before; ``None`` where this batch cannot be predicted.
        uncounted: operators of whose work nothing is known; where there are any, the operations are too few.
    """

    flops: float
    activation_peak_bytes: int
    samples: int
    stages: tuple[StageCost, ...] = ()
    state_bytes: int = 0
    inference_flops: float | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def gradient_bytes(self) -> int:
        """Peak bytes of gradients of parameters held at once, of the dearest stage: under a local rule one unit's."""
        return max((stage.gradient_bytes for stage in self.stages), default=0)

    @property
    def cache_bytes(self) -> int:
        """Bytes that caches hold after this batch, of the dearest stage."""
        return max((stage.cache_bytes for stage in self.stages), default=0)

    @property
    def once_flops(self) -> float:
        """Operations done once, in total and not per row, were the batch the whole training set."""
        return sum(stage.once(self.samples) for stage in self.stages)


def drive(
    algorithm: Algorithm,
    batch: Batch,
    look: Callable[[Update], None] = lambda update: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run all updates of one batch without stepping: the gradients are computed and dropped.

    Args:
        algorithm: attached.
        batch: one training batch.
        look: is shown every update as it is handed over, before it is differentiated.
        after: is called when an update has been differentiated, before its gradients are dropped.
    """
    for update in algorithm.updates(batch):
        look(update)
        update.backward()
        after()
        algorithm.zero_grad(set_to_none=True)


def measure_update(
    algorithm: Algorithm,
    batch: Batch,
    sequential: bool = False,
    *,
    other: Batch | None = None,
    recurs: bool = True,
    predicted: Batch | None = None,
    sizes: Iterable[int] = (),
) -> UpdateCost:
    """Measure an update on a copy of the algorithm; its weights and all random numbers stay as they are.

    The first step on a batch does what a rule or a schedule keeps from then on; the steps after it are what training
    consists of. Both are counted, stage by stage, and a step counts as settled once it takes the same work as the one
    before. Floating point data take the parameters' dtype.

    Args:
        algorithm: attached; its device must be that of the batch. What it has kept in attributes so far is kept by the
            copy, too (frozen activations are not): measure one that has not trained yet where a rule keeps results of its
            own.
        batch: one training batch.
        sequential: train one stage after another, and run the frozen blocks before each.
        other: another batch of the same epoch, so that what is kept of every sample can be told from what is kept once;
            ``None``: the batch is all there is.
        recurs: whether the next epoch brings these very tensors, as a whole graph does, or equal ones made anew.
        predicted: what to predict; ``None``: the batch.
        sizes: rows of smaller batches that training has, too; a graph has no parts.
    """
    twin = copy.deepcopy(algorithm)
    twin.zero_grad(set_to_none=True)
    twin.batches_seen = 0
    if isinstance(twin, LayerLocal) and twin._cache is not None:
        twin.cache_frozen(True)  # empty
    twin.train()
    names: set[str] = set()
    with undisturbed(batch.inputs.device):
        first, others = _fitted(batch, twin), None if other is None else _fitted(other, twin)
        units = [tuple(stage) for stage in twin.stages] if sequential else [tuple(twin.units())]
        stages = []
        for stage in units:
            twin.train_only(frozenset(stage) if sequential else None)
            stages.append(_measure_stage(twin, stage, first, others, recurs, names, sizes))
        twin.train_only(None)
        inference = _measure_inference(twin, first if predicted is None else _fitted(predicted, twin), names)
    return UpdateCost(
        sum(stage.update_flops for stage in stages),
        max(stage.activation_peak_bytes for stage in stages),
        len(batch.inputs),
        tuple(stages),
        bytes_of([*algorithm.parameters(), *algorithm.buffers()]),
        inference,
        tuple(sorted(names)),
    )


def _measure_stage(
    twin: Algorithm,
    units: tuple[str, ...],
    batch: Batch,
    other: Batch | None,
    recurs: bool,
    names: set[str],
    sizes: Iterable[int],
) -> StageCost:
    gradients = 0

    def weigh() -> None:
        nonlocal gradients
        gradients = max(gradients, bytes_of(p.grad for p in twin.parameters()))

    def flops(which: Batch, again: bool = False) -> float:
        with counting() as counter:
            drive(twin, _anew(which) if again and not recurs else which, after=weigh)
        names.update(counter.uncounted)
        return counter.total

    rows, period = len(batch.inputs), twin.period
    held = bytes_of([*twin.parameters(), *twin.buffers()])
    once = flops(batch)
    fill = 0.0
    if other is not None and period == 1:
        fill = flops(other)
    settled = [flops(batch, again=True) for _ in range(period)]
    once -= settled[-1]  # as far into the period as the first step
    if other is not None and period == 1:
        fill = max(0.0, fill - flops(other, again=True)) / len(other.inputs)
        once -= rows * fill
    steady = period > 1 or flops(batch, again=True) == settled[-1]
    if not steady:
        settled = [flops(batch, again=True) for _ in range(_PATIENCE)]
    step = sum(settled) / len(settled)
    fixed, measured = 0.0, dict[int, float]()
    if steady and period == 1:
        fixed = _fixed_flops(flops, batch, step)
        parts = {size: _flops_of_part(flops, batch, size) for size in sizes}
        measured = {size: found for size, found in parts.items() if found is not None}
    peak, kept = _peak(twin, batch), cache_bytes(twin, without=[batch, other])
    kept += max(0, bytes_of([*twin.parameters(), *twin.buffers()]) - held)  # sums that a closed form gathers
    with counting() as counter:
        twin.end_epoch()
    names.update(counter.uncounted)
    return StageCost(
        units=units,
        row_flops=(step - fixed) / rows,
        step_flops=fixed,
        once_flops=(once if steady and once > 0 else 0.0) + counter.total,
        fill_flops=fill if steady else 0.0,
        rows=rows,
        activation_peak_bytes=peak,
        gradient_bytes=gradients,
        cache_bytes=kept,
        steady=steady,
        sizes=measured,
    )


def _fixed_flops(flops: Callable[..., float], batch: Batch, step: float) -> float:
    """Work of a step that does not grow with its rows, from a step on half of them; zero for parts of a graph."""
    half = len(batch.inputs) // 2
    halved = _flops_of_part(flops, batch, half)
    if halved is None:
        return 0.0
    slope = (step - halved) / (len(batch.inputs) - half)
    fixed = step - slope * len(batch.inputs)
    return fixed if fixed > 0 and slope > 0 else 0.0


def _flops_of_part(flops: Callable[..., float], batch: Batch, rows: int) -> float | None:
    """Work of a step on the first rows of a batch; ``None`` where there is no such part, or no step can be made on it."""
    if not 0 < rows < len(batch.inputs) or batch.context or batch.rows is not None:
        return None
    part = _anew(rows_of(batch, slice(rows)))  # a slice would count the whole batch's storage
    try:
        return flops(part)
    except Exception:  # BatchNorm of a single row, say, or a block made for batches of one size
        return None


def _peak(twin: Algorithm, batch: Batch) -> int:
    """Peak bytes kept alive for gradients in one step."""
    handed_over = False

    with activation_bytes(twin) as count:

        def look(update: Update) -> None:
            nonlocal handed_over
            handed_over = handed_over or update.gradients is not None
            count.look()

        drive(twin, batch, look)
    if count.peak and not handed_over:
        return count.peak
    return max(count.peak, _held_between_updates(twin, batch))


def _held_between_updates(algorithm: Algorithm, batch: Batch) -> int:
    """Largest number of bytes that a rule without graphs holds when it hands over an update: the batch, and what it made.

    Weights, buffers and the gradients that are handed over do not count.
    """
    given = tree_leaves(tuple(batch))
    peak = 0
    with Alive(storages([*algorithm.parameters(), *algorithm.buffers(), *given])) as alive:

        def look(update: Update) -> None:
            nonlocal peak
            peak = max(peak, alive.bytes(without=(update.gradients or {}).values()))

        drive(algorithm, batch, look)
    return peak + bytes_of(given)


def _measure_inference(twin: Algorithm, batch: Batch, names: set[str]) -> float | None:
    twin.eval()
    batch = _anew(batch)
    try:
        with torch.no_grad(), counting() as counter:
            twin.predict(batch.inputs, *batch.context)
    except Exception:  # of a part of a graph, by a rule that knows the whole; whatever it is, it costs this figure only
        return None
    names.update(counter.uncounted)
    return counter.total / len(batch.inputs)


def _fitted(batch: Batch, algorithm: Algorithm) -> Batch:
    """The batch in the parameters' dtype, as tensors of its own: a slice would count the whole data set's storage."""
    dtype = next((p.dtype for p in algorithm.parameters() if p.is_floating_point()), None)

    def fitted(value: Any) -> Any:
        known = isinstance(value, Tensor) and value.is_floating_point() and dtype is not None
        return value.to(dtype) if known else value

    batch = Batch(*tree_map(fitted, tuple(batch)))
    return batch._replace(inputs=batch.inputs.clone())


def _anew(batch: Batch) -> Batch:
    """Equal tensors that nobody has seen before."""
    return Batch(*tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, tuple(batch)))


def optimizer_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes that optimizers hold beside weights and gradients, as they are now: moments, steps."""
    found = list(optimizers)
    weights = storages(p for optimizer in found for group in optimizer.param_groups for p in group["params"])
    kept = storages(tree_leaves([dict(state) for optimizer in found for state in optimizer.state.values()]))
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@contextmanager
def undisturbed(device: torch.device | None, *holders: Any) -> Iterator[None]:
    """The random numbers of PyTorch, NumPy and Python afterwards are those from before.

    Args:
        device: whose generator counts beside the CPU's; ``None``: those of all CUDA devices.
        holders: data modules, loaders and the like, whose own generators are put back, too.
    """
    python, numpy = random.getstate(), np.random.get_state()
    own = [(generator, _state_of(generator)) for generator in _generators(holders, 6, set())]
    cuda = range(torch.cuda.device_count()) if device is None else [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in own:
            _put_back(generator, state)


_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _generators(value: Any, depth: int, seen: set[int]) -> Iterator[_Generator]:
    """Generators in attributes and short containers."""
    if id(value) in seen or depth == 0 or isinstance(value, Tensor | np.ndarray | type | str | bytes):
        return
    seen.add(id(value))
    if isinstance(value, _Generator):
        yield value
        return
    inside: Iterable[Any] = ()
    if isinstance(value, dict | list | tuple):
        inside = () if len(value) > _SHORT else list(value.values() if isinstance(value, dict) else value)
    elif not isinstance(value, nn.Module):
        inside = list(getattr(value, "__dict__", {}).values())
    for part in inside:
        yield from _generators(part, depth - 1, seen)


def _state_of(generator: _Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state() if isinstance(generator, np.random.RandomState) else generator.getstate()


def _put_back(generator: _Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor of a batch."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(v) for v in value) if isinstance(value, tuple) else value

    return Batch(*(move(value) for value in batch))
