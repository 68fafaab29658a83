"""The VGG-like networks that Nøkland and Eidnes train layer by layer (arXiv 1901.06656), one block per layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import Activation, Init, activation_layer, check_dropout, image_size, initialise

# Channels of the convolutions; 0 is a pooling.
_VGG8B = (128, 256, 0, 256, 512, 0, 512, 0, 512, 0)
_VGG11B = (128, 128, 128, 256, 0, 256, 512, 0, 512, 512, 0, 512, 0)


def vgg8b(
    input_shape: Sequence[int],
    outputs: int,
    width: float = 1.0,
    hidden: Sequence[int] = (1024,),
    activation: Activation = "relu",
    dropout: float = 0.0,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """VGG8b: six convolutions of 128 to 512 channels, a hidden layer, and a readout; a block for each but the readout.

    Every layer is ``Conv 3x3 -> BatchNorm -> activation``, with biases. Max poolings of 2 and dropout stand at the start of the
    block after them: as in the authors' code, a layer's own loss sees the whole map and what the next layer gets is pooled and
    dropped. 8.9 million weights on CIFAR-10.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        width: multiplies the channels of all convolutions.
        hidden: widths of the hidden layers; empty: none.
        activation: ``relu``, ``leaky_relu`` (slope .01; the authors' with a similarity loss), ``elu`` or ``tanh``.
        dropout: probability, of whole channels between convolutions, of entries between hidden layers.
        init: see :func:`~locallearn.nets.initialise`.

    Raises:
        ValueError: the input is not an image, or too small for four poolings; widths below 1, or no probability.
    """
    return _vgg(_VGG8B, input_shape, outputs, width, hidden, activation, dropout, init)


def vgg11b(
    input_shape: Sequence[int],
    outputs: int,
    width: float = 1.0,
    hidden: Sequence[int] = (1024,),
    activation: Activation = "relu",
    dropout: float = 0.0,
    init: Init = "kaiming_uniform",
) -> Blocks:
    """VGG11b: nine convolutions of 128 to 512 channels, a hidden layer, and a readout; else as :func:`vgg8b`.

    11.6 million weights on CIFAR-10; the authors' best figures have ``width=3``.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        width: multiplies the channels of all convolutions.
        hidden: widths of the hidden layers; empty: none.
        activation: ``relu``, ``leaky_relu`` (slope .01; the authors' with a similarity loss), ``elu`` or ``tanh``.
        dropout: probability, of whole channels between convolutions, of entries between hidden layers.
        init: see :func:`~locallearn.nets.initialise`.

    Raises:
        ValueError: the input is not an image, or too small for four poolings; widths below 1, or no probability.
    """
    return _vgg(_VGG11B, input_shape, outputs, width, hidden, activation, dropout, init)


def _vgg(
    layout: Sequence[int],
    input_shape: Sequence[int],
    outputs: int,
    width: float,
    hidden: Sequence[int],
    activation: Activation,
    dropout: float,
    init: Init,
) -> Blocks:
    before, height, rows = image_size(input_shape)
    if min([*hidden, *(int(channels * width) for channels in layout if channels)]) < 1:
        raise ValueError(
            f"width is {width} and hidden is {list(hidden)}, expected every layer to have an entry at least"
        )
    check_dropout(dropout)
    blocks: dict[str, nn.Module] = {}
    waiting: list[nn.Module] = []  # poolings and dropout, until the next layer comes
    for channels in layout:
        if channels == 0:
            waiting.append(nn.MaxPool2d(2))
            height, rows = height // 2, rows // 2
            if min(height, rows) < 1:
                raise ValueError(
                    f"nothing is left of a {input_shape[1]}x{input_shape[2]} image after {layout.count(0)} poolings of 2: "
                    "this network takes images of 16x16 at least"
                )
            continue
        after = int(channels * width)
        name = f"conv{len(blocks) + 1}"
        blocks[name] = nn.Sequential(
            *waiting, nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), activation_layer(activation)
        )
        waiting, before = [nn.Dropout2d(dropout)] if dropout else [], after
    size = before * height * rows
    waiting.append(nn.Flatten())
    for i, units in enumerate(hidden):
        layers = [nn.Linear(size, units), nn.BatchNorm1d(units), activation_layer(activation)]
        blocks[f"hidden{i + 1}"] = nn.Sequential(*waiting, *layers)
        waiting, size = [nn.Dropout(dropout)] if dropout else [], units
    net = Blocks(blocks, nn.Sequential(*waiting, nn.Linear(size, outputs)) if waiting else nn.Linear(size, outputs))
    initialise(net, init)
    return net
