"""Equations of Mono-Forward: every layer learns from the cross-entropy of its own projection onto the classes.

Source: Gong, Li, Abdulla, "Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training
Harnessing Local Errors", arXiv 2501.09238. Only its abstracts could be read; the equations follow Spyra (arXiv
2509.19063 and 2511.01061), whose text and code agree with a transcript of the paper's Algorithm 1.

Symbols: B samples, C classes, d_i the width of layer i, a_i = ReLU(a_{i-1} W_iᵀ + b_i), M_i the projection (C, d_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.functional._widths import weight_count


class Gradients(NamedTuple):
    """What one layer needs for its step.

    Attributes:
        weight: ∇W, shape ``(d, d_in)``.
        bias: ∇b, shape ``(d,)``.
        projection: ∇M, shape ``(C, d)``.
        loss: L, a scalar.
    """

    weight: Tensor
    bias: Tensor
    projection: Tensor
    loss: Tensor


def goodness(activations: Tensor, projection: Tensor) -> Tensor:
    """Return the class scores of one layer, G = a Mᵀ.

    Args:
        activations: a, shape ``(B, ...)``; everything after the batch dimension is flattened to d entries, so that a
            convolutional map needs no pooling of its own.
        projection: M, shape ``(C, d)``.

    Returns:
        G, shape ``(B, C)``.

    Raises:
        ValueError: a sample has another number of entries than the projection has columns.
    """
    flat = activations.flatten(1)
    if flat.shape[1] != projection.shape[1]:
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} have {flat.shape[1]} entries per sample but the "
            f"projection reads {projection.shape[1]}: build it with features={flat.shape[1]}."
        )
    return F.linear(flat, projection)


def loss(activations: Tensor, projection: Tensor, targets: Tensor) -> Tensor:
    """Return the local loss of one layer, L = mean over the batch of CE(softmax(a Mᵀ), y).

    Args:
        activations: a, shape ``(B, ...)``, flattened to d entries per sample.
        projection: M, shape ``(C, d)``.
        targets: class ids y, shape ``(B,)``, int64, each in ``[0, C)``.

    Returns:
        A scalar.

    Raises:
        ValueError: ``targets`` is not one class id per sample, or the projection does not fit the activations.
    """
    if targets.shape != activations.shape[:1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit activations of shape {tuple(activations.shape)}: "
            f"give one class id per sample, shape ({activations.shape[0]},)."
        )
    return F.cross_entropy(goodness(activations, projection), targets)


def gradients(inputs: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, targets: Tensor) -> Gradients:
    """Return the closed-form gradients of one fully connected ReLU layer; autograd is not used.

    With E = (softmax(G) − Y)/B: ∇M = Eᵀ a, δ = (E M) ⊙ 1[z > 0], ∇W = δᵀ a_{i-1}, ∇b = Σ_B δ.

    Args:
        inputs: a_{i-1}, shape ``(B, d_in)``.
        weight: W, shape ``(d, d_in)``.
        bias: b, shape ``(d,)``.
        projection: M, shape ``(C, d)``.
        targets: class ids y, shape ``(B,)``, int64, each in ``[0, C)``.

    Returns:
        Gradients of the mean loss, and that loss.
    """
    with torch.no_grad():
        activations = F.linear(inputs, weight, bias).relu()
        scores = goodness(activations, projection)
        error = (scores.softmax(1) - F.one_hot(targets, projection.shape[0])) / inputs.shape[0]
        delta = (error @ projection) * (activations > 0)
        return Gradients(
            weight=delta.T @ inputs,
            bias=delta.sum(0),
            projection=error.T @ activations,
            loss=F.cross_entropy(scores, targets),
        )


def forward_macs(widths: Sequence[int], classes: int) -> int:
    """Return the MACs of one prediction per sample, Q + C d_L.

    It reads only the last projection, which costs what the head of the same network under backprop costs.

    Args:
        widths: d_0 … d_L of a fully connected network, input width first, output layer left out.
        classes: C.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    return weight_count(widths) + classes * widths[-1]


def update_macs(widths: Sequence[int], classes: int) -> int:
    """Return the MACs of one joint Mono-Forward update per sample, 2Q + 3R (double it for FLOPs).

    Q = Σ d_{i-1} d_i is spent on the forward pass and again on ∇W; R = C Σ d_i on G, on ∇M and on E M. No gradient
    travels from one layer to the one below.

    Args:
        widths: d_0 … d_L of a fully connected network, input width first, output layer left out.
        classes: C.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    return 2 * weight_count(widths) + 3 * classes * sum(widths[1:])


def backprop_macs(widths: Sequence[int], classes: int) -> int:
    """Return the MACs of one backprop update of the same network per sample, 3Q − d_0 d_1 + 3 C d_L.

    The head is one linear layer d_L → C; no gradient is computed for the data.

    Args:
        widths: d_0 … d_L of a fully connected network, input width first, output layer left out.
        classes: C.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    return 3 * weight_count(widths) - widths[0] * widths[1] + 3 * classes * widths[-1]
