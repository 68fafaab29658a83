"""The frame that all layer-local rules share: a rule fills in three methods and gets every schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from locallearn.algorithms.base import Algorithm, ParamGroup, Update
from locallearn.algorithms.dry_run import refuse_single
from locallearn.batch import Batch
from locallearn.nets.border import Border, main, replaced


class LayerLocal(Algorithm):
    """A rule in which every block learns from its own detached input, its own output and what is broadcast.

    A rule says how a batch enters (:meth:`prepare`), what one block's loss is (:meth:`local_loss`) and what the next
    block sees (:meth:`emit`). The order of learning, the joint and the sequential schedule and the cache of frozen
    activations are written here, once. So is what happens where blocks hand over several tensors
    (:class:`~locallearn.nets.border.Border`): a rule gets the main one, the others are detached and carried along.
    """

    _cache: FrozenActivations | None = None

    @property
    def carries(self) -> bool:
        """Rules that leave the way of a batch through the blocks to this frame."""
        return all(getattr(type(self), name) is getattr(LayerLocal, name) for name in _WAY)

    @property
    def deterministic(self) -> bool:
        """Whether :meth:`prepare` and :meth:`emit` are functions of the batch alone, so that a cache is exact."""
        return True

    def prepare(self, batch: Batch) -> Batch:
        """What enters the first block, and what the losses compare with. Default: the batch as it is."""
        return batch

    @abstractmethod
    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Loss of block ``index`` from its own output; ``batch`` is what :meth:`prepare` returned."""

    def run(self, index: int, inputs: Any, batch: Batch) -> Any:
        """Run block ``index`` on what :meth:`hand_over` gave; ``batch`` is what :meth:`prepare` returned.

        Default: one plain pass with the context. The output is a tensor, or a :class:`~locallearn.nets.border.Border`.
        """
        try:
            return self.blocks[index](inputs, *batch.context)
        except ValueError as error:
            refuse_single(error, self.blocks.names[index])
            raise

    def emit(self, index: int, output: Tensor) -> Tensor:
        """What the next block sees of this block's output. Must be detached."""
        return output.detach()

    def hand_over(self, index: int, output: Any) -> Any:
        """What the next block is given: what :meth:`emit` makes of the main tensor, and what is carried along, detached."""
        return replaced(output, self.emit(index, main(output)))

    def pass_on(self, index: int, inputs: Any, batch: Batch) -> tuple[Any, Batch]:
        """What of a batch the blocks after ``index`` learn from: ``inputs`` of the next one, and the batch. Default: all."""
        return inputs, batch

    @abstractmethod
    def block_groups(self, index: int) -> list[ParamGroup]:
        """Parameter groups of block ``index`` with what the rule added to it."""

    def extra_units(self) -> dict[str, list[ParamGroup]]:
        """Units beside the blocks, trained after them from :meth:`extra_updates`. Default: none."""
        return {}

    def extra_updates(self, batch: Batch, prepared: Batch) -> Iterator[Update]:
        """Updates of the extra units that train now."""
        return iter(())

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit per block, then the extra units."""
        return {**{name: self.block_groups(i) for i, name in enumerate(self.blocks.names)}, **self.extra_units()}

    @property
    def stages(self) -> list[list[str]]:
        """One unit after the other."""
        return [[name] for name in self.units()]

    @property
    def depth(self) -> int:
        """Number of blocks that inference may use: all, or those up to the one that trains now."""
        if self.active is None:
            return len(self.blocks)
        trained = [i for i, name in enumerate(self.blocks.names) if name in self.active]
        return trained[-1] + 1 if trained else len(self.blocks)

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Run the blocks in order; yield the loss of each one that trains, then hand its output on, detached."""
        prepared = self.prepare(batch)
        names = self.blocks.names
        first = next((i for i, name in enumerate(names) if self.trains(name)), len(names))
        x = self._frozen_prefix(first, batch, prepared)
        for i in range(first, self.depth):
            if self.trains(names[i]):
                output = self.run(i, x, prepared)
                yield Update(
                    names[i], self.local_loss(i, main(output), prepared), again=partial(self._again, i, x, prepared)
                )
            else:
                with torch.no_grad():
                    output = self.run(i, x, prepared)
            if i + 1 < self.depth:  # what no block reads need not be made
                x, prepared = self.pass_on(i, self.hand_over(i, output), prepared)
            del output  # the block's graph ends here
        yield from self.extra_updates(batch, prepared)

    def _again(self, index: int, inputs: Any, batch: Batch) -> Tensor:
        return self.local_loss(index, main(self.run(index, inputs, batch)), batch)

    def _frozen_prefix(self, first: int, batch: Batch, prepared: Batch) -> Any:
        """Input of the first block that trains, from the cache where it can be had."""
        if first == 0 or first == len(self.blocks):
            return prepared.inputs
        cache = self._cache
        if cache is None:
            return self._run_frozen(prepared.inputs, 0, first, prepared)
        if batch.index is None:
            raise ValueError(
                "schedule.cache looks frozen activations up by Batch.index, and these batches carry none (an augmented "
                "sample is a new one every time): set schedule.cache=false"
            )
        known = cache.get(first, batch.index)
        if known is None:
            start, x = cache.nearest(first, batch.index, prepared.inputs)
            known = self._run_frozen(x, start, first, prepared)
            if isinstance(known, Border):
                raise ValueError(
                    f"block {self.blocks.names[first - 1]!r} hands over {len(known.carried) + 1} tensors, and the cache keeps "
                    "one for every sample: set schedule.cache=false"
                )
            cache.put(first, batch.index, known)
        return known

    def _run_frozen(self, x: Any, start: int, stop: int, prepared: Batch) -> Any:
        with torch.no_grad():
            for i in range(start, stop):
                x = self.hand_over(i, self.run(i, x, prepared))
        return x

    def train_only(self, units: frozenset[str] | None) -> None:
        """Train these units only; the other blocks are put into eval mode, so that normalisation and dropout rest."""
        super().train_only(units)
        self.train(self.training)

    def _asleep(self) -> Container[str]:
        """The blocks that do not train now."""
        return {f"blocks.members.{name}" for name in self.blocks.names if not self.trains(name)}

    def cache_frozen(self, keep: bool) -> None:
        """Keep the outputs of frozen blocks for every training sample seen, or forget them.

        Raises:
            ValueError: the rule draws random numbers on the way, so kept activations would not be the right ones.
        """
        if keep and not self.deterministic:
            raise ValueError(
                f"{type(self).__name__} draws anew for every batch (negatives, noise), so frozen activations cannot be cached: "
                "set schedule.cache=false"
            )
        self._cache = FrozenActivations() if keep else None


_WAY = ("run", "updates", "hand_over", "pass_on", "activations")
"""What a rule must not have of its own where blocks hand over several tensors, unless it says that it knows them."""


class FrozenActivations:
    """Inputs of the block that trains, by position in the training set. Holds the last two borders only."""

    def __init__(self) -> None:
        self._stores: dict[int, Tensor] = {}
        self._filled: dict[int, Tensor] = {}

    def get(self, border: int, index: Tensor) -> Tensor | None:
        """Activations that enter block ``border``, or ``None`` if one of these samples has not been seen yet."""
        if border not in self._stores:
            return None
        filled = self._filled[border]
        if int(index.max()) >= len(filled) or not bool(filled[index].all()):
            return None
        return self._stores[border][index]

    def nearest(self, border: int, index: Tensor, inputs: Tensor) -> tuple[int, Tensor]:
        """The nearest border below that holds these samples, with their activations; else the network's input."""
        for below in sorted((b for b in self._stores if b < border), reverse=True):
            known = self.get(below, index)
            if known is not None:
                return below, known
        return 0, inputs

    def put(self, border: int, index: Tensor, values: Tensor) -> None:
        """Keep the activations that enter block ``border``."""
        needed = int(index.max()) + 1
        if border not in self._stores:
            for old in sorted(self._stores)[:-1]:
                del self._stores[old], self._filled[old]
            self._stores[border] = values.new_empty((0, *values.shape[1:]))
            self._filled[border] = torch.zeros(0, dtype=torch.bool, device=values.device)
        if needed > len(self._stores[border]):
            more = max(needed, 2 * len(self._stores[border])) - len(self._stores[border])
            store, filled = self._stores[border], self._filled[border]
            self._stores[border] = torch.cat((store, store.new_empty((more, *store.shape[1:]))))
            self._filled[border] = torch.cat((filled, filled.new_zeros(more)))
        self._stores[border][index] = values
        self._filled[border][index] = True
