"""The counter-current loss in somebody else's training loop."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn.losses.counter_current
from locallearn.functional import counter_current as ccl
from locallearn.losses import CounterCurrentLoss

CLASSES = 4


def _blobs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    centres = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=draw)
    return centres[labels] + 0.6 * torch.randn(samples, 20, generator=draw), labels


@pytest.mark.parametrize(("normalise", "lr"), [(False, 0.02), (True, 0.2)])
def test_every_layer_learns_to_classify_in_a_plain_loop(normalise: bool, lr: float) -> None:
    """Of every layer alone: the nearest class signal is the right one."""
    torch.manual_seed(0)
    ahead = [nn.Linear(20, 32), nn.Linear(32, 32)]
    back = [nn.Linear(32, 32), nn.Linear(CLASSES, 32)]  # b_1 from b_2, b_2 from the labels
    local = CounterCurrentLoss(normalise)
    optimizers = [torch.optim.SGD([*f.parameters(), *g.parameters()], lr=lr) for f, g in zip(ahead, back, strict=True)]
    inputs, labels = _blobs(1000, seed=1)

    def signals() -> list[Tensor]:
        top = F.elu(back[1](torch.eye(CLASSES)))
        return [F.elu(back[0](top.detach())), top]

    for _ in range(5):
        for rows in torch.randperm(len(inputs)).split(50):
            x, partners = inputs[rows], signals()
            for layer, optimizer, partner in zip(ahead, optimizers, partners, strict=True):
                optimizer.zero_grad()
                hidden = F.elu(layer(x))
                local(hidden, partner, ccl.class_matches(labels[rows], CLASSES)).backward()
                optimizer.step()
                x = hidden.detach()
    x, labels = _blobs(500, seed=2)
    with torch.no_grad():
        for layer, partner in zip(ahead, signals(), strict=True):
            x = F.elu(layer(x))
            scores = ccl.normalise(x) @ ccl.normalise(partner).T
            assert (scores.argmax(1) == labels).float().mean().item() > 0.95


def test_factors_are_those_of_the_code_unless_given() -> None:
    a, b, matches = torch.randn(3, 8), torch.randn(4, 8), ccl.class_matches(torch.tensor([0, 2, 2]), 4)
    grams = ccl.gram_loss(a) + ccl.gram_loss(b)
    torch.testing.assert_close(CounterCurrentLoss()(a, b, matches), 16 * (a @ b.T - matches).square().mean())
    torch.testing.assert_close(
        CounterCurrentLoss(normalise=True)(a, b, matches), ccl.normalised_pair_loss(a, b, matches, 1.0) + 0.5 * grams
    )
    torch.testing.assert_close(
        CounterCurrentLoss(c=2.0, gram=0.3)(a, b, matches), ccl.pair_loss(a, b, matches, 2.0) + 0.3 * grams
    )
    torch.testing.assert_close(
        CounterCurrentLoss(True, 2.0, 0.0)(a, b, matches), ccl.normalised_pair_loss(a, b, matches, 2.0)
    )


def test_impossible_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="c=0 must be above 0"):
        CounterCurrentLoss(c=0)
    with pytest.raises(ValueError, match=r"gram=-1 must be 0 .* or above"):
        CounterCurrentLoss(gram=-1)


def test_the_example_runs() -> None:
    outcome = doctest.testmod(locallearn.losses.counter_current)
    assert outcome.attempted > 5
    assert outcome.failed == 0
