"""Equations of Forward-Forward: every layer tells right from wrong data by the length of its own activity.

Source: G. Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", arXiv 2212.13345, and the Matlab
code that goes with it, which settles what the text leaves open.

Symbols: B samples, C classes, n units, x̂ the normalised input of a layer, z = ReLU(x̂ Wᵀ + b) its activations,
G = Σ_j z_j² its goodness, θ threshold, T temperature, σ the logistic function; ⁺ positive data, ⁻ negative data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from locallearn.functional._lengths import at_least_single, divided, lengths
from locallearn.functional._widths import weight_count


class Gradients(NamedTuple):
    """What one layer needs for its step.

    Attributes:
        weight: ∇W, shape ``(n, d_in)``.
        bias: ∇b, shape ``(n,)``.
        loss: L, a scalar.
    """

    weight: Tensor
    bias: Tensor
    loss: Tensor


def rms_normalise(x: Tensor) -> Tensor:
    """Scale every sample to a root mean square of 1 over all its entries, N(a) = a / sqrt(mean a²).

    The next layer then sees the direction of a layer's activity but not its goodness. A sample of zeros stays zero; the
    Matlab code gets the same from adding exp(−50) to the divisor, which would make the derivative there astronomical.

    Args:
        x: shape ``(B, ...)``.

    Returns:
        Same shape and dtype; the root is computed in at least single precision.
    """
    return divided(x, lengths(x) / math.sqrt(x.flatten(1).shape[1]))


def goodness(x: Tensor) -> Tensor:
    """Return the goodness of every sample, G = Σ z² over all its entries.

    Args:
        x: activations z before normalisation, shape ``(B, ...)``.

    Returns:
        Shape ``(B,)``, in at least single precision: near θ = n = 1000, bfloat16 would only resolve steps of 4.
    """
    return x.flatten(1).to(at_least_single(x)).square().sum(1)


def mean_goodness(x: Tensor) -> Tensor:
    """Return the mean of squares over all entries of a sample, G = Σ z² / n: goodness that does not grow with the width.

    Args:
        x: activations z before normalisation, shape ``(B, ...)``.

    Returns:
        Shape ``(B,)``, in at least single precision.
    """
    return x.flatten(1).to(at_least_single(x)).square().mean(1)


def loss(
    goodness_positive: Tensor,
    goodness_negative: Tensor,
    threshold: float,
    temperature: float = 1.0,
    minimise: bool = False,
) -> Tensor:
    """Return the loss of one layer, the mean over all rows of softplus((θ−G⁺)/T) and softplus((G⁻−θ)/T).

    It is the cross-entropy of p(positive) = σ((G−θ)/T), computed so that it stays finite at any goodness.

    Args:
        goodness_positive: G⁺, shape ``(B,)``.
        goodness_negative: G⁻, shape ``(B,)``.
        threshold: θ.
        temperature: T.
        minimise: make positive data quiet instead of loud (min-ssq): G and θ both change sign.

    Returns:
        A scalar.
    """
    sign = -1.0 if minimise else 1.0
    logits = torch.cat([goodness_positive - threshold, threshold - goodness_negative]) * (sign / temperature)
    # Not F.softplus: beyond 20 it cuts to the identity, which costs double precision half its digits.
    return -F.logsigmoid(logits).mean()


def gradients(
    inputs_positive: Tensor,
    inputs_negative: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: float,
    temperature: float = 1.0,
    minimise: bool = False,
) -> Gradients:
    """Return the hand-made gradients of one fully connected ReLU layer; autograd is not used.

    ∇W = −1/(BT) [((1−p⁺) ⊙ z⁺)ᵀ x̂⁺ − (p⁻ ⊙ z⁻)ᵀ x̂⁻], ∇b the same with the rows summed instead of multiplied by x̂.
    These are exact gradients of `loss`: its mean over 2B rows and the 2 of d(z²) cancel to 1/B. The Matlab code drops
    the 2 and divides by B, which is the same number (at T = 1; it leaves out the 1/T).

    Args:
        inputs_positive: x̂⁺, shape ``(B, d_in)``.
        inputs_negative: x̂⁻, shape ``(B, d_in)``.
        weight: W, shape ``(n, d_in)``.
        bias: b, shape ``(n,)``.
        threshold: θ.
        temperature: T.
        minimise: make positive data quiet instead of loud (min-ssq).

    Returns:
        Gradients of the loss, and that loss.
    """
    with torch.no_grad():
        inputs = torch.cat([inputs_positive, inputs_negative])
        z = F.linear(inputs, weight, bias).relu()
        good = goodness(z)
        wanted = torch.ones_like(good)  # +1: this row should be loud
        wanted[len(inputs_positive) :] = -1.0
        wanted = -wanted if minimise else wanted
        logits = wanted * (good - threshold) / temperature
        slope = -wanted * (-logits).sigmoid() / (temperature * len(inputs))  # dL/dG
        delta = 2.0 * slope.unsqueeze(1) * z
        return Gradients(weight=delta.T @ inputs, bias=delta.sum(0), loss=-F.logsigmoid(logits).mean())


def embed_label(x: Tensor, labels: Tensor, classes: int, strength: float = 1.0) -> Tensor:
    """Overwrite the first C entries of every flattened sample with its one-hot label.

    Args:
        x: shape ``(B, ...)``; for images ``(B, channels, H, W)`` the slots are the first pixels of the first channel.
        labels: class ids, shape ``(B,)``, int64, each in ``[0, C)``.
        classes: C.
        strength: value of the label's slot; the others are 0.

    Returns:
        A new tensor of the same shape and dtype; ``x`` is left as it was.

    Raises:
        ValueError: samples have fewer than C entries, or ``labels`` is not one class id per sample.
    """
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit inputs of shape {tuple(x.shape)}: "
            f"give one class id per sample, shape ({x.shape[0]},)."
        )
    return _overwrite(x, x.new_zeros(x.shape[0], classes).scatter_(1, labels.unsqueeze(1), strength))


def embed_neutral(x: Tensor, classes: int, strength: float = 1.0) -> Tensor:
    """Overwrite the first C entries of every flattened sample with strength/C: no label is preferred.

    Args:
        x: shape ``(B, ...)``.
        classes: C.
        strength: sum of the slots, the strength that `embed_label` gives its one.

    Returns:
        A new tensor of the same shape and dtype; ``x`` is left as it was.

    Raises:
        ValueError: samples have fewer than C entries.
    """
    return _overwrite(x, x.new_full((x.shape[0], classes), strength / classes))


def wrong_labels_uniform(labels: Tensor, classes: int, generator: Generator) -> Tensor:
    """Draw for every sample one of its C − 1 wrong labels, all equally likely.

    Args:
        labels: true class ids, shape ``(B,)``, int64, each in ``[0, C)``.
        classes: C.
        generator: the only source of randomness; it may live on another device than the labels.

    Returns:
        Wrong class ids, shape ``(B,)``, int64, on the labels' device.

    Raises:
        ValueError: fewer than two classes, so that no label is wrong.
    """
    if classes < 2:
        raise ValueError(f"classes={classes} leaves no wrong label to draw: negative data needs at least 2 classes.")
    drawn = torch.randint(classes - 1, labels.shape, generator=generator, device=generator.device).to(labels.device)
    return drawn + (drawn >= labels)


def wrong_labels_hard(logits: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Draw for every sample a wrong label with the probability a classifier gives it (hard negatives).

    The draw is from softmax(logits) with the true class ruled out. It adds Gumbel noise and takes the largest, which
    needs neither the probabilities nor the logits on the generator's device.

    Args:
        logits: class scores of a pass with the neutral label, shape ``(B, C)``.
        labels: true class ids, shape ``(B,)``, int64, each in ``[0, C)``.
        generator: the only source of randomness; it may live on another device than the logits.

    Returns:
        Wrong class ids, shape ``(B,)``, int64, on the logits' device.

    Raises:
        ValueError: fewer than two classes, so that no label is wrong.
    """
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} leave no wrong label to draw: "
            "negative data needs at least 2 classes."
        )
    noise = torch.empty(logits.shape, device=generator.device).exponential_(generator=generator).log_().neg_()
    noisy = logits.detach().to(at_least_single(logits)) + noise.to(logits.device)
    return noisy.scatter(1, labels.unsqueeze(1), -math.inf).argmax(1)


def hybrid_masks(count: int, height: int, width: int, blurs: int, generator: Generator) -> Tensor:
    """Draw masks of large blobs: random bits, blurred again and again by [1/4, 1/2, 1/4] both ways, thresholded at 0.5.

    Beyond the border the outermost row or column goes on: with zeros there, a mask would be 0 all around.

    Args:
        count: how many masks.
        height: of an image.
        width: of an image.
        blurs: how often a mask is blurred, down its columns and along its rows; the blobs' size grows with its root.
        generator: the only source of randomness; its device is that of the masks.

    Returns:
        Shape ``(count, height, width)``, bool.

    Raises:
        ValueError: a negative number of blurs.
    """
    if blurs < 0:
        raise ValueError(f"blurs={blurs} must be 0 (single random bits) or above.")
    bits = torch.randint(2, (count, height, width), generator=generator, device=generator.device).float()
    for _ in range(blurs):
        bits = _blurred(_blurred(bits, 1), 2)
    return bits > 0.5


def hybrid_images(images: Tensor, blurs: int, generator: Generator) -> Tensor:
    """Mix every image with another one of the batch: m ⊙ a + (1 − m) ⊙ b, real in the small and false at large.

    The partner b is the next one in a random circle through the batch, so that no image meets itself and every image
    is a partner once. All channels of an image have one mask.

    Args:
        images: a, shape ``(B, C, H, W)``.
        blurs: see `hybrid_masks`.
        generator: the only source of randomness; it may live on another device than the images.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: these are no images, or fewer than two.
    """
    if images.ndim != 4:
        raise ValueError(
            f"inputs of shape {tuple(images.shape)} are no images: hybrids are mixed by masks with a height and a width, so "
            "give (B, channels, height, width)."
        )
    if len(images) < 2:
        raise ValueError("a hybrid is mixed from two different images, and this batch has one: give at least two.")
    circle = torch.randperm(len(images), generator=generator, device=generator.device)
    partner = torch.empty_like(circle)
    partner[circle] = circle.roll(1)
    mask = hybrid_masks(len(images), images.shape[2], images.shape[3], blurs, generator)
    return torch.where(mask.to(images.device).unsqueeze(1), images, images[partner.to(images.device)])


def update_peer_mean(mean: Tensor, activations: Tensor, momentum: float = 0.9) -> Tensor:
    """Return the running mean activity of every unit, m ← 0.9 m + 0.1 mean_B(z⁺).

    Args:
        mean: m, shape ``(n,)``; it starts at 0.5.
        activations: z⁺ of the positive data, shape ``(B, n, ...)``. A unit is an entry of dimension 1: positions of a
            convolutional map share their weights, so they are averaged as further samples of one unit.
        momentum: share of the old mean that is kept.

    Returns:
        The new m, shape ``(n,)``, without a graph.

    Raises:
        ValueError: the activations have another number of units than the mean.
    """
    _check_units(activations, mean)
    batch_mean = activations.detach().transpose(0, 1).flatten(1).mean(1, dtype=mean.dtype)
    return momentum * mean + (1.0 - momentum) * batch_mean


def peer_term(pre_activation: Tensor, mean: Tensor, strength: float) -> Tensor:
    """Return the loss whose gradient pulls every unit's activity towards that of its peers, dead units included.

    Hinton adds λ (mean(m) − m_j) to the ascent signal (1−p⁺) z_j of every positive row, ungated by the ReLU. Here that
    is the surrogate −λ/B Σ_rows Σ_j (mean(m) − m_j) u_j, linear in the pre-activations u, where the ReLU's gate does
    not reach; with m held constant its gradient is Hinton's term at the scale of `loss`. The value itself may be
    negative and means little. Given the ReLU's *output* instead of u, dead units stay dead.

    Args:
        pre_activation: u of the positive data, what the ReLU reads, shape ``(B, n, ...)``; dimension 1 is the unit.
        mean: m, already updated with this batch (the order of the Matlab code), shape ``(n,)``.
        strength: λ, 0.03 in the Matlab code.

    Returns:
        A scalar to add to `loss`.

    Raises:
        ValueError: the pre-activations have another number of units than the mean.
    """
    _check_units(pre_activation, mean)
    pull = (mean.mean() - mean).detach()
    unit_sums = pre_activation.transpose(0, 1).flatten(1).sum(1, dtype=at_least_single(pre_activation))
    return -strength * (pull * unit_sums).sum() / pre_activation.shape[0]


def update_flops(widths: Sequence[int], neutral: bool = False, readout_classes: int = 0) -> int:
    """Return the FLOPs of one update per sample, that is per pair of a positive and a negative.

    With P = Σ d_{i-1} d_i: the forward pass of both costs 2·2P, their weight gradients 2·2P, and no gradient travels to
    a layer's input: 8P. Backprop on the same layers costs 6P − 2 d_0 d_1.

    Args:
        widths: d_0 … d_L of a fully connected network, input width first.
        neutral: add the forward pass with the neutral label, 2P, which hard negatives and the readout need.
        readout_classes: C of a linear softmax readout on the hidden layers from the second on, 0 for none; its forward
            pass and weight gradient add 2·2C Σ_{i≥2} d_i.

    Raises:
        ValueError: ``widths`` names no hidden layer.
    """
    weights = weight_count(widths)
    return (10 if neutral else 8) * weights + 4 * readout_classes * sum(widths[2:])


def _blurred(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)
    return 0.5 * x + 0.25 * (before + after)


def _check_units(x: Tensor, mean: Tensor) -> None:
    if x.shape[1:2] != mean.shape:
        raise ValueError(
            f"activations of shape {tuple(x.shape)} do not fit a running mean of {mean.numel()} units: "
            "dimension 1 must be the unit."
        )


def _overwrite(x: Tensor, slots: Tensor) -> Tensor:
    flat = x.flatten(1)
    if flat.shape[1] < slots.shape[1]:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)} have {flat.shape[1]} entries per sample, too few for the label of "
            f"{slots.shape[1]} classes: pad the inputs or use fewer classes."
        )
    return torch.cat([slots, flat[:, slots.shape[1] :]], dim=1).reshape(x.shape)
