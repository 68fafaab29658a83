"""Losses of every block's own: directions, numbers and steps block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import ParamGroup, TaskInfo, Update, selected
from locallearn.algorithms.heads import BlockHeads, HeadParts
from locallearn.algorithms.zeroth_order._rule import ZerothOrder
from locallearn.algorithms.zeroth_order._way import Way
from locallearn.batch import Batch


class LocalZerothOrder(ZerothOrder):
    """Zeroth order with a loss for every block: nothing but labels and what a block puts out crosses a border.

    Every block but the last one has a linear head, and the last one the network's readout. A block and its head are moved
    together, their loss is looked at, and one number per direction belongs to them alone. So the noise of an estimate follows
    the weights of one block and its head, not those of the network, and a block runs 2n + 1 times per batch: once more to hand
    on what it puts out at θ, which is also the pass that moves statistics of normalisation.

    Heads learn as blocks do, from numbers alone, so that a step can be made again without data. They are drawn from the seed.

    Raises:
        ValueError: when attached, beside what the class above refuses: a task without classes, blocks that hand over more than
            one tensor, maps that are not to be averaged down to ``head_limit``.
    """

    @property
    def carries(self) -> bool:
        """Plain chains of blocks only: heads read one tensor."""
        return False

    @property
    def estimates_along(self) -> str | None:
        """Not of the task's loss."""
        return None

    @property
    def broadcast(self) -> str:
        """Labels; numbers stay with their block."""
        return "labels"

    @property
    def numbers(self) -> int:
        """One per direction and block."""
        return self.n * len(self.blocks)

    def build(self, task: TaskInfo) -> None:
        """Give every block but the last one its head."""
        self.heads = BlockHeads(
            self.blocks, task, "zeroth_order with losses=local", HeadParts(head_limit=self.head_limit)
        )
        super().build(task)
        self._squares = [0.0] * len(self.blocks)

    def _learned(self) -> dict[str, nn.Parameter]:
        """Weights that learn, heads among them, by name."""
        return {name: p for name, p in self._named().items() if p.requires_grad}

    def _named(self) -> dict[str, nn.Parameter]:
        return {**super()._named(), **{f"heads.{name}": p for name, p in self.heads.named_parameters()}}

    def units(self) -> dict[str, list[ParamGroup]]:
        """One for every block with its head."""
        return {name: self._groups(self._own(i)) for i, name in enumerate(self.blocks.names)}

    def _own(self, index: int) -> list[nn.Parameter]:
        own: list[nn.Parameter] = self.heads.groups(self.blocks, index)[0]["params"]
        return own

    def _ways(self) -> Iterator[Way]:
        """Of every block, in order."""
        learned = self._learned()
        for i in range(len(self.blocks)):
            own = {id(p) for p in self._own(i)}
            yield self._way({name: p for name, p in learned.items() if id(p) in own})

    # -- learning --------------------------------------------------------------------------------------------------------
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Block after block; what a block hands on is from before its step."""
        made: list[Tensor] = []
        for i, way, seen in self._looked(batch, range(self.n)):
            c = self._numbers(seen)
            made.append(c)
            yield from self._steps(self.blocks.names[i], way, self._normalised(c, i), self._mean(seen))
        self._made(torch.cat(made))

    def _looked(self, batch: Batch, directions: Sequence[int]) -> Iterator[tuple[int, Way, Tensor]]:
        """Losses of every block, one row per direction; its weights may be left at the last of them."""
        x = batch.inputs
        for i, way in enumerate(self._ways()):
            with torch.no_grad():
                way.begin(self.batches_seen)
                output = self.blocks[i](x, *batch.context)
                with self._probing():
                    seen = self._seen_each(way, partial(self._lost_at, i, x, batch), x.device, directions)
            yield i, way, seen
            x = output

    def _lost_at(self, index: int, x: Tensor, batch: Batch) -> Tensor:
        torch.clear_autocast_cache()  # as in the class above
        output = self.blocks[index](x, *batch.context)
        return self._loss_of(*selected(batch, self.heads.scores(self.blocks, index, output, batch)))

    def losses(self, batch: Batch, directions: Sequence[int] | None = None) -> Tensor:
        """As in the class above, of every block: ``(len(directions), J, ...)``."""
        found = []
        for _, way, seen in self._looked(batch, range(self.n) if directions is None else directions):
            with torch.no_grad():
                way.home()
            found.append(seen)
        return torch.stack(found, 1)

    def learn(self, losses: Tensor) -> Iterator[Update]:
        """As in the class above, from losses of every block, ``(n, J, ...)``."""
        wanted = (self.n, len(self.blocks), self._columns)
        if losses.shape != wanted:
            raise ValueError(
                f"a step has losses of {self.n} directions and {len(self.blocks)} blocks, {wanted}, and these have shape "
                f"{tuple(losses.shape)}"
            )
        c = torch.cat([self._numbers(seen) for seen in losses.unbind(1)])
        yield from self._follow(c, [self._mean(seen) for seen in losses.unbind(1)])

    def follow(self, c: Tensor, loss: Tensor | None = None) -> Iterator[Update]:
        """As in the class above: numbers of the first block's directions, then of the second's, and so on."""
        self._check_numbers(c)
        yield from self._follow(c, [loss] * len(self.blocks))

    def _follow(self, c: Tensor, losses: Sequence[Tensor | None]) -> Iterator[Update]:
        parts = zip(self.blocks.names, self._ways(), c.reshape(-1, self.n), losses, strict=True)
        for i, (name, way, own, loss) in enumerate(parts):
            with torch.no_grad():
                way.begin(self.batches_seen)
            yield from self._steps(name, way, self._normalised(own, i), loss)
        self._made(c)

    def _passes_together(self, way: Any, batch: Batch) -> bool:
        """One after another: what is moved ends in a head."""
        return False
