from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from locallearn.energy import CodeCarbonMeter, EnergyCallback, EnergyMonitor, ReplayMeter

TRAIN_S, VALIDATE_S, SAVE_S, BATCHES, POWER_W = 1.0, 10.0, 100.0, 3, 5.0


class Timed(LightningModule):
    """Each training batch takes 1 s on the fake clock, each validation batch 10 s; the clock stops otherwise."""

    def __init__(self, clock: Any, fail_at_step: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.clock = clock
        self.fail_at_step = fail_at_step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.clock.pass_by(TRAIN_S)
        if self.global_step == self.fail_at_step:
            raise ArithmeticError
        loss: Tensor = self.layer(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.clock.pass_by(VALIDATE_S)
        self.log("score", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SlowCheckpoint(ModelCheckpoint):
    """Saving takes 100 s."""

    def __init__(self, clock: Any, folder: Path, **options: Any) -> None:
        super().__init__(dirpath=folder, **options)
        self.clock = clock

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.clock.pass_by(SAVE_S)
        super()._save_checkpoint(trainer, filepath)


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(BATCHES, 2)), batch_size=1)


def _fit(
    clock: Any,
    callbacks: list[Any],
    epochs: int,
    fail_at_step: int | None = None,
    sanity: int = 0,
    resume: Path | None = None,
    **options: Any,
) -> EnergyCallback:
    meter = ReplayMeter([(0, 0), (1e6, 1e6 * POWER_W)], clock=clock)
    energy = EnergyCallback(EnergyMonitor([meter], clock=clock))
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, energy],
        num_sanity_val_steps=sanity,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    try:
        weights_only = True if resume else None
        trainer.fit(Timed(clock, fail_at_step), _loader(), _loader(), ckpt_path=resume, weights_only=weights_only)
    except ArithmeticError:
        assert fail_at_step is not None
    return energy


pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:GPU available but not used",
    # Lightning 2.6 under torch 2.15.
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Checkpoint directory .* exists and is not empty",
)


def test_only_training_is_counted(clock: Any) -> None:
    energy = _fit(clock, [], epochs=4, sanity=2)
    assert energy.seconds == 4 * BATCHES * TRAIN_S
    assert energy.validation_seconds == 4 * BATCHES * VALIDATE_S
    (reading,) = energy.readings
    assert reading.joules == pytest.approx(POWER_W * 4 * BATCHES * TRAIN_S)
    assert energy.running_seconds() == energy.seconds
    assert energy.running_joules() == {"replay": reading.joules}
    assert energy.co2_g is None


@pytest.mark.parametrize("options", [{"save_on_train_epoch_end": True}, {"save_on_train_epoch_end": False}])
def test_saving_checkpoints_is_not_counted(clock: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    began_s = clock()
    checkpoint = SlowCheckpoint(clock, tmp_path, monitor="score", save_top_k=-1, **options)
    energy = _fit(clock, [checkpoint], epochs=2)
    assert clock() - began_s >= 2 * SAVE_S
    assert energy.seconds == 2 * BATCHES * TRAIN_S
    assert energy.validation_seconds == 2 * BATCHES * VALIDATE_S


def test_saving_without_validation_is_not_counted(clock: Any, tmp_path: Path) -> None:
    checkpoint = SlowCheckpoint(clock, tmp_path, save_top_k=-1, every_n_epochs=1)
    energy = _fit(clock, [checkpoint], epochs=2, limit_val_batches=0)
    assert energy.seconds == 2 * BATCHES * TRAIN_S
    assert energy.validation_seconds == 0.0


@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"train_time_interval": timedelta(0)}])
def test_saving_between_two_steps_is_not_counted(clock: Any, tmp_path: Path, when: dict[str, Any]) -> None:
    class Slow(ModelCheckpoint):
        """Writing takes 100 s, once the checkpoint has been put together."""

        def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            clock.pass_by(SAVE_S)

    began_s = clock()
    energy = _fit(clock, [Slow(tmp_path, save_top_k=-1, **when)], epochs=2)
    assert clock() - began_s >= 2 * SAVE_S
    assert energy.seconds == 2 * BATCHES * TRAIN_S
    assert energy.readings[0].joules == pytest.approx(POWER_W * energy.seconds)


def test_what_is_said_to_be_paused_is_not_counted(clock: Any, constant: Any) -> None:
    energy = EnergyCallback(EnergyMonitor([ReplayMeter(constant(1.0), clock=clock)], clock=clock))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    module: Any = None
    with energy.paused():  # before training there is nothing to pause
        clock.pass_by(7)
    energy.on_train_start(trainer, module)
    clock.pass_by(2)
    with energy.paused():
        clock.pass_by(100)
    clock.pass_by(3)
    energy.on_train_end(trainer, module)
    assert energy.seconds == 5.0


def test_validation_within_an_epoch(clock: Any, tmp_path: Path) -> None:
    checkpoint = SlowCheckpoint(clock, tmp_path, monitor="score", save_top_k=-1, save_on_train_epoch_end=False)
    energy = _fit(clock, [checkpoint], epochs=2, val_check_interval=1)
    assert energy.seconds == 2 * BATCHES * TRAIN_S
    assert energy.validation_seconds == 2 * BATCHES * BATCHES * VALIDATE_S


def test_an_exception_closes_the_window(clock: Any) -> None:
    energy = _fit(clock, [], epochs=4, fail_at_step=4)
    assert energy.seconds == 5 * TRAIN_S
    clock.pass_by(1000)
    assert energy.seconds == 5 * TRAIN_S
    assert energy.readings[0].joules == pytest.approx(POWER_W * 5)
    assert not any(meter.in_use for meter in energy._monitor.meters)


@pytest.mark.parametrize("stop", ["epoch end", "mid epoch"])
def test_a_resumed_run_covers_both_parts(clock: Any, tmp_path: Path, stop: str) -> None:
    when: dict[str, Any] = (
        {"every_n_epochs": 1, "save_on_train_epoch_end": True} if stop == "epoch end" else {"every_n_train_steps": 2}
    )

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **when)

    # The first part dies in the fourth batch; the checkpoint was written after the third, or the second.
    _fit(clock, [checkpoint()], epochs=4, fail_at_step=4)
    (saved,) = [path for path in tmp_path.iterdir() if path.stem == ("step=3" if stop == "epoch end" else "step=2")]
    clock.pass_by(12345)
    energy = _fit(clock, [checkpoint()], epochs=4, resume=saved)
    assert energy.seconds == 4 * BATCHES * TRAIN_S
    assert energy.readings[0].joules == pytest.approx(POWER_W * 4 * BATCHES * TRAIN_S)
    assert energy.validation_seconds == 4 * BATCHES * VALIDATE_S


def test_a_second_fit_counts_from_zero(clock: Any) -> None:
    energy = _fit(clock, [], epochs=1)
    trainer = Trainer(
        max_epochs=2,
        callbacks=[energy],
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Timed(clock), _loader(), _loader())
    assert (energy.seconds, energy.validation_seconds) == (2 * BATCHES * TRAIN_S, 2 * BATCHES * VALIDATE_S)
    trainer.validate(Timed(clock), _loader(), verbose=False)
    assert energy.validation_seconds == 2 * BATCHES * VALIDATE_S


def test_a_source_missing_in_one_part_has_no_total(clock: Any, constant: Any) -> None:
    def callback(source: str) -> EnergyCallback:
        return EnergyCallback(EnergyMonitor([ReplayMeter(constant(1.0), source=source, clock=clock)], clock=clock))

    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    module: Any = None
    first, second = callback("old"), callback("new")
    first.on_train_start(trainer, module)
    clock.pass_by(2)
    first.on_train_end(trainer, module)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()  # a part that never begins loses nothing
    second.on_train_start(trainer, module)
    clock.pass_by(3)
    second.on_train_end(trainer, module)
    assert second.seconds == 5.0
    assert second.running_joules() == {"old": None, "new": None}
    assert [reading.reason for reading in second.readings] == [
        "not metered in the part after the resume",
        "not metered in the part before the resume",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_the_meters_learn_the_device_of_the_fit(clock: Any, constant: Any, device: str) -> None:
    told: list[str] = []
    meter = ReplayMeter(constant(1.0), clock=clock)
    meter.use = told.append  # type: ignore[method-assign]
    energy = EnergyCallback(EnergyMonitor([meter], synchronise=lambda: None, clock=clock))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    energy.on_train_start(trainer, None)  # type: ignore[arg-type]
    energy.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert told == [device]


def _fake(device: str = "cpu") -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


def test_before_a_fit_there_is_nothing(clock: Any) -> None:
    energy = EnergyCallback(EnergyMonitor([], clock=clock))
    assert (energy.seconds, energy.validation_seconds, energy.co2_g, energy.readings) == (0.0, 0.0, None, [])
    energy.on_exception(_fake(), None, ValueError())  # type: ignore[arg-type]  # before training, say
    with pytest.raises(RuntimeError, match="before on_train_start"):
        energy.on_train_epoch_start(_fake(), None)  # type: ignore[arg-type]


def test_fetching_the_first_batch_of_an_epoch_is_training(clock: Any) -> None:
    energy, module = EnergyCallback(EnergyMonitor([], clock=clock)), None
    hooks: Any = energy
    hooks.on_train_start(_fake(), module)
    hooks.on_train_epoch_end(_fake(), module)
    clock.pass_by(100)
    hooks.on_train_epoch_start(_fake(), module)
    clock.pass_by(3)
    hooks.on_train_batch_start(_fake(), module, None, 0)
    hooks.on_train_end(_fake(), module)
    hooks.on_exception(_fake(), module, ValueError())  # of another callback's, after the end
    assert energy.seconds == 3.0


def test_co2_of_both_parts(stopped: Any, tracker: Any) -> None:
    """50 W at 400 g/kWh for 20 and 70 seconds."""
    module: Any = None
    first, second = (EnergyCallback(EnergyMonitor([CodeCarbonMeter()])) for _ in range(2))
    for energy, seconds in ((first, 20), (second, 70)):
        energy.on_train_start(_fake(), module)
        stopped.pass_by(seconds)
        state = energy.state_dict()  # up to date, though the window is open
        assert state["co2_g"] == pytest.approx(50 / 3.6e6 * 400 * (20 if energy is first else 90))
        energy.on_train_end(_fake(), module)
        assert energy.state_dict()["co2_g"] == pytest.approx(state["co2_g"])
        second.load_state_dict(first.state_dict())
        assert second.seconds == (20.0 if energy is first else 90.0)
    assert second.co2_g == pytest.approx(50 * 90 / 3.6e6 * 400)


def test_a_clock_that_goes_back_gives_no_negative_validation(clock: Any) -> None:
    energy = EnergyCallback(EnergyMonitor([], clock=clock))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    module: Any = None
    energy.on_train_start(trainer, module)
    energy.on_validation_start(trainer, module)
    clock.pass_by(-50)
    energy.on_validation_end(trainer, module)
    energy.on_train_end(trainer, module)
    assert energy.validation_seconds == 0.0


def test_a_cuda_device_is_waited_for_and_its_failure_hides_no_error(
    clock: Any, constant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monitor = EnergyMonitor([ReplayMeter(constant(1.0), clock=clock)], clock=clock)
    energy = EnergyCallback(monitor)
    device = torch.device("cuda", 1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=device))
    module: Any = None
    energy.on_train_start(trainer, module)
    assert waited == [device]
    clock.pass_by(2)

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monitor.synchronise = partial(fail, device)
    energy.on_exception(trainer, module, ValueError("the user's"))
    assert energy.seconds == 2.0
    assert energy.readings[0].joules == pytest.approx(2.0)
