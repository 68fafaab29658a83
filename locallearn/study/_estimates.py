"""How far estimated gradients are from the true one, against the number of directions, beside what theory says."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm, TaskInfo, selected
from locallearn.batch import Batch
from locallearn.nets.trace import preserved


@dataclass(frozen=True)
class Estimates:
    """Estimates of one gradient along so many directions each.

    Attributes:
        name: of the contender.
        count: K, directions of an estimate.
        size: P, entries of the gradient.
        errors: ‖ĝ − g‖² / ‖g‖² of every estimate.
        cosines: of the angle between ĝ and g, of every estimate.
        theory: expected error; ``None`` where there is none.
    """

    name: str
    count: int
    size: int
    errors: list[float]
    cosines: list[float]
    theory: float | None

    @property
    def error(self) -> float:
        """Mean over the estimates."""
        return statistics.fmean(self.errors)

    @property
    def standard_error(self) -> float | None:
        """Of the mean; ``None`` for a single estimate."""
        return statistics.stdev(self.errors) / len(self.errors) ** 0.5 if len(self.errors) > 1 else None

    def to_dict(self) -> dict[str, object]:
        """For the record."""
        return {
            "name": self.name,
            "count": self.count,
            "size": self.size,
            "draws": len(self.errors),
            "error": self.error,
            "standard_error": self.standard_error,
            "theory": self.theory,
            "cosine": statistics.fmean(self.cosines),
        }


def measure_estimates(
    name: str, algorithm: Algorithm, task: TaskInfo, batch: Batch, count: int, draws: int
) -> Estimates:
    """Compare an attached rule's updates on one batch with the gradient by autograd; weights and buffers stay as they are.

    Args:
        name: of the contender.
        algorithm: attached, in training mode.
        task: what it was attached for.
        batch: on the network's device.
        count: K, directions of an estimate.
        draws: estimates.

    Raises:
        ValueError: the gradient is zero, so that there is nothing to compare with.
    """
    true = _true(algorithm, task, batch)
    norm = sum(float(gradient.double().square().sum()) for gradient in true.values())
    if not norm > 0:
        raise ValueError(
            f"{name}: the loss's gradient is zero on the first batch, so no estimate can be compared with it"
        )
    errors, cosines = [], []
    for _ in range(draws):
        missed, along, length = 0.0, 0.0, 0.0
        for parameter, gradient in _estimated(algorithm, batch).items():
            known, found = true[parameter].double(), gradient.double()
            missed += float((found - known).square().sum())
            along += float((found * known).sum())
            length += float(found.square().sum())
        errors.append(missed / norm)
        cosines.append(along / (length * norm) ** 0.5 if length > 0 else 0.0)
    size = sum(gradient.numel() for gradient in true.values())
    return Estimates(name, count, size, errors, cosines, algorithm.expected_error(size))


def _true(algorithm: Algorithm, task: TaskInfo, batch: Batch) -> dict[nn.Parameter, Tensor]:
    learned = [p for p in algorithm.blocks.parameters() if p.requires_grad]
    with preserved(algorithm.blocks), torch.enable_grad():
        torch.manual_seed(0)  # dropout masks as in every estimate
        loss = task.loss(*selected(batch, algorithm.blocks(batch.inputs, *batch.context)))
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    return {p: torch.zeros_like(p) if g is None else g for p, g in zip(learned, gradients, strict=True)}


def _estimated(algorithm: Algorithm, batch: Batch) -> dict[nn.Parameter, Tensor]:
    made: dict[nn.Parameter, Tensor] = {}
    with preserved(algorithm.blocks):
        torch.manual_seed(0)
        for update in algorithm.updates(batch):
            made |= update.gradients or {}
    return made
