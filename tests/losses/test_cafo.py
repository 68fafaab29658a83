"""The sparsemax loss in a loop of one's own."""

from __future__ import annotations

import doctest

import torch

import locallearn.losses.cafo
from locallearn.functional import cafo
from locallearn.losses import SparsemaxLoss


def test_the_module_is_the_function() -> None:
    scores, targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    local = SparsemaxLoss()
    assert torch.equal(local(scores, targets), cafo.sparsemax_loss(scores, targets))
    assert torch.equal(local.probabilities(scores), cafo.sparsemax(scores))


def test_it_trains_a_head() -> None:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (60,), generator=draw)
    features = torch.eye(3)[targets] + 0.2 * torch.randn(60, 3, generator=draw)
    weights = torch.zeros(3, 3, requires_grad=True)
    local, losses = SparsemaxLoss(), []
    for _ in range(50):
        loss = local(features @ weights, targets)
        losses.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, weights)
        weights.data -= gradient
    assert losses[0] > 0.3
    assert losses[-1] < 0.02


def test_its_example_runs() -> None:
    assert doctest.testmod(locallearn.losses.cafo).failed == 0
