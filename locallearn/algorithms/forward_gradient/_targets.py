"""What a guess is compared with: the derivative along it of a loss that lies above the block, had by a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from locallearn.algorithms._selection import each_loss
from locallearn.algorithms.forward_gradient._guesses import Call, Guesses, hooked, moved_outputs

Loss = Callable[[Tensor, Tensor], Tensor]


class Chain(nn.Module):
    """Modules in a row that are run without a trace: what they write into buffers goes into copies.

    Args:
        parts: in the order of the forward pass.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """One after the other, buffers and all."""
        for part in self.parts:
            x = part(x)
        return x

    def still(self, x: Tensor) -> Tensor:
        """The same, and the buffers stay."""
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return cast(Tensor, functional_call(self, buffers, (x,))) if buffers else self(x)


def slopes_at_output(
    above: Chain, loss: Loss, output: Tensor, guesses: Guesses, targets: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """One pass through what lies above a block, its output moving along the guess.

    Samples must not see one another above. Then the derivative of ℓ_n/N along the guesses of all samples at once is that along
    the guess of sample n: ⟨G_n, G̃_n⟩, of all samples in one pass.

    Args:
        above: ends with scores.
        loss: of scores and targets, a mean over samples.
        output: of the block.
        guesses: one.
        targets: of the batch.

    Returns:
        Losses ℓ_n/N, ``(N,)``, and the derivatives ``(N,)``.
    """
    [guess] = guesses

    def lost(output: Tensor) -> Tensor:
        return each_loss(loss, above.still(output), targets) / len(output)

    losses, slopes = cast(tuple[Tensor, Tensor], jvp(lost, (output,), (guess.values.to(output.dtype),)))
    return losses, [slopes]


def slopes_at_weights(
    block: nn.Module,
    above: Chain,
    loss: Loss,
    inputs: Tensor,
    calls: Sequence[Call],
    guesses: Guesses,
    targets: Tensor,
    chunk: int | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """One pass through a block and what lies above, with a direction for every one of its weights.

    A weight's direction enters as the movement of what its layers put out, which may be another one for every sample
    (:class:`~locallearn.algorithms.forward_gradient._guesses.OnWeights`).

    Args:
        block: whose weights are guessed at.
        above: what lies above it; see :func:`slopes_at_output`.
        loss: the same.
        inputs: of the block.
        calls: of its layers, in order, as they are when it runs on them.
        guesses: T of them.
        targets: of the batch.
        chunk: directions that pass at once; ``None``: all.

    Returns:
        Losses ℓ_n/N, ``(N,)``, and of every guess the derivatives, ``(N,)``; no losses where there is no guess.
    """
    whole = Chain([block, *above.parts])
    still = [torch.zeros_like(call.output) for call in calls]

    def lost(moves: list[Tensor]) -> Tensor:
        left = iter(moves)

        def move(layer: nn.Module, given: Any, named: Any, output: Tensor) -> Tensor:
            return output + next(left)

        with hooked(block, move):
            return each_loss(loss, whole.still(inputs), targets) / len(inputs)

    def along(number: int) -> Iterator[Tensor]:
        weight, values = guesses[number]
        for call, nothing in zip(calls, still, strict=True):
            if weight is None or not any(weight is p for p in call.layer.parameters(recurse=False)):
                yield nothing
                continue
            with torch.autocast(inputs.device.type, enabled=False):
                yield moved_outputs(call.layer, weight, call.read, values, call.output).to(call.output.dtype)

    def slope(moves: list[Tensor]) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], jvp(lost, (still,), (moves,)))

    losses: Tensor | None = None
    found: list[Tensor] = []
    count = chunk or max(1, len(guesses))
    for start in range(0, len(guesses), count):
        part = [list(along(number)) for number in range(start, min(start + count, len(guesses)))]
        if len(part) == 1:  # needs no operation that takes several at once
            losses, only = slope(part[0])
            found.append(only)
            continue
        moves = [torch.stack(moves) for moves in zip(*part, strict=True)]
        dims: Any = (None, 0)  # the losses are the same for all
        losses, several = torch.vmap(slope, out_dims=dims, randomness="same")(moves)
        found += several.unbind()
    return losses, found
