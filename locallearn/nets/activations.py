"""Activations that PyTorch does not have: those of Forward Projection (O'Shea and Rajendran, arXiv 2501.16476)."""

from __future__ import annotations

from torch import Tensor, nn


class Mod2(nn.Module):
    """x modulo 2, in [0, 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return x.remainder(2)


class Square(nn.Module):
    """x²."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return x.square()
