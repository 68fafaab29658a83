"""Recurrent Forward-Forward: every block sees the block below and the block above it, a moment ago."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo, Update
from locallearn.algorithms.forward_forward.frame import weights_and_biases
from locallearn.algorithms.forward_forward.supervised import ForwardForward, Inference
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff


@dataclass(frozen=True)
class Recurrence:
    """How a network settles on a still image.

    Attributes:
        steps: synchronous time steps in training.
        damping: share of a block's old activity that is kept.
        read: first and last time step whose goodness is summed at inference, counted from 1.
    """

    steps: int = 8
    damping: float = 0.3
    read: tuple[int, int] = (3, 5)

    @classmethod
    def of(cls, given: int | Mapping[str, Any]) -> Recurrence:
        """From a number of time steps, or a mapping of what differs from the defaults.

        Raises:
            ValueError: an unknown key, or a number that is out of range.
        """
        settings = dict(given) if isinstance(given, Mapping) else {"steps": given}
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise ValueError(f"recurrent has no {key!r}; it has {', '.join(known)}")
        steps, damping = settings.get("steps", cls.steps), settings.get("damping", cls.damping)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"recurrent is {steps!r} time steps, expected a whole number of at least 1")
        if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < 1:
            raise ValueError(f"recurrent.damping is {damping!r}, expected a number from 0 to below 1")
        read: Any = settings.get("read", (min(3, steps), min(5, steps)))
        whole = isinstance(read, list | tuple) and len(read) == 2 and all(type(step) is int for step in read)
        if not whole or not 1 <= read[0] <= read[1] <= steps:
            raise ValueError(f"recurrent.read is {read!r}, expected the first and the last of 1 to {steps} time steps")
        return cls(steps, float(damping), (read[0], read[1]))


class RecurrentForwardForward(ForwardForward):
    """Top-down Forward-Forward on still images (Hinton, arXiv 2212.13345), made by ``ForwardForward(recurrent=8)``.

    The image is clamped below, the one-hot label above, and all blocks step at once:
    h_l(t) = d h_l(t-1) + (1-d) ReLU(N(h_{l-1}(t-1)) U_l + N(h_{l+1}(t-1)) V_l + b_l). A block learns at every time step from
    the goodness of its new activity with the right and with a wrong label above; no gradient goes through time, or to
    another block. U_l and b_l are the block's own, V_l belongs to its unit.

    Deviations, where the sources say nothing: activities start from one pass upward without anything from above; the label
    is scaled as other activities are, times ``label_strength``; blocks step at every time step; goodness is summed over
    all blocks.
    """

    inferences: ClassVar[tuple[Inference, ...]] = ("goodness",)
    skips_first: ClassVar[bool] = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.negatives != "uniform" or self.loss == "channelwise":
            what = f"negatives={self.negatives}" if self.negatives != "uniform" else "loss=channelwise"
            raise ValueError(
                f"recurrent and {what} do not go together: a wrong label stands above the network, drawn uniformly"
            )
        assert self.recurrent is not None
        self.recurrence = Recurrence.of(self.recurrent)
        self._from_above: Tensor | None = None

    def _kind_in_words(self) -> str:
        return "recurrent"

    def _idle(self) -> tuple[str, ...]:
        return (*super()._idle(), "peer", "readout_lr", "readout_weight_decay")

    @property
    def locality(self) -> Locality:
        """A block reads the one above it."""
        return Locality.COUPLED

    @property
    def broadcast(self) -> str:
        """The label reaches the last block alone."""
        return "positive/negative bit; the label above the last block, every block's activity to the block below it"

    @property
    def variant(self) -> str:
        """How many time steps, and what else makes another rule of it."""
        return ", ".join(filter(None, (f"recurrent={self.recurrence.steps}", super().variant)))

    @property
    def stages(self) -> list[list[str]]:
        """None: a block learns from what the untrained ones above it say.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "recurrent Forward-Forward trains all blocks with every batch, because each reads the one above it: use "
            "schedule=joint"
        )

    # -- parts -----------------------------------------------------------------------------------------------------------
    def check(self, task: TaskInfo) -> list[int]:
        """Refuse blocks whose ReLU cannot take something from above.

        Raises:
            ValueError: names the block and the reason.
        """
        sizes = super().check(task)
        for i, name in enumerate(self.blocks.names):
            relus = [module for module in self.blocks[i].modules() if isinstance(module, nn.ReLU)]
            if len(relus) != 1 or relus[0].inplace:
                raise ValueError(
                    f"recurrent adds what comes from above to what the one nn.ReLU of a block reads, and block {name!r} has "
                    f"{len(relus)} (an in-place one does not count): give it one, with inplace=False"
                )
        self._try_out(task.example.inputs)
        return sizes

    def _try_out(self, inputs: Tensor) -> None:
        """The ReLU must be a block's last word, and its output a vector."""
        parameter = next(self.blocks.parameters())
        x = inputs.to(parameter.device, parameter.dtype)
        with torch.no_grad():
            for name, block in zip(self.blocks.names, self.blocks, strict=True):
                made: list[Tensor] = []
                handle = self._relu(block).register_forward_hook(
                    lambda module, args, output, to=made: to.append(output)
                )
                try:
                    x = block(x)
                finally:
                    handle.remove()
                if x.ndim != 2 or len(made) != 1 or not torch.equal(made[0], x):
                    raise ValueError(
                        f"recurrent needs blocks that end in their ReLU and give vectors, and block {name!r} gives "
                        f"{tuple(x.shape[1:])} per sample: use fully connected blocks (net=mlp, activation relu)"
                    )

    def build(self, task: TaskInfo) -> None:
        """Give every block its loss and its weights from above, N(0, 1/fan_in)."""
        super().build(task)
        self.from_above = nn.ModuleList()
        for here, above in zip(self.sizes, [*self.sizes[1:], task.outputs], strict=True):
            layer = nn.Linear(above, here, bias=False)
            nn.init.normal_(layer.weight, std=above**-0.5)
            self.from_above.append(layer)
        for relu in dict.fromkeys(self._relu(block) for block in self.blocks):  # blocks may share one
            relu.register_forward_pre_hook(self._add_from_above)

    @staticmethod
    def _relu(block: nn.Module) -> nn.ReLU:
        return next(module for module in block.modules() if isinstance(module, nn.ReLU))

    def _add_from_above(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._from_above is None else (args[0] + self._from_above,)

    @contextmanager
    def _with(self, from_above: Tensor | None) -> Iterator[None]:
        self._from_above = from_above
        try:
            yield
        finally:
            self._from_above = None

    def block_groups(self, index: int) -> list[ParamGroup]:
        """The block's weights and those from above, and biases without weight decay."""
        return weights_and_biases([*self.blocks[index].parameters(), *self.from_above[index].parameters()])

    # -- the way of a batch ----------------------------------------------------------------------------------------------
    def updates(self, batch: Batch) -> Iterator[Update]:
        """One update of every block that trains per time step, all from the activities of the step before."""
        labels = batch.targets
        wrong = ff.wrong_labels_uniform(labels, self.outputs, self.rng(labels.device))
        image = self.scaled(batch.inputs)
        above = self._above(torch.cat((labels, wrong)), image.dtype)
        below = torch.cat((image, image))
        states = self._started(below)
        for _ in range(self.recurrence.steps):
            reads = self._reads(below, states, above)
            for i, name in enumerate(self.blocks.names):
                if not self.trains(name):
                    with torch.no_grad():
                        states[i] = self._step(i, states[i], reads[i])
                    continue
                again = self._again_of(i, states[i], reads[i])
                output = self._step(i, states[i], reads[i])
                yield Update(name, self._loss_of(i, output), again=again)
                states[i] = output.detach()
                del output

    def _again_of(self, index: int, state: Tensor, reads: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        return lambda: self._loss_of(index, self._step(index, state, reads))

    def _loss_of(self, index: int, output: Tensor) -> Tensor:
        positive, negative = output.chunk(2)
        loss: Tensor = self.local[index](positive, negative)
        return loss

    def _above(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Labels as activities of a layer above the last block, ``(N, C)``."""
        return self.label_strength * self.scaled(nn.functional.one_hot(labels, self.outputs).to(dtype))

    @torch.no_grad()
    def _started(self, below: Tensor) -> list[Tensor]:
        """Activities after one pass upward."""
        states: list[Tensor] = []
        x = below
        for block in self.blocks:
            states.append(block(x).detach())
            x = self.scaled(states[-1])
        return states

    def _reads(self, below: Tensor, states: list[Tensor], above: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What every block reads from below and from above, scaled; the image and the label are already."""
        scaled = [self.scaled(state) for state in states]
        return list(zip([below, *scaled[:-1]], [*scaled[1:], above], strict=True))

    def _step(self, index: int, state: Tensor, reads: tuple[Tensor, Tensor]) -> Tensor:
        below, above = reads
        with self._with(self.from_above[index](above)):
            new = self.blocks[index](below)
        damping = self.recurrence.damping
        output: Tensor = damping * state + (1.0 - damping) * new
        return output

    # -- inference -------------------------------------------------------------------------------------------------------
    def _settle(self, inputs: Tensor, above: Tensor) -> Iterator[list[Tensor]]:
        """Activities after every time step up to the last that inference reads."""
        below = self.scaled(inputs)
        states = self._started(below)
        for _ in range(self.recurrence.read[1]):
            reads = self._reads(below, states, above)
            states = [self._step(i, state, reads[i]) for i, state in enumerate(states)]
            yield states

    def goodness_by_block(self, inputs: Tensor, label: int) -> Iterator[Tensor]:
        """Goodness of every block with this label above, summed over the time steps that are read, ``(N,)`` each."""
        labels = torch.full((len(inputs),), label, device=inputs.device)
        totals: list[Tensor] = []
        for time, states in enumerate(self._settle(inputs, self._above(labels, inputs.dtype)), 1):
            if time >= self.recurrence.read[0]:
                now = [self.goodness_of(state) for state in states]
                totals = now if not totals else [old + new for old, new in zip(totals, now, strict=True)]
        yield from totals

    @property
    def depth(self) -> int:
        """All blocks: none is without those above it."""
        return len(self.blocks)

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """What every block hands on at the last time step that is read, with no label preferred above."""
        equal = torch.ones(len(inputs), self.outputs, dtype=inputs.dtype, device=inputs.device)
        neutral = self.label_strength * self.scaled(equal)
        states: list[Tensor] = []
        for states in self._settle(inputs, neutral):  # noqa: B007
            pass
        yield from (self.scaled(state.detach()) for state in states)
