"""What ForwardGNN refuses when it is attached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locallearn.algorithms.base import TaskInfo
from locallearn.batch import Batch
from locallearn.nets.blocks import Blocks
from locallearn.nets.graph import check_edges


def has_pairs(example: Batch) -> bool:
    """Whether a task asks for edges, not for nodes."""
    return example.rows is not None and example.rows.ndim == 2


def check_graph(task: TaskInfo) -> None:
    """Refuse tasks without a graph, and graphs that are broken.

    Raises:
        ValueError: says what is wrong.
    """
    example = task.example
    if len(example.context) not in (1, 2) or not all(isinstance(c, Tensor) for c in example.context):
        raise ValueError(
            f"ForwardGNN learns on graphs, whose batches carry an edge index and perhaps weights as context, and this "
            f"task's carry {len(example.context)} things: choose a graph task, or another algorithm"
        )
    if any(c.ndim != 1 for c in example.context[1:]):
        raise ValueError(
            "ForwardGNN joins nodes to virtual ones, and the edges of this graph carry features, which those edges could "
            "not have: set dataset.edge_features=false, give the graph edge_weight, or choose another algorithm"
        )
    if example.inputs.ndim != 2 or not example.inputs.is_floating_point():
        raise ValueError(
            f"ForwardGNN reads one row of numbers per node, and inputs are {example.inputs.dtype} of shape "
            f"{tuple(example.inputs.shape)}: give floats of shape (N, F)"
        )
    if not bool(example.inputs.isfinite().all()):
        broken = (~example.inputs.isfinite()).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"features of {len(broken)} nodes are not finite, the first is node {broken[0]}: repair the data"
        )
    check_edges(example.context[0], len(example.inputs))
    if has_pairs(example):
        assert example.rows is not None
        check_edges(example.rows, len(example.inputs))


def check_columns(blocks: Blocks, features: int, beside: Sequence[int], weighted: bool, who: str, hint: str) -> None:
    """Run a single node through one block after the other, each with the columns that the rule will give it.

    Args:
        blocks: the network.
        features: of a node.
        beside: columns that a block reads beside what comes from below.
        weighted: whether edges carry weights.
        who: asks.
        hint: how to make a network that fits; may be empty.

    Raises:
        ValueError: names the block that does not take them, or gives something else than rows.
    """
    below, dtype = features, next(blocks.parameters()).dtype
    loop = torch.zeros(2, 1, dtype=torch.int64)
    for name, block, more in zip(blocks.names, blocks, beside, strict=True):
        try:
            with torch.no_grad():
                output = block(torch.zeros(1, below + more, dtype=dtype), loop, *([torch.ones(1)] if weighted else []))
        except Exception as error:
            raise ValueError(
                f"block {name!r} does not take the {below + more} columns that {who} gives it ({error}){hint}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 1:
            raise ValueError(f"block {name!r} does not give one row per node, which ForwardGNN needs")
        below = output.shape[1]
