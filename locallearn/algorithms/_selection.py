"""Going on with a part of every batch: how large it is, and which samples it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms._grown import Grown
from locallearn.algorithms.base import TaskInfo
from locallearn.batch import Batch

By = Literal["loss", "random"]
_CLASSES = 1000  # of which a task's loss is tried


@dataclass(frozen=True)
class Selection:
    """Which part of a batch goes on.

    Attributes:
        keep: share of the samples; 1: all of them.
        by: ``loss``: those with the largest loss; ``random``: any.

    Raises:
        ValueError: no share, an unknown choice, or a choice where all go on.
    """

    keep: float = 1.0
    by: By = "loss"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}, expected a share of every batch, above 0 and at most 1")
        if self.by not in get_args(By):
            raise ValueError(f"keep_by is {self.by!r}, expected one of {', '.join(get_args(By))}")
        if self.keep == 1 and self.by != "loss":
            raise ValueError(f"keep_by={self.by} is for keep below 1, and keep is 1: leave it out")

    def __bool__(self) -> bool:
        """Whether anything stays behind."""
        return self.keep < 1

    @property
    def ranks(self) -> bool:
        """Whether the loss of every sample is asked for."""
        return bool(self) and self.by == "loss"

    def check(self, task: TaskInfo) -> None:
        """Refuse tasks of whose batches no part can be taken, or whose loss has no value for every sample.

        Raises:
            ValueError: a graph, or a loss that is no mean over samples.
        """
        if not self:
            return
        if task.example.context or task.example.rows is not None:
            raise ValueError(
                f"keep is {self.keep:g}, but a graph is one batch whose nodes see one another: no part of it can go on"
            )
        if self.ranks:
            targets = task.example.targets
            shape = targets.shape
            if task.classes:  # of every class, because a loss may weigh them
                targets = torch.arange(max(2, min(task.outputs, _CLASSES)), device=targets.device) % task.outputs
                shape = torch.Size((len(targets), task.outputs))
            scores = torch.linspace(-1, 1, math.prod(shape), device=targets.device).square().reshape(shape)
            try:
                found, whole = sample_losses(task.loss, scores, targets).mean(), task.loss(scores, targets)
                fits = torch.allclose(found, whole, rtol=1e-4)
            except Exception:  # whatever it is, there is nothing to rank by
                fits = False
            if not fits:
                raise ValueError(
                    "keep_by=loss ranks samples by the task's loss, and this one is no mean over samples of what each of them "
                    "costs by itself: use keep_by=random"
                )

    def count(self, samples: int) -> int:
        """How many of so many samples go on: keep · N, rounded half to even.

        Raises:
            ValueError: all of them would, or fewer than two, of which normalisation and similarities can make nothing.
        """
        if not self:
            return samples
        kept = round(self.keep * samples)
        if not 2 <= kept < samples:
            raise ValueError(
                f"keep={self.keep:g} takes {kept} of a batch of {samples} samples: at least 2 must go on and 1 stay behind, so "
                "make the batches larger, leave a short last one out (dataset.drop_last=true), or give another keep"
            )
        return kept

    def refuse_apart(self) -> None:
        """Refuse that blocks learn one after another, where one of them chooses for those behind it.

        Raises:
            ValueError: something stays behind.
        """
        if self:
            raise ValueError(
                f"keep={self.keep:g} has one block choose from every batch for those behind it, so that all of them learn "
                "together: use schedule=joint, or keep=1"
            )

    def choose(self, samples: int, losses: Tensor | None, generator: torch.Generator) -> Tensor:
        """Positions of the samples that go on, in their old order, int64.

        Args:
            samples: N.
            losses: of every sample, ``(N,)``; of equal ones the earlier goes on. ``None``: any go on.
            generator: of that draw; the positions are on its device.
        """
        kept = self.count(samples)
        if losses is not None:
            order = losses.argsort(descending=True, stable=True)
        else:
            order = torch.randperm(samples, generator=generator, device=generator.device)
        return order[:kept].sort().values


def sample_losses(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Tensor:
    """What every sample costs by itself under a loss that is a mean over samples, ``(N,)``, without a graph."""
    scores = scores.detach()
    if scores.dtype in (torch.float16, torch.bfloat16):  # too coarse to rank by
        scores = scores.float()
    with torch.no_grad():
        return each_loss(loss, scores, targets)


def each_loss(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Tensor:
    """The same, in the scores' dtype and as differentiable as the loss."""

    def one(score: Tensor, target: Tensor) -> Tensor:
        return loss(score[None], target[None])

    losses: Tensor = torch.vmap(one)(scores, targets)
    return losses


def rows_of(batch: Batch, rows: Tensor | slice) -> Batch:
    """These samples of a batch that is no graph."""
    index, source = (None if places is None else places[rows] for places in (batch.index, batch.source))
    return Batch(batch.inputs[rows], batch.targets[rows], index=index, source=source)


class LastLosses(Grown):
    """The loss that every training sample had when it was last learned from; infinite before."""

    losses: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(0, dtype=torch.float64))  # kept at half precision, too

    def of(self, batch: Batch) -> Tensor:
        """Losses of the samples of a batch, ``(N,)``.

        Raises:
            ValueError: it does not say which samples they are.
        """
        places = batch.places
        if places is None:
            raise ValueError(
                "keep_by=loss looks up what a sample cost when it was last learned from, and these batches do not say which "
                "samples they hold (Batch.index or Batch.source): use the data sets of locallearn or a BatchLoader, give "
                "source= to the step of a network from localize, or use keep_by=random"
            )
        missing = int(places.max()) + 1 - len(self.losses)
        if missing > 0:
            self.losses = F.pad(self.losses, (0, missing), value=math.inf)
        return self.losses[places]

    def note(self, batch: Batch, losses: Tensor) -> None:
        """Keep the losses of the samples of a batch; of one all of whose labels the loss leaves out (not a number): none.

        Sorted as it is, it would count as the hardest of all, and be chosen ever after.
        """
        self.losses[batch.places] = losses.to(self.losses.dtype).masked_fill(losses.isnan(), 0.0)
