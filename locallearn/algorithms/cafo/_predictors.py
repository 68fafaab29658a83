"""What reads the labels off one block's output: weights that are stepped, or weights in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from locallearn.algorithms._grown import Grown
from locallearn.functional import cafo, ridge
from locallearn.functional.cafo import Loss


class Stepped(nn.Module):
    """X W, with W stepped along the gradient of cross entropy or of the sparsemax loss; every W starts with all ones.

    Args:
        features: D, entries of one sample.
        classes: C.
        loss: ``ce`` or ``sparsemax``.
        rows: of a chunk.
    """

    def __init__(self, features: int, classes: int, loss: Loss, rows: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(features, classes))
        self._loss: Loss = loss
        self._rows = rows

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``(N, C)``."""
        return features.flatten(1).to(self.weights.dtype) @ self.weights

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """The mean loss; its backward pass hands over a gradient that is there already."""
        value, gradient = cafo.gradient(features, self.weights.detach(), targets, self._loss, self._rows)
        loss: Tensor = _Known.apply(self.weights, value, gradient)
        return loss


class _Known(torch.autograd.Function):
    """A value with a gradient that was worked out with it."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return above * gradient, None, None


class ClosedForm(Grown):
    """Ridge regression onto one-hot labels: XᵀX and XᵀY are summed up in float64 over an epoch, then solved for W once.

    Before :meth:`finish`, scores are those of what has been summed up so far; :meth:`finish` keeps W and lets the sums go.

    Args:
        features: D, entries of one sample.
        classes: C.
        ridge: λ as a multiple of the mean of XᵀX's diagonal.
        centre: take the means of X and Y out first, which fits an offset as well.
    """

    weights: Tensor
    offset: Tensor
    gram: Tensor
    cross: Tensor
    sums: Tensor
    counts: Tensor
    found: Tensor

    def __init__(self, features: int, classes: int, ridge: float, centre: bool) -> None:
        super().__init__()
        self._features, self._classes = features, classes
        self._ridge, self._centre = ridge, centre
        self.register_buffer("weights", torch.zeros(features, classes))
        self.register_buffer("offset", torch.zeros(classes))
        for name in ("gram", "cross"):
            self.register_buffer(name, torch.zeros(0, 0, dtype=torch.float64))
        for name in ("sums", "counts", "found"):  # of X, of Y; λ, residual, whether by Cholesky
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None  # weights, offset, found of the sums as they are

    @property
    def gathering(self) -> bool:
        """Whether sums are there that :meth:`finish` has not turned into weights."""
        return len(self.gram) > 0

    def gather(self, features: Tensor, targets: Tensor) -> None:
        """Add a batch to the sums."""
        if not self.gathering:
            like, size = self.weights.device, self._features
            self.gram = torch.zeros(size, size, dtype=torch.float64, device=like)
            self.cross = torch.zeros(size, self._classes, dtype=torch.float64, device=like)
            self.sums = torch.zeros(size, dtype=torch.float64, device=like)
            self.counts = torch.zeros(self._classes, dtype=torch.float64, device=like)
        self._pending = None
        cafo.gather(self.gram, self.cross, features, targets)
        self.sums += features.flatten(1).sum(0, dtype=torch.float64)
        self.counts += torch.bincount(targets, minlength=self._classes)

    def forget(self) -> None:
        """Let the sums go; what was solved for stays."""
        self.gram, self.cross = (self.gram.new_zeros(0, 0) for _ in range(2))
        self.sums, self.counts = (self.sums.new_zeros(0) for _ in range(2))
        self._pending = None

    def finish(self) -> None:
        """Solve for the weights, and let the sums go."""
        if self.gathering:
            weights, offset, found = self._solved()
            # A prediction in inference mode may have solved, and a buffer must be an ordinary tensor.
            with torch.inference_mode(False):
                self.found = found.clone()
            self.weights.copy_(weights)
            self.offset.copy_(offset)
            self.forget()

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``(N, C)``."""
        weights, offset = (self.weights, self.offset) if not self.gathering else self._solved()[:2]
        return features.flatten(1).to(self.weights.dtype) @ weights.to(self.weights) + offset.to(self.weights)

    def figures(self) -> dict[str, float]:
        """λ, the residual of the normal equations, and whether they were solved by Cholesky; empty before."""
        found = self._pending[2] if self._pending is not None else self.found
        return dict(zip(("ridge", "residual", "cholesky"), found.tolist(), strict=False))

    @torch.no_grad()
    def _solved(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._pending is None:
            with torch.autocast(self.gram.device.type, enabled=False):
                gram, cross, rows = ridge.symmetric(self.gram), self.cross.clone(), float(self.counts.sum())
                mean, share = self.sums / rows, self.counts / rows
                if self._centre:
                    ridge.centre(gram, cross, self.sums, self.counts, rows)
                penalty = self._ridge * float(gram.diagonal().mean())
                solution = ridge.ridge(gram, cross, penalty)
                offset = share - mean @ solution.weights if self._centre else torch.zeros_like(share)
                found = [penalty, solution.residual, float(solution.cholesky)]
            self._pending = solution.weights, offset, self.found.new_tensor(found)
        return self._pending

    def _load_from_state_dict(self, *args: Any) -> None:
        self._pending = None
        super()._load_from_state_dict(*args)
