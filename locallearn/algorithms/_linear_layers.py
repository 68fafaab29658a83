"""Linear and convolutional layers as linear maps of rows, found in any network in the order in which it runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms.base import refuse_made_weights
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks, fitted
from locallearn.nets.border import main

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class LinearLayer:
    """One layer of weights, ``rows(x) @ W + b``.

    Attributes:
        name: its block's name where it is alone in it, else with its path inside of it.
        module: it.
        place: index of its block; the number of blocks for the readout.
        calls: how often one forward pass runs it.
        positions: rows that one sample gives in one call: places of a map, tokens.
        after: leaf modules that are run between it and the next such layer.
    """

    name: str
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    place: int
    calls: int
    positions: int
    after: tuple[nn.Module, ...]

    @property
    def features(self) -> int:
        """D, entries of a row."""
        return self.module.weight[0].numel()

    @property
    def width(self) -> int:
        """Outputs of a row."""
        return len(self.module.weight)

    def rows(self, inputs: Tensor) -> Tensor:
        """What the weights multiply, shape ``(samples · positions, D)``.

        Of a convolution these are patches in the order channel, row, column, with borders as the layer has them.
        """
        module = self.module
        if isinstance(module, nn.Linear):
            return inputs.reshape(-1, inputs.shape[-1])
        if module.padding_mode == "zeros":
            x = F.pad(inputs, module._reversed_padding_repeated_twice)
        else:
            x = F.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        kernel, stride, dilation = (tuple(v) for v in (module.kernel_size, module.stride, module.dilation))
        if isinstance(module, nn.Conv1d):
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        patches = F.unfold(x, kernel, dilation, stride=stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])

    @torch.no_grad()
    def write(self, weights: Tensor, intercept: Tensor) -> None:
        """Take over W ``(D, width)`` and b ``(width,)``."""
        self.module.weight.copy_(weights.T.reshape(self.module.weight.shape))
        if self.module.bias is not None:
            self.module.bias.copy_(intercept)


class _Reached(Exception):
    """The layer has been given its last input; what comes after it need not be run."""


def read(layer: LinearLayer, run: Callable[[], Any]) -> list[Tensor]:
    """What a layer is given when ``run`` runs its block, call by call; the block is left at the last one."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # what is read again later must not be what the next layer has overwritten
        seen.append(args[0].detach() if layer.calls == 1 else args[0].detach().clone())
        if len(seen) == layer.calls:
            raise _Reached

    hook = layer.module.register_forward_pre_hook(note)
    try:
        with suppress(_Reached):
            run()
    finally:
        hook.remove()
    return seen


def find_layers(blocks: Blocks, example: Batch, owner: str, *, last_alone: bool = False) -> list[LinearLayer]:
    """All of a network's linear and convolutional layers, in the order in which a pass runs them first.

    Args:
        blocks: the network, in eval mode; it must have a readout.
        example: a batch to run.
        owner: the rule that asks.
        last_alone: the rule fits the last layer alone, so that the others may be what they like, as frozen ones may.

    Raises:
        ValueError: the network's output is not what its last such layer gives, or a layer that is to be fitted cannot be:
            groups, weights made from others, samples that are not in front.
    """
    places = [*zip(blocks.names, blocks, strict=True), ("readout", blocks.readout)]
    held = {
        id(m): (place, name, path, m)
        for place, (name, part) in enumerate(places)
        if part is not None
        for path, m in part.named_modules()
    }
    alone = [sum(isinstance(m, KINDS) for _, _, _, m in _of(held, place)) == 1 for place in range(len(places))]
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # a copy, for an activation that works in place would make it look like the network's output
        calls.append((module, next(iter(args), None), output.clone() if isinstance(module, KINDS) else output))

    hooks = [
        m.register_forward_hook(note)
        for _, _, _, m in held.values()
        if isinstance(m, KINDS) or not any(True for _ in m.children())
    ]
    inputs = fitted(blocks, example.inputs)
    try:
        with torch.no_grad():
            output = blocks(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    order = [m for m, _, _ in calls]
    layers: list[LinearLayer] = []
    called = list(dict.fromkeys(m for m in order if isinstance(m, KINDS)))
    for module in called:
        place, block, path, _ = held[id(module)]
        name = block if alone[place] or not path else f"{block}.{path}"
        given, made = next((x, y) for m, x, y in calls if m is module)
        learns = not last_alone and any(p.requires_grad for key, p in module.named_parameters() if key != "bias")
        if learns or module is called[-1]:
            _refuse_unfit(name, module, given, len(inputs), owner)
        first = order.index(module)
        stop = next((i for i in range(first + 1, len(order)) if isinstance(order[i], KINDS)), len(order))
        positions = prod(made.shape[1:-1] if isinstance(module, nn.Linear) else made.shape[2:])
        layers.append(LinearLayer(name, module, place, order.count(module), positions, tuple(order[first + 1 : stop])))
    last = [y for m, _, y in calls if layers and m is layers[-1].module]
    found = main(output)
    if not last or layers[-1].place != len(blocks) or len(last) != 1 or last[0].numel() != found.numel():
        what = "ends in no linear layer"
    elif not torch.equal(last[0].reshape(found.shape), found) or not all(
        _keeps(m, x) for m, x, _ in calls[max(i for i, call in enumerate(calls) if call[0] is layers[-1].module) + 1 :]
    ):
        what = f"changes what its last linear layer {layers[-1].name!r} gives (an activation, a pooling?)"
    else:
        return layers
    raise ValueError(
        f"{owner} fits the network's output in closed form, and the readout of this network {what}: give it a readout that is "
        "linear"
    )


def _keeps(module: nn.Module, given: Any) -> bool:
    """Whether a module hands numbers on as they are, those of the other sign, too: a ReLU keeps what happens to be positive."""
    if not isinstance(given, Tensor):
        return True
    turned = -given
    with torch.no_grad():
        made = module(turned.clone())
    return made.numel() == turned.numel() and torch.equal(made.reshape(turned.shape), turned)


def _refuse_unfit(name: str, module: nn.Module, given: Any, samples: int, owner: str) -> None:
    refuse_made_weights(name, module, owner)
    if not isinstance(module, nn.Linear) and module.groups != 1:
        raise ValueError(
            f"layer {name!r} is a convolution in {module.groups} groups, and {owner} fits those without: set groups=1, "
            "freeze its weights to keep them as they are, or use another rule"
        )
    if not isinstance(given, Tensor):
        raise ValueError(
            f"layer {name!r} is called without a positional argument, and {owner} reads what it is given there: call it as "
            "layer(x)"
        )
    if len(given) != samples:
        raise ValueError(
            f"layer {name!r} is given a tensor of shape {tuple(given.shape)} for {samples} samples, and {owner} has to "
            "know the samples by its first dimension: use a network that keeps them there"
        )


def _of(held: dict[int, tuple[int, str, str, nn.Module]], place: int) -> Sequence[tuple[int, str, str, nn.Module]]:
    return [entry for entry in held.values() if entry[0] == place]
