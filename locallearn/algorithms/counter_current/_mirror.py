"""The way back through a block: its mirror."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from locallearn.nets.pieces import kind_of

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
WEIGHTS = (nn.Linear, nn.Conv2d)
_KNOWN = (*_ACTIVATIONS, *NORMS, *_POOLS, *WEIGHTS, nn.Flatten, nn.Upsample)


class Layer(NamedTuple):
    """One layer of a block with the shapes around it, samples left out."""

    module: nn.Module
    before: torch.Size
    after: torch.Size


def trace(name: str, stage: nn.Module, x: Tensor) -> tuple[list[Layer], Tensor]:
    """The layers of a block in order, with shapes from a dry run; refuses what has no mirror."""
    layers = []
    for module in _flat(stage):
        if not isinstance(module, _KNOWN):
            raise ValueError(
                f"{name!r} contains a {kind_of(module)}, which counter-current learning cannot mirror: blocks of one "
                "linear or convolutional layer with BatchNorm, activation, pooling, flattening and upsampling can be"
            )
        try:
            with torch.no_grad():
                y = module(x)
        except Exception as error:
            raise ValueError(
                f"{name!r}: {type(module).__name__} cannot take shape {tuple(x.shape)}: {error}"
            ) from error
        layers.append(Layer(module, x.shape[1:], y.shape[1:]))
        x = y
    count = sum(isinstance(layer.module, WEIGHTS) for layer in layers)
    if count != 1:
        raise ValueError(
            f"{name!r} holds {count} linear or convolutional layers, and counter-current learning pairs one layer with one: "
            "cut the network so that every block has exactly one"
        )
    _refuse_order(name, layers)
    return layers, x


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if type(module).forward is nn.Sequential.forward:
        for child in module.children():
            yield from _flat(child)
    else:
        yield module


def _refuse_order(name: str, layers: list[Layer]) -> None:
    at = next(i for i, layer in enumerate(layers) if isinstance(layer.module, WEIGHTS))
    for i, layer in enumerate(layers):
        if i < at and isinstance(layer.module, (*_ACTIVATIONS, *NORMS)):
            raise ValueError(
                f"{name!r} has {type(layer.module).__name__} in front of its weights, where the mirror has no place for it: "
                "put it at the end of the block before"
            )
        if isinstance(layer.module, nn.Upsample) and i != at - 1:
            raise ValueError(f"{name!r} has nn.Upsample elsewhere than right in front of its convolution: put it there")


def weights(layers: list[Layer]) -> nn.Linear | nn.Conv2d:
    """The layer of a block that learns."""
    return next(layer.module for layer in layers if isinstance(layer.module, WEIGHTS))


def mirror(name: str, layers: list[Layer], before: list[Layer], biased: bool) -> nn.Sequential:
    """The way back through a block, ending with the normalisation and activation of the block before it."""
    finish = [_finish(layer.module) for layer in before if isinstance(layer.module, (*NORMS, *_ACTIVATIONS))]
    normed = [i for i, layer in enumerate(before) if isinstance(layer.module, NORMS)]  # takes every bias out again
    for layer in before[normed[0] :] if normed else ():
        if isinstance(layer.module, nn.Flatten) and layer.before != layer.after:  # what is normalised are maps
            finish = [nn.Unflatten(1, tuple(layer.before)), *finish, nn.Flatten()]
    return nn.Sequential(*_reversed(name, layers, bias=biased and not normed), *finish)


def _reversed(name: str, layers: list[Layer], bias: bool) -> Iterator[nn.Module]:
    """The block's layers from the end to the beginning, without activations and normalisations."""
    for i, (module, before, after) in reversed(list(enumerate(layers))):
        if isinstance(module, nn.Flatten) and before != after:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise ValueError(f"{name!r} flattens some dimensions only, which has no mirror here: use nn.Flatten()")
            yield nn.Unflatten(1, tuple(before))
        elif isinstance(module, nn.Linear):
            yield nn.Linear(module.out_features, module.in_features, bias=bias)
        elif isinstance(module, _POOLS):
            yield nn.Upsample(size=tuple(before[1:]))
        elif isinstance(module, nn.Conv2d):
            grown = layers[i - 1] if i > 0 and isinstance(layers[i - 1].module, nn.Upsample) else None
            if grown is None and before[1:] != after[1:]:
                yield nn.Upsample(size=tuple(before[1:]))
            strides = (1, 1) if grown is None else _strides(name, grown)
            yield _reversed_convolution(name, module, strides, bias)


def _reversed_convolution(name: str, layer: nn.Conv2d, stride: tuple[int, int], bias: bool) -> nn.Conv2d:
    if layer.groups != 1 or any(side % 2 == 0 for side in layer.kernel_size):
        raise ValueError(
            f"{name!r} has a convolution of {layer.groups} groups and kernel {tuple(layer.kernel_size)}, and only those of "
            "one group and odd kernels can be mirrored"
        )
    reach = [d * (side // 2) for d, side in zip(layer.dilation, layer.kernel_size, strict=True)]
    return nn.Conv2d(
        layer.out_channels,
        layer.in_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=stride,
        padding=(reach[0], reach[1]),
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=layer.padding_mode,
    )


def _strides(name: str, grown: Layer) -> tuple[int, int]:
    small, large = grown.before[1:], grown.after[1:]
    if any(b % a for a, b in zip(small, large, strict=True)):
        raise ValueError(f"{name!r} upsamples {tuple(small)} to {tuple(large)}, and only whole factors can be mirrored")
    return large[0] // small[0], large[1] // small[1]


def _finish(module: nn.Module) -> nn.Module:
    """The same activation; the same normalisation without weights and without running statistics."""
    if isinstance(module, NORMS):
        return type(module)(module.num_features, module.eps, affine=False, track_running_stats=False)
    return copy.deepcopy(module)
