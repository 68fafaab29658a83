"""Layers with receptive fields and without shared weights, and the network of them in the Forward-Forward paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import Init, initialise


class LocallyConnected2d(nn.Module):
    """A convolution whose weights differ at every position: z_k = W_k patch_k + b_k.

    Args:
        in_channels: channels of the input.
        out_channels: outputs at every position.
        input_size: height and width of the input, which must be known because weights belong to positions.
        kernel_size: side of a receptive field.
        stride: from one receptive field to the next.
        bias: whether every output of every position has a bias.

    Attributes:
        weight: shape ``(P, out_channels, in_channels · kernel_size²)``, the P positions row by row, a patch laid out by
            channel, row and column.
        bias: shape ``(P · out_channels,)``, by channel, then position, as the flattened output; or ``None``.
        output_size: height and width of the output.
        positions: P.

    Raises:
        ValueError: a receptive field that does not fit into the input, or a number below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Sequence[int],
        kernel_size: int,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        height, width = input_size
        if min(in_channels, out_channels, kernel_size, stride) < 1:
            raise ValueError(
                f"in_channels={in_channels}, out_channels={out_channels}, kernel_size={kernel_size} and stride={stride} must "
                "be positive"
            )
        if kernel_size > min(height, width):
            raise ValueError(
                f"a receptive field of {kernel_size}x{kernel_size} does not fit into a map of {height}x{width}: make it smaller"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.input_size = (height, width)
        self.kernel_size = kernel_size
        self.stride = stride
        self.output_size = ((height - kernel_size) // stride + 1, (width - kernel_size) // stride + 1)
        self.positions = self.output_size[0] * self.output_size[1]
        self.weight = nn.Parameter(torch.empty(self.positions, out_channels, in_channels * kernel_size**2))
        self.bias = nn.Parameter(torch.empty(out_channels * self.positions)) if bias else None
        self.reset("lecun_normal")

    def reset(self, init: Init) -> None:
        """Draw the weights of every position as those of a linear layer, see :func:`~locallearn.nets.initialise`."""
        biased = init == "pytorch" and self.bias is not None  # elsewhere they start at zero
        layer = nn.Linear(self.weight.shape[2], self.out_channels, bias=biased)
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
            for position, weight in enumerate(self.weight):
                initialise(layer, init)
                weight.copy_(layer.weight)
                if biased and self.bias is not None:
                    self.bias.view(self.out_channels, self.positions)[:, position] = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, *input_size)`` to ``(N, out_channels, *output_size)``.

        Raises:
            ValueError: a map of another size.
        """
        if x.shape[1:] != (self.in_channels, *self.input_size):
            raise ValueError(
                f"the input has shape {tuple(x.shape)}, and this locally connected layer has weights for "
                f"(N, {self.in_channels}, {self.input_size[0]}, {self.input_size[1]})"
            )
        patches = F.unfold(x, self.kernel_size, stride=self.stride).permute(2, 0, 1)
        output = torch.bmm(patches, self.weight.transpose(1, 2)).permute(1, 2, 0)
        if self.bias is not None:
            output = output + self.bias.view(self.out_channels, self.positions)
        return output.reshape(len(x), self.out_channels, *self.output_size)

    def extra_repr(self) -> str:
        """Shapes."""
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )


def locally_connected(
    input_shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (128, 220, 512),
    kernel_sizes: Sequence[int] = (10, 2, 2),
    strides: Sequence[int] = (6, 1, 1),
    bias: bool = True,
    init: Init = "lecun_normal",
) -> Blocks:
    """Blocks of ``LocallyConnected2d -> ReLU``, and a linear readout of the flattened map.

    The defaults are those of the Forward-Forward paper for MNIST (by secondary sources): a 4x4 grid of receptive fields of
    10x10 pixels six apart, 128 outputs each, then 3x3 positions of 220 and 2x2 of 512, each reading 2x2 neighbours.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        channels: outputs at every position, by block.
        kernel_sizes: side of the receptive fields, by block.
        strides: from one receptive field to the next, by block.
        bias: whether the blocks have biases.
        init: of every position's weights, see :func:`~locallearn.nets.initialise`.

    Raises:
        ValueError: the input is no image, the three lists differ in length, or a receptive field does not fit.
    """
    if len(input_shape) != 3:
        raise ValueError(f"input_shape is {tuple(input_shape)}, expected (channels, height, width)")
    if not channels or not len(channels) == len(kernel_sizes) == len(strides):
        raise ValueError(
            f"channels {list(channels)}, kernel_sizes {list(kernel_sizes)} and strides {list(strides)} must have an entry "
            "for every block, and one at least"
        )
    before, size = input_shape[0], (input_shape[1], input_shape[2])
    blocks: dict[str, nn.Module] = {}
    for i, (after, kernel, stride) in enumerate(zip(channels, kernel_sizes, strides, strict=True)):
        try:
            layer = LocallyConnected2d(before, after, size, kernel, stride, bias)
        except ValueError as error:
            raise ValueError(f"block {i + 1} of {len(channels)}: {error}") from error
        layer.reset(init)
        blocks[f"local{i + 1}"] = nn.Sequential(layer, nn.ReLU())
        before, size = after, layer.output_size
    readout = nn.Sequential(nn.Flatten(), nn.Linear(before * size[0] * size[1], outputs, bias=False))
    initialise(readout, init)
    return Blocks(blocks, readout)
