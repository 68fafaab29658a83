"""Losses of every block's own, and under perturbed activities of every patch and group of channels in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import ParamGroup, TaskInfo, Update, output_layer, refuse_dense, selected
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.forward_gradient._activities import Activities, add
from locallearn.algorithms.forward_gradient._passes import Draws, run, settle
from locallearn.algorithms.forward_gradient._rule import ForwardGradient, plain_attention
from locallearn.algorithms.forward_gradient._weights import Weights
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import Combine, Noise
from locallearn.functional.local_losses import readout_gradients, replicated_slopes
from locallearn.nets.blocks import Blocks, fitted
from locallearn.nets.layout import channel_axis
from locallearn.nets.local_mixer import GroupedLinear, MixerBlock, normalised, normalised_along
from locallearn.nets.units import sample_shapes

_OUTPUT = "output of the block"  # no buffer has a name with spaces


class LocalForwardGradient(ForwardGradient):
    """Forward gradients of local losses (Ren et al. 2023, arXiv 2210.03310): LG-FG-A and LG-FG-W.

    Every block has a linear readout of its own, which reads the mean over patches of what the block puts out, and learns from
    its cross entropy alone: no derivative crosses a border. Under ``perturb="activities"`` that loss is there once for every
    patch and every group of channels, always of the same value, with all other patches and groups held still. A perturbed
    activity is weighed by the derivatives of those losses that it can reach, and so by no other slice's noise, although one
    pass perturbs all of them. Which these are is found by trial when the rule is attached: in a LocalMixer those of the own
    patch behind the mixing of patches, and of the own group behind that of channels; in another network whatever its layers
    allow. Under ``perturb="weights"`` all directions of a block are weighed by its pooled loss.

    The readouts of the blocks learn the exact gradient of their loss, which has a closed form, and so does the network's own
    output layer, from what the last block puts out. Tokens and the places of a map are patches; a vector is one patch.

    Deviations: the published code weighs directions of weights by one derivative per group, which is biased where a
    normalisation mixes groups, and adds biases twice. Neither is done here. LocalMixer's blocks are read through a
    normalisation within groups, as in the published configuration, and blocks of other networks as they are.

    Raises:
        ValueError: when attached, beside what the class above refuses: targets that are not class ids of samples, a loss other
            than the plain cross entropy, an output layer in which more learns than one last linear layer, groups that do not
            divide the channels.
    """

    @property
    def carries(self) -> bool:
        """Plain chains of blocks only: a border of several tensors has no patches."""
        return False

    @property
    def estimates_along(self) -> str | None:
        """Not of the task's loss."""
        return None

    @property
    def broadcast(self) -> str:
        """Labels; derivatives stay inside of a block."""
        return "labels"

    def _make(self, task: TaskInfo) -> None:
        owner = "forward_gradient with losses=local"
        if not task.classes:
            raise ValueError(
                f"{owner} compares every block with class labels, and this task has none: use losses=global"
            )
        refuse_dense(task, owner)
        count = min(task.outputs, 1000)
        # Of every class, because a loss may weigh them.
        targets = torch.arange(count, device=task.example.targets.device)
        scores = torch.linspace(-1, 2, count * task.outputs, device=targets.device).square().reshape(count, -1)
        if not torch.allclose(task.loss(scores, targets), F.cross_entropy(scores, targets)):
            raise ValueError(
                f"{owner} has the plain cross entropy in closed form, and this task's loss is another: use losses=global"
            )
        feature_sizes(self.blocks, task.example)  # refuses blocks whose rows are no samples
        mask = self.mask is not False
        self.heads = nn.ModuleList()
        self._parts: list[_Weights | _Slices] = []
        x = fitted(self.blocks, task.example.inputs)
        shapes, _ = sample_shapes(self.blocks, x, task.example.context)
        for name, block, shape in zip(self.blocks.names, self.blocks, shapes, strict=True):
            with torch.no_grad():
                x = block(x, *task.example.context)
            head = LocalReadout(name, block, shape, task.outputs, self.groups)
            self.heads.append(head)
            alone = Blocks({name: block})
            if self.perturb == "weights":
                self._parts.append(_Weights(alone, head, self.noise, self.tangents, self.combine, self.chunk))
            else:
                self._parts.append(_Slices(alone, head, self.noise, self.tangents, mask))
        with torch.no_grad():
            self._learned_from(x, task.example.context)

    def _try_out(self, example: Batch, generator: torch.Generator) -> None:
        self.heads.to(example.inputs.device, next(self.blocks.parameters()).dtype)
        for part in self._parts:
            example = example._replace(inputs=part.try_out(example, generator))

    def units(self) -> dict[str, list[ParamGroup]]:
        """One for every block with its readout, and the network's output layer."""
        units: dict[str, list[ParamGroup]] = {
            name: [{"params": [*block.parameters(), *head.parameters()]}]
            for name, block, head in zip(self.blocks.names, self.blocks, self.heads, strict=True)
        }
        return {**units, "readout": [{"params": list(output_layer(self.blocks, "ForwardGradient").parameters())}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Block after block: the mean loss, estimated gradients of its weights, and the exact one of its readout."""
        generator = self.rng(batch.inputs.device)
        for name, part in zip(self.blocks.names, self._parts, strict=True):
            with torch.no_grad(), plain_attention():
                step = part.learn(batch, generator)
            yield Update(name, step.loss, step.gradients)
            batch = batch._replace(inputs=step.output)
            del step  # until here, so that what is held is counted
        with torch.no_grad():
            read, scores, last = self._learned_from(batch.inputs, batch.context)
            (read, targets), (scores, _) = selected(batch, read), selected(batch, scores)
            gradients = _exact(last.weight, last.bias, read, scores, targets)
            loss = F.cross_entropy(scores, targets)
        yield Update("readout", loss, gradients)

    def _learned_from(self, x: Tensor, context: tuple[Any, ...]) -> tuple[Tensor, Tensor, nn.Linear]:
        """What the output layer's last linear map has read, what that has put out, and the map.

        Raises:
            ValueError: the scores are not what a linear map puts out, or other weights learn, too.
        """
        readout = output_layer(self.blocks, "ForwardGradient")
        calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            calls.append((layer, given[0], output))

        hooks = [m.register_forward_hook(note) for m in readout.modules() if isinstance(m, nn.Linear)]
        try:
            scores = readout(x, *context)
        finally:
            for hook in hooks:
                hook.remove()
        if not calls or calls[-1][2] is not scores or calls[-1][1].ndim != 2:
            raise ValueError(
                "losses=local trains the output layer in closed form, and this network's does not end in a linear layer that "
                "gives one row of scores per sample: use losses=global"
            )
        last, read, _ = calls[-1]
        own = {id(p) for p in last.parameters()}
        for name, p in readout.named_parameters():
            if p.requires_grad and id(p) not in own:
                raise ValueError(
                    f"losses=local trains the output layer in closed form, which knows its last linear layer alone, and "
                    f"'readout.{name}' learns, too: freeze it with requires_grad_(False), or use losses=global"
                )
        return read, scores, last


class LocalReadout(nn.Module):
    """Class scores from the mean over patches of what one block puts out.

    Args:
        name: of the block, for messages.
        block: a :class:`~locallearn.nets.local_mixer.MixerBlock` says its groups, and is read through their normalisation.
        shape: of one sample of the block's output.
        outputs: number of classes K.
        groups: of channels; ``None``: the block's, or 1.

    Attributes:
        weight: ``(K, C)``, from N(0, min(2/√C, .1)²).
        bias: ``(K,)``, zeros.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    def __init__(self, name: str, block: nn.Module, shape: Sequence[int], outputs: int, groups: int | None) -> None:
        super().__init__()
        self._axis = channel_axis(shape)
        mixer = isinstance(block, MixerBlock)
        self.groups: int = groups or (block.groups if isinstance(block, MixerBlock) else 1)
        channels = shape[self._axis - 1]
        if channels % self.groups:
            raise ValueError(
                f"groups is {self.groups}, which does not divide the {channels} channels of block {name!r}: choose a divisor"
            )
        if mixer and channels == self.groups:
            raise ValueError(
                f"groups is {self.groups}, as many as block {name!r} has channels, and a single one is nothing once it is "
                "normalised: choose a smaller number"
            )
        self.normalises = mixer
        self.weight = nn.Parameter(torch.empty(outputs, channels).normal_(std=min(2 * channels**-0.5, 0.1)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def patches(self, output: Tensor) -> Tensor:
        """What the block puts out as ``(N, P, C)``: a vector is one patch, a token or a place of a map is one each."""
        if output.ndim == 2:
            return output[:, None]
        return output if self._axis == 2 else output.flatten(2).mT

    def features(self, output: Tensor) -> Tensor:
        """What it reads: ``(N, P, C)`` in its own precision."""
        found = self.patches(output).to(self.weight.dtype)
        return normalised(found, self.groups) if self.normalises else found

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy, of which only ``output`` has a derivative."""
        with torch.autocast(output.device.type, enabled=False):
            pooled = self.features(output).mean(1)
            return F.cross_entropy(F.linear(pooled, self.weight.detach(), self.bias.detach()), targets)

    def slopes(self, output: Tensor, along: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every sample, ``(N,)``, and the derivative of every slice's, ``(N, P, G)``."""
        with torch.autocast(output.device.type, enabled=False):
            along = torch.zeros_like(output) if along is None else along
            moved = self.patches(along).to(self.weight.dtype)
            if self.normalises:
                moved = normalised_along(self.patches(output).to(self.weight.dtype), moved, self.groups)
            found = self.features(output)
            return replicated_slopes(found, moved, self.weight, self.bias, targets, self.groups)

    def gradients(self, output: Tensor, targets: Tensor) -> dict[nn.Parameter, Tensor]:
        """Exact ones of its own weights."""
        with torch.autocast(output.device.type, enabled=False):
            pooled = self.features(output).mean(1)
            return _exact(self.weight, self.bias, pooled, F.linear(pooled, self.weight, self.bias), targets)


def _exact(
    weight: Tensor, bias: Tensor | None, read: Tensor, scores: Tensor, targets: Tensor
) -> dict[nn.Parameter, Tensor]:
    with torch.autocast(read.device.type, enabled=False):
        found = readout_gradients(read.to(weight.dtype), scores.to(weight.dtype), targets)
    return {p: gradient for p, gradient in zip((weight, bias), found, strict=True) if isinstance(p, nn.Parameter)}


class _Step(NamedTuple):
    """What a block has made of a batch: its output, its mean loss, gradients, and what is held until they are used."""

    output: Tensor
    loss: Tensor
    gradients: dict[nn.Parameter, Tensor]
    kept: Any


class _Weights(Weights):
    """One derivative of a block's pooled loss per direction of all its weights."""

    def __init__(
        self, blocks: Blocks, head: LocalReadout, noise: Noise, count: int, combine: Combine, chunk: int | None
    ) -> None:
        super().__init__(blocks, head.loss, noise, count, combine, chunk)
        self.head = head

    def learn(self, batch: Batch, generator: torch.Generator) -> _Step:
        """Run the block once."""
        loss, gradients, kept, moved = self.estimated(batch, generator)
        settle(self.blocks, moved)
        output = moved[_OUTPUT]
        return _Step(output, loss, {**gradients, **self.head.gradients(*selected(batch, output))}, kept)

    def try_out(self, batch: Batch, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        """One step; what the next block reads."""
        return self.learn(batch, generator).output

    def _lost(self, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output, moved = run(self.blocks, weights, batch)
        return self.loss(*selected(batch, output)), {**moved, _OUTPUT: output}


class _Reach(NamedTuple):
    """Whether what a layer puts out for a patch, for a group of channels, reaches the losses of that one alone."""

    patch: bool
    group: bool


class _Slices(Activities):
    """One derivative of every slice's loss per direction, all layers of a block perturbed at once."""

    def __init__(self, blocks: Blocks, head: LocalReadout, noise: Noise, count: int, mask: bool) -> None:
        super().__init__(blocks, head.loss, noise, count, mask)
        self.head = head
        self._reach: dict[str, _Reach] = {}

    def learn(self, batch: Batch, generator: torch.Generator) -> _Step:
        """Run the block once per direction."""
        self.check(batch)
        made: dict[nn.Parameter, Tensor] = {}
        draws = Draws(batch.inputs.device)
        names = {id(layer): name for name, layer in self.layers().items()}
        for _ in range(self.count):
            draws.again()
            output, along, calls, moved = self._pass(batch, generator)
            self._look(calls, len(batch.inputs))
            losses, slopes = self.head.slopes(output, along, batch.targets)
            slopes = slopes / (len(losses) * self.count)
            for call in calls:
                reach = self._reach.get(names[id(call.layer)], _Reach(False, False))
                found = slopes if reach.patch else slopes.sum(1, keepdim=True)
                found = found if reach.group else found.sum(2, keepdim=True)
                add(made, call, _spread(found.to(call.direction.dtype), call.layer, call.direction.shape))
        settle(self.blocks, moved)  # what all passes made of the same state
        return _Step(output, losses.mean(), {**made, **self.head.gradients(output, batch.targets)}, calls)

    def step(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[nn.Parameter, Tensor], Any]:
        """The same, for the trials of the class above."""
        step = self.learn(batch, generator)
        return step.loss, step.gradients, step.kept

    def try_out(self, batch: Batch, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        """The trials of perturbed activities, and which slices each layer reaches; what the next block reads."""
        super().try_out(batch, generator)
        self._reach = self._found_reach(batch, generator)
        return self.learn(batch, generator).output

    def _found_reach(self, batch: Batch, generator: torch.Generator) -> dict[str, _Reach]:
        """Perturb some slices of one layer only, with other weights and inputs, and look where the output moves."""
        weights = self._drawn(generator)
        output, _, calls, _ = self._pass(batch, generator, weights=weights)
        names = {id(layer): name for name, layer in self.layers().items()}
        patches, groups = self.head.patches(output).shape[1], self.head.groups
        reach: dict[str, _Reach] = {}
        for i, call in enumerate(calls):
            channels, places = _layout(call.layer, call.direction.shape)
            found = _Reach(
                math.prod(places) == patches and self._apart(i, 1, patches, batch, generator, weights),
                channels % groups == 0 and self._apart(i, 2, groups, batch, generator, weights),
            )
            name = names[id(call.layer)]
            known = reach.get(name, found)  # a layer that is called twice
            reach[name] = _Reach(known.patch and found.patch, known.group and found.group)
        return reach

    def _apart(
        self, index: int, axis: int, count: int, batch: Batch, generator: torch.Generator, weights: dict[str, Tensor]
    ) -> bool:
        """Whether slices along an axis of ``(N, P, G, C/G)`` stay apart from the call ``index`` on."""
        if count == 1:
            return True
        # Every pair of slices is on different sides in some sample, in both orders: one sees the other, or the other way round.
        place = torch.arange(count, device=batch.inputs.device)
        bits = torch.stack([(place >> bit) % 2 == 1 for bit in range((count - 1).bit_length())])
        sides = torch.cat((bits, ~bits))
        side = sides[:, :, None] if axis == 1 else sides[:, None]
        samples = torch.arange(len(sides), device=place.device) % len(batch.inputs)
        inputs = batch.inputs[samples]
        if inputs.is_floating_point():
            inputs = torch.empty_like(inputs).normal_(generator=generator)
        layers = [call.layer for call in self._pass(batch, generator, weights=weights)[2]]

        def one_side(call: int, u: Tensor) -> Tensor:
            return u * _spread(side.to(u.dtype), layers[call], u.shape) if call == index else torch.zeros_like(u)

        wanted = batch._replace(inputs=inputs, targets=batch.targets[samples])
        _, along, _, _ = self._pass(wanted, generator, one_side, weights)
        if along is None:
            return True
        moved = torch.unflatten(self.head.patches(along), 2, (self.head.groups, -1)) != 0
        return not bool((moved & ~side[..., None]).any())


def _layout(layer: nn.Module, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Channels and places of what a layer puts out; convolutions have channels first."""
    if isinstance(layer, nn.Linear | GroupedLinear):
        return shape[-1], tuple(shape[1:-1])
    return shape[1], tuple(shape[2:])


def _spread(values: Tensor, layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """One value for every slice, or for all patches or groups at once (size 1), as a factor of what a layer puts out."""
    channels, places = _layout(layer, shape)
    samples, patches, groups = values.shape
    if groups > 1:
        values = values.repeat_interleave(channels // groups, 2)
    spots = places if patches > 1 else (1,) * len(places)
    if isinstance(layer, nn.Linear | GroupedLinear):
        return values.reshape(samples, *spots, -1)
    return values.mT.reshape(samples, -1, *spots)
