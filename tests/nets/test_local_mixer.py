"""LocalMixer: its sizes, who sees whom in a block, and its maps against plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp

from locallearn.nets import local_mixer
from locallearn.nets.local_mixer import GroupedLinear, MixerBlock, Normalised, cut_patches, normalised, normalised_along


@pytest.mark.parametrize(
    ("size", "shape", "outputs", "published"),
    [
        ("S/1/1", (1, 28, 28), 10, "272K"),
        ("M/8/16", (3, 32, 32), 10, "919K"),
        ("L/32/64", (3, 224, 224), 100, "17.3M"),  # of 1,000 classes it would be 26.6 million
    ],
)
def test_the_published_numbers_of_weights_have_a_readout_for_every_block(
    size: Any, shape: tuple[int, int, int], outputs: int, published: str
) -> None:
    with torch.device("meta"):
        net = local_mixer(shape, outputs, size)
    assert net.readout is not None
    readout = sum(p.numel() for p in net.readout.parameters())
    count = sum(p.numel() for p in net.parameters()) + len(net) * readout
    assert published == (f"{count / 1e6:.1f}M" if count > 1e6 else f"{count / 1e3:.0f}K")


def test_what_a_block_computes() -> None:
    """Step by step, with a 1x1 convolution for the groups and a matrix for the patches."""
    torch.manual_seed(0)
    net = local_mixer((2, 6, 9), 4, blocks=2, patches=3, channels=8, groups=2).double()
    for p in net.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 2, 6, 9).double()
    first, second = net
    assert isinstance(first, MixerBlock)
    assert isinstance(second, MixerBlock)
    assert second.across is not None

    def norm(values: Tensor, groups: int = 1) -> Tensor:
        return F.group_norm(values.flatten(0, 1), groups).view_as(values)  # over channels of every patch

    def grouped(values: Tensor, block: MixerBlock) -> Tensor:
        layer = block.grouped.layer
        return F.conv1d(values.mT, layer.weight[..., None], layer.bias, groups=2).mT

    def linear(values: Tensor, block: MixerBlock) -> Tensor:
        return values @ block.within.layer.weight.T + block.within.layer.bias

    places = [x[:, :, i : i + 2, j : j + 3].permute(0, 2, 3, 1).flatten(1) for i in (0, 2, 4) for j in (0, 3, 6)]
    patches = torch.stack(places, 1)
    assert torch.equal(cut_patches(x, 3), patches)
    y = norm(linear(norm(patches), first)).relu()
    h1 = norm(grouped(norm(y, 2), first), 2).relu()
    mixed = norm(torch.einsum("qp,npc->nqc", second.across.layer.weight, norm(h1))).relu()
    y = norm(linear(norm(mixed), second)).relu()
    h2 = (norm(grouped(norm(y, 2), second), 2) + h1).relu()
    found = list(net.features(x))
    assert torch.allclose(found[0], h1, atol=1e-9)
    assert torch.allclose(found[1], h2, atol=1e-9)
    assert isinstance(net.readout, nn.Sequential)
    pooled = h2.mean(1)
    centred = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(net(x), centred @ net.readout[2].weight.T + net.readout[2].bias, atol=1e-9)


def test_the_readout_starts_at_zero_and_patches_are_mixed_without_a_bias() -> None:
    net = local_mixer((1, 8, 8), 3, blocks=2, patches=2, channels=8, groups=2)
    assert not net(torch.randn(2, 1, 8, 8)).any()
    assert [name for name, _ in net[1].named_parameters()] == [
        "across.layer.weight",
        "within.layer.weight",
        "within.layer.bias",
        "grouped.layer.weight",
        "grouped.layer.bias",
    ]


@pytest.mark.parametrize("groups", [1, 3])
def test_the_derivative_of_the_normalisation_is_in_closed_form_and_symmetric(groups: int) -> None:
    x, along, back = (torch.randn(4, 2, 12).double() for _ in range(3))
    wanted = jvp(lambda x: normalised(x, groups), (x,), (along,))[1]
    assert torch.allclose(normalised_along(x, along, groups), wanted, atol=1e-12)
    x.requires_grad_()
    [gradient] = torch.autograd.grad(normalised(x, groups), x, back)
    assert torch.allclose(normalised_along(x.detach(), back, groups), gradient, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_pulled_back_to_the_map(transposed: bool) -> None:
    layer = nn.Linear(4, 4) if transposed else GroupedLinear(6, 3)
    module = Normalised(layer.double(), 1 if transposed else 3, transposed)
    made: list[Tensor] = []
    layer.register_forward_hook(lambda layer, given, output: made.append(output))
    out = module(torch.randn(2, 4, 6).double(), torch.randn(2, 4, 6).double())
    back = torch.randn_like(out)
    [wanted] = torch.autograd.grad(out, made, back)
    assert torch.allclose(module.pull_back(made[0].detach(), back), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patches": 3}, "patches is 3, and an image of 16x16 cannot be cut into 3x3 equal patches"),
        ({"patches": 16}, "a patch of one value is nothing once it is normalised"),
        ({"groups": 5}, "groups is 5, and 512 channels cannot be parted into 5 equal groups"),
        (
            {"channels": 4, "groups": 4},
            "groups is 4, and 4 channels cannot be parted into 4 equal groups of at least 2",
        ),
        ({"blocks": 0}, "blocks is 0, expected a whole number of at least 1"),
        ({"size": "XL"}, "size is 'XL', expected one of S/1/1, M/1/16, M/8/16, L/32/64"),
        ({"patches": 2.0}, "patches is 2.0, expected a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        local_mixer((1, 16, 16), 3, **settings)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="this network takes images"):
        local_mixer((64,), 3)
