"""Multilayer perceptrons and plain convolutional networks: shapes, numbers of weights, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from locallearn.nets import Blocks, cafo_cnn, cnn, mlp, vgg8b, vgg11b, vit
from locallearn.nets.transformer import EncoderLayer


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


def test_a_perceptrons_blocks_give_whole_outputs_and_take_dropped_ones() -> None:
    torch.manual_seed(0)
    net = mlp((2, 3), 4, hidden=(5, 6), batch_norm=True, dropout=0.5, activation="leaky_relu")
    assert [[type(m).__name__ for m in block] for block in net] == [  # type: ignore[attr-defined]
        ["Flatten", "Linear", "BatchNorm1d", "LeakyReLU"],
        ["Dropout", "Linear", "BatchNorm1d", "LeakyReLU"],
    ]
    assert isinstance(net.readout, nn.Sequential)
    assert [type(m).__name__ for m in net.readout] == ["Dropout", "Linear"]
    assert isinstance(mlp((2, 3), 4, hidden=(5,)).readout, nn.Linear)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout is {wrong}, expected a probability from 0 to below 1"):
            mlp((2,), 4, dropout=wrong)


# -- VGG --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "convolutions", "parameters"), [(vgg8b, 6, 8_903_434), (vgg11b, 9, 11_559_946)])
def test_vggs_have_the_known_number_of_parameters(
    make: Callable[..., Blocks], convolutions: int, parameters: int
) -> None:
    """8.9 and 11.6 million, by hand: weights and biases, and two numbers of BatchNorm for every channel."""
    net = make((3, 32, 32), 10)
    assert _weights(net) == parameters
    assert net.names == [*(f"conv{i + 1}" for i in range(convolutions)), "hidden1"]
    assert make((1, 28, 28), 10, hidden=()).names == net.names[:-1]


def test_vgg8b_is_the_usual_chain_of_layers() -> None:
    """The function is that of conv, norm, activation, dropout, pool, wherever the blocks end."""
    torch.manual_seed(0)
    net = vgg8b((3, 16, 16), 4, width=1 / 64, hidden=(7,), activation="leaky_relu", dropout=0.2)
    layers = [m for part in (*net, net.readout) for m in part]  # type: ignore[union-attr]
    kinds = "".join(
        {"Conv2d": "c", "BatchNorm2d": "n", "LeakyReLU": "a", "Dropout2d": "d", "MaxPool2d": "p"}.get(
            type(m).__name__, "." + type(m).__name__
        )
        for m in layers
    )
    assert kinds == "cnadcnadpcnadcnadpcnadpcnadp.Flatten.Linear.BatchNorm1da.Dropout.Linear"
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(net.eval()(x), nn.Sequential(*layers)(x))
    sides = [h.shape[-1] for h in net.features(x)]
    assert sides == [16, 16, 8, 8, 4, 2, 7]  # a layer's own output is not pooled yet
    assert [h.shape[1] for h in net.features(x)] == [2, 4, 4, 8, 8, 8, 7]


def test_vggs_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"nothing is left of a 8x32 image after 4 poolings of 2: .* images of 16x16 at least"
    ):
        vgg8b((3, 8, 32), 10)
    with pytest.raises(ValueError, match=r"width is 0.001 and hidden is \[1024\], expected every layer"):
        vgg11b((3, 32, 32), 10, width=0.001)
    with pytest.raises(ValueError, match="takes images"):
        vgg8b((784,), 10)


# -- transformer ------------------------------------------------------------------------------------------------------
def test_vit_has_vit_tinys_number_of_parameters() -> None:
    net = vit((3, 224, 224), 1000, patch=16, depth=12)
    assert _weights(net) == 5_717_416
    assert net.names == [f"layer{i + 1}" for i in range(12)]


def test_an_encoder_layer_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = EncoderLayer(12, 3, 20, 0.0)
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", batch_first=True, norm_first=True)
    names = {
        "self_attn.in_proj_weight": "qkv.weight",
        "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "proj.weight",
        "self_attn.out_proj.bias": "proj.bias",
        "linear1.weight": "mlp.0.weight",
        "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.2.weight",
        "linear2.bias": "mlp.2.bias",
    }
    state = ours.state_dict()
    theirs.load_state_dict({name: state[names.get(name, name)] for name in theirs.state_dict()})
    x = torch.randn(2, 5, 12)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_vits_tokens_are_patches_with_positions(pool: str) -> None:
    torch.manual_seed(0)
    net = vit((2, 8, 12), 5, patch=4, width=6, depth=2, heads=2, pool=pool)  # type: ignore[arg-type]
    extra = pool == "class"
    outputs = list(net.features(torch.randn(3, 2, 8, 12)))
    assert [tuple(h.shape) for h in outputs] == [(3, 6 + extra, 6)] * 2
    assert isinstance(net.readout, nn.Sequential)
    last = net.readout[0](outputs[-1])
    wanted = net.readout[-1](last[:, 0] if extra else last.mean(1))
    assert torch.equal(net.readout(outputs[-1]), wanted)
    # two images that differ in their last patch only have the same embedding of all others
    a = torch.randn(1, 2, 8, 12)
    b = a.clone()
    b[..., 4:, 8:] += 1
    embed = net[0][0]  # type: ignore[index]
    same = (embed(a) == embed(b)).all(-1)[0]
    assert same.tolist() == [True] * (5 + extra) + [False]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"patch": 5}, "patch is 5, which does not divide an image of 8x12: choose a divisor of both sides"),
        ({"patch": 8}, "patch is 8, which does not divide"),
        ({"patch": 0}, "patch is 0, expected a positive number"),
        ({"heads": 5}, "heads is 5, which does not divide the width of 192"),
        ({"depth": 0}, "depth is 0, expected a positive number"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0, expected a positive number"),
        ({"pool": "max"}, "pool is 'max', expected one of class, mean"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_vits_that_cannot_be_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vit((2, 8, 12), 5, **settings)  # type: ignore[arg-type]
