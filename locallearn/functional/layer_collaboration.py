"""Equations of layer collaboration: every layer of a Forward-Forward network knows how sure the other layers are.

Source: G. Lorberbom, I. Gat, Y. Adi, A. Schwing, T. Hazan, "Layer Collaboration in the Forward-Forward Algorithm", AAAI
2024, arXiv 2305.12393. No code of the authors was found; what the paper leaves open is named with every choice.

Symbols: B pairs of a positive and a negative, L layers of n_l entries, G_l (B,) the goodness of layer l, γ_l (B,) the summed
goodness of the other layers, a constant for layer l, θ_l its threshold, σ the logistic function.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.functional import forward_forward as ff
from locallearn.functional._widths import weight_count

Gamma = Literal["all", "previous"]
Threshold = Literal["scaled", "fixed", "midpoint"]
NegativeLoss = Literal["softplus", "log_p"]
Order = Literal["jacobi", "gauss_seidel"]


class Contributions(NamedTuple):
    """What every layer adds to a classification by summed goodness.

    Attributes:
        alone: accuracy of every layer by itself, shape ``(L,)``.
        gained: accuracy of all layers minus that of all but this one, shape ``(L,)``.
        together: accuracy of all layers.
    """

    alone: Tensor
    gained: Tensor
    together: Tensor


def loss(
    goodness_positive: Tensor,
    goodness_negative: Tensor,
    gamma_positive: Tensor,
    gamma_negative: Tensor,
    threshold: float | Tensor,
    negative_loss: NegativeLoss = "softplus",
) -> Tensor:
    """Return the loss of one layer, the mean over the 2B rows of softplus(θ−G⁺−γ⁺) and softplus(G⁻+γ⁻−θ).

    γ changes how much an example counts and never in which direction it pulls: with p = σ(G+γ−θ), ∂L/∂G is −(1−p⁺) of a
    positive and p⁻ of a negative, over 2B. With γ = 0 it is Forward-Forward's loss, bit for bit.

    Args:
        goodness_positive: G⁺, shape ``(B,)``.
        goodness_negative: G⁻, shape ``(B,)``.
        gamma_positive: γ⁺ of the positives, shape ``(B,)``; its graph is not followed.
        gamma_negative: γ⁻ of these very negatives, shape ``(B,)``; its graph is not followed.
        threshold: θ; its graph is not followed.
        negative_loss: ``"softplus"``: as above; ``"log_p"``: a negative descends log p instead, as pseudo-code of the paper
            has it by one reading: the loss is then log p⁻, without a lower bound, and weighs a negative by 1−p⁻.

    Returns:
        A scalar.
    """
    positive = goodness_positive + gamma_positive.detach()
    negative = goodness_negative + gamma_negative.detach()
    theta = threshold.detach() if isinstance(threshold, Tensor) else threshold
    if negative_loss == "softplus":
        return -F.logsigmoid(torch.cat([positive - theta, theta - negative])).mean()
    return torch.cat([-F.logsigmoid(positive - theta), F.logsigmoid(negative - theta)]).mean()


def threshold(
    index: int,
    sizes: Sequence[int],
    gamma: Gamma,
    kind: Literal["scaled", "fixed"] = "scaled",
    theta: float = 1.0,
) -> float:
    """Return θ_l of layer ``index``: ``theta`` for every entry of the layers in its sum, or of the layer alone.

    The sum of goodness grows with the layers in it, so its threshold must, too (``scaled``); the paper does not say how it
    was chosen.

    Args:
        index: l, from 0.
        sizes: n_1 … n_L.
        gamma: which layers γ_l sums.
        kind: ``"scaled"``: θ_l = theta · (n_l + Σ n_t of the layers in γ_l); ``"fixed"``: theta · n_l.
        theta: goodness per entry at which a sample is undecided.
    """
    if kind == "fixed":
        return theta * sizes[index]
    return theta * sum(sizes if gamma == "all" else sizes[: index + 1])


def midpoint(score_positive: Tensor, score_negative: Tensor) -> Tensor:
    """Return the threshold that moves with the scores, halfway between the means of G⁺+γ⁺ and G⁻+γ⁻, without a graph.

    From a public re-implementation; it answers how θ grows with depth by looking.
    """
    return (0.5 * (score_positive.mean() + score_negative.mean())).detach()


def contributions(goodness: Tensor, labels: Tensor) -> Contributions:
    """Return what every layer adds to the argmax of the summed goodness.

    Args:
        goodness: of every sample with every label in every layer, shape ``(N, C, L)``, larger for right labels.
        labels: true class ids, shape ``(N,)``.
    """

    def accuracy(scores: Tensor) -> Tensor:
        return (scores.argmax(1) == labels).double().mean()

    layers = goodness.unbind(2)
    together = accuracy(sum(layers, torch.zeros_like(layers[0])))
    alone = torch.stack([accuracy(layer) for layer in layers])
    without = [
        accuracy(sum((one for i, one in enumerate(layers) if i != left), torch.zeros_like(layers[0])))
        for left in range(len(layers))
    ]
    gained = together - torch.stack(without) if len(layers) > 1 else together.unsqueeze(0)
    return Contributions(alone, gained, together)


def update_flops(widths: Sequence[int], gamma: Gamma = "previous", order: Order = "jacobi") -> int:
    """Return the FLOPs of one update per sample, that is per pair, of a fully connected network, with P = Σ d_{i-1} d_i.

    Forward-Forward's 8P; where γ sums all layers, 4P more for a pass that shows the goodness of later layers before the
    first one learns. Gauss–Seidel makes the pass anew for every layer: 4P·L more in all with ``all``; with ``previous`` the
    layers below are run anew.

    Args:
        widths: d_0 … d_L, input width first.
        gamma: which layers γ sums.
        order: ``"jacobi"``: one pass; ``"gauss_seidel"``: one before every layer's step.
    """
    weights = weight_count(widths)
    if order == "jacobi":
        return ff.update_flops(widths) + (4 * weights if gamma == "all" else 0)
    layers = len(widths) - 1
    parts = [before * after for before, after in pairwise(widths)]
    if gamma == "all":
        return 4 * layers * weights + ff.update_flops(widths)
    return 4 * sum((layers - i) * part for i, part in enumerate(parts)) + 4 * weights
