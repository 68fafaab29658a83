"""Learning rate schedules that papers in this field use and PyTorch does not have."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR
from typing_extensions import override


def constant_then_linear(optimizer: Optimizer, epochs: int) -> LambdaLR:
    """Keep the rate for the first half of training, then let it fall linearly to nearly zero.

    The factor in epoch e (counted from 1) is min(1, (1 + 2(E - e)) / E), as in the Matlab code of the Forward-Forward
    paper.

    Args:
        optimizer: whose rate is set; advance the schedule after every epoch.
        epochs: E, length of the training.

    Raises:
        ValueError: ``epochs`` is less than 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1")
    return LambdaLR(optimizer, lambda done: max(0.0, min(1.0, (1 + 2 * (epochs - done - 1)) / epochs)))


def multistep_with_first_decay(
    optimizer: Optimizer, milestones: Sequence[int], gamma: float, factor: float, epochs: int = 1
) -> LRScheduler:
    """Multiply the rate by ``gamma`` at every milestone, and the weight decay by ``factor`` after the first epochs.

    A large weight decay at first makes the learned matrices of product feedback alignment forget their random start. The
    decay in use is part of the optimizer's state, and is changed in one step only, so that resuming is exact.

    Args:
        optimizer: whose rate and weight decay are set; advance the schedule after every epoch.
        milestones: numbers of epochs after which the rate falls.
        gamma: what the rate is multiplied by.
        factor: what the weight decay is multiplied by, once.
        epochs: length of the first phase.

    Raises:
        ValueError: ``epochs`` is less than 1, or ``factor`` is negative.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1")
    if factor < 0:
        raise ValueError(f"factor is {factor}, expected 0 or more: a weight decay has no sign to change")
    return _MultiStepWithFirstDecay(optimizer, milestones, gamma, factor, epochs)


class _MultiStepWithFirstDecay(MultiStepLR):
    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[int], gamma: float, factor: float, epochs: int
    ) -> None:
        self.factor = factor
        self.epochs = epochs
        super().__init__(optimizer, list(milestones), gamma)

    @override
    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch == self.epochs:
            for group in self.optimizer.param_groups:
                group["weight_decay"] *= self.factor
