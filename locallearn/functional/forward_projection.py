"""Equations of Forward Projection: a layer's targets are drawn projections of its own inputs and of the labels.

Source: O'Shea, Rajendran, "Closed-form feedback-free learning with forward projection", arXiv 2501.16476 (Nature Communications
2026); the equations follow what its public code computes. The ridge regression onto these targets is
:mod:`locallearn.functional.ridge`.

Symbols: N rows, D features, d outputs of the layer, C classes, X ``(N, D)``, Y ``(N, C)`` one-hot. Where the layer has a
bias, X has a last column of ones in the paper; here that column's row of Q is given and the column is not made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projections(features: int, width: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Q, shape ``(features, width)``, then U, shape ``(classes, width)``: entries N(0, 1), in float32."""
    q = torch.randn(features, width, generator=generator)
    return q, torch.randn(classes, width, generator=generator)


def project(features: Tensor, q: Tensor) -> Tensor:
    """XQ, shape ``(N, d)``; Q has D rows, or one more for a column of ones."""
    if len(q) == features.shape[1]:
        return features @ q
    return torch.addmm(q[-1], features, q[:-1])


def target(projected: Tensor, labels: Tensor, u: Tensor, shift: float = 0.0) -> Tensor:
    """Z = sign(XQ) + sign(YU) + shift.

    Args:
        projected: XQ, shape ``(N, d)``; zeros leave the labels alone, noise puts noise in its place.
        labels: Y, shape ``(N, C)``.
        u: U, shape ``(C, d)``.
        shift: into the range of the layer's activation: 0 for ReLU, .5 for x mod 2 and x².

    Returns:
        Z, shape ``(N, d)``.
    """
    return projected.sign() + (labels.to(u.dtype) @ u).sign() + shift


def random_weights(features: int, width: int, generator: torch.Generator) -> Tensor:
    """The control that fits nothing: N(0, 1), every feature's row scaled to length 1; shape ``(features, width)``."""
    return torch.nn.functional.normalize(torch.randn(features, width, generator=generator), dim=1)
