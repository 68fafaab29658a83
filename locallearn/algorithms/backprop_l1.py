"""Backpropagation that is charged for activity: the control that tells sparsity from Forward-Forward."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from locallearn.algorithms.backprop import Backprop
from locallearn.algorithms.base import TaskInfo, Update, output_layer, selected
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.batch import Batch
from locallearn.functional import emergent


class BackpropL1(Backprop):
    """Backpropagation of the task's loss plus penalty · sum of the l1 norms of the blocks' outputs, a mean over samples.

    The "regularised backpropagation" of Tosato et al. (arXiv 2305.18353): sparse by an explicit wish. The paper's code
    leaves open whether its sum is a mean over samples; here it is, so that the penalty does not follow the batch size.

    Args:
        penalty: lambda, at least 0; with 0 this is backpropagation.
        seed: of the rule's own draws; there are none.
    """

    def __init__(self, penalty: float = 1e-4, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not (penalty >= 0 and math.isfinite(penalty)):
            raise ValueError(f"penalty is {penalty}, expected a finite number of at least 0")
        self.penalty = penalty

    def build(self, task: TaskInfo) -> None:
        """Add nothing. What is charged is what comes before the output layer, so there has to be one."""
        output_layer(self.blocks, "backprop_l1")
        super().build(task)
        feature_sizes(self.blocks, task.example)  # the price is that of a sample's activity

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The task's loss with the price of activity."""

        def loss() -> Tensor:
            outputs = list(self.blocks.features(batch.inputs, *batch.context))
            assert self.blocks.readout is not None
            scores = self.blocks.readout(outputs[-1], *batch.context)
            return self._loss(*selected(batch, scores)) + self.penalty * emergent.penalised_activity(outputs)

        yield Update("network", loss(), again=loss)
