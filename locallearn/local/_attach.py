"""A rule attached to a network that has been cut, and tried once."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import drive
from locallearn.local._targets import Loss, blamed, classes_in, made_up, refuse_strangers, refuse_unfit, two_of
from locallearn.nets.arguments import Arguments
from locallearn.nets.blocks import evaluating, width_of
from locallearn.nets.cut import Cut
from locallearn.nets.equal import rows_of, some_rows
from locallearn.nets.trace import preserved

_MOST = 1000  # samples that a step is tried with


def attach_cut(
    net: nn.Module,
    cut: Cut,
    algorithm: Algorithm,
    *,
    loss: Loss = F.cross_entropy,
    classes: bool = True,
    outputs: int | None = None,
    targets: Tensor | None = None,
) -> TaskInfo:
    """Attach a rule to a network that has been cut, and try a step on a copy.

    Args:
        net: the network.
        cut: its pieces.
        algorithm: the rule, not attached yet.
        loss: see :func:`localize`.
        classes: see :func:`localize`.
        outputs: see :func:`localize`.
        targets: see :func:`localize`.

    Returns:
        What the rule was told.

    Raises:
        ValueError: the rule cannot train it.
    """
    given = _two(cut.arguments)
    result = result_of(net, cut)
    known = None if targets is None else two_of(targets, cut.arguments.values)
    count = outputs
    if count is None and known is not None and classes:
        count = classes_in(result.shape, known)
    if count is None:
        count = width_of(result)
    if classes and count < 2:
        raise ValueError(
            f"the network gives {tuple(result.shape)}, expected (N, classes) with two classes at least; or give loss="
        )
    if known is None:
        known = made_up(result, count, classes)
    elif outputs in (None, width_of(result)):  # else these are features, of which a rule makes outputs
        refuse_unfit(known, result, loss, classes)
        if classes and targets is not None:
            refuse_strangers(targets, count, loss)
    task = TaskInfo(given._replace(targets=known), count, loss, classes)
    try:
        algorithm.attach(cut.blocks, task)
        batch = task.example
        if rows_of(cut.arguments.values) is not None:
            batch = repeated(batch, fewest(algorithm))
        _try_step(net, algorithm, batch)
    except ValueError as error:
        said = None
        if outputs in (None, width_of(result)):
            said = blamed(loss, result, known, targets is not None)
        if said is not None:
            raise ValueError(said) from error
        if targets is None and classes and known.ndim > 1:
            raise ValueError(
                f"{error} (these labels were made up: without targets=, dimension 1 of outputs of shape "
                f"{tuple(result.shape)} is taken for the classes)"
            ) from error
        raise
    return task


def repeated(batch: Batch, samples: int) -> Batch:
    """So many samples, each with a place of its own: those of the batch, over and over."""
    order = torch.arange(samples, device=batch.inputs.device)
    rows, known = order % len(batch.inputs), len(batch.inputs)

    def of(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == known else value

    return Batch(of(batch.inputs), of(batch.targets), tuple(map(of, batch.context)), source=order)


def fewest(algorithm: Algorithm) -> int:
    """Samples of the smallest batch, two at least, of which every unit can learn; two where there is none."""
    for samples in range(2, _MOST):
        try:
            for unit in algorithm.units():
                algorithm.learned_from(unit, samples)
        except ValueError:
            continue
        return samples
    return 2


def result_of(net: nn.Module, cut: Cut) -> Tensor:
    """What the pieces give for the example."""
    given = _two(cut.arguments)
    with evaluating(cut.blocks), torch.no_grad(), preserved(net):
        result: Tensor = cut.blocks(given.inputs, *given.context)
    return result


def _try_step(net: nn.Module, algorithm: Algorithm, batch: Batch) -> None:
    """What cannot be trained is told before training: a step on a copy of everything."""
    with preserved(net):
        twin = copy.deepcopy(algorithm).train()
        done: list[str] = []
        try:
            drive(twin, batch, lambda update: done.append(update.unit))
        except ValueError:
            raise
        except Exception as error:
            units = list(algorithm.units())
            unit = units[min(len(done), len(units) - 1)] if units else "network"
            raise ValueError(
                f"{type(algorithm).__name__} cannot train {type(net).__name__} on this example, from unit {unit!r} on: "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error


def _two(arguments: Arguments) -> Batch:
    """Two samples of the example; of a graph all of it."""
    values = arguments.values if rows_of(arguments.values) is None else some_rows(arguments.values, 2)
    main, *context = values.values()
    return Batch(main, main, tuple(context))
