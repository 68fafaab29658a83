"""What the tests of zeroth order do with a rule: optimizers for its units, the steps of one batch, its weights in a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, Update


def sgd(rule: Algorithm, lr: float = 0.1, **settings: Any) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for every unit."""
    return {unit: torch.optim.SGD(groups, lr=lr, **settings) for unit, groups in rule.units().items()}


def take(updates: Iterable[Update], optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Every step of one batch."""
    for update in updates:
        update.backward()
        optimizers[update.unit].step()
        optimizers[update.unit].zero_grad()


def flat(module: nn.Module) -> Tensor:
    """All weights in one row, float64."""
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])
