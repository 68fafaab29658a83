"""Every scheduler of PyTorch: it follows the plain loop, or is refused in a sentence before training."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from locallearn.algorithms import MonoForward
from locallearn.strategies import LocalStrategy, Schedule
from locallearn.strategies.making import make_optimizers, make_schedulers
from locallearn.tasks.classification import Classification

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

Maker = Callable[..., Any]
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
EPOCHS, STEPS = 3, 12


def _falling(step: int) -> float:
    return 0.9**step


SETTINGS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": _falling},
    "MultiplicativeLR": {"lr_lambda": _falling},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"total_iters": 2},
    "LinearLR": {"total_iters": 2},
    "ExponentialLR": {"gamma": 0.5},
    "PolynomialLR": {"total_iters": 2},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": STEPS},
}
REFUSED = {
    "LRScheduler": ({}, "cannot be made for SGD"),
    "SequentialLR": ({}, "lacks schedulers and milestones.*write a function that takes the optimizer"),
    "ChainedScheduler": ({}, "write a function that takes the optimizer"),
}


def test_all_schedulers_of_pytorch_are_looked_at() -> None:
    known = {
        name
        for name, made in vars(lr_scheduler).items()
        if inspect.isclass(made) and issubclass(made, LRScheduler) and not name.startswith("_")
    }
    assert known == {*SETTINGS, *REFUSED, "ReduceLROnPlateau"}


class _Rates(pl.Callback):
    """Notes the learning rates of all units after every batch, and leaves a checkpoint after one of them."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SETTINGS)
def test_rates_are_those_of_the_scheduler(
    name: str, interval: str, make_module: Maker, make_trainer: Maker, train: Any, validation: Any, tmp_path: Path
) -> None:
    make = partial(getattr(lr_scheduler, name), **SETTINGS[name])
    whole, path = _Rates(tmp_path / "half.ckpt"), tmp_path / "half.ckpt"
    trainer = make_trainer(
        strategy=LocalStrategy(MonoForward(), sgd, make, interval), max_epochs=EPOCHS, callbacks=[whole]
    )
    trainer.fit(make_module(), train, validation)

    optimizer = sgd([torch.zeros(1, requires_grad=True)])
    scheduler, expected = make(optimizer), []
    for step in range(STEPS):
        expected.append(3 * [optimizer.param_groups[0]["lr"]])
        optimizer.step()
        if interval == "step" or step % 4 == 3:
            scheduler.step()
    assert whole.seen == expected

    rest = _Rates()
    trainer = make_trainer(
        strategy=LocalStrategy(MonoForward(), sgd, make, interval), max_epochs=EPOCHS, callbacks=[rest]
    )
    data = type(train)(train.batches)
    trainer.fit(make_module(), data, validation, ckpt_path=path, weights_only=True)
    assert rest.seen == expected[8:]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_named_alone_is_refused(name: str) -> None:
    settings, sentence = REFUSED[name]
    optimizers = {"layer1": sgd([torch.zeros(1, requires_grad=True)])}
    with pytest.raises(ValueError, match=sentence):
        make_schedulers(optimizers, partial(getattr(lr_scheduler, name), **settings), "epoch", "accuracy", True)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lr_scheduler.StepLR, "StepLR lacks step_size"),
        (partial(lr_scheduler.CosineAnnealingLR, eta_min=0.1), "CosineAnnealingLR lacks T_max"),
        (lr_scheduler.CyclicLR, "CyclicLR lacks base_lr and max_lr"),
        (lr_scheduler.LambdaLR, "LambdaLR lacks lr_lambda.*hydra.utils.get_method"),
        (partial(lr_scheduler.LambdaLR, lr_lambda="half"), "LambdaLR cannot be made.*hydra.utils.get_method"),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1), "OneCycleLR cannot be made.*total_steps"),
        (partial(lr_scheduler.StepLR, step=3), "StepLR cannot be made.*'step'"),
        (lambda optimizer: None, "makes a NoneType"),
        (partial(ReduceLROnPlateau, mode="max"), "mode max waits for a rise"),
    ],
)
def test_what_a_scheduler_lacks_is_named(make: Any, sentence: str) -> None:
    optimizers = {"layer1": sgd([torch.zeros(1, requires_grad=True)])}
    with pytest.raises(ValueError, match=sentence):
        make_schedulers(optimizers, make, "epoch", "mse", False)


def test_a_scheduler_made_of_others_is_a_function(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    def warm(optimizer: torch.optim.Optimizer) -> LRScheduler:
        parts: list[LRScheduler] = [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.5)]
        return lr_scheduler.SequentialLR(optimizer, parts, [1])

    rates = _Rates()
    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), sgd, warm), max_epochs=3, callbacks=[rates])
    trainer.fit(make_module(), train)
    assert [seen[0] for seen in rates.seen[::4]] == pytest.approx([0.01, 0.1, 0.05])


def test_a_scheduler_that_ends_before_the_training_is_refused(
    make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    make = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=STEPS - 1)
    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), sgd, make, "step"), max_epochs=EPOCHS)
    with pytest.raises(ValueError, match=r"ends after 11 steps.* may have 12: set its total_steps to 12"):
        trainer.fit(make_module(), train)
    assert trainer.global_step == 0


# -- plateaus ---------------------------------------------------------------------------------------------------------
class _Scripted(Classification):
    """Validates to what the script says."""

    script = (1.0, 2.0, 3.0, 0.5, 0.6)

    def figures(self, sums: list[float]) -> dict[str, float]:
        value = self.script[self.trainer.current_epoch]
        return {"loss": value, "accuracy": -value}


@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "with-schedule"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_is_followed_after_every_validation_and_across_a_resume(
    mode: str, scheduled: bool, make_net: Maker, make_trainer: Maker, train: Any, validation: Any, tmp_path: Path
) -> None:
    path, seen = tmp_path / "second.ckpt", []

    def fit(rates: _Rates, **options: Any) -> None:
        callbacks = [Schedule(patience=9), rates] if scheduled else [rates]
        make = partial(ReduceLROnPlateau, mode=mode, patience=0, factor=0.5)
        trainer = make_trainer(strategy=LocalStrategy(MonoForward(), sgd, make), max_epochs=5, callbacks=callbacks)
        data = type(train)(train.batches)
        trainer.fit(_Scripted(make_net(), torch.zeros(2, 12), 3), data, validation, **options)
        seen.append([rate for rate, *_ in rates.seen])

    fit(_Rates(path if scheduled else None))
    assert seen[0][::4] == [0.1, 0.1, 0.05, 0.025, 0.025]
    if scheduled:  # without a schedule the strategy comes after all callbacks, so after what they save
        fit(_Rates(), ckpt_path=path, weights_only=True)
        assert seen[1] == seen[0][8:]


def test_a_plateau_needs_validation(make_module: Maker, make_trainer: Maker, train: Any) -> None:
    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), sgd, ReduceLROnPlateau), max_epochs=1)
    with pytest.raises(ValueError, match="follows what validation says"):
        trainer.fit(make_module(), train)


@pytest.mark.parametrize("make", [partial(ReduceLROnPlateau, mode="min")], ids=["min"])
def test_the_task_follows_a_plateau_under_auto(
    make: Any, make_net: Maker, make_trainer: Maker, train: Any, validation: Any
) -> None:
    module = _Scripted(
        make_net(), torch.zeros(2, 12), 3, optimizer=sgd, scheduler=partial(make, patience=0, factor=0.5)
    )
    rates = _Rates()
    make_trainer(strategy="auto", max_epochs=5, callbacks=[rates]).fit(module, train, validation)
    assert [rate for rate, *_ in rates.seen[::4]] == [0.1, 0.1, 0.05, 0.025, 0.025]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_units_on_a_cpu_do_not_ask_for_gpus(
    make: Callable[..., Any], make_module: Callable[..., Classification], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every step optimizers do, and under Lightning that costs more than a small unit's step."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("cuda"))
    task = make_module()
    task.use(MonoForward(seed=0))
    groups = task.algorithm.units()["layer1"]
    plain, (ours, *_) = make(groups, lr=0.1), make_optimizers(task.algorithm, partial(make, lr=0.1)).values()
    for optimizer in (plain, ours):
        for group in groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        asked.clear()
        optimizer.step()
        assert not asked or optimizer is plain
        assert asked or optimizer is ours or not torch.backends.cuda.is_built()
    twin = copy.deepcopy(ours)  # as for a warm-up: works as any other
    twin.step()


def test_gradients_are_let_go_and_a_zero_grad_of_somebodys_own_is_called(
    train: Any, make_module: Callable[..., Classification], make_trainer: Callable[..., pl.Trainer]
) -> None:
    zeroed = []

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            zeroed.append(any(p.grad is not None for group in self.param_groups for p in group["params"]))
            super().zero_grad(set_to_none)

    for make in (torch.optim.SGD, Own):
        task = make_module()
        trainer = make_trainer(strategy=LocalStrategy(MonoForward(seed=0), partial(make, lr=0.1)), max_epochs=1)
        trainer.fit(task, train)
        assert task.algorithm is not None
        assert all(p.grad is None for p in task.algorithm.parameters())
    assert sum(zeroed) == len(train) * len(task.algorithm.units())


def test_gradients_of_a_callbacks_own_backward_pass_have_no_part_in_a_step(
    train: Any, make_module: Callable[..., Classification], make_trainer: Callable[..., pl.Trainer]
) -> None:
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            module.net(batch[0]).sum().backward()

    tasks = []
    for callbacks in ([], [Look()]):
        task = make_module()
        strategy = LocalStrategy(MonoForward(seed=0), partial(torch.optim.SGD, lr=0.1))
        make_trainer(strategy=strategy, max_epochs=1, callbacks=callbacks).fit(task, train)
        tasks.append(task)
    for plain, looked in zip(*(task.net.parameters() for task in tasks), strict=True):
        assert torch.equal(plain, looked)
