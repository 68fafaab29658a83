"""What all rules share that write a label into the input and read the answer off every block's goodness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from locallearn.algorithms.base import ParamGroup, TaskInfo, refuse_dense
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff
from locallearn.functional import layer_collaboration
from locallearn.nets.blocks import Blocks


class LabelledGoodness(LayerLocal):
    """The label is written into the first entries of the input, and the label with most goodness is the answer.

    The true label makes a positive sample, a wrong one a negative; both run as one batch, positives on top.

    Args:
        label_strength: value of the label's slot.
        minimise: positives are quiet, so the least goodness is the answer.
        seed: of the negatives.
    """

    def __init__(self, label_strength: float = 1.0, minimise: bool = False, seed: int = 0) -> None:
        super().__init__(seed)
        self.label_strength = label_strength
        self.minimise = minimise

    @property
    def deterministic(self) -> bool:
        """Negatives are drawn anew for every batch."""
        return False

    # -- what it can train -----------------------------------------------------------------------------------------------
    def check(self, task: TaskInfo) -> list[int]:
        """Refuse tasks without labels to write or inputs to write over; entries per sample of every block's output.

        Raises:
            ValueError: says what was found and what is wanted.
        """
        return check_labelled(self.blocks, task, "Forward-Forward")

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Weights, and biases without weight decay, as in the Matlab code."""
        return weights_and_biases(list(self.blocks[index].parameters()))

    # -- the way of a batch ----------------------------------------------------------------------------------------------
    def pairs(self, batch: Batch, wrong: Tensor) -> Tensor:
        """Positives on top of negatives with these wrong labels, ``(2N, ...)``, scaled."""
        return self.scaled(torch.cat((self.written(batch.inputs, batch.targets), self.written(batch.inputs, wrong))))

    def prepare(self, batch: Batch) -> Batch:
        """Positives on top of negatives, any wrong label as likely as another."""
        labels = batch.targets
        return Batch(self.pairs(batch, ff.wrong_labels_uniform(labels, self.outputs, self.rng(labels.device))), labels)

    def scaled(self, x: Tensor) -> Tensor:
        """What a block sees of the input, or of the block below: no goodness, only the pattern. Default: RMS 1."""
        return ff.rms_normalise(x)

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output, scaled."""
        return self.scaled(output.detach())

    def written(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs with these labels in their first entries."""
        return ff.embed_label(inputs, labels, self.outputs, self.label_strength)

    def neutral(self, inputs: Tensor) -> Tensor:
        """What enters the first block where no label is preferred."""
        return self.scaled(ff.embed_neutral(inputs, self.outputs, self.label_strength))

    # -- inference -------------------------------------------------------------------------------------------------------
    def goodness_of(self, output: Tensor) -> Tensor:
        """Goodness of every row of a block's output, ``(N,)``. Default: the sum of squares."""
        return ff.goodness(output)

    def read(self, depth: int) -> range:
        """Blocks that inference looks at, of so many that are trained. Default: all."""
        return range(depth)

    def goodness_by_block(self, inputs: Tensor, label: int) -> Iterator[Tensor]:
        """Goodness of every trained block with this label in the inputs, ``(N,)`` each."""
        labels = torch.full((len(inputs),), label, device=inputs.device)
        x = self.scaled(self.written(inputs, labels))
        for i in range(self.depth):
            output = self.blocks[i](x)
            yield self.goodness_of(output)
            if i + 1 < self.depth:
                x = self.emit(i, output)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Summed goodness of every label (negated where positives are quiet), ``(N, C)``: one pass per label."""
        return torch.stack([self._total_goodness(inputs, label) for label in range(self.outputs)], 1)

    def activations(self, inputs: Tensor, *context: Any) -> Iterator[Tensor]:
        """What every block hands on in a pass with the neutral label."""
        x = self.neutral(inputs)
        for i, block in enumerate(self.blocks):
            x = self.emit(i, block(x))
            yield x

    @torch.no_grad()
    def examine(self, batch: Batch) -> dict[str, dict[str, float]]:
        """By block: its accuracy alone, and what the sum over blocks loses without it (of blocks that are in the sum)."""
        goodness = self.said(self.goodness_by_label(batch.inputs))
        read = list(self.read(self.depth))
        alone = layer_collaboration.contributions(goodness, batch.targets).alone
        gained = layer_collaboration.contributions(goodness[:, :, read], batch.targets).gained
        figures = {
            name: {"accuracy_alone": float(value)} for name, value in zip(self.blocks.names, alone, strict=False)
        }
        for i, value in zip(read, gained, strict=True):
            figures[self.blocks.names[i]]["accuracy_gained"] = float(value)
        return figures

    def goodness_by_label(self, inputs: Tensor) -> Tensor:
        """Goodness of every label in every trained block, ``(N, C, L)``."""
        by_label = [torch.stack(list(self.goodness_by_block(inputs, label)), 1) for label in range(self.outputs)]
        return torch.stack(by_label, 1)

    def said(self, goodness: Tensor) -> Tensor:
        """What every block says for every label, from its goodness ``(N, C, L)``: the sum over blocks is the answer."""
        return -goodness if self.minimise else goodness

    def _total_goodness(self, inputs: Tensor, label: int) -> Tensor:
        total: Tensor | None = None
        for i, goodness in enumerate(self.goodness_by_block(inputs, label)):
            if i in self.read(self.depth):
                total = goodness if total is None else total + goodness
        assert total is not None
        return -total if self.minimise else total


def check_labelled(blocks: Blocks, task: TaskInfo, owner: str) -> list[int]:
    """Refuse tasks without labels to write or inputs to write over; entries per sample of every block's output.

    Raises:
        ValueError: says what was found and what is wanted.
    """
    refuse_unfit(task, owner)
    inputs = task.example.inputs
    if not inputs.is_floating_point():
        raise ValueError(
            f"{owner} writes labels over its inputs and scales them, and these are {inputs.dtype} (token ids?): "
            "give floating point inputs, embeddings instead of ids"
        )
    ff.embed_neutral(inputs, task.outputs)  # refuses inputs that are too small for the label
    return feature_sizes(blocks, task.example)


def refuse_unfit(task: TaskInfo, owner: str = "Forward-Forward") -> None:
    """Refuse tasks that a rule of this line cannot learn.

    Raises:
        ValueError: no class labels, fewer than two of them, labels of places, or a context.
    """
    if not task.classes:
        raise ValueError(f"{owner} writes class labels into the input, and this task has none")
    if task.outputs < 2:
        raise ValueError(
            f"{owner} tells a right label from a wrong one, and this task has {task.outputs} class: it needs at least 2"
        )
    refuse_dense(task, owner)
    if task.example.context:
        raise ValueError(
            f"{owner} stacks positives and negatives into one batch, which cannot be done with the context of "
            "this task (a graph?): use another algorithm"
        )


def weights_and_biases(parameters: list[Any]) -> list[ParamGroup]:
    """Two groups: weights, and what has one dimension, without weight decay."""
    weights = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups: list[ParamGroup] = [{"params": weights}]
    return [*groups, {"params": others, "weight_decay": 0.0}] if others else groups
