"""Directions in the space of all weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import jvp

from locallearn.algorithms.base import selected
from locallearn.algorithms.forward_gradient._passes import Draws, run, settle
from locallearn.batch import Batch
from locallearn.functional.forward_gradient import Combine, Noise, estimate, tangents
from locallearn.nets.blocks import Blocks

_Slope = tuple[Tensor, Tensor, dict[str, Tensor]]  # the loss, its derivative, and buffers as they are after the pass


class Weights:
    """One derivative of the batch's loss per direction.

    Args:
        blocks: the network.
        loss: of the task, a mean over samples.
        noise: of the directions.
        count: K.
        combine: of K directions.
        chunk: directions that pass at once.
    """

    def __init__(
        self,
        blocks: Blocks,
        loss: Callable[[Tensor, Tensor], Tensor],
        noise: Noise,
        count: int,
        combine: Combine,
        chunk: int | None,
    ) -> None:
        self.blocks, self.loss = blocks, loss
        self.noise, self.count, self.combine, self.chunk = noise, count, combine, min(chunk or count, count)
        self._alone = count == 1 and combine == "mean"

    def step(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[nn.Parameter, Tensor], Any]:
        """The loss, every weight's estimated gradient, and what is held for it; moves statistics of normalisation once.

        Raises:
            ValueError: more directions than weights, where they are projected on.
        """
        loss, gradients, kept, moved = self.estimated(batch, generator)
        settle(self.blocks, moved)
        return loss, gradients, kept

    def estimated(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor], Any, dict[str, Tensor]]:
        """The same, with the buffers as they are after the pass, which moves none."""
        learned = {name: p for name, p in self.blocks.named_parameters() if p.requires_grad}
        sizes = [p.numel() for p in learned.values()]
        if self.combine == "projection" and self.count > sum(sizes):
            raise ValueError(
                f"tangents is {self.count}, and the network has {sum(sizes)} weights that learn: projection needs at most as "
                "many directions as weights"
            )
        if not learned:
            loss, moved = self._lost({}, batch)
            return loss, {}, None, moved
        device = next(iter(learned.values())).device
        widest = reduce(torch.promote_types, (p.dtype for p in learned.values()))
        # One draw for all weights: many small ones cost more than the passes of a small network.
        drawn = tangents((self.count, sum(sizes)), self.noise, generator, device, widest)
        shaped = {
            name: part.view(self.count, *p.shape).to(p.dtype)
            for (name, p), part in zip(learned.items(), torch.split(drawn, sizes, 1), strict=True)
        }
        loss, slopes, moved = self._slopes({name: p.detach() for name, p in learned.items()}, shaped, batch)
        # A single direction becomes the gradient where it lies; it is not held beside it.
        whole = drawn[0].mul_(slopes[0]) if self._alone else estimate(drawn, slopes, self.combine)
        made = torch.split(whole, sizes)
        gradients = {p: part.view_as(p) for p, part in zip(learned.values(), made, strict=True)}
        return loss, gradients, None if self._alone else drawn, moved

    try_out = step

    def _slopes(self, weights: dict[str, Tensor], directions: dict[str, Tensor], batch: Batch) -> _Slope:
        def lost(weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self._lost(weights, batch)

        def slope(direction: dict[str, Tensor]) -> _Slope:
            return cast(_Slope, jvp(lost, (weights,), (direction,), has_aux=True))

        slopes = []
        draws = Draws(batch.inputs.device)
        for start in range(0, self.count, self.chunk):
            part = {name: v[start : start + self.chunk] for name, v in directions.items()}
            draws.again()  # the same dropout masks for all directions
            if self.chunk == 1:  # needs no operation that takes several at once
                loss, only, moved = slope({name: v[0] for name, v in part.items()})
                slopes.append(only[None])
                continue
            dims: Any = (None, 0, None)  # the loss and the buffers are the same for all
            loss, found, moved = torch.vmap(slope, out_dims=dims, randomness="same")(part)
            slopes.append(found)
        return loss, torch.cat(slopes), moved

    def _lost(self, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, moved = run(self.blocks, weights, batch)
        return self.loss(*selected(batch, outputs)), moved
