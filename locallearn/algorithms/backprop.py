"""The controls: backpropagation, and backpropagation with deep supervision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, output_layer, selected
from locallearn.algorithms.heads import BlockHeads
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


class DeepSupervision(Algorithm):
    """Backpropagation of the sum of all local losses: Mono-Forward's heads, with nothing detached.

    The control that tells what the heads do from what locality does (Lee et al., Deeply-Supervised Nets, 2015).

    Args:
        seed: of the heads; under the same seed they are the very tensors that Mono-Forward starts from.
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
        """Labels, and the error through every layer."""
        return "labels, and the error through every transposed weight"

    def build(self, task: TaskInfo) -> None:
        """Give every block its head."""
        self.heads = BlockHeads(self.blocks, task, "deep supervision")

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: the network with its heads."""
        return {
            "network": [
                {"params": [p for i in range(len(self.blocks)) for p in self.heads.groups(self.blocks, i)[0]["params"]]}
            ]
        }

    def updates(self, batch: Batch) -> Iterator[Update]:
        """The sum of the blocks' losses."""

        def loss() -> Tensor:
            outputs = enumerate(self.blocks.features(batch.inputs, *batch.context))
            first, *others = (self.heads.loss(self.blocks, i, output, batch) for i, output in outputs)
            return sum(others, start=first)

        yield Update("network", loss(), again=loss)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Scores of the last block's head: the network's forward pass, where the network has a readout."""
        *_, last = self.blocks.features(inputs, *context)
        return self.heads.scores(self.blocks, len(self.blocks) - 1, last, Batch(inputs, inputs, context))
