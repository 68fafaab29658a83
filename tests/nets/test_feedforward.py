"""Multilayer perceptrons and plain convolutional networks: shapes, numbers of weights, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from locallearn.nets import Blocks, cafo_cnn, cnn


def _weights(net: Blocks) -> int:
    return sum(p.numel() for p in net.parameters())


def test_mono_forwards_network_has_the_sheets_widths() -> None:
    """Four convolutions of 64 to 512: 16384, 8192, 4096 and 2048 entries at 32x32."""
    net = cnn((3, 32, 32), 10)
    widths = [x[0].numel() for x in net.features(torch.zeros(1, 3, 32, 32))]
    assert widths == [16384, 8192, 4096, 2048]
    assert _weights(net) == sum(9 * a * b + b for a, b in ((3, 64), (64, 128), (128, 256), (256, 512))) + 20480


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((3, 32, 32), [8192, 8192, 8192]), ((1, 28, 28), [6272, 6272, 4608]), ((3, 84, 84), [56448, 56448, 51200])],
)
def test_cafos_network_has_the_papers_widths(shape: tuple[int, int, int], widths: list[int]) -> None:
    net = cafo_cnn(shape, 10)
    assert [x[0].numel() for x in net.features(torch.zeros(1, *shape))] == widths
    convolutions = sum(9 * a * b + 3 * b for a, b in ((shape[0], 32), (32, 128), (128, 512)))
    assert _weights(net) == convolutions + 10 * widths[-1]


def test_cafos_blocks_are_what_its_code_makes() -> None:
    torch.manual_seed(3)
    net = cafo_cnn((3, 8, 8), 4, channels=(5, 6))
    torch.manual_seed(3)
    first, second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
    x = torch.randn(7, 3, 8, 8)
    h = nn.BatchNorm2d(5, eps=1e-4)(torch.max_pool2d(first(x).relu(), 2))
    h = nn.BatchNorm2d(6, eps=1e-4)(torch.max_pool2d(second(h).relu(), 2))
    assert isinstance(net.readout, nn.Sequential)
    assert net.readout[-1].bias is None
    assert torch.allclose(net(x), h.flatten(1) @ net.readout[-1].weight.T, atol=1e-6)


@pytest.mark.parametrize("make", [cnn, cafo_cnn])
def test_what_is_no_image_or_too_small_is_refused(make: Callable[..., Blocks]) -> None:
    with pytest.raises(
        ValueError, match=r"input_shape is \(784,\), expected \(channels, height, width\): .* takes images"
    ):
        make((784,), 10)
    with pytest.raises(
        ValueError, match=r"nothing is left of a 4x9 image in block 3 of 3, after .*: use at most 2 blocks"
    ):
        make((1, 4, 9), 10, channels=(2, 2, 2))
    with pytest.raises(
        ValueError, match=r"nothing is left of a 1x1 image in block 1 .*: it is too small for this network"
    ):
        make((1, 1, 1), 10, channels=(2,))
    with pytest.raises(ValueError, match=r"channels is \[\], expected at least one positive number of channels"):
        make((1, 8, 8), 10, channels=())
