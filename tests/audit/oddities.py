"""Rules and networks that look odd and are what they say: what an audit has to confirm."""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, FeedbackAlignment, Locality, MonoForward, TaskInfo, Update
from locallearn.batch import Batch
from locallearn.nets import Blocks
from tests.audit.cheats import Paired, PerBlock, Standardised, exchanged, stages

ODDITIES: dict[str, tuple[Callable[[], Algorithm], Locality]] = {}
"""Every oddity with what it is, by name."""


def odd(claim: Locality) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Enter a rule under its name, with a true claim."""

    def enter(rule: type[Algorithm]) -> type[Algorithm]:
        said = type(rule.__name__, (rule,), {"locality": property(lambda self: claim), "__module__": rule.__module__})
        ODDITIES[rule.__name__] = (said, claim)
        return rule

    return enter


class _Noise(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + 0.1 * self.draw())


class Noisy(MonoForward):
    """A network with noise of some kind."""

    def noise(self) -> nn.Module:
        return nn.Dropout(0.2)

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for block in self.blocks:
            assert isinstance(block, nn.Sequential)
            block.append(self.noise())


odd(Locality.LAYER_LOCAL)(Noisy)

_OWN = np.random.default_rng(0)


@odd(Locality.LAYER_LOCAL)
class NumpyNoise(Noisy):
    """NumPy's global numbers."""

    def noise(self) -> nn.Module:
        return _Noise(lambda: float(np.random.randn()))


@odd(Locality.LAYER_LOCAL)
class PythonNoise(Noisy):
    """Python's."""

    def noise(self) -> nn.Module:
        return _Noise(random.random)


@odd(Locality.LAYER_LOCAL)
class AModulesGenerator(Noisy):
    """A generator that belongs to the module of code."""

    def noise(self) -> nn.Module:
        return _Noise(lambda: float(_OWN.standard_normal()))


@odd(Locality.LAYER_LOCAL)
class AGeneratorOfItsOwn(Noisy):
    """A torch.Generator in an attribute."""

    def noise(self) -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        return _Noise(lambda: float(torch.rand((), generator=generator)))


@odd(Locality.GROUP_LOCAL)
class TwoBlocksPerUnit(Algorithm):
    """A unit holds two blocks with one loss of its own."""

    @property
    def locality(self) -> Locality:
        return Locality.GROUP_LOCAL

    def build(self, task: TaskInfo) -> None:
        self._loss = task.loss
        self.head = nn.Linear(9, task.outputs)

    def units(self) -> dict[str, list[dict[str, Any]]]:
        first = [*self.blocks[0].parameters(), *self.blocks[1].parameters(), *self.head.parameters()]
        assert self.blocks.readout is not None
        return {
            "lower": [{"params": first}],
            "upper": [{"params": [*self.blocks[2].parameters(), *self.blocks.readout.parameters()]}],
        }

    def updates(self, batch: Batch) -> Iterator[Update]:
        output = self.blocks[1](self.blocks[0](batch.inputs))
        yield Update("lower", self._loss(self.head(output), batch.targets))
        assert self.blocks.readout is not None
        yield Update("upper", self._loss(self.blocks.readout(self.blocks[2](output.detach())), batch.targets))


@odd(Locality.LAYER_LOCAL)
class ByAClosureOfItsOwnBlock(MonoForward):
    """Functions made in build(), each of which knows its own block only."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self._run = [lambda x, block=block: block(x) for block in self.blocks]

    def run(self, index: int, inputs: Tensor, batch: Batch) -> Tensor:
        return self._run[index](inputs)


@odd(Locality.LAYER_LOCAL)
class ByPartialAndWeakReference(MonoForward):
    """Partial functions, bound methods and weak references to its own block."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self._run = functools.partial(self._through, [weakref.ref(block) for block in self.blocks])

    @staticmethod
    def _through(held: list[Any], index: int, x: Tensor) -> Tensor:
        return held[index]()(x)

    def run(self, index: int, inputs: Tensor, batch: Batch) -> Tensor:
        return self._run(index, inputs)


@odd(Locality.LAYER_LOCAL)
class HooksOnItsOwnGradients(MonoForward):
    """A hook that clips the gradient of the very weight that it hangs on."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for p in self.blocks.parameters():
            p.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))


@odd(Locality.LAYER_LOCAL)
class DifferentiatesByItself(MonoForward):
    """Gradients handed over that torch.autograd.grad has found inside of the block."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            assert update.loss is not None
            weights = [p for group in self.units()[update.unit] for p in group["params"]]
            gradients = torch.autograd.grad(update.loss, weights)
            yield Update(update.unit, update.loss.detach(), dict(zip(weights, gradients, strict=True)))


@odd(Locality.LAYER_LOCAL)
class WithBatchNorm(MonoForward):
    """Running statistics, which move with every forward pass."""

    def build(self, task: TaskInfo) -> None:
        for block in self.blocks:
            assert isinstance(block, nn.Sequential)
            block.append(nn.BatchNorm1d(block[0].out_features))
        super().build(task)


class _Sorted(nn.Module):
    """Entries in an order that a buffer of whole numbers holds, and a count."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(width))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("last", torch.tensor([width - 1]))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("count").add_(1)
        return x[:, self.get_buffer("order")] + x[:, self.get_buffer("last")]


@odd(Locality.LAYER_LOCAL)
class WithIndices(MonoForward):
    """Buffers of whole numbers: an order, a count, and the last index there is, which no other number may replace."""

    def build(self, task: TaskInfo) -> None:
        for block in self.blocks:
            assert isinstance(block, nn.Sequential)
            block.append(_Sorted(block[0].out_features))
        super().build(task)


@odd(Locality.LAYER_LOCAL)
class RememberingInputs(MonoForward):
    """Mixes the batch with the one before."""

    _last: Tensor | None = None

    def prepare(self, batch: Batch) -> Batch:
        mixed = batch.inputs if self._last is None else 0.8 * batch.inputs + 0.2 * self._last
        self._last = batch.inputs.clone()
        return batch._replace(inputs=mixed)


@odd(Locality.LAYER_LOCAL)
class ChangesItsInputs(MonoForward):
    """The first layer works in place."""

    def attach(self, blocks: Blocks, task: TaskInfo) -> None:
        blocks[0].register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))
        super().attach(blocks, task)


@odd(Locality.LAYER_LOCAL)
class WithALabelPath(Paired):
    """A second network runs from the labels alone."""


@odd(Locality.LAYER_LOCAL)
class FrozenInTheMiddle(MonoForward):
    """A block that does not learn."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.blocks[1].requires_grad_(False)


@odd(Locality.LAYER_LOCAL)
class UnitsBackwards(MonoForward):
    """Names its units from the top down, and trains them from the bottom up."""

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return dict(reversed(super().units().items()))


@odd(Locality.COUPLED)
class ScaledByTheBlockAbove(MonoForward):
    """Reads a norm of the block above, and says so."""

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        loss = super().local_loss(index, output, batch)
        if index + 1 < len(self.blocks):
            loss = loss * next(self.blocks[index + 1].parameters()).detach().norm()
        return loss


@odd(Locality.COUPLED)
class DirectFeedbackPerBlock(PerBlock):
    """The output's error goes to every block through a fixed matrix; each block is a unit."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        widths = [x[0].numel() for x in self.blocks.features(task.example.inputs)]
        for i, width in enumerate(widths):
            self.register_buffer(f"feedback{i}", torch.randn(task.outputs, width))

    def updates(self, batch: Batch) -> Iterator[Update]:
        with torch.no_grad():
            error = (self.blocks(batch.inputs).softmax(1) - F.one_hot(batch.targets, self.outputs)) / len(batch.inputs)
        x = batch.inputs
        for i, (name, stage) in enumerate(stages(self).items()):
            output = stage(x)
            signal = error if name == "readout" else error @ self.get_buffer(f"feedback{i}")
            yield Update(name, (output * signal).sum())
            x = output.detach()


@odd(Locality.FEEDBACK)
class FeedbackFromTheFirstWeights(FeedbackAlignment):
    """Feedback weights that begin as a copy of the forward weights, and stay."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for name in self.layers:
            self.weights(name).fixed.copy_(self._weight(name).detach())


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 2, 5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(1, (2, 5)) * self.scale).flatten(1)


@odd(Locality.FEEDBACK)
class FeedbackBetweenPositions(FeedbackAlignment):
    """Scales of positions, which the error passes entry by entry."""

    def build(self, task: TaskInfo) -> None:
        assert isinstance(self.blocks[0], nn.Sequential)
        self.blocks[0].append(_Positions())
        super().build(task)


@odd(Locality.FORWARD_ONLY)
class FeedbackByHandFromTheFirstWeights(PerBlock):
    """An error goes back by hand through what the weights were at first: at first an exact gradient."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for name, stage in stages(self).items():
            self.register_buffer(f"b_{name}", next(stage.parameters()).detach().clone())

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        held, xs, x = stages(self), [], batch.inputs
        for stage in held.values():
            xs.append(x)
            x = stage(x)
        delta = (x.softmax(1) - F.one_hot(batch.targets, x.shape[1])) / len(x)
        found: dict[nn.Parameter, Tensor] = {}
        for (name, stage), entering in zip(reversed(held.items()), reversed(xs), strict=True):
            weight, *bias = stage.parameters()
            found |= {weight: delta.T @ entering, **{b: delta.sum(0) for b in bias}}
            delta = (delta @ self.get_buffer(f"b_{name}")) * (entering > 0)
        yield from self.handed(batch, found)


@odd(Locality.FORWARD_ONLY)
class Guesses(PerBlock):
    """Moves a block a little at random and steps along by the difference of the loss."""

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        for name, stage in stages(self).items():
            weights = list(stage.parameters())
            draws = [torch.randn(p.shape, generator=self.rng("cpu")) for p in weights]
            losses = []
            for step in (1e-3, -2e-3, 1e-3):
                for p, draw in zip(weights, draws, strict=True):
                    p.add_(draw, alpha=step)
                losses.append(self._loss(self.blocks(batch.inputs), batch.targets))
            slope = (losses[0] - losses[1]) / 2e-3
            yield Update(name, losses[2], {p: slope * draw for p, draw in zip(weights, draws, strict=True)})


class OnStandardised(FeedbackAlignment):
    """Not in the list: the family refuses such a network by itself."""

    def build(self, task: TaskInfo) -> None:
        exchanged(self.blocks, Standardised)
        super().build(task)
