"""Layer collaboration: Forward-Forward in which every block knows how sure the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from locallearn.algorithms.base import Locality, TaskInfo, Update, choices
from locallearn.algorithms.forward_forward.frame import LabelledGoodness
from locallearn.batch import Batch
from locallearn.functional import layer_collaboration as lc
from locallearn.functional.layer_collaboration import Gamma, NegativeLoss, Order, Threshold
from locallearn.losses.layer_collaboration import LayerCollaborationLoss


class LayerCollaboration(LabelledGoodness):
    """Layer Collaboration in the Forward-Forward algorithm (Lorberbom et al., AAAI 2024, arXiv 2305.12393).

    As in Forward-Forward the label is written into the input, and block l is to be loud on right data and quiet on wrong
    data; but it learns from sigma(G_l + gamma_l - theta_l), where gamma_l is the summed goodness of other blocks on the same
    rows, a constant for it. So a sample that the others tell right already counts less. Every block that entered a sum is
    summed at inference, the first one, too.

    Deviations, where the paper is silent or could not be read: thresholds grow with the number of entries in the sum; wrong
    labels are uniform; in the joint schedule all blocks see the goodness from before any of them has learned from the batch
    (``order="jacobi"``). With ``gamma="all"`` this takes one more pass of both halves, so that no more than one block's
    graph is alive.

    Args:
        gamma: ``"all"``: goodness of all other blocks; ``"previous"``: of the earlier ones.
        threshold: ``"scaled"``: theta per entry of all blocks in the sum; ``"fixed"``: theta per entry of the block alone;
            ``"midpoint"``: halfway between the batch's mean scores of positives and of negatives.
        theta: goodness per entry at which a sample is undecided; means nothing with ``threshold="midpoint"``.
        negative_loss: ``"softplus"``: negatives descend softplus(G + gamma - theta); ``"log_p"``: they descend log p.
        order: ``"jacobi"``: gamma from one pass for all blocks; ``"gauss_seidel"``: a new pass before every block's step,
            through blocks that have learned from the batch already.
        label_strength: value of the label's slot.
        seed: of the negatives.

    Raises:
        ValueError: an unknown choice, or a theta that means nothing.
    """

    def __init__(
        self,
        gamma: Gamma = "all",
        threshold: Threshold = "scaled",
        theta: float = 1.0,
        negative_loss: NegativeLoss = "softplus",
        order: Order = "jacobi",
        label_strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(label_strength, minimise=False, seed=seed)
        for name, value, known in (
            ("gamma", gamma, get_args(Gamma)),
            ("threshold", threshold, get_args(Threshold)),
            ("negative_loss", negative_loss, get_args(NegativeLoss)),
            ("order", order, get_args(Order)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, known))}")
        if threshold == "midpoint" and theta != 1.0:
            raise ValueError(f"theta is {theta!r}, and threshold='midpoint' finds its own: leave theta at 1.0")
        self.gamma = gamma
        self.threshold = threshold
        self.theta = theta
        self.negative_loss = negative_loss
        self.order = order
        self._scores: dict[int, Tensor] = {}

    @property
    def locality(self) -> Locality:
        """Layer-local where only earlier blocks are heard; else later blocks weigh what earlier ones learn from."""
        return Locality.COUPLED if self.gamma == "all" else Locality.LAYER_LOCAL

    @property
    def broadcast(self) -> str:
        """Label, bit, and one number per row."""
        heard = "all other" if self.gamma == "all" else "earlier"
        return f"label in the input, positive/negative bit, summed goodness of {heard} blocks"

    @property
    def variant(self) -> str:
        """Whose goodness is heard, and what else makes another rule of it."""
        chosen = choices(self, LayerCollaboration.__init__, "threshold", "negative_loss", "order")
        return ", ".join(filter(None, (f"gamma={self.gamma}", chosen)))

    @property
    def stages(self) -> list[list[str]]:
        """One block after the other.

        Raises:
            ValueError: a block would hear those that have not trained yet.
        """
        if self.gamma == "all":
            raise ValueError(
                "gamma=all sums the goodness of all blocks, and in a sequential schedule the later ones have not trained yet: "
                "set algorithm.gamma=previous, or use schedule=joint"
            )
        return super().stages

    def build(self, task: TaskInfo) -> None:
        """Give every block its threshold."""
        sizes = self.check(task)
        self.local = torch.nn.ModuleList()
        for i in range(len(sizes)):
            theta = (
                None if self.threshold == "midpoint" else lc.threshold(i, sizes, self.gamma, self.threshold, self.theta)
            )
            self.local.append(LayerCollaborationLoss(theta, self.negative_loss))

    # -- the way of a batch ----------------------------------------------------------------------------------------------
    def updates(self, batch: Batch) -> Iterator[Update]:
        """Every block's update, from goodness as it was before the batch, or as it is by then."""
        self._scores = {}
        yield from super().updates(batch) if self.order == "jacobi" else self._one_by_one(batch)
        self._scores = {}

    def _one_by_one(self, batch: Batch) -> Iterator[Update]:
        prepared = super().prepare(batch)
        for i, name in enumerate(self.blocks.names):
            if self.trains(name):
                self._scores = {}
                x = self._hear(prepared, range(i))
                if self.gamma == "all":
                    self._hear(prepared, range(i, len(self.blocks)), x)
                output = self.run(i, x, prepared)
                yield Update(name, self.local_loss(i, output, prepared), again=self._once_more(i, x, prepared))
                del output

    def _once_more(self, index: int, inputs: Tensor, prepared: Batch) -> Callable[[], Tensor]:
        return lambda: self.local_loss(index, self.run(index, inputs, prepared), prepared)

    def prepare(self, batch: Batch) -> Batch:
        """Positives on top of negatives; with ``gamma="all"`` all blocks are heard before the first one learns."""
        prepared = super().prepare(batch)
        if self.gamma == "all":
            self._hear(prepared, range(len(self.blocks)))
        return prepared

    def run(self, index: int, inputs: Tensor, batch: Batch) -> Tensor:
        """Run a block and keep its goodness, one number per row."""
        output: Tensor = super().run(index, inputs, batch)
        if index not in self._scores:  # an optimizer that asks again has moved the weights by then
            self._scores[index] = self.goodness_of(output.detach())
        return output

    def local_loss(self, index: int, output: Tensor, batch: Batch) -> Tensor:
        """The loss of a block that knows the goodness of the others."""
        others = range(len(self.blocks)) if self.gamma == "all" else range(index)
        own = self._scores[index]
        gamma = sum((self._scores[i] for i in others if i != index), torch.zeros_like(own))
        positive, negative = output.chunk(2)
        loss: Tensor = self.local[index](positive, negative, *gamma.chunk(2))
        return loss

    @torch.no_grad()
    def _hear(self, prepared: Batch, blocks: range, inputs: Tensor | None = None) -> Tensor:
        """Run these blocks for their goodness alone; what comes out behind the last one."""
        x = prepared.inputs if inputs is None else inputs
        for i in blocks:
            output = self.run(i, x, prepared)
            x = self.emit(i, output)
        return x
