"""Linear probes: how much of the labels can be read off every block, by the same yardstick for every algorithm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms.base import Algorithm, selected
from locallearn.batch import Batch


def ridge_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, strength: float = 0.01
) -> float:
    """Accuracy of a ridge regression from features onto one-hot labels, fitted in closed form.

    Features are standardised by the training part. With N samples and D features the system solved is the smaller of
    D x D and N x N.

    Args:
        train: features to fit on, ``(N, ...)``, flattened here.
        train_labels: class ids ``(N,)``.
        test: features to judge on, ``(M, ...)``.
        test_labels: class ids ``(M,)``.
        classes: number of classes.
        strength: ridge penalty per sample.

    Returns:
        Share of ``test`` that is classified rightly; ``nan`` where a feature is not finite.
    """
    fit, judge = train.flatten(1).float().cpu(), test.flatten(1).float().cpu()
    if not (torch.isfinite(fit).all() and torch.isfinite(judge).all()):
        return float("nan")
    mean, std = fit.mean(0), fit.std(0)
    scale = torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.inf)  # constant features say nothing
    fit, judge = (fit - mean) / scale, (judge - mean) / scale
    targets = F.one_hot(train_labels.cpu(), classes).double()
    centre = targets.mean(0)
    samples, width = fit.shape
    penalty = strength * samples
    # The products in single precision are quick; the solve in double keeps its digits.
    if width <= samples:
        gram = (fit.T @ fit).double()
        weight = torch.linalg.solve(gram + penalty * torch.eye(width).double(), fit.T.double() @ (targets - centre))
    else:
        gram = (fit @ fit.T).double()
        dual = torch.linalg.solve(gram + penalty * torch.eye(samples).double(), targets - centre)
        weight = fit.T.double() @ dual
    scores = judge.double() @ weight + centre
    return float((scores.argmax(1) == test_labels.cpu()).double().mean())


@torch.no_grad()
def probe_blocks(algorithm: Algorithm, train: Batch, test: Batch, classes: int) -> dict[str, float]:
    """Probe accuracy of every block, by name, in the network's eval mode.

    Args:
        algorithm: attached; its device is that of the batches.
        train: samples to fit the probes on; never those of ``test``.
        test: samples to judge on, from the validation part.
        classes: number of classes.
    """
    modes = [(module, module.training) for module in algorithm.modules()]
    algorithm.eval()
    try:
        fit = list(algorithm.activations(train.inputs, *train.context))
        judge = list(algorithm.activations(test.inputs, *test.context))
    finally:
        for module, mode in modes:
            module.training = mode
    result = {}
    for name, a, b in zip(algorithm.blocks.names, fit, judge, strict=True):
        fit_rows, fit_labels = selected(train, a)
        test_rows, test_labels = selected(test, b)
        result[name] = ridge_probe(fit_rows, fit_labels, test_rows, test_labels, classes)
    return result
