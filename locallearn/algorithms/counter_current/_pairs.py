"""What the feedback network is sent, and what pairs are compared by: of tasks with classes, and of tasks with images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from locallearn.functional import counter_current as ccl
from locallearn.losses.counter_current import CounterCurrentLoss
from locallearn.nets.feedforward import initialise

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Of an activation and its signal."""


class Pairs(ABC):
    """The losses of a batch, and the start of the feedback network's weights."""

    @abstractmethod
    def sent(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """What the labels send into the feedback network."""

    @abstractmethod
    def losses(self, targets: Tensor, keep: Tensor | None) -> tuple[PairLoss, PairLoss]:
        """Of a hidden pair, and of the input with ``b_0``; ``keep``: which samples are learned from, ``None``: all."""

    def output(self, output: Tensor, loss: Tensor) -> Tensor:
        """What the readout learns from, given the task's loss."""
        return loss

    def initialise(self, feedback: nn.ModuleList) -> None:
        """PyTorch's own range, biases zero."""
        initialise(feedback, "kaiming_uniform")


class ClassPairs(Pairs):
    """One row per class, whatever the batch.

    Args:
        loss: of a pair.
        classes: K.
        identity: compare with the signals of the batch's samples instead.
    """

    def __init__(self, loss: CounterCurrentLoss, classes: int, identity: bool) -> None:
        self._loss, self._classes, self._identity = loss, classes, identity

    def sent(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Every class."""
        return torch.eye(self._classes, device=targets.device, dtype=dtype)

    def losses(self, targets: Tensor, keep: Tensor | None) -> tuple[PairLoss, PairLoss]:
        """Both the same."""
        if self._identity:
            matches = torch.eye(len(targets), device=targets.device)
        else:
            matches = ccl.class_matches(targets, self._classes)

        def loss(output: Tensor, signal: Tensor) -> Tensor:
            kept = output if keep is None else ccl.drop_rows(output, keep)
            value: Tensor = self._loss(kept, signal[targets] if self._identity else signal, matches)
            return value

        return loss, loss


class MapPairs(Pairs):
    """Maps against maps, of an autoencoder.

    Args:
        factor: of all losses.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def sent(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """The target images."""
        return targets.to(dtype)

    def losses(self, targets: Tensor, keep: Tensor | None) -> tuple[PairLoss, PairLoss]:
        """Without their mean, too, where they are hidden."""
        return (
            lambda output, signal: ccl.centred_map_loss(output, signal, self._factor),
            lambda inputs, signal: ccl.map_loss(inputs, signal, self._factor),
        )

    def output(self, output: Tensor, loss: Tensor) -> Tensor:
        """With the height, as the pairs have it."""
        return self._factor * output.shape[2] * loss

    def initialise(self, feedback: nn.ModuleList) -> None:
        """As in the code: orthogonal, quiet where maps grow, zero at the image; biases in PyTorch's own range."""
        initialise(feedback, "orthogonal")
        with torch.no_grad():
            for i, layer in enumerate(feedback):
                convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
                grows = any(isinstance(module, nn.Upsample) for module in layer.modules())
                for module in convolutions:
                    if module.bias is not None:
                        bound = module.weight[0].numel() ** -0.5
                        nn.init.uniform_(module.bias, -bound, bound)
                    if grows:
                        module.weight.mul_(1e-3 if i > 0 else 0.0)
