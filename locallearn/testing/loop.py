"""The plain PyTorch loop that every other way of running an algorithm must agree with, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from locallearn.algorithms.base import Algorithm, ParamGroup
from locallearn.batch import Batch


def plain_loop(
    algorithm: Algorithm,
    batches: Iterable[Batch],
    make_optimizer: Callable[[list[ParamGroup]], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip: float | None = None,
    states: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Optimizer]:
    """Train on these batches, one after the other, with nothing of Lightning around.

    Args:
        algorithm: attached to a network.
        batches: what to train on, in this order.
        make_optimizer: makes one optimizer from a unit's parameter groups.
        scheduler: makes a learning rate scheduler from an optimizer; advanced after every batch.
        clip: largest norm of a unit's gradient; ``None``: gradients are taken as they are.
        states: ``state_dict()`` of every unit's optimizer, to go on from.

    Returns:
        The optimizers by unit.
    """
    optimizers = {unit: make_optimizer(groups) for unit, groups in algorithm.units().items()}
    for unit, state in (states or {}).items():
        optimizers[unit].load_state_dict(state)
    schedulers = [scheduler(optimizer) for optimizer in optimizers.values()] if scheduler is not None else []
    algorithm.train()
    for batch in batches:
        for update in algorithm.updates(batch):
            update.backward()
            optimizer = optimizers[update.unit]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
            optimizer.step()
            optimizer.zero_grad()
        for advance in schedulers:
            advance.step()
    return optimizers
