"""Loggers: every one gets the same names, and none can cost a run its figures."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from locallearn.cli.loggers import logger_maker
from locallearn.cli.settings import UsageError, compose_settings, options
from locallearn.records import Record, load_record
from locallearn.study._copies import logged_name
from locallearn.study.train import Interrupted, run
from tests.study.conftest import MakePlan


def _maker(name: str, runs_dir: Path) -> Any:
    """What ``logger=NAME`` makes, with records in ``runs_dir``."""
    from omegaconf import OmegaConf

    cfg, _ = compose_settings([f"logger={name}", f"runs_dir={runs_dir}"])
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    return logger_maker(config["logger"])


def _csv(folder: Path) -> dict[str, list[float]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def _tensorboard(folder: Path) -> dict[str, list[float]]:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.parent / "tensorboard" / folder.name))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _mlflow(folder: Path) -> dict[str, list[float]]:
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert (found.info.run_name, found.info.status) == (folder.name, "FINISHED")
    assert found.data.params["seed"] == "0"
    metrics = found.data.metrics
    return {name: [point.value for point in client.get_metric_history(found.info.run_id, name)] for name in metrics}


def _wandb(folder: Path) -> dict[str, list[float]]:
    """What the package was given; its file is one of its own, in which the names can be read."""
    (file,) = (folder.parent / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert folder.name.encode() in content
    assert all(name.encode() in content for name in SEEN)
    return {name: values for name, values in SEEN.items() if name != "trainer/global_step"}


def _aim(folder: Path) -> dict[str, list[float]]:
    """What the package was given, and that there is one run."""
    aim = pytest.importorskip("aim")
    (found,) = aim.Repo(str(folder.parent)).list_all_runs()
    assert aim.Run(found, repo=str(folder.parent), read_only=True).name == folder.name
    return dict(SEEN)


SEEN: dict[str, list[float]] = {}
"""Figures by name that a package whose files cannot be read back easily was given."""


def _spy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    if name == "wandb":
        from wandb.sdk.wandb_run import Run

        log = Run.log

        def logged(self: Any, data: dict[str, Any], *args: Any, **others: Any) -> None:
            assert self.settings.x_disable_stats  # its own look at the machine would be in the metered window
            for key, value in data.items():
                SEEN.setdefault(key, []).append(value)
            log(self, data, *args, **others)

        monkeypatch.setattr(Run, "log", logged)
    elif name == "aim":
        import aim

        track = aim.Run.track

        def tracked(self: Any, value: Any, name: str, **others: Any) -> None:
            SEEN.setdefault(name, []).append(value)
            track(self, value, name, **others)

        monkeypatch.setattr(aim.Run, "track", tracked)


READERS = {"csv": _csv, "tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "aim": _aim}


def test_every_choice_of_a_logger_is_read_here() -> None:
    assert set(options("logger")) == {*READERS, "none"}


@pytest.mark.parametrize("name", READERS)
def test_every_logger_has_the_names_and_figures_of_the_record(
    name: str, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for those that write where they are
    try:
        logger = _maker(name, tmp_path / "runs")
    except UsageError as error:
        pytest.skip(str(error))
    config = {"seed": 0, "optimizer": {"lr": 0.1}}
    _spy(name, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these packages say of each other
        folder = run(make_plan("backprop", logger=logger, probe_samples=20, config=config))
        found = READERS[name](folder)
    record = load_record(folder)
    assert record.data.get("notes") == []
    logged = {logged_name(row.name): row.value for row in record.metrics()}
    logged |= {f"test/{part}": value for part, value in record.data["test"].items()}
    costs = {
        f"cost/{part}" for part in ("train_s", "validation_s", "update_flops", "train_flops", "activation_peak_bytes")
    }
    assert found.keys() - {"epoch", "step"} == logged.keys() | costs
    assert {key: found[key][-1] for key in logged if key != "cost/train_s"} == pytest.approx(
        {key: value for key, value in logged.items() if key != "cost/train_s"}
    )
    assert len(found["validation/accuracy"]) == 2  # epochs: Lightning's own rows would make it four


def test_names_are_such_that_every_logger_takes_them() -> None:
    """TensorBoard's are the narrowest: letters, digits and ``_-./``."""
    assert logged_name("cost/energy_j/nvml:0 NVIDIA H100") == "cost/energy_j/nvml_0_NVIDIA_H100"
    assert logged_name("block/layer1/probe_accuracy") == "block/layer1/probe_accuracy"
    assert logged_name("größe") == "gr__e"


def test_a_resumed_run_s_logger_begins_at_the_beginning(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from locallearn.study._callbacks import _Keeper

    def stop(self: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            self._stop.set()
        original(self, trainer, module)

    original = _Keeper.on_validation_end
    with monkeypatch.context() as patched:
        patched.setattr(_Keeper, "on_validation_end", stop)
        with pytest.raises(Interrupted) as stopped:
            run(make_plan("backprop", logger=_maker("csv", tmp_path / "runs"), max_epochs=3))
    first = stopped.value.run_folder  # type: ignore[attr-defined]
    assert _csv(first)["epoch"] == [0, 1]
    second = run(make_plan("backprop", logger=_maker("csv", tmp_path / "runs"), max_epochs=3, resume=first))
    assert _csv(second)["epoch"] == [0, 1, 2, 2]
    assert _csv(second)["validation/accuracy"] == [
        row.value for row in Record(second, {}).metrics() if row.name == "validation/accuracy"
    ]


@pytest.mark.parametrize("method", ["log_metrics", "log_hyperparams", "save", "finalize"])
def test_a_logger_that_fails_costs_the_run_nothing(
    method: str, make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **others: Any) -> None:
        raise OSError("the server is gone")

    monkeypatch.setattr(CSVLogger, method, fail)
    plan = make_plan("backprop", logger=CSVLogger(tmp_path / "own"), config={"seed": 0}, max_epochs=1)
    record = load_record(run(plan)).data
    assert record["status"] == "done"
    assert record["test"]["accuracy"] is not None
    (note,) = record["notes"]
    assert note.startswith("CSVLogger could not")
    assert note.endswith("OSError: the server is gone")


def test_a_logger_that_cannot_be_made_is_why_the_run_failed(make_plan: MakePlan) -> None:
    def make(folder: Path) -> Any:
        raise ValueError("no such server")

    with pytest.raises(ValueError, match="no such server") as failed:
        run(make_plan("backprop", logger=make, max_epochs=1))
    record = load_record(failed.value.run_folder).data  # type: ignore[attr-defined]
    assert (record["status"], record["error"]) == ("failed", "no such server")
