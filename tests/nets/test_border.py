"""Blocks that hand over several tensors: rules get the main one, the others are detached and carried along."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    CounterCurrent,
    DeepSupervision,
    FeedbackAlignment,
    MonoForward,
    Pepita,
    TaskInfo,
)
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.nets import Blocks
from locallearn.nets.border import Border, detached, main, replaced
from locallearn.probe import probe_blocks

DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(12, 6, generator=DRAW), torch.arange(12) % 3, index=torch.arange(12))
TASK = TaskInfo(Batch(BATCH.inputs[:2], BATCH.targets[:2]), 3, F.cross_entropy)


class _Open(nn.Module):
    """Gives its input to whoever comes later, too, and its first features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.side = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Border:
        return Border(self.linear(x).relu(), {"early": self.side(x).tanh(), "number": 2})


class _Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Border) -> Border:
        return Border(self.linear(x.main).relu_(), x.carried)


class _Close(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Border) -> Tensor:
        joined: Tensor = self.linear(x.main + x.carried["early"] * x.carried["number"]).relu()
        return joined


def _net() -> Blocks:
    torch.manual_seed(1)
    return Blocks({"open": _Open(), "middle": _Middle(), "close": _Close()}, nn.Linear(8, 3))


def _attached(rule: Algorithm) -> Algorithm:
    rule.attach(_net(), TASK)
    return rule.train()


def test_the_main_tensor_is_what_losses_probes_and_the_readout_see() -> None:
    net = _net()
    sizes = [tuple(output.shape) for output in net.features(BATCH.inputs)]
    assert sizes == [(12, 8)] * 3
    assert net(BATCH.inputs).shape == (12, 3)
    assert net.carrier(BATCH.inputs, ()) == "open"
    rule = _attached(MonoForward())
    assert probe_blocks(rule, BATCH, BATCH, 3).keys() == {"open", "middle", "close"}
    assert measure_update(rule, BATCH).flops > 0


def test_detached_and_replaced() -> None:
    x = torch.ones(2, requires_grad=True)
    border = Border(x * 1, {"a": (x * 2, 3)})
    whole = detached(border)
    assert not whole.main.requires_grad
    assert not whole.carried["a"][0].requires_grad
    assert whole.carried["a"][1] == 3
    other = replaced(border, x.detach())
    assert main(other) is other.main
    assert not other.carried["a"][0].requires_grad
    assert replaced(x, border.main) is border.main
    assert main(x) is x


def test_mono_forward_is_a_loop_that_detaches_everything() -> None:
    rule = _attached(MonoForward(seed=3))
    optimizers = {unit: torch.optim.SGD(groups, lr=0.1) for unit, groups in rule.units().items()}
    twin = _attached(MonoForward(seed=3))
    for _ in range(3):
        for update in rule.updates(BATCH):
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()
    heads = [*twin.heads.projections, twin.blocks.readout]  # type: ignore[union-attr]
    for _ in range(3):
        x = BATCH.inputs
        for block, head in zip(twin.blocks, heads, strict=True):
            x = block(x)
            scores = main(x).flatten(1) @ head.projection.T if head is not twin.blocks.readout else head(x)
            F.cross_entropy(scores, BATCH.targets).backward()
            x = detached(x)
        for parameter in twin.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
    for name, value in twin.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.allclose(value, rule.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("make", [MonoForward, Backprop, DeepSupervision])
def test_the_audit_confirms_the_claim(make: Callable[[], Algorithm]) -> None:
    result = audit(_attached(make()), BATCH)
    assert result.confirmed, str(result)


def test_a_carried_tensor_that_is_not_detached_is_seen() -> None:
    class Leaky(MonoForward):
        def hand_over(self, index: int, output: object) -> object:
            return output._replace(main=output.main.detach()) if isinstance(output, Border) else output

        @property
        def carries(self) -> bool:
            return True

    assert not audit(_attached(Leaky()), BATCH).confirmed


def test_frozen_blocks_are_run_but_not_cached() -> None:
    rule = _attached(MonoForward())
    assert isinstance(rule, MonoForward)
    rule.train_only(frozenset({"close"}))
    (update,) = rule.updates(BATCH)
    assert update.unit == "close"
    rule.cache_frozen(True)
    with pytest.raises(ValueError, match=r"'middle' hands over 3 tensors, and the cache keeps one"):
        next(rule.updates(BATCH))


@pytest.mark.parametrize("make", [Pepita, CounterCurrent])
def test_rules_that_need_a_plain_chain_refuse_by_name(make: Callable[[], Algorithm]) -> None:
    with pytest.raises(ValueError, match=r"needs a plain chain of blocks, and block 'open' hands over more than one"):
        make().attach(_net(), TASK)


def test_rules_that_run_the_network_as_a_whole_take_it() -> None:
    rule = _attached(FeedbackAlignment())
    assert [update.unit for update in rule.updates(BATCH)] == ["network"]


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters in its blocks one"):
        MonoForward().attach(Blocks({"one": nn.ReLU()}), TASK)
