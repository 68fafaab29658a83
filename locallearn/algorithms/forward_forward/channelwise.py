"""Channel-wise competition: classes own channels, and the loudest group of channels is the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from locallearn.algorithms.base import Locality, TaskInfo
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.forward_forward.frame import refuse_unfit
from locallearn.algorithms.forward_forward.supervised import ForwardForward, Inference
from locallearn.batch import Batch
from locallearn.functional import layer_collaboration
from locallearn.losses.channelwise import ChannelwiseCompetitiveLoss
from locallearn.nets.blocks import fitted
from locallearn.nets.layout import Tokens
from locallearn.nets.units import sample_shapes


class ChannelwiseForwardForward(ForwardForward):
    """Channel-wise competitive learning (Papachristodoulou et al., AAAI 2024, arXiv 2312.12668).

    Made by ``ForwardForward(loss="channelwise")``. The S channels of every block's output are shared out among the C classes;
    G_c is the mean of squares of group c. Right data alone, no label in the input: a block learns to make the group of the
    true class the loudest. In fully connected blocks units take the place of channels.

    Deviations: goodness is not clamped at 50 (a wrong group above it would get no gradient). Blocks may be any; the paper's
    have a BatchNorm behind the ReLU and every second convolution grouped by class. Interleaved training (layers that stop
    after some epochs) is what ``schedule=sequential`` is near to.
    """

    inferences: ClassVar[tuple[Inference, ...]] = ("last", "goodness", "softmax")
    skips_first: ClassVar[bool] = False

    def _kind_in_words(self) -> str:
        return "loss=channelwise, which knows no negatives"

    def _idle(self) -> tuple[str, ...]:
        threshold = ("threshold",) if self.competition == "cwc" else ()
        always = ("negatives", "temperature", "minimise", "peer", "label_strength", "alpha", "blurs")
        return (*always, "goodness", "normalise", *threshold)

    @property
    def locality(self) -> Locality:
        """Layer-local."""
        return Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """Labels."""
        return "labels"

    @property
    def deterministic(self) -> bool:
        """Nothing is drawn."""
        return True

    def check(self, task: TaskInfo) -> list[int]:
        """Refuse blocks whose channels cannot be shared out.

        Raises:
            ValueError: names the block, its channels and the classes.
        """
        refuse_unfit(task)
        sizes = feature_sizes(self.blocks, task.example)
        x = fitted(self.blocks, task.example.inputs)
        with torch.no_grad():
            for name, shape in zip(self.blocks.names, sample_shapes(self.blocks, x, ())[0], strict=True):
                if isinstance(shape, Tokens):
                    raise ValueError(
                        f"block {name!r} gives tokens of shape {tuple(shape)} per sample, and classes would share out its "
                        f"{shape[0]} tokens instead of its channels: use blocks that give maps or vectors, or another loss"
                    )
                if shape[0] % task.outputs:
                    raise ValueError(
                        f"block {name!r} has {shape[0]} channels, which cannot be shared out among {task.outputs} "
                        f"classes: give it a multiple of {task.outputs}, or use another loss"
                    )
        return sizes

    def _make_loss(self, index: int) -> nn.Module:
        threshold = 2.0 if self.threshold is None else self.threshold
        return ChannelwiseCompetitiveLoss(self.outputs, self.competition, threshold)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        if self.readout is not None and self.trains("readout"):
            with torch.no_grad():
                self._neutral = self._features(self.activations(batch.inputs))
        return batch

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """How far the true class's channels are from being the loudest."""
        loss: Tensor = self.local[index](output, batch.targets)
        return loss

    def emit(self, index: int, output: Tensor) -> Tensor:
        """The output as it is: what a block needs of a scale is up to its own normalisation."""
        return output.detach()

    def neutral(self, inputs: Tensor) -> Tensor:
        """The inputs as they are."""
        return inputs

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Goodness of every class's channels in the last block, or summed over blocks, or the readout's logits, ``(N, C)``."""
        if self.by_readout:
            return super().predict(inputs)
        groups = list(self._groups(inputs))
        return torch.stack([groups[i] for i in self.read(self.depth)]).sum(0)

    @torch.no_grad()
    def examine(self, batch: Batch) -> dict[str, dict[str, float]]:
        """By block: its accuracy alone."""
        goodness = torch.stack(list(self._groups(batch.inputs)), 2)
        alone = layer_collaboration.contributions(goodness, batch.targets).alone
        return {name: {"accuracy_alone": float(a)} for name, a in zip(self.blocks.names, alone, strict=False)}

    def _groups(self, inputs: Tensor) -> Iterator[Tensor]:
        for i, output in zip(range(self.depth), self.activations(inputs), strict=False):
            loss = self.local[i]
            assert isinstance(loss, ChannelwiseCompetitiveLoss)
            yield loss.goodness(output)
