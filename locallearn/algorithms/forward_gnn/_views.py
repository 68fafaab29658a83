"""What the layers see of a graph, and what is kept while the same graph comes again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

_T = TypeVar("_T")
Edges = Tensor | tuple[Tensor, ...]
"""An edge index ``(2, E)``; with the weights ``(E,)`` of edges that have some."""


class View(NamedTuple):
    """A graph in one or several views that differ by the labels they show.

    Attributes:
        inputs: of the first block, with rows of length 1, shared by all views, ``(N, F)``; with virtual nodes
            ``(N + K, F)``.
        graphs: edges of every view, or one for all of them.
        columns: further columns of the first block's input by view, ``(G, N, K)`` (``ff_la``), or of the last block's,
            ``(N + K, K)`` (``sf_top_to_input``).
        raw: the inputs before their rows were scaled (``sf_top_to_loss``).
    """

    inputs: Tensor
    graphs: tuple[Edges, ...]
    columns: Tensor | None = None
    raw: Tensor | None = None


class Kept:
    """Results that are kept while the tensors they were made of come again unchanged, the last one of every name.

    A step of a fused optimizer leaves a tensor's version as it was, so what learns must not be among these tensors.
    """

    def __init__(self) -> None:
        self._results: dict[str, tuple[tuple[Tensor, ...], tuple[int, ...], Any]] = {}

    def get(self, name: str, tensors: tuple[Tensor, ...], make: Callable[[], _T]) -> _T:
        """What ``make`` made of these very tensors before, or makes now, without gradients."""
        versions = tuple(0 if t.is_inference() else t._version for t in tensors)
        known = self._results.get(name)
        same = known is not None and len(known[0]) == len(tensors)
        if known is not None and same and all(map(operator.is_, known[0], tensors)) and known[1] == versions:
            return cast(_T, known[2])
        # Validation runs in inference mode, and what it makes is to serve training, too.
        with torch.inference_mode(False), torch.no_grad():
            result = make()
        self._results[name] = (tensors, versions, result)
        return result

    def forget(self, *names: str) -> None:
        """Drop these results."""
        for name in names:
            self._results.pop(name, None)

    def holds(self, x: Tensor) -> bool:
        """Whether this is a kept result, or the input of a kept view."""
        results = [result for _, _, result in self._results.values()]
        return any(x is (result.inputs if isinstance(result, View) else result) for result in results)


def joined(index: Tensor, *weights: Tensor) -> Edges:
    """An edge index with the weights that come with it, where some do."""
    return (index, *weights) if weights else index


def apart(edges: Edges) -> tuple[Tensor, ...]:
    """The arguments of a block after its input."""
    return (edges,) if isinstance(edges, Tensor) else edges


def of_view(part: Tensor, index: int) -> Tensor:
    """What one view has of a tensor that is shared or has a part for every view."""
    return part[index] if part.ndim == 3 else part
