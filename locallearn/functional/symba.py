"""Equations of SymBa: a positive and its negative are compared with each other, not with a threshold.

Source: H.-C. Lee, J. Song, "SymBa: Symmetric Backpropagation-Free Contrastive Learning with Forward-Forward Algorithm for
Optimizing Convergence", arXiv 2303.08418; numbers agree with those of a public implementation (github tdooms/trifecta).

Symbols: B pairs, G⁺ and G⁻ the goodness of a positive and of its negative, here the mean of squares, α the steepness.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def loss(goodness_positive: Tensor, goodness_negative: Tensor, alpha: float = 4.0) -> Tensor:
    """Return the mean over the pairs of softplus(−α (G⁺ − G⁻)).

    Both halves of a pair pull with the same strength whatever their size, which a threshold does not give. α stands
    inside of the softplus, and the loss is not divided by it: gradients grow with α.

    Args:
        goodness_positive: G⁺, shape ``(B,)``.
        goodness_negative: G⁻ of the same pairs, shape ``(B,)``.
        alpha: α.

    Returns:
        A scalar, log 2 where G⁺ = G⁻ everywhere, finite at any goodness.

    Raises:
        ValueError: the two are no pairs.
    """
    if goodness_positive.shape != goodness_negative.shape:
        raise ValueError(
            f"goodness of shape {tuple(goodness_positive.shape)} and {tuple(goodness_negative.shape)} makes no pairs: give as "
            "many negatives as positives."
        )
    # Not F.softplus: beyond 20 it cuts to the identity, which costs double precision half its digits.
    return -F.logsigmoid(alpha * (goodness_positive - goodness_negative)).mean()
