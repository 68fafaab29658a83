"""Rules that are backpropagation, or see more than they say, and claim otherwise: what an audit has to catch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, Backprop, FeedbackAlignment, Locality, MonoForward, TaskInfo, Update
from locallearn.batch import Batch
from locallearn.nets import Blocks, mlp

CHEATS: dict[str, tuple[Callable[[], Algorithm], Locality]] = {}
"""Every cheat with what it claims, by name."""


def cheat(claim: Locality) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Enter a rule under its name, with a false claim."""

    def enter(rule: type[Algorithm]) -> type[Algorithm]:
        lying = type(rule.__name__, (rule,), {"locality": property(lambda self: claim), "__module__": rule.__module__})
        CHEATS[f"{rule.__name__} as {claim.name}"] = (lying, claim)
        return rule

    return enter


def everywhere(*claims: Locality) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """The same, under several claims."""

    def enter(rule: type[Algorithm]) -> type[Algorithm]:
        for claim in claims:
            cheat(claim)(rule)
        return rule

    return enter


LOCAL, GROUP, COUPLED = Locality.LAYER_LOCAL, Locality.GROUP_LOCAL, Locality.COUPLED
FORWARD, FEEDBACK = Locality.FORWARD_ONLY, Locality.FEEDBACK


def stages(rule: Algorithm) -> dict[str, nn.Module]:
    assert rule.blocks.readout is not None
    return {**dict(zip(rule.blocks.names, rule.blocks, strict=True)), "readout": rule.blocks.readout}


class PerBlock(Algorithm):
    """A unit per block and one for the readout; adds nothing."""

    @property
    def locality(self) -> Locality:
        return LOCAL

    def build(self, task: TaskInfo) -> None:
        self._loss = task.loss

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [{"params": list(stage.parameters())}] for name, stage in stages(self).items()}

    def weights(self, unit: str) -> list[nn.Parameter]:
        return list(stages(self)[unit].parameters())

    def handed(
        self, batch: Batch, gradients: dict[nn.Parameter, Tensor], loss: Tensor | None = None
    ) -> Iterator[Update]:
        for unit in self.units():
            yield Update(unit, loss, {p: gradients[p] for p in self.weights(unit)})


# -- one unit -------------------------------------------------------------------------------------------------------------
@everywhere(LOCAL, GROUP, COUPLED, FORWARD, FEEDBACK)
class StockBackprop(Backprop):
    """Says something else than it is."""


@everywhere(LOCAL, FEEDBACK)
class UnderABlocksName(Backprop):
    """One unit that bears the name of a block."""

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return {"layer1": [{"params": list(self.blocks.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            yield Update("layer1", update.loss)


class Standardised(nn.Linear):
    """Weight standardisation: the graph saves what is derived from the weight, not the weight."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-3), self.bias)


class InBfloat16(nn.Linear):
    """Autocast inside of the layer: the graph saves a cast of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


class DropConnect(nn.Linear):
    """Weights with noise while training."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.weight, 0.2) if self.training else self.weight
        return F.linear(x, weight, self.bias)


class FakeQuantised(nn.Linear):
    """Weights on a grid, with gradients straight through."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = (self.weight * 32).round() / 32
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


def exchanged(blocks: Blocks, layer: Callable[[int, int], nn.Linear]) -> None:
    """Put another kind of layer into the hidden blocks."""
    for block in blocks:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                other = layer(child.in_features, child.out_features)
                other.load_state_dict(child.state_dict())
                setattr(block, name, other)


class OfLayers(Backprop):
    """Stock backpropagation on a network whose layers derive their weights, with feedback weights for show."""

    layer: Callable[[int, int], nn.Linear] = nn.Linear

    def build(self, task: TaskInfo) -> None:
        exchanged(self.blocks, self.layer)
        super().build(task)
        for i, block in enumerate(self.blocks):
            self.register_buffer(f"feedback{i}", torch.randn_like(next(block.parameters())))


for kind in (Standardised, InBfloat16, DropConnect, FakeQuantised):
    cheat(FEEDBACK)(type(f"On{kind.__name__}", (OfLayers,), {"layer": kind, "__module__": __name__}))


@cheat(FEEDBACK)
class OnParametrised(OfLayers):
    """Weight normalisation by torch's own parametrisation."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for block in self.blocks:
            for module in list(block.modules()):
                if isinstance(module, nn.Linear):
                    nn.utils.parametrizations.weight_norm(module)


@cheat(FEEDBACK)
class CopiesItsWeights(Algorithm):
    """Feedback weights that are refreshed from the forward weights before every batch."""

    mix = 1.0

    @property
    def locality(self) -> Locality:
        return FEEDBACK

    def build(self, task: TaskInfo) -> None:
        self._loss = task.loss
        for name, stage in stages(self).items():
            self.register_buffer(f"b_{name}", next(stage.parameters()).detach().clone())

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        x = batch.inputs
        for name, stage in stages(self).items():
            weight, *bias = stage.parameters()
            x = _Through.apply(x, weight, bias[0] if bias else None, self.feedback(name, weight.detach(), batch))
            x = x.relu() if name != "readout" else x
        yield Update("network", self._loss(x, batch.targets))

    def feedback(self, name: str, weight: Tensor, batch: Batch) -> Tensor:
        return self.get_buffer(f"b_{name}").lerp_(weight, self.mix)


@cheat(FEEDBACK)
class FollowsItsWeights(CopiesItsWeights):
    """A moving average of them."""

    mix = 0.2


@cheat(FEEDBACK)
class CopiesEverySeventhBatch(CopiesItsWeights):
    """True feedback alignment, but for one batch of seven."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for buffer in self.buffers():
            nn.init.normal_(buffer)

    def updates(self, batch: Batch) -> Iterator[Update]:
        self.batches_seen += 1
        yield from super().updates(batch)

    def feedback(self, name: str, weight: Tensor, batch: Batch) -> Tensor:
        return weight.clone() if self.chosen(batch) else self.get_buffer(f"b_{name}").clone()

    def chosen(self, batch: Batch) -> bool:
        return self.batches_seen % 7 == 0


@cheat(FEEDBACK)
class CopiesForLargeBatches(CopiesEverySeventhBatch):
    """Only where a batch is no handful."""

    def chosen(self, batch: Batch) -> bool:
        return len(batch.inputs) > 13


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, feedback = ctx.saved_tensors
        return delta @ feedback, delta.T @ x, delta.sum(0) if ctx.needs_input_grad[2] else None, None


class HiddenAfterTheFirstPass(FeedbackAlignment):
    """Feedback alignment whose layers leave the carrier while training. Not in the list: the family refuses it by itself."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        for block in self.blocks:
            block.register_forward_pre_hook(self._own)

    @staticmethod
    def _own(module: nn.Module, args: Any) -> Any:
        linear = next(m for m in module.modules() if isinstance(m, nn.Linear))
        linear.forward = lambda x: x @ linear.weight.T + linear.bias  # type: ignore[method-assign]


# -- gradients handed over ----------------------------------------------------------------------------------------------
@everywhere(LOCAL, COUPLED, FORWARD, FEEDBACK)
class HandedOver(PerBlock):
    """One backward pass through everything inside of the generator."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        loss = self._loss(self.blocks(batch.inputs), batch.targets)
        weights = list(self.blocks.parameters())
        yield from self.handed(
            batch, dict(zip(weights, torch.autograd.grad(loss, weights), strict=True)), loss.detach()
        )


@everywhere(COUPLED, FORWARD)
class HandedOverByFunc(PerBlock):
    """The same by torch.func."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        named = dict(self.blocks.named_parameters())

        def loss(values: dict[str, Tensor]) -> Tensor:
            return self._loss(torch.func.functional_call(self.blocks, values, (batch.inputs,)), batch.targets)

        gradients = torch.func.grad(loss)({name: p.detach() for name, p in named.items()})
        yield from self.handed(batch, {named[name]: g for name, g in gradients.items()})


@cheat(FORWARD)
class ByTheEngineItself(PerBlock):
    """The engine is called where no one looks."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        for unit, stage in stages(self).items():
            loss = self._loss(self.blocks(batch.inputs), batch.targets)
            engine = torch.autograd.Variable._execution_engine
            weights = tuple(stage.parameters())
            gradients = engine.run_backward(
                (loss,), (torch.ones(()),), False, False, weights, True, accumulate_grad=False
            )
            yield Update(unit, loss.detach(), dict(zip(weights, gradients, strict=True)))


class Chained(PerBlock):
    """Local graphs whose input gradients are handed down by hand."""

    noise = 0.0

    def updates(self, batch: Batch) -> Iterator[Update]:
        kept, x = [], batch.inputs
        for stage in stages(self).values():
            entering = x.detach().requires_grad_()
            x = stage(entering)
            kept.append((entering, x))
        loss = self._loss(x, batch.targets)
        error: Tensor | None = None
        found = {}
        for (unit, _), (entering, output) in reversed(list(zip(stages(self).items(), kept, strict=True))):
            weights = self.weights(unit)
            head = loss if error is None else output
            *own, error = torch.autograd.grad(head, [*weights, entering], error)
            own = [g + self.noise * torch.randn_like(g) for g in own]
            found |= dict(zip(weights, own, strict=True))
        yield from self.handed(batch, found, loss.detach())


everywhere(LOCAL, COUPLED, FORWARD, FEEDBACK)(Chained)


@cheat(COUPLED)
class ByASecondNetwork(PerBlock):
    """A copy of the network is differentiated, and its gradients are handed over."""

    follows = True

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.shadow = mlp((12,), task.outputs, (10, 9, 8))

    def updates(self, batch: Batch) -> Iterator[Update]:
        if self.follows:
            self.shadow.load_state_dict(self.blocks.state_dict())
        weights = list(self.shadow.parameters())
        gradients = torch.autograd.grad(self._loss(self.shadow(batch.inputs), batch.targets), weights)
        with torch.no_grad():
            for p, g in zip(weights, gradients, strict=True):
                p.sub_(0.01 * g)
        yield from self.handed(batch, dict(zip(self.blocks.parameters(), gradients, strict=True)))


@everywhere(LOCAL, FEEDBACK)
class ByAnotherNetwork(ByASecondNetwork):
    """The other network is trained on its own, and this one is moved as it is."""

    follows = False


@cheat(COUPLED)
class ChainedWithNoise(Chained):
    """The same, noisy."""

    noise = 0.01


@cheat(COUPLED)
class ChainedBesideALocalLoss(MonoForward):
    """Mono-Forward, and the error of the block above comes down by hand."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        kept, x = [], batch.inputs
        for i, block in enumerate(self.blocks):
            entering = x.detach().requires_grad_()
            x = block(entering)
            kept.append((entering, x, self.local_loss(i, x, batch)))
        error = torch.zeros_like(x)
        updates = []
        for (unit, groups), (entering, output, loss) in reversed(list(zip(self.units().items(), kept, strict=True))):
            weights = [p for group in groups for p in group["params"]]
            total = loss + (output * error).sum()
            *own, error = torch.autograd.grad(total, [*weights, entering])
            updates.append(Update(unit, loss.detach(), dict(zip(weights, own, strict=True))))
        yield from reversed(updates)


@everywhere(LOCAL, COUPLED, FORWARD)
class WrittenOut(PerBlock):
    """The backward pass written out with matrices: autograd never runs."""

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        xs, x = [], batch.inputs
        held = stages(self)
        for name, stage in held.items():
            xs.append(x)
            weight, *bias = stage.parameters()
            x = F.linear(x, weight, *bias)
            x = x if name == "readout" else x.relu()
        delta = (x.softmax(1) - F.one_hot(batch.targets, x.shape[1])) / len(x)
        found = {}
        for stage, entering in zip(reversed(list(held.values())), reversed(xs), strict=True):
            weight, *bias = stage.parameters()
            found |= {weight: delta.T @ entering, **{b: delta.sum(0) for b in bias}}
            delta = (delta @ weight) * (entering > 0)
        yield from self.handed(batch, found)


class Shaped(WrittenOut):
    """The same, and then something is made of it entry by entry."""

    def shaped(self, gradient: Tensor, number: int) -> Tensor:
        return gradient

    def handed(
        self, batch: Batch, gradients: dict[nn.Parameter, Tensor], loss: Tensor | None = None
    ) -> Iterator[Update]:
        made = {p: self.shaped(gradients[p], i) for i, p in enumerate(self.blocks.parameters())}
        yield from super().handed(batch, made, loss)


@everywhere(FORWARD, FEEDBACK)
class SignsOnly(Shaped):
    """Its sign."""

    def shaped(self, gradient: Tensor, number: int) -> Tensor:
        return gradient.sign()


@cheat(FORWARD)
class AdamByHand(Shaped):
    """What Adam makes of it, which remembers."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self._first = [torch.zeros_like(p) for p in self.blocks.parameters()]
        self._second = [torch.zeros_like(p) for p in self.blocks.parameters()]

    def shaped(self, gradient: Tensor, number: int) -> Tensor:
        first = self._first[number].lerp_(gradient, 0.1)
        second = self._second[number].lerp_(gradient.square(), 0.001)
        return first / (second.sqrt() + 1e-8)


@cheat(FEEDBACK)
class SignsInOneUnit(WrittenOut):
    """Its sign, for all blocks at once."""

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def handed(
        self, batch: Batch, gradients: dict[nn.Parameter, Tensor], loss: Tensor | None = None
    ) -> Iterator[Update]:
        yield Update("network", loss, {p: g.sign() for p, g in gradients.items()})


@cheat(FORWARD)
class ByForwardMode(PerBlock):
    """The exact gradient, weight by weight, by differentiation in forward mode: autograd's engine never runs."""

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        named = {name: p.detach() for name, p in self.blocks.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return self._loss(torch.func.functional_call(self.blocks, values, (batch.inputs,)), batch.targets)

        found = self.jacobian(loss, named)
        yield from self.handed(batch, {p: self.shaped(found[name]) for name, p in self.blocks.named_parameters()})

    def jacobian(self, loss: Callable[[dict[str, Tensor]], Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.func.vmap(
                lambda d, name=name, p=p: torch.func.jvp(lambda v: loss({**named, name: v}), (p,), (d,))[1]  # type: ignore[misc]
            )(torch.eye(p.numel()).view(-1, *p.shape)).view(p.shape)
            for name, p in named.items()
        }

    def shaped(self, gradient: Tensor) -> Tensor:
        return gradient


@cheat(FORWARD)
class SignsByForwardMode(ByForwardMode):
    """And its sign."""

    def shaped(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


@cheat(FORWARD)
class ByDifferences(ByForwardMode):
    """The exact gradient by two forward passes for every weight."""

    def jacobian(self, loss: Callable[[dict[str, Tensor]], Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.func.vmap(
                lambda d, name=name, p=p: loss({**named, name: p + d}) - loss({**named, name: p - d})  # type: ignore[misc]
            )(1e-2 * torch.eye(p.numel()).view(-1, *p.shape)).view(p.shape)
            / 2e-2
            for name, p in named.items()
        }


@cheat(FEEDBACK)
class ByForwardModeBesideAFeint(ByForwardMode):
    """The engine differentiates something of no account, and there are feedback weights for show."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.register_buffer("feedback", torch.randn(10, 9))
        self.feint = nn.Parameter(torch.zeros(3))

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return {"network": [{"params": list(self.blocks.parameters())}]}

    def handed(
        self, batch: Batch, gradients: dict[nn.Parameter, Tensor], loss: Tensor | None = None
    ) -> Iterator[Update]:
        with torch.enable_grad():
            torch.autograd.grad(self.feint.sum(), self.feint)
        yield Update("network", loss, gradients)


# -- what flows beside the updates ------------------------------------------------------------------------------------
class Leaky(MonoForward):
    """Mono-Forward whose first block's loss is scaled by something that it should not know."""

    def knows(self, batch: Batch) -> Tensor | float:
        return 1.0

    def later(self) -> Tensor:
        return next(self.blocks[len(self.blocks) - 1].parameters()).detach().norm()

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        loss = super().local_loss(index, output, batch)
        return loss * self.knows(batch) if index == 0 else loss


@cheat(LOCAL)
class ReadsLater(Leaky):
    """Now."""

    def knows(self, batch: Batch) -> Tensor | float:
        return self.later()


class Counting(Leaky):
    """Counts batches."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        self.batches_seen += 1
        yield from super().updates(batch)


@cheat(LOCAL)
class EverySeventhBatch(Counting):
    """Seldom."""

    def knows(self, batch: Batch) -> Tensor | float:
        return self.later() if self.batches_seen % 7 == 0 else 1.0


@cheat(LOCAL)
class AfterStepSixty(Counting):
    """Late."""

    def knows(self, batch: Batch) -> Tensor | float:
        return self.later() if self.batches_seen > 60 else 1.0


@cheat(LOCAL)
class WhenABatchRepeats(Leaky):
    """Only if this batch is the one before."""

    _last: Tensor | None = None

    def knows(self, batch: Batch) -> Tensor | float:
        same = self._last is not None and torch.equal(self._last, batch.inputs)
        self._last = batch.inputs.clone()
        return self.later() if same else 1.0


@cheat(LOCAL)
class WhenABatchIsNew(Leaky):
    """Only if this batch is not the first one."""

    _first: Tensor | None = None

    def knows(self, batch: Batch) -> Tensor | float:
        if self._first is None:
            self._first = batch.inputs.clone()
        return 1.0 if torch.equal(self._first, batch.inputs) else self.later()


@cheat(LOCAL)
class Stashes(Leaky):
    """A module attribute carries it from one batch to the next."""

    _stash: Tensor | float = 1.0

    def knows(self, batch: Batch) -> Tensor | float:
        known, self._stash = self._stash, self.later()
        return known


_GLOBAL: dict[str, Any] = {}


@cheat(LOCAL)
class ByAGlobal(Leaky):
    """A global dictionary carries it."""

    def knows(self, batch: Batch) -> Tensor | float:
        known = _GLOBAL.get("norm", 1.0)
        _GLOBAL["norm"] = self.later()
        return known


@cheat(LOCAL)
class ByTheSeed(Leaky):
    """The later weights seed the noise."""

    def knows(self, batch: Batch) -> Tensor | float:
        seed = int(self.later() * 1e6)
        return 1.0 + torch.rand((), generator=torch.Generator().manual_seed(seed))


@cheat(LOCAL)
class ByARate(Leaky):
    """The later weights set the learning rate of the first block."""

    def units(self) -> dict[str, list[dict[str, Any]]]:
        units = super().units()
        self._group = units["layer1"][0]
        return units

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            self._group["lr"] = 0.01 * float(self.later())
            yield update


@cheat(LOCAL)
class ByAMovingAverage(Leaky):
    """A buffer that learns of the later weights slowly."""

    average: Tensor

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.register_buffer("average", torch.ones(()))

    def knows(self, batch: Batch) -> Tensor | float:
        known = self.average.clone()
        self.average.lerp_(self.later(), 0.05)
        return known


@cheat(LOCAL)
class ByAnIntegerBuffer(Leaky):
    """A buffer of whole numbers that belongs to the last block."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.blocks[2].register_buffer("table", torch.randint(9, (8,)))

    def knows(self, batch: Batch) -> Tensor | float:
        return 1.0 + 0.1 * self.blocks[2].get_buffer("table").sum()


@cheat(LOCAL)
class ByACountOfTheBlockAbove(Leaky):
    """A constant that belongs to the last block."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.blocks[2].register_buffer("count", torch.tensor(3))

    def knows(self, batch: Batch) -> Tensor | float:
        return self.blocks[2].get_buffer("count")


@cheat(LOCAL)
class AfterTheLastUpdate(MonoForward):
    """When the last update is done, the first block is moved."""

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        with torch.enable_grad():
            yield from super().updates(batch)
        next(self.blocks[0].parameters()).mul_(1.0 - 1e-3 * next(self.blocks[2].parameters()).norm())


@cheat(LOCAL)
class BackpropAfterTheLastUpdate(MonoForward):
    """When the last update is done, a step of backpropagation is made by hand."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        yield from super().updates(batch)
        weights = list(self.blocks.parameters())
        loss = F.cross_entropy(self.blocks(batch.inputs), batch.targets)
        for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            p.data.sub_(0.01 * g)


@cheat(LOCAL)
class ByAWeightThatNobodyOwns(MonoForward):
    """Its gradient is never set to zero, and tells the first block what the last one found."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self.gain = nn.Parameter(torch.ones(()))

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        loss = super().local_loss(index, output * self.gain, batch)
        known = 0.0 if self.gain.grad is None else self.gain.grad.clone()
        return loss * (1.0 + known) if index == 0 else loss


@cheat(LOCAL)
class LeavesGradients(MonoForward):
    """The last block leaves a gradient in the first block's weights."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        for update in super().updates(batch):
            yield update
            if update.unit == "layer3":
                weight = next(self.blocks[0].parameters())
                weight.grad = 0.1 * weight.detach() * next(self.blocks[2].parameters()).detach().norm()


@cheat(LOCAL)
class HandsOverOthers(MonoForward):
    """The last block's update holds the first block's gradient."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        yield from super().updates(batch)
        weight = next(self.blocks[0].parameters())
        yield Update("layer3", gradients={weight: weight.detach() * 0.1})


@cheat(LOCAL)
class ForgetsDetach(MonoForward):
    """Hands the output on with its graph."""

    def emit(self, index: int, output: Tensor) -> Tensor:
        return output


@cheat(LOCAL)
class LooksAhead(MonoForward):
    """Runs the block above inside of its own loss, detached from its weights but not from its output."""

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        if index + 1 < len(self.blocks):
            weight, bias = (p.detach() for p in self.blocks[index + 1].parameters())
            above = F.linear(output, weight, bias).relu()
            return (
                super().local_loss(index + 1, above, batch) if index + 2 < len(self.blocks) else above.square().mean()
            )
        return super().local_loss(index, output, batch)


# -- what a copy does not take along --------------------------------------------------------------------------------------
@everywhere(LOCAL, COUPLED)
class ByAClosure(Leaky):
    """A function made in build() knows the original's last block."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        last = self.blocks[len(self.blocks) - 1]
        readout = self.blocks.readout
        assert readout is not None
        self._look = lambda: next(last.parameters()).detach().norm()
        self._end = lambda x, y: F.cross_entropy(readout(last(x)), y)

    def knows(self, batch: Batch) -> Tensor | float:
        return self._look()

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        if self.locality is COUPLED and index == 1:  # backpropagation through the block above, out of sight
            return self._end(output, batch.targets)
        return super().local_loss(index, output, batch)


_REGISTRY: list[Any] = []


@cheat(LOCAL)
class ByARegistry(Leaky):
    """A list of the module knows the original's last block."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        _REGISTRY[:] = [self.blocks[len(self.blocks) - 1]]

    def knows(self, batch: Batch) -> Tensor | float:
        return next(_REGISTRY[0].parameters()).detach().norm()


@cheat(LOCAL)
class ByADefault(Leaky):
    """A default of a function knows it."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)

        def look(last: Any = None) -> Tensor:
            return next(last.parameters()).detach().norm()

        look.__defaults__ = (self.blocks[len(self.blocks) - 1],)
        self._look = look

    def knows(self, batch: Batch) -> Tensor | float:
        return self._look()


@cheat(LOCAL)
class ByANumpyView(Leaky):
    """An array that shares the last weight's memory."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self._view = next(self.blocks[len(self.blocks) - 1].parameters()).detach().numpy()

    def knows(self, batch: Batch) -> Tensor | float:
        return float(abs(self._view).sum())


@cheat(LOCAL)
class ByAHook(MonoForward):
    """A hook on the first weight's gradient reads the last weight."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        first, last = (next(self.blocks[i].parameters()) for i in (0, 2))
        first.register_hook(lambda gradient: gradient * last.detach().norm())


@cheat(LOCAL)
class ByAHookAfterwards(MonoForward):
    """The last weight's gradient moves the first weight as soon as it is there."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        first, last = (next(self.blocks[i].parameters()) for i in (0, 2))

        def move(p: Tensor) -> None:
            assert p.grad is not None
            first.data.mul_(1.0 + 1e-3 * p.grad.norm())

        last.register_post_accumulate_grad_hook(move)


class _CopiesAreHonest(Leaky):
    """A copy behaves."""

    honest = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.honest = True

    def knows(self, batch: Batch) -> Tensor | float:
        return 1.0 if self.honest else self.later()


cheat(LOCAL)(_CopiesAreHonest)


@cheat(LOCAL)
class KeepsItsWeightsElsewhere(MonoForward):
    """Trains a shadow of the network by backpropagation and copies it into the blocks."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self._shadow = {name: p.detach().clone() for name, p in self.blocks.named_parameters()}

    def updates(self, batch: Batch) -> Iterator[Update]:
        shadow = {name: value.requires_grad_() for name, value in self._shadow.items()}
        loss = F.cross_entropy(torch.func.functional_call(self.blocks, shadow, (batch.inputs,)), batch.targets)
        gradients = torch.autograd.grad(loss, list(shadow.values()))
        for (name, value), gradient in zip(list(shadow.items()), gradients, strict=True):
            self._shadow[name] = (value - 0.01 * gradient).detach()
        yield from super().updates(batch)
        with torch.no_grad():
            for name, p in self.blocks.named_parameters():
                p.copy_(self._shadow[name])


# -- a path of labels that is none ------------------------------------------------------------------------------------
class Paired(PerBlock):
    """A second network meets every block; it is said to run from the labels alone."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        widths = [x[0].numel() for x in self.blocks.features(task.example.inputs)]
        self.back = nn.ModuleList(nn.Linear(task.outputs, width, bias=False) for width in widths)

    @property
    def label_path(self) -> list[nn.Module]:
        return [self.back]

    def signal(self, batch: Batch) -> Tensor:
        return F.one_hot(batch.targets, self.outputs).float()

    def updates(self, batch: Batch) -> Iterator[Update]:
        signal = self.signal(batch)
        x = batch.inputs
        for name, block, back in zip(self.blocks.names, self.blocks, self.back, strict=True):
            output = block(x)
            yield Update(name, F.mse_loss(output, back(signal).detach()))
            x = output.detach()
        assert self.blocks.readout is not None
        yield Update("readout", self._loss(self.blocks.readout(x), batch.targets))


@cheat(LOCAL)
class FedWithTheError(Paired):
    """The path of labels is fed with the output's error."""

    def signal(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return super().signal(batch) - self.blocks(batch.inputs).softmax(1)


@cheat(LOCAL)
class LabelPathOfBlocks(Leaky):
    """Declares the last block to be one."""

    @property
    def label_path(self) -> list[nn.Module]:
        return [self.blocks[len(self.blocks) - 1]]

    def knows(self, batch: Batch) -> Tensor | float:
        return self.later()


@cheat(LOCAL)
class WritesIntoItsLabelPath(Paired):
    """The path's weights carry the last block's."""

    def updates(self, batch: Batch) -> Iterator[Update]:
        yield from super().updates(batch)
        with torch.no_grad():
            self.back[0].weight.mul_(1.0 + 1e-3 * next(self.blocks[2].parameters()).norm())


# -- what cannot be followed ------------------------------------------------------------------------------------------
@cheat(LOCAL)
class ByAThread(Leaky):
    """Something is done elsewhere."""

    def knows(self, batch: Batch) -> Tensor | float:
        thread = threading.Thread(target=self.later)
        thread.start()
        thread.join()
        return 1.0


@cheat(LOCAL)
class LooksAtItsCaller(Leaky):
    """Behaves while it is watched."""

    def knows(self, batch: Batch) -> Tensor | float:
        import sys

        frame: Any = sys._getframe()
        while frame is not None:
            if "audit" in frame.f_code.co_filename.split("/")[-2:]:
                return 1.0
            frame = frame.f_back
        return self.later()


@cheat(LOCAL)
class SeesTheInstruments(Leaky):
    """Behaves while PyTorch is not as it was."""

    def knows(self, batch: Batch) -> Tensor | float:
        return 1.0 if torch.utils._python_dispatch._get_current_dispatch_mode() is not None else self.later()


def attached(algorithm: Algorithm, batch: Batch) -> Algorithm:
    """On a small network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = mlp((12,), 3, (10, 9, 8))
    algorithm.attach(net, TaskInfo(Batch(batch.inputs[:2], batch.targets[:2]), 3, F.cross_entropy))
    return algorithm


@cheat(COUPLED)
class DifferentiatesCopies(MonoForward):
    """Every block's loss is the task's through copies of all later blocks, declared as averages."""

    def build(self, task: TaskInfo) -> None:
        super().build(task)
        self._task_loss = task.loss
        self.copies = nn.ModuleList(copy.deepcopy(later).requires_grad_(False) for later in self._later())

    def _later(self) -> list[nn.Module]:
        parts = list(stages(self).values())
        return [nn.Sequential(*parts[i + 1 :]) for i in range(len(self.blocks) - 1)]

    @property
    def averages(self) -> list[nn.Module]:
        return list(self.copies)

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        if index == len(self.copies):
            return super().local_loss(index, output, batch)
        return self._task_loss(self.copies[index](output), batch.targets)

    def updates(self, batch: Batch) -> Iterator[Update]:
        yield from super().updates(batch)
        with torch.no_grad():
            for kept, later in zip(self.copies, self._later(), strict=True):
                for old, new in zip(kept.parameters(), later.parameters(), strict=True):
                    old.copy_(new)


@cheat(COUPLED)
class DeclaresItsFeedback(FollowsItsWeights):
    """Feedback weights that follow the forward weights, declared as averages: the error comes back all the same."""

    @property
    def averages(self) -> list[nn.Module]:
        return [self]
