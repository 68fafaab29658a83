"""Forward-Forward without labels: right data are images, wrong data are images mixed from two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from locallearn.algorithms.base import Locality, TaskInfo, Update
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.forward_forward.frame import refuse_unfit
from locallearn.algorithms.forward_forward.supervised import ForwardForward, Inference
from locallearn.batch import Batch
from locallearn.functional import forward_forward as ff


class HybridForwardForward(ForwardForward):
    """Unsupervised Forward-Forward (Hinton, arXiv 2212.13345), made by ``ForwardForward(negatives="hybrid")``.

    A negative is m * a + (1 - m) * b of two images of the batch, with a mask m of large blobs: right in its details and
    wrong in its shapes. No label enters the blocks; a linear softmax on N(z) of all blocks but the first learns from the
    labels, with the blocks or as the last stage, and answers.

    Deviations: the paper does not say how often masks are blurred, 6 times here, with the outermost pixels repeated beyond
    the border. The readout has no bias. It reads the blocks as they are in the joint schedule while they still learn.
    """

    inferences: ClassVar[tuple[Inference, ...]] = ("softmax",)

    def _kind_in_words(self) -> str:
        return "negatives=hybrid, where no label is in the input"

    def _idle(self) -> tuple[str, ...]:
        return (*(name for name in super()._idle() if name != "blurs"), "label_strength")

    @property
    def locality(self) -> Locality:
        """Layer-local."""
        return Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """One bit; labels go to the readout alone."""
        return "positive/negative bit"

    @property
    def judges(self) -> bool:
        """Not before the readout trains."""
        return self.trains("readout")

    def check(self, task: TaskInfo) -> list[int]:
        """Refuse what is no image, and tasks without classes for the readout.

        Raises:
            ValueError: says what was found and what is wanted.
        """
        refuse_unfit(task)
        inputs = task.example.inputs
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise ValueError(
                f"negatives=hybrid mixes images by masks with a height and a width, and these inputs are {inputs.dtype} of "
                f"shape {tuple(inputs.shape[1:])} per sample: give floating point images (channels, height, width); "
                "a network may flatten them itself"
            )
        if self.blurs < 0:
            raise ValueError(f"blurs is {self.blurs}, expected 0 (single random bits) or above")
        return feature_sizes(self.blocks, task.example)

    def prepare(self, batch: Batch) -> Batch:
        """Images on top of hybrids, ``(2N, ...)``, scaled."""
        hybrids = ff.hybrid_images(batch.inputs, self.blurs, self.rng(batch.inputs.device))
        self._seen: dict[int, Tensor] = {}
        return Batch(self.scaled(torch.cat((batch.inputs, hybrids))), batch.targets)

    def run(self, index: int, inputs: Tensor, batch: Batch) -> Tensor:
        """Run a block, and keep what the readout is to read: that of the images, which are half of the batch already."""
        output: Tensor = super().run(index, inputs, batch)
        if self.trains("readout") and index in self.readable(len(self.blocks)) and index not in self._seen:
            images = output.detach()[: len(output) // 2]
            self._seen[index] = self.emit(index, images).flatten(1)
        return output

    def extra_updates(self, batch: Batch, prepared: Batch) -> Iterator[Update]:
        """Train the readout on the images' activations; no gradient enters the blocks."""
        if self.trains("readout"):
            read, seen = self.readable(len(self.blocks)), self._seen
            with torch.no_grad():
                known = all(i in seen for i in read)
                self._neutral = (
                    torch.cat([seen[i] for i in read], 1) if known else self._features(self.activations(batch.inputs))
                )
        self._seen = {}
        yield from super().extra_updates(batch, prepared)

    def neutral(self, inputs: Tensor) -> Tensor:
        """The images themselves."""
        return self.scaled(inputs)

    def examine(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Nothing: goodness knows no labels here."""
        return {}

    def predict(self, inputs: Tensor, *context: object) -> Tensor:
        """The readout's logits, ``(N, C)``."""
        assert self.readout is not None
        scores: Tensor = self.readout(self._features(self.activations(inputs)))
        self._pre_activation = None
        return scores
