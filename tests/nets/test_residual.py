"""The residual network for small images, against torchvision's residual unit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from locallearn.nets import resnet
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


@pytest.mark.parametrize(("units", "parameters"), [(3, 272_474), (9, 855_770)])
def test_resnet_20_and_56_have_the_known_number_of_parameters(units: int, parameters: int) -> None:
    """With 1x1 shortcuts 2752 more than with zero-padded ones (269 722 and 853 018)."""
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
