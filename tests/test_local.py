"""``ll.localize``: one call puts any network under a rule, and it learns as a loop by hand would teach it."""

from __future__ import annotations

import copy
import inspect
import io
import random
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise
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
from locallearn import algorithms
from locallearn.algorithms import TaskInfo
from locallearn.local import bytes_in
from locallearn.local._where import partition
from locallearn.strategies import LocalStrategy
from locallearn.tasks.classification import Classification
from locallearn.testing import plain_loop

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, 32, 32, generator=DRAW), torch.arange(12) % 10
SGD = partial(torch.optim.SGD, lr=0.05)


def _resnet() -> nn.Module:
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return net


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)


def _dense() -> nn.Module:
    return torchvision.models.DenseNet(8, (1, 1, 1, 1), 16, num_classes=10)


def _mobile() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.25, dropout=0.0)


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
    "resnet": (_resnet, ["layer1", "layer2", "layer3"], _by_hand_resnet),
    "vit": (_vit, ["encoder.layers.encoder_layer_0"], _by_hand_vit),
    "densenet": (_dense, ["features.denseblock1"], _by_hand_dense),
    "vgg": (_vgg, ["features.5", "features.10"], _by_hand_vgg),
    "mobilenet": (_mobile, ["features.3"], _by_hand_mobile),
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
    net = _vit()
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
        local = ll.localize(_mobile(), ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=SGD)
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
        return ll.localize(_mobile(), ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=make_optimizer)

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


def test_cuts_by_number_and_by_memory(capsys: pytest.CaptureFixture[str]) -> None:
    net = _resnet()
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


def test_sizes_and_partitions() -> None:
    assert [bytes_in(size) for size in (5, "1KiB", "2 kB", "1.5MiB")] == [5, 1024, 2000, 1572864]
    for size in ("200 Mib", "", "-1MB", 0, "0MB"):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            bytes_in(size)
    assert partition([1, 1, 1, 3], 2) == [2]
    assert partition([5, 1, 1, 1], 3) == [0, 1]  # of two alike the first


def test_what_is_refused() -> None:
    net = _mobile()
    with pytest.raises(ValueError, match="pass example="):
        ll.localize(net, ll.MonoForward(), cuts=2)
    with pytest.raises(ValueError, match="give either cuts="):
        ll.localize(net, ll.MonoForward(), example=X)
    with pytest.raises(ValueError, match=r"write \['features'\]"):
        ll.localize(net, ll.MonoForward(), cuts="features", example=X)
    with pytest.raises(ValueError, match="algorithm is the class MonoForward, expected a rule"):
        ll.localize(net, ll.MonoForward, cuts=1, example=X)  # type: ignore[arg-type]
    local = ll.localize(net, ll.MonoForward(), cuts=["features.3"], example=X)
    with pytest.raises(ValueError, match="labels go from 0 to 10, expected class ids 0 to 9"):
        local.step(X, torch.arange(12) % 11)
    with pytest.raises(
        ValueError, match=r"block 'features_4' has a normalisation|block 'features_3' has a normalisation"
    ):
        local.step(X[:1], Y[:1])


_FIRST = nn.Linear(5, 8)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def _compiled(net: nn.Module) -> nn.Module:
    """What torch.compile makes of a network, without its import, which takes seconds."""
    wrapped = nn.Module()
    wrapped._orig_mod = net
    return wrapped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"example": torch.randn(4, 6)}, r"^Sequential cannot run the example in training mode: .*mat1 and mat2"),
        ({"example": torch.randn(0, 5)}, r"the example is empty, of shape \(0, 5\)"),
        ({"cuts": 2.0}, r"cuts is 2.0, expected names of modules, or a whole number of blocks"),
        ({"net": len}, r"net is a builtin_function_or_method, expected a torch.nn.Module"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, r"optimizer is a SGD, and every unit needs one of its own"),
        ({"cuts": ["7"]}, r"has no module '7'"),
        ({"cuts": [_FIRST]}, r"^a cut is a Linear itself, expected its name in Sequential: write '0'$"),
        ({"cuts": [nn.ReLU()]}, r"^a cut is a ReLU itself, .* Sequential, which does not contain it$"),
        ({"net": nn.Linear}, r"^net is the class Linear, expected a torch.nn.Module"),
        ({"net": _compiled(nn.Linear(5, 3))}, r"^net is compiled as a whole, .* compile='blocks'"),
        (
            {"net": nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), "cuts": 2},
            r"cuts is 2, and Sequential can be cut into no more than one block \(its last layer is the readout",
        ),
    ],
)
def test_what_is_given_wrongly_is_told(change: dict[str, Any], message: str) -> None:
    net = _mlp()
    net[0] = _FIRST  # type: ignore[operator]
    given: dict[str, Any] = {"net": net, "cuts": ["0"], "example": torch.randn(4, 5), **change}
    with pytest.raises(ValueError, match=message):
        ll.localize(given.pop("net"), ll.MonoForward(), **given)


def test_one_sample_is_no_example_for_a_normalisation_and_a_key_may_be_missing() -> None:
    with pytest.raises(
        ValueError,
        match=r"training mode: Expected more than 1 value .*; give an example .*, because 'layer4.0.bn1' normalises",
    ):
        ll.localize(_resnet(), ll.MonoForward(), cuts=["layer1"], example=X[:1])

    class Told(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return {"scores": super().forward(x)}

    with pytest.raises(ValueError, match=r"^output is 'scors', and Told gives scores$"):
        ll.localize(Told(*_mlp()), ll.MonoForward(), cuts=1, example=torch.randn(4, 5), output="scors")


def test_targets_are_looked_at() -> None:
    local = ll.localize(_mlp(), ll.MonoForward(), cuts=["0"], example=torch.randn(4, 5))
    inputs, labels = torch.randn(4, 5), torch.arange(4) % 3
    assert local.step(inputs, labels.int()).keys() == {"0", "2"}
    for wrong, message in (
        (labels.view(-1, 1), r"labels have shape \(4, 1\), expected class ids of shape \(N,\)"),
        ([0, 1, 2, 0], r"targets are a list, expected a tensor"),
        (labels[:0], r"this batch is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            local.step(inputs, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels go from 0 to 7"):
        local.step(inputs, torch.tensor([0, 7, 1, 2]), rows=torch.arange(2))


def test_states_of_something_else_are_refused_and_a_copy_is_a_network_of_its_own() -> None:
    local = ll.localize(_mlp(), ll.MonoForward(), cuts=["0"], example=torch.randn(4, 5))
    other = ll.localize(_mlp(), ll.MonoForward(), cuts=["0"], example=torch.randn(4, 5), optimizer=SGD)
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
    local = ll.localize(_mobile(), ll.MonoForward(), cuts=["features.3"], example=X[:4], optimizer=SGD)
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


class _Segments(nn.Module):
    """Gives a dict of maps of the input's size: the size crosses every border, and no single layer is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(F.relu(self.b(F.relu(self.a(x)))))
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


def test_segmentation_is_trained_by_the_networks_own_output_and_refused_by_rules_of_one_class_per_sample() -> None:
    x, y = X[:4, :, :8, :8], torch.arange(4 * 64).view(4, 8, 8) % 5
    net = _Segments()
    twin = copy.deepcopy(net)
    local = ll.localize(net, ll.Backprop(), cuts=3, example=x, optimizer=SGD)
    assert local.cuts == ("a", "b")
    optimizer = SGD(twin.parameters())
    F.cross_entropy(twin(x)["out"], y).backward()
    optimizer.step()
    local.step(x, y)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(local.predict(x), net(x)["out"])
    for rule in (ll.MonoForward(), ll.DeepSupervision(), ll.LocalHeads(loss="predsim")):
        with pytest.raises(ValueError, match=r"one class per sample, and these labels have shape \(N, 8, 8\)"):
            ll.localize(_Segments(), rule, cuts=["a"], example=x)


def _rules() -> list[type[ll.Algorithm]]:
    made = [getattr(algorithms, name) for name in algorithms.__all__]
    known = [rule for rule in made if isinstance(rule, type) and issubclass(rule, ll.Algorithm)]
    return [
        rule for rule in known if not inspect.isabstract(rule) and rule not in (ll.Algorithm, algorithms.ForwardGNN)
    ]


_OF_PLACES = (
    *(ll.Backprop, algorithms.BackpropL1, ll.FeedbackAlignment, ll.ProductFeedbackAlignment),
    *(ll.ForwardGradient, ll.ZerothOrder),
)


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: str(rule.__name__))
def test_every_rule_trains_labels_of_places_or_says_that_it_answers_with_one_class_per_sample(
    rule: type[ll.Algorithm],
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x, y = X[:6, :, :5, :5], torch.arange(150).view(6, 5, 5) % 4
    make = partial(ll.localize, net, rule(), cuts=["1"], example=x, targets=y, optimizer=SGD)
    if rule not in _OF_PLACES:
        with pytest.raises(ValueError, match=r"one class per sample, and these labels have shape \(N, 5, 5\)"):
            make()
        return
    local = make()
    local.step(x, y)
    assert local.predict(x).shape == (6, 4, 5, 5)


def test_ridge_is_told_that_targets_are_not_as_many_as_they_were() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), X[:6, :, :5, :5]
    local = ll.localize(net, ll.Ridge(), cuts=["1"], example=x, loss=lambda o, t: (o.mean(1) - t).square().mean())
    with pytest.raises(ValueError, match="a sample's targets are 9 numbers and the network's output is 36"):
        local.step(x, torch.zeros(6, 3, 3))


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


def test_names_of_the_package_are_lazy() -> None:
    assert ll.MonoForward is __import__("locallearn.algorithms").algorithms.MonoForward
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = ll.Nothing


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
    with pytest.raises(ValueError, match=r"test_local.py:\d+ .*runs a Linear that is no member of the network"):
        ll.localize(_Loose(), ll.MonoForward(), cuts=["first"], example=x)
    with pytest.raises(ValueError, match=r"it passes a _DynamicCache on, .* a dict with use_cache=False"):
        ll.localize(_Caching(), ll.MonoForward(), cuts=["first"], example=x)
    assert ll.localize(_Caching(), ll.MonoForward(), cuts=["first"], example={"x": x, "use_cache": False})


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
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="unit '0' diverged: its loss is nan; a smaller learning rate"):
        local.step(x, y)


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


def test_a_batch_of_one_sample_is_refused_before_anything_learns() -> None:
    """A later block has nothing to normalise by, or a later block's head; the blocks before it could have learned."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    flat = nn.Sequential(*layers, nn.BatchNorm1d(4), nn.Linear(4, 10))
    maps = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
    small = nn.Sequential(*maps, nn.Flatten(), nn.Linear(16, 10))
    cases = [
        (flat, ll.MonoForward(), ["1", "4"], "block '4' has a normalisation"),
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


class _Tokens(nn.Module):
    """Scores for every token, classes last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(ids))))


def _of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-100)


def test_a_target_per_token_goes_through_the_users_own_loss() -> None:
    ids, targets = torch.arange(40).view(8, 5) % 9, torch.arange(40).view(8, 5) % 7
    for classes in (None, True, False):
        torch.manual_seed(0)
        net = _Tokens()
        twin = copy.deepcopy(net)
        local = ll.localize(
            net, ll.Backprop(), ["embed"], example=ids, targets=targets, loss=_of_tokens, classes=classes, optimizer=SGD
        )
        assert local.task.outputs == (5 if classes is False else 7)
        optimizer = SGD(twin.parameters())
        some = torch.where(targets == 3, -100, targets)
        _of_tokens(twin(ids), some).backward()
        optimizer.step()
        local.step(ids, some)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    for rule in (ll.algorithms.ZerothOrder(), ll.algorithms.ForwardGradient()):
        net = _Tokens()
        before = net.out.weight.detach().clone()
        ll.localize(net, rule, ["embed"], example=ids, targets=targets, loss=_of_tokens, optimizer=SGD).step(
            ids, targets
        )
        assert not torch.equal(before, net.out.weight)


def test_targets_that_were_made_up_are_said_to_be() -> None:
    ids, targets = torch.arange(40).view(8, 5) % 9, torch.arange(40).view(8, 5) % 7
    for given, message in (
        (
            {"loss": _of_tokens},
            r"^loss= fails on outputs of shape \(N, 5, 7\) and targets .* made up .*: give .* as targets=",
        ),
        (
            {"targets": targets},
            r"^targets have shape \(N, 5\), and class ids .* have shape \(N, 7\): .*classes in dimension 1;",
        ),
        ({"targets": targets[:3], "loss": _of_tokens}, r"^the example has 8 samples, and targets have shape \(3, 5\)"),
        ({"targets": [1], "loss": _of_tokens}, r"^targets are a list, expected a tensor"),
        (
            {"targets": targets, "loss": lambda o, t: F.cross_entropy(o, t)},
            r"^loss= fails on outputs of shape \(N, 5, 7\) and the given targets of shape \(N, 5\), torch.int64",
        ),
        ({"targets": targets, "loss": lambda o, t: o}, r"gives a tensor of shape \(2, 5, 7\), expected .* one number"),
    ):
        with pytest.raises(ValueError, match=message):
            ll.localize(_Tokens(), ll.Backprop(), ["embed"], example=ids, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one class per sample, and these labels have shape \(N, 5\): use a rule"):
        ll.localize(_Tokens(), ll.MonoForward(), ["embed"], example=ids, targets=targets, loss=_of_tokens)
    with pytest.raises(ValueError, match=r"labels have shape \(N, 7\).*\(these labels were made up: without targets="):
        ll.localize(_Tokens(), ll.MonoForward(), ["embed"], example=ids)
    local = ll.localize(_Tokens(), ll.Backprop(), ["embed"], example=ids)
    with pytest.raises(
        ValueError, match=r"^labels have shape \(N, 5\), expected .* \(N, 7\): .* dimension 1 .* and targets=$"
    ):
        local.step(ids, targets)


@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss(), partial(F.huber_loss, delta=0.5), F.poisson_nll_loss])
def test_targets_that_fit_only_by_broadcasting_are_refused(loss: Any) -> None:
    net, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(6, 5)
    said = r"^targets have shape \(N,\), and \w+ compares them entry by entry with outputs of shape \(N, 1\): give"
    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, loss=loss)
    with pytest.raises(ValueError, match=said):
        local.step(x, torch.rand(6))
    with pytest.raises(ValueError, match=said):
        ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=torch.rand(6), loss=loss)
    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=torch.rand(6, 1), loss=loss)
    local.step(x, torch.rand(6, 1))
    with pytest.raises(ValueError, match=r"^targets have shape \(N, 3\), and"):
        local.step(x, torch.rand(6, 3))


@pytest.mark.parametrize("rule", [ll.algorithms.Pepita, ll.algorithms.CounterCurrent, ll.algorithms.PhysicalFF])
def test_rules_that_look_at_modules_see_those_of_a_plain_chain(rule: Any) -> None:
    net, x = _mlp(), torch.randn(6, 5)
    before = copy.deepcopy(net.state_dict())
    local = ll.localize(net, rule(), 2, example=x, optimizer=SGD)
    for _ in range(2):
        local.step(x, torch.arange(6) % 3)
    assert not torch.equal(net.state_dict()["2.weight"], before["2.weight"])


def test_batches_unlike_the_example_are_told_where_they_fail() -> None:
    local = ll.localize(_mobile(), ll.MonoForward(), cuts=["features.3"], example=X)
    for wrong, message in (
        (
            X[:, :1],
            r"^inputs are torch.float32 of shape \(12, 1, 32, 32\), and the example .* \(12, 3, 32, 32\): .*channels",
        ),
        (X.double(), r"^inputs are torch.float64 of shape .* and the example .* torch.float32 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            local.step(wrong, Y)
        with pytest.raises(ValueError, match=message):
            local.predict(wrong)
    with pytest.raises(ValueError, match=r"^inputs are torch.float32 of shape \(3, 32, 32\)"):
        local.predict(X[0])  # in which BatchNorm sees the mistake, with a ValueError of its own
    with pytest.raises(ValueError, match=r"^there are 12 inputs and 11 targets: every sample needs its own$"):
        local.step(X, Y[:11])
    with torch.no_grad(), pytest.raises(ValueError, match=r"^gradients are switched off here"):
        local.step(X, Y)
    assert local.predict(X[:3]).shape == (3, 10)  # another number of samples is nothing to refuse
    local.step(X[:5], Y[:5])


# -- what a loss leaves out, and targets beyond the first two ---------------------------------------------------------


class _Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


@pytest.mark.parametrize("given", [True, False], ids=["targets", "none"])
@pytest.mark.parametrize(
    ("label", "loss"),
    [
        (-100, F.cross_entropy),
        (255, partial(F.cross_entropy, ignore_index=255)),
        (255, nn.CrossEntropyLoss(ignore_index=255)),
    ],
    ids=["usual", "partial", "module"],
)
def test_labels_of_places_that_the_loss_leaves_out_are_no_class_ids(label: int, loss: Any, given: bool) -> None:
    torch.manual_seed(0)
    net, images = _Places(), torch.randn(4, 3, 5, 5)
    labels = torch.randint(4, (4, 5, 5))
    labels[:, :2] = label
    by_hand = copy.deepcopy(net)
    targets = {"targets": labels} if given else {}
    local = ll.localize(
        net,
        ll.Backprop(),
        cuts=["one"],
        example=images,
        loss=loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **targets,
    )
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):
        local.step(images, labels)
        optimizer.zero_grad()
        loss(by_hand(images), labels).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(net.parameters(), by_hand.parameters(), strict=True))
    labels[0, 3, 3] = 77
    with pytest.raises(ValueError, match="to 77, expected class ids 0 to 3"):
        local.step(images, labels)
    with pytest.raises(ValueError, match=f"all labels of this batch are {label}, which the loss leaves out"):
        local.step(images, torch.full_like(labels, label))


def test_all_targets_of_the_example_say_whether_they_are_class_ids() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)
    numbers = torch.tensor([1, 3, 40, 2, 5, 9, 11, 0, 1, 2, 3, 60])

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(1) - targets).square().mean()

    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=numbers, loss=squares)
    assert local.task.classes is False
    local.step(x, numbers)
    with pytest.raises(
        ValueError, match=r"labels go from 0 to 60, expected class ids 0 to 4: .* a loss for them and classes=False"
    ):
        ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=numbers, classes=True)


def test_samples_that_the_loss_leaves_out_whole_have_to_be_left_out_of_the_batch() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)
    labels = torch.arange(12) % 5
    some = torch.where(torch.arange(12) == 7, -100, labels)
    told = "labels go from -100 to 4, .*; samples labelled -100, which the loss leaves out, have to be left out, too"
    for rule in (ll.Backprop(), ll.MonoForward()):
        with pytest.raises(ValueError, match=told):
            ll.localize(copy.deepcopy(net), rule, cuts=["1"], example=x, targets=some)
        local = ll.localize(copy.deepcopy(net), rule, cuts=["1"], example=x)
        with pytest.raises(ValueError, match=told):
            local.step(x, some)
        with pytest.raises(
            ValueError, match=r"labels go from -1 to 4, .* 5 outputs; .* give a loss for them and classes=False"
        ):
            local.step(x, torch.where(some < 0, -1, some))
        local.step(x[some >= 0], some[some >= 0])


def test_numbers_that_looked_like_class_ids_are_told_the_way_out() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)
    ratings = torch.arange(12) % 5

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(1) - targets).square().mean()

    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=ratings, loss=squares)
    with pytest.raises(
        ValueError, match=r"labels go from 3 to 7, .*; where they are numbers to predict, give classes=False"
    ):
        local.step(x, ratings + 3)
    with pytest.raises(ValueError, match=r"labels are torch.float32, .* give classes=False"):
        local.step(x, ratings + 0.5)
    local = ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=ratings, loss=squares, classes=False)
    local.step(x, ratings + 3)
    soft = torch.rand(12, 5).softmax(1)
    with pytest.raises(ValueError, match=r"labels are torch.float32, .* or probabilities, give classes=False"):
        ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=soft)
    ll.localize(net, ll.Backprop(), cuts=1, example=x, targets=soft, classes=False).step(x, soft)


def test_a_sample_whose_labels_are_all_left_out_is_not_the_hardest() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 5, 5), torch.randint(4, (4, 5, 5))
    labels[2] = -100
    local = ll.localize(_Places(), ll.Backprop(keep=0.75), cuts=1, example=images, targets=labels)
    assert isinstance(local.algorithm, ll.Backprop)
    assert local.algorithm.last_losses is not None
    for _ in range(3):
        local.step(images, labels, source=torch.arange(4))
    assert local.algorithm.last_losses.losses[2] == 0
    assert all(local.algorithm.last_losses.losses[[0, 1, 3]] > 0)  # which all have learned since


def test_a_loss_that_is_at_fault_itself_is_not_mended_by_targets() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(12, 8)

    def marked(outputs: Tensor, targets: Tensor, *, margin: float) -> Tensor:
        return (outputs - targets - margin).square().mean()

    for loss, told in (
        (marked, r"called as loss\(outputs, targets\), and says: .*missing 1 required keyword-only argument"),
        (nn.CrossEntropyLoss(reduction="none"), "gives a tensor of shape .2,., expected a tensor of one number"),
        (
            nn.CosineEmbeddingLoss(),
            r"called as loss\(outputs, targets\), and says: .*missing 1 required positional argument",
        ),
    ):
        with pytest.raises(ValueError, match=told) as error:
            ll.localize(net, ll.Backprop(), cuts=1, example=x, loss=loss)
        assert "targets=" not in str(error.value)


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
