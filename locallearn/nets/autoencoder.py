"""A convolutional autoencoder as blocks: an encoder that strides down, a decoder that mirrors it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import Activation, Init, activation_layer, initialise


def autoencoder(
    input_shape: Sequence[int],
    channels: Sequence[int] = (128, 256, 1024, 2048),
    batch_norm: bool = True,
    activation: Activation = "relu",
    init: Init = "orthogonal",
    decoder_scale: float = 1e-3,
) -> Blocks:
    """The autoencoder of Kao and Hariharan (arXiv 2409.19841): blocks of an image's size down and up again, no skips.

    Encoder blocks are ``Conv 3x3 (stride 2) -> BatchNorm -> activation``, decoder blocks
    ``nearest upsampling x2 -> Conv 3x3 -> BatchNorm -> activation``; the readout is the last decoder step without norm
    and activation, and gives an image of the input's shape.

    Args:
        input_shape: ``(C, H, W)`` of one image; H and W must be divisible by ``2 ** len(channels)``.
        channels: output channels of the encoder's blocks.
        batch_norm: put a BatchNorm before every activation.
        activation: ``relu``, ``elu`` or ``tanh``.
        init: see :func:`initialise`.
        decoder_scale: factor on the decoder's initial weights (1e-3 in the paper's code); the readout starts at zero.

    Raises:
        ValueError: the input is no image of a size that can be halved that often; no channels.
    """
    if len(input_shape) != 3 or any(side % 2 ** len(channels) for side in input_shape[1:]):
        raise ValueError(
            f"input_shape is {tuple(input_shape)}, expected (channels, height, width) with sides divisible by "
            f"{2 ** len(channels)}, because {len(channels)} encoder blocks halve them"
        )
    if not channels or any(after < 1 for after in channels):
        raise ValueError(f"channels is {list(channels)}, expected at least one positive number of channels")
    widths = [input_shape[0], *channels]

    def finish(width: int) -> list[nn.Module]:
        return [*([nn.BatchNorm2d(width)] if batch_norm else []), activation_layer(activation)]

    blocks: dict[str, nn.Module] = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=not batch_norm)
        blocks[f"encoder{i + 1}"] = nn.Sequential(convolution, *finish(after))
    back = widths[::-1]
    for i, (before, after) in enumerate(pairwise(back[:-1])):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=not batch_norm)
        blocks[f"decoder{i + 1}"] = nn.Sequential(nn.Upsample(scale_factor=2), convolution, *finish(after))
    last = nn.Conv2d(back[-2], back[-1], 3, padding=1)
    net = Blocks(blocks, nn.Sequential(nn.Upsample(scale_factor=2), last))
    initialise(net, init)
    for name, block in net.members.items():
        if name.startswith("decoder"):
            for layer in block.modules():
                if isinstance(layer, nn.Conv2d):
                    with torch.no_grad():
                        layer.weight.mul_(decoder_scale)
    nn.init.zeros_(last.weight)
    return net
