"""Unshared receptive fields against a loop over positions, and the network of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from locallearn.functional.forward_forward import rms_normalise
from locallearn.nets import LocallyConnected2d, locally_connected


@pytest.mark.parametrize(("size", "kernel", "stride"), [((5, 7), 3, 2), ((4, 4), 2, 1), ((6, 5), 5, 1)])
def test_every_position_has_weights_of_its_own(size: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = LocallyConnected2d(2, 3, size, kernel, stride).double()
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(4, 2, *size, dtype=torch.float64)
    got = layer(x)
    height, width = layer.output_size
    biases = layer.bias.view(3, height, width)
    for row in range(height):
        for column in range(width):
            patch = x[:, :, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
            want = patch.flatten(1) @ layer.weight[row * width + column].T + biases[:, row, column]
            torch.testing.assert_close(got[:, :, row, column], want)
    patches = F.unfold(x, kernel, stride=stride)
    same = torch.einsum("nkp,pck->ncp", patches, layer.weight).unflatten(2, (height, width)) + biases
    torch.testing.assert_close(got, same)


def test_shared_weights_make_it_a_convolution() -> None:
    layer, conv = LocallyConnected2d(3, 4, (6, 6), 3), torch.nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight.copy_(conv.weight.flatten(1).expand_as(layer.weight))
        layer.bias.copy_(conv.bias[:, None].expand(4, layer.positions).flatten())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_the_network_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    net = locally_connected((1, 28, 28), 10)
    x = torch.rand(2, 1, 28, 28)
    shapes = [tuple(z.shape[1:]) for z in net.features(x)]
    assert shapes == [(128, 4, 4), (220, 3, 3), (512, 2, 2)]
    assert net(x).shape == (2, 10)
    weight = net[1][0].weight
    assert weight.shape == (9, 220, 4 * 128)
    assert weight.std().item() == pytest.approx((4 * 128) ** -0.5, rel=0.02)
    assert not net[1][0].bias.any()
    z = next(net.features(rms_normalise(x)))
    assert z.square().mean().item() == pytest.approx(0.5, rel=0.2)  # half of a normal variable's square


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="5x5 does not fit into a map of 4x8"):
        LocallyConnected2d(1, 1, (4, 8), 5)
    with pytest.raises(ValueError, match="stride=0"):
        LocallyConnected2d(1, 1, (4, 8), 2, 0)
    with pytest.raises(ValueError, match="weights for"):
        LocallyConnected2d(1, 1, (4, 4), 2)(torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match="block 3 of 3: a receptive field of 4x4"):
        locally_connected((1, 28, 28), 10, kernel_sizes=(10, 2, 4))
    with pytest.raises(ValueError, match="an entry for every block"):
        locally_connected((1, 28, 28), 10, strides=(6, 1))
    with pytest.raises(ValueError, match="expected \\(channels, height, width\\)"):
        locally_connected((784,), 10)
