"""What goes from one block to the next: one tensor, or a main one with others that are carried along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

_T = TypeVar("_T")


class Border(NamedTuple):
    """What a block hands over where later blocks need more than its main output: skip connections, values computed early.

    A block returns one in place of its output, and the next block is given it in place of its input. Losses, probes and the
    readout get the main tensor alone. Under a layer-local rule everything in it is detached.

    Attributes:
        main: what the block's loss is made from, samples as rows.
        carried: what else later blocks read, by name: tensors, numbers, or tuples of them.
    """

    main: Tensor
    carried: Mapping[str, Any]


def main(output: Any) -> Any:
    """The main tensor of what a block gave; anything that is no :class:`Border` as it is."""
    return output.main if isinstance(output, Border) else output


def detached(value: _T) -> _T:
    """The same with every tensor in it detached."""
    result: _T = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, value)
    return result


def replaced(output: Any, tensor: Tensor) -> Any:
    """What a block gave, with another main tensor and everything that it carries detached."""
    return Border(tensor, detached(dict(output.carried))) if isinstance(output, Border) else tensor
