"""``ll.localize``, ``ll.show``: where a network can be cut, by number, name or memory, and which of its outputs is taken."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn as ll
from locallearn.local import _localize, bytes_in, factory
from locallearn.local._where import partition
from tests.local.nets import DRAW, SGD, X, Y, mlp, resnet


def test_cuts_by_number_and_by_memory(capsys: pytest.CaptureFixture[str]) -> None:
    net = resnet()
    table = ll.show(net, X)
    assert [row.name for row in table.rows] == ["maxpool", "layer1", "layer2", "layer3", ""]
    assert str(table) in capsys.readouterr().out
    assert str(table).startswith("ResNet: 4 possible cuts; a line's figures, for 12 samples, are of what lies between")
    assert sum(row.parameters for row in table.rows) == sum(p.numel() for p in net.parameters())
    assert ll.localize(net, ll.MonoForward(), cuts=3, example=X).blocks.names == ["layer1", "layer3", "layer4"]
    roomy = ll.localize(net, ll.MonoForward(), memory="1GiB", example=X)
    assert roomy.cuts == ()
    tight = ll.localize(net, ll.MonoForward(), memory="3MiB", example=X)
    assert len(tight.blocks) > 1
    with pytest.raises(
        ValueError, match=r"memory allows 1000 B, and a step of MonoForward on this example keeps at least"
    ):
        ll.localize(net, ll.MonoForward(), memory="1kB", example=X)
    with pytest.raises(ValueError, match=r"cuts is 9, and ResNet can be cut into 5 blocks at most"):
        ll.localize(net, ll.MonoForward(), cuts=9, example=X)


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ({}, ["1", "3"]),
        ({"readout": False}, ["1", "3", "4"]),
        ({"outputs": 4}, ["1", "3", "4"]),
        ({"readout": "2"}, ["1"]),
    ],
)
def test_a_number_of_blocks_counts_those_that_names_would_make(which: dict[str, Any], names: list[str]) -> None:
    """Without a readout, the last layer is in a block; so it is where the network gives features."""
    example = torch.randn(4, 5)
    local = ll.localize(mlp(), ll.MonoForward(), cuts=len(names), example=example, **which)
    assert local.blocks.names[:-1] == names[:-1]
    assert isinstance(local.blocks.readout, nn.Module) is (
        which.get("readout", True) is not False and "outputs" not in which
    )
    with pytest.raises(ValueError, match=rf"cut into {'no more than one block:' if len(names) == 1 else len(names)}"):
        ll.localize(mlp(), ll.MonoForward(), cuts=len(names) + 1, example=example, **which)


def test_memory_cuts_no_rule_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a few samples show that all would be too much for one block, all are not tried: they might not fit at all."""
    example = torch.randn(64, 5)
    assert ll.localize(mlp(), ll.algorithms.ZerothOrder(), memory="1KiB", example=example, optimizer=SGD).cuts == ()
    deep = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(5, 5), nn.ReLU())), nn.Linear(5, 3))
    assert ll.localize(deep, ll.algorithms.CaFo(), memory="1KiB", example=example).cuts == ()  # the same of any batch
    tried: list[tuple[int, int]] = []
    drive = _localize.drive
    monkeypatch.setattr(_localize, "drive", lambda a, b: (tried.append((len(a.blocks), len(b.inputs))), drive(a, b)))
    deep = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(5, 5), nn.ReLU())), nn.Linear(5, 3))
    assert len(ll.localize(deep, ll.MonoForward(), memory="6KiB", example=example).blocks) > 1
    assert tried[0] == (1, 2)
    assert (1, 64) not in tried


def test_factories_run_a_network_to_see_what_it_takes() -> None:
    name = "tests.local.nets.Later"
    assert factory(name, (3, 8, 8), 4, cuts=["stem"]).names == ["stem", "deep"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^Later takes images of 3 channels, and these have 1"):
        factory(name, (1, 8, 8), 4, cuts=["stem"])
    with pytest.raises(ValueError, match=r"^Later cannot run the example"):  # which is too small
        factory(name, (3, 4, 4), 4, cuts=["stem"])
    with pytest.raises(ValueError, match=r"^Grey cannot run the example"):  # not for its convolution
        factory("tests.local.nets.Grey", (1, 8, 8), 4, cuts=["stem"])
    for cuts, told in (("stem", r"a list of names, .* write \['stem'\]"), (2.0, "names of modules, or a whole number")):
        with pytest.raises(ValueError, match=f"expected {told}"):
            factory(name, (3, 8, 8), 4, cuts=cuts)  # type: ignore[arg-type]


def test_sizes_and_partitions() -> None:
    assert [bytes_in(size) for size in (5, "1KiB", "2 kB", "1.5MiB")] == [5, 1024, 2000, 1572864]
    for size in ("200 Mib", "", "-1MB", 0, "0MB"):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            bytes_in(size)
    assert partition([1, 1, 1, 3], 2) == [2]
    assert partition([5, 1, 1, 1], 3) == [0, 1]  # of two alike the first


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        joined = torch.cat([self.up(self.deep(skip)), skip], 1)
        out: Tensor = self.fc(F.relu(self.last(joined)).mean((2, 3)))
        return out


def test_more_blocks_than_single_tensors_allow_let_skip_connections_cross() -> None:
    assert ll.localize(_UNet(), ll.MonoForward(), cuts=2, example=X[:4]).cuts == ("up",)
    local = ll.localize(_UNet(), ll.MonoForward(), cuts=4, example=X[:4])
    assert local.cuts == ("down", "deep", "up")
    assert list(local.step(X, Y % 5)) == ["down", "deep", "up", "last"]
    with pytest.raises(ValueError, match="into 4 blocks at most, behind down, deep, up"):
        ll.localize(_UNet(), ll.MonoForward(), cuts=9, example=X[:4])


def test_what_crosses_is_shown_and_memory_cuts_there_only_where_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ll.show(_UNet(), X[:4]).rows
    assert [(row.name, row.beside) for row in rows] == [("down", 0), ("deep", 1), ("up", 0), ("", 0)]
    assert "and 1 more" in capsys.readouterr().out

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Linear(12, 64), nn.Linear(128, 5)
            self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            skip = h = F.relu(self.stem(x))
            for layer in (self.a, self.b, self.c, self.d):
                h = F.relu(layer(h))
            out: Tensor = self.fc(torch.cat([h, skip], 1))
            return out

    x = torch.rand(64, 12, generator=DRAW)
    roomy, tight = (ll.localize(Long(), ll.MonoForward(), memory=size, example=x) for size in ("150KiB", "80KiB"))
    assert (roomy.cuts, tight.cuts) == ((), ("a", "c"))


def test_no_cut_is_offered_between_two_uses_of_one_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(F.relu(self.b(self.n(self.b(F.relu(self.a(x)))))))
            return out

    local = ll.localize(Shared(), ll.MonoForward(), cuts=2, example=X[:, 0, :1, :12].flatten(1))
    assert local.cuts == ("a",)


class _Masked(nn.Module):
    """Three layers that all read a mask, which is made from the context in the type of the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (1.0 - keep.to(x.dtype)) * torch.finfo(x.dtype).min / 1e38
        for layer in (self.first, self.second, self.third):
            x = nn.ReLU()(layer(x) + mask)
        return self.head(x)


def test_a_mask_that_all_layers_read_is_no_reason_not_to_cut() -> None:
    example = {"x": torch.randn(5, 6), "keep": torch.randint(2, (5, 6))}
    net = _Masked()
    local = ll.localize(net, ll.MonoForward(), cuts=3, example=example)
    assert local.cuts == ("first", "second")
    assert set(local.step(example, torch.arange(5) % 3)) == {"first", "second", "third"}
    torch.testing.assert_close(local.predict(example), net(**example))


class _Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.loose = nn.Linear(6, 6), nn.Linear(6, 3), [nn.Linear(6, 6)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.loose[0](self.first(x)))


class _DynamicCache:
    """Of a class that no graph can show."""


class _Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = _Remembers(), nn.Linear(6, 3)

    def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
        return self.head(self.first(x, _DynamicCache() if use_cache else None))


class _Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return self.layer(x)


def test_what_no_graph_shows_is_told_with_what_to_do() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"test_cutting.py:\d+ .*runs a Linear that is no member of the network"):
        ll.localize(_Loose(), ll.MonoForward(), cuts=["first"], example=x)
    with pytest.raises(ValueError, match=r"it passes a _DynamicCache on, .* a dict with use_cache=False"):
        ll.localize(_Caching(), ll.MonoForward(), cuts=["first"], example=x)
    assert ll.localize(_Caching(), ll.MonoForward(), cuts=["first"], example={"x": x, "use_cache": False})


def test_the_largest_block_is_least_and_none_is_left_with_next_to_nothing() -> None:
    """Against every partition there is."""
    draw = random.Random(0)
    for parts in (2, 3, 4):
        for _ in range(30):
            sizes = [draw.choice([0.0, 1.0, 2.0, 3.0, 8.0]) for _ in range(7)]

            def sums(ends: Sequence[int], sizes: Sequence[float] = sizes) -> list[float]:
                edges = [-1, *ends, len(sizes) - 1]
                return [sum(sizes[a + 1 : b + 1]) for a, b in pairwise(edges)]

            every = [sums(ends) for ends in combinations(range(len(sizes) - 1), parts - 1)]
            wanted = min((max(found), sum(size * size for size in found)) for found in every)
            chosen = sums(partition(sizes, parts))
            assert (max(chosen), sum(size * size for size in chosen)) == wanted


class _Gives(nn.Module):
    """Features and scores by name, neither of which is called as outputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).relu()
        return {"features": features, "scores": self.head(features)}


def test_which_of_several_named_outputs_is_taken_is_said() -> None:
    with pytest.warns(
        UserWarning, match=r"^_Gives gives features, scores, of which the first .*: say which .* output=$"
    ):
        local = ll.localize(_Gives(), ll.MonoForward(), cuts=1, example=torch.randn(4, 5))
    assert local.unused == ("head.weight", "head.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ll.localize(_Gives(), ll.MonoForward(), cuts=1, example=torch.randn(4, 5), output="scores").unused


class _Pick(nn.Module):
    """Of a module's tuple the first tensor, so that nothing hands over a tuple."""

    def __init__(self, kind: Any, *args: int) -> None:
        super().__init__()
        self.inner = kind(*args, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x,) * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1)
        return self.inner(*inputs)[0]


class _Own(nn.Module):
    """A module of somebody's own that gives a state beside its output."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(before, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.map(x))
        return y, y.mean(1)


class _Sequence(nn.Module):
    """Two modules that give tuples, or the same two that do not."""

    def __init__(self, kind: Any, plain: bool) -> None:
        super().__init__()
        if kind is _Own:
            self.l1, self.l2 = _Own(8, 8), _Own(8, 8)
        else:
            args = (8, 2) if kind is nn.MultiheadAttention else (8, 8)
            self.l1, self.l2 = (_Pick(kind, *args) if plain else kind(*args, batch_first=True) for _ in range(2))
        self.first, self.out, self.plain = nn.Linear(6, 8), nn.Linear(8, 3), plain

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for module in (self.l1, self.l2):
            inputs = (x,) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
            x = module(*inputs) if self.plain else module(*inputs)[0]
        return self.out(x[:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention, _Own])
def test_every_place_behind_a_tuple_is_offered_and_taken(kind: Any) -> None:
    x = torch.randn(6, 5, 6)
    offered = [row.name for row in ll.show(_Sequence(kind, False), x).rows]
    assert offered == ["first", "l1", ""]  # behind l2 comes the readout alone, which is no block
    if kind is not _Own:
        assert offered == [row.name for row in ll.show(_Sequence(kind, True), x).rows]
    for cuts in (["l1"], ["first", "l1"], ["l1", "l2"], 3):
        local = ll.localize(_Sequence(kind, False), ll.MonoForward(), cuts, example=x)
        assert list(local.blocks.readout.state_dict()) == ["out.weight", "out.bias"]  # type: ignore[union-attr]
    ll.localize(_Sequence(kind, False), ll.algorithms.Ridge(), ["l1"], example=x)  # finds the linear layer at the end


class _LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cells, self.out = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(self.first(x))[1][0][-1])


def test_no_border_lies_where_the_samples_are_not_the_first_dimension() -> None:
    x = torch.randn(6, 5, 6)
    assert [row.shape for row in ll.show(_LastState(), x).rows] == [(6, 5, 8), (6, 3)]
    local = ll.localize(_LastState(), ll.MonoForward(), 2, example=x)
    assert local.step(x, torch.arange(6) % 3).keys() == {"first", "cells"}


class _Pair(nn.Module):
    """A tuple of features and scores, which of both comes from where."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.kind = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), kind

    def forward(self, x: Tensor) -> Any:
        early = self.a(x).relu()
        late = self.b(early).relu()
        scores = self.c(late)
        kinds = {"late": (late, scores), "early": (early, scores), "state": (scores, (early, late))}
        return (kinds | {"hidden": (late, [early, scores])})[self.kind]


def test_a_tuple_of_which_the_first_tensor_is_taken_is_told_as_names_are() -> None:
    x = torch.randn(4, 5)
    told = (
        r"^_Pair gives a tuple with {} tensors, of which the first .*, and nothing trains 'c.weight' and 1 more, on which it "
        r"does not depend: say which one is with output=$"
    )
    for kind, count in (("late", 2), ("hidden", 3)):
        with pytest.warns(UserWarning, match=told.format(count)):
            assert ll.localize(_Pair(kind), ll.MonoForward(), cuts=["a"], example=x).unused == ("c.weight", "c.bias")
    with pytest.raises(
        ValueError, match=r"'a' holds the last layer on the way .*\(_Pair gives a tuple .* with output=\)$"
    ):
        ll.localize(_Pair("early"), ll.MonoForward(), cuts=["a"], example=x)
    with pytest.raises(ValueError, match=r"'c', which does not run on the way to the output.*with output=\)$"):
        ll.localize(_Pair("early"), ll.MonoForward(), cuts=["c"], example=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ll.localize(_Pair("late"), ll.MonoForward(), cuts=["a"], example=x, output=1).unused
        assert not ll.localize(
            _Pair("state"), ll.MonoForward(), cuts=["a"], example=x
        ).unused  # a state beside the scores
