"""Which units stand for a class: the leave-one-out rule, sizes and overlaps, and maps of activity."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def class_means(activations: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean activation of every unit on every class, ``(C, d)`` in double precision.

    Args:
        activations: shape ``(N, ...)``; every entry of a feature map is a unit.
        labels: class ids, shape ``(N,)``, int64.
        classes: C; the row of a class without samples is ``nan``.
    """
    flat = activations.flatten(1).double()
    counts = torch.bincount(labels, minlength=classes).to(flat.device)
    sums = flat.new_zeros(classes, flat.shape[1]).index_add_(0, labels.to(flat.device), flat)
    return sums / counts.unsqueeze(1)


def ensembles(means: Tensor, tau: float = 1.0) -> Tensor:
    """Return which units belong to the ensemble of every class, by the leave-one-out rule.

    Unit i belongs to the ensemble of a class if its mean activation m_i on that class exceeds the mean of the other units'
    by more than tau times: (m_i − m̄_{−i}) / m̄_{−i} > τ. The rule that was published with the paper was not to be had; its
    notebooks use τ = 1 and τ = 2, so τ belongs beside every figure.

    Args:
        means: mean activation of every unit on every class, not negative (post-ReLU), shape ``(C, d)``. Where all other
            units are silent, any activity makes a member; a class whose units are all silent, or unknown (``nan``), has none.
        tau: τ, at least 0.

    Returns:
        Membership, bool, shape ``(C, d)``.

    Raises:
        ValueError: fewer than two units, a negative mean (take means of magnitudes) or a negative τ.

    Source: Tosato et al., arXiv 2305.18353, by the numbers of its published code.
    """
    if means.ndim != 2 or means.shape[1] < 2:
        raise ValueError(
            f"means of shape {tuple(means.shape)} were given, expected (classes, units) with at least 2 units"
        )
    if not tau >= 0:
        raise ValueError(f"tau is {tau}, expected a number of at least 0")
    if (means < 0).any():
        raise ValueError("means are negative, where the rule compares ratios: give means of magnitudes, |h|")
    means = means.double()
    others = (means.sum(1, keepdim=True) - means) / (means.shape[1] - 1)
    return means > (1 + tau) * others.clamp_min(0)  # a difference of sums may be a rounding error below 0


def overlaps(members: Tensor) -> Tensor:
    """Return how many units every two ensembles share, ``(C, C)`` int64; the diagonal holds their sizes.

    Args:
        members: bool, shape ``(C, d)``.
    """
    counted = members.double()
    return (counted @ counted.T).round().long()


def jaccard(members: Tensor) -> Tensor:
    """Return |A ∩ B| / |A ∪ B| of every two ensembles, ``(C, C)``; ``nan`` for two empty ones.

    Args:
        members: bool, shape ``(C, d)``.
    """
    both = overlaps(members).double()
    sizes = both.diagonal()
    return both / (sizes[:, None] + sizes[None, :] - both)


class Sharing(NamedTuple):
    """Units by the number of ensembles that they belong to.

    Attributes:
        unique: how many units of every class's ensemble belong to no other, ``(C,)`` int64.
        shared: how many units belong to two ensembles or more.
        unassigned: how many units belong to none.
    """

    unique: Tensor
    shared: int
    unassigned: int


def sharing(members: Tensor) -> Sharing:
    """Return which units stand for one class alone.

    Args:
        members: bool, shape ``(C, d)``.
    """
    times = members.sum(0)
    return Sharing((members & (times == 1)).sum(1), int((times > 1).sum()), int((times == 0).sum()))


class ActivationMap(NamedTuple):
    """Samples, sorted by class, against units.

    Attributes:
        values: activations, ``(n, units)``.
        labels: class of every row, rising, ``(n,)``.
        rows: position of every row among the samples given, ``(n,)``.
        units: position of every column among the units, rising, ``(units,)``.
    """

    values: Tensor
    labels: Tensor
    rows: Tensor
    units: Tensor


def activation_map(
    activations: Tensor, labels: Tensor, per_class: int | None = None, units: int | None = None
) -> ActivationMap:
    """Sort samples by class, as they came within each, and thin out what is too much to look at.

    Args:
        activations: shape ``(N, ...)``.
        labels: class ids, shape ``(N,)``, int64.
        per_class: the first so many samples of every class; ``None``: all.
        units: so many units, evenly spread over the layer; ``None``: all.
    """
    order = labels.argsort(stable=True)
    if per_class is not None:
        taken = [order[labels[order] == c][:per_class] for c in sorted(set(labels.tolist()))]
        order = torch.cat(taken) if taken else order
    flat = activations.flatten(1)
    columns = spread(flat.shape[1], units).to(flat.device)
    return ActivationMap(flat[order.to(flat.device)][:, columns], labels[order], order, columns)


def spread(count: int, most: int | None) -> Tensor:
    """Positions of at most ``most`` of ``count`` things, evenly spread, int64."""
    if most is None or count <= most:
        return torch.arange(count)
    return (torch.arange(most) * count) // most


class Activity(NamedTuple):
    """How much of a layer is ever used.

    Attributes:
        maximum: largest magnitude of any unit on any sample.
        never_active: share of the units that are zero on every sample.
    """

    maximum: float
    never_active: float


def activity(activations: Tensor) -> Activity:
    """Return the largest activation of a layer, and the share of its units that are never active.

    Args:
        activations: shape ``(N, ...)`` with at least one sample.
    """
    largest = activations.detach().flatten(1).abs().amax(0)
    return Activity(float(largest.max()), float((largest == 0).double().mean()))
