"""BP/FF: backpropagation on Forward-Forward's own objective, the control that tells the objective from its locality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from locallearn.algorithms.base import Algorithm, Locality, ParamGroup, TaskInfo, Update, choices
from locallearn.algorithms.forward_forward.frame import check_labelled
from locallearn.batch import Batch
from locallearn.functional import emergent
from locallearn.functional import forward_forward as ff
from locallearn.losses.emergent import SummedGoodnessLoss

Inference = Literal["goodness", "vote"]


class BackpropForwardForward(Algorithm):
    """Backpropagation of Forward-Forward's loss on the goodness of all layers together (Tosato et al., arXiv 2305.18353).

    Positives, negatives, label and the normalisation between blocks are those of
    :class:`~locallearn.algorithms.ForwardForward`; the loss is one, softplus(theta - sum G+) and softplus(sum G- - theta),
    and its gradient goes through all blocks and through the normalisation between them. With the same goodness, normalisation
    and inference over all blocks, what differs from Forward-Forward is locality and nothing else.

    Deviations: negatives are drawn anew for every batch, of the batch's own samples; the paper draws them once and unpaired
    (:func:`locallearn.functional.emergent.static_negatives`). The label is written into the first channel alone, with a
    strength that does not depend on the batch. The network's own readout is not used.

    Args:
        goodness: ``"squares"``: sum of squares, as ForwardForward has it; ``"norm"``: Euclidean length, the paper's;
            ``"l1"``.
        threshold: theta, 3 in the paper; ``None``: the summed goodness of outputs that are 1 everywhere (with squares the
            number of entries of all blocks).
        normalise: what every block but the first, and the first on the input, sees: ``"rms"``: root mean square 1, as
            ForwardForward has it; ``"unit"``: Euclidean length 1, the paper's.
        inference: ``"goodness"``: for every label one pass, argmax of the summed goodness; ``"vote"``: argmax of the sum
            over blocks of the softmax over labels, the paper's. All blocks count, as they do in the loss.
        label_strength: value of the label's slot.
        seed: of the negatives.
    """

    def __init__(
        self,
        goodness: emergent.Goodness = "squares",
        threshold: float | None = None,
        normalise: emergent.Normalise = "rms",
        inference: Inference = "goodness",
        label_strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        emergent.check_scale(normalise)
        if inference not in get_args(Inference):
            raise ValueError(f"inference is {inference!r}, expected 'goodness' (sum over blocks) or 'vote' (of blocks)")
        self.goodness = goodness
        self.normalise: emergent.Normalise = normalise
        self.inference = inference
        self.label_strength = label_strength
        self._local = SummedGoodnessLoss(threshold, goodness)

    @property
    def locality(self) -> Locality:
        """Global."""
        return Locality.GLOBAL

    @property
    def broadcast(self) -> str:
        """The label in the input, and the error through every layer."""
        return "label in the input, positive/negative bit, and the error through every transposed weight"

    @property
    def variant(self) -> str | None:
        """The goodness, where it is not the sum of squares."""
        return choices(self, BackpropForwardForward.__init__, "goodness")

    def build(self, task: TaskInfo) -> None:
        """Add nothing."""
        check_labelled(self.blocks, task, "BP/FF")

    def units(self) -> dict[str, list[ParamGroup]]:
        """One unit: all blocks, without the readout, which has no part in the loss."""
        return {"network": [{"params": [p for block in self.blocks for p in block.parameters()]}]}

    def prepare(self, batch: Batch) -> Batch:
        """Positives on top of negatives, ``(2N, ...)``, normalised."""
        labels = batch.targets
        wrong = ff.wrong_labels_uniform(labels, self.outputs, self.rng(labels.device))
        both = torch.cat([ff.embed_label(batch.inputs, y, self.outputs, self.label_strength) for y in (labels, wrong)])
        return Batch(self.hand_on(both), labels)

    def hand_on(self, output: Tensor) -> Tensor:
        """What the next block sees of a block's output: the pattern without its goodness, with its graph."""
        return emergent.normalise(output, self.normalise)

    def outputs_of_blocks(self, inputs: Tensor) -> list[Tensor]:
        """Every block's output before normalisation, ``(N, ...)``; ``inputs`` are prepared ones."""
        outputs: list[Tensor] = []
        for block in self.blocks:
            output = block(inputs if not outputs else self.hand_on(outputs[-1]))
            outputs.append(output)
        return outputs

    def updates(self, batch: Batch) -> Iterator[Update]:
        """One loss on the goodness of all blocks."""
        prepared = self.prepare(batch)

        def loss() -> Tensor:
            halves = [output.chunk(2) for output in self.outputs_of_blocks(prepared.inputs)]
            found: Tensor = self._local([h[0] for h in halves], [h[1] for h in halves])
            return found

        yield Update("network", loss(), again=loss)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Summed goodness of every label, or the blocks' votes, shape ``(N, C)``."""
        found = torch.stack([self._goodness(inputs, label) for label in range(self.outputs)], 1)
        return emergent.vote(found) if self.inference == "vote" else found.sum(2)

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """What every block hands on in a pass with the neutral label."""
        x = self.hand_on(ff.embed_neutral(inputs, self.outputs, self.label_strength))
        for block in self.blocks:
            x = self.hand_on(block(x))
            yield x

    def _goodness(self, inputs: Tensor, label: int) -> Tensor:
        """Goodness of every block with this label, ``(N, L)``."""
        labels = torch.full((len(inputs),), label, device=inputs.device)
        entered = self.hand_on(ff.embed_label(inputs, labels, self.outputs, self.label_strength))
        return torch.stack([emergent.goodness(h, self.goodness) for h in self.outputs_of_blocks(entered)], 1)
