"""Optimizers that ask for the loss again within one step, or not at all; and clipping under bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    DeepSupervision,
    FeedbackAlignment,
    ForwardForward,
    MonoForward,
    Update,
)
from locallearn.batch import Batch
from locallearn.strategies import LocalStrategy

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

Maker = Callable[..., Any]
lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=4)


def _weights(algorithm: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in [*algorithm.named_parameters(), *algorithm.named_buffers()]}


def _assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


class Sharpness(torch.optim.SGD):
    """Steps with the gradient at the end of a step uphill, as sharpness-aware minimisation does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        moved = [(p, 0.05 * p.grad.sign()) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p, move in moved:
            p.add_(move)
        closure()
        for p, move in moved:
            p.sub_(move)
        super().step()
        return loss


def _step(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss()
            value.backward()
        return value

    optimizer.step(closure)


def _plain(rule: Any, optimizers: dict[str, Any], batch: Batch) -> None:
    """One batch as one would write it without updates."""
    if isinstance(rule, Backprop):
        _step(optimizers["network"], lambda: nn.functional.cross_entropy(rule.blocks(batch.inputs), batch.targets))
    elif isinstance(rule, FeedbackAlignment):
        _step(optimizers["network"], lambda: next(rule.updates(batch)).loss)
    elif isinstance(rule, DeepSupervision):

        def total() -> Tensor:
            one, two, three = (
                rule.heads.loss(rule.blocks, i, x, batch) for i, x in enumerate(rule.blocks.features(batch.inputs))
            )
            return one + two + three

        _step(optimizers["network"], total)
    else:
        prepared = rule.prepare(batch)
        x = prepared.inputs
        for i, name in enumerate(rule.blocks.names):
            seen = rule.run(i, x, prepared).detach()
            _step(optimizers[name], lambda i=i, x=x: rule.local_loss(i, rule.run(i, x, prepared), prepared))
            x = rule.emit(i, seen)


@pytest.mark.parametrize(
    ("make", "optimizer"),
    [
        (Backprop, lbfgs),
        (DeepSupervision, lbfgs),
        (MonoForward, lbfgs),
        (FeedbackAlignment, lbfgs),
        (Backprop, partial(Sharpness, lr=0.1)),
        (partial(FeedbackAlignment, mode="kolen_pollack"), partial(Sharpness, lr=0.1)),
        (ForwardForward, partial(Sharpness, lr=0.1)),
    ],
)
def test_who_asks_again_gets_the_loss_of_the_weights_as_they_are(
    make: Callable[[], Algorithm], optimizer: Any, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    strategy = LocalStrategy(make(), optimizer)
    make_trainer(strategy=strategy, max_epochs=2).fit(make_module(), train)
    module = make_module()
    module.use(make())
    optimizers = {unit: optimizer(groups) for unit, groups in module.algorithm.units().items()}
    for batch in [*train.batches] * 2:
        _plain(module.algorithm.train(), optimizers, batch)
    _assert_equal(_weights(strategy.algorithm), _weights(module.algorithm))


class _Handmade(Backprop):
    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            known = [p for p in self.blocks.parameters() if p.requires_grad]
            assert update.loss is not None
            yield Update("network", gradients=dict(zip(known, torch.autograd.grad(update.loss, known), strict=True)))


def test_what_a_rule_cannot_make_anew_is_refused(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    trainer = make_trainer(strategy=LocalStrategy(_Handmade(), lbfgs), max_epochs=1)
    with pytest.raises(ValueError, match=r"LBFGS asks for the loss again within one step.* Adam or SGD"):
        trainer.fit(make_module(), train)


class _Forgetful(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()


class _Closed(torch.optim.SGD):
    def step(self) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize(
    ("optimizer", "sentence"), [(_Forgetful, "has not called its closure"), (_Closed, r"step\(\) without arguments")]
)
def test_an_optimizer_that_does_not_ask_is_refused(
    optimizer: Any, sentence: str, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    trainer = make_trainer(strategy=LocalStrategy(Backprop(), partial(optimizer, lr=0.1)), max_epochs=1)
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(make_module(), train)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_clipped_under_bf16_mixed(
    fused: bool, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.5, fused=fused)
    strategy = LocalStrategy(MonoForward(), optimizer)
    trainer = make_trainer(strategy=strategy, max_epochs=1, precision="bf16-mixed", gradient_clip_val=0.05)
    trainer.fit(make_module(), train)
    ends = []
    for clip in (0.05, 1e9):
        module = make_module()
        module.use(MonoForward())
        optimizers = {unit: optimizer(groups) for unit, groups in module.algorithm.units().items()}
        for batch in train.batches:
            updates = module.algorithm.updates(batch)
            while True:
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    update = next(updates, None)
                if update is None:
                    break
                update.backward()
                groups = optimizers[update.unit].param_groups
                torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
                optimizers[update.unit].step()
                optimizers[update.unit].zero_grad()
        ends.append(_weights(module.algorithm))
    _assert_equal(_weights(strategy.algorithm), ends[0])
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
