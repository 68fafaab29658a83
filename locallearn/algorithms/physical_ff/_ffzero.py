"""FFzero: layers are compared with fixed prototypes and moved by differences of that loss; nothing is ever differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import ParamGroup, TaskInfo, Update
from locallearn.algorithms.physical_ff._layers import Layer, taken_apart
from locallearn.algorithms.physical_ff._rule import PhysicalFF
from locallearn.batch import Batch
from locallearn.functional import ffzero
from locallearn.nets.blocks import through


class FFZero(PhysicalFF, protocol="ffzero"):
    """FFzero, see :class:`~locallearn.algorithms.physical_ff.PhysicalFF`.

    What a layer's weights (and normalisation) put out is compared with prototypes of the classes, one random simplex per layer;
    for convolutions one per channel, behind a fixed random map of that channel. A linear layer's directions span all of its
    weights: 2 K + 1 evaluations per batch. A convolution is probed channel by channel, by that channel's filter and its
    normalisation's gain: 2 K · channels + 1 evaluations. One more feeds the next layer. The step is n times the mean of slope
    times direction, n the number of values that a direction moves; the loss is a sum over the batch, so rates are
    small. The network's readout is the last layer. Layers vote.

    Deviations from the authors' code, which writes the last entry of a convolution's direction into the wrong place: here the
    gain itself is moved. Statistics of normalisation move once per batch and not with every probe, and the next layer is fed
    with every batch where theirs trains one layer after another (``schedule=sequential`` does that).
    """

    theirs = ("theta", "inner_steps", "absolute", "label_height")

    @property
    def broadcast(self) -> str:
        """The label, as a prototype."""
        return "label"

    def build(self, task: TaskInfo) -> None:
        """Draw prototypes, and maps for channels.

        Raises:
            ValueError: a layer with fewer outputs than classes, or one that cannot be taken apart; names it.
        """
        self.check(task)
        members = {**self.blocks.members, **({} if self.blocks.readout is None else {"readout": self.blocks.readout})}
        self._layers = [taken_apart(name, block, "FFzero") for name, block in members.items()]
        draws = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        x = task.example.inputs
        with torch.no_grad():
            first = self._layers[0].weights.weight
            x = x.to(first.device, first.dtype)
            for i, layer in enumerate(self._layers):
                z, x = self._run(layer, x)
                if z.ndim == 2:
                    if z.shape[1] < task.outputs:
                        raise ValueError(
                            f"block {layer.name!r} has {z.shape[1]} outputs, and FFzero places {task.outputs} classes in "
                            f"them as a simplex: make it at least {task.outputs} wide"
                        )
                    fixed = ffzero.prototypes(task.outputs, z.shape[1], draws)
                else:
                    if not isinstance(layer.weights, nn.Conv2d) or layer.weights.groups != 1:
                        raise ValueError(
                            f"block {layer.name!r} gives {tuple(z.shape)}, and FFzero knows rows and plain convolutions"
                        )
                    spots, channels = z[0, 0].numel(), z.shape[1]
                    fixed = torch.stack([ffzero.prototypes(task.outputs, task.outputs, draws) for _ in range(channels)])
                    bound = spots**-0.5
                    maps = torch.rand(channels, spots, task.outputs, generator=draws) * 2 * bound - bound
                    self.register_buffer(f"map{i + 1}", maps)
                self.register_buffer(f"prototypes{i + 1}", fixed.float())

    def _run(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared, and what the next layer is given."""
        z = through(layer.norm, layer.weights(through(layer.before, x)))
        return z, through(layer.after, z)

    def units(self) -> dict[str, list[ParamGroup]]:
        """Every block, and the readout."""
        return {layer.name: [{"params": [p for p, _ in self._moved(layer)]}] for layer in self._layers}

    @property
    def stages(self) -> list[list[str]]:
        """One layer after another."""
        return [[layer.name] for layer in self._layers]

    @property
    def depth(self) -> int:
        """Layers that are trained by now, or train."""
        trained = [i for i, layer in enumerate(self._layers) if self.trains(layer.name)]
        return trained[-1] + 1 if trained else len(self._layers)

    def _moved(self, layer: Layer) -> list[tuple[nn.Parameter, bool]]:
        """Parameters that a direction spans, in its order; of a convolution those that have a row per channel.

        The bias of a normalisation behind a convolution is not moved: the authors' code leaves it.
        """
        if isinstance(layer.weights, nn.Linear):
            return [(p, False) for module in (layer.weights, *layer.norm) for p in module.parameters()]
        gains: list[Any] = [module.weight for module in layer.norm if getattr(module, "weight", None) is not None]
        return [(p, True) for p in (*layer.weights.parameters(), *gains)]

    # -- the way of a batch ----------------------------------------------------------------------------------------------
    def _updates(self, batch: Batch) -> Iterator[Update]:
        """Differences along random directions, layer after layer.

        Raises:
            ValueError: weights that cannot hold so small a step.
        """
        kind = self._layers[0].weights.weight.dtype
        if kind in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"FFzero compares losses at weights that differ by {self.step} in all, which {kind} rounds away: set "
                "trainer.precision=32-true (bf16-mixed does, too: learning runs in float32 then)"
            )
        x, depth = batch.inputs, self.depth
        for i, layer in enumerate(self._layers[:depth]):
            if self.trains(layer.name):
                loss, gradients = self._probe(i, x, batch.targets)
                yield Update(layer.name, loss, gradients)
                del gradients
            if i + 1 < depth:
                with _Held(layer.norm):
                    x = self._run(layer, x)[1]

    def _probe(self, index: int, x: Tensor, targets: Tensor) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        layer = self._layers[index]
        clean = self._losses(index, x, targets)
        moved = [(p, by_channel) for p, by_channel in self._moved(layer) if p.requires_grad]
        gradients = {p: torch.zeros_like(p) for p, _ in moved}
        if not moved:
            return clean.sum(), gradients
        generator = self.rng(x.device)
        with _Held(layer.norm):
            for channel in range(len(clean)) if clean.ndim else (None,):
                parts = [p if channel is None else p[channel] for p, _ in moved]
                values = [part.clone() for part in parts]
                sizes = [part.numel() for part in parts]
                drawn = ffzero.directions(self.directions, sum(sizes), generator)
                slopes = []
                for direction in drawn:
                    found = []
                    for sign in (1.0, -1.0):
                        for part, value, d in zip(parts, values, torch.split(direction, sizes), strict=True):
                            part.copy_(value + (sign * self.step) * d.view_as(part).to(part))
                        loss = self._losses(index, x, targets)
                        found.append(loss if channel is None else loss[channel])
                    slopes.append((found[0] - found[1]) / (2 * self.step))
                for part, value in zip(parts, values, strict=True):
                    part.copy_(value)
                estimate = torch.split(ffzero.estimate(torch.stack(slopes), drawn.to(clean)), sizes)
                for (p, _), piece in zip(moved, estimate, strict=True):
                    into = gradients[p] if channel is None else gradients[p][channel]
                    into.copy_(piece.view_as(into))
        return clean.sum(), gradients

    def _losses(self, index: int, x: Tensor, targets: Tensor) -> Tensor:
        """A scalar, or one loss per channel."""
        z, _ = self._run(self._layers[index], x)
        near, fixed = self._compared(index, z)
        return ffzero.loss(near, fixed, targets, self.margin)

    def _compared(self, index: int, z: Tensor) -> tuple[Tensor, Tensor]:
        fixed = self.get_buffer(f"prototypes{index + 1}").to(z)
        if z.ndim == 2:
            return z, fixed
        return z.flatten(2).transpose(0, 1) @ self.get_buffer(f"map{index + 1}").to(z), fixed

    # -- inference -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Votes of all trained layers for every class, ``(N, C)``; of a tie the fraction tells (:func:`ffzero.vote`)."""
        answers = []
        x = inputs
        for i, layer in enumerate(self._layers[: self.depth]):
            z, x = self._run(layer, x)
            near = ffzero.similarities(*self._compared(i, z))
            answers.append((near if near.ndim == 2 else near.sum(0)).argmax(1))
        votes = ffzero.vote(torch.stack(answers), self.outputs)
        return votes.to(torch.promote_types(inputs.dtype, torch.float32))  # halves round away what a tie goes by

    @torch.no_grad()
    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """Output of every block."""
        yield from super().activations(inputs, *context)


class _Held:
    """Statistics of normalisation stay as they are."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers()]

    def __enter__(self) -> None:
        self._kept = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *_: object) -> None:
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
