"""Where to cut: places with their costs, and choices of so many blocks or so many bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from locallearn.cost import FlopCounter
from locallearn.nets.blocks import evaluating, fitted
from locallearn.nets.cut import CannotTrace, Place, names_for, places

_UNITS = {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


_MORE = "where more than one tensor crosses, a number of blocks or memory= cuts only if the other places are too few"


class Cuts(NamedTuple):
    """Where a network can be cut; printed, a table.

    Attributes:
        owner: class of the network.
        rows: the places in the order of execution, and last, without a name, what comes behind the last of them.
        samples: of the example.
    """

    owner: str
    rows: tuple[Place, ...]
    samples: int

    def __str__(self) -> str:
        head = ("cut behind", "what crosses", "FLOPs forward", "bytes for gradients", "parameters")
        lines = [
            (
                row.name or "(the output)",
                "x".join(map(str, row.shape)) + (f" and {row.beside} more" if row.beside else ""),
                short(row.flops, 1000, ("", "k", "M", "G", "T")),
                short(row.bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB")),
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = [
            "  ".join(word.ljust(widths[0]) if i == 0 else word.rjust(widths[i]) for i, word in enumerate(line))
            for line in [head, *lines]
        ]
        count = len(self.rows) - 1
        cuts = f"{count} possible cut{'' if count == 1 else 's'}"
        return "\n".join(
            [
                f"{self.owner}: {cuts}; a line's figures, for {self.samples} samples, are of what lies between it and the line "
                "before",
                *text,
                *([_MORE] if any(row.beside for row in self.rows) else []),
            ]
        )


def show(net: nn.Module, example: Any = None, *, input: str | None = None, output: str | int | None = None) -> Cuts:
    """Print where a network can be cut, with operations, bytes and parameters from each place to the next.

    Where a skip connection crosses beside the main tensor, the table says how many do; of places one inside of the other, then
    only the outermost is named.

    Args:
        net: the network.
        example: a batch, as for :func:`localize`; ``None``: two samples of a guessed shape.
        input: see :func:`localize`.
        output: see :func:`localize`.
    """
    check_net(net)
    example = _guessed(net) if example is None else example
    rows = places(net, example, weigh, input=input, output=output, several=True)
    cuts = Cuts(type(net).__name__, tuple(rows), rows[-1].shape[0] if rows[-1].shape else 1)
    print(cuts)
    return cuts


def names_of(net: nn.Module, cuts: int | Sequence[str], example: Any, **which: Any) -> list[str]:
    """Names of the modules behind which to cut: those that are given, or for so many blocks; ``which``: see :func:`balanced`.

    Raises:
        ValueError: neither names nor a number; or see :func:`balanced`.
    """
    if isinstance(cuts, str):
        raise ValueError(f"cuts is {cuts!r}, expected a list of names, or a number of blocks: write [{cuts!r}]")
    if not isinstance(cuts, int | Iterable):
        raise ValueError(f"cuts is {cuts!r}, expected names of modules, or a whole number of blocks")
    return balanced(net, cuts, example, **which) if isinstance(cuts, int) else list(cuts)


def balanced(
    net: nn.Module,
    blocks: int,
    example: Any,
    *,
    input: str | None = None,
    output: str | int | None = None,
    readout: str | bool = True,
    outputs: int | None = None,
) -> list[str]:
    """Names of the modules behind which to cut, so that the largest of so many blocks is as small as it can be.

    Args:
        net: the network.
        blocks: how many.
        example: a batch.
        input: see :func:`localize`.
        output: see :func:`localize`.
        readout: see :func:`localize`.
        outputs: see :func:`localize`.

    Raises:
        ValueError: fewer than one block, or more than there can be.
    """
    if isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"cuts is {blocks}, expected a number of blocks of at least 1, or names of modules")
    if blocks == 1:
        return []
    closed: list[CannotTrace] = []
    look = partial(
        places, net, example, weigh, input=input, output=output, readout=readout, outputs=outputs, closed=closed
    )
    rows = look()
    if blocks > len(rows):  # skip connections then cross the borders
        closed.clear()
        rows = look(several=True)
    if blocks > len(rows):
        behind = ", ".join(row.name for row in rows[:-1])
        apart = " (its last layer is the readout, which is no block)" if readout is True and outputs is None else ""
        most = f"{len(rows)} blocks at most, behind {behind}" if behind else f"no more than one block{apart}"
        why = f"; inside of {closed[-1].path!r} there is no place, because {closed[-1]}" if closed else ""
        raise ValueError(
            f"cuts is {blocks}, and {type(net).__name__} can be cut into {most}: ask for fewer, or name modules{why}"
        )
    return names_for([rows[i] for i in partition([row.flops for row in rows], blocks)])


def partition(sizes: Sequence[float], parts: int) -> list[int]:
    """Places of the last members of all parts but the last, so that the largest sum is smallest.

    Of several such partitions the one with the least sum of squares, so that no part is next to nothing for no reason.
    """
    sums = [0.0, *accumulate(sizes)]
    limit = _best(sums, parts, lambda before, size: max(before, size))[0]
    return _best(sums, parts, lambda before, size: before + size * size if size <= limit else float("inf"))[1]


def _best(sums: Sequence[float], parts: int, cost: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """The partition of least cost, which grows part after part, by dynamic programming; the earliest places of several."""
    n = len(sums) - 1
    best = [[float("inf")] * (n + 1) for _ in range(parts + 1)]
    chosen = [[0] * (n + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for end in range(k, n + 1):
            for start in range(k - 1, end):
                total = cost(best[k - 1][start], sums[end] - sums[start])
                if total < best[k][end]:
                    best[k][end], chosen[k][end] = total, start
    places, end = [], n
    for k in range(parts, 1, -1):
        end = chosen[k][end]
        places.append(end - 1)
    return best[parts][n], places[::-1]


def weigh(run: Callable[[], Any]) -> tuple[Any, float, dict[int, int]]:
    """Result, operations, and bytes kept for gradients by storage."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounter()
    with saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        result = run()
    return result, float(counter.total), kept


def bytes_in(size: str | int) -> int:
    """Bytes in a size such as ``200MiB``, ``1.5 GB`` or a plain number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if found is None or found[2] not in _UNITS or not float(found[1]):
        units = ", ".join(filter(None, _UNITS))
        raise ValueError(f"memory is {size!r}, expected a number of bytes or a size such as '200MiB' (units {units})")
    return int(float(found[1]) * _UNITS[found[2]])


def short(number: float, base: int, units: Sequence[str]) -> str:
    place = 0
    while abs(number) >= base and place < len(units) - 1:
        number /= base
        place += 1
    return f"{number:.0f} {units[place]}".rstrip() if place == 0 else f"{number:.1f} {units[place]}"


def kind(value: object) -> str:
    """What somebody has given, for a message: an instance, or a class of which none was made."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_net(net: Any) -> None:
    if not isinstance(net, nn.Module):
        raise ValueError(f"net is {kind(net)}, expected a torch.nn.Module")
    if hasattr(net, "_orig_mod"):  # torch._dynamo's OptimizedModule, whose import takes seconds
        raise ValueError(
            "net is compiled as a whole, and nobody can see where it could be cut: give the network that torch.compile was "
            "given, and compile='blocks', which compiles its blocks"
        )


def _guessed(net: nn.Module) -> Tensor:
    """Two samples that the network takes, by its first layer."""
    owner = type(net).__name__
    tries: list[Tensor] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    if layers and next(net.parameters(), None) is not None:
        first = layers[0]
        if isinstance(first, nn.Conv2d):
            tries = [torch.zeros(2, first.in_channels, side, side) for side in (32, 64, 224, 299, 28)]
        elif isinstance(first, nn.Linear):
            tries = [torch.zeros(2, first.in_features)]
        else:
            tries = [torch.zeros(2, 16, dtype=torch.int64)]
        for x in (fitted(net, x) for x in tries):
            try:
                with evaluating(net), torch.no_grad():
                    net(x)
            except Exception:
                continue
            return x
    raise ValueError(f"no guess of an input fits {owner}: pass example=, a batch of inputs")
