"""Deep supervision: backpropagation with the local rules' heads, the control of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update
from locallearn.algorithms.heads import BlockHeads, HeadParts, takes_parts
from locallearn.batch import Batch


class DeepSupervision(Algorithm):
    """Backpropagation of the sum of all local losses: the heads of a local rule, with nothing detached.

    The control that tells what the heads do from what locality does (Lee et al., Deeply-Supervised Nets, 2015).

    Args:
        seed: of the heads; under the same seed they are the very tensors that Mono-Forward, or a rule of local heads with the
            same parts, starts from.
        parts: the fields of :class:`~locallearn.algorithms.heads.HeadParts`; default: Mono-Forward's linear heads.
    """

    @takes_parts
    def __init__(self, seed: int = 0, **parts: Any) -> None:
        super().__init__(seed)
        self.parts = HeadParts(**parts)

    @property
    def locality(self) -> Locality:
        """Global."""
        return Locality.GLOBAL

    @property
    def variant(self) -> str | None:
        """Head and loss, where they are not Mono-Forward's, and what stands beside them."""
        return self.parts.variant

    @property
    def carries(self) -> bool:
        """Whatever crosses the borders."""
        return True

    @property
    def broadcast(self) -> str:
        """Labels, and the error through every layer."""
        return "labels, and the error through every transposed weight"

    def build(self, task: TaskInfo) -> None:
        """Give every block its head."""
        self.heads = BlockHeads(self.blocks, task, "deep supervision", self.parts)

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: the network with its heads."""
        return {
            "network": [
                {"params": [p for i in range(len(self.blocks)) for p in self.heads.groups(self.blocks, i)[0]["params"]]}
            ]
        }

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The sum of the blocks' losses."""
        self.heads.observe(batch.inputs)

        def losses() -> Iterator[Tensor]:
            with ExitStack() as stack:
                moved = [stack.enter_context(self.heads.watching(self.blocks, i)) for i in range(len(self.blocks))]
                for i, output in enumerate(self.blocks.features(batch.inputs, *batch.context)):
                    yield self.heads.loss(self.blocks, i, output, batch, moved[i])

        def loss() -> Tensor:
            first, *others = losses()
            return sum(others, start=first)

        yield Update("network", loss(), again=loss)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Scores of the last block's head: the network's forward pass, where the network has a readout."""
        *_, last = self.blocks.features(inputs, *context)
        return self.heads.scores(self.blocks, len(self.blocks) - 1, last, Batch(inputs, inputs, context))
