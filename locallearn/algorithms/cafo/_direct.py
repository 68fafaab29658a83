"""Blocks trained by the network's output error, which reaches each of them through a fixed random matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.functional import cafo
from locallearn.nets.blocks import Blocks
from locallearn.nets.border import detached, main


class DirectFeedback(nn.Module):
    """Direct feedback alignment over blocks: every block gets its own vector-Jacobian product with e B_k, the last the truth.

    Args:
        sizes: entries of one sample of every block's output.
        classes: C.
        own_head: make a linear head on the last block, for networks without a readout.
    """

    def __init__(self, sizes: Sequence[int], classes: int, own_head: bool) -> None:
        super().__init__()
        self.head = nn.Linear(sizes[-1], classes) if own_head else None
        for k, size in enumerate(sizes[:-1]):
            self.register_buffer(f"feedback{k}", cafo.unit_rows(classes, size))

    def matrices(self) -> list[Tensor]:
        """B_1 … B_{K−1}, each ``(C, D_k)`` with rows of length 1."""
        return list(self.buffers())

    def scores(self, blocks: Blocks, last: Tensor) -> Tensor:
        """Class scores from the last block's output."""
        if self.head is not None:
            return torch.as_tensor(self.head(last.flatten(1)))
        assert blocks.readout is not None
        return torch.as_tensor(blocks.readout(last))

    def errors(self, outputs: Sequence[Tensor], error: Tensor) -> list[Tensor]:
        """What reaches the outputs of all blocks but the last, δ_k = e B_k, in their shapes.

        Args:
            outputs: of these blocks.
            error: e = (softmax − Y)/N, shape ``(N, C)``.
        """
        paths = zip(outputs, self.matrices(), strict=True)
        return [(error.to(matrix.dtype) @ matrix).to(h.dtype).view_as(h) for h, matrix in paths]

    def losses(self, blocks: Blocks, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One forward pass, and a loss of every block whose gradient is the rule's; the value of each is the head's.

        The last block and the head get the gradient of their cross entropy. Of the others, ⟨h_k, δ_k⟩ with δ_k fixed has the
        vector-Jacobian product with δ_k as its gradient; its own value is taken out again.

        Returns:
            The losses, and the outputs, detached, block by block.
        """
        outputs: list[Tensor] = []
        x: Any = inputs
        for block in blocks:
            x = block(detached(x))
            outputs.append(main(x))
        scores = self.scores(blocks, outputs[-1])
        loss = F.cross_entropy(scores, targets)
        value, below = loss.detach(), outputs[:-1]
        losses = []
        for h, delta in zip(below, self.errors(below, cafo.output_error(scores, targets)), strict=True):
            carried = (h * delta).sum()
            losses.append(value + (carried - carried.detach()))
        return [*losses, loss], [h.detach() for h in outputs]
