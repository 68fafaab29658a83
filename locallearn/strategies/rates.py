"""Learning rate schedules that papers in this field use and PyTorch does not have."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
