"""Residual networks for small images: those of He et al., and ResNet-18 with a stem for 32x32 images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn

from locallearn.nets.blocks import Blocks
from locallearn.nets.feedforward import Init, image_size, initialise

Cuts = str | int | Sequence[str | float]
"""Where a network is cut: ``"units"``, a number of blocks, a unit's name, or several of them in order."""


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut: ``relu(x' + f(x))`` (He et al. 2016, arXiv 1512.03385).

    ``f`` is the branch ``conv1, bn1, relu, conv2, bn2``.

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
    cuts: Cuts = "units",
    init: Init = "xavier_uniform",
) -> Blocks:
    """A residual network for small images: a stem, ``units`` residual units per width, global average, readout.

    ``units=3`` is ResNet-20, ``5`` ResNet-32, ``9`` ResNet-56, ``18`` ResNet-110. The units are called ``stem``,
    ``stage1_1``, ``stage1_2`` and so on.

    Deviation: shortcuts between widths are 1x1 convolutions, as in torchvision, not zero-padded identities.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        units: residual units of every width.
        widths: channels; every width after the first halves height and width.
        cuts: ``"units"``: every unit is a block, the stem the first. Else see :func:`joined`; ``stage1`` stands for the last
            unit of the first width, and ``"1.0"`` is the papers' name of ``stage1_1``.
        init: see :func:`initialise`.

    Raises:
        ValueError: the input is not an image; no units or widths; a cut that is not there.
    """
    if units < 1 or not widths or any(width < 1 for width in widths):
        raise ValueError(f"units is {units} and widths is {list(widths)}, expected positive numbers")
    made, before = _units(input_shape, [units] * len(widths), widths, lambda stage, unit: f"stage{stage}_{unit + 1}")
    net = Blocks(joined(made, cuts), _readout(before, outputs))
    initialise(net, init)
    return net


RESNET18_CUTS: dict[str, list[str]] = {
    "A": ["layer1", "layer2", "layer3"],
    "B": ["layer1.0", "layer1.1", "layer2"],
    "late": ["layer3.0", "layer3.1", "layer4.0"],
}
"""Cuts of ResNet-18 that go by a name: A at the ends of its layers, B where most bytes are saved, late ones as a search for
accuracy finds them (SEDONA)."""


def resnet18(
    input_shape: Sequence[int],
    outputs: int,
    cuts: Cuts = "A",
    widths: Sequence[int] = (64, 128, 256, 512),
    init: Init = "kaiming_uniform",
    skips: bool = True,
) -> Blocks:
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with the stem that is usual for 32x32 images: 3x3, stride 1, no pooling.

    A stem, two residual units of every width, global average, readout with bias: 11,173,962 weights for ten classes and
    three colours. The units are called as in torchvision: ``stem``, ``layer1.0``, ``layer1.1``, ``layer2.0`` and so on.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        outputs: number of classes.
        cuts: ``"A"`` (after layer1, layer2, layer3), ``"B"`` (after layer1.0, layer1.1, layer2), ``"late"`` (after layer3.0,
            layer3.1, layer4.0), ``"units"``, or what :func:`joined` takes; ``layer1`` stands for its last unit, and ``"1.0"``
            is short for ``layer1.0``. The stem belongs to the first block unless it is cut after it.
        widths: channels; every width after the first halves height and width.
        init: see :func:`initialise`.
        skips: with shortcuts; without them a unit is one convolution with BatchNorm and ReLU, four of every width, and the
            first holds the stem, too: ``cuts="units"`` makes the 16 blocks of Fournier et al. (arXiv 2306.06968), of
            11,000,138 weights.

    Raises:
        ValueError: the input is not an image; no widths; a cut that is not there.
    """
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"widths is {list(widths)}, expected positive numbers")
    units = _units if skips else _plain_units
    count = 2 if skips else 4
    made, before = units(input_shape, [count] * len(widths), widths, lambda layer, unit: f"layer{layer}.{unit}")
    if isinstance(cuts, str) and cuts in RESNET18_CUTS:
        cuts = RESNET18_CUTS[cuts]
    net = Blocks(joined(made, cuts, RESNET18_CUTS), _readout(before, outputs))
    initialise(net, init)
    return net


def _units(
    input_shape: Sequence[int], units: Sequence[int], widths: Sequence[int], name: Callable[[int, int], str]
) -> tuple[dict[str, nn.Module], int]:
    """The stem and all residual units by name, and the channels of the last one."""
    channels, *_ = image_size(input_shape)
    before = widths[0]
    stem = nn.Sequential(nn.Conv2d(channels, before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU())
    made: dict[str, nn.Module] = {"stem": stem}
    for stage, (count, width) in enumerate(zip(units, widths, strict=True)):
        for unit in range(count):
            made[name(stage + 1, unit)] = ResidualUnit(before, width, 2 if stage > 0 and unit == 0 else 1)
            before = width
    return made, before


def _plain_units(
    input_shape: Sequence[int], units: Sequence[int], widths: Sequence[int], name: Callable[[int, int], str]
) -> tuple[dict[str, nn.Module], int]:
    """Single convolutions with BatchNorm and ReLU, the stem in the first one, and the channels of the last one."""
    before, *_ = image_size(input_shape)
    made: dict[str, nn.Module] = {}
    for stage, (count, width) in enumerate(zip(units, widths, strict=True)):
        for unit in range(count):
            layers: list[nn.Module] = []
            for _ in range(1 if made else 2):
                stride = 2 if stage > 0 and unit == 0 else 1
                conv = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            made[name(stage + 1, unit)] = nn.Sequential(*layers)
    return made, before


def _readout(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def joined(
    units: Mapping[str, nn.Module], cuts: Cuts, known: Mapping[str, Sequence[str]] | None = None
) -> dict[str, nn.Module]:
    """Blocks made of units that follow one another. A block is called as the unit, or the stage, that it ends with.

    Args:
        units: by name, in the order of the forward pass; ``stage1_2`` and ``layer1.1`` are the second units of a stage.
        cuts: ``"units"``: a block per unit; a number of blocks: as many units each as possible, the later blocks having more
            where it does not come out even, as in the papers (K); or the units, in order, after each of which a block ends.
            A stage's name (``layer1``) stands for its last unit, ``"1.0"`` for the first unit of the first stage; the end of
            the network is no cut.
        known: names of whole sets of cuts, for the message.

    Raises:
        ValueError: there are fewer units than blocks; a cut that is no unit, or stands twice or in the wrong order.
    """
    names = list(units)
    ends = _ends(names)
    if cuts == "units":
        last = list(range(len(names)))
    elif isinstance(cuts, int):
        if not 1 <= cuts <= len(names):
            raise ValueError(
                f"cuts is {cuts}, but the network has {len(names)} units: ask for 1 to {len(names)} blocks"
            )
        last = [len(names) * block // cuts - 1 for block in range(1, cuts + 1)]
    else:
        wanted = [cuts] if isinstance(cuts, str) else list(cuts)
        last = [_place(cut, names, ends, known or {}) for cut in wanted]
        if any(after <= before for before, after in pairwise(last)):
            raise ValueError(
                f"cuts is {wanted}, expected units in the order of the forward pass, each once: {_listed(names)}"
            )
        if last and last[-1] == len(names) - 1:
            raise ValueError(f"cuts is {wanted}, but the network ends after {wanted[-1]!r}: leave it out")
        last.append(len(names) - 1)
    stage = {at: name for name, at in ends.items() if name not in units and re.fullmatch(r"[a-z]+\d+", name)}
    blocks: dict[str, nn.Module] = {}
    start = 0
    for at in last:
        members = [units[name] for name in names[start : at + 1]]
        whole = len(members) > 1 and at in stage
        blocks[(stage[at] if whole else names[at]).replace(".", "_")] = (
            members[0] if len(members) == 1 else nn.Sequential(*members)
        )
        start = at + 1
    return blocks


def _ends(names: Sequence[str]) -> dict[str, int]:
    """Where the units and stages end, by every name that they go by."""
    found: dict[str, int] = {}
    for at, name in enumerate(names):
        found[name] = at
        match = re.fullmatch(r"([a-z]+)(\d+)([._])(\d+)", name)
        if match:
            kind, stage, sign, unit = match.groups()
            found[f"{stage}.{int(unit) - (sign == '_')}"] = at  # the papers count units from 0
            found[f"{kind}{stage}"] = at
    return found


def _place(cut: str | float, names: Sequence[str], ends: Mapping[str, int], known: Mapping[str, Sequence[str]]) -> int:
    if not isinstance(cut, str) and any(name.endswith((".9", "_10")) for name in names):
        # 1.10 has become 1.1 by now
        raise ValueError(f"the cut {cut} is a number, which does not tell unit 1 from unit 10: write {names[1]!r}, say")
    if str(cut) not in ends:
        also = f", or one of {', '.join(known)}" if known else ""
        raise ValueError(
            f"there is no unit {str(cut)!r} to cut after; there are {_listed(names)}{also}, or a number of blocks"
        )
    return ends[str(cut)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])} ... {', '.join(names[-2:])}"
