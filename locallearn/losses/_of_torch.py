"""What PyTorch's losses of classes were told: which label they leave out, and what their mean divides by."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def bare(loss: Any) -> Any:
    """A loss without the settings that ``functools.partial`` gives it."""
    while isinstance(loss, partial):
        loss = loss.func
    return loss


def left_out(loss: Any) -> int | None:
    """The label that a loss of PyTorch's leaves out (``ignore_index``); ``None``: there is none, or nobody knows."""
    if not reads_ids(loss):
        return None
    return int(_setting(loss, "ignore_index", -100))


def divisor(loss: Any, targets: Tensor) -> Tensor | None:
    """What the mean of a loss of PyTorch's divides by: the weights of the labels that it does not leave out.

    ``None``: it is no such mean, or nobody knows; then every sample counts as much.
    """
    if not reads_ids(loss) or _setting(loss, "reduction", "mean") != "mean" or targets.is_floating_point():
        return None
    counted = targets.ne(_setting(loss, "ignore_index", -100))
    weight: Tensor | None = _setting(loss, "weight", None)
    return counted.sum() if weight is None else (weight[targets.where(counted, 0)] * counted).sum()


def reads_ids(loss: Any) -> bool:
    """Whether a loss is PyTorch's cross entropy or negative log likelihood."""
    inner = bare(loss)
    return inner in (F.cross_entropy, F.nll_loss) or isinstance(inner, nn.CrossEntropyLoss | nn.NLLLoss)


def _setting(loss: Any, name: str, usual: Any) -> Any:
    while isinstance(loss, partial):
        if name in loss.keywords:
            return loss.keywords[name]
        loss = loss.func
    return getattr(loss, name, usual) if isinstance(loss, nn.Module) else usual
