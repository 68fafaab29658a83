"""Optimizers and learning rate schedulers, one per unit, made from what the user named; what cannot be made is told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from locallearn.algorithms.base import Algorithm, ParamGroup, Update

OptimizerFactory = Callable[[list[ParamGroup]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

AFTER_VALIDATION = "validation"
"""Interval of schedulers that follow a metric: Lightning leaves them alone, the strategy advances them."""

_WRITTEN_SO = {
    "lr_lambda": "lr_lambda is a function: name one of yours, in YAML as {_target_: hydra.utils.get_method, path: "
    "my_module.rate}",
    "schedulers": "its parts need the optimizer, too: write a function that takes the optimizer and makes all of them, and "
    "name that function instead (in YAML as _target_, with _partial_: true)",
}


class Closure:
    """Works out loss and gradients of one unit for its optimizer; the update is made anew where the optimizer asks again.

    Args:
        update: of the unit.
        optimizer: the unit's.
        forward: context in which losses are made, a precision's autocast, say.
        differentiate: differentiates a loss.

    Attributes:
        calls: how often the optimizer has asked.

    Raises:
        ValueError: on a second call, where the update cannot be made anew.
    """

    def __init__(
        self,
        update: Update,
        optimizer: Optimizer,
        forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
        differentiate: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self._update, self._optimizer = update, optimizer
        self._forward, self._differentiate = forward, differentiate
        self.calls = 0

    def __call__(self) -> Tensor:
        """The loss, detached, or zero where there is none; the gradients are in ``parameter.grad``."""
        self.calls += 1
        update = self._update
        with torch.enable_grad():  # some optimizers step under no_grad
            if self.calls == 1:
                update.backward(self._differentiate)
                return torch.zeros(()) if update.loss is None else update.loss
            if update.again is None:
                raise ValueError(
                    f"the optimizer {type(self._optimizer).__name__} asks for the loss again within one step, but this rule "
                    f"works out the update of unit {update.unit!r} only once per batch: use an optimizer that asks once, such "
                    "as Adam or SGD"
                )
            self._optimizer.zero_grad()
            with self._forward():
                loss = update.again()
            if loss.requires_grad:  # else it is a frozen unit's
                self._differentiate(loss)
            return loss.detach()


def make_optimizers(algorithm: Algorithm, make: OptimizerFactory) -> dict[str, Optimizer]:
    """One optimizer per unit.

    Raises:
        ValueError: a setting of the optimizer is out of its range; the rule needs an optimizer that is linear in its
            gradients, and this one is not; or it takes no closure, which is how a unit's gradients are handed over.
    """
    try:
        optimizers = {unit: make(groups) for unit, groups in algorithm.units().items()}
    except ValueError as error:
        raise ValueError(f"the optimizer cannot be made: {error}") from error
    reason = algorithm.linear_optimizer
    for optimizer in optimizers.values():
        if reason is not None and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"the optimizer is {type(optimizer).__name__}, but {type(algorithm).__name__} needs SGD, with or without "
                f"momentum (optimizer=sgd): {reason}"
            )
        if not _parameters(optimizer.step):
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} has a step() without arguments: give it the closure=None of "
                "PyTorch's optimizers, and let it call the closure"
            )
        _leave_accelerators_alone(optimizer)
    return optimizers


def _leave_accelerators_alone(optimizer: Optimizer) -> None:
    """Spare an optimizer of weights on the CPU to ask before every step whether a GPU is recording a graph.

    Adam and others ask, and under Lightning, which has PyTorch count GPUs by NVML, that opens a library every time: four
    fifths of a small unit's step, and every unit would pay it in every batch.
    """
    if any(p.device.type != "cpu" for group in optimizer.param_groups for p in group["params"]):
        return
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # the old one's in 2.6
        if hasattr(optimizer, name):
            setattr(optimizer, name, _nothing)
            return


def _nothing() -> None:
    """In place of what has nothing to find."""


def make_schedulers(
    optimizers: dict[str, Optimizer], make: SchedulerFactory, interval: str, metric: str, maximise: bool
) -> list[LRSchedulerConfig]:
    """One scheduler per unit, advanced after every epoch or step; ``ReduceLROnPlateau`` after every validation.

    ``ReduceLROnPlateau`` in its mode ``min`` watches ``validation/loss``, in its mode ``max`` the task's metric.

    Args:
        optimizers: by unit.
        make: makes a scheduler from an optimizer.
        interval: ``epoch`` or ``step``.
        metric: of the task.
        maximise: whether more of it is better.

    Raises:
        ValueError: the scheduler lacks an argument, or cannot be made, or would follow a metric the wrong way.
    """
    configs = []
    for unit, optimizer in optimizers.items():
        scheduler = _scheduler(make, optimizer)
        monitor = None
        if isinstance(scheduler, ReduceLROnPlateau):
            if scheduler.mode == "max" and not maximise:
                raise ValueError(
                    f"ReduceLROnPlateau in mode max waits for a rise, but the task's {metric} is better when it falls: set "
                    "mode: min, which watches validation/loss"
                )
            monitor = "validation/loss" if scheduler.mode == "min" else f"validation/{metric}"
        when = interval if monitor is None else AFTER_VALIDATION
        configs.append(LRSchedulerConfig(scheduler, interval=when, name=f"lr-{unit}", monitor=monitor))
    return configs


def check_length(configs: Iterable[LRSchedulerConfig], epochs: float, steps: float) -> None:
    """Refuse schedulers that end before the training does.

    Args:
        configs: as :func:`make_schedulers` makes them, not yet advanced.
        epochs: most epochs that the training may have.
        steps: most batches that it may have.

    Raises:
        ValueError: a scheduler has a length (``OneCycleLR``), and it is shorter.
    """
    for config in configs:
        known, wanted = getattr(config.scheduler, "total_steps", None), epochs if config.interval == "epoch" else steps
        if known is not None and wanted > known:
            raise ValueError(
                f"{type(config.scheduler).__name__} ends after {known} steps, but it is advanced after every "
                f"{config.interval} and the training may have {wanted:g}: set its total_steps to {wanted:g}"
            )


def _scheduler(make: SchedulerFactory, optimizer: Optimizer) -> LRScheduler:
    made: Any = make
    while isinstance(made, partial):
        made = made.func
    name = getattr(made, "__name__", type(made).__name__)
    parameters = _parameters(make)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    advice = [text for key, text in _WRITTEN_SO.items() if key in {p.name for p in [*parameters, *_parameters(made)]}]
    missing = [key for key in needed if key != "optimizer"] if "optimizer" in needed else needed[1:]
    if missing:
        raise ValueError("; ".join([f"the scheduler {name} lacks {' and '.join(missing)}: set it", *advice]))
    try:
        scheduler = make(optimizer)
    except Exception as error:
        said = str(error).strip() or f"it raises {type(error).__name__}"
        sentence = f"the scheduler {name} cannot be made for {type(optimizer).__name__}: {said}"
        raise ValueError("; ".join([sentence, *advice])) from error
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "state_dict")):
        raise ValueError(
            f"the scheduler {name} makes a {type(scheduler).__name__}, expected a scheduler as in torch.optim.lr_scheduler"
        )
    return scheduler


def _parameters(made: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(made).parameters.values())
    except (TypeError, ValueError):  # written in C, say: calling it will tell
        return [inspect.Parameter("optimizer", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
