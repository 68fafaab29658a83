"""What a network must be for a rule: refused when the rule is attached, by the name of the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import global_mean_pool
from torch_geometric.nn.models import GCN

import locallearn as ll
from locallearn import algorithms
from locallearn.algorithms import Algorithm, TaskInfo
from locallearn.algorithms.dry_run import dry_run, feature_sizes
from locallearn.batch import Batch

PER_SAMPLE = (
    *(ll.MonoForward, ll.DeepSupervision, ll.LocalHeads, ll.CaFo, ll.ForwardForward, algorithms.LayerCollaboration),
    *(algorithms.BackpropForwardForward, algorithms.BackpropL1, ll.ForwardProjection),
    *(
        partial(ll.LocalHeads, loss="sim"),
        partial(ll.CaFo, blocks="dfa"),
        partial(ll.ForwardGradient, losses="local"),
    ),
    partial(ll.ForwardForward, loss="symba"),
)
BY_OUTPUT = (ll.Backprop, ll.FeedbackAlignment, ll.ForwardGradient, ll.ZerothOrder)


def _named(rule: Callable[[], Algorithm]) -> str:
    if isinstance(rule, partial):
        return f"{rule.func.__name__}-{'-'.join(map(str, rule.keywords.values()))}"
    return str(rule.__name__)  # type: ignore[attr-defined]


class _TimeFirst(nn.Module):
    """Reads samples first, and has time first inside, as PyTorch's recurrent layers do by default."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x.transpose(0, 1)))))
        return self.o(x.mean(0))


class _Frames(nn.Module):
    """Every frame of a film by itself, then their mean."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.a, self.b, self.o = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.relu(self.b(F.relu(self.a(x.flatten(0, 1)))))
        return self.o(frames.view(-1, self.steps, 16).mean(1))


@pytest.mark.parametrize("rule", PER_SAMPLE, ids=_named)
@pytest.mark.parametrize("make", [_TimeFirst, _Frames])
@pytest.mark.parametrize("steps", [6, 2])  # two: as many as localize shows a rule samples
def test_rules_that_look_at_samples_refuse_blocks_whose_rows_are_none(
    rule: Callable[[], Algorithm], make: Callable[[int], nn.Module], steps: int
) -> None:
    x, labels = torch.randn(8, steps, 5), torch.arange(8) % 4
    with pytest.raises(ValueError, match=r"block 'a' gives \d+ rows for .* samples, .*every sample's features"):
        ll.localize(make(steps), rule(), cuts=["a"], example=x, targets=labels)


@pytest.mark.parametrize("rule", BY_OUTPUT, ids=_named)
@pytest.mark.parametrize("make", [_TimeFirst, _Frames])
def test_rules_that_look_at_the_networks_output_alone_take_them(
    rule: Callable[[], Algorithm], make: Callable[[int], nn.Module]
) -> None:
    x, labels = torch.randn(8, 6, 5), torch.arange(8) % 4
    net = make(6)
    before = [p.detach().clone() for p in net.parameters()]
    ll.localize(net, rule(), cuts=["a"], example=x, targets=labels).step(x, labels)
    assert any(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


class _Graphs(nn.Module):
    """One class for every graph of a batch of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool, self.o = GCN(5, 16, 2), _Pool(), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        return self.o(self.pool(self.body(x, edges), graph))


class _Pool(nn.Module):
    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return global_mean_pool(x, graph)


def test_nodes_are_no_samples_where_every_graph_has_a_label() -> None:
    graph = torch.arange(4).repeat_interleave(5)
    edges = torch.stack([torch.arange(20), torch.arange(20) // 5 * 5])
    example = {"x": torch.randn(20, 5), "edges": edges, "graph": graph}
    labels = torch.arange(4) % 3
    with pytest.raises(ValueError, match=r"block 'body\S*' gives 20 rows for 4 samples, .*behind the pooling"):
        ll.localize(_Graphs(), ll.MonoForward(), cuts=["body.convs.0"], example=example, targets=labels)


def _blocks(parts: Sequence[nn.Module], outputs: int = 4) -> ll.Blocks:
    return ll.Blocks({f"block{i}": part for i, part in enumerate(parts)}, nn.Linear(16, outputs))


def _layer(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU())


def _task(classes: int = 4, samples: int = 4) -> TaskInfo:
    return TaskInfo(Batch(torch.randn(samples, 8), torch.arange(samples) % classes), classes, F.cross_entropy)


@pytest.mark.parametrize(
    "rule", [ll.MonoForward, ll.LocalHeads, ll.CaFo, ll.ForwardForward, algorithms.LayerCollaboration], ids=_named
)
def test_a_block_without_parameters_is_named(rule: Callable[[], Algorithm]) -> None:
    with pytest.raises(ValueError, match="block 'block1' has no parameters, so nothing in it learns"):
        rule().attach(_blocks([_layer(8), nn.ReLU(), _layer(16)]), _task())


@pytest.mark.parametrize(
    "rule",
    [
        *(ll.Backprop, ll.DeepSupervision, ll.MonoForward, ll.LocalHeads, ll.FeedbackAlignment, ll.ForwardProjection),
        *(ll.ForwardGradient, ll.ZerothOrder, ll.CounterCurrent),
    ],
    ids=_named,
)
def test_a_readout_for_fewer_classes_than_there_are_is_refused_and_one_for_more_is_not(
    rule: Callable[[], Algorithm],
) -> None:
    with pytest.raises(ValueError, match="the readout has 4 outputs for 10 classes: make it as wide"):
        rule().attach(_blocks([_layer(8), _layer(16)]), _task(classes=10))
    if rule not in (ll.CounterCurrent, ll.ForwardProjection):  # which read labels through the readout's own width
        rule().attach(_blocks([_layer(8), _layer(16)], outputs=5), _task())


def test_a_batch_of_one_sample_is_told_by_the_block_that_cannot_normalise_it() -> None:
    norm = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    algorithm = ll.MonoForward()
    algorithm.attach(_blocks([_layer(8), norm]), _task(samples=1))
    updates = algorithm.train().updates(_task(samples=1).example)
    next(updates)
    with pytest.raises(ValueError, match=r"^block 'block1' has a normalisation, .* a batch of one sample: use larger"):
        next(updates)


def test_as_many_rows_as_samples_are_samples_where_twice_as_many_give_twice_as_many() -> None:
    blocks = ll.Blocks({"square": nn.Sequential(nn.Linear(8, 4), nn.ReLU())}, nn.Linear(4, 4))
    assert feature_sizes(blocks, _task().example) == [4]
    assert [tuple(output.shape) for output in dry_run(blocks, _task().example)] == [(4, 4)]


def test_networks_are_not_cut_where_gradients_are_switched_off() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"^gradients are switched off here"):
        ll.localize(nn.Sequential(_layer(8), nn.Linear(16, 4)), ll.MonoForward(), cuts=1, example=torch.randn(4, 8))
