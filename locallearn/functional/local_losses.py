"""One loss for every patch and group of channels, all of the same value, each with a derivative of its own slice alone.

M. Ren, S. Kornblith, R. Liao, G. Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv 2210.03310.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def replicated_losses(features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, groups: int = 1) -> Tensor:
    """Cross entropy of a readout of the mean over patches, once for every slice.

    A slice is a group of channels of one patch. In its loss all others are held still (by ``detach``, which holds in forward
    mode, too, where ``torch.no_grad`` does not). So all G P losses of a sample have the value of the pooled loss, and their
    derivatives add up to its derivative: of the features, of the weight and of the bias.

    Args:
        features: h, ``(N, P, C)``; of one patch also ``(N, C)``.
        weight: of the readout, ``(K, C)``.
        bias: of the readout, ``(K,)``.
        targets: class ids, ``(N,)``.
        groups: G equal groups of neighbouring channels.

    Returns:
        ``(N, P, G)``: of every sample, not divided by N.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    parts = _slices(features, groups)  # (N, P, G, C/G)
    patches, rows = parts.shape[1], torch.unflatten(weight, 1, (groups, -1))
    own = torch.einsum("npgc,kgc->npgk", parts, rows) / patches + bias / (patches * groups)
    pooled = F.linear(parts.mean(1).flatten(1), weight, bias).detach()
    scores = pooled[:, None, None] + (own - own.detach())
    wanted = targets[:, None, None].expand(scores.shape[:3])
    return F.cross_entropy(scores.flatten(0, 2), wanted.flatten(), reduction="none").view_as(wanted)


def replicated_slopes(
    features: Tensor, along: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """The same losses and their derivatives, in closed form: no score is made for a slice.

    With p the softmax of the pooled scores and e the true class: c[n, p, g] = Σ_{c in g} (W^T (p_n - e_n))_c ∂h[n, p, c] / P.

    Args:
        features: h, ``(N, P, C)``; of one patch also ``(N, C)``.
        along: ∂h, the direction in which they move, likewise.
        weight: ``(K, C)``.
        bias: ``(K,)``.
        targets: class ids, ``(N,)``.
        groups: G.

    Returns:
        The pooled losses ``(N,)``, and the derivative of every slice's loss ``(N, P, G)``.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    parts = _slices(features, groups)
    scores = F.linear(parts.mean(1).flatten(1), weight, bias)
    error = torch.unflatten(readout_error(scores, targets) @ weight, 1, (groups, -1))
    slopes = torch.einsum("npgc,ngc->npg", _slices(along, groups), error) / parts.shape[1]
    return F.cross_entropy(scores, targets, reduction="none"), slopes


def readout_error(scores: Tensor, targets: Tensor) -> Tensor:
    """Softmax minus the true class, ``(N, K)``: the derivative of every sample's cross entropy by its scores."""
    return scores.softmax(1) - F.one_hot(targets, scores.shape[1]).to(scores.dtype)


def readout_gradients(features: Tensor, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Exact gradients of a linear readout's weight ``(K, C)`` and bias ``(K,)`` under the mean cross entropy, without autograd.

    Args:
        features: what the readout has read, ``(N, C)``.
        scores: what it has put out, ``(N, K)``.
        targets: class ids, ``(N,)``.
    """
    error = readout_error(scores, targets) / len(targets)
    return error.T @ features, error.sum(0)


def _slices(features: Tensor, groups: int) -> Tensor:
    """``(N, P, C)`` or ``(N, C)`` as ``(N, P, G, C/G)``."""
    channels = features.shape[-1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}, which does not divide {channels} channels: choose a divisor")
    if features.ndim == 2:
        features = features[:, None]
    return torch.unflatten(features, -1, (groups, -1))
