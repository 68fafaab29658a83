"""Equations of counter-current learning: a network from the labels meets the network from the data at every layer.

Source: C.-H. Kao, B. Hariharan, "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep
Learning", NeurIPS 2024, arXiv 2409.19841, and the code that goes with it (github IandRover/CCL-NeurIPS24). Where the two
differ, the defaults are those of the code, which gave the published numbers.

Symbols: N samples, K classes, d entries of one activation, a (N, d) an activation of the forward network, b (K, d) the
activation of the feedback network at the same place, one row per class, M (N, K) which row belongs to which class,
x̂ a row scaled to length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.functional._lengths import at_least_single, unit_normalise
from locallearn.functional._widths import weight_count

REFERENCE_WIDTH = 256
"""Width at which `pair_loss` has the factor c: that of the paper's MNIST network."""


class Gradients(NamedTuple):
    """What the two sides of one pair learn from.

    Attributes:
        activations: ∂L/∂a, shape ``(N, d)``.
        signals: ∂L/∂b, shape ``(K, d)``.
        loss: L, a scalar.
    """

    activations: Tensor
    signals: Tensor
    loss: Tensor


def class_matches(targets: Tensor, classes: int) -> Tensor:
    """Return M, which sample is of which class, M_nk = [y_n = k].

    Args:
        targets: class ids y, shape ``(N,)``, int64, each in ``[0, classes)``.
        classes: K.

    Returns:
        Shape ``(N, K)``, float32.
    """
    return F.one_hot(targets, classes).float()


def normalise(x: Tensor) -> Tensor:
    """Scale every sample to length 1 over all its entries; a sample of zeros stays zero.

    The code adds 1e-8 to the length instead, with which the derivative at zero is 1e8.

    Args:
        x: shape ``(N, ...)``.

    Returns:
        Shape ``(N, d)``, same dtype; the length is computed in at least single precision.
    """
    return unit_normalise(x.flatten(1))


def pair_loss(activations: Tensor, signals: Tensor, matches: Tensor, c: float = 0.5) -> Tensor:
    """Return the loss of one pair of a fully connected network, L = (256·c/d) · mean_nk (a bᵀ − M)².

    Args:
        activations: a, shape ``(N, ...)``, flattened to d entries per sample.
        signals: b, shape ``(K, ...)``, flattened to as many.
        matches: M, shape ``(N, K)``.
        c: factor, 0.5 in the code.

    Returns:
        A scalar, in at least single precision.

    Raises:
        ValueError: shapes that do not fit.
    """
    a, b = _flat_pair(activations, signals, matches)
    return REFERENCE_WIDTH * c / a.shape[1] * _mean_square(a @ b.T, matches)


def pair_gradients(activations: Tensor, signals: Tensor, matches: Tensor, c: float = 0.5) -> Gradients:
    """Return the closed-form gradients of `pair_loss`; autograd is not used.

    With C = a bᵀ − M and γ = 512·c/(d·N·K): ∂L/∂a = γ C b, ∂L/∂b = γ Cᵀ a. Each goes through one layer and no further.

    Args:
        activations: a, shape ``(N, ...)``, flattened to d entries per sample.
        signals: b, shape ``(K, ...)``, flattened to as many.
        matches: M, shape ``(N, K)``.
        c: factor.

    Raises:
        ValueError: shapes that do not fit.
    """
    with torch.no_grad():
        a, b = _flat_pair(activations, signals, matches)
        difference = a @ b.T - matches
        gamma = 2 * REFERENCE_WIDTH * c / (a.shape[1] * difference.numel())
        return Gradients(
            activations=gamma * difference @ b,
            signals=gamma * difference.T @ a,
            loss=REFERENCE_WIDTH * c / a.shape[1] * difference.square().mean(),
        )


def normalised_pair_loss(activations: Tensor, signals: Tensor, matches: Tensor, c: float = 1.0) -> Tensor:
    """Return the loss of one pair of a convolutional network without its Gram terms, L = c · mean_nk (â b̂ᵀ − M)².

    Args:
        activations: a, shape ``(N, ...)``, flattened to d entries per sample.
        signals: b, shape ``(K, ...)``, flattened to as many.
        matches: M, shape ``(N, K)``.
        c: factor, 1 in the code.

    Returns:
        A scalar, in at least single precision.

    Raises:
        ValueError: shapes that do not fit.
    """
    a, b = _flat_pair(activations, signals, matches)
    return c * _mean_square(normalise(a) @ normalise(b).T, matches)


def gram_loss(x: Tensor) -> Tensor:
    """Return how alike different rows are, mean (x̂ x̂ᵀ − I)²; it keeps the rows of one activation apart.

    Args:
        x: shape ``(N, ...)``, flattened per row.

    Returns:
        A scalar, in at least single precision.
    """
    unit = normalise(x)
    return _mean_square(unit @ unit.T, torch.eye(len(unit), device=x.device))


def map_loss(activations: Tensor, signals: Tensor, c: float = 1.0) -> Tensor:
    """Return the loss at an end of an autoencoder, L = c · h · mean (a − b)².

    Args:
        activations: a, shape ``(N, C, h, w)``.
        signals: b, the same shape; there is one row per sample, because the target is an image of its own.
        c: factor, 1 in the code.

    Returns:
        A scalar, in at least single precision.

    Raises:
        ValueError: not two maps of one shape.
    """
    if activations.shape != signals.shape or activations.ndim != 4:
        raise ValueError(
            f"activations of shape {tuple(activations.shape)} and signals of shape {tuple(signals.shape)} are no pair: "
            "give two maps of the same shape (N, C, H, W)."
        )
    return c * activations.shape[2] * _mean_square(activations, signals)


def centred_map_loss(activations: Tensor, signals: Tensor, c: float = 1.0) -> Tensor:
    """Return the loss of a hidden pair of an autoencoder, L = c · h · (mean (a − b)² + mean (ã − b̃)²).

    The tilde takes the spatial mean out of every channel and scales what is left to length 1; zeros stay zero.

    Args:
        activations: a, shape ``(N, C, h, w)``.
        signals: b, the same shape.
        c: factor, 1 in the code.

    Returns:
        A scalar, in at least single precision.

    Raises:
        ValueError: not two maps of one shape.
    """
    plain = map_loss(activations, signals, c)
    return plain + map_loss(_centred(activations), _centred(signals), c)


def unlearned(logits: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Return which samples are still to be learned, p(true class) ≤ threshold; flooding drops the others.

    Args:
        logits: shape ``(N, K)``.
        targets: class ids, shape ``(N,)``, int64.
        threshold: in (0, 1); the code has 0.9.

    Returns:
        Shape ``(N,)``, bool.
    """
    probability = logits.to(at_least_single(logits)).softmax(1).gather(1, targets[:, None])
    return probability[:, 0] <= threshold


def drop_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Return ``x`` with zeros in every row that is not kept; such a row stays in the losses as a constant.

    Args:
        x: shape ``(N, ...)``.
        keep: shape ``(N,)``, bool.
    """
    return x * keep.view(-1, *[1] * (x.ndim - 1))


def centralise(gradient: Tensor) -> Tensor:
    """Take the mean over all dimensions but the first out of a weight's gradient.

    What has one entry per output (a bias, the lengths of weight normalisation) stays as it is: nothing would be left.

    Args:
        gradient: shape ``(outputs, ...)``.
    """
    if gradient.ndim < 2 or gradient[0].numel() == 1:
        return gradient
    return gradient - gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)


def gradient_norm(gradient: Tensor) -> Tensor:
    """Return the L2 norm over all entries of any shape, a scalar in at least single precision."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=at_least_single(gradient))
    return norm


def clip_factor(norms: Sequence[Tensor], limit: float) -> Tensor:
    """Return min(1, limit / (‖g‖ + 1e-6)), what `torch.nn.utils.clip_grad_norm_` multiplies gradients with.

    Args:
        norms: L2 norms, scalars, of the gradients of one network's parameters; ‖g‖ is that of all of them together.
        limit: largest norm allowed.

    Returns:
        A scalar.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def update_flops(widths: Sequence[int], classes: int, samples: int, frozen: bool = False) -> float:
    """Return the FLOPs of one update per sample of a fully connected network, unnormalised loss, no flooding.

    With P = Σ d_{l-1} d_l, the output layer included: forward pass and weight gradients cost 4P. The feedback network
    runs K rows for N samples: once for all signals but the last, once more inside the update of every pair, and its
    weight gradients: (6P − 2 d_0 d_1) K/N. The pairs cost 6K Σ_{l≥1} d_l + 4K d_0. The second run of the feedback
    network, (2P − 2 d_0 d_1) K/N, buys that one pair's graph at a time is alive.

    Args:
        widths: d_0 … d_L of the network, input width first, output layer left out.
        classes: K.
        samples: N, the batch size.
        frozen: the feedback network does not learn: no second run, no gradients of it, no pair at the input.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    weights = weight_count(widths) + classes * widths[-1]
    first, hidden = widths[0] * widths[1], sum(widths[1:])
    if frozen:
        return 4 * weights + 2 * (weights - first) * classes / samples + 4 * classes * hidden
    return 4 * weights + (6 * weights - 2 * first) * classes / samples + classes * (6 * hidden + 4 * widths[0])


def _mean_square(x: Tensor, target: Tensor) -> Tensor:
    x = x.to(at_least_single(x))
    return F.mse_loss(x, target.to(x.dtype))  # one kernel each way instead of three


def _centred(x: Tensor) -> Tensor:
    x = x.to(at_least_single(x))
    rest = x - x.mean((2, 3), keepdim=True)
    length = torch.linalg.vector_norm(rest, dim=(2, 3), keepdim=True)
    return rest / torch.where(length > 0, length, 1.0)


def _flat_pair(activations: Tensor, signals: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    a, b = activations.flatten(1), signals.flatten(1)
    if a.shape[1] != b.shape[1] or matches.shape != (len(a), len(b)):
        raise ValueError(
            f"activations of shape {tuple(activations.shape)}, signals of shape {tuple(signals.shape)} and matches of "
            f"shape {tuple(matches.shape)} do not fit: give (N, ...), (K, ...) with as many entries per row, and (N, K)."
        )
    return a, b
