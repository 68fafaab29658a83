"""Costs against closed forms: FLOPs of the specs, bytes that can be counted on one's fingers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import (
    Algorithm,
    Backprop,
    DeepSupervision,
    FeedbackAlignment,
    ForwardForward,
    Locality,
    MonoForward,
    Pepita,
    ProductFeedbackAlignment,
    TaskInfo,
    Update,
)
from locallearn.batch import Batch
from locallearn.cost import UpdateCost, activation_bytes, drive, measure_update
from locallearn.functional import forward_forward, mono_forward
from locallearn.nets import Blocks, mlp

NETS = [((20, 16), 4), ((20, 16, 12, 8), 4), ((9, 30, 7), 5)]


def _measured(
    make: Callable[[], Algorithm], widths: tuple[int, ...], classes: int, samples: int = 2, sequential: bool = False
) -> UpdateCost:
    algorithm = make()
    batch = Batch(torch.rand(samples, widths[0]), torch.arange(samples) % classes)
    algorithm.attach(
        mlp((widths[0],), classes, widths[1:]),
        TaskInfo(batch._replace(inputs=batch.inputs[:2]), classes, F.cross_entropy),
    )
    return measure_update(algorithm, batch, sequential)


@pytest.mark.parametrize(("widths", "classes"), NETS)
def test_update_flops_are_the_closed_forms(widths: tuple[int, ...], classes: int) -> None:
    mono = _measured(MonoForward, widths, classes).flops
    back = _measured(Backprop, widths, classes).flops
    forward = _measured(ForwardForward, widths, classes).flops
    assert mono == 2 * mono_forward.update_macs(widths, classes)
    assert back == 2 * mono_forward.backprop_macs(widths, classes)
    assert forward == forward_forward.update_flops(widths)


@pytest.mark.parametrize(("widths", "classes"), NETS)
def test_deep_supervision_pays_for_both(widths: tuple[int, ...], classes: int) -> None:
    """Backprop through the trunk, and G, the gradient of M and E M for every head: 3Q - d0 d1 + 3R."""
    hidden = sum(before * after for before, after in pairwise(widths))
    expected = 3 * hidden - widths[0] * widths[1] + 3 * classes * sum(widths[1:])
    assert _measured(DeepSupervision, widths, classes).flops == 2 * expected


@pytest.mark.parametrize("options", [{"negatives": "hard"}, {"inference": "softmax"}])
@pytest.mark.parametrize(("widths", "classes"), NETS[1:])
def test_forward_forward_pays_for_its_neutral_pass_and_readout(
    options: dict[str, str], widths: tuple[int, ...], classes: int
) -> None:
    flops = _measured(partial(ForwardForward, **options), widths, classes).flops
    drawing = 2 * classes * sum(widths[2:]) if "negatives" in options else 0  # the readout also chooses the negatives
    assert flops == forward_forward.update_flops(widths, neutral=True, readout_classes=classes) + drawing


@pytest.mark.parametrize(("widths", "classes"), NETS)
def test_sequential_stages_pay_for_the_recomputed_prefix(widths: tuple[int, ...], classes: int) -> None:
    """One update of every stage: the joint cost, and (L - i) further forward passes of layer i."""
    depth = len(widths) - 1
    prefix = sum((depth - i) * widths[i - 1] * widths[i] for i in range(1, depth + 1))
    joint = mono_forward.update_macs(widths, classes)
    assert _measured(MonoForward, widths, classes, sequential=True).flops == 2 * (joint + prefix)


@pytest.mark.parametrize(
    ("widths", "classes", "ratio"),
    [
        ((784, 1000, 1000), 10, 0.789),
        ((3072, 2000, 2000, 2000), 10, 0.783),
        ((3072, 2000, 2000, 2000), 100, 0.816),
        ((784, 2000, 2000, 2000, 2000), 10, 0.698),
    ],
)
def test_ratios_of_the_published_networks(widths: tuple[int, ...], classes: int, ratio: float) -> None:
    mono = _measured(MonoForward, widths, classes).flops
    assert round(mono / _measured(Backprop, widths, classes).flops, 3) == ratio


def test_flops_are_per_sample_and_the_algorithm_is_left_alone() -> None:
    assert _measured(MonoForward, (20, 16), 4, samples=2).flops == _measured(MonoForward, (20, 16), 4, samples=8).flops
    algorithm = ForwardForward()
    batch = Batch(torch.rand(4, 20), torch.arange(4))
    algorithm.attach(mlp((20,), 4, (16,)), TaskInfo(batch, 4, F.cross_entropy))
    before = [p.clone() for p in algorithm.parameters()]
    measure_update(algorithm, batch)
    assert all(torch.equal(old, p) and p.grad is None for old, p in zip(before, algorithm.parameters(), strict=True))
    assert algorithm.get_extra_state() == {}


# -- bytes ------------------------------------------------------------------------------------------------------------
def test_bytes_of_a_network_counted_by_hand() -> None:
    """Linear saves its input, ReLU its output; squaring saves what it squares, which is that same output."""
    layer = nn.Linear(5, 3)
    x = torch.rand(2, 5)
    with activation_bytes(layer) as count:
        loss = layer(x).relu().square().sum()
        assert count.current == count.peak == 4 * (2 * 5 + 2 * 3)
        loss.backward()
        assert count.current == 0
        assert count.peak == 4 * (2 * 5 + 2 * 3)


def test_weights_do_not_count_and_a_graph_that_is_let_go_does_not_either() -> None:
    first, second = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)
    x = torch.rand(2, 5)
    with activation_bytes(nn.Sequential(first, second)) as count:
        out = second(first(x))  # two inputs; the second layer also saves its weight, for the gradient of its input
        assert count.current == 4 * (2 * 5 + 2 * 4)
        del out
        assert count.current == 0


def test_bytes_of_one_mono_forward_block_by_hand() -> None:
    """Of the last layer: a_0, a_1 and the log-softmax; the mean saves nothing but its total weight, a scalar."""
    samples, wide, classes = 6, 8, 4
    cost = _measured(MonoForward, (wide, wide, wide), classes, samples)
    tensors = 4 * (samples * wide + samples * wide + samples * classes)
    labels = 8 * samples
    assert tensors + labels <= cost.activation_peak_bytes <= tensors + labels + 8


@pytest.mark.parametrize("make", [MonoForward, ForwardForward, partial(ForwardForward, peer=0.03)])
def test_layer_local_memory_is_flat_in_depth(make: Callable[[], Algorithm]) -> None:
    four, thirty_two = (_measured(make, (64,) * (depth + 1), 10, samples=32).activation_peak_bytes for depth in (4, 32))
    assert thirty_two <= 1.05 * four


@pytest.mark.parametrize("make", [Backprop, DeepSupervision])
def test_backprop_memory_grows_with_depth(make: Callable[[], Algorithm]) -> None:
    four, eight, thirty_two = (
        _measured(make, (64,) * (depth + 1), 10, samples=32).activation_peak_bytes for depth in (4, 8, 32)
    )
    assert thirty_two - eight == pytest.approx(6 * (eight - four), rel=0.01)  # linear: 24 blocks more against 4
    assert thirty_two > 6 * four


@pytest.mark.parametrize(("variant", "grows"), [("standard", True), ("hebbian", True), ("time_local", False)])
def test_what_a_rule_without_graphs_holds_counts(variant: str, grows: bool) -> None:
    """PEPITA keeps every layer's activity of the first pass, its time-local variant one layer's."""

    def pepita() -> Algorithm:
        return Pepita(variant=variant, dropout=0.0)  # type: ignore[arg-type]

    samples, wide, classes = 32, 64, 10
    four, eight, thirty_two = (
        _measured(pepita, (wide,) * (depth + 1), classes, samples).activation_peak_bytes for depth in (4, 8, 32)
    )
    layer, given = 4 * samples * wide, 4 * samples * wide + 8 * samples
    if grows:
        # Once per layer, with hebbian, too: what a layer reads is what the one below answered.
        assert thirty_two - eight == 6 * (eight - four) == 24 * layer
        assert four >= given + 4 * layer
    else:
        assert thirty_two == four
        assert given + layer <= four <= given + 6 * layer


def test_sequential_memory_is_that_of_the_dearest_stage() -> None:
    widths = (64, 64, 16, 16)
    joint = _measured(MonoForward, widths, 10, samples=32).activation_peak_bytes
    assert _measured(MonoForward, widths, 10, samples=32, sequential=True).activation_peak_bytes == joint


def test_a_slice_of_a_data_set_counts_as_itself() -> None:
    data = torch.rand(1000, 20)
    algorithm = MonoForward()
    batch = Batch(data[:4], torch.arange(4))
    algorithm.attach(mlp((20,), 4, (16,)), TaskInfo(batch, 4, F.cross_entropy))
    assert measure_update(algorithm, batch).activation_peak_bytes < 4 * 4 * (20 + 16 + 16 + 16)


def test_drive_leaves_no_gradients() -> None:
    algorithm = MonoForward()
    batch = Batch(torch.rand(4, 20), torch.arange(4))
    algorithm.attach(mlp((20,), 4, (16,)), TaskInfo(batch, 4, F.cross_entropy))
    drive(algorithm, batch)
    assert all(p.grad is None for p in algorithm.parameters())


# -- what settles, and what is done once ------------------------------------------------------------------------------
def _rows(samples: int, width: int, classes: int, start: int = 0) -> Batch:
    return Batch(torch.rand(samples, width), torch.arange(samples) % classes, index=torch.arange(samples) + start)


def _mono(widths: tuple[int, ...], classes: int, batch: Batch) -> MonoForward:
    algorithm = MonoForward()
    algorithm.attach(mlp((widths[0],), classes, widths[1:]), TaskInfo(batch, classes, F.cross_entropy))
    return algorithm


def test_frozen_activations_that_are_kept_are_computed_once_for_every_sample() -> None:
    """A settled step of every stage costs its own block; to fill a border takes one block's forward pass per sample."""
    widths, classes, samples = (20, 16, 12, 8), 4, 6
    first, other = _rows(samples, 20, classes), _rows(samples, 20, classes, samples)
    algorithm = _mono(widths, classes, first)
    algorithm.cache_frozen(True)
    cost = measure_update(algorithm, first, sequential=True, other=other, recurs=False)
    assert cost.flops == 2 * mono_forward.update_macs(widths, classes)
    assert [stage.fill_flops for stage in cost.stages] == [0, 2 * 20 * 16, 2 * 16 * 12]
    assert [stage.once_flops for stage in cost.stages] == [0, 0, 0]
    assert [stage.steady for stage in cost.stages] == [True] * 3
    # Both last borders: two batches of floats, and a mark for every sample.
    assert [stage.cache_bytes for stage in cost.stages] == [0, 12 * (4 * 16 + 1), 12 * (4 * (16 + 12) + 2)]
    assert cost.once_flops == samples * 2 * (20 * 16 + 16 * 12)
    warm = algorithm  # a cache that is warm already is not that of the copy
    warm.train_only(frozenset(["layer2"]))
    list(warm.updates(first))
    warm.train_only(None)
    again = measure_update(warm, first, sequential=True, other=other, recurs=False)
    assert [stage.fill_flops for stage in again.stages] == [stage.fill_flops for stage in cost.stages]


class _Remembers(MonoForward):
    """Multiplies a matrix of its own in the first step it sees, and keeps the result."""

    def prepare(self, batch: Batch) -> Batch:
        if not hasattr(self, "_kept"):
            self._kept = torch.ones(10, 10) @ torch.ones(10, 10)
        return batch


def test_work_of_the_first_step_alone_is_not_that_of_a_settled_one() -> None:
    batch = _rows(4, 20, 4)
    algorithm = _Remembers()
    algorithm.attach(mlp((20,), 4, (16,)), TaskInfo(batch, 4, F.cross_entropy))
    cost = measure_update(algorithm, batch)
    assert cost.flops == 2 * mono_forward.update_macs((20, 16), 4)
    assert cost.once_flops == 2000
    assert cost.cache_bytes == 400
    assert not hasattr(algorithm, "_kept")


def test_work_that_is_due_now_and_then_is_spread_over_its_period() -> None:
    def flops(every: int) -> float:
        algorithm = FeedbackAlignment("weight_mirror", mirror_every=every)
        batch = _rows(8, 20, 4)
        algorithm.attach(mlp((20,), 4, (16, 12)), TaskInfo(batch, 4, F.cross_entropy))
        cost = measure_update(algorithm, batch)
        assert cost.once_flops == 0
        return cost.flops

    mirror = 4 * (flops(1) - flops(4)) / 3  # of all steps and of a quarter
    assert flops(2) == pytest.approx(flops(1) - mirror / 2)


def test_work_that_grows_with_steps_is_told_from_work_that_grows_with_rows() -> None:
    """Product feedback alignment multiplies its matrices with each other in every step, whatever the batch."""
    batch = _rows(256, 20, 4)
    algorithm = ProductFeedbackAlignment(expansion=2)
    algorithm.attach(mlp((20,), 4, (16, 12)), TaskInfo(batch, 4, F.cross_entropy))
    stage = measure_update(algorithm, batch).stages[0]
    for samples in (256, 192, 150):
        part = measure_update(algorithm, _rows(samples, 20, 4))
        assert samples * part.flops == pytest.approx(stage.training(1, samples, samples))
    assert stage.step_flops > 0
    assert stage.training(0, 0, 0) == 0


@pytest.mark.parametrize(
    ("make", "gradients"), [(Backprop, 20 * 16 + 16 + 16 * 12 + 12 + 12 * 4), (MonoForward, 20 * 16 + 16 + 16 * 4)]
)
def test_gradients_of_one_unit_or_of_all(make: Callable[[], Algorithm], gradients: int) -> None:
    cost = _measured(make, (20, 16, 12), 4)
    assert cost.gradient_bytes == 4 * gradients
    weights = 20 * 16 + 16 + 16 * 12 + 12 + 12 * 4 + (16 * 4 if make is MonoForward else 0)
    assert cost.state_bytes == 4 * weights
    assert cost.cache_bytes == 0


def test_forward_forward_predicts_in_one_pass_per_class() -> None:
    forward = 2 * (20 * 16 + 16 * 12)
    assert _measured(ForwardForward, (20, 16, 12), 4).inference_flops == 4 * forward
    assert _measured(Backprop, (20, 16, 12), 4).inference_flops == forward + 2 * 12 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_data_take_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    batch = _rows(4, 20, 4)
    algorithm = _mono((20, 16), 4, batch).to(dtype)
    cost = measure_update(algorithm, batch)
    assert cost.flops == 2 * mono_forward.update_macs((20, 16), 4)
    assert cost.state_bytes == (20 * 16 + 16 + 16 * 4) * dtype.itemsize
    assert batch.inputs.dtype == torch.float32


def test_random_numbers_of_all_kinds_go_on_as_if_nothing_had_been_measured() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x) + float(np.random.rand()) + random.random()

    batch = _rows(4, 20, 4)
    algorithm = MonoForward()
    net = Blocks({"a": nn.Sequential(nn.Linear(20, 8), Noisy())}, nn.Linear(8, 4))
    algorithm.attach(net, TaskInfo(batch, 4, F.cross_entropy))
    draws = []
    for measured in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        if measured:
            measure_update(algorithm, batch)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]


class _Refusing(Backprop):
    def predict(self, inputs: Tensor, *context: Tensor) -> Tensor:
        raise RuntimeError("not this one")


@pytest.mark.parametrize("samples", [2, 3])
def test_batches_that_cannot_be_halved_are_measured(samples: int) -> None:
    """Half of them is one row, of which BatchNorm has no variance."""
    net = Blocks({"a": nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU())}, nn.Linear(7, 3))
    batch = Batch(torch.rand(samples, 5), torch.arange(samples))
    rule = _Refusing()
    rule.attach(net, TaskInfo(batch, 3, F.cross_entropy))
    cost = measure_update(rule, batch)
    assert cost.flops == 2 * (2 * 5 * 7 + 3 * 7 * 3)
    assert cost.inference_flops is None  # whatever goes wrong there costs nothing else


class _HoldsAndDifferentiates(Algorithm):
    """Hands gradients over, keeps much between two updates, and has a small graph beside it."""

    @property
    def locality(self) -> Locality:
        return Locality.GLOBAL

    def build(self, task: TaskInfo) -> None:
        self.weight = nn.Parameter(torch.ones(3))

    def units(self) -> dict[str, list[dict[str, Any]]]:
        return {"weight": [{"params": [self.weight]}]}

    def updates(self, batch: Batch) -> Iterator[Update]:
        kept = torch.ones(1000)
        (gradient,) = torch.autograd.grad(self.weight.square().exp().sum(), self.weight)
        yield Update("weight", gradients={self.weight: gradient})
        assert len(kept) == 1000


def test_what_is_kept_between_updates_counts_beside_graphs_too() -> None:
    batch = Batch(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    rule = _HoldsAndDifferentiates()
    rule.attach(mlp((3,), 2, (3,)), TaskInfo(batch, 2, F.cross_entropy))
    assert measure_update(rule, batch).activation_peak_bytes >= 4000
