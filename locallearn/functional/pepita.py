"""Equations of PEPITA: the output error changes the input, and every layer learns from how its activity then differs.

Sources: [D22] G. Dellaferrera, G. Kreiman, "Error-driven Input Modulation", ICML 2022, arXiv 2201.11665; [S24]
R. Srinivasan et al., "Forward Learning with Top-Down Feedback", ICLR 2024, arXiv 2302.05440; and the codes of both, which
the equations follow.

Symbols: N samples, K classes, d_0 entries of one input, x inputs, h_l the activity of layer l in the first pass, h̃_l that
in the second pass (h_0 = x, h̃_0 = x̃), e = h_L − y the error of the softmax, F (d_0, K) the feedback.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import grad

from locallearn.functional._angles import angle as angle
from locallearn.functional._widths import weight_count

Reduction = Literal["sum", "mean", "code"]


def feedback_matrix(inputs: int, classes: int, scale: float = 0.05, generator: Generator | None = None) -> Tensor:
    """Draw F from U(−b, b) with b = scale·√(6/d_0).

    Args:
        inputs: d_0.
        classes: K.
        scale: 0.05 in D22.
        generator: of the draw; ``None``: PyTorch's own.

    Returns:
        F, shape ``(d_0, K)``.
    """
    bound = scale * math.sqrt(6.0 / inputs)
    return torch.empty(inputs, classes).uniform_(-bound, bound, generator=generator)


def modulate(inputs: Tensor, error: Tensor, feedback: Tensor, sign: float = -1.0) -> Tensor:
    """Return the input of the second pass, x̃ = x + sign · e Fᵀ.

    Args:
        inputs: x, shape ``(N, ...)`` with d_0 entries per sample.
        error: e, shape ``(N, K)``.
        feedback: F, shape ``(d_0, K)``.
        sign: −1 as in S24, or +1 as in D22's fully connected networks.

    Returns:
        x̃, a new tensor with the shape of ``inputs``.

    Raises:
        ValueError: ``feedback`` does not map this error to these inputs.
    """
    flat = inputs.flatten(1)
    if feedback.shape != (flat.shape[1], error.shape[1]):
        raise ValueError(
            f"feedback of shape {tuple(feedback.shape)} cannot map an error of {error.shape[1]} classes to inputs of "
            f"{flat.shape[1]} entries: draw it with feedback_matrix({flat.shape[1]}, {error.shape[1]})."
        )
    return torch.addmm(flat, error, feedback.T, alpha=sign).view(inputs.shape)


def normalise(activity: Tensor) -> Tensor:
    """Divide by the Frobenius norm of the whole batch, h ← h / ‖h‖ (S24); a batch of zeros stays zero.

    The scale of one sample therefore depends on the others and on N, at inference as well.

    Args:
        activity: h, shape ``(N, ...)``.

    Returns:
        Same shape and dtype; the norm is taken in at least single precision.
    """
    norm = torch.linalg.vector_norm(activity, dtype=torch.promote_types(activity.dtype, torch.float32))
    return (activity / torch.where(norm > 0, norm, 1.0)).to(activity.dtype)


class Mask(NamedTuple):
    """Dropout of one layer, for several passes.

    Args:
        dropped: true where an activity becomes zero; a byte per activity.
        factor: 1/(1 − share of these), so that masked activities keep their mean.
    """

    dropped: Tensor
    factor: float

    def apply_(self, activity: Tensor) -> Tensor:
        """Drop and scale an activity of the mask's shape, in place."""
        return activity.masked_fill_(self.dropped, 0.0).mul_(self.factor)


def dropout_mask(shape: Sequence[int], dropout: float, generator: Generator) -> Mask:
    """Draw a mask.

    The share is rounded to a multiple of 2⁻¹⁶, and the factor goes with it: four entries come from one random number,
    which on a CPU takes a fifth of the time of as many draws.

    Args:
        shape: of the mask.
        dropout: share of zeros, in (0, 1).
        generator: the only source of randomness; its device is the mask's.
    """
    kept = min(max(round((1.0 - dropout) * 2**16), 1), 2**16 - 1)
    entries = math.prod(shape)
    draws = torch.empty(-(-entries // 4), dtype=torch.int64, device=generator.device)
    lots = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:entries]
    return Mask((lots >= kept - 2**15).view(*shape), 2**16 / kept)


def correlation(post: Tensor, pre: Tensor) -> Tensor:
    """Return postᵀ pre / N: what a fully connected layer's step is made of.

    The rules are sums of it: standard (h − h̃)ᵀ h̃₋₁, Hebbian hᵀ h₋₁ − h̃ᵀ h̃₋₁, where ₋₁ is the layer below.

    Args:
        post: shape ``(N, d)``.
        pre: shape ``(N, d_in)``.

    Returns:
        Shape ``(d, d_in)``, that of the layer's weight.
    """
    return (post / len(post)).T @ pre


def conv_correlation(
    post: Tensor,
    pre: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    reduction: Reduction = "sum",
) -> Tensor:
    """Return Σ_{n,p} post[n,k,p] · patch(pre)[n,c,i,j,p] / N, the same for a convolution at all of its positions p.

    Args:
        post: shape ``(N, C_out, H', W')``, before pooling.
        pre: what the convolution read, shape ``(N, C_in, H, W)``.
        kernel_size: ``(height, width)``.
        stride: of the convolution; so are ``padding`` (zeros), ``dilation`` and ``groups``.
        padding: see ``stride``.
        dilation: see ``stride``.
        groups: see ``stride``.
        reduction: over positions, ``"sum"`` as in S24 or ``"mean"`` as in D22. ``"code"``: what D22's code does with
            convolutions, the mean divided by N once more, and with the opposite sign. There, h̃ is that of x + e Fᵀ, so
            that to first order in F the filters learn as with x − e Fᵀ and the plain sign.

    Returns:
        Shape ``(C_out, C_in / groups, *kernel_size)``, that of the convolution's weight.
    """
    shape = (post.shape[1], pre.shape[1] // groups, *kernel_size)
    total: Tensor = grad.conv2d_weight(pre, shape, post, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
    return total.mul_(_share(post, reduction))


def bias_correlation(post: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Return the step of the biases: the correlation of the post-synaptic term with an input that is always 1.

    The papers' networks have no biases; this is an extension.

    Args:
        post: shape ``(N, d)`` or ``(N, C_out, H', W')``.
        reduction: over positions, as in `conv_correlation`.

    Returns:
        Shape ``(d,)`` or ``(C_out,)``.
    """
    return post.mean(0) if post.ndim == 2 else post.sum((0, 2, 3)) * _share(post, reduction)


def _share(post: Tensor, reduction: Reduction) -> float:
    """What a sum over the samples and positions of a map is multiplied with."""
    samples, positions = len(post), post[0, 0].numel()
    if reduction == "sum":
        return 1.0 / samples
    return 1.0 / (samples * positions) if reduction == "mean" else -1.0 / (samples * positions * samples)


def mirror_matrices(widths: Sequence[int], scale: float = 0.05, generator: Generator | None = None) -> list[Tensor]:
    """Draw the factors of F = B_1 … B_L for weight mirroring, every one from N(0, s²).

    s = (scale·√(2/d_0) / √(d_1 … d_{L−1}))^{1/L} gives the entries of F the deviation that `feedback_matrix` gives them.

    Args:
        widths: d_0 … d_L, the number of classes last.
        scale: as in `feedback_matrix`.
        generator: of the draws; ``None``: PyTorch's own.

    Returns:
        B_l, shape ``(d_{l−1}, d_l)`` each.
    """
    layers = len(widths) - 1
    deviation = (scale * math.sqrt(2.0 / widths[0]) / math.sqrt(math.prod(widths[1:-1]))) ** (1.0 / layers)
    return [deviation * torch.randn(before, after, generator=generator) for before, after in pairwise(widths)]


def mirror_step(mirror: Tensor, noise: Tensor, response: Tensor, lr: float = 0.1, decay: float = 0.5) -> Tensor:
    """Return B + η ξᵀζ/N − η λ B: noise sent through a layer makes its mirror align with the transposed weights.

    Args:
        mirror: B, shape ``(d_in, d)``.
        noise: ξ, what the layer was given, shape ``(N, d_in)``.
        response: ζ, what it made of it, shape ``(N, d)``.
        lr: η.
        decay: λ.
    """
    return (1.0 - lr * decay) * mirror + lr * correlation(noise, response)


def compose(mirrors: Sequence[Tensor], deviation: float) -> tuple[Tensor, float]:
    """Return F = B_1 … B_L with entries of a given standard deviation, and the factor that every B was given for it.

    Args:
        mirrors: B_1 … B_L.
        deviation: wanted of F; ``scale·√(2/d_0)``.

    Returns:
        F, shape ``(d_0, K)``, and the factor c, for which F = (c B_1) … (c B_L).
    """
    product = mirrors[-1]
    for mirror in reversed(mirrors[:-1]):
        product = mirror @ product
    factor = deviation / float(product.float().std())
    return factor * product, factor ** (1.0 / len(mirrors))


def update_flops(
    widths: Sequence[int],
    classes: int,
    output_error: Literal["first", "second"] = "first",
    products: Literal[1, 2] = 1,
) -> int:
    """Return the FLOPs of one update per sample of a fully connected network.

    With P = Σ d_{i-1} d_i over all layers, the output layer included: both forward passes cost 2·2P, the second one
    without its output layer unless its error is asked for (−2 d_L K); the steps cost 2P for every product they are made
    of; e Fᵀ costs 2 d_0 K. Backprop on the same layers costs 6P − 2 d_0 d_1.

    Args:
        widths: d_0 … of all hidden layers, the input width first.
        classes: K.
        output_error: whose error trains the output layer.
        products: 1 of the standard rule, 2 of the Hebbian and the time-local one.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    out = widths[-1] * classes
    weights = weight_count(widths) + out
    return (4 + 2 * products) * weights - (2 * out if output_error == "first" else 0) + 2 * widths[0] * classes
