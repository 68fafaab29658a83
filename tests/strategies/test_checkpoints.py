"""Lightning's own checkpoints give back what was trained, with the rule's own inference, or say what is missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from locallearn.algorithms import Algorithm, Backprop, ForwardForward, MonoForward, Pepita
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import Classification

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:GPU available but not used"
)

Maker = Callable[..., Any]
adam = partial(torch.optim.Adam, lr=1e-2)

_RULES: dict[str, Callable[[], Algorithm]] = {
    "mono_forward": MonoForward,
    "forward_forward": ForwardForward,
    "forward_forward_softmax": lambda: ForwardForward(inference="softmax"),
    "backprop": Backprop,
}


@pytest.mark.parametrize("make", _RULES.values(), ids=_RULES)
def test_a_checkpoint_gives_back_what_was_trained_or_is_refused(
    make: Callable[[], Algorithm],
    make_module: Maker,
    make_trainer: Maker,
    make_net: Maker,
    train: Any,
    validation: Any,
    tmp_path: Path,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    strategy = LocalStrategy(make(), adam)
    trainer = make_trainer(strategy=strategy, max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(module := make_module(), train, validation)
    parts = {"net": make_net(), "example": torch.zeros(2, 12), "classes": 3}
    path = checkpoint.last_model_path
    again = Classification.load_from_checkpoint(path, **parts, algorithm=make())
    inputs = torch.cat([batch.inputs for batch in validation.batches])
    assert torch.equal(again.eval()(inputs), module.eval()(inputs))
    with pytest.raises(ValueError, match=f"trained by {type(strategy.algorithm).__name__}, .* the network alone"):
        Classification.load_from_checkpoint(path, **{**parts, "net": make_net()})
    with pytest.raises(ValueError, match="predicts with Pepita"):
        Classification.load_from_checkpoint(path, **{**parts, "net": make_net()}, algorithm=Pepita())


def test_a_checkpoint_of_plain_backpropagation_needs_no_rule(
    make_module: Maker, make_trainer: Maker, make_net: Maker, train: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module := make_module(), train)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    parts = {"net": make_net(), "example": torch.zeros(2, 12), "classes": 3}
    again = Classification.load_from_checkpoint(tmp_path / "plain.ckpt", **parts)
    assert torch.equal(again(torch.ones(2, 12)), module(torch.ones(2, 12)))
    with pytest.raises(ValueError, match="trained by backpropagation without a rule"):
        Classification.load_from_checkpoint(tmp_path / "plain.ckpt", **parts, algorithm=MonoForward())


def test_loss_sums_go_on_where_they_were(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    strategy = LocalStrategy(MonoForward(), partial(torch.optim.SGD, lr=0.0))
    make_trainer(strategy=strategy, max_epochs=1).fit(make_module(), train)
    kept = strategy.losses
    assert {count for _, count in kept.values()} == {len(train)}
    means = strategy.mean_losses()
    assert strategy.losses == {}
    strategy.losses = kept
    assert strategy.mean_losses() == means
