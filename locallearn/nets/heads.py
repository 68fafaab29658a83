"""Auxiliary heads: small networks that read one block's output and give class scores; inference drops them.

A head is built from the shape of one sample of what it reads: a map ``(C, H, W)``, tokens ``(T, D)``, a vector ``(D,)``, or a
one-dimensional map :class:`~locallearn.nets.layout.Signal` ``(C, L)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets.layout import Signal, channel_axis
from locallearn.nets.residual import ResidualUnit

Shape = Sequence[int]


class LinearHead(nn.Module):
    """A linear map from a block's flattened output to the classes.

    Args:
        shape: of one sample of the block's output.
        outputs: number of classes C.
        limit: largest number of inputs d. Maps are averaged over windows, tokens over all positions, until they fit;
            ``None``: taken as they are.
        bias: whether it has one.

    Attributes:
        projection: shape ``(C, d)``, Kaiming-uniform with a = √5.
        bias: shape ``(C,)``, uniform within ±1/√d, or ``None``.

    Raises:
        ValueError: the output cannot be averaged down to ``limit`` entries.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: Shape, outputs: int, limit: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.pool, features = _fitting(shape, limit)
        self.projection = nn.Parameter(torch.empty(outputs, features))
        nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))
        self.bias = None
        if bias:
            bound = features**-0.5
            self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, *shape)`` to ``(N, C)``."""
        return F.linear(self.pool(x).flatten(1), self.projection, self.bias)


def pooling(channels: int, height: int, width: int, limit: int) -> tuple[int, int, int, int]:
    """Window and padding of the average that leaves a map at most ``limit`` entries: rows doubled first, then columns.

    The choice of Nøkland and Eidnes (arXiv 1901.06656); windows are often not square (128 maps of 32x32 to 2048: 8x8, to
    4096: 8x4).

    Returns:
        ``(height, width)`` of the window, ``(height, width)`` of the padding.

    Raises:
        ValueError: there are more channels than the limit.
    """
    if channels > limit:
        raise ValueError(
            f"a head of {channels} channels has at least {channels} inputs, more than the limit of {limit}"
        )
    rows = columns = 1

    def inputs() -> int:
        return channels * -(-height // rows) * -(-width // columns)

    while inputs() > limit:
        if rows < height:
            rows *= 2
        if inputs() > limit and columns < width:
            columns *= 2
    return rows, columns, _padding(height, rows), _padding(width, columns)


def _padding(side: int, window: int) -> int:
    return window * (-(-side // window) - side // window) // 2


class _TokenMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _fitting(shape: Shape, limit: int | None) -> tuple[nn.Module, int]:
    """What brings a block's output down to ``limit`` entries, and how many are left."""
    if limit is None or math.prod(shape) <= limit:
        return nn.Identity(), math.prod(shape)
    if len(shape) == 3:
        channels, height, width = shape
        rows, columns, above, beside = pooling(channels, height, width, limit)
        left = channels * -(-height // rows) * -(-width // columns)
        return nn.AvgPool2d((rows, columns), padding=(above, beside)), left
    if isinstance(shape, Signal):
        window, _, padding, _ = pooling(*shape, 1, limit)
        return nn.AvgPool1d(window, padding=padding), shape.channels * -(-shape.length // window)
    if len(shape) == 2 and shape[1] <= limit:
        return _TokenMean(), shape[1]
    raise ValueError(
        f"a head of an output of shape {tuple(shape)} has {shape[-1]} inputs, more than the limit of {limit}"
    )


class TokenHead(nn.Module):
    """LayerNorm, and a linear map from the first token to the classes: what vision transformers end with.

    Args:
        width: of a token, D.
        outputs: number of classes.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, D)`` to ``(N, C)``."""
        scores: Tensor = self.linear(self.norm(x[:, 0]))
        return scores


class ConvHead(nn.Sequential):
    """One convolution of kernel size 3 and stride 2 with BatchNorm and ReLU, mean over positions, linear layer.

    Args:
        channels: of the map.
        outputs: number of classes.
        width: the convolution's output channels.
        stride: of the convolution.
        hidden: width of a hidden layer with ReLU before the last one; 0: none. With 128 it is InfoPro's "1c2f".
        dimensions: 2: it reads ``(C, H, W)``; 1: ``(C, L)``.
    """

    def __init__(
        self, channels: int, outputs: int, width: int, stride: int = 2, hidden: int = 0, dimensions: Literal[1, 2] = 2
    ) -> None:
        inner = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
        flat = dimensions == 1
        super().__init__(
            (nn.Conv1d if flat else nn.Conv2d)(channels, width, 3, stride=stride, padding=1, bias=False),
            (nn.BatchNorm1d if flat else nn.BatchNorm2d)(width),
            nn.ReLU(),
            (nn.AdaptiveAvgPool1d if flat else nn.AdaptiveAvgPool2d)(1),
            nn.Flatten(),
            *inner,
            nn.Linear(hidden or width, outputs),
        )


class MLPHead(nn.Sequential):
    """The head "mlp-sr" of DGL (Belilovsky et al., arXiv 1901.08164): on few positions, three 1x1 convolutions, three layers.

    Average to ``size`` x ``size``; three times 1x1 convolution (no bias), BatchNorm, ReLU; average to ``pooled`` x
    ``pooled``; three times linear layer to 4 x ``width``, BatchNorm, ReLU; linear layer to the classes. DGL takes a quarter of
    the map's side, as many channels as the map, and 2x2; MAN++ takes 8x8, 128 channels and 1x1.

    Deviation: DGL's code holds a further BatchNorm that its forward pass never uses.

    Args:
        channels: of the map.
        outputs: number of classes.
        width: channels of the 1x1 convolutions.
        size: side of the map that the convolutions see; smaller maps are enlarged to it.
        pooled: side of the map that the linear layers see.
    """

    def __init__(self, channels: int, outputs: int, width: int, size: tuple[int, int], pooled: int = 2) -> None:
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(size)]
        for before in (channels, width, width):
            layers += [nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten()]
        for before in (pooled**2 * width, 4 * width, 4 * width):
            layers += [nn.Linear(before, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(4 * width, outputs))


Pooled = Literal["linear", "mlp", "cnn"]


class PooledHead(nn.Sequential):
    """The heads of Fournier et al. (arXiv 2306.06968), which read a map averaged to 2 x 2, or one of one dimension to 2.

    ``linear``: BatchNorm, average, linear layer. ``mlp``: average, three times linear layer, BatchNorm, ReLU, then a linear
    layer. ``cnn``: 1x1 convolution to ``width`` channels, BatchNorm, ReLU, three times 3x3 convolution of stride 2, BatchNorm,
    ReLU, then average and a linear layer. Vectors are read as they are, without the first BatchNorm; tokens are averaged.
    Weights are as PyTorch draws them.

    Args:
        kind: ``linear``, ``mlp`` or ``cnn``.
        shape: of one sample of the block's output.
        outputs: number of classes.
        width: of hidden layers; ``None``: 1024 for ``mlp``, 32 for ``cnn``.
        norm: whether there are BatchNorms; else hidden layers have biases.

    Raises:
        ValueError: a cnn for what is no map, or more than three dimensions.
    """

    def __init__(self, kind: Pooled, shape: Shape, outputs: int, width: int | None = None, norm: bool = True) -> None:
        if len(shape) > 3 or (kind == "cnn" and len(shape) < 3):
            reads = "maps (C, H, W)" if kind == "cnn" else "maps, tokens or vectors"
            raise ValueError(f"a {kind} head reads {reads}, and the output of a sample has shape {tuple(shape)}")
        signal = isinstance(shape, Signal)
        channels, layers = shape[channel_axis(shape) - 1], list[nn.Module]()
        if kind == "cnn":
            width = 32 if width is None else width
            layers += _normed(nn.Conv2d(channels, width, 1, bias=not norm), norm)
            for _ in range(3):
                layers += _normed(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=not norm), norm)
            channels, shape = width, (width, *(-(-side // 8) for side in shape[1:]))
        elif kind == "linear" and norm and len(shape) == 3:
            layers += [nn.BatchNorm2d(channels)]
        elif kind == "linear" and norm and signal:
            layers += [nn.BatchNorm1d(channels)]
        if signal:
            layers += [nn.AdaptiveAvgPool1d(min(2, shape[1])), nn.Flatten()]
            channels *= min(2, shape[1])
        elif len(shape) == 3:
            size = min(2, shape[1]), min(2, shape[2])
            layers += [nn.AdaptiveAvgPool2d(size), nn.Flatten()]
            channels *= math.prod(size)
        elif len(shape) == 2:
            layers += [_TokenMean()]
        if kind == "mlp":
            width = 1024 if width is None else width
            for before in (channels, width, width):
                layers += _normed(nn.Linear(before, width, bias=not norm), norm)
            channels = width
        super().__init__(*layers, nn.Linear(channels, outputs))


def _normed(layer: nn.Linear | nn.Conv2d, norm: bool) -> list[nn.Module]:
    width = layer.weight.shape[0]
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    return [layer, *([kind(width)] if norm else []), nn.ReLU()]


class ResidualHead(nn.Sequential):
    """Residual units with fresh weights, mean over positions, linear layer: the shape of later stages or units.

    Args:
        channels: of the map.
        outputs: number of classes.
        widths: channels of every unit.
        strides: of every unit.
        norm: put a BatchNorm before the linear layer, as AugLocal does in heads of one unit.
    """

    def __init__(
        self, channels: int, outputs: int, widths: Sequence[int], strides: Sequence[int], norm: bool = False
    ) -> None:
        befores = [channels, *widths]
        super().__init__(
            *(ResidualUnit(b, w, s) for b, w, s in zip(befores, widths, strides, strict=False)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            *([nn.BatchNorm1d(befores[-1])] if norm else []),
            nn.Linear(befores[-1], outputs),
        )


class Decoder(nn.Module):
    """InfoPro's decoder (Wang et al., arXiv 2101.10832): from a map back to the image.

    Bilinear to the image's size (corners aligned), 3x3 convolution to 12 channels, BatchNorm, ReLU, 3x3 convolution.

    Args:
        channels: of the map.
        image: ``(C, H, W)`` of the image.
    """

    def __init__(self, channels: int, image: Shape) -> None:
        super().__init__()
        self.size = (image[1], image[2])
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, image[0], 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, h, w)`` to logits of pixels in [0, 1], ``(N, *image)``."""
        logits: Tensor = self.layers(F.interpolate(x, self.size, mode="bilinear", align_corners=True))
        return logits
