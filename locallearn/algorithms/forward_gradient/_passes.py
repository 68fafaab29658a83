"""Several passes that draw the same and move state once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from locallearn.algorithms._selection import sample_losses
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks


class Draws:
    """PyTorch's global generator as it was, for passes that have to draw the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state: Any = None

    def again(self) -> None:
        """Begin with the same draws as the first time."""
        cuda = self._device.type == "cuda"
        if self._state is None:
            self._state = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if cuda else None
            return
        torch.set_rng_state(self._state[0])
        if cuda:
            torch.cuda.set_rng_state(self._state[1], self._device)


def run(blocks: Blocks, weights: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A pass with other weights that leaves the network as it was.

    Buffers that a pass writes into may not be those of the network, of which a derivative knows nothing; so copies are, and
    what a pass puts in their place is given back, too.

    Args:
        blocks: the network.
        weights: in place of its own, by name; those that are missing are its own.
        batch: what it reads.

    Returns:
        The outputs, and all buffers as they are after the pass.
    """
    buffers = {name: buffer.clone() for name, buffer in blocks.named_buffers()}
    given = {**weights, **buffers}
    outputs: Tensor = functional_call(blocks, given, (batch.inputs, *batch.context))
    return outputs, {name: given[name] for name in buffers}


def settle(blocks: Blocks, moved: Mapping[str, Tensor]) -> None:
    """Make these the network's buffers."""
    for name, buffer in blocks.named_buffers():
        buffer.copy_(moved[name])


def refuse_no_mean(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor, owner: str, advice: str
) -> None:
    """The mean of the samples' losses must be the batch's.

    Raises:
        ValueError: it is not; ``owner`` is who asks, ``advice`` what to do.
    """
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # rounding is no difference
    mean, whole = sample_losses(loss, wide, targets).mean(), loss(wide, targets)
    if not torch.isclose(mean, whole.to(mean.dtype), rtol=1e-3, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"the mean of the samples' losses is {float(mean):.6g} and the loss of the batch {float(whole):.6g} (weights of "
            f"classes, ignored targets, a sum?), and {owner} take every sample's loss by itself: {advice}"
        )
