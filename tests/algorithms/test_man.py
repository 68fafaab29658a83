"""MAN and MAN++: the authors' numbers at one border, the moving average, and what crosses a border."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallearn
from locallearn.algorithms import MAN, Backprop, LocalHeads, Locality, TaskInfo
from locallearn.audit import audit
from locallearn.batch import Batch
from locallearn.nets import Blocks, cnn, mlp, resnet, vit
from locallearn.nets.residual import ResidualUnit
from locallearn.nets.units import first_unit
from locallearn.testing import plain_loop
from tests.references import reference

DRAW = torch.Generator().manual_seed(0)
BATCH = Batch(torch.randn(8, 3, 8, 8, generator=DRAW), torch.arange(8) % 3)
sgd = partial(torch.optim.SGD, lr=0.1)
light = partial(MAN, head="conv1", seed=0)


def _attached(algorithm: Any, net: Blocks | None = None, batch: Batch = BATCH) -> Any:
    if net is None:
        torch.manual_seed(0)
        net = resnet((3, 8, 8), 3, 1, (4, 6))
    algorithm.attach(
        net, TaskInfo(batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2]), 3, F.cross_entropy)
    )
    return algorithm.train()


def test_a_border_is_that_of_the_authors() -> None:
    """Outputs of both units, loss, gradients, and the average after the step."""
    known = {
        name: torch.from_numpy(array).double()
        for name, array in reference("aux_manpp_border").items()
        if array.dtype.kind == "f"
    }
    y = torch.tensor([0, 2, 1, 2])
    net = Blocks(
        {"below": nn.Conv2d(3, 16, 3, padding=1), "above": ResidualUnit(16, 16)},
        nn.Sequential(nn.Flatten(), nn.Linear(256, 3)),
    )
    algorithm = _attached(MAN(width=8 / 128), net, Batch(torch.randn(4, 3, 4, 4), y)).double()
    head, trained, average = algorithm.heads.projections[0], algorithm.trained[0], algorithm.average[0]
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            weight.copy_(known[f"LB.{name}"])
        for name, weight in average.named_parameters():
            weight.copy_(known[f"EMA_before.{name}"])
        for name, weight in net[1].named_parameters():
            weight.copy_(known[f"source.{name}"])
        layers = [layer for layer in head if list(layer.parameters())]
        for layer, place in zip(layers, (0, 1, 3, 4, 6, 7, 11, 12, 14, 15, 17, 18, 20), strict=True):
            for name, weight in layer.named_parameters():
                weight.copy_(known[f"head.head.{place}.{name}"])
        algorithm.scales[0].fill_(float(known["s"]))

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.Parameter(known["h_border"].clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.h * 1.0

    net.members["below"] = given = Given()
    seen = {}
    for name, unit in (("LB_out", trained), ("EMA_out", average)):
        unit.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.detach()}))
    updates = algorithm.updates(Batch(torch.zeros(4, 3, 4, 4).double(), y))
    update = next(updates)
    update.backward()
    next(updates)  # the average has moved now, the next block has not been stepped
    assert given.h.grad is not None
    for got, name in (
        (seen["LB_out"], "LB_out"),
        (seen["EMA_out"], "EMA_out"),
        (update.loss, "aux_loss"),
        (algorithm.scales[0].grad, "grad_s"),
        (given.h.grad, "grad_h_border"),
        # Those of the normalisations were recorded twice over: the gradients by h and s, which pass through them, agree.
        (2 * trained.bn1.weight.grad, "LB.grad.bn1.weight"),
        (2 * trained.bn2.bias.grad, "LB.grad.bn2.bias"),
        (trained.conv1.weight.grad.norm(), "LB.gradnorm.conv1.weight"),
        (trained.conv2.weight.grad.sum((2, 3)), "LB.gradsum_spatial.conv2.weight"),
        *((weight, f"EMA_after.{name}") for name, weight in average.named_parameters()),
        (average.bn1.running_mean, "EMA_after.bn1.running_mean"),
        (average.bn1.running_var, "EMA_after.bn1.running_var"),
    ):
        assert torch.allclose(got, known[name], rtol=1e-9, atol=1e-10), name
    assert all(p.grad is None for p in average.parameters())


def test_the_average_of_a_constant() -> None:
    """Property 4: after t updates m^t·E⁰ + (1 - m^t)·θ; it is in no optimizer, and buffers are its own."""
    algorithm = _attached(light(momentum=0.8))
    for p in algorithm.blocks[1].parameters():
        p.requires_grad_(False)
    start = [p.detach().clone() for p in algorithm.average[0].parameters()]
    source = [p.detach().clone() for p in algorithm.blocks[1].parameters()]
    plain_loop(algorithm, [BATCH] * 5, sgd)
    for now, first, theta in zip(algorithm.average[0].parameters(), start, source, strict=True):
        assert torch.allclose(now, 0.8**5 * first + (1 - 0.8**5) * theta, atol=1e-6)
    owned = {id(p) for groups in algorithm.units().values() for group in groups for p in group["params"]}
    assert not owned & {id(p) for p in algorithm.average.parameters()}
    assert int(algorithm.average[0].bn1.num_batches_tracked) == 5


def test_momentum_0_copies_and_1_keeps() -> None:
    copying, keeping = _attached(light(momentum=0.0)), _attached(light(momentum=1.0))
    before = [p.detach().clone() for p in keeping.average.parameters()]
    source = [p.detach().clone() for p in copying.blocks[1].parameters()]
    updates = copying.updates(BATCH)
    next(updates).backward()
    next(updates)
    assert all(torch.equal(a, b) for a, b in zip(copying.average[0].parameters(), source, strict=True))
    plain_loop(keeping, [BATCH] * 2, sgd)
    assert all(torch.equal(a, b) for a, b in zip(keeping.average.parameters(), before, strict=True))


def test_a_scale_of_2_leaves_the_average_out() -> None:
    """Property 4: then it is the strict auxiliary of the trained unit, at twice its output."""
    algorithm = _attached(light())
    with torch.no_grad():
        algorithm.scales[0].fill_(2.0)
    h = algorithm.blocks[0](BATCH.inputs)
    assert torch.equal(algorithm.read(0, h), 2 * algorithm.trained[0](h))
    plain = _attached(light(scale=False))
    assert torch.equal(plain.read(0, h), plain.trained[0](h) + plain.average[0](h))
    assert len(plain.scales) == 0


def test_the_control_starts_from_the_same_units_and_heads() -> None:
    with_average, alone = _attached(light()), _attached(light(averaged=False))
    for name in ("trained", "heads"):
        pairs = zip(getattr(with_average, name).parameters(), getattr(alone, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(alone.average) == len(alone.scales) == 0
    unit = sum(p.numel() for p in alone.trained.parameters())
    assert with_average.added_parameters - alone.added_parameters == unit + len(with_average.average)


@pytest.mark.parametrize(
    ("settings", "want"),
    [({}, Locality.COUPLED), ({"averaged": False}, Locality.LAYER_LOCAL), ({"momentum": 1.0}, Locality.LAYER_LOCAL)],
)
def test_strict_or_not(settings: dict[str, Any], want: Locality) -> None:
    """Property 3: after one update of the average, what the next block holds changes a block's gradient; else never."""
    grads = []
    for other in (False, True):
        algorithm = _attached(light(**settings))
        assert algorithm.locality is want
        if other:
            with torch.no_grad():
                for p in algorithm.blocks[1].parameters():
                    p.add_(0.1)
        found = []
        for _ in range(2):
            updates = algorithm.updates(BATCH)
            next(updates).backward()
            next(updates)
            found.append([p.grad.clone() for p in algorithm.blocks[0].parameters()])
            algorithm.zero_grad()
        grads.append(found)
    same = [all(map(torch.equal, a, b)) for a, b in zip(*grads, strict=True)]
    assert same == [True, want is Locality.LAYER_LOCAL]


def test_one_block_is_backpropagation() -> None:
    torch.manual_seed(0)
    net = resnet((3, 8, 8), 3, 1, (4, 6))
    nets = [net, copy.deepcopy(net)]
    for rule, whole in zip((MAN(), Backprop()), nets, strict=True):
        plain_loop(_attached(rule, Blocks({"all": nn.Sequential(*whole)}, whole.readout)), [BATCH] * 2, sgd)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_the_first_unit_of_a_block() -> None:
    conv, norm, relu, other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    unit = ResidualUnit(4, 4)
    assert list(first_unit(nn.Sequential(conv, norm, relu, other))) == [conv, norm, relu]  # type: ignore[call-overload]
    assert list(first_unit(nn.Sequential(norm, relu, other, relu, conv))) == [norm, relu, other, relu]  # type: ignore[call-overload]
    assert first_unit(nn.Sequential(nn.Sequential(unit, ResidualUnit(4, 4)), conv)) is unit
    assert first_unit(unit) is unit
    assert first_unit(conv) is conv
    named = _attached(light(unit="conv1"), None)
    assert isinstance(named.trained[0], nn.Conv2d)


def test_a_unit_that_works_in_place_leaves_the_output_alone() -> None:
    torch.manual_seed(0)
    blocks = {
        "a": nn.Conv2d(3, 4, 3, padding=1),
        "b": nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)),
    }
    algorithm = _attached(light(), Blocks(blocks, nn.Sequential(nn.Flatten(), nn.Linear(256, 3))))
    h = algorithm.blocks[0](BATCH.inputs)
    kept = h.detach().clone()
    algorithm.read(0, h)
    assert torch.equal(h, kept)


def test_a_border_of_a_vision_transformer() -> None:
    """Two trained units, one averaged, LayerNorm and a linear map of the class token, written out."""
    torch.manual_seed(0)
    net = vit((3, 8, 8), 3, patch=4, width=12, heads=3, depth=3)
    algorithm = _attached(MAN(head="token", trained_units=2, momentum=0.9), net)
    assert [len(chain) for chain in algorithm.trained] == [2, 2]
    assert [p.shape for p in algorithm.average[0].parameters()] == [p.shape for p in net[1].parameters()]
    with torch.no_grad():
        algorithm.scales[0].fill_(0.7)
    head, h = algorithm.heads.projections[0], net[0](BATCH.inputs)
    before, source = [[p.detach().clone() for p in unit.parameters()] for unit in (algorithm.average[0], net[1])]
    first, second = algorithm.trained[0]
    read = (0.7 * second(first(h)) + 1.3 * algorithm.average[0](h))[:, 0]
    scores = F.layer_norm(read, (12,), head.norm.weight, head.norm.bias) @ head.linear.weight.T + head.linear.bias
    own = [*net[0].parameters(), *first.parameters(), *second.parameters(), *head.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(scores, BATCH.targets), own)
    updates = algorithm.updates(BATCH)
    next(updates).backward()
    next(updates)
    for p, gradient in zip(own, expected, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, gradient, atol=1e-6)
    for now, old, theta in zip(algorithm.average[0].parameters(), before, source, strict=True):
        assert torch.allclose(now, 0.9 * old + 0.1 * theta, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="trained_units is 0, expected a number of units of at least 1"):
        MAN(trained_units=0)
    with pytest.raises(ValueError, match=r"head=token reads tokens of shape .* and block 'stem' gives \(4, 8, 8\)"):
        _attached(MAN(head="token"))
    with pytest.raises(ValueError, match=r"does not fit the first unit of block"):
        _attached(light(trained_units=2))  # a unit that widens what it reads cannot read it again
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        MAN(momentum=1.5)
    with pytest.raises(ValueError, match="unit is 'conv9', and block 'stage1_1' has no such submodule; it has conv1"):
        _attached(MAN(unit="conv9"))
    with pytest.raises(
        ValueError, match="head=man reads maps of shape \\(C, H, W\\), and block 'layer1' gives vectors"
    ):
        _attached(MAN(), mlp((6,), 3, (5, 5)), Batch(torch.randn(8, 6), torch.arange(8) % 3))
    net = _attached(LocalHeads()).blocks
    with pytest.raises(
        ValueError, match="what block 'stem' gives does not fit the first unit of block 'stage1_1' \\(Conv2d"
    ):
        _attached(MAN(unit="conv"), Blocks({"stem": net[0], "stage1_1": _Reversed()}, nn.Linear(1, 3)))


class _Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :2]).mean((2, 3))[:, :1]


def test_the_audit_tells_coupling_from_locality() -> None:
    """Also where the averaged unit is a plain layer, whose weights an error would meet on its way back."""
    torch.manual_seed(0)
    net = cnn((3, 8, 8), 3, (6, 6, 6))
    for settings, want in (({"momentum": 0.5}, Locality.COUPLED), ({"averaged": False}, Locality.LAYER_LOCAL)):
        result = audit(_attached(light(**settings), copy.deepcopy(net)), BATCH, batches=3)
        assert (result.confirmed, result.verdict) == (True, want), result.reason


def test_units_that_would_need_more_than_one_tensor_are_refused_by_name() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(*sides) for sides in ((6, 5), (5, 5), (5, 5), (5, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x).relu()
            return self.d(first + self.c(self.b(first).relu()).relu())

    with pytest.raises(ValueError, match=r"read one tensor, and block .* hands over more than one: cut the network"):
        locallearn.localize(Skip(), MAN(head="linear"), cuts=["a", "b", "c"], example=torch.randn(8, 6))
