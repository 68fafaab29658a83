"""PhyLL: every layer tells a sample with its true label from the same sample with a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from locallearn.algorithms.base import ParamGroup, TaskInfo, Update
from locallearn.algorithms.forward_forward.frame import LabelledGoodness
from locallearn.algorithms.physical_ff._layers import pointwise, taken_apart
from locallearn.algorithms.physical_ff._rule import PhysicalFF
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff
from locallearn.functional import physical_ff
from locallearn.nets.blocks import through


class PhyLL(PhysicalFF, LabelledGoodness, protocol="phyll"):
    """Physical local learning, see :class:`~locallearn.algorithms.physical_ff.PhysicalFF`.

    Positives and negatives are measured once each per layer and batch; K steps on what was measured follow, then the moved
    layer feeds the next device. So the device is asked 2 L times per batch in training, whatever K, and C L times per batch in
    inference, which takes the label with the greatest summed goodness.

    Deviations from the authors' code: the label's height is that of the first batch and kept, where theirs follows every batch;
    p is exactly of length 1 and a buffer; encoders leave the skip path as it is. The label overwrites the first C entries of
    the input; data that come with reserved slots (``dataset=vowels``) lose nothing by it.
    """

    theirs = ("directions", "step", "margin")

    @property
    def broadcast(self) -> str:
        """The label, twice."""
        return "label in the input, positive/negative bit"

    def build(self, task: TaskInfo) -> None:
        """Draw a direction for every layer.

        Raises:
            ValueError: a block that is no linear map with modules without weights around it, inputs too small for the label.
        """
        PhysicalFF.check(self, task)
        ff.embed_neutral(task.example.inputs, task.outputs)  # refuses inputs that are too small for the label
        self._layers = [taken_apart(n, b, "PhyLL") for n, b in zip(self.blocks.names, self.blocks, strict=True)]
        self._activations = []
        for i, layer in enumerate(self._layers):
            if not isinstance(layer.weights, torch.nn.Linear) or layer.norm:
                found = type((*layer.norm, layer.weights)[0]).__name__
                raise ValueError(
                    f"block {layer.name!r} has a {found}, and PhyLL trains linear layers: set algorithm.protocol=ffzero for "
                    "convolutions and normalisation, or use net=physical or net=mlp"
                )
            self._activations.append(pointwise(layer.name, layer.after, "PhyLL"))
            self.register_buffer(f"direction{i + 1}", physical_ff.direction(layer.weights.out_features))
        # 0: the first batch has not come yet
        self.register_buffer("height", torch.tensor(self.label_height or 0.0, dtype=torch.float64))

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Weights and bias."""
        return [{"params": list(self._layers[index].weights.parameters())}]

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Loss of a block's output, positives on top of negatives."""
        positive, negative = self._goodness(index, output).chunk(2)
        return physical_ff.loss(positive, negative, self.theta)

    # -- the way of a batch ----------------------------------------------------------------------------------------------
    def _updates(self, batch: Batch) -> Iterator[Update]:
        """For every layer K gradients, made by hand, on what was measured once."""
        self._note_height(batch.inputs)
        labels = batch.targets
        wrong = ff.wrong_labels_uniform(labels, self.outputs, self.rng(labels.device))
        pair = [self.written(batch.inputs, labels), self.written(batch.inputs, wrong)]
        for i, layer in enumerate(self._layers[: self.depth]):
            if not self.trains(layer.name):
                pair = [self.blocks[i](x) for x in pair]
                continue
            read = through(layer.before, pair[0]), through(layer.before, pair[1])
            weights = layer.weights
            for _ in range(self.inner_steps):
                outputs = _wide(weights(read[0])), _wide(weights(read[1]))
                direction, activation = self.get_buffer(f"direction{i + 1}"), self._activations[i]
                found = physical_ff.gradients(
                    (_wide(read[0]), _wide(read[1])),
                    outputs,
                    direction.to(outputs[0]),
                    self.theta,
                    activation,
                    self._judges_absolutes(i),
                )
                pieces = {"weight": found.weight, "bias": found.bias}
                gradients = {p: pieces[key].to(p.dtype) for key, p in weights.named_parameters()}
                del outputs
                yield Update(layer.name, found.loss, gradients)
                del gradients, pieces, found
            if i + 1 < self.depth:
                pair = [through(layer.after, weights(u)) for u in read]

    def _note_height(self, inputs: Tensor) -> None:
        if self.label_height is None:
            height = self.get_buffer("height")
            height.copy_(torch.where(height > 0, height, inputs.abs().max().to(height)))

    def _judges_absolutes(self, index: int) -> bool:
        return self.absolute if self.absolute is not None else self._activations[index] is None

    # -- labels ----------------------------------------------------------------------------------------------------------
    def _height(self) -> Tensor:
        """Of the label's slot; 1 before the first batch."""
        height = self.get_buffer("height")
        return torch.where(height > 0, height, torch.ones_like(height))

    def written(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs with these labels in their first entries, as high as the first batch."""
        return self._slots(ff.embed_label(inputs, labels, self.outputs))

    def neutral(self, inputs: Tensor) -> Tensor:
        """Inputs in which no label is preferred."""
        return self._slots(ff.embed_neutral(inputs, self.outputs))

    def _slots(self, written: Tensor) -> Tensor:
        written.view(len(written), -1)[:, : self.outputs].mul_(self._height().to(written))
        return written

    def scaled(self, x: Tensor) -> Tensor:
        """As it is: what a device needs is its encoding's matter."""
        return x

    # -- inference -------------------------------------------------------------------------------------------------------
    def _goodness(self, index: int, output: Tensor) -> Tensor:
        activity = _wide(output.abs() if self._judges_absolutes(index) else output)
        with torch.autocast(output.device.type, enabled=False):
            return physical_ff.goodness(activity, self.get_buffer(f"direction{index + 1}").to(activity))

    @torch.no_grad()
    def goodness_by_block(self, inputs: Tensor, label: int) -> Iterator[Tensor]:
        """Goodness of every trained block with this label in the inputs, ``(N,)`` each."""
        x = self.written(inputs, torch.full((len(inputs),), label, device=inputs.device))
        for i in range(self.depth):
            x = self.blocks[i](x)
            yield self._goodness(i, x)

    @torch.no_grad()
    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Summed goodness of every label, ``(N, C)``: one pass per label."""
        return super().predict(inputs, *context)

    @torch.no_grad()
    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """What every block hands on in a pass with the neutral label."""
        yield from super().activations(inputs, *context)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: cosines of different labels are closer than halves can tell."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
