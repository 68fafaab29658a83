"""How few units carry a representation: Hoyer's measure."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sparsity(NamedTuple):
    """A mean of Hoyer's measure.

    Attributes:
        mean: over the samples that have one; ``nan`` where none has.
        samples: all samples, those without a measure included.
        undefined: samples without a measure: all zero (a dead layer), or not finite. They are in no mean.
    """

    mean: float
    samples: int
    undefined: int


def hoyer(activations: Tensor) -> Tensor:
    """Return the sparsity of every sample, S(h) = (√d − ‖h‖₁/‖h‖₂) / (√d − 1).

    1: one unit is active; 0: all are equally so. It does not change when a sample is scaled, so normalising changes nothing.
    ReLU of Gaussian noise has 0.45 at d = 784: that is no sparsity that anything has learned.

    Args:
        activations: h, shape ``(N, ...)``, with at least two entries per sample.

    Returns:
        Shape ``(N,)``, in at least single precision; ``nan`` for a sample that is all zero or not finite.

    Raises:
        ValueError: fewer than two entries per sample, where the measure is not defined.

    Source: P. O. Hoyer, Journal of Machine Learning Research 5, 2004, section 3.1.
    """
    flat = activations.flatten(1)
    units = flat.shape[1] if flat.ndim == 2 else 0
    if units < 2:
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} have {units} units per sample: Hoyer's measure needs at least 2"
        )
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32)).abs()
    largest = flat.amax(1, keepdim=True) if len(flat) else flat[:, :1]
    flat = flat / largest  # squares of large and small numbers stay in range; nothing at all becomes nan here
    root = units**0.5
    measured: Tensor = (root - flat.sum(1) / flat.square().sum(1).sqrt()) / (root - 1)
    return measured


def mean_sparsity(values: Tensor) -> Sparsity:
    """Return the mean of the samples that have a measure, and how many have none.

    Args:
        values: what :func:`hoyer` gave, shape ``(N,)``.
    """
    known = values.detach()[~values.isnan()]
    mean = float(known.double().mean()) if len(known) else float("nan")
    return Sparsity(mean, len(values), len(values) - len(known))


def sparsity(activations: Tensor) -> Sparsity:
    """Return the mean sparsity of a layer.

    Args:
        activations: shape ``(N, ...)``.
    """
    return mean_sparsity(hoyer(activations))


def class_sparsity(activations: Tensor, labels: Tensor, classes: int) -> list[Sparsity]:
    """Return the mean sparsity of a layer on the samples of every class.

    Args:
        activations: shape ``(N, ...)``.
        labels: class ids, shape ``(N,)``, int64.
        classes: C.
    """
    values = hoyer(activations)
    return [mean_sparsity(values[labels == c]) for c in range(classes)]
