"""Directions in the space of all weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from locallearn.algorithms.base import selected
from locallearn.algorithms.forward_gradient._draws import Draws
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
        self.noise, self.count, self.combine, self.chunk = noise, count, combine, chunk or count
        self._alone = count == 1 and combine == "mean"

    def learned(self) -> dict[str, nn.Parameter]:
        """Weights that are perturbed, by name."""
        return {name: p for name, p in self.blocks.named_parameters() if p.requires_grad}

    def check(self, example: Batch) -> None:
        """Directions must fit into the space.

        Raises:
            ValueError: they do not.
        """
        size = sum(p.numel() for p in self.learned().values())
        if self.combine == "projection" and self.count > size:
            raise ValueError(
                f"tangents is {self.count}, and the network has {size} weights that learn: projection needs at most as many "
                "directions as weights"
            )

    def step(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[nn.Parameter, Tensor], Any]:
        """The loss, every weight's estimated gradient, and what is held for it; moves statistics of normalisation once."""
        learned = self.learned()
        if not learned:
            return self._lost({}, dict(self.blocks.named_buffers()), batch)[0], {}, None
        sizes = [p.numel() for p in learned.values()]
        like = next(iter(learned.values()))
        # One draw for all weights: many small ones cost more than the passes of a small network.
        drawn = tangents((self.count, sum(sizes)), self.noise, generator, like.device, like.dtype)
        shaped = {
            name: part.view(self.count, *p.shape).to(p.dtype)
            for (name, p), part in zip(learned.items(), torch.split(drawn, sizes, 1), strict=True)
        }
        buffers = dict(self.blocks.named_buffers())
        loss, slopes, moved = self._slopes({name: p.detach() for name, p in learned.items()}, shaped, buffers, batch)
        for name, buffer in buffers.items():
            if moved[name] is not buffer:
                buffer.copy_(moved[name])
        # A single direction becomes the gradient where it lies; it is not held beside it.
        whole = drawn[0].mul_(slopes[0]) if self._alone else estimate(drawn, slopes, self.combine)
        made = torch.split(whole, sizes)
        gradients = {p: part.view_as(p) for p, part in zip(learned.values(), made, strict=True)}
        return loss, gradients, None if self._alone else drawn

    def _slopes(
        self, weights: dict[str, Tensor], directions: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        def lost(weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self._lost(weights, buffers, batch)

        def slope(direction: dict[str, Tensor]) -> _Slope:
            return cast(_Slope, jvp(lost, (weights,), (direction,), has_aux=True))

        if self.count == 1:
            loss, only, moved = slope({name: v[0] for name, v in directions.items()})
            return loss, only[None], moved
        slopes = []
        draws = Draws(batch.inputs.device)
        for start in range(0, self.count, self.chunk):
            part = {name: v[start : start + self.chunk] for name, v in directions.items()}
            draws.again()  # the same dropout masks for all directions
            dims: Any = (None, 0, None)  # the loss and the buffers are the same for all
            loss, found, moved = torch.vmap(slope, out_dims=dims, randomness="same")(part)
            slopes.append(found)
        return loss, torch.cat(slopes), moved

    def _lost(
        self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Buffers are moved in place, which a derivative may not do to what it did not make; so copies are, and given back.
        own = {name: buffer.clone() for name, buffer in buffers.items()} if self.blocks.training else dict(buffers)
        outputs = functional_call(self.blocks, {**weights, **own}, (batch.inputs, *batch.context))
        return self.loss(*selected(batch, outputs)), own
