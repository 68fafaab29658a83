"""MAN and MAN++: local heads that see the block's output through a unit shaped, and averaged, like the next block's first."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.heads import BlockHeads, Head, takes_parts
from locallearn.algorithms.local_heads import LocalHeads
from locallearn.batch import Batch
from locallearn.nets.blocks import fitted
from locallearn.nets.border import main
from locallearn.nets.inplace import InputGuard, try_out
from locallearn.nets.layout import ChannelAxes
from locallearn.nets.units import first_unit


class MAN(LocalHeads):
    """MAN++ (arXiv 2507.16279), and MAN (Su et al., arXiv 2407.05623) without the learned scalar.

    Between block i and its head stand two units of the shape of block i+1's first one: B_i, which learns with the block, and
    E_i, whose weights are a moving average of that unit's. (In vision transformers B_i is a chain of two of them, and the head
    reads the class token: ``trained_units=2, head="token"``.) The head reads s·B_i(h_i) + (2 - s)·E_i(h_i), s is learned. No
    gradient crosses the border, but weights do: this is not layer-local, and says so.

    With ``averaged=False`` the head reads B_i(h_i) alone: the control that tells what the average does from what the added
    unit does; it is layer-local.

    Args:
        momentum: m of the average, E <- m·E + (1 - m)·θ. 1 leaves E at its start.
        averaged: whether there is an E_i.
        scale: whether s is learned (MAN++); else it stays 1 (MAN).
        trained_units: units in B_i, one behind the other; more than one where a unit gives what it can read.
        unit: name of the submodule of every block after the first that the units are shaped like; ``None``: the first
            residual unit, or the first layer with the activation and normalisation that follow.
        head: see :class:`~locallearn.algorithms.heads.HeadParts`; ``man`` is that of MAN++.
        seed: of units and heads.
        parts: the other fields of ``HeadParts``.
    """

    _owner: ClassVar[str] = "MAN"

    @takes_parts
    def __init__(
        self,
        momentum: float = 0.995,
        averaged: bool = True,
        scale: bool = True,
        trained_units: int = 1,
        unit: str | None = None,
        head: Head = "man",
        seed: int = 0,
        **parts: Any,
    ) -> None:
        super().__init__(seed, head=head, **parts)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, expected a number within 0 and 1")
        if trained_units < 1:
            raise ValueError(f"trained_units is {trained_units}, expected a number of units of at least 1")
        self.momentum = momentum
        self.averaged = averaged
        self.scale = scale
        self.trained_units = trained_units
        self.unit = unit

    @property
    def locality(self) -> Locality:
        """Parameter-coupled, for the averages carry the next block's weights; without them layer-local."""
        return Locality.COUPLED if self.averaged and self.momentum < 1 else Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """Labels, and weights on their way down."""
        average = "; to every block an average of the next one's first weights"
        return super().broadcast + (average if self.averaged and self.momentum < 1 else "")

    @property
    def variant(self) -> str | None:
        """With or without averaged weights."""
        return "averaged" if self.averaged else "trained unit alone"

    @property
    def averages(self) -> Sequence[nn.Module]:
        """The averaged units, one per border."""
        return list(self.average)

    def build(self, task: TaskInfo) -> None:
        """Give every border its units, and their output a head."""
        feature_sizes(self.blocks, task.example)  # says what cannot be run
        borders = range(len(self.blocks) - 1)
        self.trained = nn.ModuleList(self._chain(i) for i in borders)
        shapes = self._shapes(task.example)
        self.heads = BlockHeads(self.blocks, task, self._owner, self.parts, shapes)
        first = self.trained if self.trained_units == 1 else [next(chain.children()) for chain in self.trained]
        self.average = nn.ModuleList(_redrawn(copy.deepcopy(unit)) for unit in first if self.averaged)
        self.average.requires_grad_(False)
        learned = self.averaged and self.scale
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in borders if learned)

    def _source(self, index: int) -> nn.Module:
        """The unit of the next block that the units at border ``index`` are shaped like."""
        name, block = self.blocks.names[index + 1], self.blocks[index + 1]
        if self.unit is None:
            return first_unit(block)
        try:
            return block.get_submodule(self.unit)
        except AttributeError:
            has = ", ".join(child for child, _ in block.named_children()) or "no submodules"
            raise ValueError(f"unit is {self.unit!r}, and block {name!r} has no such submodule; it has {has}") from None

    def _chain(self, index: int) -> nn.Module:
        """B of one border."""
        units = [self._fresh(index) for _ in range(self.trained_units)]
        return units[0] if len(units) == 1 else nn.Sequential(*units)

    def _fresh(self, index: int) -> nn.Module:
        """A unit of that shape with weights of its own."""
        unit = copy.deepcopy(self._source(index)).requires_grad_(True)
        for module in unit.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        InputGuard(f"unit at the border after {self.blocks.names[index]}").watch(unit)
        return _redrawn(unit)

    def _shapes(self, example: Batch) -> list[tuple[int, ...]]:
        """Of one sample of what the heads read."""
        shapes = []
        x = fitted(self.blocks, example.inputs)
        self.trained.eval()
        with torch.no_grad(), ChannelAxes() as axes:
            for i, output in enumerate(self.blocks.features(x, *example.context)):
                if i < len(self.trained):
                    try:
                        shapes.append(axes.shape(main(self.trained[i](output, *example.context))))
                    except Exception as error:
                        carrier = self.blocks.carrier(example.inputs, example.context)
                        if carrier is not None and self.unit is None:
                            raise ValueError(
                                f"MAN's units read one tensor, and block {carrier!r} hands over more than one: cut the network "
                                "where only one tensor crosses, or name a unit by algorithm.unit"
                            ) from error
                        raise ValueError(
                            f"what block {self.blocks.names[i]!r} gives does not fit the first unit of block "
                            f"{self.blocks.names[i + 1]!r} ({type(self._source(i)).__name__}: {error}): name another one by "
                            "algorithm.unit"
                        ) from error
                    # Its guard must know it before training: a copy made in the first step alone would round otherwise.
                    try_out({"unit": self.trained[i]}, output, example.context)
                else:
                    shapes.append(axes.shape(output))
        self.trained.train()
        return shapes

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Block, head, trained unit and scalar learn together."""
        (group,) = super().block_groups(index)
        if index < len(self.trained):
            group["params"] += self.trained[index].parameters()
            group["params"] += self.scales[index : index + 1]
        return [group]

    def updates(self, batch: Batch) -> Iterator[Update]:
        """As every local rule; the average at a border moves after its block's step, before the next block's."""
        names = self.blocks.names
        for update in super().updates(batch):
            yield update
            index = names.index(update.unit)
            if index < len(self.average):
                self._move(index)

    @torch.no_grad()
    def _move(self, index: int) -> None:
        pairs = zip(self.average[index].parameters(), self._source(index).parameters(), strict=True)
        for average, weight in pairs:
            average.mul_(self.momentum).add_(weight, alpha=1 - self.momentum)

    def read(self, index: int, output: Tensor, *context: Any) -> Tensor:
        """s·B(h) + (2 - s)·E(h), or B(h) alone."""
        if index >= len(self.trained):
            return output
        trained: Tensor = main(self.trained[index](output, *context))
        if not self.averaged:
            return trained
        average: Tensor = main(self.average[index](output, *context))
        if not self.scale:
            return trained + average
        scale: Tensor = self.scales[index]
        return scale * trained + (2 - scale) * average

    def _held(self) -> Container[int]:
        """The averages have no gradient, and are not at rest for that."""
        return {id(p) for p in self.average.parameters()}


def _redrawn(unit: nn.Module) -> nn.Module:
    """The unit with weights drawn anew, as far as its layers know how."""
    for module in unit.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return unit
