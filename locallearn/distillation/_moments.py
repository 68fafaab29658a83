"""Sums over samples from which a least-squares layer is solved: additive over batches, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locallearn.functional.ridge import ridge


class Moments:
    """Σh, Σy, Σhhᵀ, Σhyᵀ, Σy² and the number of rows; its size depends on neither the number of rows nor that of batches.

    Args:
        features: D, entries of h.
        outputs: C, entries of y.
        device: where the sums are kept.
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        own: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.rows = 0
        self.h, self.y, self.squares = torch.zeros(features, **own), torch.zeros(outputs, **own), torch.zeros((), **own)
        self.gram, self.cross = torch.zeros(features, features, **own), torch.zeros(features, outputs, **own)

    def add(self, h: Tensor, y: Tensor) -> None:
        """One batch: h ``(N, D)`` and y ``(N, C)``."""
        h, y = h.to(self.gram.dtype), y.to(self.gram.dtype)
        self.rows += len(h)
        self.h += h.sum(0)
        self.y += y.sum(0)
        self.squares += y.square().sum()
        self.gram.addmm_(h.T, h)
        self.cross.addmm_(h.T, y)

    def join(self, other: Moments) -> None:
        """Add the sums of other samples."""
        self.rows += other.rows
        for name in ("h", "y", "squares", "gram", "cross"):
            getattr(self, name).add_(getattr(other, name))

    def centred(self) -> tuple[Tensor, Tensor]:
        """Covariances of h, ``(D, D)``, and of h with y, ``(D, C)``."""
        mean, wanted = self.h / self.rows, self.y / self.rows
        return self.gram / self.rows - mean.outer(mean), self.cross / self.rows - mean.outer(wanted)

    def solve(self, penalty: float) -> tuple[Tensor, Tensor, bool]:
        """The ridge regression of y on h with features of variance 1 and an intercept that is not penalised.

        Args:
            penalty: λ of the mean squared error, Σ(y − ŷ)²/n + λ‖W‖²; of the sum of squares it is λ·n.

        Returns:
            W ``(D, C)`` and b ``(C,)`` of features as they are, float64, and whether a Cholesky factorisation was enough: else
            the features depend on each other linearly, and W is the solution of least norm.

        Raises:
            ValueError: no rows, or features that are not finite.
        """
        if not self.rows:
            raise ValueError("there are no samples to solve a layer from")
        covariance, cross = self.centred()
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        # below that a variance is the rounding of the sums, and the feature a constant
        varies = deviation > 1e-7 * (self.h / self.rows).abs().clamp_min(torch.finfo(torch.float64).tiny)
        inverse = torch.where(varies, deviation, 1).reciprocal() * varies
        scaled = covariance * inverse[:, None] * inverse
        scaled.diagonal().add_(torch.where(varies, 0.0, 1.0))  # a constant gets the weight 0
        solution = ridge(scaled, cross * inverse[:, None], penalty)
        weights = solution.weights * inverse[:, None]
        return weights, (self.y - self.h @ weights) / self.rows, solution.cholesky

    def error(self, weights: Tensor, bias: Tensor) -> float:
        """Mean over rows of ‖y − Wᵀh − b‖², from the sums alone."""
        fitted = (
            (weights * (self.gram @ weights)).sum()
            + 2 * bias @ (self.h @ weights)
            + self.rows * bias.square().sum()
            - 2 * (weights * self.cross).sum()
            - 2 * bias @ self.y
        )
        return float((self.squares + fitted).clamp_min(0)) / self.rows

    def relative_error(self, weights: Tensor, bias: Tensor) -> float | None:
        """:meth:`error` over that of the mean of y; ``None`` where y does not vary."""
        spread = self.error(torch.zeros_like(self.cross), self.y / self.rows)
        return self.error(weights, bias) / spread if spread > 0 else None
