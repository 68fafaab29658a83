"""Bytes that can be counted on one's fingers: checkpoints, contexts, hooks, caches, states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from locallearn.algorithms import Backprop, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import activation_bytes, bytes_of, cache_bytes, measure_update, optimizer_bytes
from locallearn.cost._bytes import ActivationBytes, Alive, kept_tensors
from locallearn.nets import Blocks

SAMPLES, WIDTH = 4, 8
UNIT = 4 * SAMPLES * WIDTH


def _segment() -> nn.Module:
    """Keeps its input for the first weight, and what both squashed, for their own gradients and the second weight."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def _peak(net: nn.ModuleList, how: dict[str, Any] | None) -> tuple[float, float, float]:
    """In units: at the end of the forward pass, the peak, and what is left."""
    x = torch.rand(SAMPLES, WIDTH, requires_grad=True)
    with activation_bytes(net) as count:
        h = x
        for segment in net:
            h = segment(h) if how is None else checkpoint(segment, h, **how)
        loss = h.sum()
        forward = count.current
        del h
        loss.backward()
    return forward / UNIT, count.peak / UNIT, count.current / UNIT


def test_a_plain_net_keeps_everything() -> None:
    assert _peak(nn.ModuleList(_segment() for _ in range(4)), None) == (9, 9, 0)


@pytest.mark.parametrize(
    "how", [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "early_stop": False}]
)
def test_what_a_checkpoint_computes_again_counts(how: dict[str, Any]) -> None:
    """Forward the inputs of all segments; backward beside them the two activations of the last one."""
    if "early_stop" in how and torch.__version__ < "2.9":
        pytest.skip("this release has no early_stop here")
    forward, peak, left = _peak(nn.ModuleList(_segment() for _ in range(4)), how)
    assert (forward, peak) == (4, 6)
    if not how["use_reentrant"]:
        assert left == 0


def test_a_segment_in_a_segment_is_computed_again_in_parts() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(_segment() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = checkpoint(part, x, use_reentrant=False)
            return x

    forward, peak, left = _peak(nn.ModuleList([Outer(), Outer()]), {"use_reentrant": False})
    # Inputs of both outer segments; of the second one its three inner inputs, one of them known; two inside the last one.
    assert (forward, peak, left) == (2, 2 + 2 + 2, 0)


def test_checkpoints_of_equal_parts_save_what_is_between_them() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(16)))
    x = torch.rand(SAMPLES, WIDTH, requires_grad=True)
    peaks = {}
    for parts in (1, 4):
        with activation_bytes(net) as count:
            y = checkpoint_sequential(net, parts, x, use_reentrant=False) if parts > 1 else net(x)
            y.sum().backward()
        peaks[parts] = count.peak / UNIT
        del y
    assert peaks[1] == 17
    assert peaks[4] == 8  # the last part is not checkpointed: three inputs, its own one and its four activations


class _Keeps(torch.autograd.Function):
    """Keeps what it should save."""

    how = "attribute"

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        doubled = x * 2
        held = {
            "attribute": doubled,
            "list": [doubled, {"again": doubled}],
            "closure": lambda: doubled,
            "view": doubled[:1],
            "object": SimpleNamespace(inside=doubled),
        }
        ctx.kept = held[_Keeps.how]
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("how", ["attribute", "list", "closure", "view", "object"])
def test_tensors_on_a_context_count_until_the_node_is_gone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Keeps, "how", how)
    layer = nn.Linear(WIDTH, WIDTH)
    with activation_bytes(layer) as count:
        y = _Keeps.apply(layer(torch.rand(SAMPLES, WIDTH))).sum()
        assert count.current == 2 * UNIT  # the layer's input, and what is kept
        y.backward()
        assert count.current == UNIT
        del y
        assert count.current == 0
    assert "__setattr__" not in vars(BackwardCFunction)


_kept_early = _Keeps.apply  # as people write it: once, where the Function is defined


def test_contexts_are_seen_however_the_function_is_called() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    with activation_bytes(layer) as count:
        y = layer(torch.rand(SAMPLES, WIDTH))
        for _ in range(3):
            y = _kept_early(y)  # the last one has no operation after it
        assert count.current == count.peak == (1 + 3) * UNIT
        with torch.no_grad():
            _kept_early(y)
        y.sum().backward()
        del y
        assert count.current == 0
    assert count.peak == (1 + 3) * UNIT


def test_a_rule_whose_blocks_end_in_such_a_function() -> None:
    """Two blocks that keep what they save and give nothing else to the graph, and a readout."""
    net = Blocks({f"b{i}": _Scaled() for i in range(2)}, nn.Linear(WIDTH, 3))
    batch = Batch(torch.rand(SAMPLES, WIDTH), torch.arange(SAMPLES) % 3)
    rule = Backprop()
    rule.attach(net, TaskInfo(batch, 3, torch.nn.functional.mse_loss))
    batch = batch._replace(targets=torch.rand(SAMPLES, 3))
    outputs = 4 * SAMPLES * 3
    # What each block keeps, the readout's input, and outputs and targets for the loss.
    assert measure_update(rule, batch).activation_peak_bytes == (2 + 1) * UNIT + 2 * outputs


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.function = _kept_early

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.shift)


def test_hooks_of_others_are_charged_what_they_keep() -> None:
    x = torch.rand(SAMPLES, WIDTH, requires_grad=True)
    with activation_bytes(nn.Linear(1, 1)) as count:
        with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
            y = x.exp()
        assert count.current == UNIT / 2
        y.sum().backward()
        del y
        assert count.current == 0
        with save_on_cpu():
            y = x.exp()
        assert count.current == UNIT
        y.sum().backward()
    with activation_bytes(nn.Linear(1, 1)) as count:
        x.exp()
    assert count.peak == UNIT


def test_views_work_in_place_and_tensors_saved_twice_count_once() -> None:
    x = torch.rand(SAMPLES, WIDTH, requires_grad=True)
    with activation_bytes(nn.Linear(1, 1)) as count:
        y = x * 1.0
        whole = y[:, :2].exp() + y[:, 2:4].exp()  # two results of two columns
        assert count.current == 2 * UNIT / 4
        z = (x + 1).relu_()
        again = z[:1].square() + z.square().sum()
        assert count.current == 2 * UNIT / 4 + UNIT
        (whole.sum() + again.sum()).backward()
        assert count.current == 0


def test_sparse_tensors_count_by_their_parts() -> None:
    matrix = torch.eye(5).to_sparse()
    right = torch.rand(5, 3, requires_grad=True)
    with activation_bytes(nn.Linear(1, 1)) as count:
        product = torch.sparse.mm(matrix, right)
        assert count.current == bytes_of([matrix]) == 5 * 2 * 8 + 5 * 4
        del product


# -- caches and states --------------------------------------------------------------------------------------------------
def test_what_is_kept_beside_weights_and_buffers_is_found() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    given = torch.rand(7)
    assert cache_bytes(net) == 0
    net[0].seen = {"a": [torch.zeros(10), given], "b": SimpleNamespace(x=torch.zeros(5), w=net[0].weight)}
    assert cache_bytes(net, without=[given]) == 4 * 15
    assert cache_bytes(net) == 4 * 22


def test_bytes_of_optimizers_are_their_moments() -> None:
    layer = nn.Linear(5, 3)
    adam, sgd = torch.optim.Adam(layer.parameters()), torch.optim.SGD(layer.parameters(), lr=0.1)
    assert optimizer_bytes([adam, sgd]) == 0
    layer(torch.rand(2, 5)).sum().backward()
    adam.step()
    sgd.step()
    steps = 2 * 4
    assert optimizer_bytes([adam, sgd]) == 2 * 4 * (15 + 3) + steps


def test_operators_get_their_keywords_under_watch() -> None:
    with Alive(()) as alive:
        made = torch.full((2,), 3.0, dtype=torch.float64)
        other = made + made
        assert made.dtype == other.dtype == torch.float64
        assert alive.bytes() == 2 * 16
        del made
        assert alive.bytes() == 16
        assert alive.bytes(without=[other]) == 0


def test_a_place_that_is_taken_again_counts_at_its_new_size() -> None:
    """What a checkpoint computed is gone, and something smaller lies where it lay."""
    count, memory, holder = ActivationBytes(), bytearray(1000), nn.Identity()
    tensor = torch.frombuffer(memory, dtype=torch.uint8, count=1000)
    count.hold_recomputed(tensor)
    assert count.current == 1000
    del tensor
    count.hold([torch.frombuffer(memory, dtype=torch.uint8, count=300)], holder)
    assert count.current == 300
    del holder
    assert (count.current, count.peak) == (0, 1000)


def test_what_is_looked_into_for_kept_tensors() -> None:
    tensor, net = torch.ones(2), nn.Linear(2, 2)
    ring: list[Any] = [tensor]
    ring.append(ring)
    assert [id(found) for found in kept_tensors(ring)] == [id(tensor)]  # once round
    assert list(kept_tensors({"net": net, "kinds": [nn.Linear, torch], "text": "t"})) == []  # a module counts by itself

    def early(fill: bool) -> Any:
        def reads() -> Tensor:
            return later

        if fill:
            later = tensor
        return reads

    assert [id(found) for found in kept_tensors(early(True))] == [id(tensor)]
    assert list(kept_tensors(early(False))) == []  # its variable has no value yet
