"""From settings to the typed objects of one run."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from locallearn.cli.arms import Arm
from locallearn.cli.loggers import logger_maker
from locallearn.cli.settings import UsageError, accepted, check_arguments, check_types, names_argument

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_MATMUL = ("highest", "high", "medium")

# Arguments of Lightning's Trainer that have no place here: what may stand there all the same, and why nothing else.
_NOT_HERE: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        ("callbacks", "enable_checkpointing", "enable_model_summary", "enable_progress_bar", "log_every_n_steps"),
        ((), "every run has its own; the library takes yours"),
    ),
    "num_sanity_val_steps": ((), "the first batch is tried in any case"),
    "strategy": ((), "every run has LocalStrategy"),
    "logger": ((), "set logger"),
    "plugins": ((None,), "set trainer.precision"),
    "barebones": ((False,), "a run without logging has nothing to record"),
    "fast_dev_run": (
        (False, 0),
        "its record would look like a real one: set trainer.max_epochs=1 and dataset.limit_train",
    ),
    "overfit_batches": ((0,), "set dataset.limit_train"),
    "accumulate_grad_batches": ((1,), "every unit steps with every batch: set a larger dataset.batch_size"),
    "num_nodes": ((1,), "a run has one device of one machine"),
    "limit_test_batches": ((None, 1.0), "the test set is read as a whole"),
    "reload_dataloaders_every_n_epochs": ((0,), "new loaders would start order and draws again"),
}


def make_plan(cfg: Any, choices: dict[str, str], command: str, arm: Arm | None = None) -> Any:
    """Typed objects for one run; ``arm`` is what it stands for in a comparison."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from locallearn.study.train import Plan

    without_patience(cfg)
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    trainer = dict(config["trainer"])
    max_epochs, probe_samples, checkpoint_s, matmul_precision = (
        trainer.pop(k) for k in ("max_epochs", "probe_samples", "checkpoint_s", "matmul_precision")
    )
    execution = _execution(*(trainer.pop(k) for k in ("channels_last", "compile", "compile_backend")))
    _check_numbers(cfg, max_epochs, probe_samples, checkpoint_s)
    check_types(config)
    _check_trainer(trainer)
    for key in ("scheduler", "logger"):
        if config[key] and not isinstance(config[key], dict):
            raise UsageError(f"{key} is {config[key]!r}, expected a mapping with a _target_, or null")
    if config["scheduler"] and not config["scheduler"].get("_partial_"):
        raise UsageError("scheduler is made for every unit's optimizer: add _partial_:true to its _target_")
    make = partial(instantiate, _convert_="all")  # library classes get lists and dicts, never OmegaConf's
    data, algorithm = make(cfg.dataset), make(cfg.algorithm)
    shapes = {"input_shape": data.shape, "outputs": config["task"].get("outputs", data.classes)}
    if getattr(data, "edge_dim", None) is not None:  # a graph whose edges carry features
        shapes["edge_dim"] = data.edge_dim
    net_settings = algorithm.net_settings
    if net_settings.keys() - accepted(cfg.net._target_, net_settings).keys():
        raise UsageError(
            f"algorithm={choices['algorithm']} needs a network made with {', '.join(net_settings)}, which net={choices['net']} "
            "does not know"
        )

    device = _device(choices["algorithm"], config["net"])

    def make_net() -> Any:
        # Only now, because the example of a graph is read from its files; and only to who names it, not to any **kwargs. The
        # weights are the seed's alone: data that draw for the first time here would change them.
        with torch.random.fork_rng(devices=[]):
            seen = {"example": data.example()} if names_argument(cfg.net._target_, "example") else {}
        return make(cfg.net, **accepted(cfg.net._target_, shapes), **seen, **net_settings)

    def make_task(net: Any) -> Any:
        given = {"example": data.example(), "classes": data.classes}
        return make(cfg.task, net=net, **accepted(cfg.task._target_, given))

    return Plan(
        names={
            **{group: choices[group] for group in ("algorithm", "net", "task")},
            "dataset": _data(config["dataset"], choices["dataset"]),
        },
        seed=cfg.seed,
        data=data,
        make_net=make_net,
        make_task=make_task,
        algorithm=algorithm,
        variant=", ".join(
            part
            for part in (
                algorithm.variant,
                device,
                *(arm.beyond(algorithm.variant, device) if arm is not None else ()),
                "sequential" if cfg.schedule.sequential else None,
            )
            if part
        )
        or None,
        optimizer=make(cfg.optimizer),
        scheduler=make(cfg.scheduler),
        scheduler_interval=cfg.scheduler_interval,
        schedule=make(cfg.schedule),
        meters=list(make(cfg.meter.sources).values()),
        idle_s=cfg.meter.idle_s,
        warmup_steps=cfg.meter.get("warmup_steps", 0),  # older records have none
        cooldown_s=cfg.meter.get("cooldown_s", 0),
        runs_dir=folder_setting(cfg, "runs_dir"),
        max_epochs=max_epochs,
        trainer={str(k): v for k, v in trainer.items()},
        matmul_precision=matmul_precision,
        **execution,
        logger=logger_maker(config["logger"]),
        config={str(k): v for k, v in config.items()},
        command=command,
        mode=cfg.compare.mode,
        target=cfg.compare.target if cfg.compare.mode == "target" else None,
        probe_samples=probe_samples,
        checkpoint_s=checkpoint_s,
        keep_model=cfg.keep_model,
        resume=None if cfg.resume is None else folder_setting(cfg, "resume"),
        init_from=None if cfg.get("init_from") is None else folder_setting(cfg, "init_from"),
        say=say,
    )


def _data(settings: Any, chosen: str) -> str:
    """The data set that a run is of: ``dataset.name`` may name another one than the group's choice."""
    ours = str(settings.get("_target_")).startswith("locallearn.")  # elsewhere a name may be that of anything
    return str(settings["name"]) if ours and settings.get("name") else chosen


def without_patience(cfg: Any) -> None:
    """Have a run of mode ``matched`` train all of its epochs, whichever command makes it: its record says so."""
    if cfg.compare.mode == "matched" and "patience" in cfg.schedule:
        cfg.schedule.patience = None


def _device(algorithm: str, net: dict[str, Any]) -> str | None:
    """What stands between the layers, as tables name it: which device, how it suffers, or that there is none.

    ``None``: neither the network nor the rule is about devices.
    """
    if "device" not in net and algorithm != "physical_ff":
        return None
    device = net.get("device")
    if not device:
        return "no device"
    settings = device if isinstance(device, dict) else {"map": device}
    name = settings.get("map", settings.get("_target_"))
    name = name.get("_target_") if isinstance(name, dict) else name
    usual = ("map", "_target_", "seed", "options", "outputs")
    told = [f"{key}={value}" for key, value in settings.items() if key not in usual and value not in (None, 0)]
    return ", ".join([f"device={name}", *told, *(["differentiable"] if net.get("differentiable") else [])])


def _execution(channels_last: Any, compile: Any, backend: Any) -> dict[str, Any]:
    """The trainer's settings of how blocks are run, found good."""
    from locallearn.nets.execution import Execution

    compile = None if compile is False else compile
    try:
        Execution(channels_last, compile, backend)
    except ValueError as error:
        raise UsageError(f"trainer.{error}") from None
    return {"channels_last": channels_last, "compile": compile, "compile_backend": backend}


def _check_numbers(cfg: Any, max_epochs: Any, probe_samples: Any, checkpoint_s: Any) -> None:
    if type(max_epochs) is not int or max_epochs < 1:
        raise UsageError(f"trainer.max_epochs is {max_epochs}, expected a whole number of at least 1")
    if type(probe_samples) is not int or probe_samples < 0:
        raise UsageError(f"trainer.probe_samples is {probe_samples}, expected a whole number, 0 for no probes")
    if type(checkpoint_s) not in (int, float) or checkpoint_s <= 0:
        raise UsageError(f"trainer.checkpoint_s is {checkpoint_s}, expected seconds above 0")
    if cfg.trainer.matmul_precision not in _MATMUL:
        raise UsageError(
            f"trainer.matmul_precision is {cfg.trainer.matmul_precision}, expected one of {', '.join(_MATMUL)}"
        )
    if cfg.scheduler_interval not in ("epoch", "step"):
        raise UsageError(f"scheduler_interval is {cfg.scheduler_interval}, expected epoch or step")
    check_seed("seed", cfg.seed)
    if type(cfg.keep_model) is not bool:
        raise UsageError(f"keep_model is {cfg.keep_model}, expected true or false")
    for key, without in (("idle_s", "idle measurement"), ("cooldown_s", "rest")):
        seconds = cfg.meter.get(key, 0)
        if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
            raise UsageError(f"meter.{key} is {seconds}, expected seconds, 0 for no {without}")
    warmup = cfg.meter.get("warmup_steps", 0)
    if type(warmup) is not int or warmup < 0:
        raise UsageError(f"meter.warmup_steps is {warmup}, expected a whole number, 0 for no warm-up")
    mode, target = cfg.compare.mode, cfg.compare.target
    if mode not in ("own", "matched", "target"):
        raise UsageError(f"compare.mode is {mode!r}, expected own, matched or target")
    if mode == "target" and not (type(target) in (int, float) and target > 0):
        raise UsageError(
            f"compare.mode=target needs compare.target, the value of the task's metric to reach (an accuracy of 0.97, say); "
            f"it is {target}"
        )
    if mode != "target" and target is not None:
        raise UsageError(
            f"compare.target is {target}, but compare.mode is {mode}: a target goes with compare.mode=target"
        )


def check_seed(where: str, seed: Any) -> None:
    """Refuse what PyTorch's generators do not take."""
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise UsageError(f"{where} is {seed}, expected a whole number from 0 to 2147483647")


def _check_trainer(trainer: dict[str, Any]) -> None:
    """What Lightning would take, or would take for something else, but one device stepped unit by unit cannot."""
    import lightning.pytorch as pl
    import torch

    from locallearn.strategies.local import PRECISIONS

    for key, (harmless, reason) in _NOT_HERE.items():
        if key in trainer and not any(trainer[key] is value or trainer[key] == value for value in harmless):
            raise UsageError(f"trainer.{key} is {trainer[key]}, but {reason}")
    for key, least in (("check_val_every_n_epoch", 1), ("max_steps", -1)):
        given = trainer.get(key)
        if given is not None and (type(given) is not int or given < least or given == 0):
            raise UsageError(f"trainer.{key} is {given}, expected a whole number of at least 1")
    accelerator, devices = trainer.get("accelerator"), trainer.get("devices")
    clip = trainer.get("gradient_clip_val")
    # The precision is checked here too: on a CPU Lightning quietly makes bf16 of fp16, unseen by LocalStrategy.
    for key, allowed in (("accelerator", _ACCELERATORS), ("precision", PRECISIONS)):
        if trainer.get(key) not in (None, *allowed):
            raise UsageError(f"trainer.{key} is {trainer[key]}, expected one of {', '.join(allowed)}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(f"trainer.accelerator={accelerator}, but PyTorch sees no CUDA device here: use cpu or auto")
    if devices not in (None, 1, "auto") and not (isinstance(devices, list) and len(devices) == 1):
        raise UsageError(f"trainer.devices is {devices}, expected 1, or [0] for the first of several GPUs")
    if isinstance(clip, int | float) and clip <= 0:
        raise UsageError(f"trainer.gradient_clip_val is {clip}, expected a number above 0, or null for no clipping")
    check_arguments(pl.Trainer, trainer, "trainer")


def folder_setting(cfg: Any, key: str) -> Path:
    """A folder from the settings."""
    given = cfg[key]
    if isinstance(given, bool) or not isinstance(given, str | int | float) or given == "":
        raise UsageError(f"{key} is {given!r}, expected a folder")
    return Path(str(given)).expanduser()  # a name like 2026 arrives as a number


def check_folder(key: str, file: Path, runs_dir: Path) -> None:
    """Refuse a file whose folder and that folder's own are not there: a name that was mistyped, not a folder to make.

    What lies in ``runs_dir``, which is made with all above it, is no mistake.
    """
    folder = file.absolute().parent
    if not folder.parent.is_dir() and not folder.is_relative_to(runs_dir.absolute()):
        raise UsageError(
            f"{key} is {file}, but there is no folder {file.parent.parent}: make it, or name another place"
        )


@cache
def say(sentence: str) -> None:
    """Print what was decided for a run, once per command and by its first process, however many runs it is true of."""
    if multiprocessing.parent_process() is None:
        print(f"locallearn: {sentence}", file=sys.stderr)


def command_line(name: str, words: Sequence[str]) -> str:
    """What was typed, for the record."""
    import shlex

    return shlex.join(["locallearn", name, *words])
