"""``ll.localize``: one call puts any network under a rule, and it learns as a loop by hand would teach it."""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.nn.models import GAT, GCN

import locallearn as ll
from locallearn.algorithms import TaskInfo
from locallearn.nets.cut import Cut
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import Classification
from locallearn.testing import plain_loop
from tests.local.nets import DRAW, SGD, X, Y, mlp, mobile, resnet, vit


def _dense() -> nn.Module:
    return torchvision.models.DenseNet(8, (1, 1, 1, 1), 16, num_classes=10)


def _vgg() -> nn.Module:
    """VGG-11 of an eighth of its width; its head, which is made 25088-4096-4096 at any width, is made smaller."""
    with torch.device("meta"):
        net = torchvision.models.VGG(nn.Identity(), 10, init_weights=False)
    net.features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"])
    layers = [nn.Linear(64 * 49, 32), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(0.0)]
    net.classifier = nn.Sequential(*layers, nn.Linear(32, 10))
    return net


def _by_hand_resnet(net: Any) -> list[Callable[[Tensor], Tensor]]:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
    return [stem, net.layer2, net.layer3, net.layer4, nn.Sequential(net.avgpool, nn.Flatten(), net.fc)]


def _by_hand_vit(net: Any) -> list[Callable[[Tensor], Tensor]]:
    def first(x: Tensor) -> Tensor:
        tokens = net.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1) + net.encoder.pos_embedding
        out: Tensor = net.encoder.layers[0](net.encoder.dropout(tokens))
        return out

    return [first, lambda x: net.encoder.ln(net.encoder.layers[1](x)), lambda x: net.heads(x[:, 0])]


def _by_hand_dense(net: Any) -> list[Callable[[Tensor], Tensor]]:
    parts = net.features

    def head(x: Tensor) -> Tensor:
        out: Tensor = net.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out

    return [parts[:5], lambda x: F.relu(parts[5:](x)), head]


def _by_hand_mobile(net: Any) -> list[Callable[[Tensor], Tensor]]:
    return [net.features[:4], net.features[4:], lambda x: net.classifier(net.avgpool(x).flatten(1))]


def _by_hand_vgg(net: Any) -> list[Callable[[Tensor], Tensor]]:
    parts, head = net.features, net.classifier
    last = nn.Sequential(parts[11:], net.avgpool, nn.Flatten(), head[:5])
    return [parts[:6], parts[6:11], last, head[5:]]


NETS: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[Any], list[Callable[[Tensor], Tensor]]]]] = {
    "resnet": (resnet, ["layer1", "layer2", "layer3"], _by_hand_resnet),
    "vit": (vit, ["encoder.layers.encoder_layer_0"], _by_hand_vit),
    "densenet": (_dense, ["features.denseblock1"], _by_hand_dense),
    "vgg": (_vgg, ["features.5", "features.10"], _by_hand_vgg),
    "mobilenet": (mobile, ["features.3"], _by_hand_mobile),
}


@pytest.mark.parametrize("name", NETS)
def test_an_epoch_equals_a_loop_that_knows_nothing_of_cutting(name: str) -> None:
    make, cuts, by_hand = NETS[name]
    torch.manual_seed(1)
    net = make()
    twin = copy.deepcopy(net)
    keys = list(net.state_dict())
    local = ll.localize(net, ll.MonoForward(seed=2), cuts=cuts, example=X[:4], optimizer=SGD)
    assert list(net.state_dict()) == keys
    assert {id(p) for p in local.blocks.parameters()} == {id(p) for p in net.parameters()}
    heads = [nn.Parameter(p.projection.detach().clone()) for p in local.algorithm.heads.projections]  # type: ignore[union-attr]
    *blocks, readout = by_hand(twin)
    optimizer = SGD([*twin.parameters(), *heads])
    twin.train()
    for images, labels in zip(X.split(6), Y.split(6), strict=True):
        losses = local.step(images, labels)
        x, total = images, []
        for i, block in enumerate(blocks):
            output = block(x)
            scores = output.flatten(1) @ heads[i].T if i < len(heads) else readout(output)
            total.append(F.cross_entropy(scores, labels))
            x = output.detach()
        optimizer.zero_grad()
        sum(total).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert torch.allclose(torch.stack(list(losses.values())), torch.stack(total).detach(), rtol=1e-4)
    for key, value in twin.state_dict().items():
        assert torch.allclose(net.state_dict()[key].double(), value.double(), rtol=1e-4, atol=1e-6), key
    assert torch.allclose(
        local.predict(X), net.eval()(X), atol=1e-5
    )  # attention has a path of its own without gradients


def test_one_block_is_backpropagation_of_its_loss() -> None:
    net = vit()
    twin = copy.deepcopy(net)
    local = ll.localize(net, ll.MonoForward(), cuts=1, example=X[:4], optimizer=SGD)
    optimizer = SGD(twin.parameters())
    for _ in range(2):
        loss = F.cross_entropy(twin(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (mine,) = local.step(X, Y).values()
        assert torch.allclose(mine, loss.detach())
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_loop_with_an_empty_body_trains_as_step_does_and_a_body_may_clip() -> None:
    states = []
    for way in range(3):
        torch.manual_seed(0)
        local = ll.localize(mobile(), ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=SGD)
        if way == 0:
            local.step(X, Y)
        else:
            for update in local.updates(X, Y):
                if way == 2:
                    update.backward()
        states.append(local.net.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert torch.equal(value, states[2][name]), name


def test_state_resumes_and_modes_are_followed() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        make_optimizer = partial(torch.optim.Adam, lr=1e-3)
        return ll.localize(mobile(), ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=make_optimizer)

    whole, halves = make(), make()
    whole.step(X, Y)
    halves.step(X, Y)
    file = io.BytesIO()
    torch.save(halves.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    whole.step(X, Y)
    fresh.step(X, Y)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, fresh.net.state_dict()[name]), name
    with pytest.raises(ValueError, match="optimizers is missing"):
        fresh.load_state_dict({"net": {}, "algorithm": {}})
    net = fresh.net.eval()
    before = {name: value.clone() for name, value in net.named_buffers()}
    fresh.step(X, Y)  # as in any loop: evaluation mode moves no statistics
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    net.train()
    fresh.predict(X)
    assert all(m.training for m in net.modules())
    fresh.step(X, Y)
    assert any(not torch.equal(value, before[name]) for name, value in net.named_buffers())


@pytest.mark.parametrize("make", [GCN, GAT])
def test_graphs(make: Any) -> None:
    nodes, edges = torch.randn(9, 5, generator=DRAW), torch.randint(9, (2, 30), generator=DRAW)
    net = make(5, 8, 3, 3)
    example: dict[str, Tensor] = {"x": nodes, "edge_index": edges}
    if make is GCN:
        example["edge_weight"] = torch.rand(30, generator=DRAW)
    local = ll.localize(net, ll.MonoForward(), cuts=["convs.0", "convs.1"], example=example)
    losses = local.step(example, torch.arange(9) % 3, rows=torch.arange(5))
    assert list(losses) == ["convs_0", "convs_1"]
    assert torch.allclose(local.predict(example), net.eval()(**example))


def test_states_of_something_else_are_refused_and_a_copy_is_a_network_of_its_own() -> None:
    local = ll.localize(mlp(), ll.MonoForward(), cuts=["0"], example=torch.randn(4, 5))
    other = ll.localize(mlp(), ll.MonoForward(), cuts=["0"], example=torch.randn(4, 5), optimizer=SGD)
    with pytest.raises(ValueError, match=r"the state of another optimizer than Adam"):
        local.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"no state of a Local, but a int"):
        local.load_state_dict(3)  # type: ignore[arg-type]
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    local = ll.localize(net.eval(), ll.MonoForward(), cuts=["2"], example=torch.randn(4, 5))
    twin = copy.deepcopy(local)
    twin.net.train()[1].eval()  # type: ignore[index]
    before = twin.net.state_dict()["1.running_mean"].clone()
    twin.step(torch.randn(4, 5), torch.arange(4) % 3)
    assert torch.equal(twin.net.state_dict()["1.running_mean"], before)  # the user's eval() of one part counts
    assert not torch.equal(twin.net.state_dict()["0.weight"], net.state_dict()["0.weight"])


def test_lightning_trains_it_too() -> None:
    torch.manual_seed(0)
    local = ll.localize(mobile(), ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=SGD)
    twin = copy.deepcopy(local.net)
    task = Classification(local.blocks, X[:2], 10)
    flags: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        strategy=LocalStrategy(local), max_epochs=1, accelerator="cpu", enable_model_summary=False, **flags
    )
    trainer.fit(task, DataLoader(TensorDataset(X, Y), batch_size=6))
    other = ll.localize(twin, ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=SGD)
    for images, labels in zip(X.split(6), Y.split(6), strict=True):
        other.step(images, labels)
    for (name, a), b in zip(local.net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


class _Adds(nn.Module):
    """What it gives is no single layer's: the input is added in the end; the same weight may be used twice."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(F.relu(self.a(x))) if self.tied else F.relu(self.a(x))
        out: Tensor = self.b(y) if self.tied else self.b(y) + x[:, :5]
        return F.linear(out, self.b.weight.T @ self.b.weight[:, :5].T) if self.tied else out


@pytest.mark.parametrize("tied", [False, True])
def test_where_no_layer_can_be_kept_apart_the_networks_own_output_learns(tied: bool) -> None:
    """Not a head of the rule's on top of it, with which ``net(x)`` would be nothing that was trained."""
    x, labels = X[:, 0, :1, :12].flatten(1), Y % 5
    net = _Adds(tied)
    twin = copy.deepcopy(net)
    local = ll.localize(net, ll.MonoForward(), cuts=1, example=x, optimizer=SGD)
    optimizer = SGD(twin.parameters())
    F.cross_entropy(twin(x), labels).backward()
    optimizer.step()
    local.step(x, labels)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(local.predict(x), net(x))


def test_names_of_the_package_are_lazy() -> None:
    assert ll.MonoForward is __import__("locallearn.algorithms").algorithms.MonoForward
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = ll.Nothing


def test_a_frozen_network_is_refused_before_and_after() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    local = ll.localize(net, ll.MonoForward(), cuts=["0", "2"], example=x)
    net[0].requires_grad_(False)
    before = net[0].weight.clone(), net[2].weight.clone()
    local.step(x, y)
    assert torch.equal(before[0], net[0].weight)
    assert not torch.equal(before[1], net[2].weight)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="all 6 parameters of Sequential are frozen"):
        local.step(x, y)
    with pytest.raises(ValueError, match="set requires_grad_"):
        ll.localize(net, ll.MonoForward(), cuts=["0"], example=x)


def test_a_loss_that_is_not_finite_stops_and_names_its_unit() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    local = ll.localize(net, ll.MonoForward(), cuts=["0"], example=x)
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match="unit '0' is nan, because the inputs have entries that are not finite"):
        local.step(x.index_fill(1, torch.tensor([0]), float("nan")), y)
    assert torch.equal(before, net[0].weight)
    wrong = torch.full((6, 3), float("nan"))
    regress = ll.localize(net, ll.algorithms.Backprop(), cuts=1, example=x, loss=F.mse_loss)
    with pytest.raises(ValueError, match="is nan, because the targets have entries that are not finite"):
        regress.step(x, wrong)
    for one, targets in ((regress, wrong), (local, y)):
        none = torch.zeros(6, dtype=torch.bool)
        for empty in ((x[:0], targets[:0]), (x, targets, none), (x, targets, none.nonzero()[:, 0])):
            with pytest.raises(ValueError, match="this batch is empty"):
                one.step(*empty)
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="unit '0' diverged: its loss is nan; a smaller learning rate"):
        local.step(x, y)


def test_the_loss_of_a_unit_with_several_steps_is_their_mean() -> None:
    still = partial(torch.optim.SGD, lr=1e-9)
    losses = []
    for steps in (1, 5):
        torch.manual_seed(0)
        rule = ll.algorithms.PhysicalFF(inner_steps=steps)
        losses.append(ll.localize(mlp(), rule, cuts=2, example=V, optimizer=still).step(V, CLASSES))
    torch.testing.assert_close(*losses)


def test_a_batch_of_one_sample_is_refused_before_anything_learns() -> None:
    """A later block has nothing to normalise by, or a later block's head; the blocks before it could have learned."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    flat = nn.Sequential(*layers, nn.BatchNorm1d(4), nn.Linear(4, 10))
    maps = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
    small = nn.Sequential(*maps, nn.Flatten(), nn.Linear(16, 10))
    cases = [
        (flat, ll.MonoForward(), ["1", "4"], "block '4' has a normalisation"),
        (flat, ll.algorithms.Backprop(), ["1", "4"], "block '4' has a normalisation"),  # one unit for all blocks
        (
            small,
            ll.algorithms.LocalHeads(head="conv1"),
            ["1", "3", "4"],
            "the head of block '3' normalises over the batch",
        ),
    ]
    for net, algorithm, cuts, sentence in cases:
        local = ll.localize(net, algorithm, cuts=cuts, example=X[:4], optimizer=SGD)
        before = copy.deepcopy(local.state_dict())
        with pytest.raises(ValueError, match=sentence):
            local.step(X[:1], Y[:1])
        after = local.state_dict()
        for part in ("net", "algorithm"):
            for name, value in before[part].items():
                assert not isinstance(value, Tensor) or torch.equal(value, after[part][name]), name
        local.step(X[:2], Y[:2])
    pooled = nn.Sequential(*layers[:2], nn.MaxPool2d(15), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), *layers[2:])
    local = ll.localize(pooled, ll.algorithms.Backprop(), cuts=["2"], example=X[:4], optimizer=SGD)
    local.step(X[:1], Y[:1] % 4)
    with pytest.raises(ValueError, match="block '3' has a normalisation"):  # one place is left of a smaller image
        local.step(X[:1, :, :17, :17], Y[:1] % 4)
    scores = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    local = ll.localize(scores, ll.algorithms.Backprop(), cuts=["0"], example=V, optimizer=SGD)
    at = "readout" if any(m is scores[3] for m in local.blocks.readout.modules()) else local.blocks.names[-1]
    with pytest.raises(ValueError, match=f"block '{at}' has a normalisation"):
        local.step(V[:1], CLASSES[:1])
    fits = ll.localize(
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10)),
        ll.MonoForward(),
        cuts=["2"],
        example=X,
        optimizer=SGD,
    )
    twin = copy.deepcopy(fits.algorithm)
    plain_loop(twin, [ll.Batch(X[:1], Y[:1])] * 2, SGD)
    for _ in range(2):
        fits.step(X[:1], Y[:1])
    assert all(torch.equal(p, q) for p, q in zip(fits.algorithm.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("rule", [ll.algorithms.Pepita, ll.algorithms.CounterCurrent, ll.algorithms.PhysicalFF])
def test_rules_that_look_at_modules_see_those_of_a_plain_chain(rule: Any) -> None:
    net, x = mlp(), torch.randn(6, 5)
    before = copy.deepcopy(net.state_dict())
    local = ll.localize(net, rule(), 2, example=x, optimizer=SGD)
    for _ in range(2):
        local.step(x, torch.arange(6) % 3)
    assert not torch.equal(net.state_dict()["2.weight"], before["2.weight"])


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_weights_in_float16_do_not_learn() -> None:
    net, x = _perceptron().half(), torch.randn(8, 6).half()
    with pytest.raises(ValueError, match=r"weight '0.weight' of block '1' is float16.*float32.*bfloat16.*freeze"):
        ll.localize(net, ll.MonoForward(), cuts=2, example=x)
    net[2].bfloat16()
    with pytest.raises(ValueError, match=r"weight '0.weight' of block 'block0' is float16"):
        ll.MonoForward().attach(ll.Blocks.cut(net), TaskInfo(ll.Batch(x, torch.arange(8) % 4), 4, F.cross_entropy))
    local = ll.localize(net.bfloat16(), ll.MonoForward(), cuts=2, example=x.bfloat16())
    assert all(loss.isfinite() for _ in range(3) for loss in local.step(x.bfloat16(), torch.arange(8) % 4).values())


@pytest.mark.parametrize("half", ["network", "example"])
def test_float16_on_one_side_is_told(half: str) -> None:
    net, x = _perceptron(), torch.randn(8, 6)
    net, x = (net.half(), x) if half == "network" else (net, x.half())
    with pytest.raises(ValueError, match=r"float16: give network and example both in float32 or both in bfloat16"):
        ll.localize(net, ll.MonoForward(), cuts=2, example=x)


V, CLASSES = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
ADAM = partial(torch.optim.Adam, lr=0.05)


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))


def test_gradients_of_somebody_elses_backward_pass_have_no_part_in_a_step() -> None:
    """Adversarial inputs, or a look at a gradient: the network is the user's as well."""
    nets = [mlp(), mlp()]
    nets[1].load_state_dict(nets[0].state_dict())
    plain, looked = (ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD) for net in nets)
    for _ in range(2):
        F.cross_entropy(looked.net(V), CLASSES).backward()
        for local in (plain, looked):
            local.step(V, CLASSES)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", ["a module", "assigned values"])
def test_parameters_that_come_after_localize_are_refused(how: str) -> None:
    net = mlp()
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD)
    local.step(V, CLASSES)
    last = list(net.named_modules())[-1][0]
    if how == "a module":
        old = net.get_submodule(last)
        net.set_submodule(last, nn.Linear(old.in_features, old.out_features))  # type: ignore[arg-type]
    else:
        net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    with pytest.raises(ValueError, match=r"(was|were) exchanged after localize: the blocks run what stood there"):
        local.step(V, CLASSES)


class _Wrapped(nn.Module):
    """A layer with something of one's own behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, and twice."""
        return 2 * self.layer(x)


class _Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, 3)``."""
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)  # type: ignore[no-any-return]


def test_a_list_that_the_network_runs_through_and_that_has_grown_is_refused() -> None:
    net = _Listed()
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD)
    local.step(V, CLASSES)
    net.layers.append(nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"module 'layers.3' of _Listed was exchanged after localize"):
        local.step(V, CLASSES)


def test_a_copy_in_the_place_of_a_layer_is_refused() -> None:
    """It gives the same today, and would never learn."""
    net = mlp()
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD)
    name = next(name for name, module in net.named_modules() if isinstance(module, nn.Linear))
    net.set_submodule(name, copy.deepcopy(net.get_submodule(name)))
    with pytest.raises(ValueError, match="was exchanged after localize"):
        local.step(V, CLASSES)


@pytest.mark.parametrize("how", ["exchanged", "swapped", "wrapped", "appended", "gone"])
def test_a_network_that_runs_other_modules_than_its_blocks_is_refused(how: str) -> None:
    """Though all its parameters have optimizers."""
    net = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD)
    local.step(V, CLASSES)
    if how == "exchanged":
        net[1] = nn.Tanh()
    elif how == "swapped":
        net[2], net[4] = net[4], net[2]
    elif how == "wrapped":
        net[2] = _Wrapped(net[2])
    elif how == "appended":
        net.append(nn.Tanh())
    else:
        del net[3]
    assert not torch.equal(net(V), local.predict(V))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(was|were) exchanged after localize"):
            local.step(V, CLASSES)


class _Probed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, 3)``."""
        return self.head(self.body(x))  # type: ignore[no-any-return]


def test_what_a_network_holds_beside_what_it_runs_is_its_own() -> None:
    """A probe, weights averaged over time, a second name; renewed, grown and gone again."""
    net = _Probed()
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD)

    def learns() -> None:
        for one in (local, copy.deepcopy(local)):
            before = one.net.body[0].weight.clone()
            one.step(V, CLASSES)
            assert not torch.equal(one.net.body[0].weight, before)

    for _ in range(2):
        net.probe = nn.Sequential(nn.Linear(6, 2))
        net.averaged = copy.deepcopy(net.body).requires_grad_(False)
        net.alias = net.body[2]
        learns()
    net.probe.append(nn.ReLU())
    del net.averaged, net.alias
    learns()
    net.body[2] = nn.Linear(6, 6)  # and what it runs is still watched
    with pytest.raises(ValueError, match=r"module 'body.2' of _Probed was exchanged"):
        local.step(V, CLASSES)


class _Reading(nn.Module):
    """Reads attributes and a buffer between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.scale, self.p, self.function, self.passes, self.share = 1.0, 0.0, torch.relu, 0, 0.0
        self.plain, self.pair, self.listed, self.by_name = torch.ones(6), (1.0, 2.0), [1.0], {"gain": [1.0]}
        self.given, self.epoch = types.SimpleNamespace(scale=1.0, shape=(1, [1.0])), 0
        self.register_buffer("mask", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, 3)``."""
        self.passes += 1
        self.share = 0.1 * self.passes
        x = self.function(self.second(self.act(self.first(x)) * self.mask)) * self.scale * self.plain
        x = x * self.pair[0] * self.listed[0] * self.by_name["gain"][0] * self.given.scale * self.given.shape[1][0]
        x = 2 * x if self.epoch > 5 else x
        return self.head(torch.dropout(x, self.p, self.training))  # type: ignore[no-any-return]


def _hooked(net: Any) -> None:
    net.register_forward_hook(lambda module, args, output: 2 * output)


class _Later(nn.Module):
    """Does nothing until it is switched on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.on = inner, False

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, or twice."""
        return self.inner(x) * (2 if self.on else 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda net: setattr(net, "scale", 2.0), "attribute 'scale'"),
        (lambda net: setattr(net, "p", 0.9), "attribute 'p'"),  # nothing in evaluation mode
        (lambda net: setattr(net, "function", torch.tanh), "attribute 'function'"),
        (lambda net: setattr(net, "forward", lambda x: x[:, :3]), "attribute 'forward'"),
        (lambda net: setattr(net, "mask", torch.zeros(6)), "buffer 'mask'"),
        (lambda net: setattr(net, "plain", torch.zeros(6)), "attribute 'plain'"),
        (lambda net: setattr(net, "pair", (9.0, 2.0)), "attribute 'pair'"),
        (lambda net: net.listed.__setitem__(0, 9.0), "attribute 'listed'"),
        (lambda net: net.by_name["gain"].append(net.by_name["gain"].pop() + 1), "attribute 'by_name.gain'"),
        (lambda net: setattr(net.given, "scale", 9.0), "attribute 'given.scale'"),
        (lambda net: net.given.shape[1].__setitem__(0, 9.0), "attribute 'given.shape'"),
        (_hooked, "a hook"),
        (lambda net: setattr(net, "head", _Later(net.head)), "module 'head'"),
        (lambda net: setattr(net, "act", nn.ReLU()), "module 'act'"),
    ],
)
def test_what_a_forward_reads_and_what_may_change_later_is_watched(change: Any, told: str) -> None:
    net = _Reading()
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    local.step(V, CLASSES)
    net.mask.mul_(1.0)  # another value is none of another thing
    net.register_forward_hook(lambda module, args, output: None)  # one that only looks
    for _ in range(2):
        net(V)  # it counts
        local.step(V, CLASSES)
    for one in (copy.deepcopy(local), local):
        change(one.net)
        with pytest.raises(ValueError, match=f"^{told} of _Reading was exchanged after localize"):
            one.step(V, CLASSES)


def test_a_network_that_counts_its_passes_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _Reading()
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    compared: list[Any] = []
    check = Cut.check
    monkeypatch.setattr(Cut, "check", lambda cut, *args: (compared.append(cut), check(cut, *args)))
    for _ in range(4):
        net(V)
        local.step(V, CLASSES)
    assert len(compared) == 1


def test_what_is_set_from_outside_is_compared_with_every_change() -> None:
    """A whole number that made no difference yet may make one later."""
    net = _Reading()
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    for net.epoch in range(6):
        net(V)
        local.step(V, CLASSES)
    net.epoch = 6
    with pytest.raises(ValueError, match=r"^attribute 'epoch' of _Reading was exchanged after localize"):
        local.step(V, CLASSES)


def test_keys_of_a_dict_are_told_apart_whatever_they_are() -> None:
    """One that the network's own pass counts up says nothing of the others."""
    net = _Reading()
    net.by_name = {"gain": [1.0], 1: 0, 2: 0}
    net.first.register_forward_hook(lambda *_: net.by_name.update({2: net.by_name[2] + 1}))
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    for _ in range(2):
        local.step(V, CLASSES)
        net(V)
    net.by_name[1], net.scale = 1, 9.0
    with pytest.raises(ValueError, match=r"^attribute 'scale' and attribute 'by_name.1' of|^attribute 'by_name.1' and"):
        local.step(V, CLASSES)


@pytest.mark.parametrize("kind", [tuple, list])
def test_long_containers_are_not_looked_through(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    check = Cut.check
    for entries, times in ((10, 1), (1001, 0)):
        net = _Reading()
        net.words = kind(types.SimpleNamespace(scale=1.0) for _ in range(entries))
        local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
        compared.clear()
        monkeypatch.setattr(Cut, "check", lambda *a, **k: (compared.append(a), check(*a, **k))[1])
        net.words[0].scale = 2.0
        local.step(V, CLASSES)
        monkeypatch.undo()
        assert len(compared) == times


def test_what_was_exchanged_is_told_before_what_made_no_difference() -> None:
    net = _Reading()
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    net.averaged = copy.deepcopy(net.first)
    local.step(V, CLASSES)
    net.averaged, net.head = copy.deepcopy(net.first), nn.Linear(6, 3)
    net.epoch, net.scale, net.more = 1, 1, nn.ReLU()
    told = r"module 'head', module 'averaged', attribute 'scale' and 2 more of _Reading were exchanged"
    with pytest.raises(ValueError, match=f"^{told}"):
        local.step(V, CLASSES)


@pytest.mark.parametrize("alone", [False, True])
def test_a_network_that_was_moved_and_its_blocks_read_the_same_tensors(alone: bool) -> None:
    net, wide = _Reading(), V.double()
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    if alone:
        net.double()
        with pytest.raises(ValueError, match=r"local.algorithm.to\(...\) moves all"):
            local.step(wide, CLASSES)
    local.algorithm.to(torch.float64)
    for one in (copy.deepcopy(local), local):
        one.step(wide, CLASSES)
        one.net.mask[0] = one.net.plain[1] = 0
        assert torch.allclose(one.net.eval()(wide), one.predict(wide))
        one.step(wide, CLASSES)


def test_a_buffer_in_the_place_of_an_equal_one_is_read() -> None:
    net = _Reading()
    local = ll.localize(net, ll.MonoForward(), cuts=["first"], example=V, optimizer=SGD)
    net.mask, net.plain = 1 * net.mask, 1.0000001 * net.plain
    local.step(V, CLASSES)
    net.mask[0] = net.plain[1] = 0
    assert torch.allclose(net.eval()(V), local.predict(V))


def test_other_modules_that_run_the_same_are_no_exchange() -> None:
    """Wrapped by torch.compile, or with a parametrization that goes again; nothing is compiled to find out."""
    torch._dynamo.reset()  # after eight compilations of one forward it gives up, whoever made them
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    net = _Probed()
    first = net.body[0]
    local = ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD)
    torch.nn.utils.parametrize.register_parametrization(first, "weight", nn.Identity())
    local.step(V, CLASSES)
    torch.nn.utils.parametrize.remove_parametrizations(first, "weight")
    net.body = torch.compile(net.body, backend=backend)
    before = first.weight.clone()
    local.step(V, CLASSES)
    assert not torch.equal(first.weight, before)
    assert torch.allclose(net.eval()(V), local.predict(V))
    assert len(compiled) == 1


@pytest.mark.parametrize("rule", [ll.MonoForward, ll.ForwardForward])  # the latter leaves the network's readout alone
def test_a_parametrization_that_comes_later_trains_on(rule: Any) -> None:
    net = mlp()
    local = ll.localize(net, rule(), cuts=2, example=V, optimizer=SGD)
    first = next(module for module in net.modules() if isinstance(module, nn.Linear))
    torch.nn.utils.parametrize.register_parametrization(first, "weight", nn.Identity())
    before = first.weight.clone()
    for one in (local, copy.deepcopy(local)):
        one.step(V, CLASSES)
    assert not torch.equal(first.weight, before)


def test_a_state_that_is_refused_leaves_everything_as_it_was() -> None:
    first, other = (ll.localize(mlp(), ll.MonoForward(), cuts=2, example=V, optimizer=make) for make in (SGD, ADAM))
    wider = ll.localize(_wide(), ll.MonoForward(), cuts=2, example=V, optimizer=SGD)
    before = copy.deepcopy(first.state_dict())
    moved = {
        part: {k: v + 1 if isinstance(v, Tensor) else v for k, v in before[part].items()}
        for part in ("net", "algorithm")
    }
    of_units = before["optimizers"]
    for strange, sentence in (
        (other.state_dict(), "another optimizer than SGD"),
        (before | {"kinds": dict.fromkeys(of_units, "SGDW")}, "the state of another optimizer than SGD, of SGDW: make"),
        (wider.state_dict(), "another network, rule or optimizer: .*size mismatch"),
        (before | moved | {"algorithm": {}}, "another network, rule or optimizer: .*Missing"),
        (
            before | moved | {"optimizers": {u: {"param_groups": o["param_groups"]} for u, o in of_units.items()}},
            "'state'",
        ),
        (before | moved | {"optimizers": {u: _fewer(o) for u, o in of_units.items()}}, r"groups of \[\d"),
        (
            before | moved | {"optimizers": {unit: {} for unit in of_units}},
            "what it has for SGD is no optimizer's state",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            first.load_state_dict(strange)
        for part in ("net", "algorithm"):
            for name, value in first.state_dict()[part].items():
                assert not isinstance(value, Tensor) or torch.equal(value, before[part][name])


def _fewer(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer over one parameter less."""
    first, *others = state["param_groups"]
    return {**state, "param_groups": [{**first, "params": first["params"][1:]}, *others]}


def test_the_state_of_an_older_release_that_lacks_a_setting_is_taken() -> None:
    """As PyTorch takes it, with the setting's usual value."""
    make = partial(torch.optim.Adam, lr=1e-3)
    first, second = (ll.localize(mlp(), ll.MonoForward(), cuts=2, example=V, optimizer=make) for _ in range(2))
    first.step(V, CLASSES)
    state = copy.deepcopy(first.state_dict())
    for optimizer in state["optimizers"].values():
        for group in optimizer["param_groups"]:
            del group["differentiable"]
    second.load_state_dict(state)
    for local in (first, second):
        local.step(V, CLASSES)
    for name, value in first.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name])


class _Choosy(nn.Linear):
    """A layer with a state of its own, which it may refuse in its own words."""

    made_with = "one"

    def get_extra_state(self) -> Any:
        """What it was made with."""
        return self.made_with

    def set_extra_state(self, state: Any) -> None:
        """Take no other."""
        if state != self.made_with:
            raise KeyError(f"made with {state}")


def test_a_state_that_a_module_refuses_leaves_everything_as_it_was() -> None:
    nets = [nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), _Choosy(6, 3)) for _ in range(2)]
    nets[1][4].made_with = "another"
    first, other = (ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD) for net in nets)
    before = copy.deepcopy(nets[0].state_dict())
    with pytest.raises(ValueError, match="made with another"):
        first.load_state_dict(other.state_dict())
    for name, value in nets[0].state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[name])


@pytest.mark.parametrize(
    "schedule",
    [
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10),
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10),
        partial(torch.optim.lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.2),
        partial(torch.optim.swa_utils.SWALR, swa_lr=0.1),
    ],
)
def test_a_schedule_that_is_made_before_or_after_loading_is_no_other_optimizer(schedule: Any) -> None:
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    first, second = (ll.localize(mlp(), ll.MonoForward(), cuts=2, example=V, optimizer=make) for _ in range(2))
    for optimizer in first.optimizers.values():
        schedule(optimizer)
    second.load_state_dict(first.state_dict())
    for name, value in first.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name])
    first.load_state_dict(ll.localize(mlp(), ll.MonoForward(), cuts=2, example=V, optimizer=make).state_dict())


class _Slotted:
    """A step that cannot be referred to weakly."""

    __slots__ = ("optimizer",)

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __call__(self, closure: Any) -> Any:
        return type(self.optimizer).step(self.optimizer, closure)


@pytest.mark.parametrize(
    "step", [lambda own: types.MethodType(lambda self, closure: type(self).step(self, closure), own), _Slotted]
)
def test_a_step_of_one_optimizers_own_may_need_a_closure(step: Any) -> None:
    """As a wrapper of a library's sets it, on the object."""
    nets = [mlp(), mlp()]
    nets[1].load_state_dict(nets[0].state_dict())
    plain, wrapped = (ll.localize(net, ll.MonoForward(), cuts=2, example=V, optimizer=SGD) for net in nets)
    plain.step(V, CLASSES)
    for optimizer in wrapped.optimizers.values():
        optimizer.step = step(optimizer)  # type: ignore[method-assign]
    wrapped.step(V, CLASSES)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(mine, theirs)
