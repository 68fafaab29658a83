"""Class heads on every block: the parts that Mono-Forward and deep supervision have in common."""

from __future__ import annotations

from torch import Tensor, nn

from locallearn.algorithms.base import ParamGroup, TaskInfo, selected
from locallearn.algorithms.layer_local import feature_sizes
from locallearn.batch import Batch
from locallearn.losses.mono_forward import MonoForwardLoss
from locallearn.nets.blocks import Blocks


class BlockHeads(nn.Module):
    """A bias-free linear map from every block's flattened output to the classes; the network's readout is the last.

    Args:
        blocks: the network. Its readout, where it has one, serves as the head of the last block.
        task: gives the shapes and the number of classes.
        owner: who asks, for the error message.

    Raises:
        ValueError: targets are not class ids.
    """

    def __init__(self, blocks: Blocks, task: TaskInfo, owner: str) -> None:
        super().__init__()
        if not task.classes:
            raise ValueError(f"{owner} compares every block with class labels, and this task has none")
        sizes = feature_sizes(blocks, task.example)
        built = sizes if blocks.readout is None else sizes[:-1]
        self.projections = nn.ModuleList(MonoForwardLoss(size, task.outputs) for size in built)
        self._loss = task.loss

    def groups(self, blocks: Blocks, index: int) -> list[ParamGroup]:
        """Parameters of block ``index`` and of its head."""
        head = self.projections[index] if index < len(self.projections) else blocks.readout
        assert head is not None
        return [{"params": [*blocks[index].parameters(), *head.parameters()]}]

    def scores(self, blocks: Blocks, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Class scores ``(N, C)`` from the output of block ``index``."""
        if index < len(self.projections):
            projection = self.projections[index]
            assert isinstance(projection, MonoForwardLoss)
            return projection.goodness(output)
        assert blocks.readout is not None
        scores: Tensor = blocks.readout(output, *batch.context)
        return scores

    def loss(self, blocks: Blocks, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The task's loss on these scores, over the rows that carry targets."""
        return self._loss(*selected(batch, self.scores(blocks, index, output, batch)))
