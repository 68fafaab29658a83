"""Equations of Scalable Forward-Forward: a class map per class, its mean square is the class's goodness.

Source: A. Krutsylo, "Scalable Forward-Forward Algorithm", arXiv 2501.03176. Its method section could not be read; what its
abstract and the author's own summary leave open (margin, temperature, axes of the normalisation) is a choice of ours.

Symbols: B samples, C classes, h the output of a block, ``(B, channels, H, W)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def goodness(maps: Tensor) -> Tensor:
    """Return the mean square of every class map over its positions.

    Args:
        maps: u, shape ``(B, C, H, W)``.

    Returns:
        g, shape ``(B, C)``, not negative, in at least single precision.
    """
    return maps.to(torch.promote_types(maps.dtype, torch.float32)).square().flatten(2).mean(2)


def loss(goodness: Tensor, targets: Tensor, margin: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Return L = mean over the batch of log(e^{g_y} + Σ_{c≠y} e^{g_c + m}) - g_y, all exponents divided by the temperature.

    With m = 0 it is the cross entropy of softmax(g / T).

    Args:
        goodness: g, shape ``(B, C)``.
        targets: class ids y, shape ``(B,)``, int64.
        margin: m, by how much the right class must lead.
        temperature: T.

    Raises:
        ValueError: ``targets`` is not one class id per sample.
    """
    if targets.shape != goodness.shape[:1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit goodness of shape {tuple(goodness.shape)}: "
            f"give one class id per sample, shape ({goodness.shape[0]},)."
        )
    others = 1 - F.one_hot(targets, goodness.shape[1]).to(goodness.dtype)
    return F.cross_entropy((goodness + margin * others) / temperature, targets)


def normalise(activations: Tensor, eps: float = 1e-5) -> Tensor:
    """Return every sample with mean 0 and variance 1 over all its entries: a layer normalisation without weights.

    Args:
        activations: h, shape ``(B, ...)``.
        eps: added to the variance.
    """
    return F.layer_norm(activations, activations.shape[1:], eps=eps)
