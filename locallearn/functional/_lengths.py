"""How long a sample is, and how it is scaled by that: what several rules do to what the next layer reads."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(x: Tensor) -> torch.dtype:
    """The dtype in which sums of squares are taken: halves lose too much in them."""
    return torch.promote_types(x.dtype, torch.float32)


def lengths(x: Tensor) -> Tensor:
    """Euclidean length of every sample over all its entries, shape ``(B,)``, in at least single precision."""
    found: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=at_least_single(x))
    return found


def divided(x: Tensor, divisors: Tensor) -> Tensor:
    """Every sample divided by its number, shape and dtype of ``x``; one whose number is 0 stays as it is, with derivative 1."""
    divisors = torch.where(divisors > 0, divisors, 1.0).view(-1, *[1] * (x.dim() - 1))
    return (x / divisors).to(x.dtype)


def unit_normalise(x: Tensor) -> Tensor:
    """Scale every sample to Euclidean length 1 over all its entries, h/‖h‖₂; a sample of zeros stays zero.

    Args:
        x: shape ``(B, ...)``.

    Returns:
        Same shape and dtype; the length is computed in at least single precision.
    """
    return divided(x, lengths(x))
