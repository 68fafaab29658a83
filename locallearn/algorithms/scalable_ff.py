"""Scalable Forward-Forward: every block learns from the goodness of class maps that a small convolution makes of its output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, refuse_dense
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.functional import scalable_ff as sff
from locallearn.losses.scalable_ff import ScalableForwardForwardLoss, check
from locallearn.nets.blocks import fitted
from locallearn.nets.units import sample_shapes

Prediction = Literal["mean", "softmax", "last"]


class ScalableForwardForward(LayerLocal):
    """Scalable Forward-Forward (Krutsylo, arXiv 2501.03176), in blocks.

    Block k makes h_k of its input; a convolution A_k gives one map per class, and the mean square of a map is the class's
    goodness. The right class shall have the largest: no label in the input, no negative data, one pass. The next block sees
    h_k with mean 0 and variance 1 per sample.

    Deviations: margin, temperature, start of A_k and the axes of the normalisation are ours, because the paper's could not be
    read. The network's own readout is not used.

    Args:
        kernel_size: of A_k, odd.
        margin: by how much the right class must lead; 0: cross entropy of the goodness.
        temperature: divides goodness and margin.
        gain: scale of A_k's starting weights.
        prediction: ``"mean"``: of the goodness over all blocks; ``"softmax"``: of its softmax, given as logarithm; ``"last"``:
            the last block's alone.
        seed: of the convolutions A_k.
    """

    def __init__(
        self,
        kernel_size: int = 1,
        margin: float = 0.0,
        temperature: float = 1.0,
        gain: float = 1.0,
        prediction: Prediction = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction is {prediction!r}, expected one of {', '.join(get_args(Prediction))}")
        check(kernel_size, margin, temperature, gain)
        self.kernel_size = kernel_size
        self.margin = margin
        self.temperature = temperature
        self.gain = gain
        self.prediction = prediction

    @property
    def locality(self) -> Locality:
        """Layer-local: labels are broadcast, the error is not."""
        return Locality.LAYER_LOCAL

    def build(self, task: TaskInfo) -> None:
        """Give every block its convolution."""
        if not task.classes:
            raise ValueError("scalable Forward-Forward compares the goodness of classes, and this task has none")
        refuse_dense(task, "scalable Forward-Forward")
        feature_sizes(self.blocks, task.example)  # says what cannot be run
        inputs = fitted(self.blocks, task.example.inputs)
        shapes, _ = sample_shapes(self.blocks, inputs, task.example.context)
        for name, shape in zip(self.blocks.names, shapes, strict=True):
            if len(shape) != 3:
                raise ValueError(
                    f"scalable Forward-Forward makes class maps of maps (C, H, W), and block {name!r} gives a tensor of shape "
                    f"{tuple(shape)} per sample: use a convolutional network, or another algorithm"
                )
        self.local = nn.ModuleList(
            ScalableForwardForwardLoss(
                shape[0], task.outputs, self.kernel_size, self.margin, self.temperature, self.gain
            )
            for shape in shapes
        )

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Block and convolution learn together."""
        return [{"params": [*self.blocks[index].parameters(), *self.local[index].parameters()]}]

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The right class's goodness against all others'."""
        loss: Tensor = self.local[index](output, batch.targets)
        return loss

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output with mean 0 and variance 1 per sample, so that the next block sees no goodness, only the pattern."""
        return sff.normalise(output.detach())

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Goodness of every class, or the logarithm of its mean softmax, shape ``(N, C)``."""
        found = []
        for i, output in zip(range(self.depth), self.activations(inputs, *context), strict=False):
            if self.prediction != "last" or i == self.depth - 1:
                local = self.local[i]
                assert isinstance(local, ScalableForwardForwardLoss)
                found.append(local.goodness(output))
        scores = torch.stack(found)
        if self.prediction == "softmax":
            return (scores / self.temperature).log_softmax(2).logsumexp(0) - float(torch.tensor(len(found)).log())
        return scores.mean(0)

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Output of every block, before it is normalised for the next one."""
        batch = Batch(inputs, inputs, context)
        x = inputs
        for i in range(len(self.blocks)):
            output = self.run(i, x, batch)
            yield output
            x = self.emit(i, output)
