"""The multilayer perceptron and the plain convolutional network of the Mono-Forward and Forward-Forward papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

from torch import Tensor, nn

from locallearn.nets.blocks import Blocks

Init = Literal["kaiming_uniform", "lecun_normal"]


def _kaiming_uniform(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)


def _lecun_normal(weight: Tensor) -> None:
    fan_in = weight[0].numel()
    nn.init.normal_(weight, std=fan_in**-0.5)


_INITS: dict[str, Callable[[Tensor], None]] = {"kaiming_uniform": _kaiming_uniform, "lecun_normal": _lecun_normal}


def initialise(module: nn.Module, init: Init) -> None:
    """Draw every linear and convolutional weight of ``module`` afresh, and set its biases to zero.

    ``kaiming_uniform``: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's own choice for weights.
    ``lecun_normal``: N(0, 1/fan_in), the choice of Hinton's Forward-Forward code.

    Raises:
        ValueError: an unknown name.
    """
    if init not in _INITS:
        raise ValueError(f"init is {init!r}, expected one of {', '.join(_INITS)}")
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            _INITS[init](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def mlp(
    input_shape: Sequence[int],
    outputs: int,
    hidden: Sequence[int] = (1000, 1000),
    readout_bias: bool = False,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """Blocks of ``Linear -> ReLU``, inputs flattened, and a linear readout.

    The readout has no bias unless asked for, so that it is the same map as Mono-Forward's projection of the last
    block and both rules train the same number of weights.

    Args:
        input_shape: shape of one sample, e.g. ``(1, 28, 28)``.
        outputs: number of classes.
        hidden: width of every block.
        readout_bias: whether the readout has a bias.
        init: see :func:`initialise`.

    Raises:
        ValueError: no hidden width, or one below 1.
    """
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(f"hidden is {list(hidden)}, expected at least one positive width")
    width = prod(input_shape)
    blocks: dict[str, nn.Module] = {}
    for i, units in enumerate(hidden):
        layers: list[nn.Module] = [nn.Linear(width, units), nn.ReLU()]
        if i == 0 and len(input_shape) > 1:
            layers.insert(0, nn.Flatten())
        blocks[f"layer{i + 1}"] = nn.Sequential(*layers)
        width = units
    net = Blocks(blocks, nn.Linear(width, outputs, bias=readout_bias))
    initialise(net, init)
    return net


def cnn(
    input_shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (64, 128, 256, 512),
    batch_norm: bool = False,
    readout_bias: bool = False,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """Blocks of ``Conv 3x3 (pad 1) -> ReLU -> average pool 2``, and a linear readout of the flattened map.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        channels: output channels of every block; each halves height and width.
        batch_norm: put a BatchNorm before the ReLU.
        readout_bias: whether the readout has a bias.
        init: see :func:`initialise`.

    Raises:
        ValueError: the input is not an image, or too small for that many poolings; no channels, or fewer than 1 in a
            block.
    """
    if len(input_shape) != 3:
        raise ValueError(f"input_shape is {tuple(input_shape)}, expected (channels, height, width)")
    if not channels or any(after < 1 for after in channels):
        raise ValueError(f"channels is {list(channels)}, expected at least one positive number of channels")
    before, height, width = input_shape
    if min(height, width) < 2 ** len(channels):
        raise ValueError(
            f"{len(channels)} blocks halve a {height}x{width} image {len(channels)} times, which leaves nothing: "
            f"use at most {min(height, width).bit_length() - 1} blocks"
        )
    blocks: dict[str, nn.Module] = {}
    for i, after in enumerate(channels):
        norm: list[nn.Module] = [nn.BatchNorm2d(after)] if batch_norm else []
        blocks[f"conv{i + 1}"] = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), *norm, nn.ReLU(), nn.AvgPool2d(2)
        )
        before, height, width = after, height // 2, width // 2
    net = Blocks(blocks, nn.Sequential(nn.Flatten(), nn.Linear(before * height * width, outputs, bias=readout_bias)))
    initialise(net, init)
    return net
