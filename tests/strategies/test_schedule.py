"""When each unit trains, when it stops, and which of its weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, Backprop, ForwardForward, MonoForward
from locallearn.nets import Blocks
from locallearn.strategies import LocalStrategy, Schedule
from locallearn.tasks.classification import Classification

Maker = Callable[..., Any]
adam = partial(torch.optim.Adam, lr=1e-2)
wild = partial(torch.optim.SGD, lr=3.0)  # so large that the last epoch is not the best
UNITS = ["layer1", "layer2", "layer3"]


class Diary(pl.Callback):
    """Notes metrics and weights as they are at the end of every validation; stands before the schedule."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.loss: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.training: list[dict[str, bool]] = []
        self.epochs: list[int] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        modes = {name: m.training for name, m in module.net.members.named_children()}
        if len(self.training) <= trainer.current_epoch:
            self.training.append(modes)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.accuracy.append(float(trainer.callback_metrics["validation/accuracy"]))
        self.loss.append(float(trainer.callback_metrics["validation/loss"]))
        self.weights.append(_state(module))
        self.epochs.append(trainer.current_epoch)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def _unit(algorithm: Algorithm, module: nn.Module, unit: str) -> list[str]:
    own = {id(p) for group in algorithm.units()[unit] for p in group["params"]}
    return [name for name, p in module.named_parameters() if id(p) in own]


def _changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture
def fit(make_module: Maker, make_trainer: Maker, train: Any, validation: Any) -> Maker:
    """Train a fresh module; returns the trainer, the module and the diary."""

    def run(
        schedule: Schedule,
        algorithm: Algorithm | None = None,
        epochs: int = 3,
        optimizer: Any = adam,
        module: Classification | None = None,
        callbacks: tuple[pl.Callback, ...] = (),
        scheduler: Any = None,
        data: Any = None,
        trainer: dict[str, Any] | None = None,
        **options: Any,
    ) -> tuple[pl.Trainer, Classification, Diary]:
        diary = Diary()
        if module is None:
            module = make_module(optimizer=optimizer)
        strategy = "auto" if algorithm is None else LocalStrategy(algorithm, optimizer, scheduler)
        made = make_trainer(
            strategy=strategy, max_epochs=epochs, callbacks=[diary, *callbacks, schedule], **(trainer or {})
        )
        made.fit(module, train if data is None else data, validation, **options)
        return made, module, diary

    return run


# -- stopping and restoring -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [MonoForward, Backprop, None], ids=["mono_forward", "backprop", "auto"])
@pytest.mark.parametrize("monitor", [None, "validation/loss"])
def test_joint_restores_the_best_epoch(
    make: Callable[[], Algorithm] | None, monitor: Any, fit: Maker, validation: Any
) -> None:
    schedule = Schedule(monitor=monitor)
    trainer, module, diary = fit(schedule, make and make(), epochs=8, optimizer=wild)
    values = diary.accuracy if monitor is None else [-loss for loss in diary.loss]
    best = values.index(max(values))
    assert best < 7, "the last epoch was the best, so this run shows nothing"
    assert not _changed(_state(module), diary.weights[best])
    (metrics,) = trainer.validate(module, validation, verbose=False)
    assert metrics["validation/accuracy"] == diary.accuracy[best]
    assert schedule.epochs_by_stage == [8]


def test_the_last_epoch_is_kept_where_asked(fit: Maker) -> None:
    _, module, diary = fit(Schedule(restore_best=False), MonoForward(), epochs=8, optimizer=wild)
    assert not _changed(_state(module), diary.weights[-1])


def test_units_train_one_after_another_under_one_cap(fit: Maker) -> None:
    caps: list[int | None] = []

    class Caps(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            caps.append(trainer.max_epochs)

    schedule, algorithm = Schedule(sequential=True, restore_best=False), MonoForward()
    trainer, module, diary = fit(schedule, algorithm, epochs=2, callbacks=(Caps(),))
    assert schedule.epochs_by_stage == [2, 2, 2]
    assert caps == [6] * 6  # what all stages may have together, as progress bars and schedulers are told
    assert trainer.current_epoch == 6
    assert trainer.global_step == 6 * 4
    for epoch in range(1, 6):
        now = UNITS[epoch // 2]
        assert _changed(diary.weights[epoch - 1], diary.weights[epoch]) == set(_unit(algorithm, module, now))
    assert algorithm.active is None


def test_validation_of_a_stage_is_that_of_the_network_so_far(fit: Maker, validation: Any) -> None:
    _, _, diary = fit(Schedule(sequential=True), MonoForward(), epochs=1)
    first = diary.weights[0]
    hits = samples = 0
    for batch in validation.batches:
        hidden = torch.relu(batch.inputs @ first["net.members.layer1.0.weight"].T + first["net.members.layer1.0.bias"])
        scores = hidden @ first["algorithm.heads.projections.0.projection"].T
        hits += int((scores.argmax(1) == batch.targets).sum())
        samples += len(batch.targets)
    assert diary.accuracy[0] == pytest.approx(hits / samples)
    assert diary.accuracy[0] not in (0.0, 1.0)


def test_patience_ends_a_stage(fit: Maker) -> None:
    """With a learning rate of zero nothing improves after the first epoch of a stage."""
    schedule = Schedule(sequential=True, patience=2, monitor="validation/loss")
    fit(schedule, MonoForward(), epochs=9, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert schedule.epochs_by_stage == [3, 3, 3]
    joint = Schedule(patience=2)
    fit(joint, MonoForward(), epochs=9, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert joint.epochs_by_stage == [3]
    auto = Schedule(patience=2)
    fit(auto, None, epochs=9, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert auto.epochs_by_stage == [3]


def test_improvements_below_min_delta_do_not_count(fit: Maker) -> None:
    schedule = Schedule(patience=1, min_delta=1e6, monitor="validation/loss")
    fit(schedule, MonoForward(), epochs=9)
    assert schedule.epochs_by_stage == [2]


def test_every_stage_gets_its_best_weights_back(fit: Maker, validation: Any) -> None:
    algorithm = MonoForward()
    trainer, module, diary = fit(Schedule(sequential=True), algorithm, epochs=6, optimizer=wild)
    last_was_best = True
    for stage, unit in enumerate(UNITS):
        epochs = range(6 * stage, 6 * stage + 6)
        best = max(epochs, key=lambda epoch: diary.accuracy[epoch])
        last_was_best &= best == epochs[-1]
        kept = {name: _state(module)[name] for name in _unit(algorithm, module, unit)}
        assert not _changed(kept, diary.weights[best]), unit
    assert not last_was_best, "the last epochs were the best, so this run shows nothing"
    (metrics,) = trainer.validate(module, validation, verbose=False)
    assert metrics["validation/accuracy"] == max(diary.accuracy[-6:])


def test_forward_forward_trains_its_readout_last(fit: Maker) -> None:
    schedule, algorithm = Schedule(sequential=True), ForwardForward(inference="softmax")
    _, _, diary = fit(schedule, algorithm, epochs=2)
    assert schedule.epochs_by_stage == [2, 2, 2, 2]
    assert _changed(diary.weights[-2], diary.weights[-1]) == {"algorithm.readout.weight"}


class _Unjudged(MonoForward):
    """Its predictions say nothing about the first block."""

    @property
    def judges(self) -> bool:
        return self.trains("layer3")


def test_a_stage_that_validation_cannot_judge_has_all_epochs_and_keeps_its_last_weights(fit: Maker) -> None:
    schedule, algorithm = Schedule(sequential=True, patience=1), _Unjudged()
    _, module, diary = fit(schedule, algorithm, epochs=4, optimizer=wild)
    assert schedule.epochs_by_stage[:2] == [4, 4]
    for unit, last in (("layer1", 3), ("layer2", 7)):
        kept = {name: _state(module)[name] for name in _unit(algorithm, module, unit)}
        assert not _changed(kept, diary.weights[last]), unit
    assert max(diary.accuracy[:4]) > diary.accuracy[3] or max(diary.accuracy[4:8]) > diary.accuracy[7]


# -- validations that do not come with every epoch, and trainings that something else ends --------------------------------
_WHEN_VALIDATED: list[dict[str, Any]] = [
    {"check_val_every_n_epoch": 2},
    {"check_val_every_n_epoch": 5},
    {"val_check_interval": 0.5},
    {"val_check_interval": 3},
    {"val_check_interval": 3, "check_val_every_n_epoch": None},
    {"val_check_interval": "00:01:00:00"},
    {"limit_train_batches": 3},
]


@pytest.mark.parametrize("options", _WHEN_VALIDATED, ids=str)
def test_a_stage_has_its_epochs_whenever_validations_come(options: dict[str, Any], fit: Maker) -> None:
    schedule, algorithm = Schedule(sequential=True), MonoForward()
    trainer, module, diary = fit(schedule, algorithm, epochs=3, optimizer=wild, trainer=options)
    assert schedule.epochs_by_stage == [3, 3, 3]
    assert trainer.current_epoch == 9
    assert algorithm.active is None
    assert trainer.check_val_every_n_epoch == options.get("check_val_every_n_epoch", 1)
    kept = {name: _state(module)[name] for name in _unit(algorithm, module, "layer3")}
    validations = [i for i, epoch in enumerate(diary.epochs) if epoch >= 6]  # of the last stage
    assert diary.epochs[-1] == 8
    assert not _changed(kept, {n: diary.weights[max(validations, key=lambda i: diary.accuracy[i])][n] for n in kept})


@pytest.mark.parametrize("make", [Backprop, None], ids=["backprop", "auto"])
@pytest.mark.parametrize(
    "options",
    [{"max_steps": 7}, {"max_steps": 7, "check_val_every_n_epoch": 5}, {"val_check_interval": 3}],
    ids=str,
)
def test_the_best_weights_come_back_whatever_ends_the_training(make: Any, options: dict[str, Any], fit: Maker) -> None:
    schedule = Schedule()
    _, module, diary = fit(schedule, make and make(), epochs=6, optimizer=wild, trainer=options)
    best = diary.accuracy.index(max(diary.accuracy))
    assert not _changed(_state(module), diary.weights[best])
    assert schedule.epochs_by_stage == [2 if "max_steps" in options else 6]


class _StopIn(pl.Callback):
    """Stops the training in one hook of an epoch, as EarlyStopping or a time limit does."""

    def __init__(self, hook: str, epoch: int) -> None:
        self.epoch = epoch
        setattr(self, hook, self._stop)

    def _stop(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("hook", "epochs"), [("on_train_batch_end", 2), ("on_validation_end", 1), ("on_train_epoch_end", 2)]
)
@pytest.mark.parametrize("last", [False, True], ids=["before", "after"])
def test_who_stops_a_sequential_training_ends_all_of_it(
    hook: str, epochs: int, last: bool, make_module: Maker, make_trainer: Maker, train: Any, validation: Any
) -> None:
    schedule, algorithm, diary = Schedule(sequential=True), MonoForward(), Diary()
    stop = _StopIn(hook, 2 + epochs)
    callbacks = [diary, schedule, stop] if last else [diary, stop, schedule]
    module = make_module()
    strategy = LocalStrategy(algorithm, wild)
    trainer = make_trainer(strategy=strategy, max_epochs=3, check_val_every_n_epoch=2, callbacks=callbacks)
    trainer.fit(module, train, validation)
    assert schedule.epochs_by_stage == [3, epochs]
    assert schedule.untrained(algorithm) == ["layer3"]
    assert algorithm.active is None
    kept = {name: _state(module)[name] for name in _unit(algorithm, module, "layer2")}
    second = [i for i, epoch in enumerate(diary.epochs) if epoch >= 3]
    best = max(second, key=lambda i: diary.accuracy[i])
    assert not _changed(kept, {name: diary.weights[best][name] for name in kept})
    with schedule.as_far_as_trained(algorithm):
        assert algorithm.active == {"layer2"}
    assert algorithm.active is None


def test_patience_waits_for_the_least_number_of_epochs(fit: Maker) -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    schedule = Schedule(sequential=True, patience=1)
    fit(schedule, MonoForward(), epochs=9, optimizer=still, trainer={"min_epochs": 4})
    assert schedule.epochs_by_stage == [4, 4, 4]
    joint = Schedule(patience=1)
    fit(joint, MonoForward(), epochs=9, optimizer=still, trainer={"min_steps": 18})
    assert joint.epochs_by_stage == [5]


def test_no_number_is_never_the_best(make_module: Maker, make_trainer: Maker, train: Any, validation: Any) -> None:
    class Blind(Classification):
        def figures(self, sums: list[float]) -> dict[str, float]:
            blind = self.trainer.current_epoch in (0, 2)
            return {name: float("nan") if blind else value for name, value in super().figures(sums).items()}

    plain = make_module()
    module = Blind(plain.net, torch.zeros(2, 12), 3)
    schedule, diary = Schedule(patience=9, monitor="validation/loss"), Diary()
    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), wild), max_epochs=3, callbacks=[diary, schedule])
    trainer.fit(module, train, validation)
    assert schedule.best == pytest.approx(diary.loss[1])
    assert not _changed(_state(module), diary.weights[1])


# -- frozen blocks ----------------------------------------------------------------------------------------------------
def _normalised() -> Blocks:
    torch.manual_seed(0)
    blocks: dict[str, nn.Module] = {}
    for i, (before, after) in enumerate([(12, 10), (10, 9), (9, 8)]):
        blocks[UNITS[i]] = nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
    return Blocks(blocks, nn.Linear(8, 3))


def test_batch_norm_of_frozen_blocks_rests(fit: Maker, make_module: Maker) -> None:
    """Its statistics move while its block trains, and neither before nor after."""
    with torch.random.fork_rng():
        net = _normalised()
    _, _, diary = fit(Schedule(sequential=True, restore_best=False), MonoForward(), 2, module=make_module(net))
    for epoch in range(1, 6):
        moved = {
            name.split(".")[2] for name in _changed(diary.weights[epoch - 1], diary.weights[epoch]) if "run" in name
        }
        assert moved == {UNITS[epoch // 2]}, f"epoch {epoch}"
    wanted = [{unit: i == epoch // 2 for i, unit in enumerate(UNITS)} for epoch in range(6)]
    assert diary.training == wanted


@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "batch_norm"])
def test_a_cache_changes_no_weight(normalised: bool, fit: Maker, make_module: Maker) -> None:
    ends, runs = [], []
    for cache in (False, True):
        with torch.random.fork_rng():
            module = make_module(_normalised() if normalised else None)
        calls = [0, 0, 0]
        for i, block in enumerate(module.net):
            block.register_forward_hook(partial(_count, calls, i))
        _, module, _ = fit(Schedule(sequential=True, cache=cache), MonoForward(), epochs=3, module=module)
        ends.append(_state(module))
        runs.append(calls)
    assert not _changed(*ends)
    # Of 4 batches in 3 epochs of 3 stages and 2 validation batches in each of 9 epochs: without a cache block 1 runs in
    # all of them; with it, in its own stage, in the first epoch of the next, and in validation.
    dry_run = 1
    assert runs[0][0] == 3 * 3 * 4 + 9 * 2 + dry_run
    assert runs[1][0] == 3 * 4 + 4 + 9 * 2 + dry_run


def _count(calls: list[int], index: int, *args: Any) -> None:
    calls[index] += 1


def test_a_cache_needs_a_rule_without_draws_and_samples_with_a_place(fit: Maker, train: Any) -> None:
    with pytest.raises(ValueError, match="draws anew for every batch"):
        fit(Schedule(sequential=True, cache=True), ForwardForward())
    train.batches = [batch._replace(index=None) for batch in train.batches]
    with pytest.raises(ValueError, match=r"Batch\.index"):
        fit(Schedule(sequential=True, cache=True), MonoForward())


def test_plain_backpropagation_has_nothing_to_cache(fit: Maker) -> None:
    with pytest.raises(ValueError, match="no frozen activations to cache"):
        fit(Schedule(sequential=True, cache=True))


# -- resuming ---------------------------------------------------------------------------------------------------------
class _SaveAt(pl.Callback):
    """Leaves a checkpoint after so many steps and lets the training go on."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [10, 12, 20, 30, 34])
@pytest.mark.parametrize("make", [MonoForward, ForwardForward])
def test_resuming_a_sequential_schedule_is_exact(
    make: Callable[[], Algorithm], step: int, fit: Maker, train: Any, tmp_path: Path
) -> None:
    """12 steps a stage, 4 an epoch: inside the first, at its end, inside the second and the last stage."""
    path = tmp_path / "half.ckpt"
    whole, first, _ = fit(Schedule(sequential=True), make(), optimizer=wild, callbacks=(_SaveAt(step, path),))
    schedule = Schedule(sequential=True)
    data = type(train)(train.batches)
    again, second, _ = fit(schedule, make(), optimizer=wild, data=data, ckpt_path=path, weights_only=True)
    assert schedule.epochs_by_stage == [3, 3, 3]
    assert again.global_step == whole.global_step
    assert not _changed(_state(first), _state(second))


def test_a_checkpoint_between_stages_resumes_with_the_next(fit: Maker, train: Any, tmp_path: Path) -> None:
    """What ModelCheckpoint leaves after the last epoch of the first stage holds its restored weights."""
    path = tmp_path / "between.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(path)

    _, first, _ = fit(Schedule(sequential=True), MonoForward(), optimizer=wild, callbacks=(Save(),))
    data = type(train)(train.batches)
    _, second, _ = fit(Schedule(sequential=True), MonoForward(), optimizer=wild, data=data, ckpt_path=path)
    assert not _changed(_state(first), _state(second))


@pytest.mark.parametrize("make", [MonoForward, None], ids=["mono_forward", "auto"])
@pytest.mark.parametrize("cap", [5, 3])
def test_resuming_where_nothing_is_left_to_train_ends_with_the_best_weights(
    make: Any, cap: int, fit: Maker, train: Any, tmp_path: Path
) -> None:
    path = tmp_path / "fifth.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(path)

    _, _, diary = fit(Schedule(), make and make(), epochs=8, optimizer=wild, callbacks=(Save(),))
    best = max(range(5), key=lambda epoch: diary.accuracy[epoch])
    assert best < 4, "the fifth epoch was the best, so this run shows nothing"
    schedule = Schedule()
    data = type(train)(train.batches)
    trainer, module, _ = fit(schedule, make and make(), epochs=cap, optimizer=wild, data=data, ckpt_path=path)
    assert schedule.epochs_by_stage == [5]
    assert trainer.global_step == 20
    assert not _changed(_state(module), diary.weights[best])


def test_a_lower_cap_at_a_resume_ends_the_stage_at_once_and_not_the_next(
    fit: Maker, train: Any, tmp_path: Path
) -> None:
    path = tmp_path / "third.ckpt"
    fit(Schedule(sequential=True), MonoForward(), epochs=5, callbacks=(_SaveAt(14, path),))
    schedule, data = Schedule(sequential=True), type(train)(train.batches)
    fit(schedule, MonoForward(), epochs=2, data=data, ckpt_path=path)
    assert schedule.epochs_by_stage == [4, 2, 2]  # the fourth epoch had begun


def test_a_finished_training_that_is_given_more_epochs_goes_on(fit: Maker, train: Any, validation: Any) -> None:
    schedule = Schedule()
    trainer, module, diary = fit(schedule, MonoForward(), epochs=3, optimizer=wild)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, train, validation)
    assert schedule.epochs_by_stage == [5]
    assert schedule.best == max(diary.accuracy)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patience": 0}, "patience is 0"),
        ({"monitor": "loss"}, "monitor is 'loss'"),
        ({"min_delta": -1.0}, "min_delta is -1.0"),
        ({"cache": True}, "joint schedule freezes none"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Schedule(**options)


def test_combinations_that_cannot_work_are_refused(fit: Maker) -> None:
    with pytest.raises(ValueError, match="nothing ends the first stage"):
        fit(Schedule(sequential=True), MonoForward(), epochs=-1, trainer={"max_steps": 9})
    with pytest.raises(ValueError, match="there is none under this strategy"):
        fit(Schedule(sequential=True))
    with pytest.raises(ValueError, match="barebones"):
        fit(Schedule(), MonoForward(), trainer={"barebones": True})
    averaged = WeightAveraging(avg_fn=lambda old, new, _: (old + new) / 2)
    with pytest.raises(ValueError, match="WeightAveraging"):
        fit(Schedule(), MonoForward(), callbacks=(averaged,))
    with pytest.raises(ValueError, match="no sequential schedule"):
        fit(Schedule(sequential=True), Backprop())
    steps = partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    with pytest.raises(ValueError, match="learning rate scheduler"):
        fit(Schedule(sequential=True), MonoForward(), scheduler=steps)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("schedule", [Schedule(sequential=True), Schedule(patience=3)], ids=["sequential", "patience"])
def test_a_schedule_that_waits_for_validation_wants_some(
    schedule: Schedule, make_module: Maker, make_trainer: Maker, train: Any
) -> None:
    trainer = make_trainer(strategy=LocalStrategy(MonoForward(), adam), max_epochs=2, callbacks=[schedule])
    with pytest.raises(ValueError, match="validation"):
        trainer.fit(make_module(), train)
