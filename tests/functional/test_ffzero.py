"""FFzero's equations against what they should be."""

from __future__ import annotations

import pytest
import torch

from locallearn.functional import ffzero


def test_prototypes_are_a_regular_simplex_turned_at_random() -> None:
    draws = torch.Generator().manual_seed(0)
    for classes, width in ((4, 7), (3, 3), (10, 10)):
        made = ffzero.prototypes(classes, width, draws)
        angles = made @ made.T
        torch.testing.assert_close(angles.diagonal(), torch.ones(classes).double())
        torch.testing.assert_close(angles[0, 1:], torch.full((classes - 1,), -1 / (classes - 1)).double())
        torch.testing.assert_close(made.sum(0), torch.zeros(width).double(), atol=1e-12, rtol=0)
    assert not torch.equal(ffzero.prototypes(3, 5, draws), ffzero.prototypes(3, 5, draws))
    with pytest.raises(ValueError, match="5 prototypes in 4 dimensions"):
        ffzero.prototypes(5, 4, draws)


def test_the_loss_keeps_the_true_class_and_is_a_sum() -> None:
    corners = torch.eye(3)
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    # cosines: (1, 0, 0) and (0, .6, .8)
    wanted = 0.3 + (0.3 + max(0.0, 0.3 - 0.6) + max(0.0, 0.3 + 0.8 - 0.6))
    assert float(ffzero.loss(outputs, corners, torch.tensor([0, 1]))) == pytest.approx(wanted)
    both = ffzero.loss(torch.stack((outputs, outputs[[1, 0]])), torch.stack((corners, corners)), torch.tensor([0, 1]))
    assert both.shape == (2,)
    assert float(both[0]) == pytest.approx(wanted)
    assert float(ffzero.loss(torch.zeros(1, 3), corners, torch.tensor([0]))) == pytest.approx(0.9)


def test_the_estimate_is_unbiased() -> None:
    draws = torch.Generator().manual_seed(0)
    gradient = torch.tensor([1.0, -2.0, 0.5, 0.0])
    drawn = ffzero.directions(40_000, 4, draws)
    torch.testing.assert_close(torch.linalg.vector_norm(drawn, dim=1), torch.ones(40_000))
    torch.testing.assert_close(ffzero.estimate(drawn @ gradient, drawn), gradient, atol=0.06, rtol=0)


def test_votes_are_counted_and_ties_go_to_the_higher_layers() -> None:
    answers = torch.tensor([[0, 2, 1], [1, 2, 0], [1, 0, 0], [0, 0, 1], [2, 0, 2]])
    # 0: layers 0 and 3 against 1 and 2 of class 1: equal sums, the lower class; then three votes; then 0: 1+2 = 1: 0+3.
    scores = ffzero.vote(answers, 3)
    assert scores.argmax(1).tolist() == [0, 0, 0]
    assert scores.floor().sum(1).tolist() == [5, 5, 5]
    assert ffzero.vote(torch.tensor([[0], [0], [1], [1]]), 2).argmax(1).tolist() == [1]
