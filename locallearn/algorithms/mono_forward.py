"""Mono-Forward: every block is trained by the cross entropy of its own linear projection."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from locallearn.algorithms._selection import By
from locallearn.algorithms.local_heads import LocalHeads
from locallearn.batch import Batch

Prediction = Literal["bp", "ff"]


class MonoForward(LocalHeads):
    """Mono-Forward (Gong, Li and Abdulla, arXiv 2501.09238): the simplest member of the frame of local heads.

    Block i has a projection M_i, shape ``(C, d_i)``, and learns with it from L_i = CE(softmax(a_i M_i^T), y), where a_i
    is the block's flattened output. No gradient leaves the block.

    Deviation: the network's own readout serves as the last block's projection M_L, so that backpropagation and
    Mono-Forward train the same network; a network without one gets an M_L like the others. There is no projection of
    the raw input.

    Args:
        prediction: ``"bp"``: argmax of the last block's goodness, the paper's recommendation; ``"ff"``: of the sum over
            all blocks.
        seed: of the projections, and of a random choice.
        keep: share of every batch that goes on behind a block, see :class:`~locallearn.algorithms.LocalHeads`.
        keep_by: which part that is.
        keep_after: behind which block.
    """

    _owner: ClassVar[str] = "Mono-Forward"

    def __init__(
        self,
        prediction: Prediction = "bp",
        seed: int = 0,
        keep: float = 1.0,
        keep_by: By = "loss",
        keep_after: str | None = None,
    ) -> None:
        super().__init__(seed, keep, keep_by, keep_after)
        if prediction not in get_args(Prediction):
            raise ValueError(f"prediction is {prediction!r}, expected 'bp' (last block) or 'ff' (sum over blocks)")
        self.prediction = prediction

    def predict(self, inputs: Tensor, *context: Any) -> Tensor:
        """Goodness of the last trained block, or the sum over blocks, shape ``(N, C)``."""
        if self.prediction == "bp":
            return super().predict(inputs, *context)
        batch = Batch(inputs, inputs, context)
        outputs = zip(range(self.depth), self.activations(inputs, *context), strict=False)
        first, *others = (self.heads.scores(self.blocks, i, output, batch) for i, output in outputs)
        return sum(others, start=first)
