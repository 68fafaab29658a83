"""Backpropagation's two controls of memory: checkpointing changes nothing but cost, accumulation gives the batch's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Backprop, TaskInfo
from locallearn.batch import Batch
from locallearn.cost import measure_update
from locallearn.nets import Blocks, cnn, gnn, mlp, resnet, resnet18

CLASSES = 4


def _images(rows: int = 6, side: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, side, side, generator=draw, dtype=dtype)
    return Batch(images, torch.arange(rows) % CLASSES)


def _attached(net: Blocks, batch: Batch, **settings: object) -> Backprop:
    algorithm = Backprop(**settings)  # type: ignore[arg-type]
    two = batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2])
    algorithm.attach(net, TaskInfo(two, CLASSES, F.cross_entropy))
    return algorithm.train()


class _Odd(nn.Module):
    """Everything that a second pass could do otherwise: draws, statistics, a vector that every pass turns."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(before, after, 3, padding=1))
        self.bn = nn.BatchNorm2d(after)
        self.instance = nn.InstanceNorm2d(after, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.instance(self.dropout(self.bn(self.conv(x)).relu_()))
        return out


def _odd() -> Blocks:
    blocks = {"a": _Odd(3, 4), "b": _Odd(4, 5), "c": _Odd(5, 4), "d": _Odd(4, 3)}
    return Blocks(blocks, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)))


@pytest.mark.parametrize("checkpoint", ["auto", 1, 2, 4, ["a"], ["b", "c"], "b"])
def test_checkpointing_changes_no_bit_of_weights_statistics_and_draws(checkpoint: str | int | list[str]) -> None:
    batch = _images()
    found = []
    for how in (None, checkpoint):
        torch.manual_seed(1)
        algorithm = _attached(_odd(), batch, checkpoint=how)
        optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
        losses = []
        torch.manual_seed(2)
        for _ in range(3):
            (update,) = algorithm.updates(batch)
            update.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(update.loss)
        found.append([*losses, *algorithm.parameters(), *algorithm.buffers(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert int(algorithm.blocks[0].bn.num_batches_tracked) == 3  # type: ignore[operator, union-attr]


def test_frozen_parts_and_evaluation_stay_as_they_are() -> None:
    batch = _images()
    torch.manual_seed(1)
    algorithm = _attached(_odd(), batch, checkpoint=4)
    algorithm.blocks[0].requires_grad_(False)
    before = {name: value.clone() for name, value in algorithm.blocks[0].state_dict().items()}
    (update,) = algorithm.updates(batch)
    update.backward()
    assert all(torch.equal(before[name], value) for name, value in algorithm.blocks[0].state_dict().items())
    assert algorithm.blocks[1].conv.parametrizations.weight.original.grad is not None  # type: ignore[union-attr]
    assert set(algorithm.state_dict()) == set(_attached(_odd(), batch).state_dict())


def _peak(net: Blocks, batch: Batch, checkpoint: object) -> int:
    return measure_update(_attached(copy.deepcopy(net), batch, checkpoint=checkpoint), batch).activation_peak_bytes


def _pyramid() -> Blocks:
    return cnn((3, 8, 8), CLASSES, channels=(2, 9, 5), batch_norm=True)


NETS: dict[str, Callable[[], Blocks]] = {
    "mlp": lambda: mlp((3, 8, 8), CLASSES, hidden=(50, 7, 90, 90, 11)),
    "cnn": _pyramid,
    "resnet": lambda: resnet((3, 8, 8), CLASSES, units=2, widths=(3, 5)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_chosen_segments_are_the_best_of_all(name: str) -> None:
    torch.manual_seed(0)
    net, batch = NETS[name](), _images()
    names = net.names[:-1]
    peaks: dict[int, int] = {}
    for count in range(len(names) + 1):
        peaks[count + 1] = min(_peak(net, batch, list(cuts)) for cuts in combinations(names, count))
    for parts, best in peaks.items():
        assert _peak(net, batch, parts) == best
    assert _peak(net, batch, "auto") == min(peaks.values()) < peaks[1]
    chosen = _attached(copy.deepcopy(net), batch, checkpoint="auto").checkpoints
    assert chosen
    assert set(chosen) <= set(names)


@pytest.mark.parametrize(
    ("cuts", "flops", "size"),
    [
        (["layer1_0", "layer1_1", "layer2_0"], 1.13, 0.443),
        (["layer1_1"], 1.09, 0.559),
        ("auto", 1.25, 0.337),
    ],
)
def test_resnet18_costs_what_can_be_counted(cuts: str | list[str], flops: float, size: float) -> None:
    """A border of the first layer is 64 * 32 * 32 floats: plain 17.875 of them, the first two units 2 + 4 and 4, and so on."""
    batch = _images(2, 32)
    torch.manual_seed(0)
    net = resnet18((3, 32, 32), CLASSES, cuts="units")
    plain = measure_update(_attached(copy.deepcopy(net), batch), batch)
    other = measure_update(_attached(net, batch, checkpoint=cuts), batch)
    assert plain.flops == pytest.approx(3.329e9, rel=0.001)
    assert plain.activation_peak_bytes / 2 == pytest.approx(4.71e6, rel=0.01)
    assert other.flops / plain.flops == pytest.approx(flops, rel=0.01)
    assert other.activation_peak_bytes / plain.activation_peak_bytes == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        (
            "layer9",
            "checkpoint names 'layer9', and the network has no such block to cut after; it has layer1, layer2, layer3",
        ),
        (["layer2", "layer1"], "expected blocks in the order of the forward pass, each once"),
        (["layer1", "layer1"], "each once"),
        (["layer3"], "checkpoint names 'layer3', after which the network ends: leave it out"),
        (4, "checkpoint is 4, but the network has 3 blocks: ask for 1 to 3 segments"),
        (0, "checkpoint is 0"),
        (True, "checkpoint is True"),
    ],
)
def test_segments_that_cannot_be_made_are_refused(checkpoint: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _attached(mlp((3, 8, 8), CLASSES, hidden=(4, 4, 4)), _images(), checkpoint=checkpoint)


# -- accumulation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", [2, 3, 7, 50])
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_the_gradient_is_the_whole_batchs_however_the_parts_come_out(parts: int, checkpoint: int | None) -> None:
    batch = _images(7, dtype=torch.float64)
    found = []
    for settings in ({}, {"accumulate": parts, "checkpoint": checkpoint}):
        torch.manual_seed(0)
        algorithm = _attached(cnn((3, 8, 8), CLASSES, channels=(3, 4)).double(), batch, **settings)
        (update,) = algorithm.updates(batch)
        update.backward()
        assert update.loss is not None
        found.append([update.loss, *(p.grad for p in algorithm.parameters())])
    for whole, summed in zip(*found, strict=True):
        assert torch.allclose(whole, summed, rtol=1e-12, atol=1e-15)


def test_batch_norm_sees_each_part_by_itself() -> None:
    batch = _images(5)
    torch.manual_seed(0)
    algorithm = _attached(_pyramid(), batch, accumulate=2)
    net = copy.deepcopy(algorithm.blocks)
    net.train()
    for x, y in ((batch.inputs[:3], batch.targets[:3]), (batch.inputs[3:], batch.targets[3:])):
        (F.cross_entropy(net(x), y) * len(x) / 5).backward()
    (update,) = algorithm.updates(batch)
    update.backward()
    for ours, theirs in zip(algorithm.blocks.parameters(), net.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)  # type: ignore[arg-type]
    for ours, theirs in zip(algorithm.blocks.buffers(), net.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_were_there_stay_until_the_update_is_asked_for() -> None:
    batch = _images()
    torch.manual_seed(0)
    algorithm = _attached(_pyramid(), batch, accumulate=2)
    weight, frozen = algorithm.blocks[1][0].weight, algorithm.blocks[0][0].weight  # type: ignore[index]
    weight.grad = torch.ones_like(weight)
    frozen.requires_grad_(False)
    (update,) = algorithm.updates(batch)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert update.gradients is not None
    added = update.gradients[weight]
    update.backward()
    assert torch.equal(weight.grad, 1 + added)
    assert frozen.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_agree_under_autocast(dtype: torch.dtype) -> None:
    batch = _images(6)
    torch.manual_seed(0)
    algorithm = _attached(cnn((3, 8, 8), CLASSES, channels=(3, 4)), batch, accumulate=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        (update,) = algorithm.updates(batch)
    assert update.gradients is not None
    alone = Backprop()
    alone.attach(copy.deepcopy(algorithm.blocks), TaskInfo(batch, CLASSES, F.cross_entropy))
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            (one,) = alone.updates(Batch(batch.inputs[rows], batch.targets[rows]))
        one.backward()
    for (p, ours), theirs in zip(update.gradients.items(), alone.parameters(), strict=True):
        assert p.grad is None
        assert torch.allclose(ours, theirs.grad / 3, atol=1e-3 if dtype is torch.bfloat16 else 1e-7)  # type: ignore[operator]


def test_parts_keep_the_activations_of_one_part_alive() -> None:
    batch = _images(16)
    net = _pyramid()
    peaks = {
        parts: measure_update(_attached(copy.deepcopy(net), batch, accumulate=parts), batch).activation_peak_bytes
        for parts in (1, 2, 4)
    }
    given = batch.inputs.numel() * 4 + batch.targets.numel() * 8
    for parts in (2, 4):
        assert peaks[parts] - given == pytest.approx((peaks[1] - given) / parts, rel=0.05)


def test_what_cannot_be_split_is_refused() -> None:
    for parts in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"accumulate is {parts}, expected a whole number of parts of at least 1"):
            Backprop(accumulate=parts)  # type: ignore[arg-type]
    edges = torch.tensor([[0, 1], [1, 0]])
    graph = Batch(torch.randn(3, 5), torch.zeros(3, dtype=torch.long), (edges,), rows=torch.arange(3))
    with pytest.raises(ValueError, match="accumulate is 2, but a graph is one batch whose nodes see one another"):
        Backprop(accumulate=2).attach(gnn((5,), 2, hidden=(4,)), TaskInfo(graph, 2, F.cross_entropy))
    checkpointed = Backprop(checkpoint=2)
    checkpointed.attach(gnn((5,), 2, hidden=(4, 4)), TaskInfo(graph, 2, F.cross_entropy))
    (update,) = checkpointed.updates(graph)
    update.backward()
    assert all(p.grad is not None for p in checkpointed.parameters())


def test_the_variant_says_how_memory_is_saved() -> None:
    assert Backprop().variant is None
    assert Backprop(checkpoint="auto").variant == "checkpoint=auto"
    assert Backprop(checkpoint=["a", "b"], accumulate=4).variant == "checkpoint=[a,b], accumulate=4"


_WEIGHTS = torch.tensor([1.0, 5.0, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("label", "loss"),
    [
        (-100, F.cross_entropy),
        (1, partial(F.cross_entropy, ignore_index=1)),
        (255, nn.CrossEntropyLoss(weight=_WEIGHTS, ignore_index=255, label_smoothing=0.1)),
        (-100, partial(F.cross_entropy, weight=_WEIGHTS)),
    ],
    ids=["usual", "partial", "module", "weights"],
)
def test_parts_count_by_what_the_mean_divides_by(label: int, loss: Any) -> None:
    torch.manual_seed(0)
    net = Blocks({"one": nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())}, nn.Conv2d(5, CLASSES, 1)).double()
    images, labels = torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.randint(CLASSES, (6, 4, 4))
    labels[2:4], labels[0, :3] = label, label  # the second part of three, and some of the first
    algorithm = Backprop(accumulate=3)
    algorithm.attach(net, TaskInfo(Batch(images[:2], labels[:2]), CLASSES, loss))
    (update,) = algorithm.train().updates(Batch(images, labels))
    whole = loss(net(images), labels)
    assert update.loss is not None
    assert update.gradients is not None
    torch.testing.assert_close(update.loss, whole.detach())
    for p, expected in zip(net.parameters(), torch.autograd.grad(whole, list(net.parameters())), strict=True):
        torch.testing.assert_close(update.gradients[p], expected)
