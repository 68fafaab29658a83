"""Networks cut by tracing: the pieces are the network, in both modes, and what cannot be cut is refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.nets import Blocks
from locallearn.nets.border import Border
from locallearn.nets.cut import CannotTrace, cut_network

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
S = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class _Glue(nn.Module):
    """Functions between modules, a loose parameter and buffer, a skip connection, and things that training alone does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.register_buffer("shift", torch.full((6, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        early = x.tanh()
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = F.dropout(x, 0.5, self.training)
        x = self.conv3(x) * self.scale + self.shift
        x = torch.cat([x, F.avg_pool2d(early, 2)], 3)
        x = torch.flatten(F.adaptive_avg_pool2d(x.clamp(-2, 2), 1), 1)
        scores: Tensor = self.fc(x)
        return scores


def test_a_forward_full_of_functions_is_cut_and_stays_itself() -> None:
    torch.manual_seed(0)
    net = _Glue()
    keys = list(net.state_dict())
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    cut = cut_network(net, ["conv1", "conv2"], X)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert list(net.state_dict()) == keys
    assert cut.unused == ()
    assert cut.blocks.names == ["conv1", "conv2", "conv3"]
    assert {id(p) for p in cut.blocks.parameters()} == {id(p) for p in net.parameters()}
    assert "members.conv3.scale" in cut.blocks.state_dict()
    for mode in (True, False):
        net.train(mode)
        cut.blocks.train(mode)
        torch.manual_seed(3)
        want = net(X)
        torch.manual_seed(3)
        assert torch.equal(cut.blocks(X), want)
    first = cut.blocks[0](X)
    assert isinstance(first, torch.Tensor)  # behind conv1 come bn1 and the function relu, and nothing else crosses
    assert first.min() == 0
    second = cut.blocks[1](first)
    assert isinstance(second, Border)  # the early tensor, which is read behind the second border
    assert second.main.shape == (4, 6, 4, 4)


def test_pieces_can_be_copied_pickled_and_saved() -> None:
    net = _Glue().eval()
    blocks = cut_network(net, ["conv1", "conv2"], X).blocks
    twin = copy.deepcopy(blocks)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    other = pickle.loads(pickle.dumps(blocks))
    fresh = cut_network(_Glue().eval(), ["conv1", "conv2"], X).blocks
    file = io.BytesIO()
    torch.save(blocks.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for copied in (twin, other, fresh):
        assert torch.equal(copied.eval()(X), net(X))


class _Inner(nn.Module):
    """Reads a buffer of its own between its modules, and a table that others may read, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("mix", torch.eye(6))
        self.tables = {"here": torch.ones(6)}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b((self.a(x) @ self.mix).relu() * self.tables["here"])
        return out


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both)), lambda both: both])
def test_moving_pieces_takes_along_what_the_network_reads_between_its_modules(copied: Any) -> None:
    net = nn.Sequential(_Inner(), nn.Linear(6, 3))
    blocks = cut_network(net, ["0.a"], S).blocks
    keys, table = list(blocks.state_dict()), net[0].tables["here"]
    net, blocks = copied((net, blocks))
    blocks.double()
    assert net[0].mix.dtype is torch.float64
    net[0].mix.mul_(2)
    torch.testing.assert_close(blocks.train(net.training)(S.double()), net(S.double()))
    assert list(blocks.state_dict()) == keys
    assert table.dtype is torch.float32
    blocks.to("meta")  # where a tensor cannot take another's place, no more than a parameter can
    assert {buffer.device.type for buffer in blocks.buffers()} == {"meta"}


class _Tree(nn.Module):
    """Runs what stands in a tree, in its order or not."""

    def __init__(self, order: list[str], function: bool = False) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.BatchNorm1d(8), "c": nn.Linear(8, 8)})
        self.drop, self.act, self.head = nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
        self.order, self.function = order, function

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        x = x.sin() if self.function else x
        return self.head(x if scale is None else x * scale)


def test_a_plain_chain_of_modules_is_handed_over_as_one() -> None:
    chain = ["body.a", "body.b", "act", "body.c", "drop"]
    for order, function, inputs, plain in (
        (["body.a", "body.b", "body.c", "act", "drop"], False, S, True),
        (chain, False, S, False),  # in no order of a tree: body, act, body again
        (["body.a", "act", "drop"], True, S, False),
        (["body.a", "drop", "act"], False, (S, torch.ones(8)), False),  # a context goes to every piece
        (["body.a", "act", "drop", "act"], False, S, False),  # one module twice
    ):
        net = _Tree(order, function)
        blocks = cut_network(net, [], inputs).blocks
        assert (type(blocks[0]) is nn.Sequential) is plain, order
        assert {name for name, _ in blocks.named_buffers()} <= {f"members.network.{n}" for n, _ in net.named_buffers()}
        assert {name.split(".", 2)[2] for name, _ in blocks.members.named_parameters(prefix="m")} <= {
            name for name, _ in net.named_parameters()
        }
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        for mode in (True, False):
            net.train(mode)
            blocks.train(mode)
            torch.manual_seed(3)
            want = net(*given)
            torch.manual_seed(3)
            assert torch.equal(blocks(*given), want)


def test_training_a_piece_trains_the_network() -> None:
    net = _Glue()
    blocks = cut_network(net, ["conv1"], X).blocks
    before = net.conv1.weight.detach().clone()
    blocks[0](X).sum().backward()
    torch.optim.SGD(blocks[0].parameters(), lr=0.1).step()
    assert not torch.equal(net.conv1.weight, before)


class _Answer(NamedTuple):
    logits: Any
    side: Any


class _Several(nn.Module):
    """Two inputs, an auxiliary head, and an output of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.aux = nn.Linear(6, 8), nn.Linear(8, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 3)
        self.kind = kind

    def forward(self, x: Tensor, weight: Tensor | None = None, flag: bool = False) -> Any:
        x = self.one(x).relu()
        side = self.aux(x)
        x = self.two(x)
        if weight is not None:
            x = x * weight
        if flag:
            x = x.sin()
        if len(x) > 0 and x.dim() == 2:
            x = x.relu()
        scores = self.head(self.drop(x))
        kinds: dict[str, Any] = {
            "dict": {"side": side, "logits": scores},
            "tuple": (scores, side),
            "named": _Answer(scores, side),
            "nested": {"a": [None, {"b": scores}]},
        }
        return kinds[self.kind] if self.training or self.kind != "named" else scores


@pytest.mark.parametrize("kind", ["dict", "tuple", "named", "nested"])
def test_outputs_of_many_kinds(kind: str) -> None:
    net = _Several(kind)
    guessed = kind == "tuple"
    with pytest.warns(UserWarning, match="of which the first is taken") if guessed else nullcontext():
        cut = cut_network(net, ["one"], S)
    assert cut.blocks(S).shape == (5, 3)
    assert cut.unused == ("aux.1.weight", "aux.1.bias")  # nothing that counts depends on it
    if kind == "dict":
        side = cut_network(net, [], S, output="side")
        assert {name.split(".")[0] for name in side.unused} == {"two", "head"}
        with pytest.raises(ValueError, match="output is 'scores', and _Several gives side, logits"):
            cut_network(net, [], S, output="scores")


def test_inputs_by_name_and_by_place_and_what_is_no_tensor() -> None:
    net = _Several("dict").eval()
    weight = torch.rand(5, 8)
    cut = cut_network(net, ["one"], {"weight": weight, "x": S, "flag": True}, input="x")
    assert cut.arguments.names == ["x", "weight", "flag"]
    want = net(S, weight, True)["logits"]
    assert torch.allclose(cut.blocks(S, weight, True), want)
    with pytest.raises(ValueError, match="input 'flag' is False, and was True in the example"):
        cut.arguments.by_name({"weight": weight, "x": S, "flag": False})
    with pytest.raises(ValueError, match="inputs are Tensor, expected a dict of weight, x, flag"):
        cut.arguments.by_name(S)
    assert torch.allclose(cut_network(net, ["one"], (S, weight)).blocks(S, weight), net(S, weight)["logits"])
    with pytest.raises(ValueError, match="the example does not fit it"):
        cut_network(net, ["one"], {"y": S})


# -- refusals -------------------------------------------------------------------------------------------------------------
class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x))
        scores: Tensor = self.head(self.one(x))
        return scores


def test_names_are_refused_with_what_to_do() -> None:
    net = _Glue()
    with pytest.raises(ValueError, match="_Glue has no module 'conv9'; _Glue has conv1, bn1"):
        cut_network(net, ["conv9"], X)
    with pytest.raises(ValueError, match=r"runs them in the order \['conv1', 'conv2'\]"):
        cut_network(net, ["conv2", "conv1"], X)
    with pytest.raises(ValueError, match="name 'conv1' twice"):
        cut_network(net, ["conv1", "conv1"], X)
    with pytest.raises(ValueError, match=r"'two\.0' lies inside of 'two'"):
        cut_network(_Twice(), ["two.0", "two"], S)
    with pytest.raises(ValueError, match="behind 'one', which runs 2 times"):
        cut_network(_Twice(), ["one"], S)
    with pytest.raises(ValueError, match=r"of block '.*' is shared with block 'two'"):
        cut_network(_Twice(), ["two"], S)
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        cut_network(nn.ReLU(), [], S)
    with pytest.raises(ValueError, match=r"block '1' would have no parameters"):
        cut_network(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)), ["0", "1"], S)
    with pytest.raises(ValueError, match=r"cannot run the example|cannot be followed"):
        cut_network(net, ["conv1"], S)


class _Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if x.sum() > 0:  # here
            x = -x
        scores: Tensor = self.two(x)
        return scores


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 6), _Values(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.inner(self.first(x)))
        return scores


def test_what_cannot_be_followed_is_told_by_line() -> None:
    with pytest.raises(CannotTrace, match=r"test_cut\.py:\d+ \(if x\.sum\(\) > 0:.*depends on the values in a tensor"):
        cut_network(_Values(), ["one"], S)
    with pytest.raises(CannotTrace, match=r"give no cuts inside of 'inner'"):
        cut_network(_Outer(), ["inner.one"], S)
    assert cut_network(_Outer(), ["inner"], S).blocks.names == ["inner"]  # a whole module may do what it likes


class _BakesTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) * sum(1.0 for _ in range(len(x)))
        scores: Tensor = self.two(x)
        return scores


def test_a_trace_that_only_fits_the_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fewer samples|one after another do not give what its own forward gives"):
        cut_network(_BakesTheBatch(), ["one"], S)


# -- the manual way looks as closely ----------------------------------------------------------------------------------------
class _Secret(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.one, self.two, self.what = nn.Linear(6, 6), nn.Linear(6, 3), what

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.what == "dropout":
            x = F.dropout(x, 0.2, self.training)
        if self.what == "clamp":
            x = x.clamp(-50, 50)
        if self.what == "detach":
            x = x.detach()
        scores: Tensor = self.two(x)
        return scores


@pytest.mark.parametrize(
    ("what", "told"),
    [("dropout", "in training mode"), ("clamp", "at 1000 times the example"), ("detach", "another gradient")],
)
def test_what_the_example_alone_would_not_show(what: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Blocks.cut(_Secret(what), ["one"], readout="two", example=S)
    blocks = cut_network(_Secret(what), ["one"], S).blocks  # a trace holds it
    assert blocks.names == ["one"]


class _Remembers(nn.Module):
    """Keeps a running mean, and its last activity."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.last: Tensor | None = None
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.last = self.a(x).relu()
        if self.training and self.how == "in place":
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        if self.training and self.how == "replaced":
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        if self.training and self.how == "by chance" and torch.rand(1).item() < 0.5:
            h = 2 * h
        out: Tensor = self.c(self.b(h - self.mean).relu())
        return out


def test_what_a_forward_keeps_of_its_own_is_kept_and_no_symbol_is_left_on_the_network() -> None:
    net, x = _Remembers("in place"), torch.randn(5, 6)
    cut = cut_network(net, ["a", "b"], x)
    assert net.last is None
    twin = copy.deepcopy(net)
    torch.testing.assert_close(cut.blocks.train()(x), twin.train()(x))
    assert twin.mean.abs().sum() > 0
    torch.testing.assert_close(net.mean, twin.mean)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("replaced", r"a new tensor in the place of the buffer 'mean'.*self\.mean\.copy_"),
        ("by chance", r"test_cut\.py:\d+ .*depends on the values in a tensor"),
    ],
)
def test_what_no_graph_shows_is_told_by_line(how: str, told: str) -> None:
    """A number read out of a tensor is no fact of the example: the branch of one draw must not become the network."""
    with pytest.raises(CannotTrace, match=told):
        cut_network(_Remembers(how), ["a"], torch.randn(5, 6))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, affine=False), nn.InstanceNorm2d(6), nn.BatchNorm2d(6)])
def test_the_normalisation_of_a_layer_stays_with_it_though_it_has_no_parameters(norm: nn.Module) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    )
    first, _ = cut_network(net, ["0"], torch.randn(4, 3, 8, 8)).blocks
    assert any(module is norm for module in first.modules())
    assert any(isinstance(module, nn.ReLU) for module in first.modules())
