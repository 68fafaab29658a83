"""A rule attached to a network that has been cut, and tried once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import drive
from locallearn.nets.arguments import Arguments
from locallearn.nets.blocks import evaluating, width_of
from locallearn.nets.cut import Cut
from locallearn.nets.equal import rows_of, some_rows
from locallearn.nets.trace import preserved

Loss = Callable[[Tensor, Tensor], Tensor]


def attach_cut(
    net: nn.Module,
    cut: Cut,
    algorithm: Algorithm,
    *,
    loss: Loss = F.cross_entropy,
    classes: bool = True,
    outputs: int | None = None,
) -> TaskInfo:
    """Attach a rule to a network that has been cut, and try a step on a copy.

    Args:
        net: the network.
        cut: its pieces.
        algorithm: the rule, not attached yet.
        loss: see :func:`localize`.
        classes: see :func:`localize`.
        outputs: see :func:`localize`.

    Returns:
        What the rule was told.

    Raises:
        ValueError: the rule cannot train it.
    """
    given = _two(cut.arguments)
    result = result_of(net, cut)
    count = width_of(result) if outputs is None else outputs
    if classes and count < 2:
        raise ValueError(
            f"the network gives {tuple(result.shape)}, expected (N, classes) with two classes at least; or give loss="
        )
    if classes:
        places = (len(result), *result.shape[2:])
        targets = (
            (torch.arange(len(result), device=result.device) % count).view(-1, *[1] * (len(places) - 1)).expand(places)
        )
        targets = targets.contiguous()
    else:
        targets = torch.zeros_like(result)
    task = TaskInfo(given._replace(targets=targets), count, loss, classes)
    algorithm.attach(cut.blocks, task)
    _try_step(net, algorithm, whole(cut, task))
    return task


def whole(cut: Cut, task: TaskInfo) -> Batch:
    """The example as a batch to learn from, all of it: of how many samples it is may matter, to a rule that keeps a share."""
    values = cut.arguments.values
    rows = rows_of(values)
    if rows is None or rows < 2:
        return task.example
    main, *context = values.values()
    known = task.example.targets
    return Batch(main, known[torch.arange(rows, device=known.device) % len(known)], tuple(context))


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
