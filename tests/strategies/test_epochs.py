"""What is due when an epoch ends: told once per epoch, inside training, and resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from locallearn.algorithms import CaFo, MonoForward
from locallearn.strategies import LocalStrategy, Schedule

# Most tests here train without validation, on the main process, and on a CPU where a GPU may be.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:GPU available but not used"
)

Maker = Callable[..., Any]
adam = partial(torch.optim.Adam, lr=1e-2)


class Always:
    """The same batches in every epoch, wherever the last one was broken off."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Told(MonoForward):
    """Notes after how many batches it was told that an epoch had ended, and whether validation had been."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0
        self.ends: list[tuple[int, int]] = []
        self.predictions = 0

    def prepare(self, batch: Any) -> Any:
        self.batches += 1
        return super().prepare(batch)

    def predict(self, *inputs: Any) -> Any:
        self.predictions += 1
        return super().predict(*inputs)

    def end_epoch(self) -> None:
        self.ends.append((self.batches, self.predictions))


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"max_epochs": 2}, [(4, 0), (8, 2)]),
        ({"max_epochs": 2, "limit_train_batches": 3}, [(3, 0), (6, 2)]),
        ({"max_epochs": 5, "max_steps": 6}, [(4, 0)]),  # the second epoch is broken off
    ],
)
def test_the_rule_is_told_before_validation_and_once_per_epoch(
    options: dict[str, Any], ends: list[Any], make_module: Maker, make_trainer: Maker, train: Any, validation: Any
) -> None:
    rule = Told()
    trainer = make_trainer(strategy=LocalStrategy(rule, adam), num_sanity_val_steps=0, **options)
    trainer.fit(make_module(), Always(train.batches), Always(validation.batches))
    assert rule.ends == ends


class Stop(pl.Callback):
    """Saves and stops after a number of batches."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3])
def test_a_closed_form_that_is_resumed_within_its_epoch_is_exact(
    after: int, make_module: Maker, make_trainer: Maker, train: Any, validation: Any, tmp_path: Path
) -> None:
    def fit(callbacks: list[pl.Callback], loader: Any, checkpoint: Path | None = None) -> CaFo:
        rule = CaFo(predictor="mse")
        trainer = make_trainer(
            strategy=LocalStrategy(rule, adam),
            max_epochs=3,
            num_sanity_val_steps=0,
            callbacks=[Schedule(patience=None), *callbacks],
        )
        trainer.fit(make_module(), loader, validation, ckpt_path=checkpoint, weights_only=True)
        return rule

    whole = fit([], type(train)(train.batches))
    path = tmp_path / "half.ckpt"
    with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
        fit([Stop(path, after)], type(train)(train.batches))
    resumed = fit([], type(train)(train.batches), path)
    assert int(resumed.epoch.ended) == int(whole.epoch.ended) == 1  # three were allowed, and one is enough
    for mine, theirs in zip(resumed.predictors, whole.predictors, strict=True):
        assert torch.equal(mine.weights, theirs.weights)
        assert not mine.gathering
