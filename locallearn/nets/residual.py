"""The residual networks of He et al. for small images, one block per residual unit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import Init, initialise


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut: ``relu(x' + f(x))`` (He et al. 2016, arXiv 1512.03385).

    Args:
        before: input channels.
        after: output channels.
        stride: of the first convolution. Where it is above 1 or the channels change, the shortcut is a 1x1 convolution
            with BatchNorm, else the identity.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, after, H / stride, W / stride)``."""
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(inner + self.shortcut(x))
        return out


def resnet(
    input_shape: Sequence[int],
    outputs: int,
    units: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    init: Init = "xavier_uniform",
) -> Blocks:
    """A residual network for small images: a stem, ``units`` residual units per width, global average, readout.

    ``units=3`` is ResNet-20, ``units=9`` ResNet-56. Every residual unit is one block; the stem is the first.

    Deviation: shortcuts between widths are 1x1 convolutions, as in torchvision, not zero-padded identities.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        units: residual units of every width.
        widths: channels; every width after the first halves height and width.
        init: see :func:`initialise`.

    Raises:
        ValueError: the input is not an image; no units or widths.
    """
    if len(input_shape) != 3:
        raise ValueError(f"input_shape is {tuple(input_shape)}, expected (channels, height, width)")
    if units < 1 or not widths or any(width < 1 for width in widths):
        raise ValueError(f"units is {units} and widths is {list(widths)}, expected positive numbers")
    before = widths[0]
    stem = nn.Sequential(nn.Conv2d(input_shape[0], before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU())
    blocks: dict[str, nn.Module] = {"stem": stem}
    for stage, width in enumerate(widths):
        for unit in range(units):
            blocks[f"stage{stage + 1}_{unit + 1}"] = ResidualUnit(before, width, 2 if stage > 0 and unit == 0 else 1)
            before = width
    net = Blocks(blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs)))
    initialise(net, init)
    return net
