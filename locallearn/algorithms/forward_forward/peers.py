"""Where peer normalisation reads a block: what its last ReLU reads, and which entries of it are one unit."""

from __future__ import annotations

from torch import nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.locally_connected import LocallyConnected2d


def last_relu(blocks: Blocks, index: int) -> nn.ReLU:
    """The ReLU that makes a block's activity.

    Raises:
        ValueError: the block has none, or one that writes over what it reads.
    """
    relus = [module for module in blocks[index].modules() if isinstance(module, nn.ReLU)]
    if not relus or relus[-1].inplace:
        raise ValueError(
            f"peer normalisation reads what the ReLU of block {blocks.names[index]!r} reads, and that block has no nn.ReLU "
            "that leaves its input alone: add one with inplace=False, or set peer=0"
        )
    return relus[-1]


def unit_layer(blocks: Blocks, index: int) -> nn.Linear | nn.Conv2d | LocallyConnected2d:
    """The last layer with weights: its outputs are the block's units.

    Raises:
        ValueError: the block has no such layer.
    """
    layers = [
        layer for layer in blocks[index].modules() if isinstance(layer, nn.Linear | nn.Conv2d | LocallyConnected2d)
    ]
    if not layers:
        raise ValueError(
            f"peer normalisation needs a linear, convolutional or locally connected layer, and block "
            f"{blocks.names[index]!r} has none: set peer=0"
        )
    return layers[-1]


def unit_count(layer: nn.Linear | nn.Conv2d | LocallyConnected2d) -> int:
    """Number of units: a convolution's positions share their weights and are one unit, those of unshared weights are many."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return layer.out_channels * layer.positions
