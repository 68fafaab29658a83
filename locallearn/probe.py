"""Linear probes: how much of the labels can be read off every block, by the same yardstick for every algorithm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms.base import Algorithm, selected
from locallearn.batch import Batch
from locallearn.nets.blocks import evaluating

# Penalties that are tried, as multiples of the mean eigenvalue of the features' covariance.
_PENALTIES = torch.logspace(-4, 3, 15, dtype=torch.float64)


def ridge_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """Accuracy of a ridge regression from features onto one-hot labels, fitted in closed form.

    Features are standardised by the training part. The penalty is the one of 15 with the smallest squared error when
    every training sample is left out in turn, which one eigendecomposition gives exactly (Hoerl and Kennard 1970 for
    the regression, Allen 1974 for the error): features outnumber samples in wide blocks, where no fixed penalty is
    fair. With N samples and D features the matrix decomposed is the smaller of D x D and N x N.

    Args:
        train: features to fit on, ``(N, ...)``, flattened here.
        train_labels: class ids ``(N,)``.
        test: features to judge on, ``(M, ...)``. They have no say in the penalty.
        test_labels: class ids ``(M,)``.
        classes: number of classes.

    Returns:
        Share of ``test`` that is classified rightly; ``nan`` where a feature is not finite.
    """
    fit, judge = train.flatten(1).double().cpu(), test.flatten(1).double().cpu()
    if not (torch.isfinite(fit).all() and torch.isfinite(judge).all()):
        return float("nan")
    mean, std = fit.mean(0), fit.std(0, correction=0)
    varies = std > 1e-6 * std.max().clamp_min(1e-12)  # constant features say nothing
    fit, judge = (((part - mean) / std)[:, varies] for part in (fit, judge))
    targets = F.one_hot(train_labels.cpu(), classes).double()
    centre = targets.mean(0)
    targets = targets - centre
    wide = fit.shape[1] > fit.shape[0]
    values, vectors = torch.linalg.eigh(fit @ fit.T if wide else fit.T @ fit)
    values = values.clamp_min(0)
    parts = vectors * values.sqrt() if wide else fit @ vectors  # principal components of the samples
    shrunk = values[:, None] + _penalty(parts, values, targets)
    weight = fit.T @ (vectors @ (vectors.T @ targets / shrunk)) if wide else vectors @ (parts.T @ targets / shrunk)
    scores = judge @ weight + centre
    return float((scores.argmax(1) == test_labels.cpu()).double().mean())


def _penalty(parts: Tensor, values: Tensor, targets: Tensor) -> float:
    """The penalty with the smallest leave-one-out error: of sample i it is residual_i / (1 - leverage_i).

    Args:
        parts: principal components of the samples, ``(N, R)``.
        values: their sums of squares, ``(R,)``.
        targets: centred, ``(N, C)``.
    """
    penalties = _PENALTIES * (values.mean() if values.any() else 1.0)
    inverses = 1 / (values + penalties[:, None])
    kept = 1 - parts.square() @ inverses.T - 1 / len(parts)  # the last term is the mean's, which is fitted as well
    along = parts.T @ targets
    errors = [
        float(((targets - parts @ (inverse[:, None] * along)) / kept[:, [i]]).square().mean())
        for i, inverse in enumerate(inverses)
    ]
    return float(penalties[min(range(len(errors)), key=errors.__getitem__)])


@torch.no_grad()
def probe_blocks(algorithm: Algorithm, train: Batch, test: Batch, classes: int) -> dict[str, float]:
    """Probe accuracy of every block, by name, in the network's eval mode.

    Args:
        algorithm: attached; its device is that of the batches.
        train: samples to fit the probes on; never those of ``test``.
        test: samples to judge on, from the validation part.
        classes: number of classes.
    """
    with evaluating(algorithm):
        fit = list(algorithm.activations(train.inputs, *train.context))
        judge = list(algorithm.activations(test.inputs, *test.context))
    result = {}
    for name, a, b in zip(algorithm.blocks.names, fit, judge, strict=True):
        fit_rows, fit_labels = selected(train, a)
        test_rows, test_labels = selected(test, b)
        result[name] = ridge_probe(fit_rows, fit_labels, test_rows, test_labels, classes)
    return result
