"""Any network under a local rule in one call: cut, attached, with an optimizer for every unit."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from locallearn.algorithms.base import Algorithm, ParamGroup, TaskInfo, Update
from locallearn.batch import Batch
from locallearn.cost import FlopCounter, activation_bytes, drive
from locallearn.nets.arguments import Arguments
from locallearn.nets.blocks import Blocks, evaluating, fitted
from locallearn.nets.cut import Cut, Place, cut_network, names_for, places
from locallearn.nets.equal import rows_of, some_rows
from locallearn.nets.trace import preserved

OptimizerFactory = Callable[[list[ParamGroup]], Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]

_UNITS = {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_OF_CLASSES = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)
_MODULES_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)


class Local:
    """A network with a rule that trains it; made by :func:`localize`.

    Attributes:
        net: the network, unmodified; it is what learns, and ``net(images)`` works at any time.
        blocks: its pieces.
        algorithm: the rule, attached.
        optimizers: by unit.
        task: what the rule was told.
        cuts: names of the modules behind which blocks end.
        unused: parameters of the network that its output does not depend on; nothing trains them (auxiliary heads, say).
    """

    def __init__(
        self,
        net: nn.Module,
        cut: Cut,
        algorithm: Algorithm,
        task: TaskInfo,
        cuts: Sequence[str],
        optimizer: OptimizerFactory,
    ) -> None:
        self.net, self.blocks, self.algorithm, self.task = net, cut.blocks, algorithm, task
        self.cuts, self.unused = tuple(cuts), cut.unused
        self.make_optimizer = optimizer
        self._arguments = cut.arguments
        self._mode: bool | None = None
        self.optimizers = _optimizers(algorithm, optimizer)
        self._follow()

    def __repr__(self) -> str:
        unused = f", {len(self.unused)} parameters that its output does not need" if self.unused else ""
        return f"Local({type(self.net).__name__} under {type(self.algorithm).__name__}: {', '.join(self.blocks.names)}{unused})"

    def batch(self, inputs: Any, targets: Tensor, rows: Tensor | None = None) -> Batch:
        """Inputs as the network takes them and targets, as a rule takes them.

        Raises:
            ValueError: inputs are given otherwise than the example was, labels are no class ids, or there are none.
        """
        main, *context = self._arguments.by_name(inputs).values()
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets are a {type(targets).__name__}, expected a tensor")
        if self.task.classes:
            wanted = self.task.example.targets
            if targets.ndim != wanted.ndim:
                raise ValueError(
                    f"labels have shape {tuple(targets.shape)}, expected class ids of shape "
                    f"({', '.join(['N', *map(str, wanted.shape[1:])])}{',' if wanted.ndim == 1 else ''})"
                )
            if targets.is_floating_point() or targets.dtype == torch.bool:
                raise ValueError(f"labels are {targets.dtype}, expected class ids of dtype int64")
            targets = targets.long()
            counted = targets if rows is None else targets[rows]
            if not counted.numel():
                raise ValueError("this batch is empty: there is nothing to learn from")
            if targets.device.type == "cpu":
                low, high = int(counted.min()), int(counted.max())
                if low < 0 or high >= self.task.outputs:
                    raise ValueError(
                        f"labels go from {low} to {high}, expected class ids 0 to {self.task.outputs - 1}: the network has "
                        f"{self.task.outputs} outputs"
                    )
        return Batch(main, targets, tuple(context), rows)

    def updates(self, inputs: Any, targets: Tensor, rows: Tensor | None = None) -> Iterator[Update]:
        """Train on one batch, one unit after the other.

        Every unit is handed out before it learns: ``update.unit`` and ``update.loss`` are known, its gradients are not. When
        the loop goes on, the unit is differentiated (unless the body has called ``update.backward()``, to clip gradients,
        say), stepped, and its gradients are dropped. So a loop with an empty body trains, and a unit at which the
        loop is broken off does not.

        Args:
            inputs: as the example was given: a tensor, a tuple, or a dict.
            targets: class ids ``(N,)``, or what the loss takes.
            rows: see :class:`~locallearn.batch.Batch`; on a graph the nodes that are learned from.
        """
        self._follow()
        updates = self.algorithm.updates(self.batch(inputs, targets, rows))
        done = 0
        while True:
            try:
                update = next(updates, None)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                name = self.blocks.names[min(done, len(self.blocks) - 1)]
                raise ValueError(
                    f"block {name!r} has a normalisation, which has nothing to normalise by in a batch of one sample: use "
                    "larger batches, and drop_last=True in the loader"
                ) from error
            if update is None:
                return
            done += 1
            yield update
            optimizer = self.optimizers[update.unit]
            if _needs_closure(optimizer):
                optimizer.step(partial(_again, update, optimizer, [True]))  # type: ignore[arg-type]
            else:
                update.backward()
                optimizer.step()
            optimizer.zero_grad()
            del update

    def step(self, inputs: Any, targets: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Train on one batch; see :meth:`updates`.

        Returns:
            The loss of every unit before its step, detached. Units of rules without a loss are left out.
        """
        losses: dict[str, Tensor] = {}
        for update in self.updates(inputs, targets, rows):
            if update.loss is not None:
                loss = update.loss.detach()
                losses[update.unit] = losses[update.unit] + loss if update.unit in losses else loss
        return losses

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Outputs by the rule's own inference in evaluation mode, ``(N, ...)``, whatever mode the network is in."""
        main, *context = self._arguments.by_name(inputs).values()
        with evaluating(self.algorithm):
            return self.algorithm.predict(main, *context)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: network, rule with its generators, and optimizers. ``torch.save`` takes it."""
        return {
            "net": self.net.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "optimizers": {unit: optimizer.state_dict() for unit, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, under the same rule with the same cuts.

        Raises:
            ValueError: it is the state of something else.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"this is no state of a Local, but a {type(state).__name__}")
        missing = {"net", "algorithm", "optimizers"} - set(state)
        if missing:
            raise ValueError(f"this is no state of a Local: {', '.join(sorted(missing))} is missing")
        if set(state["optimizers"]) != set(self.optimizers):
            raise ValueError(
                f"this state has units {', '.join(state['optimizers'])}, and there are {', '.join(self.optimizers)}: cut the "
                "network at the same places, under the same rule"
            )
        try:
            self.net.load_state_dict(state["net"])
            self.algorithm.load_state_dict(state["algorithm"])
        except RuntimeError as error:
            raise ValueError(
                f"this is the state of another network or rule: {str(error).splitlines()[-1].strip()}"
            ) from error
        for unit, optimizer in self.optimizers.items():
            given = state["optimizers"][unit]
            for mine, theirs in zip(optimizer.param_groups, given["param_groups"], strict=False):
                if set(mine) != set(theirs):
                    raise ValueError(
                        f"this is the state of another optimizer than {type(optimizer).__name__}, with settings "
                        f"{', '.join(sorted(set(theirs) ^ set(mine)))} in one of the two only: make the same one"
                    )
            optimizer.load_state_dict(given)

    def _follow(self) -> None:
        """Train in the mode of the network: ``net.train()`` and ``net.eval()`` decide, as in any loop."""
        if self._mode is not self.net.training:
            self._mode = self.net.training
            own = {id(module) for module in self.net.modules()}  # asked anew: a copy of this has other modules
            for module in self.algorithm.modules():
                if id(module) not in own:
                    module.training = self._mode
            self.algorithm._resting = frozenset()
        for path in self.algorithm._resting:
            self.algorithm.get_submodule(path).eval()


def localize(
    net: nn.Module,
    algorithm: Algorithm,
    cuts: int | Sequence[str] | None = None,
    *,
    memory: str | int | None = None,
    example: Any = None,
    optimizer: OptimizerFactory | None = None,
    loss: Loss | None = None,
    classes: bool | None = None,
    outputs: int | None = None,
    input: str | None = None,
    output: str | int | None = None,
    readout: str | bool = True,
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
        optimizer: makes a unit's optimizer from its parameter groups, e.g. ``partial(AdamW, lr=1e-3)``. Default: Adam, 1e-3.
        loss: ``loss(outputs, targets)``, a mean over samples. Default: cross entropy.
        classes: whether targets are class ids. Default: yes, unless ``loss`` is given and is none of PyTorch's for class ids.
        outputs: number of classes, or of the network's outputs. Default: what the network gives.
        input: name of the main input. Default: the first tensor.
        output: key, field or place of the output that counts. Default: ``logits``, else ``out``, else the first tensor.
        readout: see :func:`~locallearn.nets.cut.cut_network`.

    Raises:
        ValueError: the network cannot be cut so, or the rule cannot train it; the sentence says what to do.
    """
    _check_net(net)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(
            f"algorithm is a {type(algorithm).__name__}, expected a rule of locallearn.algorithms, e.g. ll.MonoForward()"
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
    make: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3) if optimizer is None else optimizer
    if classes is None:
        classes = loss is None or _of_classes(loss)
    again = partial(
        _cut_and_attach, net, example=example, loss=loss or F.cross_entropy, classes=classes, outputs=outputs, input=input,
        output=output, readout=readout,
    )  # fmt: skip
    if memory is None:
        assert cuts is not None
        if isinstance(cuts, str):
            raise ValueError(f"cuts is {cuts!r}, expected a list of names, or a number of blocks: write [{cuts!r}]")
        if not isinstance(cuts, int | Iterable):
            raise ValueError(f"cuts is {cuts!r}, expected names of modules, or a whole number of blocks")
        names = balanced(net, cuts, example, input=input, output=output) if isinstance(cuts, int) else list(cuts)
        cut, task = again(algorithm, names)
    else:
        names = _within(net, algorithm, bytes_in(memory), example, again, input, output)
        cut, task = again(algorithm, names)
    return Local(net, cut, algorithm, task, names, make)


def _check_net(net: Any) -> None:
    if not isinstance(net, nn.Module):
        raise ValueError(f"net is a {type(net).__name__}, expected a torch.nn.Module")


def _cut_and_attach(
    net: nn.Module,
    algorithm: Algorithm,
    cuts: Sequence[str],
    *,
    example: Any,
    loss: Loss,
    classes: bool,
    outputs: int | None,
    input: str | None,
    output: str | int | None,
    readout: str | bool,
) -> tuple[Cut, TaskInfo]:
    cut = cut_network(net, cuts, example, input=input, output=output, readout=readout)
    if outputs is not None and outputs != _width(_result(net, cut)) and cut.blocks.readout is not None:
        # What the network gives are features: rules that need an output layer add one, or say so.
        cut = cut_network(net, cuts, example, input=input, output=output, readout=False)
    return cut, attach_cut(net, cut, algorithm, loss=loss, classes=classes, outputs=outputs)


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
    result = _result(net, cut)
    count = _width(result) if outputs is None else outputs
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
    _to_network(algorithm, net)
    _try_step(net, algorithm, task)
    return task


def _result(net: nn.Module, cut: Cut) -> Tensor:
    """What the pieces give for the example."""
    given = _two(cut.arguments)
    with evaluating(cut.blocks), torch.no_grad(), preserved(net):
        result: Tensor = cut.blocks(given.inputs, *given.context)
    return result


def _width(result: Tensor) -> int:
    return int(result.shape[1]) if result.ndim > 1 else 1


def _try_step(net: nn.Module, algorithm: Algorithm, task: TaskInfo) -> None:
    """What cannot be trained is told before training: a step on a copy of everything."""
    with preserved(net):
        twin = copy.deepcopy(algorithm).train()
        done: list[str] = []
        try:
            drive(twin, task.example, lambda update: done.append(update.unit))
        except ValueError:
            raise
        except Exception as error:
            units = list(algorithm.units())
            unit = units[min(len(done), len(units) - 1)] if units else "network"
            raise ValueError(
                f"{type(algorithm).__name__} cannot train {type(net).__name__} on this example, from unit {unit!r} on: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error


def _two(arguments: Arguments) -> Batch:
    """Two samples of the example; of a graph all of it."""
    values = arguments.values if rows_of(arguments.values) is None else some_rows(arguments.values, 2)
    main, *context = values.values()
    return Batch(main, main, tuple(context))


def _to_network(algorithm: Algorithm, net: nn.Module) -> None:
    """What the rule adds goes to the network's device, in its dtype."""
    first = next((p for p in net.parameters() if p.is_floating_point()), None)
    if first is None:
        return
    for name, child in algorithm.named_children():
        if name != "blocks":
            child.to(device=first.device, dtype=first.dtype)


def _optimizers(algorithm: Algorithm, make: OptimizerFactory) -> dict[str, Optimizer]:
    optimizers = {unit: make(groups) for unit, groups in algorithm.units().items()}
    reason = algorithm.linear_optimizer
    for optimizer in optimizers.values():
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"optimizer made a {type(optimizer).__name__} from a unit's parameter groups, expected an optimizer: give a "
                "class with its settings, e.g. functools.partial(torch.optim.AdamW, lr=1e-3)"
            )
        if reason is not None and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"the optimizer is {type(optimizer).__name__}, but {type(algorithm).__name__} needs SGD, with or without "
                f"momentum: {reason}"
            )
    return optimizers


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _again(update: Update, optimizer: Optimizer, first: list[bool]) -> Tensor:
    """Loss and gradients of a unit, for optimizers that ask for them."""
    with torch.enable_grad():
        if first.pop() if first else False:
            update.backward()
            return torch.zeros(()) if update.loss is None else update.loss
        if update.again is None:
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} asks for the loss again within one step, but this rule works out "
                f"the update of unit {update.unit!r} only once per batch: use an optimizer that asks once, such as Adam or SGD"
            )
        optimizer.zero_grad()
        loss = update.again()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _of_classes(loss: Any) -> bool:
    while isinstance(loss, partial):
        loss = loss.func
    return loss in _OF_CLASSES or isinstance(loss, _MODULES_OF_CLASSES)


# -- from the command line ------------------------------------------------------------------------------------------------
def torchvision(
    name: str,
    input_shape: Sequence[int],
    outputs: int,
    cuts: int | list[str] = 4,
    options: dict[str, Any] | None = None,
    weights: str | None = None,
) -> Blocks:
    """A classification network of torchvision in blocks, with random weights and as many outputs as there are classes.

    Args:
        name: as ``torchvision.models.get_model`` knows it, e.g. ``resnet18``.
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        cuts: names of the modules behind which blocks end, or the number of blocks; see :func:`localize`.
        options: what else the network is made with, e.g. ``{"width_mult": 0.5}``.
        weights: must be ``None``: trained weights belong to other classes.

    Raises:
        ValueError: there is no such network, it does not take these images, or it cannot be cut there.
    """
    from torchvision import models

    if weights is not None:
        raise ValueError(
            f"weights is {weights!r}: a comparison of rules starts from random weights, set net.weights=null"
        )
    known = models.list_models(module=models)
    if name not in known:
        near = (
            ", ".join(get_close_matches(name, known, 3)) or "resnet18, vgg11, mobilenet_v3_small, vit_b_16 and others"
        )
        raise ValueError(f"torchvision has no classification network {name!r}; it has {near}")
    return _in_blocks(_made(name, partial(models.get_model, name, weights=None), outputs, options), input_shape, cuts)


def factory(
    name: str,
    input_shape: Sequence[int],
    outputs: int,
    cuts: int | list[str] = 4,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A network of anybody's making in blocks.

    Args:
        name: dotted name of a class or function that makes a network. It is told the number of classes as ``num_classes``,
            ``num_labels``, ``outputs`` or ``out_channels``, and ``input_shape``, where its signature has them.
        input_shape: of one sample.
        outputs: number of classes.
        cuts: names of the modules behind which blocks end, or the number of blocks; see :func:`localize`.
        options: what else it is made with.

    Raises:
        ValueError: there is nothing by this name, it makes no network, or that cannot be cut there.
    """
    module, _, attribute = name.rpartition(".")
    try:
        make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"name is {name!r}, expected a class or function with its module, my_package.make_net: {error}"
        ) from error
    given = dict(options or {})
    parameters = inspect.signature(make).parameters
    if "input_shape" in parameters:
        given.setdefault("input_shape", tuple(input_shape))
    net = _made(name, make, outputs, given)
    return net if isinstance(net, Blocks) else _in_blocks(net, input_shape, cuts)


_COUNTS = ("num_classes", "num_labels", "outputs", "out_channels")


def _made(name: str, make: Callable[..., Any], outputs: int, options: Mapping[str, Any] | None) -> nn.Module:
    parameters = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    key = next((key for key in _COUNTS if key in parameters), "num_classes" if open_ended else None)
    given = dict(options or {})
    if key is not None:
        given.setdefault(key, outputs)
    try:
        net = make(**given)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with {', '.join(given) or 'nothing'}: {error}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} makes a {type(net).__name__}, expected a torch.nn.Module")
    return net


def _in_blocks(net: nn.Module, input_shape: Sequence[int], cuts: int | Sequence[str]) -> Blocks:
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    if layers and len(input_shape) == 3 and layers[0].in_channels != input_shape[0]:
        raise ValueError(
            f"{type(net).__name__} takes images of {layers[0].in_channels} channels, and these have {input_shape[0]}: use "
            "another data set, or a factory of your own that makes its first layer fit"
        )
    example = torch.randn(4, *input_shape, generator=torch.Generator().manual_seed(0))
    names = balanced(net, cuts, example) if isinstance(cuts, int) else list(cuts)
    return cut_network(net, names, example).blocks


# -- where to cut -----------------------------------------------------------------------------------------------------------
class Cuts(NamedTuple):
    """Where a network can be cut so that one tensor crosses; printed, a table.

    Attributes:
        owner: class of the network.
        rows: the places in the order of execution, and last, without a name, what comes behind the last of them.
        samples: of the example.
    """

    owner: str
    rows: tuple[Place, ...]
    samples: int

    def __str__(self) -> str:
        head = ("cut behind", "what crosses", "FLOPs forward", "bytes for gradients", "parameters")
        lines = [
            (
                row.name or "(the output)",
                "x".join(map(str, row.shape)),
                _short(row.flops, 1000, ("", "k", "M", "G", "T")),
                _short(row.bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB")),
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = [
            "  ".join(word.ljust(widths[0]) if i == 0 else word.rjust(widths[i]) for i, word in enumerate(line))
            for line in [head, *lines]
        ]
        return "\n".join(
            [
                f"{self.owner}: {len(self.rows) - 1} possible cuts, for {self.samples} samples; each line from the one before",
                *text,
            ]
        )


def show(net: nn.Module, example: Any = None, *, input: str | None = None, output: str | int | None = None) -> Cuts:
    """Print where a network can be cut, with operations, bytes and parameters from each place to the next.

    Args:
        net: the network.
        example: a batch, as for :func:`localize`; ``None``: two samples of a guessed shape.
        input: see :func:`localize`.
        output: see :func:`localize`.
    """
    _check_net(net)
    example = _guessed(net) if example is None else example
    rows = places(net, example, _weigh, input=input, output=output)
    cuts = Cuts(type(net).__name__, tuple(rows), rows[-1].shape[0] if rows[-1].shape else 1)
    print(cuts)
    return cuts


def balanced(
    net: nn.Module, blocks: int, example: Any, *, input: str | None = None, output: str | int | None = None
) -> list[str]:
    """Names of the modules behind which to cut, so that the largest of so many blocks is as small as it can be.

    Args:
        net: the network.
        blocks: how many.
        example: a batch.
        input: see :func:`localize`.
        output: see :func:`localize`.

    Raises:
        ValueError: fewer than one block, or more than there can be.
    """
    if isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"cuts is {blocks}, expected a number of blocks of at least 1, or names of modules")
    if blocks == 1:
        return []
    rows = places(net, example, _weigh, input=input, output=output)
    if blocks > len(rows):  # skip connections then cross the borders
        rows = places(net, example, _weigh, input=input, output=output, several=True)
    if blocks > len(rows):
        raise ValueError(
            f"cuts is {blocks}, and {type(net).__name__} can be cut into {len(rows)} blocks at most, behind "
            f"{', '.join(row.name for row in rows[:-1]) or 'no module'}: ask for fewer, or name modules"
        )
    return names_for([rows[i] for i in _partition([row.flops for row in rows], blocks)])


def _partition(sizes: Sequence[float], parts: int) -> list[int]:
    """Places of the last members of all parts but the last, so that the largest sum is smallest; the earliest such places."""
    sums = [0.0]
    for size in sizes:
        sums.append(sums[-1] + size)
    n = len(sizes)
    best = [[float("inf")] * (n + 1) for _ in range(parts + 1)]
    chosen = [[0] * (n + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for end in range(k, n + 1):
            for start in range(k - 1, end):
                worst = max(best[k - 1][start], sums[end] - sums[start])
                if worst < best[k][end]:
                    best[k][end], chosen[k][end] = worst, start
    ends, end = [], n
    for k in range(parts, 1, -1):
        end = chosen[k][end]
        ends.append(end - 1)
    return ends[::-1]


def _within(
    net: nn.Module,
    algorithm: Algorithm,
    limit: int,
    example: Any,
    attach: Callable[[Algorithm, Sequence[str]], tuple[Cut, TaskInfo]],
    input: str | None,
    output: str | int | None,
) -> list[str]:
    """The fewest cuts with which a step on the example keeps no more bytes than allowed, as measured."""
    rows = places(net, example, _weigh, input=input, output=output)
    least: tuple[float, int] = (float("inf"), 1)
    for blocks in range(1, len(rows) + 1):
        chosen = _partition([row.bytes for row in rows], blocks)
        edges = [-1, *chosen, len(rows) - 1]
        guess = max(sum(row.bytes for row in rows[a + 1 : b + 1]) for a, b in pairwise(edges))
        if guess > 1.5 * limit and blocks < len(rows):
            continue  # a pass would only show it
        names = names_for([rows[i] for i in chosen])
        trial = copy.deepcopy(algorithm)
        cut, task = attach(trial, names)
        peak = _peak(net, trial, cut, task)
        least = min(least, (peak, blocks))
        if peak <= limit:
            return names
    raise ValueError(
        f"memory allows {_short(limit, 1024, _BYTES)}, and a step of {type(algorithm).__name__} on this example keeps at least "
        f"{_short(least[0], 1024, _BYTES)} for gradients, in {least[1]} block{'s' if least[1] > 1 else ''}: allow more, or use "
        "a smaller batch"
    )


_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def _peak(net: nn.Module, algorithm: Algorithm, cut: Cut, task: TaskInfo) -> int:
    """Bytes that a step on the whole example keeps alive for gradients at once."""
    main, *context = cut.arguments.values.values()
    known = task.example.targets
    rows = rows_of(cut.arguments.values)
    targets = known if rows is None else known[torch.arange(rows, device=known.device) % len(known)]
    kept = [(p, p.grad) for p in net.parameters()]
    with preserved(net), activation_bytes(algorithm) as count:
        drive(algorithm, Batch(main, targets, tuple(context)))
    for parameter, gradient in kept:
        parameter.grad = gradient
    return count.peak


def _weigh(run: Callable[[], Any]) -> tuple[Any, float, dict[int, int]]:
    """Result, operations, and bytes kept for gradients by storage."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounter()
    with saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        result = run()
    return result, float(counter.total), kept


def bytes_in(size: str | int) -> int:
    """Bytes in a size such as ``200MiB``, ``1.5 GB`` or a plain number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if found is None or found[2] not in _UNITS or not float(found[1]):
        units = ", ".join(filter(None, _UNITS))
        raise ValueError(f"memory is {size!r}, expected a number of bytes or a size such as '200MiB' (units {units})")
    return int(float(found[1]) * _UNITS[found[2]])


def _short(number: float, base: int, units: Sequence[str]) -> str:
    place = 0
    while abs(number) >= base and place < len(units) - 1:
        number /= base
        place += 1
    return f"{number:.0f} {units[place]}".rstrip() if place == 0 else f"{number:.1f} {units[place]}"


def _guessed(net: nn.Module) -> Tensor:
    """Two samples that the network takes, by its first layer."""
    owner = type(net).__name__
    layer = next(
        (m for m in net.modules() if m._parameters and any(p is not None for p in m._parameters.values())), None
    )
    tries: list[Tensor] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    if layer is not None and layers:
        first = layers[0]
        if isinstance(first, nn.Conv2d):
            tries = [torch.zeros(2, first.in_channels, side, side) for side in (32, 64, 224, 299, 28)]
        elif isinstance(first, nn.Linear):
            tries = [torch.zeros(2, first.in_features)]
        else:
            tries = [torch.zeros(2, 16, dtype=torch.int64)]
        for x in (fitted(net, x) for x in tries):
            try:
                with evaluating(net), torch.no_grad():
                    net(x)
            except Exception:
                continue
            return x
    raise ValueError(f"no guess of an input fits {owner}: pass example=, a batch of inputs")


__all__ = ["Cuts", "Local", "attach_cut", "balanced", "bytes_in", "factory", "localize", "show", "torchvision"]
