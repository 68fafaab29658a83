"""A network with a rule that trains it, in a loop of the user's own."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, let_go
from locallearn.algorithms.dry_run import refuse_single
from locallearn.batch import Batch
from locallearn.cost import drive, undisturbed
from locallearn.local._targets import (
    by_entry,
    counted,
    dense,
    of_classes,
    only_broadcast,
    refuse_no_ids,
    refuse_strangers,
    unfit,
)
from locallearn.local._wiring import Wiring
from locallearn.losses._of_torch import left_out
from locallearn.nets.blocks import evaluating
from locallearn.nets.cut import Cut
from locallearn.nets.execution import Execution
from locallearn.nets.trace import lacks_samples

OptimizerFactory = Callable[[list[ParamGroup]], Optimizer]


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
        execution: how blocks are run.
    """

    def __init__(
        self,
        net: nn.Module,
        cut: Cut,
        algorithm: Algorithm,
        task: TaskInfo,
        cuts: Sequence[str],
        optimizer: OptimizerFactory,
        execution: Execution,
        given: bool = False,
    ) -> None:
        self.net, self.blocks, self.algorithm, self.task = net, cut.blocks, algorithm, task
        self.execution, self._proved = execution, execution.compile is None  # that blocks run compiled
        execution.check(cut.blocks, task.example.inputs)
        execution.lay_out(algorithm)
        self.cuts, self.unused = tuple(cuts), cut.unused
        self.make_optimizer = optimizer
        self._arguments, self._given = cut.arguments, given  # whether the example came with its targets
        self._mode: bool | None = None
        self._takes_single = False  # known once it has been tried
        self.optimizers = _optimizers(algorithm, optimizer)
        stepped = self._stepped()
        self._resting = [p for p in net.parameters() if id(p) not in stepped]
        self._wiring = Wiring(net, cut)
        self._refuse_frozen()
        self._follow()

    def __repr__(self) -> str:
        unused = f", {len(self.unused)} parameters that its output does not need" if self.unused else ""
        return f"Local({type(self.net).__name__} under {type(self.algorithm).__name__}: {', '.join(self.blocks.names)}{unused})"

    def batch(self, inputs: Any, targets: Tensor, rows: Tensor | None = None, source: Tensor | None = None) -> Batch:
        """Inputs as the network takes them and targets, as a rule takes them; the arguments are those of :meth:`updates`.

        Raises:
            ValueError: inputs are given otherwise than the example was, labels are no class ids, or there are none; or
                what says which samples they are does not.
        """
        main, *context = self._arguments.by_name(inputs).values()
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets are a {type(targets).__name__}, expected a tensor")
        if not targets.numel() or (rows is not None and _chooses_none(rows)):
            raise ValueError("this batch is empty: there is nothing to learn from")
        wanted, loss = self.task.example.targets, self.task.loss
        pairs = rows is not None and rows.ndim == 2  # whose products are compared, not the outputs
        if not self.task.classes and by_entry(loss) and not pairs and only_broadcast(targets.shape, wanted.shape):
            raise ValueError(unfit(targets.shape, wanted.shape, loss))
        if self.task.classes:
            if targets.ndim != wanted.ndim:
                raise ValueError(
                    f"labels have shape {tuple(targets.shape)}, expected class ids of shape "
                    f"({', '.join(['N', *map(str, wanted.shape[1:])])}{',' if wanted.ndim == 1 else ''})"
                )
            refuse_no_ids(targets.dtype)
            alike = main.shape[1:] == self.task.example.inputs.shape[1:]  # inputs of another size have other places
            if of_classes(loss) and alike and targets.shape[1:] != wanted.shape[1:]:
                raise ValueError(dense(targets.shape, wanted.shape, self.task.outputs, self._given))
            targets = targets.long()
            seen = targets if rows is None else targets[rows]
            if targets.device.type == "cpu":
                if not counted(seen, loss).numel():
                    raise ValueError(
                        f"all labels of this batch are {left_out(loss)}, which the loss leaves out: leave it out, too"
                    )
                refuse_strangers(seen, self.task.outputs, loss)
        known = self.task.example
        matched = main.ndim and targets.ndim and len(known.inputs) == len(known.targets)  # else of a graph as a whole
        if matched and len(main) != len(targets):
            raise ValueError(f"there are {len(main)} inputs and {len(targets)} targets: every sample needs its own")
        if source is not None and (source.dtype != torch.int64 or source.shape != targets.shape[:1]):
            raise ValueError(
                f"source is {source.dtype} of shape {tuple(source.shape)}, expected the position of every sample in the "
                f"training set, int64 of shape ({len(targets)},)"
            )
        return self.execution.given(Batch(main, targets, tuple(context), rows, source=source))

    def updates(
        self, inputs: Any, targets: Tensor, rows: Tensor | None = None, source: Tensor | None = None
    ) -> Iterator[Update]:
        """Train on one batch, one unit after the other.

        Every unit is handed out before it learns: ``update.unit`` and ``update.loss`` are known, its gradients are not. When
        the loop goes on, the unit is differentiated (unless the body has called ``update.backward()``, to clip gradients,
        say), stepped, and its gradients are dropped. So a loop with an empty body trains, and a unit at which the
        loop is broken off does not.

        Args:
            inputs: as the example was given: a tensor, a tuple, or a dict.
            targets: class ids ``(N,)``, or what the loss takes.
            rows: see :class:`~locallearn.batch.Batch`; on a graph the nodes that are learned from.
            source: position of every sample in the training set, ``(N,)``, int64, for rules that remember what each of
                them cost (``Backprop(keep=0.5)``).

        Raises:
            ValueError: a batch that the network or the rule cannot be trained on; of one of a single sample nothing has
                learned then.
        """
        refuse_without_gradients(self.algorithm)
        self._wiring.refuse_changes(lambda: self._stepped() | {id(p) for p in self._resting})
        self._refuse_frozen()
        self._follow()
        batch = self.batch(inputs, targets, rows, source)
        for own in self.optimizers.values():  # of somebody's backward pass, or of a loop that was broken off
            let_go(own)
        self._try_single(batch)
        updates = self.algorithm.updates(batch)
        while True:
            try:
                update = next(updates, None)
            except ValueError as error:
                if lacks_samples(error):
                    self._try(batch)
                self._explain(error, inputs)
                raise
            except RuntimeError as error:
                self.execution.explain(error)
                self._explain(error, inputs)
                raise
            if update is None:
                if not self._proved:
                    self.execution.check_ran(self.blocks, self.algorithm.trains, type(self.algorithm).__name__)
                    self._proved = True
                return
            yield update
            optimizer = self.optimizers[update.unit]
            if _needs_closure(optimizer):
                optimizer.step(partial(_again, update, optimizer, [True]))  # type: ignore[arg-type]
            else:
                update.backward()
                optimizer.step()
            let_go(optimizer)
            del update

    def _try_single(self, batch: Batch) -> None:
        """Before anything learns from a batch of one sample: a later block may have nothing to normalise by."""
        if len(batch.inputs) > 1 or self._takes_single or not self.net.training:
            return
        self._try(batch)
        self._takes_single = True

    def _try(self, batch: Batch) -> None:
        """A step on a copy.

        Raises:
            ValueError: it cannot be made; where a normalisation is why, the block is named.
        """
        twin = copy.deepcopy(self.algorithm)
        at = [self.blocks.names[0]]

        def enter(name: str, *_: Any) -> None:
            at[0] = name

        readout = {} if twin.blocks.readout is None else {"readout": twin.blocks.readout}
        for name, block in {**twin.blocks.members, **readout}.items():
            for module in block.modules():  # a rule may run them one by one
                module.register_forward_pre_hook(partial(enter, name))
        with undisturbed(batch.inputs.device):
            try:
                drive(twin, batch)
            except ValueError as error:
                refuse_single(error, at[0])
                raise

    def step(
        self, inputs: Any, targets: Tensor, rows: Tensor | None = None, source: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Train on one batch; the arguments are those of :meth:`updates`.

        Returns:
            The loss of every unit before its step, detached; of a unit with several steps per batch, their mean. Units of
            rules without a loss are left out.

        Raises:
            ValueError: a loss is not finite; its unit is not stepped. On a CPU alone: elsewhere, reading every loss would
                have the device waited for, and it is up to the loop to look now and then.
        """
        losses: dict[str, list[Tensor]] = {}
        for update in self.updates(inputs, targets, rows, source):
            if update.loss is not None:
                loss = update.loss.detach()
                if loss.device.type == "cpu" and not math.isfinite(loss.item()):
                    raise ValueError(_diverged(update.unit, loss, inputs, targets))
                losses.setdefault(update.unit, []).append(loss)
        return {unit: torch.stack(found).mean() if len(found) > 1 else found[0] for unit, found in losses.items()}

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Outputs by the rule's own inference in evaluation mode, ``(N, ...)``, whatever mode the network is in."""
        main, *context = self.execution.given(list(self._arguments.by_name(inputs).values()))
        with evaluating(self.algorithm):
            try:
                return self.algorithm.predict(main, *context)
            except (RuntimeError, ValueError) as error:
                self._explain(error, inputs)
                raise

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: network, rule with its generators, and optimizers. ``torch.save`` takes it."""
        return {
            "net": self.net.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "optimizers": {unit: optimizer.state_dict() for unit, optimizer in self.optimizers.items()},
            "kinds": {unit: type(optimizer).__name__ for unit, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, under the same rule with the same cuts.

        Raises:
            ValueError: it is the state of something else; then nothing has been loaded.
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
        for unit, optimizer in self.optimizers.items():
            mine = type(optimizer).__name__
            kind = state.get("kinds", {}).get(unit, mine)  # an older state does not say: then its settings do
            if kind != mine:
                raise ValueError(f"this is the state of another optimizer than {mine}, of {kind}: make the same one")
            _refuse_another(optimizer, state["optimizers"][unit])
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except Exception as error:  # whatever a module or an optimizer of somebody's own says
            self._load(before)  # PyTorch copies what fits before it says what does not
            said = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            raise ValueError(f"this is the state of another network, rule or optimizer: {said}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.algorithm.load_state_dict(state["algorithm"])
        for unit, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][unit])

    def _explain(self, error: Exception, inputs: Any) -> None:
        """Say what is unlike the example where that made a step or a prediction fail, else nothing.

        Raises:
            ValueError: shape, dtype or device of the inputs.
        """
        unlike = self._arguments.unlike(self._arguments.by_name(inputs))
        if unlike is not None:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            kinds = {(p.dtype, p.device) for p in self.algorithm.parameters() if p.is_floating_point()}
            apart = len(kinds) > 1 and len({(p.dtype, p.device) for p in self.net.parameters()}) == 1
            remedy = (
                ". The network was moved and the rule's own parts were not: local.algorithm.to(...) moves all"
                if apart
                else ""
            )
            raise ValueError(
                f"{unlike}: {type(self.net).__name__} and what the rule adds cannot run these ({said}){remedy}"
            ) from error

    def _stepped(self) -> set[int]:
        """The parameters that optimizers have."""
        return {id(p) for unit in self.optimizers.values() for group in unit.param_groups for p in group["params"]}

    def _refuse_frozen(self) -> None:
        """Whether there is anything left of the network that could learn, where this rule moves its weights at all."""
        if any(p.requires_grad for p in self.net.parameters()):  # as a rule the first
            return
        parameters = list(self.net.parameters())
        if self._stepped() & {id(p) for p in parameters}:
            raise ValueError(
                f"all {len(parameters)} parameters of {type(self.net).__name__} are frozen (requires_grad is False), so a step "
                "would move none of its weights: set requires_grad_(True) for what is to learn"
            )

    def _follow(self) -> None:
        """Train in the mode of the network: ``net.train()`` and ``net.eval()`` decide, as in any loop."""
        self.execution.compile_each(self.blocks)  # anew in a copy of this
        if self._mode is not self.net.training:
            self._mode = self.net.training
            own = {id(module) for module in self.net.modules()}  # asked anew: a copy of this has other modules
            for module in self.algorithm.modules():
                if id(module) not in own:
                    module.training = self._mode
            self.algorithm._resting = frozenset()
        for path in self.algorithm._resting:
            self.algorithm.get_submodule(path).eval()


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


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def _refuse_another(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse the state of an optimizer of another kind, or over other parameters. Learning rate schedules add settings."""
    if not isinstance(state, Mapping) or "param_groups" not in state:
        raise ValueError(
            f"this is no state of a Local: what it has for {type(optimizer).__name__} is no optimizer's state"
        )
    filled = copy.copy(optimizer)  # with the settings that an older PyTorch had not
    filled.__setstate__({"state": {}, "param_groups": [dict(group) for group in state["param_groups"]]})
    for mine, theirs in zip(optimizer.param_groups, filled.param_groups, strict=False):
        differ = (set(mine) ^ set(theirs)) - _OF_SCHEDULERS
        if differ:
            raise ValueError(
                f"this is the state of another optimizer than {type(optimizer).__name__}, with settings "
                f"{', '.join(sorted(differ))} in one of the two only: make the same one"
            )
    sizes = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"this is the state of an optimizer over groups of {sizes[1]} parameters, and these have {sizes[0]}: cut the "
            "network at the same places, under the same rule"
        )


_CLOSURES: MutableMapping[Any, bool] = WeakKeyDictionary()  # of functions: asked with every step of every unit


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step cannot be called without one."""
    step = getattr(optimizer.step, "__func__", optimizer.step)
    try:
        known = _CLOSURES.get(step)
    except TypeError:  # an object that cannot be remembered without being kept
        return _asks_for_closure(optimizer)
    if known is None:
        known = _CLOSURES[step] = _asks_for_closure(optimizer)
    return known


def _asks_for_closure(optimizer: Optimizer) -> bool:
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


def _chooses_none(rows: Tensor) -> bool:
    if rows.dtype is torch.bool:
        return rows.device.type == "cpu" and not rows.any()  # elsewhere it would have to be waited for
    return not rows.numel()


def _diverged(unit: str, loss: Tensor, inputs: Any, targets: Tensor) -> str:
    for what, given in (("inputs", inputs), ("targets", targets)):
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            return f"the loss of unit {unit!r} is {float(loss)}, because the {what} have entries that are not finite"
    return (
        f"unit {unit!r} diverged: its loss is {float(loss)}; a smaller learning rate may help, or clipped gradients "
        "(in a loop over updates())"
    )


def refuse_without_gradients(algorithm: Algorithm) -> None:
    """Refuse to train where PyTorch keeps no graph.

    Raises:
        ValueError: gradients are switched off, and the rule needs them.
    """
    if not torch.is_grad_enabled() and algorithm.locality is not Locality.FORWARD_ONLY:
        raise ValueError(
            "gradients are switched off here (torch.no_grad() or inference_mode()), so nothing could be learned: train "
            "outside of it"
        )
