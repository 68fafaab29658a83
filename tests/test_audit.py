"""The audit believes nobody: honest rules pass, and rules that lie are found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    DeepSupervision,
    FeedbackAlignment,
    ForwardForward,
    Locality,
    MonoForward,
    Pepita,
    ProductFeedbackAlignment,
    TaskInfo,
    Update,
)
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.functional import mono_forward
from locallearn.nets import mlp

DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(16, 12, generator=DRAW), torch.randint(3, (16,), generator=DRAW))
NAMES = ["layer1", "layer2", "layer3"]


def _attached(algorithm: Algorithm) -> Algorithm:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = mlp((12,), 3, (10, 9, 8))
    algorithm.attach(net, TaskInfo(Batch(BATCH.inputs[:2], BATCH.targets[:2]), 3, F.cross_entropy))
    return algorithm


@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        (Backprop, Locality.GLOBAL),
        (DeepSupervision, Locality.GLOBAL),
        (MonoForward, Locality.LAYER_LOCAL),
        (ForwardForward, Locality.LAYER_LOCAL),
        (partial(ForwardForward, inference="softmax", peer=0.03), Locality.LAYER_LOCAL),
        (partial(ForwardForward, negatives="hard"), Locality.COUPLED),
        (FeedbackAlignment, Locality.FEEDBACK),
        (partial(FeedbackAlignment, mode="usf"), Locality.FEEDBACK),
        (ProductFeedbackAlignment, Locality.FEEDBACK),
        (Pepita, Locality.FORWARD_ONLY),
    ],
)
def test_honest_rules_are_confirmed(make: Callable[[], Algorithm], verdict: Locality) -> None:
    result = audit(_attached(make()), BATCH)
    assert (result.confirmed, result.verdict) == (True, verdict), result.reason


def test_the_algorithm_is_left_as_it_was() -> None:
    algorithm = _attached(ForwardForward())
    before = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    state = torch.get_rng_state()
    audit(algorithm, BATCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert algorithm.get_extra_state() == {}  # no negative was drawn
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in algorithm.named_parameters())


class _ForgetsDetach(MonoForward):
    def emit(self, index: int, output: Tensor) -> Tensor:
        return output


def test_a_forgotten_detach_is_global() -> None:
    result = audit(_attached(_ForgetsDetach()), BATCH)
    assert (result.confirmed, result.verdict) == (False, Locality.GLOBAL)
    assert "claims layer-local, but is global" in result.reason
    assert [unit.reaches for unit in result.units] == [(), ("layer1",), ("layer1", "layer2")]


class _ReadsTheBlockAbove(MonoForward):
    """Weighs its loss by the norm of the next block's weights: no gradient flows, but knowledge does."""

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        loss = super().local_loss(index, output, batch)
        if index + 1 < len(self.blocks):
            loss = loss * next(self.blocks[index + 1].parameters()).detach().norm()
        return loss


def test_reading_the_block_above_is_coupling() -> None:
    result = audit(_attached(_ReadsTheBlockAbove()), BATCH)
    assert (result.confirmed, result.verdict) == (False, Locality.COUPLED)
    assert [unit.depends_on_later for unit in result.units] == [("layer2",), ("layer3",), ()]
    assert all(unit.reaches == () for unit in result.units)


class _AveragesLaterWeights(MonoForward):
    """Reads later blocks through a moving average that knows nothing of them yet when the first batch comes."""

    average: Tensor

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.register_buffer("average", torch.zeros(()))

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        loss = super().local_loss(index, output, batch) * (1.0 + self.average)
        if index == len(self.blocks) - 1:
            weight = next(self.blocks[index].parameters()).detach()
            self.average.mul_(0.9).add_(weight.norm(), alpha=0.1)
        return loss


def test_a_moving_average_of_later_weights_is_coupling() -> None:
    result = audit(_attached(_AveragesLaterWeights()), BATCH)
    assert (result.confirmed, result.verdict) == (False, Locality.COUPLED)
    assert "gradient-isolated, parameter-coupled" in result.reason
    assert [unit.depends_on_later for unit in result.units] == [("layer3",), ("layer3",), ()]


class _ClaimsForwardOnly(MonoForward):
    @property
    def locality(self) -> Locality:
        return Locality.FORWARD_ONLY


def test_forward_only_must_not_run_autograd() -> None:
    result = audit(_attached(_ClaimsForwardOnly()), BATCH)
    assert (result.confirmed, result.verdict) == (False, Locality.LAYER_LOCAL)
    assert [unit.backward_calls for unit in result.units] == [1, 1, 1]


class _GradientsByAutograd(MonoForward):
    """Claims forward-only and hands over gradients, which it got from autograd behind the driver's back."""

    @property
    def locality(self) -> Locality:
        return Locality.FORWARD_ONLY

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            assert update.loss is not None
            parameters = [p for group in self.units()[update.unit] for p in group["params"]]
            gradients = torch.autograd.grad(update.loss, parameters)
            yield Update(update.unit, update.loss.detach(), dict(zip(parameters, gradients, strict=True)))


def test_autograd_behind_the_drivers_back_is_counted() -> None:
    result = audit(_attached(_GradientsByAutograd()), BATCH)
    assert not result.confirmed
    assert [unit.backward_calls for unit in result.units] == [1, 1, 1]


class _ByHand(MonoForward):
    """Mono-Forward with the closed-form gradients of its spec: autograd never runs."""

    claim = Locality.FORWARD_ONLY
    peek = False

    @property
    def locality(self) -> Locality:
        return self.claim

    def updates(self, batch: Batch) -> Iterator[Update]:
        x = batch.inputs
        for i, name in enumerate(NAMES):
            weight, bias = self.blocks[i].parameters()
            projection = [p for group in self.units()[name] for p in group["params"]][-1]
            gradients = mono_forward.gradients(x, weight, bias, projection, batch.targets)
            scale = next(self.blocks[-1].parameters()).detach().norm() if self.peek else 1.0
            by_parameter = {weight: gradients.weight * scale, bias: gradients.bias, projection: gradients.projection}
            yield Update(name, gradients.loss, by_parameter)
            with torch.no_grad():
                x = self.blocks[i](x)


@pytest.mark.parametrize("claim", [Locality.FORWARD_ONLY, Locality.LAYER_LOCAL])
def test_gradients_by_hand_are_forward_only_and_may_be_layer_local(claim: Locality) -> None:
    algorithm = _ByHand()
    algorithm.claim = claim
    result = audit(_attached(algorithm), BATCH)
    assert (result.confirmed, result.verdict) == (True, Locality.FORWARD_ONLY), result.reason


def test_gradients_by_hand_that_know_later_weights_are_not_layer_local() -> None:
    algorithm = _ByHand()
    algorithm.claim, algorithm.peek = Locality.LAYER_LOCAL, True
    result = audit(_attached(algorithm), BATCH)
    assert not result.confirmed
    assert "layer3" in result.reason


class _OneUnitUnderABlocksName(Backprop):
    """Backpropagation that calls itself layer-local and hides in the name of a block."""

    @property
    def locality(self) -> Locality:
        return Locality.LAYER_LOCAL

    def units(self) -> dict[str, list[dict[str, object]]]:
        return {"layer1": [{"params": list(self.blocks.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            yield Update("layer1", update.loss)


def test_a_unit_of_several_blocks_is_not_local() -> None:
    result = audit(_attached(_OneUnitUnderABlocksName()), BATCH)
    assert (result.confirmed, result.verdict) == (False, Locality.GLOBAL)


class _SaysFeedback(Backprop):
    @property
    def locality(self) -> Locality:
        return Locality.FEEDBACK


def test_an_error_that_travels_through_the_forward_weights_is_no_feedback() -> None:
    result = audit(_attached(_SaysFeedback()), BATCH)
    assert (result.confirmed, result.verdict) == (False, Locality.GLOBAL)
    assert "claims feedback, but is global" in result.reason


def test_the_audit_looks_at_a_network_that_has_begun_to_learn() -> None:
    """What a rule does only after some steps is seen, too."""

    class SleepsAtFirst(_ReadsTheBlockAbove):
        def build(self, task: TaskInfo) -> None:
            super().build(task)
            self.register_buffer("steps", torch.zeros(()))

        def updates(self, batch: Batch) -> Iterator[Update]:
            self.steps += 1
            return super().updates(batch) if self.steps > 10 else MonoForward.updates(self, batch)

        def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
            if self.steps > 10:
                return super().local_loss(index, output, batch)
            return MonoForward.local_loss(self, index, output, batch)

    assert audit(_attached(SleepsAtFirst()), BATCH).verdict is Locality.COUPLED
    assert audit(_attached(SleepsAtFirst()), BATCH, batches=8, warmup=0).verdict is Locality.LAYER_LOCAL
