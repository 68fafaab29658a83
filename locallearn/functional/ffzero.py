"""FFzero: every layer is compared with fixed class prototypes and moved by differences of a loss, without any derivative.

arXiv 2603.24790. C classes, d the width of what is compared, K directions per layer or output channel, n the number of values
that a direction moves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def prototypes(classes: int, width: int, generator: Generator) -> Tensor:
    """Draw C vectors of length 1 that are as far from one another as can be: a regular simplex, turned at random.

    Rows of the identity (C ones in d columns), their mean taken out, scaled to length 1, times a rotation drawn evenly from all
    (QR of a Gaussian matrix, signs of R's diagonal put right, drawn again until the determinant is positive).

    Args:
        classes: C.
        width: d.
        generator: the only source of randomness.

    Returns:
        Shape ``(C, d)``, float64; any two rows have the cosine −1/(C − 1).

    Raises:
        ValueError: fewer than two classes, or more than d.
    """
    if not 2 <= classes <= width:
        raise ValueError(
            f"{classes} prototypes in {width} dimensions: there must be at least 2, and no more than dimensions (a wider layer)"
        )
    corners = torch.eye(classes, width, dtype=torch.float64)
    corners = corners - corners.mean(0)
    corners = corners / torch.linalg.vector_norm(corners, dim=1, keepdim=True)
    while True:
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        rotation = q * r.diagonal().sign()
        if torch.linalg.det(rotation) > 0:
            turned: Tensor = corners @ rotation
            return turned


def similarities(outputs: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosines of outputs ``(..., B, d)`` and prototypes ``(..., C, d)`` (of length 1), ``(..., B, C)``.

    An output of zeros has the cosine 0 with all.
    """
    length = torch.linalg.vector_norm(outputs, dim=-1, keepdim=True)
    return outputs / torch.where(length > 0, length, torch.ones_like(length)) @ prototypes.mT


def loss(outputs: Tensor, prototypes: Tensor, targets: Tensor, margin: float = 0.3) -> Tensor:
    """Return Σ_samples Σ_classes relu(margin + cos_c − cos_true), a sum; the true class adds a constant margin per sample.

    Args:
        outputs: shape ``(..., B, d)``.
        prototypes: shape ``(..., C, d)``.
        targets: class ids, shape ``(B,)``.
        margin: by which the true class should be nearer than any other.

    Returns:
        Shape ``(...)``: a scalar, or one per channel.
    """
    near = similarities(outputs, prototypes)
    true = near.gather(-1, targets.expand(near.shape[:-1]).unsqueeze(-1))
    return F.relu(margin + near - true).sum((-2, -1))


def directions(count: int, values: int, generator: Generator) -> Tensor:
    """Draw K directions of length 1, shape ``(K, n)``, float32 on the generator's device."""
    drawn = torch.randn(count, values, generator=generator, device=generator.device)
    length: Tensor = torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    return drawn / length


def estimate(slopes: Tensor, directions: Tensor) -> Tensor:
    """Return n · mean_k c_k d_k: its mean over all directions is the gradient.

    Args:
        slopes: c, central differences of the loss along the directions, shape ``(K,)``.
        directions: d, of length 1, shape ``(K, n)``.

    Returns:
        Shape ``(n,)``.
    """
    return directions.shape[1] * (slopes.to(directions) @ directions) / len(directions)


def vote(answers: Tensor, classes: int) -> Tensor:
    """Return scores whose largest is the class that most layers name; a tie goes to that whose voters are the higher layers.

    The order of two tied classes is that of the sums of their voters' indices, from 0 upwards; if these are equal, too, the
    lower class id wins.

    Args:
        answers: class ids, shape ``(L, N)``, the lowest layer first.
        classes: C.

    Returns:
        Votes, and as a fraction below 1 the sum of indices over L², shape ``(N, C)``, float64.
    """
    chosen = F.one_hot(answers, classes).to(torch.float64)
    layers = torch.arange(len(answers), device=answers.device, dtype=torch.float64)
    return chosen.sum(0) + torch.einsum("l,lnc->nc", layers, chosen) / len(answers) ** 2
