"""Mono-Forward: every block is trained by the cross entropy of its own linear projection."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo
from locallearn.algorithms.heads import BlockHeads
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch

Prediction = Literal["bp", "ff"]


class MonoForward(LayerLocal):
    """Mono-Forward (Gong, Li and Abdulla, arXiv 2501.09238).

    Block i has a projection M_i, shape ``(C, d_i)``, and learns with it from L_i = CE(softmax(a_i M_i^T), y), where a_i
    is the block's flattened output. No gradient leaves the block.

    Deviation: the network's own readout serves as the last block's projection M_L, so that backpropagation and
    Mono-Forward train the same network; a network without one gets an M_L like the others. There is no projection of
    the raw input.

    Args:
        prediction: ``"bp"``: argmax of the last block's goodness, the paper's recommendation; ``"ff"``: of the sum over
            all blocks.
        seed: of the projections.
    """

    def __init__(self, prediction: Prediction = "bp", seed: int = 0) -> None:
        super().__init__(seed)
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction is {prediction!r}, expected 'bp' (last block) or 'ff' (sum over blocks)")
        self.prediction = prediction

    @property
    def locality(self) -> Locality:
        """Layer-local: labels are broadcast, the error is not."""
        return Locality.LAYER_LOCAL

    def build(self, task: TaskInfo) -> None:
        """Give every block its projection."""
        self.heads = BlockHeads(self.blocks, task, "Mono-Forward")

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Block and projection learn together."""
        return self.heads.groups(self.blocks, index)

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the block's goodness G_i = a_i M_i^T."""
        return self.heads.loss(self.blocks, index, output, batch)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Goodness of the last trained block, or the sum over blocks, shape ``(N, C)``."""
        batch = Batch(inputs, inputs, context)
        total: Tensor | None = None
        for i, output in zip(range(self.depth), self.activations(inputs, *context), strict=False):
            if self.prediction == "ff" or i == self.depth - 1:
                scores = self.heads.scores(self.blocks, i, output, batch)
                total = scores if total is None else total + scores
        assert total is not None
        return total
