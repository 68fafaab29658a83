"""The convolutional autoencoder: shapes, weights, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from locallearn.nets import Blocks, autoencoder

X = torch.randn(3, 2, 8, 16, generator=torch.Generator().manual_seed(0))


def _convolutions(net: Blocks) -> list[nn.Conv2d]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def _plain(x: Tensor, net: Blocks, encoders: int) -> Tensor:
    """The forward pass from the bare weights; ReLU, no BatchNorm."""
    layers = _convolutions(net)
    for i, layer in enumerate(layers):
        if i < encoders:
            x = nn.functional.conv2d(x, layer.weight, layer.bias, stride=2, padding=1)
        else:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # nearest neighbours
            x = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        x = x if i == len(layers) - 1 else x.relu()
    return x


def test_blocks_go_down_and_up_again() -> None:
    net = autoencoder((2, 8, 16), (4, 6, 10)).eval()
    assert net.names == ["encoder1", "encoder2", "encoder3", "decoder1", "decoder2"]
    shapes = [tuple(x.shape[1:]) for x in net.features(X)]
    assert shapes == [(4, 4, 8), (6, 2, 4), (10, 1, 2), (6, 2, 4), (4, 4, 8)]
    assert net(X).shape == X.shape


def test_one_encoder_block_leaves_the_decoder_to_the_readout() -> None:
    net = autoencoder((1, 4, 4), (3,)).eval()
    assert net.names == ["encoder1"]
    assert net(torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)


def test_the_forward_pass_is_that_of_the_bare_weights() -> None:
    torch.manual_seed(0)
    net = autoencoder((2, 8, 16), (4, 6), batch_norm=False, init="kaiming_uniform", decoder_scale=1.0).double()
    for layer in _convolutions(net):
        nn.init.normal_(layer.weight, std=0.2)
        assert layer.bias is not None
        nn.init.normal_(layer.bias)
    assert torch.allclose(net(X.double()), _plain(X.double(), net, 2), rtol=0, atol=1e-12)


def test_the_chain_of_blocks_and_readout_is_the_forward_pass() -> None:
    net = autoencoder((2, 8, 16), (4, 6), decoder_scale=1.0).eval()
    assert net.readout is not None
    for p in net.readout.parameters():
        nn.init.normal_(p)
    *_, last = net.features(X)
    assert torch.equal(net.readout(last), net(X))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_its_parameters_are_those_of_the_formula(batch_norm: bool) -> None:
    """A BatchNorm takes the place of every bias but the readout's."""

    def count(widths: Sequence[int]) -> int:
        steps = [*pairwise(widths), *pairwise(widths[:0:-1])]
        extra = 2 if batch_norm else 1
        return sum(9 * a * b + extra * b for a, b in steps) + 9 * widths[1] * widths[0] + widths[0]

    for channels in ((4, 6, 10), (5,), (32, 64, 128)):
        net = autoencoder((3, 16, 16), channels, batch_norm)
        assert sum(p.numel() for p in net.parameters()) == count((3, *channels))
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        assert norms == (2 * len(channels) - 1 if batch_norm else 0)


def test_the_papers_network_has_its_widths() -> None:
    with torch.device("meta"):
        net = autoencoder((3, 96, 96), init="kaiming_uniform")
        shapes = [tuple(x.shape[1:]) for x in net.features(torch.zeros(2, 3, 96, 96))]
    assert shapes[:4] == [(128, 48, 48), (256, 24, 24), (1024, 12, 12), (2048, 6, 6)]
    assert shapes[4:] == [(1024, 12, 12), (256, 24, 24), (128, 48, 48)]


@pytest.mark.parametrize(("settings", "scale"), [({}, 1e-3), ({"decoder_scale": 0.5}, 0.5)])
def test_weights_are_orthogonal_the_decoders_small_and_the_readouts_zero(
    settings: dict[str, float], scale: float
) -> None:
    torch.manual_seed(0)
    net = autoencoder((2, 8, 16), (4, 50), **settings)  # type: ignore[arg-type]
    *layers, last = _convolutions(net)
    for layer, wanted in zip(layers, (1.0, 1.0, scale), strict=True):
        weight = layer.weight.detach().double()  # laid out with the larger number of channels in front
        wide = weight if weight.shape[0] >= weight.shape[1] else weight.transpose(0, 1)
        singular = torch.linalg.svdvals(wide.flatten(1))
        assert torch.allclose(singular, torch.full_like(singular, wanted), rtol=1e-4)
    assert not last.weight.any()
    assert last.bias is not None
    assert not last.bias.any()
    assert not net(X).any()


def test_activations_are_the_named_ones() -> None:
    for name, kind in (("relu", nn.ReLU), ("elu", nn.ELU), ("tanh", nn.Tanh)):
        net = autoencoder((1, 4, 4), (3, 4), activation=name)  # type: ignore[arg-type]
        assert sum(isinstance(module, kind) for module in net.modules()) == 3
        assert isinstance(net.readout, nn.Sequential)
        assert isinstance(net.readout[-1], nn.Conv2d)


def test_impossible_autoencoders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_shape is \(784,\), expected \(channels, height, width\)"):
        autoencoder((784,))
    with pytest.raises(ValueError, match=r"input_shape is \(1, 28, 28\).*divisible by 8, because 3 encoder blocks"):
        autoencoder((1, 28, 28), (4, 5, 6))
    with pytest.raises(ValueError, match=r"input_shape is \(1, 8, 6\)"):
        autoencoder((1, 8, 6), (4, 5))
    for channels in ((), (4, 0), (-1,)):
        with pytest.raises(ValueError, match="channels is"):
            autoencoder((1, 8, 8), channels)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        autoencoder((1, 8, 8), (4,), activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init is 'zeros'"):
        autoencoder((1, 8, 8), (4,), init="zeros")  # type: ignore[arg-type]
