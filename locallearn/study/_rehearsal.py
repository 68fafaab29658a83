"""The first batch of a run, tried on a copy before anything is kept: what cannot be trained is told in one sentence."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from locallearn.algorithms.base import Algorithm
from locallearn.cost import undisturbed
from locallearn.functional.ridge import Singular
from locallearn.precision import effective_precision
from locallearn.strategies.local import Diverged, LocalStrategy, LocalTask
from locallearn.strategies.making import check_length
from locallearn.study._signals import stoppable
from locallearn.study.plan import Interrupted, Plan
from locallearn.tasks._batches import reached
from locallearn.tasks._checks import check_batch_sizes, sizes_of
from locallearn.tasks._task import Task

_OF_THE_WHOLE = ("max_steps", "min_steps", "min_epochs", "max_time", "val_check_interval", "check_val_every_n_epoch")
"""Arguments of a Trainer that are about more than one batch."""


def make_trainer(plan: Plan, algorithm: Algorithm, callbacks: list[pl.Callback], **other: Any) -> pl.Trainer:
    """A Trainer with the plan's arguments that runs an algorithm and stays silent."""
    execution = (plan.channels_last, plan.compile, plan.compile_backend)
    arguments = {
        "strategy": LocalStrategy(algorithm, plan.optimizer, plan.scheduler, plan.scheduler_interval, *execution),
        "callbacks": callbacks,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1_000_000,  # per-batch logging costs more than a small batch; epochs are logged
    }
    with quiet():
        return pl.Trainer(**{**arguments, **plan.trainer, **other})


def precision_of(trainer: pl.Trainer, asked: str) -> dict[str, str]:
    """What a Trainer computes with, and what float32 products become under the settings of the process, for a record."""
    effective = effective_precision(trainer.strategy.root_device)
    return {"trainer": str(trainer.precision_plugin.precision), "matmul": asked, **effective}


def rehearse(plan: Plan, task: pl.LightningModule) -> None:
    """Train and validate one batch in every stage, on a copy; nothing of the run is changed, and no number is drawn from it.

    Args:
        plan: its data are set up, its algorithm is attached to the network of ``task``.
        task: the module to train.

    Raises:
        ValueError: the first batch cannot be trained or judged, or the data give too few for what the Trainer is told.
        Interrupted: Ctrl-C.
    """
    data = copy.copy(plan.data)  # whoever asks the run's own data for a loader first owns the place in them
    with undisturbed(None, data):
        train, validation = data.train_dataloader(), data.val_dataloader()
    _check_lengths(plan, len(train), len(validation))
    if isinstance(task, Task):
        check_batch_sizes(sizes_of(train, _trained(plan, len(train))), task.net, plan.algorithm, task.info())
    kept = {name: value.clone() for name, value in plan.algorithm.state_dict().items() if isinstance(value, Tensor)}
    try:
        with undisturbed(None, data), stoppable():
            _train_one(plan, task, next(iter(train)), next(iter(validation)), len(train))
    except (Diverged, Singular, torch.OutOfMemoryError):
        return  # no mistake in the settings, or one batch is too few to tell: the run itself records it
    except Interrupted:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the first batch cannot be trained: {said}") from error
    finally:
        # A rule may keep functions that no copy follows.
        plan.algorithm.load_state_dict(kept, strict=False)


def _train_one(plan: Plan, task: pl.LightningModule, train: Any, validation: Any, batches: int) -> None:
    example = cast(LocalTask, task).info().example
    shared = {id(leaf): leaf for leaf in tree_leaves(tuple(example)) if isinstance(leaf, Tensor)}  # a whole graph, say
    try:
        twin = copy.deepcopy(task, shared)
    except Exception:  # what cannot be copied can be trained
        return
    algorithm = cast(Algorithm, cast(LocalTask, twin).algorithm)
    algorithm.__dict__.pop("updates", None)  # set from outside, it would drive the original
    once = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "logger": False, "profiler": None}
    trainer = make_trainer(plan, algorithm, [copy.deepcopy(plan.schedule)], **once, **_at_their_defaults(plan))
    with quiet():
        trainer.fit(twin, _One(train), _One(validation))
    batches = reached(batches, plan.trainer.get("limit_train_batches") or 1.0)
    check_length(trainer.lr_scheduler_configs, plan.max_epochs, min(_steps(plan), plan.max_epochs * batches))


def _steps(plan: Plan) -> float:
    steps = plan.trainer.get("max_steps", -1)
    return float("inf") if steps == -1 else float(steps)


def _trained(plan: Plan, batches: int) -> int:
    """How many of an epoch's batches training ever reaches."""
    return int(min(_steps(plan), reached(batches, plan.trainer.get("limit_train_batches") or 1.0)))


def _at_their_defaults(plan: Plan) -> dict[str, Any]:
    defaults = {"max_steps": -1, "check_val_every_n_epoch": 1}
    return {name: defaults.get(name) for name in _OF_THE_WHOLE if name in plan.trainer}


def _check_lengths(plan: Plan, train: int, validation: int) -> None:
    for name, batches in (("limit_train_batches", train), ("limit_val_batches", validation)):
        limit = plan.trainer.get(name)
        if limit is not None and reached(batches, limit) < 1:
            raise ValueError(f"trainer.{name} is {limit}, which leaves none of {batches} batches: give at least one")
    every = plan.trainer.get("val_check_interval")
    if isinstance(every, int) and every > train and plan.trainer.get("check_val_every_n_epoch", 1) is not None:
        raise ValueError(
            f"trainer.val_check_interval is {every}, but an epoch has {train} batches: give at most these, or set "
            "trainer.check_val_every_n_epoch=null to count through all epochs"
        )


class _One:
    """A loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self._batch


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice off the terminal: it is about settings that are chosen here on purpose."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
