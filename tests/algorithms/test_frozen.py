"""A frozen part is its weights and its buffers, under every rule and under plain backpropagation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    CounterCurrent,
    DeepSupervision,
    FeedbackAlignment,
    ForwardForward,
    MonoForward,
    ProductFeedbackAlignment,
    TaskInfo,
)
from locallearn.batch import Batch
from locallearn.nets import Blocks
from locallearn.tasks.classification import Classification

DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(16, 12, generator=DRAW), torch.arange(16) % 3)
RULES: list[Callable[[], Algorithm]] = [
    Backprop,
    DeepSupervision,
    MonoForward,
    ForwardForward,
    lambda: ForwardForward(peer=0.03),
    CounterCurrent,
    FeedbackAlignment,
    ProductFeedbackAlignment,
]


def _net() -> Blocks:
    def block(affine: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12, affine=affine), nn.ReLU())

    return Blocks({"one": block(False), "two": block(True), "three": block(True)}, nn.Linear(12, 3))


def _attached(rule: Algorithm, net: Blocks) -> Algorithm:
    rule.attach(net, TaskInfo(Batch(BATCH.inputs[:2], BATCH.targets[:2]), 3, F.cross_entropy))
    return rule.train()


def _step(rule: Algorithm) -> None:
    for update in rule.updates(BATCH):
        update.backward()
        rule.zero_grad()


@pytest.mark.parametrize("make", RULES)
def test_statistics_of_a_frozen_block_stay(make: Callable[[], Algorithm]) -> None:
    """Frozen after train() was called; a block without scale and shift of its own, too; thawed, they move again."""
    net = _net()
    rule = _attached(make(), net)
    for block in net:
        block.requires_grad_(False)
        before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
        _step(rule)
        path = next(name for name, child in net.members.items() if child is block)
        for name, value in net.state_dict().items():
            if name in before:
                assert torch.equal(value, before[name]) is (path in name), name
        for p in block[0].parameters():
            p.requires_grad_(True)
        before = {name: value.clone() for name, value in block.state_dict().items() if "running" in name}
        block[1].requires_grad_(True)
        _step(rule)
        assert all(not torch.equal(value, before[name]) for name, value in block.state_dict().items() if name in before)


@pytest.mark.parametrize("make", RULES)
def test_training_mode_of_the_network_alone_wakes_no_frozen_block(make: Callable[[], Algorithm]) -> None:
    """As a callback sets it, or a module of one's own in which the network is registered after the rule."""
    net = _net()
    net[1].requires_grad_(False)
    rule = _attached(make(), net)
    for _ in range(2):
        net.train()
        before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
        _step(rule)
        moved = {name for name in before if not torch.equal(net.state_dict()[name], before[name])}
        assert moved == {name for name in before if "two" not in name}


def test_the_mean_activity_of_a_frozen_block_stays() -> None:
    net = _net()
    rule = _attached(ForwardForward(peer=0.03), net)
    net[1].requires_grad_(False)
    before = [local.peer_mean.clone() for local in rule.local]
    _step(rule)
    assert [torch.equal(local.peer_mean, old) for local, old in zip(rule.local, before, strict=True)] == [
        False,
        True,
        False,
    ]


def test_a_scale_that_the_rule_holds_back_freezes_no_statistics() -> None:
    """Counter-current learning never trains scale and shift; one that the user froze before does rest."""
    net = _net()
    net[2][1].requires_grad_(False)
    rule = _attached(CounterCurrent(), net)
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    _step(rule)
    moved = {name for name in before if not torch.equal(net.state_dict()[name], before[name])}
    assert moved == {name for name in before if "three" not in name}


def test_what_rests_is_what_has_nothing_to_learn() -> None:
    net = _net()
    net[0].append(nn.Dropout())
    net[1][1].requires_grad_(False)
    net[2].append(nn.Dropout().eval())
    rule = _attached(Backprop(), net)
    net[2][-1].eval()  # by hand, and so it stays
    net[0].requires_grad_(False)
    _step(rule)
    resting = {name for name, module in net.named_modules() if not module.training}
    inside = {"members.one", *(f"members.one.{i}" for i in range(4))}
    assert resting == {*inside, "members.two.1", "members.three.3"}
    net.requires_grad_(False)
    rule.train()
    assert not any(module.training for module in net.modules())
    net.requires_grad_(True)
    rule.eval()
    _step(rule)
    assert not any(module.training for module in rule.modules())
    assert all(module.training for module in rule.train().modules())


def test_plain_backpropagation_rests_the_same_parts() -> None:
    net = _net()
    task = Classification(net, BATCH.inputs[:2], 3)
    net[1].requires_grad_(False)
    for learn in (False, True):
        task.train()
        net[0].requires_grad_(learn)  # after train(): seen by the step
        net.train()
        before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
        task.training_step(BATCH, 0)
        moved = {name.split(".")[1] for name in before if not torch.equal(net.state_dict()[name], before[name])}
        assert moved == ({"one", "three"} if learn else {"three"})
