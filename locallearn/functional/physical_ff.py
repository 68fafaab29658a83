"""Physical local learning: contrastive goodness between black boxes, with gradients made by hand.

A. Momeni, B. Rahmani, M. Malléjac, P. del Hougne, R. Fleury, "Backpropagation-free training of deep physical neural networks",
Science 382:1297, 2023, arXiv 2304.11042. u what a layer's weights read (a constant), W (n, D) and b its weights, h = u Wᵀ + b,
a the activity that is judged (|h|, or an activation of h), p (n,) a fixed random direction of length 1; ⁺ the true label, ⁻ a
wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Gradients(NamedTuple):
    """What one layer needs for its step.

    Attributes:
        weight: ∂L/∂W, shape ``(n, D)``.
        bias: ∂L/∂b, shape ``(n,)``.
        loss: L, a scalar.
    """

    weight: Tensor
    bias: Tensor
    loss: Tensor


def direction(width: int, generator: Generator | None = None) -> Tensor:
    """Draw p from N(0, 1), scaled to length 1.

    Args:
        width: n.
        generator: the source of randomness; ``None``: PyTorch's global one.

    Returns:
        Shape ``(n,)``, float32.
    """
    drawn = torch.randn(width, generator=generator)
    length: Tensor = torch.linalg.vector_norm(drawn)
    return drawn / length


def goodness(activity: Tensor, direction: Tensor) -> Tensor:
    """Return the cosine between a and p; it does not change with the length of either. Of a row of zeros it is 0.

    Args:
        activity: a, shape ``(B, n)``.
        direction: p, shape ``(n,)``.

    Returns:
        Shape ``(B,)``.
    """
    return _goodness(activity, direction)[0]


def loss(goodness_positive: Tensor, goodness_negative: Tensor, theta: float) -> Tensor:
    """Return L = mean softplus(−θ (g⁺ − g⁻)): every sample against itself with a wrong label, no threshold.

    Args:
        goodness_positive: g⁺, shape ``(B,)``.
        goodness_negative: g⁻, shape ``(B,)``.
        theta: θ, the gain ("threshold" in the authors' code).

    Returns:
        A scalar; log 2 where nothing is told apart, at least log(1 + exp(−√2 θ)) where a ≥ 0 (:func:`least_loss`).
    """
    return -torch.nn.functional.logsigmoid(theta * (goodness_positive - goodness_negative)).mean()


def least_loss(theta: float) -> float:
    """Return the bound below which no layer's loss can fall if its activity is not negative, log(1 + exp(−√2 θ))."""
    return math.log1p(math.exp(-math.sqrt(2.0) * theta))


def activity_gradients(
    positive: Tensor, negative: Tensor, direction: Tensor, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∂L/∂a⁺ and ∂L/∂a⁻, by hand, and L.

    ∂g/∂a = p/‖a‖ − g a/‖a‖² (‖p‖ = 1), ∂L/∂g⁺ = −θ σ(−θ(g⁺ − g⁻))/B, the opposite for g⁻. Of a row of zeros it is 0.

    Args:
        positive: a⁺, shape ``(B, n)``.
        negative: a⁻, shape ``(B, n)``.
        direction: p, shape ``(n,)``.
        theta: θ.

    Returns:
        Two tensors ``(B, n)`` and a scalar.
    """
    good, slope = _goodness(positive, direction)
    bad, other = _goodness(negative, direction)
    pull = (-theta / len(good)) * torch.sigmoid(-theta * (good - bad)).unsqueeze(1)
    return pull * slope, -pull * other, loss(good, bad, theta)


def gradients(
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    direction: Tensor,
    theta: float,
    activation: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    absolute: bool = True,
) -> Gradients:
    """Return the gradients of one layer's loss, made by hand: nothing is differentiated.

    ∂L/∂W = ∂L/∂h⁺ᵀ u⁺ + ∂L/∂h⁻ᵀ u⁻, with ∂a/∂h = sign(φ(h)) φ'(h), the sign only where the activity is the absolute value.

    Args:
        inputs: u⁺ and u⁻, shape ``(B, D)`` each.
        outputs: h⁺ and h⁻, shape ``(B, n)`` each.
        direction: p, shape ``(n,)``.
        theta: θ.
        activation: φ: maps h to φ(h) and φ'(h); ``None``: none.
        absolute: whether a = |φ(h)| (the physical variants) or φ(h) (the digital net, where φ is GELU).

    Returns:
        Gradients, and the loss.
    """
    with torch.no_grad():
        activities, slopes = [], []
        for h in outputs:
            value, slope = (h, None) if activation is None else activation(h)
            if absolute:
                sign = value.sign()
                slope = sign if slope is None else sign * slope
                value = value.abs()
            activities.append(value)
            slopes.append(slope)
        *errors, found = activity_gradients(activities[0], activities[1], direction, theta)
        errors = [error if slope is None else error * slope for error, slope in zip(errors, slopes, strict=True)]
        weight = errors[0].T @ inputs[0] + errors[1].T @ inputs[1]
        return Gradients(weight, errors[0].sum(0) + errors[1].sum(0), found)


def update_flops(inputs: int, outputs: int, steps: int) -> int:
    """Return the digital FLOPs of one layer and pair of samples, 8 K D n: forward passes and products of both, K times."""
    return 8 * steps * inputs * outputs


def _goodness(activity: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The goodness g and ∂g/∂a."""
    length = torch.linalg.vector_norm(activity, dim=1, keepdim=True)
    scaled = activity / torch.where(length > 0, length, torch.ones_like(length))
    unit = direction / torch.linalg.vector_norm(direction)
    good = scaled @ unit
    inverse = torch.where(length > 0, length.reciprocal(), torch.zeros_like(length))
    return good, (unit - good.unsqueeze(1) * scaled) * inverse
