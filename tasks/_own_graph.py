"""Graphs of one's own: reading them from a file, and finding them good or saying in one sentence what is wrong."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PARTS = {"train": "train_mask", "validation": "val_mask", "test": "test_mask"}
_USED = {"x", "y", "edge_index", "edge_weight", "edge_attr", *_PARTS.values()}


class Graph(NamedTuple):
    """A graph that has been found good, all on the CPU.

    Attributes:
        x: features, float32 ``(N, F)``.
        y: labels, int64 ``(N,)``.
        edges: edge index, int64 ``(2, E)``.
        carried: weights ``(E,)`` or features ``(E, D)`` of the edges, float32; ``None``: they carry none.
        parts: node ids of training, validation and test, in rising order.
    """

    x: Tensor
    y: Tensor
    edges: Tensor
    carried: Tensor | None
    parts: dict[str, Tensor]


def load_file(path: Path) -> Any:
    """Read a ``Data`` that ``torch.save`` wrote; nothing that the file holds is run.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    from torch_geometric.data import Data
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    try:
        with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(
            f"path={str(path)!r} cannot be read as a graph ({_reason(error)}); save a torch_geometric Data of tensors there "
            "with torch.save(data, path)."
        ) from error
    if not isinstance(data, Data):
        raise ValueError(f"path={str(path)!r} holds {type(data).__name__}, expected a torch_geometric Data.")
    return data


def _reason(error: Exception) -> str:
    """What stopped the reader; PyTorch's own text goes on with advice to read the file by running what it holds."""
    unknown = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|Unsupported operand) (\S+)", str(error))
    if unknown:
        return f"it holds {unknown.group(1)}, and only tensors, numbers and text are read, since others could run code"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror or error}"
    return type(error).__name__


def check_written_now(data: Any, name: str) -> None:
    """Refuse a ``Data`` of PyTorch Geometric 1.x, whose attributes are kept where those of today are not looked for.

    Raises:
        ValueError: it is one.
    """
    from torch_geometric.data import Data

    if isinstance(data, Data) and "_store" not in vars(data):
        raise ValueError(
            f"The graph {name!r} was written by PyTorch Geometric 1.x, which kept a Data otherwise: make a new Data of its "
            "tensors (x, y, edge_index, masks) with the version you have, and save that."
        )


def checked(data: Any, name: str, edge_features: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Features, labels, edges and what edges carry, as :class:`Graph` has them.

    Args:
        data: a ``torch_geometric.data.Data``.
        name: of the graph, for messages.
        edge_features: whether weights and features of edges are wanted.

    Raises:
        ValueError: the graph cannot be learned from; says what is wrong.
    """
    x, y, edges = (getattr(data, key, None) for key in ("x", "y", "edge_index"))
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() != 2 or x.numel() == 0 or x.is_complex():
        raise ValueError(
            f"The graph {name!r} has no node features: give x, a dense matrix (N, F) of real numbers; it is {_what(x)}."
        )
    x = x.detach().float()
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"The graph {name!r} has features x that are not finite numbers in float32: take NaN and infinity out, and scale "
            "what is too large."
        )
    if not isinstance(y, Tensor):
        raise ValueError(
            f"The graph {name!r} has no labels: give y, a class id for each node, int64 (zeros if only edges count); it is "
            f"{_what(y)}."
        )
    y = y.squeeze(1) if y.dim() == 2 and y.shape[1] == 1 else y
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex():
        raise ValueError(
            f"The graph {name!r} has labels y of shape {tuple(y.shape)} and {y.dtype} for {len(x)} nodes; give one class id"
            " for each node, int64."
        )
    _check_labels(y, name)
    if (
        not isinstance(edges, Tensor)
        or edges.layout != torch.strided
        or edges.dim() != 2
        or len(edges) != 2
        or edges.dtype != torch.int64
    ):
        raise ValueError(
            f"The graph {name!r} has no edges: give edge_index, node ids (2, E), int64; it is {_what(edges)}"
            + (", so take edge_index.T." if isinstance(edges, Tensor) and edges.shape[1:] == (2,) else ".")
        )
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x):
        raise ValueError(
            f"The graph {name!r} has edges between nodes {int(edges.min())} and {int(edges.max())}, but its nodes are 0 to"
            f" {len(x) - 1}: take them out of edge_index."
        )
    return x, y.long(), edges, _carried(data, edges.shape[1], name) if edge_features else None


def _check_labels(y: Tensor, name: str) -> None:
    """Refuse class ids that are not counted from 0; the network has an output for each number up to the largest."""
    known = y.long()[y >= 0]
    if known.numel() == 0:
        return
    low, high = map(int, known.aminmax())
    if low > 0:
        raise ValueError(
            f"The graph {name!r} has labels y from {low} to {high}, expected class ids from 0: take y - {low}, with -1 where a "
            "node has no label."
        )
    if high >= len(y):
        raise ValueError(
            f"The graph {name!r} has labels y up to {high}, more classes than its {len(y)} nodes: number the classes from 0 "
            "(torch.unique(y, return_inverse=True)[1]), and give nodes without a label -1."
        )


def _carried(data: Any, edges: int, name: str) -> Tensor | None:
    """Weights or features of the edges."""
    leave = "or set dataset.edge_features=false to leave what edges carry aside"
    carried = {key: getattr(data, key, None) for key in ("edge_weight", "edge_attr")}
    carried = {key: value for key, value in carried.items() if value is not None}
    others = [key for key in data.keys() if key.startswith("edge_") and key not in _USED]  # noqa: SIM118
    if others or len(carried) > 1:
        raise ValueError(
            f"The graph {name!r} has {', '.join([*carried, *others])}, and a network reads edge_weight or edge_attr: keep one "
            f"of the two, {leave}."
        )
    for key, value in carried.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.dim() in (1, 2)
        if not isinstance(value, Tensor) or not dense or value.is_complex() or len(value) != edges:
            raise ValueError(
                f"The graph {name!r} has {key} that is {_what(value)}, expected real numbers, one row for each of its {edges} "
                f"edges: repair it, {leave}."
            )
        value = value.detach().float()
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"The graph {name!r} has {key} that is not finite everywhere in float32: repair it, {leave}."
            )
        if key == "edge_weight" and value.dim() == 2 and value.shape[1] != 1:
            raise ValueError(
                f"The graph {name!r} has edge_weight of shape {tuple(value.shape)}, but a weight is one number: call it "
                f"edge_attr, {leave}."
            )
        return value.flatten() if key == "edge_weight" else value.reshape(edges, -1)
    return None


def masked_parts(data: Any, nodes: int, split: int, name: str) -> dict[str, Tensor] | None:
    """Node ids of the parts that the masks of a graph give; ``None`` where it has none.

    Raises:
        ValueError: some masks are there and others not, they are no masks, or have no such split.
    """
    masks: dict[str, Any] = {part: getattr(data, key, None) for part, key in _PARTS.items()}
    if all(mask is None for mask in masks.values()):
        return None
    if any(mask is None for mask in masks.values()):
        raise ValueError(
            f"The graph {name!r} has some of train_mask, val_mask and test_mask: give all three, or none for a"
            " split of 64, 16 and 20 %."
        )
    for part, mask in masks.items():
        good = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() in (1, 2) and len(mask) == nodes
        if not good:
            raise ValueError(
                f"The graph {name!r} has masks that are not boolean with one row for each node: {_PARTS[part]} is "
                f"{_what(mask)} for {nodes} nodes; make one of node ids by torch_geometric.utils.index_to_mask."
            )
    columns = {part: mask if mask.dim() == 2 else mask[:, None] for part, mask in masks.items()}
    if split >= min(column.shape[1] for column in columns.values()):
        raise ValueError(f"split={split} is out of range; the masks of {name!r} have fewer splits.")
    return {part: column[:, split].nonzero().squeeze(1) for part, column in columns.items()}


def check_parts(parts: dict[str, Tensor], y: Tensor, name: str) -> None:
    """Refuse parts without nodes, with nodes that have no label, or with nodes of another part.

    Raises:
        ValueError: says which.
    """
    for part, rows in parts.items():
        if len(rows) == 0:
            raise ValueError(f"The graph {name!r} has no {part} nodes: give its mask at least one.")
        if int(y[rows].min()) < 0:
            raise ValueError(
                f"The graph {name!r} has {part} nodes without a label (below 0): take them out of the mask."
            )
    rows = torch.cat(list(parts.values()))
    if len(torch.unique(rows)) != len(rows):
        raise ValueError(
            f"The graph {name!r} has nodes in two of its masks: training, validation and test must be apart."
        )


def tell_unused(data: Any, name: str) -> None:
    """Warn of tensors in a graph that nothing here reads."""
    unused = [
        key
        for key in data.keys()  # noqa: SIM118
        if key not in _USED and not key.startswith("edge_") and isinstance(getattr(data, key), Tensor)
    ]
    if unused:
        warnings.warn(f"the graph {name!r} has {', '.join(unused)}, which nothing here reads", stacklevel=2)


def _what(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "missing" if value is None else f"a {type(value).__name__}"
    kind = "" if value.layout == torch.strided else f"{value.layout} ".removeprefix("torch.")
    return f"{kind}{value.dtype} of shape {tuple(value.shape)}"
