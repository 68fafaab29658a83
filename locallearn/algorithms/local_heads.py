"""Local heads: every block learns from an auxiliary network of its own. One frame, many papers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo
from locallearn.algorithms.heads import BlockHeads, HeadParts, takes_parts
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch


class LocalHeads(LayerLocal):
    """Supervised local learning with auxiliary heads: DGL, predsim, InfoPro, AugLocal, TRGL as combinations of parts.

    Block i learns from the loss of its own head A_i on its own output, h_i = F_i(detach(h_{i-1})), L_i = l(A_i(h_i), y).
    Inference drops the heads. The network's readout is the last block's head, with the task's loss.

    Args:
        seed: of heads and terms.
        parts: the fields of :class:`~locallearn.algorithms.heads.HeadParts`: ``head``, ``width``, ``loss``, ``movement``
            and so on.
    """

    _owner: ClassVar[str] = "the rule of local heads"

    @takes_parts
    def __init__(self, seed: int = 0, **parts: Any) -> None:
        super().__init__(seed)
        self.parts = HeadParts(**parts)
        self._moved: list[Tensor] = []

    @property
    def locality(self) -> Locality:
        """Layer-local: labels are broadcast (to InfoPro's decoders the image, too), the error is not."""
        return Locality.LAYER_LOCAL

    @property
    def variant(self) -> str | None:
        """Head and loss, where they are not Mono-Forward's, and what stands beside them."""
        return self.parts.variant

    @property
    def carries(self) -> bool:
        """Whatever crosses the borders: heads read the main tensor."""
        return True

    @property
    def broadcast(self) -> str:
        """Labels, and the image where blocks give it back."""
        return "labels, and the input image" if self.parts.loss == "infopro" else "labels"

    @property
    def stages(self) -> list[list[str]]:
        """One block after the other.

        Raises:
            ValueError: a block has no class scores by which its training could be judged.
        """
        if not self.heads.classifies:
            raise ValueError(
                "a sequential schedule judges every block by its own class scores, and with these losses not every block has "
                "any: use schedule=joint, or loss=ce or predsim"
            )
        return super().stages

    def build(self, task: TaskInfo) -> None:
        """Give every block its head."""
        self.heads = BlockHeads(self.blocks, task, self._owner, self.parts)

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Block and head learn together."""
        return self.heads.groups(self.blocks, index)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        self.heads.observe(batch.inputs)
        return batch

    def run(self, index: int, inputs: Any, batch: Batch) -> Any:
        """One plain pass; the movement of residual branches is noted on the way."""
        with self.heads.watching(self.blocks, index) as moved:
            output = super().run(index, inputs, batch)
        self._moved = moved
        return output

    def read(self, index: int, output: Tensor, *context: Any) -> Tensor:
        """What the head of block ``index`` is given. Default: the block's output."""
        return output

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """Loss of the block's head, and of what stands beside it."""
        moved, self._moved = self._moved, []  # or its graph would outlive the step
        return self.heads.loss(self.blocks, index, self.read(index, output, *batch.context), batch, moved)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Scores of the last trained block's head, shape ``(N, C)``; of a network with a readout its own forward pass."""
        *_, last = (x for _, x in zip(range(self.depth), self.activations(inputs, *context), strict=False))
        read = self.read(self.depth - 1, last, *context)
        return self.heads.scores(self.blocks, self.depth - 1, read, Batch(inputs, inputs, context))
