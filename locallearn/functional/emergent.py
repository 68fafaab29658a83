"""Equations of Forward-Forward with a norm as goodness, and of backpropagation on the same objective.

Source: N. Tosato, L. Basile, E. Ballarin, G. de Alteriis, A. Cazzaniga, A. Ansuini, "Emergent representations in networks
trained with the Forward-Forward algorithm", arXiv 2305.18353, and the numbers that its published code gives.

Symbols: B samples, C classes, L layers, h_l the activations of layer l, g_l the goodness of layer l, θ threshold, σ the
logistic function; ⁺ positive data, ⁻ negative data. The loss has the form of Hinton's, so it is
`locallearn.functional.forward_forward.loss`, the mean over all 2B rows of softplus(θ−g⁺) and softplus(g⁻−θ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from locallearn.functional._lengths import at_least_single
from locallearn.functional._lengths import unit_normalise as unit_normalise
from locallearn.functional._widths import weight_count
from locallearn.functional.forward_forward import rms_normalise

Goodness = Literal["squares", "norm", "l1"]
Normalise = Literal["rms", "unit"]


def check_kind(kind: str) -> None:
    """Refuse a goodness that there is not.

    Raises:
        ValueError: an unknown name.
    """
    if kind not in get_args(Goodness):
        raise ValueError(
            f"goodness is {kind!r}, expected 'squares' (sum of squares), 'norm' (Euclidean length) or 'l1'"
        )


def check_scale(kind: str) -> None:
    """Refuse a normalisation that there is not.

    Raises:
        ValueError: an unknown name.
    """
    if kind not in get_args(Normalise):
        raise ValueError(f"normalise is {kind!r}, expected 'rms' (root mean square 1) or 'unit' (length 1)")


def goodness(x: Tensor, kind: Goodness = "norm") -> Tensor:
    """Return the goodness of every sample over all its entries.

    ``squares``: Σ h², Hinton's. ``norm``: ‖h‖₂, that of the paper: its derivative h/‖h‖ has unit length, so a loud sample
    teaches no louder than a quiet one. ``l1``: Σ |h|. A sample of zeros has goodness 0 and derivative 0.

    Args:
        x: activations h before normalisation, shape ``(B, ...)``.
        kind: which of the three.

    Returns:
        Shape ``(B,)``, in at least single precision.

    Raises:
        ValueError: an unknown kind.
    """
    check_kind(kind)
    flat = x.flatten(1).to(at_least_single(x))
    if kind == "squares":
        return flat.square().sum(1)
    length: Tensor = torch.linalg.vector_norm(flat, ord=2 if kind == "norm" else 1, dim=1)
    return length


def summed_goodness(outputs: Sequence[Tensor], kind: Goodness = "norm") -> Tensor:
    """Return Σ_l g_l, what backpropagation on Forward-Forward's objective compares with θ.

    Args:
        outputs: activations of the layers before normalisation, each ``(B, ...)``; with one layer this is Forward-Forward's
            own goodness.
        kind: see `goodness`.

    Returns:
        Shape ``(B,)``.

    Raises:
        ValueError: no layer, or an unknown kind.
    """
    if not outputs:
        raise ValueError("there is no layer whose goodness could be summed: give the outputs of at least one.")
    return torch.stack([goodness(output, kind) for output in outputs]).sum(0)


def normalise(x: Tensor, kind: Normalise = "unit") -> Tensor:
    """Take the goodness out of a layer's output, so that the next one sees the pattern alone.

    Args:
        x: shape ``(B, ...)``.
        kind: ``"unit"``: Euclidean length 1, the paper's, see `unit_normalise`; ``"rms"``: root mean square 1, Hinton's, see
            `locallearn.functional.forward_forward.rms_normalise`.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: an unknown kind.
    """
    check_scale(kind)
    return unit_normalise(x) if kind == "unit" else rms_normalise(x)


def undecided(entries: int, kind: Goodness = "norm") -> float:
    """Return the goodness of an output that is 1 everywhere: n of squares and of l1, sqrt(n) of the norm.

    Args:
        entries: n, per sample.
        kind: see `goodness`.

    Raises:
        ValueError: an unknown kind.
    """
    check_kind(kind)
    return math.sqrt(entries) if kind == "norm" else float(entries)


def vote(goodness: Tensor) -> Tensor:
    """Return class scores: in every layer a softmax of the goodness over the candidate labels, summed over layers.

    The largest score is at the same label as that of the summed goodness where there is one layer; with several, a layer
    that is loud for all labels has no more to say than a quiet one.

    Args:
        goodness: g of every sample, candidate label and layer, shape ``(B, C, L)``.

    Returns:
        Shape ``(B, C)``; every row sums to L.
    """
    return goodness.softmax(1).sum(2)


def embed_label_in_channels(x: Tensor, labels: Tensor, classes: int, strength: float = 1.0) -> Tensor:
    """Overwrite the first C pixels of the first row with the one-hot label, in every channel.

    Where there is one channel this is `locallearn.functional.forward_forward.embed_label`, which writes into the first
    channel alone.

    Args:
        x: images, shape ``(B, channels, H, W)`` with W of at least C.
        labels: class ids, shape ``(B,)``, int64, each in ``[0, C)``.
        classes: C.
        strength: value of the label's pixel; the others are 0. The paper's code takes the largest value of the *batch*,
            which makes a prediction depend on its batch-mates: take that of the training data.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: the inputs are no images, or narrower than C.
    """
    if x.ndim != 4 or x.shape[3] < classes:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)} have no row of {classes} pixels for the label: give (B, channels, H, W) with W "
            f"of at least {classes}."
        )
    marked = x.clone()
    slots = x.new_zeros(len(x), classes).scatter_(1, labels.unsqueeze(1), strength)
    marked[:, :, 0, :classes] = slots.unsqueeze(1)
    return marked


def static_negatives(labels: Tensor, classes: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw as many negatives as there are samples, once for the whole training, from all their wrong-label copies.

    Every sample has C − 1 copies with a wrong label each; N of these N(C−1) are drawn without replacement. So one image
    may be among the negatives several times with different labels and another one not at all, and a negative stands
    beside the positive of another image (unpaired).

    Args:
        labels: true class ids of the training set, shape ``(N,)``, int64, each in ``[0, C)``.
        classes: C.
        generator: the only source of randomness; it may live on another device than the labels.

    Returns:
        Positions of the images in the training set, and their wrong labels, both ``(N,)``, int64, on the labels' device.

    Raises:
        ValueError: fewer than two classes, so that no label is wrong.
    """
    if classes < 2:
        raise ValueError(f"classes={classes} leaves no wrong label to draw: negative data needs at least 2 classes.")
    copies = len(labels) * (classes - 1)
    drawn = torch.randperm(copies, generator=generator, device=generator.device)[: len(labels)].to(labels.device)
    source, other = drawn // (classes - 1), drawn % (classes - 1)
    return source, other + (other >= labels[source])


def penalised_activity(outputs: Sequence[Tensor]) -> Tensor:
    """Return Σ_l ‖h_l‖₁ as a mean over samples: what "regularised" backpropagation adds to its loss, times λ.

    Args:
        outputs: activations of the layers, each ``(B, ...)``.

    Returns:
        A scalar.

    Raises:
        ValueError: no layer.
    """
    return summed_goodness(outputs, "l1").mean()


def update_flops(widths: Sequence[int]) -> int:
    """Return the FLOPs of one update of backpropagation on this objective, per pair of a positive and a negative.

    With P = Σ d_{l-1} d_l, P₁ = d_0 d_1: forward, weight gradients, and gradients of the activations of all layers but the
    input, each for two rows: 12P − 4P₁. Forward-Forward needs 8P.

    Args:
        widths: d_0 … d_L of a fully connected network, input width first.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    return 12 * weight_count(widths) - 4 * widths[0] * widths[1]
