"""How far two tensors point apart: what alignment is measured by."""

from __future__ import annotations

import math

from torch import Tensor


def angle(one: Tensor, other: Tensor) -> float:
    """Angle between two tensors of the same shape, read as vectors, in degrees; 90 where one of them is zero."""
    a, b = one.detach().flatten().double(), other.detach().flatten().double()
    norms = float(a.norm() * b.norm())
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b) / norms)))) if norms > 0 else 90.0
