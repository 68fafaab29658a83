"""Local heads: every block learns from an auxiliary network of its own. One frame, many papers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from locallearn.algorithms._selection import By, Selection, rows_of
from locallearn.algorithms.base import Locality, ParamGroup, TaskInfo
from locallearn.algorithms.heads import BlockHeads, HeadParts, takes_parts
from locallearn.algorithms.layer_local import LayerLocal
from locallearn.batch import Batch


class LocalHeads(LayerLocal):
    """Supervised local learning with auxiliary heads: DGL, predsim, InfoPro, AugLocal, TRGL as combinations of parts.

    Block i learns from the loss of its own head A_i on its own output, h_i = F_i(detach(h_{i-1})), L_i = l(A_i(h_i), y).
    Inference drops the heads. The network's readout is the last block's head, with the task's loss.

    With ``keep`` below 1 the blocks up to one of them learn from the whole batch, and those behind it from a part that this
    block chooses: the samples with the largest loss of its own, head and term together (movement left out, a price of the
    block), or any. They are known when the block has run, so the rest is never computed. Normalisation in the later blocks
    then sees the part alone while training, and everything at inference. Inference runs all samples through all blocks.

    Args:
        seed: of heads and terms, and of a random choice.
        keep: share of every batch that goes on; 1: all of it.
        keep_by: ``loss``: the samples with the largest loss; ``random``: any, the control.
        keep_after: name of the block that chooses; ``None``: the first one.
        parts: the fields of :class:`~locallearn.algorithms.heads.HeadParts`: ``head``, ``width``, ``loss``, ``movement``
            and so on.

    Raises:
        ValueError: a setting out of range, or one that nothing reads; when attached, a network or a task that does not fit.
    """

    _owner: ClassVar[str] = "the rule of local heads"

    @takes_parts
    def __init__(
        self, seed: int = 0, keep: float = 1.0, keep_by: By = "loss", keep_after: str | None = None, **parts: Any
    ) -> None:
        super().__init__(seed)
        self.selection = Selection(keep, keep_by)
        if keep_after is not None and not self.selection:
            raise ValueError(f"keep_after={keep_after} is for keep below 1, and keep is 1: leave it out")
        self._keep_after = keep_after
        self._chooses: int | None = None
        self.parts = HeadParts(**parts)
        self._moved: list[Tensor] = []
        self._losses: Tensor | None = None

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
        """Whatever crosses the borders: heads read the main tensor. Of a part of the batch only one tensor."""
        return not self.selection

    @property
    def broadcast(self) -> str:
        """Labels, and the image where blocks give it back."""
        return "labels, and the input image" if self.parts.loss == "infopro" else "labels"

    @property
    def stages(self) -> list[list[str]]:
        """One block after the other.

        Raises:
            ValueError: a block has no class scores by which its training could be judged, or only a part of a batch goes on.
        """
        self.selection.refuse_apart()
        if not self.heads.classifies:
            raise ValueError(
                "a sequential schedule judges every block by its own class scores, and with these losses not every block has "
                "any: use schedule=joint, or loss=ce or predsim"
            )
        return super().stages

    def build(self, task: TaskInfo) -> None:
        """Give every block its head."""
        self.heads = BlockHeads(self.blocks, task, self._owner, self.parts)
        self.selection.check(task)
        if self.selection:
            self._chooses = self._chooser()

    def _chooser(self) -> int:
        *known, last = self.blocks.names
        name = self._keep_after
        if not known:
            raise ValueError(f"keep is for what comes after a block, and this network is one block, {last!r}: cut it")
        if name is not None and name not in known:
            raise ValueError(f"keep_after is {name!r}, expected a block that another one follows: {', '.join(known)}")
        return 0 if name is None else known.index(name)

    def train_only(self, units: frozenset[str] | None) -> None:
        """Train these units only; ``None``: all, which is the only way where a block chooses for the later ones.

        Raises:
            ValueError: a block that may be frozen is to choose.
        """
        if units is not None:
            self.selection.refuse_apart()
        super().train_only(units)

    def learned_from(self, unit: str, samples: int) -> int:
        """All of a batch up to the block that chooses, and what goes on behind it."""
        if self._chooses is None:
            return samples
        kept = self.selection.count(samples)
        return kept if self.blocks.names.index(unit) > self._chooses else samples

    def block_groups(self, index: int) -> list[ParamGroup]:
        """Block and head learn together."""
        return self.heads.groups(self.blocks, index)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        self._losses = None
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
        each: list[Tensor] | None = [] if self.selection.ranks and index == self._chooses else None
        loss = self.heads.loss(self.blocks, index, self.read(index, output, *batch.context), batch, moved, each)
        if each and self._losses is None:  # of the first pass, which is what goes on, if an optimizer asks for several
            first, *others = each
            self._losses = sum(others, start=first)
        return loss

    def pass_on(self, index: int, inputs: Any, batch: Batch) -> tuple[Any, Batch]:
        """Behind the block that chooses, the samples that it has chosen."""
        if index != self._chooses:
            return inputs, batch
        losses, self._losses = self._losses, None
        rows = self.selection.choose(len(inputs), losses, self.rng(inputs.device))
        return inputs[rows], rows_of(batch, rows)

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Scores of the last trained block's head, shape ``(N, C)``; of a network with a readout its own forward pass."""
        *_, last = (x for _, x in zip(range(self.depth), self.activations(inputs, *context), strict=False))
        read = self.read(self.depth - 1, last, *context)
        return self.heads.scores(self.blocks, self.depth - 1, read, Batch(inputs, inputs, context))
