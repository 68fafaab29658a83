"""Blocks that work in place: what they are given stays as it was, and every rule learns as if they did not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import (
    Backprop,
    CounterCurrent,
    DeepSupervision,
    FeedbackAlignment,
    ForwardForward,
    MonoForward,
    Pepita,
    ProductFeedbackAlignment,
    TaskInfo,
)
from locallearn.algorithms.base import Algorithm
from locallearn.batch import Batch
from locallearn.nets import Blocks
from locallearn.nets.inplace import InputGuard
from locallearn.probe import probe_blocks
from locallearn.tasks.images import BatchLoader
from locallearn.testing.loop import plain_loop

_sgd = partial(torch.optim.SGD, lr=0.1)


class _Double(nn.Module):
    """``2 x``, in one of the ways that write into ``x``, or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        if (
            self.how == "mul_"
            or (self.how == "training" and self.training)
            or (self.how == "eval" and not self.training)
        ):
            return x.mul_(2)
        if self.how == "data":  # past the version counter
            x.data.mul_(2)
            return x
        if self.how == "item":
            x[:] = 2 * x
            return x
        return 2 * x


def _net(how: str, inplace: bool) -> Blocks:
    """Two blocks that begin in place, each after one whose output somebody else may still need."""
    torch.manual_seed(0)
    first = nn.Sequential(_Double(how), nn.Linear(10, 12), nn.Tanh())
    second = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(12, 8), nn.Tanh())
    return Blocks({"a": first, "b": second}, nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(8, 3)))


def _plain(how: str, inplace: bool) -> Blocks:
    """What PEPITA and counter-current learning take: activations in place behind their own layer."""
    torch.manual_seed(0)
    return Blocks(
        {
            "a": nn.Sequential(nn.Linear(10, 12), nn.ReLU(inplace=inplace)),
            "b": nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=inplace)),
        },
        nn.Linear(8, 3),
    )


RULES: dict[str, tuple[Callable[[], Algorithm], Callable[[str, bool], Blocks]]] = {
    "backprop": (Backprop, _net),
    "deep_supervision": (DeepSupervision, _net),
    "mono_forward": (lambda: MonoForward(seed=0), _net),
    "mono_forward_sum": (lambda: MonoForward("ff", seed=0), _net),
    "forward_forward": (lambda: ForwardForward(seed=0), _net),
    "forward_forward_hard": (lambda: ForwardForward(negatives="hard", inference="softmax", seed=0), _net),
    "feedback_alignment": (lambda: FeedbackAlignment(seed=0), _net),
    "direct_feedback_alignment": (lambda: FeedbackAlignment("dfa", seed=0), _net),
    "product_feedback_alignment": (lambda: ProductFeedbackAlignment(seed=0), _net),
    "pepita": (lambda: Pepita(seed=0), _plain),
    "pepita_hebbian": (lambda: Pepita("hebbian", seed=0), _plain),
    "counter_current": (lambda: CounterCurrent(seed=0), _plain),
}


def _data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(40, 10, generator=draw), torch.randint(3, (40,), generator=draw)


def _trained(rule: str, how: str, inplace: bool) -> tuple[Algorithm, list[Tensor]]:
    """A rule after an epoch over unshuffled data, whose batches are views, and all that it was given."""
    x, y = _data()
    make, net = RULES[rule]
    algorithm, example = make(), Batch(x[:2], y[:2])
    algorithm.attach(net(how, inplace), TaskInfo(example, 3, F.cross_entropy))
    plain_loop(algorithm, BatchLoader(x, y, 10, shuffle=False), _sgd)
    algorithm.eval()
    with torch.no_grad():
        scores = algorithm.predict(x)
        features = [h.clone() for h in list(algorithm.activations(x))]
    return algorithm, [x, y, scores, *features]


@pytest.mark.parametrize(
    ("rule", "how"),
    [*((rule, "mul_") for rule in RULES), *(("mono_forward", how) for how in ("item", "data", "training", "eval"))],
)
def test_data_stay_and_every_rule_learns_as_if_nothing_were_in_place(rule: str, how: str) -> None:
    algorithm, given = _trained(rule, how, inplace=True)
    reference, wanted = _trained(rule, "new", inplace=False)
    assert all(torch.equal(one, other) for one, other in zip(given[:2], _data(), strict=True))
    for one, other in zip(algorithm.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(given[2:], wanted[2:], strict=True))


def test_probes_see_every_block_before_the_next_one_overwrites_it() -> None:
    accuracies = []
    for how, inplace in (("mul_", True), ("new", False)):
        algorithm, (x, y, *_) = _trained("mono_forward", how, inplace)
        accuracies.append(probe_blocks(algorithm, Batch(x[:20], y[:20]), Batch(x[20:], y[20:]), 3))
    assert accuracies[0] == accuracies[1]


class _Message(nn.Module):
    """A linear layer that also writes into what came with its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, edges: Tensor, more: tuple[Tensor, ...]) -> Tensor:
        edges += 1
        more[0].zero_()
        return self.linear(x) + edges.sum()


def test_what_comes_with_the_input_is_not_written_into_either() -> None:
    net = Blocks({"a": _Message()}, _Readout())
    x, edges, more = torch.randn(5, 4), torch.arange(4).reshape(2, 2), torch.ones(3)
    for _ in range(2):
        for mode in (True, False):
            net.train(mode)(x, edges, (more,))
    assert edges.tolist() == [[0, 1], [2, 3]]
    assert more.tolist() == [1, 1, 1]


class _Readout(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _handed_over(net: Blocks, x: Tensor) -> list[bool]:
    """Whether each block got the very tensor that it was called with."""
    seen: list[bool] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(args[0] is given[-1])) for block in net
    ]
    given = [x]
    with torch.no_grad():
        for block in net:
            given.append(block(given[-1]))
            del given[-2]
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_that_do_not_write_get_no_copies_once_a_rule_is_attached() -> None:
    x, y = _data()
    for how, copied in (("new", [False, False]), ("mul_", [True, False])):
        net = _net(how, inplace=False)
        Backprop().attach(net, TaskInfo(Batch(x[:2], y[:2]), 3, F.cross_entropy))
        for mode in (True, False):
            net.train(mode)
            assert _handed_over(net, x) == [not c for c in copied]


def test_finding_out_moves_neither_statistics_nor_random_numbers() -> None:
    x, y = _data()
    net = Blocks({"a": nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 4))}, nn.Linear(4, 3))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Backprop().attach(net, TaskInfo(Batch(x[:2], y[:2]), 3, F.cross_entropy))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class _Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 4)
        self.writes = False

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2) if self.writes else 2 * x)


def test_a_block_that_begins_to_write_is_told_at_once_and_copied_from_then_on() -> None:
    late = _Late()
    net = Blocks({"late": late})
    x = torch.ones(3, 10)
    net(x)
    net(x)
    late.writes = True
    with pytest.raises(ValueError, match="block 'late' wrote into its input, which it had left alone before") as caught:
        net(x)
    assert "\n" not in str(caught.value)
    x.fill_(1)
    net(x)
    assert bool((x == 1).all())


def test_copies_share_what_is_known_and_can_be_stored() -> None:
    net = _net("mul_", inplace=True)
    x, _ = _data()
    copy.deepcopy(net)(x)
    guards = list(_guards(net))
    assert [guard.written for guard in guards] == [{0}, {0}, {0}]
    assert all(guard.tried == {True} for guard in guards)


def _guards(net: Blocks) -> Iterator[InputGuard]:
    for module in net.modules():
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, InputGuard):
                yield owner


def test_cutting_leaves_the_example_alone() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    example = torch.randn(3, 4)
    before = example.clone()
    Blocks.cut(module, example=example)
    assert torch.equal(example, before)


def test_dropout_in_place_leaves_the_data_alone() -> None:
    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.dropout(x, 0.5, self.training, inplace=True))

    x, y = _data()
    algorithm = MonoForward(seed=0)
    algorithm.attach(Blocks({"a": Drop()}, nn.Linear(4, 3)), TaskInfo(Batch(x[:2], y[:2]), 3, F.cross_entropy))
    plain_loop(algorithm, [Batch(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)], _sgd)
    assert torch.equal(x, _data()[0])
