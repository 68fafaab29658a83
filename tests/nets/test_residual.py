"""The residual network for small images, against torchvision's residual unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18
from torchvision.models.resnet import BasicBlock

from locallearn.nets import resnet, resnet18
from locallearn.nets.residual import ResidualUnit

X = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def _reference(unit: ResidualUnit) -> BasicBlock:
    """Torchvision's unit with the same weights and statistics."""
    first = unit.conv1
    shortcut = None
    if isinstance(unit.shortcut, nn.Sequential):
        conv = nn.Conv2d(first.in_channels, first.out_channels, 1, first.stride, bias=False)  # type: ignore[arg-type]
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(first.out_channels))
    block = BasicBlock(first.in_channels, first.out_channels, first.stride[0], shortcut)
    state = {name.replace("shortcut", "downsample"): value for name, value in unit.state_dict().items()}
    block.load_state_dict(state)
    return block.train(unit.training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 6, 2), (4, 6, 1), (4, 4, 2)])
def test_a_unit_is_torchvisions(before: int, after: int, stride: int, training: bool) -> None:
    torch.manual_seed(0)
    unit = ResidualUnit(before, after, stride).train(training)
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
    x = torch.randn(5, before, 8, 6)
    assert torch.allclose(unit(x), _reference(unit)(x), atol=1e-6)
    assert isinstance(unit.shortcut, nn.Identity) is (before == after and stride == 1)


def test_the_network_is_a_stem_units_average_and_readout() -> None:
    torch.manual_seed(0)
    net = resnet((3, 8, 12), 5, units=2, widths=(4, 6, 8)).eval()
    stages = ["stage1_1", "stage1_2", "stage2_1", "stage2_2", "stage3_1", "stage3_2"]
    assert net.names == ["stem", *stages]
    sizes = [tuple(x.shape[1:]) for x in net.features(X)]
    assert sizes == [(4, 8, 12)] * 3 + [(6, 4, 6)] * 2 + [(8, 2, 3)] * 2
    x = net[0](X)
    for unit in list(net)[1:]:
        assert isinstance(unit, ResidualUnit)
        x = _reference(unit)(x)
    assert isinstance(net.readout, nn.Sequential)
    linear = net.readout[-1]
    assert torch.allclose(net(X), x.mean((2, 3)) @ linear.weight.T + linear.bias, atol=1e-5)


@pytest.mark.parametrize(("units", "parameters"), [(3, 272_474), (5, 466_906), (9, 855_770), (18, 1_730_714)])
def test_resnet_20_to_110_have_the_known_number_of_parameters(units: int, parameters: int) -> None:
    """With 1x1 shortcuts 2752 more than with zero-padded ones (269 722, 464 154, 853 018 and 1 727 962)."""
    net = resnet((3, 32, 32), 10, units)
    assert sum(p.numel() for p in net.parameters()) == parameters
    weighted = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([m for m in weighted if getattr(m, "kernel_size", None) != (1, 1)]) == 6 * units + 2


def test_one_width_never_shrinks() -> None:
    net = resnet((1, 8, 8), 2, units=1, widths=(3,))
    assert net.names == ["stem", "stage1_1"]
    assert [tuple(x.shape[1:]) for x in net.features(torch.zeros(2, 1, 8, 8))] == [(3, 8, 8)] * 2


@pytest.mark.parametrize("init", ["xavier_uniform", "he_uniform"])
def test_initial_weights_fill_their_range(init: str) -> None:
    torch.manual_seed(0)
    net = resnet((3, 8, 8), 10, units=1, widths=(32, 64), init=init)  # type: ignore[arg-type]
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            fan_in, fan_out = layer.weight[0].numel(), layer.weight[:, 0].numel()
            bound = (6 / (fan_in + fan_out if init == "xavier_uniform" else fan_in)) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max().item() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_shape is \(784,\), expected \(channels, height, width\)"):
        resnet((784,), 10)
    for units, widths in ((0, (4,)), (1, ()), (1, (4, 0))):
        with pytest.raises(ValueError, match=f"units is {units} and widths is"):
            resnet((3, 8, 8), 10, units, widths)
    with pytest.raises(ValueError, match="init is 'zeros'"):
        resnet((3, 8, 8), 10, init="zeros")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"widths is \[\], expected positive numbers"):
        resnet18((3, 8, 8), 10, widths=())


# -- ResNet-18 with a stem for small images ---------------------------------------------------------------------------
def test_resnet18_has_the_known_number_of_parameters() -> None:
    assert sum(p.numel() for p in resnet18((3, 32, 32), 10).parameters()) == 11_173_962


def test_resnet18_is_torchvisions_behind_another_stem() -> None:
    torch.manual_seed(0)
    net = resnet18((3, 8, 8), 5, cuts="units")
    model = torchvision_resnet18(num_classes=5)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # type: ignore[assignment]
    theirs = list(model.state_dict().values())  # the same order of layers, but for shortcuts
    assert len(theirs) == len(net.state_dict())
    renamed = {_torchvisions_name(name): value for name, value in net.state_dict().items()}
    model.load_state_dict(renamed)
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(net(x), model(x), atol=1e-5)
    assert torch.allclose(net.eval()(x), model.eval()(x), atol=1e-5)


def _torchvisions_name(name: str) -> str:
    name = name.replace("readout.2", "fc").replace("members.stem.0", "conv1").replace("members.stem.1", "bn1")
    unit, dot, rest = name.removeprefix("members.").partition(".")
    return f"{unit.replace('_', '.')}{dot}{rest}".replace("shortcut", "downsample")


def test_resnet18_without_shortcuts_is_sixteen_convolutions_in_a_row() -> None:
    """The blocks of Fournier et al.: the first one has two convolutions, and maps shrink in the 5th, 9th and 13th."""
    net = resnet18((3, 32, 32), 10, cuts="units", skips=False)
    assert len(net) == 16
    assert sum(p.numel() for p in net.parameters()) == 11_000_138
    assert [sum(isinstance(m, nn.Conv2d) for m in block.modules()) for block in net] == [2] + [1] * 15
    shapes = [tuple(x.shape[1:]) for x in net.features(torch.zeros(2, 3, 32, 32))]
    assert shapes == [shape for width in (64, 128, 256, 512) for shape in [(width, 2048 // width, 2048 // width)] * 4]
    assert resnet18((3, 8, 8), 10, skips=False).names == ["layer1", "layer2", "layer3", "layer4"]


UNITS18 = ["stem", *(f"layer{layer}_{unit}" for layer in (1, 2, 3, 4) for unit in (0, 1))]


@pytest.mark.parametrize(
    ("cuts", "names"),
    [
        ("A", ["layer1", "layer2", "layer3", "layer4"]),
        ("B", ["layer1_0", "layer1_1", "layer2", "layer4"]),
        ("late", ["layer3_0", "layer3_1", "layer4_0", "layer4_1"]),
        ("units", UNITS18),
        (9, UNITS18),
        (4, ["layer1_0", "layer2_0", "layer3_0", "layer4"]),
        (1, ["layer4"]),
        ([], ["layer4"]),
        ("layer2", ["layer2", "layer4"]),
        (["layer1", "layer2", "layer3"], ["layer1", "layer2", "layer3", "layer4"]),
        ([1.0, 1.1, "layer2"], ["layer1_0", "layer1_1", "layer2", "layer4"]),
        (["stem", "2.0"], ["stem", "layer2_0", "layer4"]),
    ],
)
def test_cuts_are_data(cuts: object, names: list[str]) -> None:
    torch.manual_seed(0)
    net = resnet18((3, 8, 8), 5, cuts=cuts, widths=(2, 3, 4, 5))  # type: ignore[arg-type]
    assert net.names == names
    torch.manual_seed(0)
    whole = resnet18((3, 8, 8), 5, cuts="units", widths=(2, 3, 4, 5))
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(x), whole(x))  # the very weights, wherever it is cut


def test_the_papers_numbers_of_blocks_give_the_papers_cuts() -> None:
    """InfoPro and MAN cut ResNet-32 and ResNet-110 there (units counted from 0, cut after)."""
    for units, blocks, papers in [
        (5, 4, ["1.2", "2.1", "3.0"]),
        (5, 8, ["1.0", "1.2", "1.4", "2.1", "2.3", "3.0", "3.2"]),
        (18, 4, ["1.11", "2.7", "3.3"]),
    ]:
        by_number = resnet((3, 8, 8), 10, units, widths=(1, 1, 1), cuts=blocks)
        assert by_number.names == resnet((3, 8, 8), 10, units, widths=(1, 1, 1), cuts=papers).names
        assert len(by_number) == blocks


@pytest.mark.parametrize(
    ("cuts", "reason"),
    [
        (0, "cuts is 0, but the network has 9 units: ask for 1 to 9 blocks"),
        (10, "cuts is 10, but the network has 9 units"),
        ("layer5", r"there is no unit 'layer5' to cut after; there are stem, layer1.0, .* or one of A, B, late"),
        (["layer2", "layer1"], r"cuts is \['layer2', 'layer1'\], expected units in the order of the forward pass"),
        (["layer2", "layer2.1"], "each once"),
        (["layer1", "layer4"], "but the network ends after 'layer4': leave it out"),
    ],
)
def test_cuts_that_are_not_there_are_refused(cuts: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resnet18((3, 8, 8), 10, cuts=cuts, widths=(1, 1, 1, 1))  # type: ignore[arg-type]


def test_a_number_that_lost_its_last_zero_is_no_cut() -> None:
    with pytest.raises(
        ValueError, match=r"the cut 1.1 is a number, which does not tell unit 1 from unit 10: write 'stage1_1'"
    ):
        resnet((3, 8, 8), 10, 18, widths=(1, 1, 1), cuts=[1.1])
