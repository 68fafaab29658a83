"""The seam between a learning rule and the rest: ``Algorithm``, ``Update`` and what a task tells an algorithm."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks, evaluating, refuse_half, rest

ParamGroup = dict[str, Any]
"""What a torch optimizer takes: ``{"params": [...]}`` and, where a unit wants its own, options such as ``lr``."""


class Locality(StrEnum):
    """What an algorithm claims about who sees what. ``locallearn audit`` proves or refutes it."""

    LAYER_LOCAL = "layer-local"
    """No autograd edge between blocks; a unit's gradient is bit-equal whatever later blocks hold."""
    GROUP_LOCAL = "group-local"
    """A unit holds several blocks with one loss of its own: layer-local with larger blocks."""
    COUPLED = "gradient-isolated, parameter-coupled"
    """No autograd edge between blocks, but a unit's gradient depends on what later blocks hold."""
    FORWARD_ONLY = "forward-only"
    """No backward pass at all: autograd never runs."""
    FEEDBACK = "feedback"
    """An error travels backward, but not through the transposes of the forward weights."""
    GLOBAL = "global"
    """Everything may see everything."""


@dataclass(frozen=True)
class TaskInfo:
    """What an algorithm may know of the task it is attached to.

    Attributes:
        example: a batch of two samples with the shapes and dtypes of the real ones, on the CPU; of a graph, all of it.
        outputs: number of classes, or width of the network's output.
        loss: the task's loss as a mean over samples, ``loss(outputs, targets) -> scalar``.
        classes: whether targets are class ids ``0 .. outputs-1`` (rules that need labels refuse anything else).
    """

    example: Batch
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    classes: bool = True


class Update:
    """What an algorithm hands over for one unit: a local loss, or gradients that it worked out itself.

    Args:
        unit: name of the unit to step, a key of ``Algorithm.units()``.
        loss: scalar to differentiate inside the unit.
        gradients: gradients by parameter, shaped like it; the loss, if given too, is then only reported.
        again: makes the loss anew, from the same batch and the weights as they are by then, for optimizers that ask for it
            several times in one step (LBFGS, SAM); ``None``: this cannot be done.
    """

    __slots__ = ("again", "gradients", "loss", "unit")

    def __init__(
        self,
        unit: str,
        loss: Tensor | None = None,
        gradients: Mapping[nn.Parameter, Tensor] | None = None,
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        if loss is None and gradients is None:
            raise ValueError(f"the update of unit {unit!r} has neither a loss nor gradients")
        self.unit = unit
        self.loss = loss
        self.gradients = gradients
        self.again = again

    def backward(self, differentiate: Callable[[Tensor], None] = torch.Tensor.backward) -> None:
        """Put the gradients into ``parameter.grad`` and let go of the graph.

        Weights with ``requires_grad=False`` get none, and a unit in which nothing else learns is left as it is.

        Args:
            differentiate: what differentiates the loss; a strategy passes its precision's own.
        """
        if self.gradients is not None:
            for parameter, gradient in self.gradients.items():
                if parameter.requires_grad:  # optimizers step whatever has a gradient
                    known = parameter.grad
                    parameter.grad = gradient.to(parameter.dtype) if known is None else known + gradient
            self.gradients = {}
        elif self.loss is not None and (self.loss.requires_grad or not torch.is_grad_enabled()):
            # A loss without a graph is a frozen unit's, but under no_grad it is a mistake, and PyTorch says so.
            differentiate(self.loss)
        if self.loss is not None:
            self.loss = self.loss.detach()


def let_go(optimizer: Optimizer) -> None:
    """Set a unit's gradients to ``None``: what :meth:`torch.optim.Optimizer.zero_grad` does, for a thirtieth of its price."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()  # somebody else's
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


class Algorithm(nn.Module, ABC):
    """A learning rule: how the blocks of one network learn.

    Everything the rule adds to the network (projections, heads, feedback weights) is a submodule, so device, dtype and
    checkpoints follow. In plain PyTorch a rule is driven by four lines::

        optimizers = {name: torch.optim.Adam(groups) for name, groups in algorithm.units().items()}
        for update in algorithm.updates(batch):
            update.backward()
            optimizers[update.unit].step()
            optimizers[update.unit].zero_grad()

    Args:
        seed: of the rule's own randomness: what it adds to the network, and the draws of :meth:`rng`. It never touches
            PyTorch's global generator, so data order and network weights are the same under every rule.
    """

    blocks: Blocks

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.batches_seen = 0  # for rules in which something is due every so often; kept in the checkpoint
        self._generators: dict[str, torch.Generator] = {}
        self._active: frozenset[str] | None = None
        self._resting: frozenset[str] = frozenset()
        # What was frozen when frozen parts were looked for, and the parts that were found.
        self._learns: list[tuple[nn.Parameter, bool]] | None = None
        self._rested: list[nn.Module] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have every rule look for frozen parts before a batch, whoever wrote its :meth:`updates`."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("updates")
        if own is not None:

            @wraps(own)
            def updates(self: Algorithm, batch: Batch) -> Iterator[Update]:
                self._rest()
                learned: Iterator[Update] = own(self, batch)
                return learned

            type.__setattr__(cls, "updates", updates)

    @property
    @abstractmethod
    def locality(self) -> Locality:
        """The claim that ``locallearn audit`` checks."""

    @property
    def broadcast(self) -> str:
        """What is sent to all blocks in every update."""
        return "labels"

    @property
    def label_path(self) -> Sequence[nn.Module]:
        """Modules that run from the labels alone and whose activations every unit may read: a feedback network.

        What they compute is broadcast, so the audit does not count their weights as those of later units. Default: none.
        """
        return ()

    @property
    def averages(self) -> Sequence[nn.Module]:
        """Modules of the rule's own in a block's own loss whose weights follow those of the next block.

        What a block learns is then coupled to the next one's weights, which is no error that comes back from it: with these
        held still nothing of it must be left, and the audit tries it. Default: none.
        """
        return ()

    @property
    def variant(self) -> str | None:
        """Which of the rule's variants this is, as the record names it; ``None`` where there is only one."""
        return None

    @property
    def untimed(self) -> str | None:
        """Why seconds, operations, bytes and joules of a run say nothing about this rule (it is simulated), else ``None``.

        Records then leave them empty, and benches refuse the rule with this sentence.
        """
        return None

    @property
    def net_settings(self) -> dict[str, Any]:
        """What the maker of the network has to be told for this rule, by the name of its argument. Default: nothing."""
        return {}

    @property
    def learns_in_half(self) -> bool:
        """Whether weights in float16 may learn; gradients in it underflow, losses do not. Default: no."""
        return False

    @property
    def linear_optimizer(self) -> str | None:
        """Why this rule needs an optimizer that is linear in its gradients (SGD, with or without momentum), else ``None``.

        A strategy refuses any other one and quotes the reason.
        """
        return None

    @property
    def estimates_along(self) -> str | None:
        """Name of the setting that says along how many random directions a batch's gradient is estimated.

        For rules whose updates are estimates of the gradient of the task's loss. Default: ``None``, they are not.
        """
        return None

    def expected_error(self, size: int) -> float | None:
        """E‖ĝ − g‖² / ‖g‖² of the estimate by theory, for a gradient of ``size`` entries; ``None`` where there is none."""
        return None

    @property
    def piecewise(self) -> bool:
        """Whether a unit is stepped a few weights at a time, so that nobody sees its gradient as a whole. Default: no."""
        return False

    @property
    def carries(self) -> bool:
        """Whether blocks may hand over several tensors (:class:`~locallearn.nets.border.Border`) under this rule. Default: no.

        A rule that runs the network as a whole, or through the frame of the layer-local rules, has nothing to do for it.
        """
        return False

    @property
    def period(self) -> int:
        """Batches after which the work of a step repeats, for rules in which something is due every so often. Default: 1."""
        return 1

    def attach(self, blocks: Blocks, task: TaskInfo) -> None:
        """Build what the rule adds to each block, on the network's device and in its dtype. Called once.

        Raises:
            ValueError: these are no blocks, or the rule cannot train this network or this task; the sentence names the
                block.
        """
        if not isinstance(blocks, Blocks):
            raise ValueError(
                f"{type(self).__name__} trains a network as ordered blocks, and this is a {type(blocks).__name__}: cut it with "
                "locallearn.Blocks.cut"
            )
        if hasattr(self, "blocks"):
            raise ValueError(f"{type(self).__name__} is attached to a network already: make a new one for another")
        if not self.learns_in_half:
            refuse_half(blocks)
        own = {*self._modules, *self._buffers}
        self.blocks = blocks
        self.outputs = task.outputs
        try:
            with evaluating(blocks), torch.random.fork_rng(devices=[]):  # the first for the dry runs of build()
                blocks.try_out(task.example.inputs, task.example.context)
                if not self.carries:
                    self._refuse_borders(task.example)
                torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would reseed the GPUs, too
                self.build(task)
        except Exception:  # as if nothing had been: a network that fits may come next
            for name in {*self._modules, *self._buffers} - own:
                delattr(self, name)
            raise
        self._join(next((p for p in blocks.parameters() if p.is_floating_point()), None))

    def _join(self, like: Tensor | None) -> None:
        """What was added goes where the network's weights are; drawn before, so that the draws are the same in any dtype."""
        if like is None:
            return
        for name, child in self.named_children():
            if name != "blocks":
                child.to(like.device, like.dtype)
        for name, held in self._buffers.items():
            if held is not None:
                self._buffers[name] = held.to(like.device, like.dtype if held.is_floating_point() else None)

    def _refuse_borders(self, example: Batch) -> None:
        try:
            name = self.blocks.carrier(example.inputs, example.context)
        except Exception:  # build() says what does not fit
            return
        if name is not None:
            raise ValueError(
                f"{type(self).__name__} needs a plain chain of blocks, and block {name!r} hands over more than one tensor (a "
                "skip connection, or a value that later blocks read): cut the network where only one tensor crosses, or use "
                "another algorithm"
            )

    @abstractmethod
    def build(self, task: TaskInfo) -> None:
        """Add submodules for ``self.blocks``; draw their weights from PyTorch's generator, which is seeded here."""

    @abstractmethod
    def units(self) -> dict[str, list[ParamGroup]]:
        """Parameter groups of every unit, one optimizer each, in the order of learning."""

    @abstractmethod
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yield one update at a time, in the order of learning.

        Whoever drives the generator differentiates and steps the unit before asking for the next update, so that the
        graph of one block is freed before the next block runs.
        """

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Outputs by the rule's own inference, e.g. class scores ``(N, C)``. Default: the network's forward pass."""
        output: Tensor = self.blocks(inputs, *context)
        return output

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Output of every block at inference, in order; what probes read."""
        return self.blocks.features(inputs, *context)

    def end_epoch(self) -> None:
        """Do what is due when all batches of an epoch have been learned from: a closed form is solved here.

        A strategy calls it as a part of training; in a loop of one's own it goes after the batches. Default: nothing.
        """

    @property
    def consecutive(self) -> bool:
        """Whether stages can only come one after the other, so that every schedule of this rule is sequential. Default: no."""
        return False

    @property
    def finished(self) -> bool:
        """Whether a further epoch of the units that train now would change nothing, so that it need not come."""
        return False

    def learned_from(self, unit: str, samples: int) -> int:
        """How many of a batch's samples a unit learns from. Default: all of them.

        Raises:
            ValueError: the rule cannot learn from a batch of that size.
        """
        return samples

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Figures of the rule's own by layer and name, e.g. ``{"layer1": {"weight_angle": 71.3}}``; logged every epoch."""
        return {}

    def examine(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Figures of the rule's own by layer and name on samples that it has not learned from; logged every epoch.

        Args:
            batch: validation samples with their targets (as many as probes are judged on), on the rule's device.
        """
        return {}

    @property
    def judges(self) -> bool:
        """Whether :meth:`predict` says anything about the units that train now.

        Where it does not (an unsupervised stage), a schedule has nothing to choose weights by, and keeps the last ones.
        """
        return True

    # -- schedules ---------------------------------------------------------------------------------------------------
    @property
    def stages(self) -> list[list[str]]:
        """Units that a sequential schedule trains together, stage after stage.

        Raises:
            ValueError: the rule cannot be trained one unit after another.
        """
        raise ValueError(
            f"{type(self).__name__} trains all of its units with every batch and has no sequential schedule: "
            "use schedule=joint"
        )

    @property
    def active(self) -> frozenset[str] | None:
        """Units that train now; ``None`` means all of them."""
        return self._active

    def train_only(self, units: frozenset[str] | None) -> None:
        """Train these units only and freeze the others; ``None`` trains all."""
        self._active, self._learns = units, None

    def trains(self, unit: str) -> bool:
        """Whether this unit is trained now."""
        return self._active is None or unit in self._active

    # -- frozen parts ------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything that learns; parts all of whose weights are frozen stay in eval mode.

        A frozen part is its weights and its buffers, so normalisation statistics rest, too, and so does dropout. Weights
        that are frozen or thawed later are seen at the next call, or by the next :meth:`updates`.
        """
        super().train(mode)
        self._resting, self._learns = frozenset(), None
        self._rest()
        return self

    def _rest(self) -> None:
        if not self.training:
            return
        same = self._learns and all(p.requires_grad is learns for p, learns in self._learns)
        if same and not any(part.training for part in self._rested):
            return  # nothing was frozen, thawed or woken since
        self._resting = rest(self, self._resting, self._asleep(), self._held())
        self._learns = [(p, p.requires_grad) for p in self.parameters()]
        self._rested = [self.get_submodule(path) for path in self._resting]

    def _asleep(self) -> Container[str]:
        """Paths of parts that rest although their weights are not frozen. Default: none."""
        return ()

    def _held(self) -> Container[int]:
        """Ids of parameters that the rule itself never trains; a part is not frozen by these. Default: none."""
        return ()

    # -- randomness --------------------------------------------------------------------------------------------------
    def rng(self, device: torch.device | str) -> torch.Generator:
        """The rule's own generator on ``device``, seeded from ``seed`` and kept in the checkpoint."""
        key = str(torch.device(device))
        if key not in self._generators:
            self._generators[key] = torch.Generator(device=key).manual_seed(self.seed)
        return self._generators[key]

    def get_extra_state(self) -> dict[str, Tensor]:
        """State of the generators, by device, and the batches that a rule has counted, for the checkpoint."""
        state = {device: generator.get_state() for device, generator in self._generators.items()}
        return {**state, "batches_seen": torch.tensor(self.batches_seen)} if self.batches_seen else state

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the count, and the generators whose device exists here."""
        self._generators = {}
        self.batches_seen = int(state.get("batches_seen", 0))
        for device, value in state.items():
            if device == "batches_seen":
                continue
            if torch.device(device).type == "cpu" or torch.cuda.is_available():
                self.rng(device).set_state(value.cpu())

    def __getstate__(self) -> dict[str, Any]:
        # A torch.Generator can be neither copied nor pickled; its state can.
        return {**self.__dict__, "_generators": self.get_extra_state(), "_learns": None, "_rested": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.set_extra_state(state["_generators"])

    @property
    def added_parameters(self) -> int:
        """Number of weights beside the network's own; a rule that keeps fixed ones in buffers adds theirs."""
        own = {id(p) for p in self.blocks.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in own)


class ByOptions(Algorithm):
    """``Rule(...)`` makes an object of the kind that its options ask for, as ``pathlib.Path(...)`` does.

    The rule that is named has a static method ``_kind(options)``; its kinds, which inherit from it, are made as they are.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Ask the class that is called, not the one that its kinds inherit from."""
        kind: Any = cls
        if "_kind" in cls.__dict__:
            kind = cls._kind(inspect.signature(cls.__init__).bind_partial(None, *args, **options).arguments)
        made: Self = super().__new__(kind)
        return made

    @staticmethod
    def _kind(asked: Mapping[str, Any]) -> type[Algorithm]:
        """The class for these options; what does not go together, it refuses itself."""
        raise NotImplementedError


def output_layer(blocks: Blocks, owner: str) -> nn.Module:
    """The network's readout.

    Raises:
        ValueError: it has none; ``owner`` is who asks.
    """
    if blocks.readout is None:
        raise ValueError(
            f"{owner} needs a network that ends in an output layer, and this network has no readout: name one in "
            "Blocks.cut(..., readout=...)"
        )
    return blocks.readout


def refuse_dense(task: TaskInfo, owner: str) -> None:
    """Refuse labels of places (segmentation) where a rule answers with one class per sample.

    Raises:
        ValueError: names the shape.
    """
    if task.classes and task.example.targets.ndim > 1:
        raise ValueError(
            f"{owner} answers with one class per sample, and these labels have shape "
            f"(N, {', '.join(map(str, task.example.targets.shape[1:]))}): use a rule that trains the network's own output, "
            "backpropagation or feedback alignment"
        )


def choices(made: object, init: Callable[..., None], *names: str) -> str | None:
    """Those of an object's settings that are not the default, as a command line has them: what tells its variant.

    Args:
        made: keeps its settings under the names of its arguments.
        init: has the arguments with their defaults.
        names: the settings that make another rule of it, not those that tune it.
    """
    defaults = inspect.signature(init).parameters
    told = {name: getattr(made, name) for name in names if getattr(made, name) != defaults[name].default}
    return ", ".join(f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in told.items()) or None


def selected(batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``outputs`` that carry targets, with their targets; for pairs of rows, the pairs' dot products ``(M,)``."""
    if batch.rows is None:
        return outputs, batch.targets
    if batch.rows.ndim == 2:
        return (outputs[batch.rows[0]] * outputs[batch.rows[1]]).sum(1), batch.targets
    return outputs[batch.rows], batch.targets[batch.rows]


def refuse_made_weights(name: str, layer: nn.Module, owner: str) -> None:
    """Make sure that a linear or convolutional layer multiplies by the very parameters that it holds.

    Weight and spectral normalisation, pruning and other parametrizations make a layer's weight from other parameters in every
    pass. A rule that steps the weight itself would train something that the next pass overwrites.

    Args:
        name: of the block, for the message.
        layer: an ``nn.Linear``, or an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        owner: the rule that asks.

    Raises:
        ValueError: it holds other parameters than weight and bias, or has a forward of its own.
    """
    held = {key for key, p in layer.named_parameters() if p is not None}
    # one can be put on the object
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    plain = getattr(layer.forward, "__func__", None) in [kind.forward for kind in kinds]
    if held not in ({"weight"}, {"weight", "bias"}) or not plain:
        made = ", ".join(sorted(held - {"weight", "bias"})) or ("no parameter of that name" if plain else "its forward")
        raise ValueError(
            f"{name!r} has a {type(layer).__name__} that makes its weight from something else ({made}: weight or spectral "
            f"normalisation, pruning, quantisation?), and {owner} works with the weight itself: make it plain "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove), or use another algorithm"
        )
