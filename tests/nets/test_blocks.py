"""Cutting somebody's network: what comes out is that network, and what cannot be cut is refused by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from locallearn.nets import Blocks, cnn, locally_connected, mlp
from locallearn.nets.feedforward import initialise

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3),
        nn.GroupNorm(1, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 10),
    )


# -- nn.Sequential ----------------------------------------------------------------------------------------------------
def test_a_sequential_is_cut_before_every_layer_with_weights() -> None:
    module = _conv_net()
    blocks = Blocks.cut(module)
    kinds = [[type(layer).__name__ for layer in block] for block in blocks]  # type: ignore[attr-defined]
    assert kinds == [["Conv2d", "BatchNorm2d", "ReLU", "Dropout"], ["Conv2d", "GroupNorm", "ReLU", "AvgPool2d"]]
    assert blocks.names == ["block0", "block1"]
    assert isinstance(blocks.readout, nn.Sequential)
    assert [type(layer).__name__ for layer in blocks.readout] == ["Flatten", "Linear"]
    assert torch.equal(blocks.eval()(X), module(X))


def test_a_norm_or_flatten_in_front_belongs_to_the_first_block() -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh())
    blocks = Blocks.cut(module)
    assert [len(block) for block in blocks] == [4, 2]  # type: ignore[arg-type]
    assert blocks.readout is None  # the last piece is more than a bare linear layer


def test_a_single_linear_layer_is_a_block_not_a_readout() -> None:
    blocks = Blocks.cut(nn.Sequential(nn.Linear(4, 2)))
    assert (len(blocks), blocks.readout) == (1, None)


def test_features_are_the_outputs_of_every_block() -> None:
    blocks = Blocks.cut(_conv_net()).eval()
    first, second = blocks.features(X)
    assert torch.equal(first, blocks[0](X))
    assert torch.equal(second, blocks[1](blocks[0](X)))
    assert blocks.readout is not None
    assert torch.equal(blocks(X), blocks.readout(second))


def test_training_the_blocks_trains_the_module() -> None:
    module = _conv_net()
    blocks = Blocks.cut(module)
    assert {id(p) for p in blocks.parameters()} == {id(p) for p in module.parameters()}
    before = module[0].weight.detach().clone()
    blocks(X).sum().backward()
    torch.optim.SGD(blocks.parameters(), lr=0.1).step()
    assert not torch.equal(module[0].weight, before)


# -- modules of one's own ---------------------------------------------------------------------------------------------
class _Own(nn.Module):
    def __init__(self, secret: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
        self.secret = secret

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = self.body(x)
        if self.secret:
            x = torch.relu(x)
        scores: Tensor = self.head(x)
        return scores


def test_named_children_groups_and_dotted_paths() -> None:
    module = _Own()
    blocks = Blocks.cut(module, [("conv1", "norm1"), "body.0", "body.1"], readout="head", example=X)
    assert blocks.names == ["conv1", "body_0", "body_1"]
    assert torch.allclose(blocks.eval()(X), module.eval()(X))


def test_the_check_leaves_modes_and_statistics_alone() -> None:
    module = _Own()
    module.norm1.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Blocks.cut(module, [("conv1", "norm1"), "body"], readout="head", example=X)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [m.training for m in (module, module.norm1, module.body)] == [True, False, True]


def test_something_between_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="something happens outside of conv1, body"):
        Blocks.cut(_Own(secret=True), [("conv1", "norm1"), "body"], readout="head", example=X)


def test_a_block_may_not_have_the_output_layers_name() -> None:
    with pytest.raises(ValueError, match="a block is named 'readout'"):
        Blocks({"one": nn.Linear(3, 3), "readout": nn.Linear(3, 3)}, nn.Linear(3, 2))


def test_the_wrong_order_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="_Own cannot be cut before 'body': what comes from the input"):
        Blocks.cut(_Own(), ["body", ("conv1", "norm1")], readout="head", example=X)


class _Wrapped(nn.Module):
    """A ResNet whose flattening is a module, as the refusal of the bare one asks for."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        net = self.resnet
        for part in (net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4):
            x = part(x)
        scores: Tensor = net.fc(self.flatten(net.avgpool(x)))
        return scores


def test_a_resnet_is_refused_where_its_forward_flattens_and_accepted_when_that_is_a_module() -> None:
    example = torch.randn(2, 3, 32, 32)
    resnet = torchvision.models.resnet18(num_classes=5)
    stem = ("conv1", "bn1", "relu", "maxpool")
    with pytest.raises(ValueError, match="ResNet cannot be cut before 'readout': what comes from layer4"):
        Blocks.cut(resnet, [stem, "layer1", "layer2", "layer3", ("layer4", "avgpool")], readout="fc", example=example)
    wrapped = _Wrapped(resnet)
    names = [tuple(f"resnet.{name}" for name in stem), "resnet.layer1", "resnet.layer2", "resnet.layer3"]
    last = ("resnet.layer4", "resnet.avgpool", "flatten")
    blocks = Blocks.cut(wrapped, [*names, last], readout="resnet.fc", example=example)
    assert blocks.names == ["resnet_conv1", "resnet_layer1", "resnet_layer2", "resnet_layer3", "resnet_layer4"]
    assert torch.allclose(blocks.eval()(example), resnet.eval()(example))


# -- refusals ---------------------------------------------------------------------------------------------------------
class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    own, example = _Own(), X
    with pytest.raises(ValueError, match=r"_Own is not an nn\.Sequential.*conv1, norm1, body, head"):
        Blocks.cut(own)
    with pytest.raises(ValueError, match="no submodule 'conv2'; it has conv1, norm1, body, head"):
        Blocks.cut(own, ["conv2"], example=example)
    with pytest.raises(ValueError, match=r"no block holds: head\.1\.weight, head\.1\.bias"):
        Blocks.cut(own, [("conv1", "norm1"), "body"], example=example)
    with pytest.raises(ValueError, match="pass an example input"):
        Blocks.cut(own, [("conv1", "norm1"), "body"], readout="head")
    with pytest.raises(ValueError, match="named twice"):
        Blocks.cut(own, ["conv1", "conv1"], readout="head", example=example)
    with pytest.raises(ValueError, match=r"'weight' of block 'b' is shared with block 'a'"):
        Blocks.cut(_Shared(), ["a", "b"], example=torch.randn(2, 4))
    with pytest.raises(ValueError, match="nothing to train"):
        Blocks.cut(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_a_sequential_cut_by_names_needs_an_example_too() -> None:
    """Naming its layers may leave an activation out, and nothing else would show it."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="pass an example input"):
        Blocks.cut(module, ["0"], readout="2")
    with pytest.raises(ValueError, match="something happens outside"):
        Blocks.cut(module, ["0"], readout="2", example=torch.randn(8, 4))


def test_blocks_refuse_what_cannot_be_run_or_named() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        Blocks({})
    with pytest.raises(ValueError, match=r"'a\.b' is not usable"):
        Blocks({"a.b": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="'a' is a ModuleList, which has no forward"):
        Blocks({"a": nn.ModuleList([nn.Linear(2, 2)])})
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="shared with block 'a'"):
        Blocks({"a": layer}, layer)


def test_context_reaches_every_block_and_the_readout() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, one: Tensor, two: Tensor) -> Tensor:
            return x + self.weight * one + two

    blocks = Blocks({"a": Add(), "b": Add()}, Add())
    assert blocks(torch.zeros(2), torch.ones(2), torch.full((2,), 10.0)).tolist() == [33.0, 33.0]


# -- the networks that come along -------------------------------------------------------------------------------------
def test_mlp_has_the_published_shape() -> None:
    net = mlp((1, 28, 28), 10, (1000, 1000))
    assert net.names == ["layer1", "layer2"]
    assert [tuple(p.shape) for p in net.parameters()] == [(1000, 784), (1000,), (1000, 1000), (1000,), (10, 1000)]
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert mlp((6,), 3, (4,), readout_bias=True).readout.bias is not None  # type: ignore[union-attr]


def test_cnn_has_the_published_shape() -> None:
    net = cnn((3, 32, 32), 10)
    sizes = [x[0].numel() for x in net.features(torch.zeros(2, 3, 32, 32))]
    assert sizes == [16384, 8192, 4096, 2048]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    normalised = cnn((1, 8, 8), 10, (4, 8), batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in normalised.modules()) == 2


@pytest.mark.parametrize(
    ("init", "std"), [("kaiming_uniform", (1 / 3 / 400) ** 0.5), ("lecun_normal", (1 / 400) ** 0.5)]
)
def test_initial_weights(init: str, std: float) -> None:
    torch.manual_seed(0)
    weight, bias = mlp((400,), 10, (500,), init=init)[0].parameters()  # type: ignore[arg-type]
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5
    assert not bias.any()
    if init == "kaiming_uniform":
        assert 0.99 / 20 < weight.abs().max().item() <= 1 / 20
    else:
        assert weight.abs().max().item() > 3 * std


@pytest.mark.parametrize("make", [mlp, cnn, partial(locally_connected, kernel_sizes=(3,), strides=(1,))])
def test_layers_keep_their_own_start_where_that_is_asked_for(make: Any) -> None:
    """Weights and biases alike, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    torch.manual_seed(0)
    block = make((3, 6, 6), 10, (400,), init="pytorch")[0]
    for layer in block.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):  # drawn afresh, whatever stood there
            with torch.no_grad():
                layer.weight.add_(1.0)
            initialise(layer, "pytorch")
    weight, bias = block.parameters()
    bound = {2: 108, 3: 27, 4: 27}[weight.ndim] ** -0.5
    for drawn in (weight, bias):
        assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert drawn.abs().max().item() <= bound


def test_the_same_seed_gives_the_same_network() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(cnn((1, 8, 8), 10, (4, 8)))
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden is \[\]"):
        mlp((4,), 2, ())
    with pytest.raises(ValueError, match="use at most 3 blocks"):
        cnn((1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"input_shape is \(784,\)"):
        cnn((784,), 10)
    with pytest.raises(ValueError, match="init is 'zeros'"):
        mlp((4,), 2, (3,), init="zeros")  # type: ignore[arg-type]


def test_losses_of_both_halves_agree_with_the_whole() -> None:
    """Blocks and readout are one function: the gradient of its loss is that of the module it was cut from."""
    module = _conv_net().eval()
    blocks = Blocks.cut(module)
    labels = torch.tensor([1, 2, 3])
    whole = torch.autograd.grad(F.cross_entropy(module(X), labels), list(module.parameters()))
    *_, last = blocks.features(X)
    assert blocks.readout is not None
    parts = torch.autograd.grad(F.cross_entropy(blocks.readout(last), labels), list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("channels", [[], [0], [8, -1]])
def test_cnn_refuses_channels_that_are_none(channels: list[int]) -> None:
    with pytest.raises(ValueError, match="channels is"):
        cnn((1, 8, 8), 10, channels)
