"""The control: backpropagation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, output_layer, selected
from locallearn.algorithms.layer_local import feature_sizes
from locallearn.batch import Batch


class Backprop(Algorithm):
    """Plain backpropagation of the task's loss through the whole network: the baseline of every comparison.

    Its weights are bit-equal to those of the same LightningModule under ``Trainer(strategy="auto")``; running it as an
    algorithm gives it the same instruments as the others.
    """

    @property
    def locality(self) -> Locality:
        """Global."""
        return Locality.GLOBAL

    @property
    def carries(self) -> bool:
        """Whatever crosses the borders."""
        return True

    @property
    def broadcast(self) -> str:
        """The error goes backward through every layer."""
        return "the error, through every transposed weight"

    def build(self, task: TaskInfo) -> None:
        """Add nothing."""
        output_layer(self.blocks, "backpropagation")
        feature_sizes(self.blocks, task.example)  # refuses a network that cannot take the data
        self._loss = task.loss

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: the network."""
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The task's loss on the network's output."""

        def loss() -> Tensor:
            return self._loss(*selected(batch, self.blocks(batch.inputs, *batch.context)))

        yield Update("network", loss(), again=loss)
