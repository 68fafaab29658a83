"""The frame of local heads: parts against the authors' numbers, combinations against plain loops, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn as ll
import locallearn.losses.local_heads
from locallearn.algorithms import MAN, Algorithm, Backprop, DeepSupervision, LocalHeads, MonoForward, TaskInfo
from locallearn.algorithms.heads import HeadParts
from locallearn.batch import Batch
from locallearn.cli.settings import UsageError, check_arguments
from locallearn.cost import FlopCounter, measure_update
from locallearn.losses import InfoProLoss, PredSimLoss, ReconstructionLoss, SupervisedContrastiveLoss
from locallearn.nets import Blocks, cnn, mlp, resnet
from locallearn.nets.heads import ConvHead, LinearHead, MLPHead, ResidualHead, pooling
from locallearn.nets.residual import ResidualUnit
from locallearn.testing import plain_loop
from tests.references import reference

DRAW = torch.Generator().manual_seed(0)
IMAGES = Batch(torch.randn(8, 3, 8, 8, generator=DRAW), torch.arange(8) % 4)
ROWS = Batch(torch.randn(8, 6, generator=DRAW), torch.arange(8) % 4)
sgd = partial(torch.optim.SGD, lr=0.1)


def _attached(algorithm: Any, net: Blocks, batch: Batch = IMAGES) -> Any:
    example = batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2])
    algorithm.attach(net, TaskInfo(example, 4, F.cross_entropy))
    return algorithm.train()


def _resnet(seed: int = 0, units: int = 1) -> Blocks:
    torch.manual_seed(seed)
    return resnet((3, 8, 8), 4, units, (4, 6, 8))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _losses(algorithm: Algorithm, batch: Batch = IMAGES) -> list[float]:
    return [float(update.loss.detach()) for update in algorithm.updates(batch) if update.loss is not None]


# -- the house's own rules --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [MonoForward, LocalHeads, DeepSupervision])
def test_linear_heads_learn_as_in_a_loop_by_hand(make: Callable[..., Algorithm]) -> None:
    """Bit for bit: the heads are drawn from a generator of their own, bias-free, Kaiming-uniform with a = √5."""
    torch.manual_seed(0)
    net = mlp((6,), 4, (5, 7, 3))
    twin = copy.deepcopy(net)
    algorithm = _attached(make(seed=3), net, ROWS)
    plain_loop(algorithm, [ROWS] * 4, partial(torch.optim.Adam, lr=1e-2))

    with torch.random.fork_rng():
        torch.manual_seed(3)
        heads = [nn.init.kaiming_uniform_(nn.Parameter(torch.empty(4, d)), a=math.sqrt(5)) for d in (5, 7)]
    assert twin.readout is not None
    weights = [[*block.parameters(), head] for block, head in zip(twin, [*heads, twin.readout.weight], strict=True)]  # type: ignore[list-item]
    local = make is not DeepSupervision
    groups = weights if local else [[p for group in weights for p in group]]
    optimizers = [torch.optim.Adam(group, lr=1e-2) for group in groups]
    for _ in range(4):
        x, total = ROWS.inputs, torch.zeros(())
        for i, (block, group) in enumerate(zip(twin, weights, strict=True)):
            x = block(x)
            loss = F.cross_entropy(F.linear(x, group[-1]), ROWS.targets)
            if local:
                loss.backward()
                optimizers[i].step()
                optimizers[i].zero_grad()
                x = x.detach()
            else:
                total = loss if i == 0 else total + loss
        if not local:
            total.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    found = [p for name, p in algorithm.named_parameters() if name.startswith("heads.")]
    assert all(torch.equal(p, q) for p, q in zip(found, heads, strict=True))
    assert [n for n, _ in algorithm.named_parameters() if "heads" in n] == [
        f"heads.projections.{i}.projection" for i in (0, 1)
    ]


def test_heads_are_the_same_tensors_whatever_stands_beside_them() -> None:
    """So that predsim, plain cross entropy and deep supervision with one head differ in their loss alone."""
    plain = _attached(LocalHeads(head="conv1", seed=5), _resnet())
    for other in (LocalHeads(5, head="conv1", loss="predsim"), DeepSupervision(5, head="conv1", loss="predsim")):
        same = _attached(other, _resnet())
        pairs = zip(plain.heads.projections.parameters(), same.heads.projections.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# -- predsim ----------------------------------------------------------------------------------------------------------
_CASES = ("sim", "pred", "predsim", "predsim_zero_decoder", "predsim_adam")


@pytest.mark.parametrize(
    "case",
    [f"{kind}.{case}" for kind in ("conv", "lin") for case in _CASES] + ["conv.predsim_pool", "conv.predsim_nobn"],
)
def test_predsim_is_that_of_the_authors(case: str) -> None:
    """All they stored of a step from their weights: losses, output, gradients, statistics, weights after SGD or Adam."""
    known = reference("predsim")
    kind, variant = case.split(".")
    start = "conv.predsim_pool" if variant == "predsim_pool" else kind
    x, y = _tensor(known[f"{kind}.x"]), _tensor(known["y"])
    layer = nn.Conv2d(3, 5, 3, padding=1) if kind == "conv" else nn.Linear(7, 8)
    norm = nn.BatchNorm2d(5) if kind == "conv" else nn.BatchNorm1d(8)
    normed = variant != "predsim_nobn"
    net = Blocks(
        {
            "block": nn.Sequential(layer, norm if normed else nn.Identity(), nn.ReLU()),
            "last": nn.Sequential(nn.Flatten(), nn.LazyLinear(2)),
        },
        nn.Linear(2, 4),
    )
    net(x.float())
    settings: dict[str, Any] = {"loss": "sim" if variant == "sim" else "predsim"}
    if variant == "pred":
        settings["beta"] = 0  # nothing but the head, which has a bias here
    if variant == "predsim_pool":
        settings["head_limit"] = 48
    algorithm = _attached(LocalHeads(**settings), net, Batch(x.float(), y)).double()
    weights: dict[str, Any] = {"encoder.weight": layer.weight, "encoder.bias": layer.bias}
    if normed:
        weights |= {"bn.weight": norm.weight, "bn.bias": norm.bias}
    if variant != "pred":
        weights["conv_loss.weight" if kind == "conv" else "linear_loss.weight"] = algorithm.heads.terms[0].layer.weight
    if variant != "sim":
        assert not algorithm.heads.projections[0].projection.any()  # it starts at zero
        weights["decoder_y.weight"] = algorithm.heads.projections[0].projection
        weights["decoder_y.bias"] = algorithm.heads.projections[0].bias
    with torch.no_grad():
        for name, weight in weights.items():
            place = start if name.startswith("decoder") else kind
            if (variant, name) != ("predsim_zero_decoder", "decoder_y.weight"):
                weight.copy_(_tensor(known[f"{place}.init.{name}"]))
        norm.reset_running_stats()
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    net[0].register_forward_hook(keep)
    update = next(algorithm.updates(Batch(x, y)))
    assert update.loss is not None
    update.backward()
    each: list[Tensor] = []
    algorithm.heads.loss(net, 0, kept[0].detach(), Batch(x, y), each=each)
    parts = [part for part in ("pred", "sim") if variant not in ("pred", "sim") or part == variant]
    found = {"loss": update.loss, "h": kept[0], "grad_h": kept[0].grad, "loss_pred_weighted": 0, "loss_sim_weighted": 0}
    found |= {f"loss_{part}_weighted": losses.mean() for part, losses in zip(parts, each, strict=True)}
    found |= {f"grad.{name}": weight.grad for name, weight in weights.items()}
    found |= {f"buf.bn.{name}": value for name, value in norm.named_buffers()}
    groups = algorithm.units()["block"]
    (torch.optim.Adam(groups, 5e-4) if variant == "predsim_adam" else torch.optim.SGD(groups, 0.1)).step()
    found |= {f"new.{name}": weight for name, weight in weights.items()}
    theirs = {name.removeprefix(f"{case}."): value for name, value in known.items() if name.startswith(f"{case}.")}
    for name in theirs.keys() - {"init.decoder_y.weight", "init.decoder_y.bias", "pool"}:
        mine = torch.as_tensor(found[name], dtype=torch.float64)
        # Adam's first step is lr · g/(|g| + ε): what is 0 but for rounding, a bias before BatchNorm, moves by rounding.
        atol = 1e-9 if variant == "predsim_adam" and name.startswith("new.") else 1e-12
        assert torch.allclose(mine, _tensor(theirs[name]).double(), rtol=0, atol=atol), name


def test_pooling_of_the_authors() -> None:
    """Windows of their table, rows doubled first; odd sides are padded."""
    table = [
        (128, 32, 2048, 8, 8),
        (128, 32, 4096, 8, 4),
        (256, 16, 2048, 8, 4),
        (512, 2, 1024, 2, 1),
        (512, 2, 4096, 1, 1),
    ]
    for channels, side, limit, height, width in table:
        assert pooling(channels, side, side, limit) == (height, width, 0, 0)
    assert pooling(5, 7, 3, 20) == (4, 2, 2, 1)
    for channels, side, limit, height, width, above, beside, _ in reference("predsim")["pool_table"].tolist():
        assert pooling(channels, side, side, limit) == (height, width, above, beside)


def test_the_loss_alone_is_that_of_the_frame() -> None:
    """PredSimLoss in anybody's loop, and the frame's combination of the same parts."""
    algorithm = _attached(LocalHeads(head="conv1", loss="predsim", beta=0.7), _resnet())
    hidden = algorithm.blocks[0](IMAGES.inputs)
    own = PredSimLoss((4, 8, 8), 4, beta=0.7, head=copy.deepcopy(algorithm.heads.projections[0]))
    own.similarity.load_state_dict(algorithm.heads.terms[0].state_dict())
    want = own(hidden, IMAGES.targets)
    assert torch.allclose(algorithm.heads.loss(algorithm.blocks, 0, hidden, IMAGES), want)


def test_the_loss_alone_takes_long_vectors_as_the_frame_does() -> None:
    assert PredSimLoss((5000,), 4).head.projection.numel() == 4 * 5000
    assert PredSimLoss((5, 40, 40), 4).head.projection.numel() <= 4 * 4096


def test_tokens_are_compared_by_their_mean() -> None:
    net = Blocks({"a": nn.Linear(5, 6), "b": nn.Linear(6, 6)}, nn.Sequential(nn.Flatten(), nn.Linear(18, 4)))
    batch = Batch(torch.randn(8, 3, 5, generator=DRAW), torch.arange(8) % 4)
    algorithm = _attached(LocalHeads(loss="sim"), net, batch)
    term = algorithm.heads.terms[0]
    hidden = net[0](batch.inputs)
    want = term(hidden, batch.targets)
    term.tokens = False
    assert torch.equal(want, term(hidden.mean(1), batch.targets))
    assert algorithm.added_parameters == 36


# -- InfoPro ----------------------------------------------------------------------------------------------------------
def test_infopro_is_that_of_the_authors() -> None:
    """Head 1c2f with contrast and cross entropy, the mean with one layer, the decoder, and a sum: losses and gradients."""
    known = reference("infopro_heads")
    y, image = _tensor(known["y"]), _tensor(known["image01"])
    gradients = {}
    heads = {
        "contrast": ConvHead(16, 16, 16, 2, hidden=8),
        "ce": ConvHead(16, 4, 16, 2, hidden=8),
        "ce_0c1f": LinearHead((16, 4, 4), 4, limit=16, bias=True),
    }
    theirs = {"projection": "2.weight", "bias": "2.bias"}
    for case, head in heads.items():
        weights = {f"head.{theirs.get(name, name)}": weight for name, weight in head.double().named_parameters()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(_tensor(known[f"{case}.init.{name}"]))
        features = _tensor(known["features"]).requires_grad_()
        out = head(features)
        loss = SupervisedContrastiveLoss()(out, y) if case == "contrast" else F.cross_entropy(out, y)
        loss.backward()
        assert torch.allclose(out, _tensor(known[f"{case}.out"]), rtol=0, atol=1e-12)
        assert torch.allclose(loss, _tensor(known[f"{case}.loss"]), rtol=0, atol=1e-12)
        assert features.grad is not None
        assert torch.allclose(features.grad, _tensor(known[f"{case}.grad_features"]), rtol=0, atol=1e-12)
        for name, weight in weights.items():
            assert weight.grad is not None
            assert torch.allclose(weight.grad, _tensor(known[f"{case}.grad.{name}"]), rtol=0, atol=1e-12), (case, name)
        gradients[case] = features.grad
    term = ReconstructionLoss(16, (3, 8, 8)).double()
    names = [f"decoder.{i}.{part}" for i in (0, 1, 3) for part in ("weight", "bias")]
    with torch.no_grad():
        for name, weight in zip(names, term.parameters(), strict=True):
            weight.copy_(_tensor(known[f"decoder.init.{name}"]))
    features = _tensor(known["features"]).requires_grad_()
    loss = term(features, image)
    loss.backward()
    assert torch.allclose(term.decoder(features).sigmoid(), _tensor(known["decoder.out"]), rtol=0, atol=1e-12)
    assert torch.allclose(loss, _tensor(known["decoder.loss"]), rtol=0, atol=1e-12)
    assert features.grad is not None
    assert torch.allclose(features.grad, _tensor(known["decoder.grad_features"]), rtol=0, atol=1e-12)
    for name, weight in zip(names, term.parameters(), strict=True):
        assert weight.grad is not None
        assert torch.allclose(weight.grad, _tensor(known[f"decoder.grad.{name}"]), rtol=0, atol=1e-12), name
    both = 0.6 * features.grad + 0.4 * gradients["contrast"]
    assert torch.allclose(both, _tensor(known["joint.grad_features_l1_0.6_l2_0.4"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("contrast", [True, False])
def test_infopro_sizes(contrast: bool) -> None:
    """Widths 16, 32, 64 on 32, 16, 8: 25408, 43392 and 61824 weights with contrast, decoders of 2091, 3819, 7275."""
    net = Blocks(
        {
            "stem": nn.Conv2d(3, 16, 3, padding=1),
            "two": ResidualUnit(16, 32, 2),
            "three": ResidualUnit(32, 64, 2),
            "four": ResidualUnit(64, 64),
        },
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    task = TaskInfo(Batch(torch.randn(2, 3, 32, 32, generator=DRAW), torch.tensor([0, 1])), 10, F.cross_entropy)
    settings: dict[str, Any] = {"loss": "infopro", "reconstruction": (1, 1), "classification": (1, 1)}
    algorithm: Any = LocalHeads(head="1c2f", contrast=contrast, **settings)
    algorithm.attach(net, task)
    heads, terms = algorithm.heads.projections, algorithm.heads.terms
    if contrast:
        assert [sum(p.numel() for p in head.parameters()) for head in heads] == [25408, 43392, 61824]
    assert [sum(p.numel() for p in term.parameters()) for term in terms] == [2091, 3819, 7275]
    assert [head[0].stride for head in heads] == [(2, 2), (2, 2), (1, 1)]
    known, kind = reference("infopro_heads"), "contrast" if contrast else "cross_entropy"
    for planes, head, term in zip((16, 32, 64), heads, terms, strict=True):
        shapes = [f"head.{name} {tuple(p.shape)}" for name, p in head.named_parameters()]
        assert shapes == known[f"shapes.1c2f.{kind}.{planes}"].tolist()
        shapes = [f"decoder.{name} {tuple(p.shape)}" for name, p in term.decoder.layers.named_parameters()]
        assert shapes == known[f"shapes.decoder.{planes}"].tolist()


@pytest.mark.parametrize("planes", [16, 32, 64])
def test_other_heads_of_infopro_have_the_sizes_of_the_authors(planes: int) -> None:
    """Theirs without a hidden layer: 1c1f is a ConvHead as wide as the next stage, 0c1f a linear head of one mean per map."""
    known = reference("infopro_heads")
    for kind, outputs in (("contrast", 128), ("cross_entropy", 10)):
        head = ConvHead(planes, outputs, min(2 * planes, 64))
        shapes = [f"head.{name} {tuple(p.shape)}" for name, p in head.named_parameters()]
        assert shapes == known[f"shapes.1c1f.{kind}.{planes}"].tolist()
        linear = LinearHead((planes, 32, 32), outputs, limit=planes, bias=True)
        assert linear.bias is not None
        shapes = [
            f"head.2.{name} {tuple(p.shape)}" for name, p in (("weight", linear.projection), ("bias", linear.bias))
        ]
        assert shapes == known[f"shapes.0c1f.{kind}.{planes}"].tolist()


def test_the_decoder_is_shown_pixels() -> None:
    """Property 10: within [0, 1]; black and white are the channels' extremes so far, or as told."""
    algorithm = _attached(LocalHeads(head="conv1", loss="infopro"), _resnet())
    _losses(algorithm)
    pixels = algorithm.heads.images(IMAGES.inputs)
    assert torch.allclose(pixels.amin((0, 2, 3)), torch.zeros(3))
    assert torch.allclose(pixels.amax((0, 2, 3)), torch.ones(3))
    means, deviations = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.1])[:, None, None]
    raw = torch.rand(8, 3, 8, 8, generator=DRAW)
    raw[0, :, 0, 0], raw[0, :, 0, 1] = 0, 1
    again = _attached(LocalHeads(head="conv1", loss="infopro"), _resnet())
    _losses(again, IMAGES._replace(inputs=(raw - means) / deviations))
    assert torch.allclose(again.heads.images((raw - means) / deviations), raw, atol=1e-6)
    fixed = _attached(LocalHeads(head="conv1", loss="infopro", pixels=[-1, 1]), _resnet())
    assert torch.allclose(fixed.heads.images(torch.tensor([-2.0, 0.0, 1.0])), torch.tensor([0.0, 0.5, 1.0]))


def test_infopro_without_reconstruction_is_its_head_alone() -> None:
    """Property 10: λ1 = 0 equals plain cross entropy, bit for bit, and builds no decoder."""
    plain = _attached(LocalHeads(head="1c2f"), _resnet())
    other = _attached(LocalHeads(head="1c2f", loss="infopro", reconstruction=(0, 0), classification=(1, 1)), _resnet())
    for algorithm in (plain, other):
        plain_loop(algorithm, [IMAGES] * 3, sgd)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("contrast", [False, True])
def test_infopros_loss_alone_is_that_of_the_frame(contrast: bool) -> None:
    ends: dict[str, Any] = {"reconstruction": (0.6, 0.6), "classification": (0.4, 0.4), "pixels": (-3.0, 3.0)}
    algorithm = _attached(LocalHeads(head="1c2f", loss="infopro", contrast=contrast, **ends), _resnet())
    own = InfoProLoss(4, (3, 8, 8), algorithm.heads.projections[0], 0.6, 0.4, 0.07 if contrast else None)
    own.reconstruct.load_state_dict(algorithm.heads.terms[0].state_dict())
    hidden, pixels = algorithm.blocks[0](IMAGES.inputs), ((IMAGES.inputs + 3) / 6).clamp(0, 1)
    want = algorithm.heads.loss(algorithm.blocks, 0, hidden, IMAGES)
    torch.testing.assert_close(own(hidden, pixels, IMAGES.targets), want)
    for weights in ((0.0, 0.0), (-0.1, 1.0)):
        with pytest.raises(ValueError, match="neither may be negative, nor both be 0"):
            InfoProLoss(4, (3, 8, 8), own.head, *weights)


def test_the_examples_of_the_losses_run() -> None:
    outcome = doctest.testmod(locallearn.losses.local_heads)
    assert outcome.attempted > 10
    assert outcome.failed == 0


# -- the shapes of heads ----------------------------------------------------------------------------------------------
def test_dgl_has_the_published_size() -> None:
    """128 channels on 32x32, ten classes: 846 346 in the authors' code, of which 256 are never used."""
    assert sum(p.numel() for p in MLPHead(128, 10, 128, (8, 8)).parameters()) == 846_346 - 256
    assert sum(p.numel() for p in MLPHead(16, 10, 128, (8, 8), pooled=1).parameters()) == 635_146  # MAN++'s


@pytest.mark.parametrize(("sides", "quarters"), [((8, 12), (2, 3)), ((9, 7), (3, 2)), ((3, 1), (1, 1))])
def test_a_quarter_of_a_side_is_rounded_up(sides: tuple[int, int], quarters: tuple[int, int]) -> None:
    """As in DGL's code."""
    batch = IMAGES._replace(inputs=torch.randn(8, 3, *sides, generator=DRAW))
    head = _attached(LocalHeads(head="dgl"), _resnet(), batch).heads.projections[0]
    assert head[0](torch.randn(2, 4, *sides, generator=DRAW)).shape == (2, 4, *quarters)


def test_an_auglocal_head_is_that_of_the_authors() -> None:
    known = reference("auglocal")
    head = ResidualHead(16, 4, [16, 32], [1, 2]).double()
    names = {"shortcut.0": "downsample.0", "shortcut.1": "downsample.1"}
    weights = {}
    for name, weight in head.named_parameters():
        unit, _, rest = name.partition(".")
        for mine, theirs in names.items():
            rest = rest.replace(mine, theirs)
        weights[f"head.{unit}.{rest}"] = weight
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(_tensor(known[f"net.init.{name}"]) / 512)
    features = _tensor(known["net.features"]).requires_grad_()
    loss = F.cross_entropy(head(features), _tensor(known["net.y"]))
    loss.backward()
    assert torch.allclose(loss, _tensor(known["net.loss"]), rtol=0, atol=1e-12)
    assert features.grad is not None
    assert torch.allclose(features.grad, _tensor(known["net.grad_features"]), rtol=0, atol=1e-12)
    for name, weight in weights.items():
        if f"net.grad.{name}" in known:
            assert torch.allclose(weight.grad, _tensor(known[f"net.grad.{name}"]), rtol=0, atol=1e-12), name  # type: ignore[arg-type]


def test_auglocal_on_resnet_32_has_the_published_size() -> None:
    """Property 6: depth 3 on 16 units, the last module four of them: 1 511 608 weights beside the network's."""
    torch.manual_seed(0)
    net = resnet((3, 32, 32), 10, 5)
    blocks: dict[str, nn.Module] = dict(list(net.members.items())[:12])
    blocks["rest"] = nn.Sequential(*list(net)[12:])
    batch = Batch(torch.randn(2, 3, 32, 32, generator=DRAW), torch.tensor([0, 1]))
    algorithm = LocalHeads(head="auglocal", depth=3)
    algorithm.attach(Blocks(blocks, net.readout), TaskInfo(batch, 10, F.cross_entropy))
    assert algorithm.added_parameters == 1_511_608
    algorithm.eval()
    with torch.no_grad(), FlopCounter() as forward:
        outputs = list(algorithm.blocks.features(batch.inputs))
    with torch.no_grad(), FlopCounter() as heads:
        for head, output in zip(algorithm.heads.projections, outputs, strict=False):
            head(output)
    assert round(heads.total / forward.total, 3) == 1.790
    assert round(forward.total / 2 / len(batch.inputs) / 1e6, 1) == 69.1  # F in MACs per image


@pytest.mark.parametrize("depth", [1, 2])
def test_an_auglocal_head_of_one_unit_has_a_batchnorm_before_its_last_layer(depth: int) -> None:
    heads = _attached(LocalHeads(head="auglocal", depth=depth), _resnet(units=2)).heads.projections
    units = [sum(isinstance(part, ResidualUnit) for part in head) for head in heads]
    assert units[0] == depth
    assert [isinstance(head[-2], nn.BatchNorm1d) for head in heads] == [count == 1 for count in units]
    assert all(isinstance(head[-1], nn.Linear) for head in heads)


@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("units", [5, 18])
def test_auglocal_has_the_heads_of_the_authors(units: int, depth: int) -> None:
    """ResNet-32 and ResNet-110, without the last modules: how many there are, weights and strides of every head."""
    known, key = reference("auglocal"), f"n{3 * units + 1}.d{depth}"
    local = int(known[f"{key}.modules"]) - 1
    batch = Batch(torch.randn(2, 3, 8, 8, generator=DRAW), torch.tensor([0, 1]))
    net = resnet((3, 8, 8), 10, units)
    blocks: dict[str, nn.Module] = dict(list(net.members.items())[:local])
    blocks["rest"] = nn.Sequential(*list(net)[local:])
    algorithm: Any = LocalHeads(head="auglocal", depth=depth)
    algorithm.attach(Blocks(blocks, net.readout), TaskInfo(batch, 10, F.cross_entropy))
    assert sum(p.numel() for p in net.parameters()) == known[f"{key}.backbone_params"]
    heads = algorithm.heads.projections
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == known[f"{key}.aux_params"].tolist()
    for head, strides in zip(heads, known[f"{key}.strides"].tolist(), strict=True):
        chosen = [part for part in head if isinstance(part, ResidualUnit)]
        assert [unit.conv1.stride for unit in chosen] == [(stride, stride) for stride in strides if stride > 0]


def test_mirror_has_a_unit_of_stride_2_for_every_later_stage() -> None:
    """Stages are seen inside of blocks, too: a cut of four blocks and one of every unit give the first head the same shape."""
    net = _resnet(units=2)
    coarse = Blocks({"a": net[0], "b": nn.Sequential(*list(net)[1:])}, net.readout)
    for blocks in (coarse, _resnet(units=2)):
        head = _attached(LocalHeads(head="mirror", width=0.5), blocks).heads.projections[0]
        units = [part for part in head if isinstance(part, ResidualUnit)]
        assert [(u.conv1.out_channels, u.conv1.stride) for u in units] == [(3, (2, 2)), (4, (2, 2))]
    last = _attached(LocalHeads(head="mirror"), _resnet()).heads.projections[2]
    assert [type(part).__name__ for part in last][:1] == ["ResidualUnit"]


def test_heads_of_a_network_without_readout() -> None:
    net = _resnet()
    blocks = Blocks(dict(net.members))
    algorithm = _attached(LocalHeads(head="conv1", loss="predsim"), blocks)
    assert len(algorithm.heads.projections) == len(blocks)
    assert algorithm.predict(IMAGES.inputs).shape == (8, 4)


def test_cost_is_that_of_the_sheet() -> None:
    """ResNet-18 cut after its layers: a convolution of 9·64²·16² MACs in every head, three times what a forward pass takes."""
    torch.manual_seed(0)
    net = cnn((3, 8, 8), 4, (8, 16), batch_norm=True)
    batch = IMAGES
    plain = measure_update(_attached(LocalHeads(head="linear"), copy.deepcopy(net)), batch).flops
    conv = measure_update(_attached(LocalHeads(head="conv1"), net), batch).flops
    head = 9 * 8 * 8 * 2 * 2 + 8 * 4
    assert conv - plain == 6 * (head - 8 * 4 * 4 * 4)


# -- locality ---------------------------------------------------------------------------------------------------------
def test_one_block_is_backpropagation() -> None:
    """Property 1."""
    nets = [_resnet(), _resnet()]
    for rule, net in zip((LocalHeads(head="mirror", loss="predsim"), Backprop()), nets, strict=True):
        plain_loop(_attached(rule, Blocks({"all": nn.Sequential(*net)}, net.readout)), [IMAGES] * 2, sgd)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_gradients_reach_their_own_block_and_nothing_above_matters() -> None:
    """Properties 2 and 3."""
    grads = []
    for other in (False, True):
        algorithm = _attached(LocalHeads(head="dgl", loss="predsim"), _resnet())
        if other:
            with torch.no_grad():
                for p in [*algorithm.blocks[2].parameters(), *algorithm.heads.projections[2].parameters()]:
                    p.add_(torch.randn_like(p))
        updates = algorithm.updates(IMAGES)
        for index in range(2):
            next(updates).backward()
            found = {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.grad is not None}
            name = algorithm.blocks.names[index]
            places = (f"blocks.members.{name}.", f"heads.projections.{index}.", f"heads.terms.{index}.")
            assert all(key.startswith(places) for key in found)
            algorithm.zero_grad(set_to_none=True)
        grads.append(found)
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_the_order_of_steps_and_of_backward_passes_does_not_matter() -> None:
    """Properties 8 and 9: block by block, or all losses summed first."""
    one, other = (_attached(LocalHeads(head="conv1", loss="predsim"), _resnet()) for _ in range(2))
    for update in one.updates(IMAGES):
        update.backward()
    total = sum(update.loss for update in other.updates(IMAGES))
    total.backward()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all((a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_block_may_be_stepped_before_or_after_the_next_one_has_run() -> None:
    """Property 9, with steps: at once, or all of them in the end."""
    one, other = (_attached(LocalHeads(head="dgl", loss="predsim"), _resnet()) for _ in range(2))
    plain_loop(one, [IMAGES], sgd)
    kept = list(other.updates(IMAGES))
    for update in kept:
        update.backward()
    for groups in other.units().values():
        sgd(groups).step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_frozen_first_block_leaves_the_others_steps_as_they_are() -> None:
    """Property 11: on the same h_1, which a block without normalisation gives frozen or not."""
    one, other = (_attached(LocalHeads(head="conv1", loss="predsim"), _resnet()) for _ in range(2))
    for algorithm in (one, other):
        algorithm.blocks.members["stem"] = nn.Conv2d(3, 4, 3, padding=1)
        algorithm.blocks[0].load_state_dict(one.blocks[0].state_dict())
    other.blocks[0].requires_grad_(False)
    before = copy.deepcopy(other.blocks[0].state_dict())
    for algorithm in (one, other):
        plain_loop(algorithm, [IMAGES], sgd)
    assert all(torch.equal(a, before[name]) for name, a in other.blocks[0].state_dict().items())
    assert not torch.equal(one.blocks[0].weight, other.blocks[0].weight)
    for index in (1, 2, 3):
        pairs = zip(one.blocks[index].parameters(), other.blocks[index].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_inference_drops_the_heads() -> None:
    """Property 7: without them predictions are bit-equal, and the weights are the plain network's."""
    net = _resnet()
    keys = set(net.state_dict())
    algorithm = _attached(LocalHeads(head="mirror", loss="predsim"), net).eval()
    before = algorithm.predict(IMAGES.inputs)
    del algorithm.heads.projections[:], algorithm.heads.terms[:]
    assert torch.equal(net(IMAGES.inputs), before)
    assert set(net.state_dict()) == keys


def test_statistics_move_once_a_step() -> None:
    """Property 11."""
    algorithm = _attached(LocalHeads(head="dgl"), _resnet())
    _losses(algorithm)
    counts = [int(m.num_batches_tracked) for m in algorithm.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert set(counts) == {1}


# -- movement ---------------------------------------------------------------------------------------------------------
def test_movement_is_half_the_squared_length_of_the_branches() -> None:
    """TRGL's term, for every block with branches; at 0 nothing changes."""
    plain, moving = (_attached(LocalHeads(movement=m), _resnet()) for m in (0.0, 0.3))
    before, after = _losses(plain), _losses(moving)
    assert before[0] == after[0]  # the stem has no branch
    x = moving.blocks[0](IMAGES.inputs)
    unit = moving.blocks[1]
    branch = unit.bn2(unit.conv2(unit.relu(unit.bn1(unit.conv1(x)))))
    assert after[1] - before[1] == pytest.approx(0.3 * float(branch.detach().square().sum()) / 16, rel=1e-4)


def test_movement_in_torchvision_blocks_that_add_in_place() -> None:
    """The shortcut is added into the branch's own output there: value and gradient are still those of the branch."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    unit = torchvision.models.resnet.BasicBlock(4, 4)
    net = Blocks({"stem": nn.Conv2d(3, 4, 3, padding=1), "unit": unit}, nn.Sequential(nn.Flatten(), nn.Linear(256, 4)))
    algorithm = _attached(LocalHeads(movement=0.3), net)
    plain = _attached(LocalHeads(), copy.deepcopy(net))
    *_, update = algorithm.updates(IMAGES)
    update.backward()
    *_, other = plain.updates(IMAGES)
    x = plain.blocks[0](IMAGES.inputs).detach()
    twin = plain.blocks[1]
    branch = twin.bn2(twin.conv2(twin.relu(twin.bn1(twin.conv1(x)))))
    total = other.loss + 0.3 * branch.square().sum() / 16
    total.backward()
    assert torch.allclose(update.loss, total.detach())
    assert torch.allclose(unit.conv1.weight.grad, twin.conv1.weight.grad, atol=1e-5)
    assert next(iter(algorithm.blocks[0].parameters())).grad is None  # property 10: of its own block only


def test_movement_by_block_and_in_deep_supervision() -> None:
    late = _attached(LocalHeads(movement=[0.0, 0.2, 0.1, 0.0]), _resnet())
    plain = _losses(_attached(LocalHeads(), _resnet()))
    changed = [a != b for a, b in zip(_losses(late), plain, strict=True)]
    assert changed == [False, True, True, False]
    (total,) = _losses(_attached(DeepSupervision(movement=[0.0, 0.2, 0.1, 0.0]), _resnet()))
    assert total > sum(plain)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head": "cnn"}, "head is 'cnn', expected one of linear"),
        ({"loss": "mse"}, "loss is 'mse', expected one of ce"),
        ({"head": "mirror", "width": 0}, "width is 0, expected above 0"),
        ({"head": "mirror", "width": -1}, "width is -1, expected above 0"),
        ({"width": 0.5}, "width=0.5 is for head=conv1"),
        ({"beta": 0.5}, "beta=0.5 is for loss=predsim"),
        ({"loss": "predsim", "beta": 1.5}, "beta is 1.5, expected within 0 and 1"),
        ({"loss": "sim", "head": "conv1"}, "loss=sim has no head"),
        ({"head": "auglocal", "depth": 0}, "depth is 0"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"movement": -0.1}, "movement is -0.1"),
        ({"loss": "infopro", "reconstruction": [1.0]}, "reconstruction is \\[1.0\\], expected two numbers"),
        ({"loss": "infopro", "pixels": [1, 0]}, "pixels is \\(1, 0\\)"),
        ({"loss": "infopro", "contrast": True, "temperature": 0}, "temperature is 0"),
        ({"head_limit": 0}, "head_limit is 0"),
        ({"head": "auglocal", "depth": math.nan}, "depth is nan, expected a whole number"),
        ({"head": "conv1", "width": math.inf}, "width is inf"),
        ({"movement": math.inf}, "movement is inf"),
        ({"movement": [0.1, math.nan]}, "movement is \\(0.1, nan\\)"),
        ({"loss": "infopro", "reconstruction": None}, "reconstruction is None, expected two numbers"),
        ({"loss": "infopro", "temperature": 0.2}, "temperature=0.2 is for contrast=true"),
        ({"loss": "infopro", "pixels": [0, 1], "reconstruction": [0, 0]}, "is for a decoder"),
        ({"loss": "infopro", "head": "dgl", "classification": [0, 0]}, "head=dgl is for a head"),
        ({"loss": "infopro", "contrast": True, "classification": [0, 0]}, "contrast=true is for a head"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], sentence: str) -> None:
    for make in (LocalHeads, DeepSupervision):
        with pytest.raises(ValueError, match=sentence):
            make(**settings)


@pytest.mark.parametrize(
    ("settings", "net", "sentence"),
    [
        (
            {"head": "dgl"},
            lambda: mlp((6,), 4, (5, 5)),
            "head=dgl reads maps of shape \\(C, H, W\\), and block 'layer1' gives vectors",
        ),
        (
            {"loss": "infopro"},
            lambda: mlp((6,), 4, (5, 5)),
            "have every block give the image back|has every block give the image back",
        ),
        ({"movement": 1.0}, lambda: mlp((6,), 4, (5, 5)), "none of the blocks layer1, layer2 has one"),
        (
            {"head_limit": 4},
            lambda: mlp((6,), 4, (5, 5)),
            "block 'layer1': a head of an output of shape \\(5,\\) has 5 inputs",
        ),
        ({"loss": "sim"}, lambda: Blocks({"a": nn.Linear(6, 5)}), "has no readout"),
        ({"movement": [1.0]}, lambda: mlp((6,), 4, (5, 5)), "movement has 1 weights for 2 blocks"),
        (
            {"loss": "infopro", "reconstruction": [0, 0], "classification": [1, 0]},
            lambda: mlp((6,), 4, (5, 5, 5)),
            "block 'layer2' has nothing to learn from: with reconstruction=\\[0, 0\\] and classification=\\[1, 0\\]",
        ),
        (
            {"loss": "infopro", "reconstruction": [0, 0], "classification": [1, 0]},
            lambda: mlp((6,), 4, (5, 5)),
            "classification=\\[1, 0\\] runs from the first to the last local block, and block 'layer1' is the only one",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], net: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _attached(LocalHeads(**settings), net(), ROWS)


def test_a_decoder_of_one_block_has_one_weight() -> None:
    ends: dict[str, Any] = {"loss": "infopro", "classification": (1, 1)}
    with pytest.raises(ValueError, match=r"reconstruction=\[1, 0\] runs from .* block 'conv1' is the only one"):
        _attached(LocalHeads(**ends, reconstruction=(1, 0)), cnn((3, 8, 8), 4, (4, 4)))
    _attached(LocalHeads(**ends, reconstruction=(1, 1)), cnn((3, 8, 8), 4, (4, 4)))


def test_other_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="tells classes apart, and this task has 1"):
        LocalHeads().attach(mlp((6,), 1, (5,)), TaskInfo(ROWS, 1, F.cross_entropy))
    with pytest.raises(ValueError, match="the rule of local heads compares every block with class labels"):
        LocalHeads().attach(mlp((6,), 4, (5,)), TaskInfo(ROWS, 4, F.mse_loss, classes=False))
    with pytest.raises(ValueError, match="smoothing is that of the cross entropy"):
        LocalHeads(smoothing=0.1).attach(mlp((6,), 4, (5, 5)), TaskInfo(ROWS, 4, F.multi_margin_loss))
    with pytest.raises(
        ValueError, match="a head of 4 channels has at least 4 inputs, more than the limit of 3; raise head_limit"
    ):
        _attached(LocalHeads(head_limit=3), _resnet())
    algorithm = _attached(LocalHeads(head="dgl"), _resnet())
    with pytest.raises(
        ValueError, match="the head of block 'stem' normalises over the batch, and this one has 1 sample"
    ):
        _losses(algorithm, Batch(IMAGES.inputs[:1], IMAGES.targets[:1]))
    with pytest.raises(ValueError, match="judges every block by its own class scores"):
        _ = _attached(LocalHeads(loss="sim"), _resnet()).stages
    torch.manual_seed(0)
    tokens = Blocks({"a": nn.Linear(5, 6), "b": nn.Linear(6, 6)}, nn.Sequential(nn.Flatten(), nn.Linear(18, 4)))
    with pytest.raises(ValueError, match="block 'a' gives tokens of shape \\(3, 6\\)"):
        _attached(LocalHeads(head="conv1"), tokens, Batch(torch.randn(8, 3, 5), torch.arange(8) % 4))
    wrong = _resnet()
    wrong[1].residual_branches = ("nowhere",)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="residual_branches names 'nowhere'"):
        _attached(LocalHeads(movement=0.1), wrong)


@pytest.mark.parametrize("make", [LocalHeads, DeepSupervision, MAN])
def test_a_setting_that_there_is_not_is_told_with_those_there_are(make: Any) -> None:
    with pytest.raises(TypeError, match=f"{make.__name__} has no setting 'hed'; it has .*seed.*movement"):
        make(hed="conv1")


@pytest.mark.parametrize("make", [LocalHeads, DeepSupervision, MAN])
def test_parts_stand_in_the_signature_with_their_types(make: Any) -> None:
    """So that the command line tells a wrong name or value before anything is made."""
    parameters = inspect.signature(make).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    for field in dataclasses.fields(HeadParts):
        assert parameters[field.name].default == ("man" if make is MAN and field.name == "head" else field.default)
    check_arguments(make, {"head": "conv1", "width": 1, "movement": [0, 0.1], "pixels": None, "seed": 3}, "algorithm")
    for values, says in (
        ({"hed": "conv1"}, "there is no setting 'algorithm.hed'; algorithm has .*head, .*width"),
        ({"head": "cnn"}, "algorithm.head is 'cnn', expected 'linear' or"),
        ({"width": "wide"}, "algorithm.width is 'wide', expected a number"),
        ({"depth": 2.5}, "algorithm.depth is 2.5, expected a whole number"),
        ({"movement": [0.1, "x"]}, "algorithm.movement is"),
    ):
        with pytest.raises(UsageError, match=says):
            check_arguments(make, values, "algorithm")


def test_nothing_is_observed_where_no_image_is_given_back() -> None:
    """Vectors and tokens have no channels to look at, and need none where λ1 is 0 or black and white are told."""
    settings: dict[str, Any] = {"loss": "infopro", "reconstruction": (0, 0), "classification": (1, 1)}
    nets = [mlp((6,), 4, (5, 5)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for make, net in zip((LocalHeads(**settings), LocalHeads()), nets, strict=True):
        plain_loop(_attached(make, net, ROWS), [ROWS] * 2, sgd)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    whole = _attached(LocalHeads(loss="infopro"), Blocks({"all": nn.Sequential(*nets[0])}, nets[0].readout), ROWS)
    assert all(map(math.isfinite, _losses(whole, ROWS)))  # no block is there that could give an image back
    told = _attached(LocalHeads(loss="infopro", pixels=[-1, 1]), _resnet())
    assert not any(name.endswith(("low", "high")) for name, _ in told.named_buffers())


def test_smoothing_is_that_of_every_head() -> None:
    plain, smooth = _attached(LocalHeads(), _resnet()), _attached(LocalHeads(smoothing=0.2), _resnet())
    hidden = list(plain.blocks.features(IMAGES.inputs))
    for i, loss in enumerate(_losses(smooth)):
        scores = plain.heads.scores(plain.blocks, i, hidden[i], IMAGES)
        assert loss == pytest.approx(
            float(F.cross_entropy(scores, IMAGES.targets, label_smoothing=0.2).detach()), rel=1e-5
        )


@pytest.mark.parametrize("make", [LocalHeads, DeepSupervision, MAN])
def test_a_rule_that_was_refused_one_network_takes_another(make: Any) -> None:
    """Nothing is left of the first one, and nobody is told that the rule has a network already."""
    nets, rules = [_resnet(), _resnet()], [make(head="dgl"), make(head="dgl")]
    with pytest.raises(ValueError, match="gives vectors"):
        _attached(rules[0], mlp((6,), 4, (5, 5)), ROWS)
    assert not list(rules[0].parameters())
    for rule, net in zip(rules, nets, strict=True):
        plain_loop(_attached(rule, net), [IMAGES], sgd)
    state, fresh = (rule.state_dict() for rule in rules)
    tensors = {name for name, value in fresh.items() if isinstance(value, Tensor)}
    assert state.keys() == fresh.keys()
    assert all(torch.equal(state[name], fresh[name]) for name in tensors)


def test_a_network_without_a_classifier_gets_the_last_head_too() -> None:
    """As DGL's code has it: the last unit's head is what predicts, and stays."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    images, rule = torch.randn(8, 3, 8, 8), LocalHeads(head="dgl")
    local = ll.localize(features, rule, cuts=["1"], example=images, outputs=5)
    assert [type(head).__name__ for head in rule.heads.projections] == ["MLPHead", "MLPHead"]
    before = copy.deepcopy(rule.heads.projections[1].state_dict())
    local.step(images, torch.arange(8) % 5)
    assert not torch.equal(before["1.weight"], rule.heads.projections[1].state_dict()["1.weight"])
    rule.eval()
    assert torch.equal(local.predict(images), rule.heads.projections[1](features.eval()(images)))
