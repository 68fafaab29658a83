"""The multilayer perceptron and the plain convolutional network of the Mono-Forward and Forward-Forward papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from locallearn.nets.activations import Mod2, Square
from locallearn.nets.blocks import Blocks

_T = TypeVar("_T")
Init = Literal["pytorch", "kaiming_uniform", "he_uniform", "xavier_uniform", "lecun_normal", "orthogonal"]
Activation = Literal["relu", "leaky_relu", "elu", "tanh", "mod2", "square"]
Pool = Literal["avg", "max"]
Border = Literal["replicate", "none", "zeros"]


def _kaiming_uniform(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)


def _lecun_normal(weight: Tensor) -> None:
    fan_in = weight[0].numel()
    nn.init.normal_(weight, std=fan_in**-0.5)


def _orthogonal(weight: Tensor) -> None:
    """Over the larger of the two numbers of channels, each with the kernel's other side."""
    if weight.ndim == 2 or weight.shape[0] >= weight.shape[1]:
        nn.init.orthogonal_(weight)
    else:
        turned = nn.init.orthogonal_(weight.new_empty(weight.transpose(0, 1).shape))
        with torch.no_grad():
            weight.copy_(turned.transpose(0, 1))


_INITS: dict[str, Callable[[Tensor], Any] | None] = {
    "pytorch": None,  # the layer knows
    "kaiming_uniform": _kaiming_uniform,
    "he_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "lecun_normal": _lecun_normal,
    "orthogonal": _orthogonal,
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "mod2": Mod2,
    "square": Square,
}
_POOLS: dict[str, Callable[[int], nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def initialise(module: nn.Module, init: Init) -> None:
    """Draw every linear and convolutional weight of ``module`` afresh, and set its biases to zero.

    ``pytorch``: the layers' own start, biases and all: both U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    ``kaiming_uniform``: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's own choice for weights alone.
    ``he_uniform``: U(-sqrt(6/fan_in), sqrt(6/fan_in)) (He et al. 2015).
    ``xavier_uniform``: U(-sqrt(6/(fan_in+fan_out)), ...) (Glorot and Bengio 2010).
    ``lecun_normal``: N(0, 1/fan_in), the choice of Hinton's Forward-Forward code.
    ``orthogonal``: rows or columns orthonormal (Saxe et al. 2014). A convolution is laid out with its larger number of
    channels in front, as in the code of Kao and Hariharan (arXiv 2409.19841): outputs by inputs · kernel, or inputs by
    outputs · kernel where there are more inputs than outputs.

    Raises:
        ValueError: an unknown name.
    """
    draw = choice("init", init, _INITS)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if draw is None:
                layer.reset_parameters()
                continue
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def choice(what: str, name: str, known: Mapping[str, _T]) -> _T:
    """What goes by this name.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if name not in known:
        raise ValueError(f"{what} is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def image_size(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of one sample.

    Raises:
        ValueError: it is no image.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape is {tuple(input_shape)}, expected (channels, height, width): this network takes images"
        )
    channels, height, width = input_shape
    return channels, height, width


def check_dropout(probability: float) -> None:
    """Refuse what is no probability of dropping.

    Raises:
        ValueError: it is below 0, or 1 and above.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout is {probability}, expected a probability from 0 to below 1")


def activation_layer(name: Activation) -> nn.Module:
    """A new activation of this name.

    Raises:
        ValueError: an unknown name.
    """
    return choice("activation", name, _ACTIVATIONS)()


def mlp(
    input_shape: Sequence[int],
    outputs: int,
    hidden: Sequence[int] = (1000, 1000),
    activation: Activation = "relu",
    bias: bool = True,
    readout_bias: bool = False,
    batch_norm: bool = False,
    dropout: float = 0.0,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """Blocks of ``Linear -> activation``, inputs flattened, and a linear readout.

    The readout has no bias unless asked for, so that it is the same map as Mono-Forward's projection of the last
    block and both rules train the same number of weights.

    Args:
        input_shape: shape of one sample, e.g. ``(1, 28, 28)``.
        outputs: number of classes.
        hidden: width of every block.
        activation: ``relu``, ``leaky_relu`` (slope .01), ``elu``, ``tanh``, ``mod2`` (x modulo 2) or ``square``.
        bias: whether the blocks have biases.
        readout_bias: whether the readout has a bias.
        batch_norm: put a BatchNorm before the activation.
        dropout: probability, of what every block but the first is given, and the readout: a block's own output is whole.
        init: see :func:`initialise`.

    Raises:
        ValueError: no hidden width, or one below 1; no probability; an unknown activation or init.
    """
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(f"hidden is {list(hidden)}, expected at least one positive width")
    check_dropout(dropout)
    width = prod(input_shape)
    blocks: dict[str, nn.Module] = {}
    before: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for i, units in enumerate(hidden):
        norm: list[nn.Module] = [nn.BatchNorm1d(units)] if batch_norm else []
        layers = [*before, nn.Linear(width, units, bias=bias), *norm, activation_layer(activation)]
        blocks[f"layer{i + 1}"] = nn.Sequential(*layers)
        width, before = units, [nn.Dropout(dropout)] if dropout else []
    readout = nn.Linear(width, outputs, bias=readout_bias)
    net = Blocks(blocks, nn.Sequential(*before, readout) if before and dropout else readout)
    initialise(net, init)
    return net


def cnn(
    input_shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (64, 128, 256, 512),
    kernel_size: int = 3,
    padding: int = 1,
    activation: Activation = "relu",
    pool: Pool = "avg",
    batch_norm: bool = False,
    bias: bool = True,
    readout_bias: bool = False,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """Blocks of ``Conv -> activation -> pool 2``, and a linear readout of the flattened map.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        channels: output channels of every block; each pooling halves height and width.
        kernel_size: of every convolution.
        padding: zeros around every convolution's input; with 1 and kernels of 3 only poolings shrink the map.
        activation: ``relu``, ``leaky_relu`` (slope .01), ``elu``, ``tanh``, ``mod2`` (x modulo 2) or ``square``.
        pool: ``avg`` or ``max``, over 2x2.
        batch_norm: put a BatchNorm before the activation.
        bias: whether the convolutions have biases.
        readout_bias: whether the readout has a bias.
        init: see :func:`initialise`.

    Raises:
        ValueError: the input is not an image, or too small for that many poolings; no channels, or fewer than 1 in a
            block; an unknown activation, pool or init.
    """
    before, height, width = image_size(input_shape)
    check_channels(channels)
    blocks: dict[str, nn.Module] = {}
    for i, after in enumerate(channels):
        height, width = ((side + 2 * padding - kernel_size + 1) // 2 for side in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"nothing is left of a {input_shape[1]}x{input_shape[2]} image in block {i + 1} of {len(channels)}, after "
                f"convolutions of {kernel_size} with padding {padding} and poolings of 2: {fewer(i)}"
            )
        norm: list[nn.Module] = [nn.BatchNorm2d(after)] if batch_norm else []
        blocks[f"conv{i + 1}"] = nn.Sequential(
            nn.Conv2d(before, after, kernel_size, padding=padding, bias=bias),
            *norm,
            activation_layer(activation),
            choice("pool", pool, _POOLS)(2),
        )
        before = after
    net = Blocks(blocks, nn.Sequential(nn.Flatten(), nn.Linear(before * height * width, outputs, bias=readout_bias)))
    initialise(net, init)
    return net


def cafo_cnn(
    input_shape: Sequence[int], outputs: int, channels: Sequence[int] = (32, 128, 512), bias: bool = True
) -> Blocks:
    """The network of Cascaded Forward (Zhao et al., arXiv 2303.09728) as in its official code.

    Blocks of ``Conv 3x3 -> ReLU -> max pool 2 -> BatchNorm`` (eps 1e-4), weights and biases as PyTorch draws them, and a
    linear readout of the flattened map without a bias.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        channels: output channels of every block; each pooling halves height and width.
        bias: whether the convolutions have biases.

    Raises:
        ValueError: the input is not an image, or too small for that many poolings; no channels, or fewer than 1 in a block.
    """
    before, height, width = image_size(input_shape)
    check_channels(channels)
    blocks: dict[str, nn.Module] = {}
    for i, after in enumerate(channels):
        height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ValueError(
                f"nothing is left of a {input_shape[1]}x{input_shape[2]} image in block {i + 1} of {len(channels)}, after "
                f"poolings of 2: {fewer(i)}"
            )
        blocks[f"conv{i + 1}"] = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(after, eps=1e-4),
        )
        before = after
    return Blocks(blocks, nn.Sequential(nn.Flatten(), nn.Linear(before * height * width, outputs, bias=False)))


def forward_projection_cnn(
    input_shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (16, 32, 64),
    border: Border = "replicate",
    activation: Activation = "relu",
    average: bool = True,
    readout_bias: bool = True,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """The convolutional network of Forward Projection (O'Shea and Rajendran, arXiv 2501.16476) as in its official code.

    Blocks of two convolutions 3x3 with biases, the first with stride 1, the second with stride 2, each with its activation;
    no pooling; a linear readout of the mean over places.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        channels: output channels of both convolutions of every block.
        border: ``replicate``: copied rows and columns around every convolution's input, as in the paper's CIFAR runs; ``none``,
            as in its other runs; ``zeros``.
        activation: ``relu``, ``leaky_relu`` (slope .01), ``elu``, ``tanh``, ``mod2`` (x modulo 2) or ``square``.
        average: take the mean over places in front of the readout; else it reads the flattened map.
        readout_bias: whether the readout has a bias.
        init: see :func:`initialise`.

    Raises:
        ValueError: the input is not an image, or too small for that many blocks; no channels, or fewer than 1 in a block; an
            unknown border, activation or init.
    """
    before, height, width = image_size(input_shape)
    check_channels(channels)
    modes: dict[str, Literal["zeros", "replicate"]] = {"replicate": "replicate", "none": "zeros", "zeros": "zeros"}
    mode, padding = choice("border", border, modes), int(border != "none")
    blocks: dict[str, nn.Module] = {}
    for i, after in enumerate(channels):
        height, width = ((side - 3 + 4 * padding - 2) // 2 + 1 for side in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"nothing is left of a {input_shape[1]}x{input_shape[2]} image in block {i + 1} of {len(channels)}, after "
                f"convolutions of 3 with strides 1 and 2 and border {border}: {fewer(i)}"
            )
        blocks[f"block{i + 1}"] = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=padding, padding_mode=mode),
            activation_layer(activation),
            nn.Conv2d(after, after, 3, stride=2, padding=padding, padding_mode=mode),
            activation_layer(activation),
        )
        before = after
    pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if average else []
    size = before if average else before * height * width
    net = Blocks(blocks, nn.Sequential(*pool, nn.Flatten(), nn.Linear(size, outputs, bias=readout_bias)))
    initialise(net, init)
    return net


def check_channels(channels: Sequence[int]) -> None:
    """Refuse an empty list, or fewer channels than one."""
    if not channels or any(after < 1 for after in channels):
        raise ValueError(f"channels is {list(channels)}, expected at least one positive number of channels")


def fewer(blocks: int) -> str:
    """What to do where nothing is left of an image after so many blocks."""
    return f"use at most {blocks} blocks" if blocks else "it is too small for this network"
