"""Joint training of deep networks holds one block's graph at a time, whatever the depth; its controls do not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from locallearn.algorithms import Algorithm, Backprop, MonoForward, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import activation_bytes, drive
from locallearn.nets import Blocks, mlp, resnet

ROWS = 8
BATCH = Batch(torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(ROWS) % 4)
GIVEN = BATCH.inputs.numel() * 4


def _peak(net: Blocks, algorithm: Algorithm) -> int:
    algorithm.attach(copy.deepcopy(net), TaskInfo(BATCH, 4, F.cross_entropy))
    algorithm.train()
    with activation_bytes(algorithm) as count:
        drive(algorithm, BATCH)
    return count.peak


@pytest.mark.parametrize(
    ("make", "border"),
    [
        (lambda units: resnet((3, 8, 8), 4, units, (2, 2, 2)), ROWS * 2 * 64 * 4),
        (lambda layers: mlp((3, 8, 8), 4, (64,) * layers), ROWS * 64 * 4),
    ],
    ids=["resnet", "mlp"],
)
def test_one_blocks_graph_at_a_time(make: Callable[[int], Blocks], border: int) -> None:
    """ResNet-110 and an MLP of 54 layers; ``border`` is one map of the widest stage."""
    torch.manual_seed(0)
    shallow, deep = make(1), make(18)
    if len(deep) == 18:
        deep = make(54)
    local = _peak(deep, MonoForward())
    assert local == _peak(shallow, MonoForward())  # the same for three units
    plain, checkpointed = _peak(deep, Backprop()), _peak(deep, Backprop(checkpoint="auto"))
    accumulated = _peak(deep, Backprop(accumulate=2))
    assert 10 * local < plain
    assert local + 3 * border < checkpointed < plain / 3  # borders are kept, too
    assert accumulated - GIVEN == pytest.approx((plain - GIVEN) / 2, rel=0.05)
