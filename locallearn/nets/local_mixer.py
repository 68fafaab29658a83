"""LocalMixer, the perceptron of patches and groups of channels on which local forward gradients were published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import choice, image_size
from locallearn.nets.transformer import TokenPool

Size = Literal["S/1/1", "M/1/16", "M/8/16", "L/32/64"]
_SIZES = {"S/1/1": (1, 1, 256, 1), "M/1/16": (1, 1, 512, 16), "M/8/16": (4, 8, 512, 16), "L/32/64": (4, 32, 2048, 64)}
_EPS = 1e-5


def local_mixer(
    input_shape: Sequence[int],
    outputs: int,
    size: Size = "M/8/16",
    blocks: int | None = None,
    patches: int | None = None,
    channels: int | None = None,
    groups: int | None = None,
) -> Blocks:
    """LocalMixer (Ren, Kornblith, Liao, Hinton, ICLR 2023, arXiv 2210.03310), one block after another of :class:`MixerBlock`.

    The image is cut into ``patches`` x ``patches`` patches, and every block gives ``(N, patches², channels)``. The readout
    takes the mean over patches, normalises it, and starts at zero, as in the paper; the other weights are drawn from
    N(0, min(2/√fan-in, .1)²), the choice of the published configuration, and biases start at zero.

    ============ ====== ======= ======== ======
    size         blocks patches channels groups
    ============ ====== ======= ======== ======
    ``S/1/1``    1      1 x 1   256      1
    ``M/1/16``   1      1 x 1   512      16
    ``M/8/16``   4      8 x 8   512      16
    ``L/32/64``  4      32 x 32 2048     64
    ============ ====== ======= ======== ======

    The paper's numbers of weights (272K of S/1/1 on MNIST, 919K of M/8/16 on CIFAR-10, 17.3M of L/32/64, which fits 100 classes
    of images of 224x224) count a local readout for every block, which a rule adds and this network does not hold.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        size: one of the paper's; what is given below is in its place.
        blocks: number of blocks.
        patches: along each side; divides height and width.
        channels: of every block.
        groups: of channels; divides ``channels``.

    Raises:
        ValueError: the input is not an image, an unknown size, a number below 1, patches that do not divide the image, groups
            that do not divide the channels, or groups and patches of a single value, of which normalisation leaves nothing.
    """
    depth, height, columns = image_size(input_shape)
    known = choice("size", size, _SIZES)
    given = {"blocks": blocks, "patches": patches, "channels": channels, "groups": groups}
    sizes = {name: known[i] if number is None else number for i, (name, number) in enumerate(given.items())}
    for name, number in sizes.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} is {number!r}, expected a whole number of at least 1")
    count, side, width, parts = sizes.values()
    if height % side or columns % side:
        raise ValueError(
            f"patches is {side}, and an image of {height}x{columns} cannot be cut into {side}x{side} equal patches: choose a "
            "divisor of both sides"
        )
    entries = depth * (height // side) * (columns // side)
    if entries == 1:
        raise ValueError(
            f"patches is {side}, and a patch of one value is nothing once it is normalised: choose fewer patches"
        )
    if width % parts or width == parts:
        raise ValueError(
            f"groups is {parts}, and {width} channels cannot be parted into {parts} equal groups of at least 2: choose a "
            "divisor of channels below it"
        )
    members: dict[str, nn.Module] = {}
    for i in range(count):
        members[f"block{i + 1}"] = (
            MixerBlock(width, parts, tokens=side * side) if i else MixerBlock(width, parts, entries, side)
        )
    readout = nn.Linear(width, outputs)
    net = Blocks(members, nn.Sequential(TokenPool("mean"), Normalise(), readout))
    for layer in net.modules():
        if isinstance(layer, nn.Linear | GroupedLinear):
            nn.init.normal_(layer.weight, std=min(2 * layer.weight.shape[1] ** -0.5, 0.1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.zeros_(readout.weight)
    return net


class MixerBlock(nn.Module):
    """Mixes patches, then channels, then channels within groups; each map has a normalisation in front and one behind.

    The first block cuts the image into patches, mixes none, and has no shortcut; the others add what they are given to what the
    groups put out, before the last ReLU. Behind the mixing of patches no patch sees another one, and behind that of channels no
    group. Neither normalisation has weights, and the mixing of patches has no bias, of which normalisation would leave nothing.

    Args:
        channels: C, of what it puts out.
        groups: G.
        inputs: entries of a patch, of the first block; ``None``: ``channels``.
        patches: of the first block, along each side of the image.
        tokens: P, patches that are mixed, of the other blocks.

    Attributes:
        groups: G. Groups of channels that do not see one another behind the last map; rules with local losses read it.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        inputs: int | None = None,
        patches: int | None = None,
        tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.patches = patches
        self.across = None if tokens is None else Normalised(nn.Linear(tokens, tokens, bias=False), transposed=True)
        self.within = Normalised(nn.Linear(inputs or channels, channels))
        self.grouped = Normalised(GroupedLinear(channels, groups), groups)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, P, C)``, or images ``(N, C, H, W)`` in the first block, to ``(N, P, C)``."""
        if self.patches is not None:
            x = cut_patches(x, self.patches)
        y = normalised(x)
        if self.across is not None:
            y = normalised(self.activation(self.across(y)))
        y = normalised(self.activation(self.within(y)), self.groups)
        out: Tensor = self.activation(self.grouped(y, x if self.across is not None else None))
        return out


class Normalise(nn.Module):
    """:func:`normalised` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to the same."""
        return normalised(x)


class GroupedLinear(nn.Module):
    """A linear map of every group of channels by itself: what a 1x1 convolution with groups is, and several times faster.

    Args:
        channels: C, in and out.
        groups: G.

    Attributes:
        weight: ``(C, C/G)``; rows of the first group first.
        bias: ``(C,)``.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels // groups))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to the same."""
        parts = torch.unflatten(x, -1, (self.groups, -1))
        weight = torch.unflatten(self.weight, 0, (self.groups, -1))
        return torch.einsum("...gi,goi->...go", parts, weight).flatten(-2) + self.bias


class Normalised(nn.Module):
    """A linear map and the normalisation of what it puts out: the place at which activities of a LocalMixer are perturbed.

    Args:
        layer: the map.
        groups: of channels that are normalised by themselves.
        transposed: the map is over patches.
    """

    def __init__(self, layer: nn.Linear | GroupedLinear, groups: int = 1, transposed: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.groups = groups
        self.transposed = transposed

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """``(N, P, C)`` to ``(N, P, C)``; ``shortcut`` is added behind the normalisation."""
        made = normalised(self.layer(x.mT).mT if self.transposed else self.layer(x), self.groups)
        return made if shortcut is None else made + shortcut

    def pull_back(self, made: Tensor, along: Tensor) -> Tensor:
        """A gradient at this module's output as one at the map's, which put out ``made``."""
        if self.transposed:
            return normalised_along(made.mT, along, self.groups).mT
        return normalised_along(made, along, self.groups)


def normalised(x: Tensor, groups: int = 1) -> Tensor:
    """Mean 0 and variance 1 within every group of the last axis (eps 1e-5, without weights)."""
    made: Tensor = _Normalise.apply(torch.unflatten(x, -1, (groups, -1)))
    return made.flatten(-2)


def normalised_along(x: Tensor, along: Tensor, groups: int = 1) -> Tensor:
    """The Jacobian of :func:`normalised` at ``x`` times ``along``. It is symmetric, so this is both derivative and gradient."""
    return _along(torch.unflatten(x, -1, (groups, -1)), torch.unflatten(along, -1, (groups, -1)), along.dtype).flatten(
        -2
    )


def _along(x: Tensor, along: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        x, along = x.to(wide), along.to(wide)
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + _EPS).rsqrt()
        y = centred * scale
        made = scale * (along - along.mean(-1, keepdim=True) - y * (y * along).mean(-1, keepdim=True))
        return made.to(dtype)


class _Normalise(torch.autograd.Function):
    """PyTorch's layer_norm with a derivative of its own.

    In forward mode PyTorch's rounds in another order whenever something watches its operations, and then an audit cannot tell
    whether a rule did the same as before.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=_EPS)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.dtypes = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return _along(x, gradient, ctx.dtypes[0])

    @staticmethod
    def jvp(ctx: Any, along: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return _along(x, along, ctx.dtypes[1])


def cut_patches(images: Tensor, patches: int) -> Tensor:
    """Images ``(N, C, H, W)`` as ``patches``² vectors, row by row, and so the pixels of each: ``(N, P, H W C / P)``."""
    samples, channels, height, width = images.shape
    cut = images.reshape(samples, channels, patches, height // patches, patches, width // patches)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(samples, patches * patches, -1)
