"""Any network under a local rule in one call: cut, attached, with an optimizer for every unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import Algorithm, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import activation_bytes, drive
from locallearn.local._attach import attach_cut, fewest, result_of
from locallearn.local._object import Local, OptimizerFactory, refuse_without_gradients
from locallearn.local._targets import Loss, are_ids, of_classes, two_of
from locallearn.local._where import BYTES, bytes_in, check_net, kind, names_of, partition, short, weigh
from locallearn.nets.cut import Cut, Place, cut_network, names_for, places
from locallearn.nets.equal import rows_of, some_rows
from locallearn.nets.execution import Execution
from locallearn.nets.trace import preserved


def localize(
    net: nn.Module,
    algorithm: Algorithm,
    cuts: int | Sequence[str] | None = None,
    *,
    memory: str | int | None = None,
    example: Any = None,
    targets: Tensor | None = None,
    optimizer: OptimizerFactory | None = None,
    loss: Loss | None = None,
    classes: bool | None = None,
    outputs: int | None = None,
    input: str | None = None,
    output: str | int | None = None,
    readout: str | bool = True,
    channels_last: bool = False,
    compile: str | None = None,
    compile_backend: str = "inductor",
) -> Local:
    """Put a network under a learning rule. It stays as it is, and is what learns.

    Args:
        net: the network, on any device.
        algorithm: the rule, not attached yet.
        cuts: names of the modules behind which blocks end, in the order of execution; or the number of blocks, which are then
            of about the same number of operations. 1 is the whole network.
        memory: instead of ``cuts``: bytes that a step on a batch like the example may keep for gradients, e.g. ``"200MiB"``
            (units B, kB, MB, GB, KiB, MiB, GiB). The fewest blocks are made that stay below.
        example: a batch with shapes and dtypes of the real ones: a tensor, a tuple of positional arguments, or a dict of
            keyword arguments.
        targets: those of the example, as a step takes them. Default: made up from what the network gives, which a loss of
            one's own may not take: class ids where dimension 1 of the outputs is the classes, else zeros like the outputs.
        optimizer: makes a unit's optimizer from its parameter groups, e.g. ``partial(AdamW, lr=1e-3)``. Default: Adam, 1e-3.
        loss: ``loss(outputs, targets)``, a mean over samples. Default: cross entropy.
        classes: whether targets are class ids. Default: yes, unless ``loss`` is given and is none of PyTorch's for class ids;
            then, too, where ``targets`` are whole numbers for all dimensions of the outputs but dimension 1 or the last.
        outputs: number of classes, or of the network's outputs. Default: what the network gives.
        input: name of the main input. Default: the first tensor.
        output: key, field or place of the output that counts. Default: ``logits``, else ``out``, else the first tensor.
        readout: see :func:`~locallearn.nets.cut.cut_network`.
        channels_last: keep images and kernels in memory with channels last; changes no number beyond rounding.
        compile: ``"blocks"``: ``torch.compile`` every block by itself, which changes no number beyond rounding, either
            (:class:`~locallearn.nets.execution.Execution` says what stays uncompiled). ``net(images)`` runs as ever.
        compile_backend: of ``torch.compile``.

    Raises:
        ValueError: the network cannot be cut so, or the rule cannot train it; the sentence says what to do.
    """
    check_net(net)
    execution = Execution(channels_last, compile, compile_backend)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"algorithm is {kind(algorithm)}, expected a rule of locallearn.algorithms with its settings, e.g. ll.MonoForward()"
        )
    if example is None:
        raise ValueError(
            "pass example=, a batch of inputs: only by running the network can it be found out where it can be cut"
        )
    if (cuts is None) is (memory is None):
        raise ValueError(
            "give either cuts= (names of modules, or a number of blocks) or memory= (bytes that a step may keep)"
        )
    if optimizer is not None and not callable(optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, and every unit needs one of its own: give what makes them, e.g. "
            "functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    refuse_without_gradients(algorithm)
    make: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3) if optimizer is None else optimizer
    again = partial(
        _cut_and_attach, net, example=example, targets=targets, loss=loss or F.cross_entropy,
        classes=loss is None or of_classes(loss) or None if classes is None else classes, outputs=outputs, input=input,
        output=output, readout=readout,
    )  # fmt: skip
    if memory is None:
        assert cuts is not None
        names = names_of(net, cuts, example, input=input, output=output, readout=readout, outputs=outputs)
    else:
        look = partial(places, net, example, weigh, input=input, output=output, readout=readout, outputs=outputs)
        names = _within(net, algorithm, bytes_in(memory), look, again)
    cut, task = again(algorithm, names)
    return Local(net, cut, algorithm, task, names, make, execution, targets is not None)


def _cut_and_attach(
    net: nn.Module,
    algorithm: Algorithm,
    cuts: Sequence[str],
    *,
    example: Any,
    targets: Tensor | None,
    loss: Loss,
    classes: bool | None,
    outputs: int | None,
    input: str | None,
    output: str | int | None,
    readout: str | bool,
) -> tuple[Cut, TaskInfo]:
    cut = cut_network(net, cuts, example, input=input, output=output, readout=readout, outputs=outputs)
    if classes is None:
        classes = False
        if targets is not None:
            shape = result_of(net, cut).shape
            if two_of(targets, cut.arguments.values) is not targets:  # the network was shown two, and all of them count
                shape = torch.Size((len(targets), *shape[1:]))
            classes = are_ids(shape, targets, loss)
    return cut, attach_cut(net, cut, algorithm, loss=loss, classes=classes, outputs=outputs, targets=targets)


def _within(
    net: nn.Module,
    algorithm: Algorithm,
    limit: int,
    look: Callable[..., list[Place]],
    attach: Callable[[Algorithm, Sequence[str]], tuple[Cut, TaskInfo]],
) -> list[str]:
    """The fewest cuts with which a step on the example keeps no more bytes than allowed, as measured."""
    least: tuple[float, int] = (float("inf"), 1)
    share = 1.0  # of what plain autograd would keep, at most

    def offered() -> Iterator[tuple[list[Place], int]]:
        rows = look()
        yield from ((rows, blocks) for blocks in range(1, len(rows) + 1))
        more = look(several=True)  # skip connections cross there, too
        yield from ((more, blocks) for blocks in range(len(rows), len(more) + 1) if len(more) > len(rows))

    for rows, blocks in offered():
        chosen = partition([row.bytes for row in rows], blocks)
        edges = [-1, *chosen, len(rows) - 1]
        guess = max(sum(row.bytes for row in rows[a + 1 : b + 1]) for a, b in pairwise(edges))
        if blocks > 1 and share * guess > 1.5 * limit and blocks < len(rows):
            continue  # a pass would only show it
        names = names_for([rows[i] for i in chosen])
        trial = copy.deepcopy(algorithm)
        cut, task = attach(trial, names)
        if blocks == 1 and guess > 1.5 * limit and len(rows) > 1:  # all samples at once may be too much for the machine
            few = fewest(trial)
            samples = rows_of(cut.arguments.values) or few
            small, larger = (_peak(net, copy.deepcopy(trial), cut, task, n) for n in (few, 2 * few))
            share = min(1.0, (small + (larger - small) * max(0, samples - few) / few) / guess)
            if share * guess > 1.5 * limit:
                continue
        peak = _peak(net, trial, cut, task)
        least = min(least, (peak, blocks))
        if peak <= limit:
            return names
    raise ValueError(
        f"memory allows {short(limit, 1024, BYTES)}, and a step of {type(algorithm).__name__} on this example keeps at least "
        f"{short(least[0], 1024, BYTES)} for gradients, in {least[1]} block{'s' if least[1] > 1 else ''}: allow more, or use "
        "a smaller batch"
    )


def _peak(net: nn.Module, algorithm: Algorithm, cut: Cut, task: TaskInfo, most: int | None = None) -> int:
    """Bytes that a step on the whole example, or on so many samples of it, keeps alive for gradients at once."""
    values = cut.arguments.values if most is None else some_rows(cut.arguments.values, most)
    main, *context = values.values()
    known = task.example.targets
    rows = rows_of(values)
    targets = known if rows is None else known[torch.arange(rows, device=known.device) % len(known)]
    kept = [(p, p.grad) for p in net.parameters()]
    with preserved(net), activation_bytes(algorithm) as count:
        places = None if rows is None else torch.arange(rows, device=known.device)
        drive(algorithm, Batch(main, targets, tuple(context), source=places))
    for parameter, gradient in kept:
        parameter.grad = gradient
    return count.peak
