"""SymBa, channel-wise competition and layer collaboration as modules in somebody else's loop."""

from __future__ import annotations

import doctest

import pytest
import torch

import locallearn.losses.channelwise
import locallearn.losses.layer_collaboration
import locallearn.losses.symba
from locallearn.functional import channelwise, layer_collaboration
from locallearn.functional.forward_forward import goodness
from locallearn.losses import ChannelwiseCompetitiveLoss, ForwardForwardLoss, LayerCollaborationLoss, SymBaLoss

GOOD, BAD = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "module", [locallearn.losses.channelwise, locallearn.losses.layer_collaboration, locallearn.losses.symba]
)
def test_examples_run(module: object) -> None:
    outcome = doctest.testmod(module)  # type: ignore[arg-type]
    assert outcome.attempted > 5
    assert outcome.failed == 0


def test_modules_are_their_functions() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    for name in ("cwc", "pvn", "cwg"):
        got = ChannelwiseCompetitiveLoss(3, name, threshold=0.7, weight=0.4)(GOOD, labels)  # type: ignore[arg-type]
        options = {"cwc": {}, "pvn": {"threshold": 0.7}, "cwg": {"threshold": 0.7, "weight": 0.4}}[name]
        want = getattr(channelwise, name)(channelwise.group_goodness(GOOD, 3), labels, **options)
        torch.testing.assert_close(got, want)


def test_collaboration_without_others_is_forward_forward() -> None:
    """Property 4, bit for bit."""
    assert torch.equal(LayerCollaborationLoss(6.0)(GOOD, BAD), ForwardForwardLoss()(GOOD, BAD))


def test_the_midpoint_is_halfway_and_no_gradient_goes_into_the_others() -> None:
    others = torch.rand(2, 5, requires_grad=True)
    positive = GOOD.clone().requires_grad_()
    loss = LayerCollaborationLoss(None)(positive, BAD, *others)
    scores = (goodness(GOOD) + others[0], goodness(BAD) + others[1])
    middle = float((scores[0].mean() + scores[1].mean()).detach() / 2)
    torch.testing.assert_close(
        loss, layer_collaboration.loss(goodness(positive), goodness(BAD), *others, threshold=middle)
    )
    loss.backward()
    assert others.grad is None
    fixed = GOOD.clone().requires_grad_()
    LayerCollaborationLoss(middle)(fixed, BAD, *others).backward()
    torch.testing.assert_close(positive.grad, fixed.grad)  # nothing goes through the threshold either


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SymBaLoss(0.0), "alpha=0.0"),
        (lambda: SymBaLoss()(GOOD, BAD[:2]), "one negative for every positive"),
        (lambda: ChannelwiseCompetitiveLoss(1), "classes=1"),
        (lambda: ChannelwiseCompetitiveLoss(3, "ce"), "'cwc', 'pvn' or 'cwg'"),  # type: ignore[arg-type]
        (lambda: ChannelwiseCompetitiveLoss(3, weight=2.0), "weight=2.0"),
        (lambda: LayerCollaborationLoss(negative_loss="x"), "'softplus' or 'log_p'"),  # type: ignore[arg-type]
        (lambda: LayerCollaborationLoss(float("nan")), "finite"),
        (lambda: LayerCollaborationLoss()(GOOD, BAD[:2]), "as many negatives"),
        (lambda: LayerCollaborationLoss()(GOOD, BAD, torch.zeros(3)), "one number per row"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]
