"""What the closed-form costs of fully connected networks share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def weight_count(widths: Sequence[int]) -> int:
    """Count the hidden weights of a fully connected network, Σ d_{i-1} d_i, which is also its forward MACs per sample.

    Args:
        widths: d_0 … d_L, the input width first, then every hidden width; the output layer is left out.

    Raises:
        ValueError: ``widths`` names no hidden layer or holds a width below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(
            f"widths={list(widths)} describes no network: give the input width and at least one hidden width, all >= 1."
        )
    return sum(before * after for before, after in pairwise(widths))
