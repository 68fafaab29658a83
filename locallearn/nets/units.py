"""The units of a network: residual units, or single layers where there are none; found in any module by looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from locallearn.nets.blocks import NORMALISATIONS, Blocks
from locallearn.nets.layout import ChannelAxes

# Of residual units that are known: whose they are, and the modules whose output is added to the shortcut.
_BRANCHES = {
    ("locallearn", "ResidualUnit"): ("bn2",),
    ("torchvision", "BasicBlock"): ("bn2",),
    ("torchvision", "Bottleneck"): ("bn3",),
    ("torchvision", "InvertedResidual"): ("conv", "block"),  # MobileNetV2's and V3's name of it
    ("torchvision", "EncoderBlock"): ("dropout", "mlp"),
    ("torch", "TransformerEncoderLayer"): ("dropout1", "dropout2"),
}


def _branch_names(module: nn.Module) -> Sequence[str] | None:
    """Names of the submodules that end a residual branch; ``None``: no residual unit, as far as is known."""
    own: Sequence[str] | None = getattr(module, "residual_branches", None)
    if own is not None:
        return own
    for kind in type(module).__mro__:
        known = _BRANCHES.get((kind.__module__.partition(".")[0], kind.__name__))
        if known is not None:
            return known if getattr(module, "use_res_connect", True) else ()
    return None


def residual_branches(module: nn.Module) -> list[nn.Module]:
    """Submodules whose output is added to a shortcut, in any depth.

    Known are the residual units of this package, torchvision's ``BasicBlock``, ``Bottleneck``, ``InvertedResidual`` and
    ``EncoderBlock``, and PyTorch's ``TransformerEncoderLayer``. Any other module says it itself by an attribute
    ``residual_branches``: the names of those of its submodules whose output is what is added.

    Raises:
        ValueError: the attribute names what is not there.
    """
    found = []
    for part in module.modules():
        for name in _branch_names(part) or ():
            branch = getattr(part, name, None)
            if isinstance(branch, nn.Module):
                found.append(branch)
            elif hasattr(part, "residual_branches"):
                raise ValueError(f"{type(part).__name__}.residual_branches names {name!r}, which is no submodule of it")
    return found


def units(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost residual units inside of a module, and the layers with weights beside them, in the order of their names.

    A layer is a module with weights and without submodules; normalisations do not count.
    """
    children = list(module.children())
    if _branch_names(module) is not None:
        yield module
    elif not children:
        if any(True for _ in module.parameters()) and not isinstance(module, NORMALISATIONS):
            yield module
    else:
        for child in children:
            yield from units(child)


def first_unit(block: nn.Module) -> nn.Module:
    """The first unit of a block, as a module that can be run alone.

    Inside of an ``nn.Sequential`` it is the first part with weights, whole where it has parts of its own; a single layer
    brings along what stands before it and what follows it up to the next layer with weights that is no normalisation. Of a
    traced module it is the first residual unit or layer. Any other module is a unit as a whole.
    """
    if isinstance(block, torch.fx.GraphModule):
        return next(units(block), block)
    if not isinstance(block, nn.Sequential) or _branch_names(block) is not None:
        return block
    parts: list[nn.Module] = []
    started = False
    for child in block:
        weights = any(True for _ in child.parameters())
        if weights and any(True for _ in child.children()):
            if not started:
                return first_unit(child)
            break
        if weights and not isinstance(child, NORMALISATIONS):
            if started:
                break
            started = True
        parts.append(child)
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def sample_shapes(
    blocks: Blocks, inputs: Tensor, context: tuple[Any, ...]
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]]]:
    """Shapes of one sample of every block's output and of the maps that its units hand on, from a dry run.

    What comes after a unit and has no weights (activation, pooling) belongs to it. Maps that are smaller than the block's
    output are side paths (squeeze and excitation) and left out.

    Returns:
        Shapes by block, that of a one-dimensional map as a :class:`~locallearn.nets.layout.Signal`; and by block a list of
        maps ``(C, H, W)``, the output last, empty where the output is none.
    """
    entering: list[list[tuple[int, ...]]] = [[] for _ in blocks]

    def note(noted: list[tuple[int, ...]], module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            noted.append(tuple(args[0].shape[1:]))

    hooks = [
        unit.register_forward_pre_hook(partial(note, noted))
        for noted, block in zip(entering, blocks, strict=True)
        for unit in units(block)
    ]
    try:
        with torch.no_grad(), ChannelAxes() as axes:
            outputs = [axes.shape(output) for output in blocks.features(inputs, *context)]
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, [_handed_on(noted, last) for noted, last in zip(entering, outputs, strict=True)]


def _handed_on(entering: list[tuple[int, ...]], last: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What a unit hands on is what the next one is given."""
    if len(last) != 3:
        return []
    inner = [shape for shape in entering[1:] if len(shape) == 3 and shape[1] >= last[1] and shape[2] >= last[2]]
    return [*inner, last]
