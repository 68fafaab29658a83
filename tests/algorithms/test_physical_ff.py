"""Physical forward-forward: no derivative of a device, the authors' numbers, calls, gradients, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Backprop, PhysicalFF, TaskInfo, Update
from locallearn.algorithms.physical_ff import FFZero, PhyLL
from locallearn.batch import Batch
from locallearn.functional import ffzero, physical_ff
from locallearn.functional import forward_forward as ff
from locallearn.nets import Blocks, cnn, mlp, physical
from locallearn.nets.devices import Simulation
from locallearn.tasks.vowels import VowelData
from locallearn.testing import plain_loop
from tests.references import reference

ADAM = partial(torch.optim.Adam, lr=5e-3)


def _attached(net: Blocks, batch: Batch, classes: int, **settings: Any) -> Any:
    rule = PhysicalFF(**settings)
    rule.attach(
        net, TaskInfo(batch._replace(inputs=batch.inputs[:2], targets=batch.targets[:2]), classes, F.cross_entropy)
    )
    return rule


def _batch(samples: int = 12, width: int = 9) -> Batch:
    return Batch(torch.rand(samples, width), torch.arange(samples) % 3)


class _Differentiated(torch.autograd.Function):
    """Raises as soon as anybody asks for a derivative, whichever way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin().abs()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("the device was differentiated")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise AssertionError("the device was differentiated")


def _device(x: np.ndarray[Any, Any]) -> Any:
    """Gives a tensor with a graph: the layer in front of it has to cut that."""
    return _Differentiated.apply(torch.from_numpy(x).requires_grad_())  # type: ignore[no-untyped-call]


# -- 1. no derivative of a device is ever taken --------------------
@pytest.mark.parametrize("protocol", ["phyll", "ffzero"])
def test_no_derivative_is_ever_taken(protocol: str) -> None:
    batch = _batch()
    net = physical((9,), 3, (6, 5), device=_device)
    rule = _attached(net, batch, 3, protocol=protocol)
    before = copy.deepcopy(net.state_dict())

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("autograd ran")

    doors = (
        "torch.autograd.grad",
        "torch.autograd.backward",
        "torch.Tensor.backward",
        "torch.func.jvp",
        "torch.func.grad",
    )
    with (
        mock.patch.object(torch.autograd.graph, "_engine_run_backward", never),
        mock.patch.object(torch.autograd.Variable, "_execution_engine", None),
    ):
        patches = [mock.patch(door, never) for door in doors]
        for patch in patches:
            patch.start()
        try:
            for unit, groups in rule.units().items():
                for group in groups:
                    assert group["params"], unit
            optimizers = {unit: torch.optim.Adam(groups, lr=1e-2) for unit, groups in rule.units().items()}
            for update in rule.updates(batch):
                assert update.loss is None or not update.loss.requires_grad
                update.backward(never)
                optimizers[update.unit].step()
            rule.predict(batch.inputs)
        finally:
            for patch in patches:
                patch.stop()
    assert all(not torch.equal(net[i][1].weight, before[f"members.layer{i + 1}.1.weight"]) for i in range(2))


def test_whoever_differentiates_through_a_device_is_refused() -> None:
    batch = _batch()
    net = physical((9,), 3, (6, 5), device=Simulation())
    with pytest.raises(ValueError, match="can only be measured: train with algorithm=physical_ff"):
        net(batch.inputs)
    with pytest.raises(ValueError, match="can only be measured"), torch.no_grad():
        torch.func.jvp(net, (batch.inputs,), (batch.inputs,))
    rule = Backprop()
    rule.attach(net, TaskInfo(batch, 3, F.cross_entropy))
    with pytest.raises(ValueError, match=r"net\.differentiable=true"):
        list(rule.updates(batch))


def test_what_lies_below_a_layer_gets_nothing() -> None:
    """The gradient of a block holds its own weights and no others."""
    batch = _batch()
    net = physical((9,), 3, (6, 5), device=_device)
    rule = _attached(net, batch, 3, inner_steps=1)
    for update in rule.updates(batch):
        index = int(update.unit[-1]) - 1
        assert set(update.gradients or {}) == set(net[index].parameters())


# -- 2. calls --------------------
@pytest.mark.parametrize("inner_steps", [1, 7])
def test_devices_are_asked_twice_per_layer_and_batch_whatever_the_steps(inner_steps: int) -> None:
    batch = _batch()
    rule = _attached(physical((9,), 3, (6, 5), device=Simulation()), batch, 3, inner_steps=inner_steps)
    plain_loop(rule, [batch] * 4, ADAM)
    assert [device.training_calls for device in rule.devices().values()] == [8, 8]
    before = [device.calls for device in rule.devices().values()]
    rule.eval()
    rule.predict(batch.inputs)
    assert [device.calls for device in rule.devices().values()] == [calls + 3 for calls in before]
    figures = rule.diagnostics()["layer2"]
    assert figures["device_calls_in_training"] == 8
    assert figures["device_samples"] == rule.devices()["layer2"].samples


@pytest.mark.parametrize("directions", [1, 4])
def test_ffzero_evaluates_a_layer_twice_per_direction_and_once_more(directions: int) -> None:
    batch = _batch()
    rule = _attached(physical((9,), 3, (6, 5), device=Simulation()), batch, 3, protocol="ffzero", directions=directions)
    plain_loop(rule, [batch], partial(torch.optim.SGD, lr=1e-3))
    calls = [device.training_calls for device in rule.devices().values()]
    assert calls == [2 * directions + 1 + 1] * 2  # the last one feeds the next layer

    net = cnn((1, 6, 6), 3, channels=(4,))
    seen = []
    net[0][0].register_forward_hook(lambda *_: seen.append(1))
    images = Batch(torch.rand(5, 1, 6, 6), torch.arange(5) % 3)
    rule = _attached(net, images, 3, protocol="ffzero", directions=directions)
    seen.clear()
    next(rule.updates(images))
    assert len(seen) == 2 * directions * 4 + 1


# -- 3., 4. gradients and invariances --------------------
_ACTIVATIONS = [None, nn.GELU(), nn.ReLU(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.Tanh()]


@pytest.mark.parametrize("activation", _ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("absolute", [True, False])
def test_gradients_by_hand_are_those_of_autograd(activation: nn.Module | None, absolute: bool) -> None:
    batch = Batch(torch.randn(7, 9).double(), torch.arange(7) % 3)
    layer = nn.Linear(9, 5)
    net = Blocks({"layer1": nn.Sequential(layer, *([activation] if activation else []))}).double()
    rule = _attached(net, batch, 3, inner_steps=1, absolute=absolute, theta=3.0)
    with mock.patch.object(ff, "wrong_labels_uniform", lambda labels, *_: (labels + 1) % 3):
        [update] = list(rule.updates(batch))
    sides = [rule.written(batch.inputs, labels) for labels in (batch.targets, (batch.targets + 1) % 3)]
    activities = [net[0](side) for side in sides]
    p = rule.get_buffer("direction1")
    good, bad = (F.cosine_similarity(a.abs() if absolute else a, p[None], dim=1) for a in activities)
    loss = F.softplus(-3.0 * (good - bad)).mean()
    true = torch.autograd.grad(loss, [layer.weight, layer.bias])
    assert update.loss is not None
    torch.testing.assert_close(update.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip((layer.weight, layer.bias), true, strict=True):
        torch.testing.assert_close((update.gradients or {})[parameter], gradient, rtol=1e-9, atol=1e-12)


def test_goodness_does_not_change_with_length_or_with_the_sign_of_a_unit() -> None:
    batch = _batch()
    net = physical((9,), 3, (6,), device=Simulation())
    rule = _attached(net, batch, 3)
    before = rule.predict(batch.inputs)
    with torch.no_grad():
        for parameter in net[0].parameters():
            parameter.mul_(3.0)
            parameter[[1, 4]] *= -1.0
    torch.testing.assert_close(rule.predict(batch.inputs), before)


def test_the_loss_is_log_2_where_nothing_is_told_apart_and_bounded_below() -> None:
    same = torch.rand(5)
    assert physical_ff.loss(same, same, 4.0) == pytest.approx(math.log(2.0))
    p = torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=torch.float64)
    best = (
        physical_ff.goodness(torch.tensor([[1.0, 0.0]]).double(), p),
        physical_ff.goodness(torch.tensor([[0.0, 1.0]]).double(), p),
    )
    assert float(physical_ff.loss(*best, 4.0)) == pytest.approx(physical_ff.least_loss(4.0), rel=1e-12)
    assert physical_ff.least_loss(4.0) == pytest.approx(0.0035, abs=1e-4)
    drawn = torch.rand(200, 6).double()
    q = physical_ff.direction(6).double()
    assert float(physical_ff.loss(*physical_ff.goodness(drawn, q).chunk(2), 4.0)) >= physical_ff.least_loss(4.0)
    assert not physical_ff.activity_gradients(torch.zeros(2, 6), torch.rand(2, 6), q.float(), 4.0)[0].any()


# -- 5. directions --------------------
@pytest.mark.parametrize(("protocol", "key"), [("phyll", "direction"), ("ffzero", "prototypes")])
def test_what_is_fixed_stays_is_restored_and_differs_by_layer(protocol: str, key: str) -> None:
    batch = _batch()
    rule, other = (
        _attached(physical((9,), 3, (6, 6), device=Simulation()), batch, 3, protocol=protocol, seed=seed)
        for seed in (0, 1)
    )
    drawn = [rule.get_buffer(f"{key}{i}").clone() for i in (1, 2)]
    assert not torch.allclose(drawn[0], drawn[1])
    plain_loop(rule, [batch] * 2, ADAM)
    assert all(torch.equal(rule.get_buffer(f"{key}{i + 1}"), one) for i, one in enumerate(drawn))
    assert not torch.equal(other.get_buffer(f"{key}1"), drawn[0])
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.get_buffer(f"{key}1"), drawn[0])
    assert torch.equal(other.predict(batch.inputs), rule.predict(batch.inputs))


# -- 6., 7. any device, and nothing of the user's is changed --------------------
def _hostile(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x *= 0.5  # its own copy
    return np.round(x[:, :4], 1)


@pytest.mark.parametrize(
    "device", [_device, _hostile, Simulation(input_bits=2), Simulation(outputs=4, noise=0.1, drift=0.1)]
)
@pytest.mark.parametrize("encode", ["unit", "minmax", "bits", "none"])
def test_any_device_will_do_and_data_stay_as_they_are(device: Any, encode: Any) -> None:
    batch = _batch()
    kept = batch.inputs.clone(), batch.targets.clone()
    rule = _attached(physical((9,), 3, (6, 5), device=device, encode=encode), batch, 3, inner_steps=2)
    plain_loop(rule, [batch] * 2, ADAM)
    assert rule.predict(batch.inputs).isfinite().all()
    assert torch.equal(batch.inputs, kept[0])
    assert torch.equal(batch.targets, kept[1])


def test_the_height_of_the_label_is_that_of_the_first_batch() -> None:
    batch = _batch()
    rule = _attached(physical((9,), 3, (6,)), batch, 3)
    plain_loop(rule, [batch, batch._replace(inputs=batch.inputs * 7)], ADAM)
    assert rule.get_buffer("height") == batch.inputs.abs().max()
    assert torch.equal(rule.written(batch.inputs, batch.targets)[0, :3], torch.tensor([float(rule.height), 0.0, 0.0]))
    fixed = _attached(physical((9,), 3, (6,)), batch, 3, label_height=2.5)
    assert fixed.written(batch.inputs, batch.targets)[0, 0] == 2.5


# -- 8., 9. that it learns --------------------
def _vowels(epochs: int, rule: Any, data: VowelData, optimizers: Any = None) -> float:
    data.setup()
    train, test = data._parts["train"], data._parts["test"]
    plain_loop(rule, [Batch(*train)] * epochs, partial(torch.optim.Adam, lr=3e-3))
    return float((rule.predict(test[0]).argmax(1) == test[1]).float().mean())


def test_vowels_are_learned_and_not_by_frozen_weights() -> None:
    data = VowelData()
    data.setup()
    batch = Batch(*data._parts["train"])
    rule = _attached(physical((20,), 7, (20, 20), device=Simulation()), batch, 7)
    assert _vowels(0, rule, data) < 1 / 7 + 0.1
    assert _vowels(25, rule, data) > 0.85


def test_a_sudden_change_of_the_medium_hurts_and_training_on_restores_it() -> None:
    data = VowelData()
    data.setup()
    batch = Batch(*data._parts["train"])
    net = physical((20,), 7, (20, 20), device=Simulation(options={"gain": 4.0}), skip=False)
    rule = _attached(net, batch, 7)
    before = _vowels(25, rule, data)
    for i, device in enumerate(rule.devices().values()):
        device.device.redraw(100 + i)
    changed = _vowels(0, rule, data)
    after = _vowels(25, rule, data)
    assert before > 0.8
    assert changed < before - 0.3
    assert after > before - 0.1


def test_a_plain_loop_between_scatterers_makes_the_same_steps() -> None:
    """Noise 0, K = 3, no skip in the second case: measured once per batch, gradients by autograd, written out."""
    batch = _batch()
    x, y = batch.inputs.double(), batch.targets
    wrong = (y + 1) % 3
    for skip in (True, False):
        torch.manual_seed(0)
        net = physical((9,), 3, (6, 5), device=Simulation("scatterer", noise=0.0), skip=skip).double()
        rule = _attached(net, Batch(x, y), 3, inner_steps=3, theta=3.0, label_height=1.0)
        plain = copy.deepcopy(rule)
        _driven(rule, Batch(x, y), wrong, 1e-2)
        halves = [plain.written(x, labels) for labels in (y, wrong)]
        for i, block in enumerate(plain.blocks):
            p = plain.get_buffer(f"direction{i + 1}")
            with torch.no_grad():
                u = [block[0](half) for half in halves]
            optimizer = torch.optim.Adam(block[1].parameters(), lr=1e-2)
            for _ in range(3):
                g = [F.cosine_similarity(block[1](half).abs(), p[None]) for half in u]
                optimizer.zero_grad()
                F.softplus(-3.0 * (g[0] - g[1])).mean().backward()
                optimizer.step()
            halves = [block[1](half).detach() for half in u]
        for given, wanted in zip(rule.blocks.parameters(), plain.blocks.parameters(), strict=True):
            assert torch.allclose(given, wanted, atol=1e-9)


# -- the authors' numbers --------------------
def _driven(rule: Any, batch: Batch, wrong: Tensor, lr: float, times: int = 1) -> list[Update]:
    optimizers = {unit: torch.optim.Adam(groups, lr=lr) for unit, groups in rule.units().items()}
    seen = []
    with mock.patch.object(ff, "wrong_labels_uniform", return_value=wrong):
        for _ in range(times):
            for update in rule.updates(batch):
                seen.append(Update(update.unit, update.loss, dict(update.gradients or {})))
                update.backward()
                optimizers[update.unit].step()
                optimizers[update.unit].zero_grad()
    return seen


def _with(net: Blocks, numbers: dict[str, np.ndarray], names: str) -> Blocks:
    net = net.double()
    with torch.no_grad():
        for i, block in enumerate(net):
            layer: Any = block[1]  # type: ignore[index]
            layer.weight.copy_(torch.from_numpy(numbers[names.format("W", i)]))
            layer.bias.copy_(torch.from_numpy(numbers[names.format("b", i)]))
    return net


def _close(given: Any, wanted: np.ndarray) -> None:
    torch.testing.assert_close(
        torch.as_tensor(given).double().detach(), torch.as_tensor(wanted), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("case", ["default", "K3_lr1e-2"])
def test_the_digital_net_is_that_of_the_authors(case: str) -> None:
    numbers = reference("phyll")
    x, y, wrong = (torch.from_numpy(numbers[f"dnn/{key}"]) for key in ("x", "y", "y_neg"))
    net = _with(physical((14,), 10, (8, 6), activation="gelu"), numbers, "dnn/init/{}{}")
    steps = int(numbers[f"dnn/{case}/K"])
    rule = _attached(
        net, Batch(x, y), 10, inner_steps=steps, theta=float(numbers["dnn/theta"]), label_height=float(x.max())
    )
    for i in range(2):
        rule.get_buffer(f"direction{i + 1}").copy_(torch.from_numpy(numbers[f"dnn/p{i}"]))
    _close(rule.written(x, y), numbers["dnn/x_pos"])
    _close(rule.written(x, wrong), numbers["dnn/x_neg"])
    updates = _driven(rule, Batch(x, y), wrong, float(numbers[f"dnn/{case}/lr"]))
    assert len(updates) == 2 * steps
    for i in range(2):
        own = [update for update in updates if update.unit == f"layer{i + 1}"]
        layer: Any = net[i][1]  # type: ignore[index]
        _close(own[0].loss, numbers[f"dnn/{case}/loss{i}_before"])
        _close((own[0].gradients or {})[layer.weight], numbers[f"dnn/{case}/gradW{i}"])
        _close((own[0].gradients or {})[layer.bias], numbers[f"dnn/{case}/gradb{i}"])
        _close(layer.weight, numbers[f"dnn/{case}/W{i}_after"])
        _close(layer.bias, numbers[f"dnn/{case}/b{i}_after"])
        _close(
            np.mean([float(update.loss) for update in own if update.loss is not None]),
            numbers[f"dnn/{case}/mean_inner_loss{i}"],
        )
    _close(rule.predict(x), numbers[f"dnn/{case}/sum_goodness"])


def test_moments_are_kept_from_batch_to_batch() -> None:
    numbers = reference("phyll")
    x, y, wrong = (torch.from_numpy(numbers[f"dnn/{key}"]) for key in ("x", "y", "y_neg"))
    net = _with(physical((14,), 10, (8, 6), activation="gelu"), numbers, "dnn/init/{}{}")
    rule = _attached(net, Batch(x, y), 10, inner_steps=3, label_height=float(x.max()))
    for i in range(2):
        rule.get_buffer(f"direction{i + 1}").copy_(torch.from_numpy(numbers[f"dnn/p{i}"]))
    _driven(rule, Batch(x, y), wrong, 1e-2, times=2)
    _close(net[0][1].weight, numbers["dnn/two_batches_K3_lr1e-2/W0_after"])  # type: ignore[index]


def test_the_acoustic_net_is_that_of_the_authors() -> None:
    numbers = reference("phyll")
    weights = [numbers[f"acoustic/twin/{key}"] for key in ("W0", "b0", "W1", "b1")]

    def twin(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        h = x @ weights[0].T + weights[1]
        answer: np.ndarray[Any, Any] = (h / (1 + np.exp(-h))) @ weights[2].T + weights[3]
        return answer

    x, y, wrong = (torch.from_numpy(numbers[f"acoustic/{key}"]) for key in ("x", "y", "y_neg"))
    net = _with(physical((20,), 7, (20, 20), device=twin), numbers, "acoustic/{}{}")
    rule = _attached(net, Batch(x, y), 7)
    for i in range(2):
        rule.get_buffer(f"direction{i + 1}").copy_(torch.from_numpy(numbers[f"acoustic/p{i}"]))
    updates = _driven(rule, Batch(x, y), wrong, float(numbers["acoustic/lr"]))
    _close(rule.written(x, y), numbers["acoustic/x_pos"])
    with torch.no_grad():
        _close(net[0][0](rule.written(x, y)), numbers["acoustic/u0_pos"])  # type: ignore[index]
        _close(net[0](rule.written(x, y)), numbers["acoustic/h0_out_pos"])
    for i in range(2):
        own = [update for update in updates if update.unit == f"layer{i + 1}"]
        layer: Any = net[i][1]  # type: ignore[index]
        assert len(own) == int(numbers["acoustic/K"])
        _close(own[0].loss, numbers[f"acoustic/loss{i}"])
        _close((own[0].gradients or {})[layer.weight], numbers[f"acoustic/gradW{i}"])
        _close(layer.weight, numbers[f"acoustic/W{i}_after"])
        _close(layer.bias, numbers[f"acoustic/b{i}_after"])
    assert rule.predict(x).argmax(1).tolist() == numbers["acoustic/pred"].tolist()


# -- FFzero --------------------
def test_ffzero_in_all_directions_is_the_gradient() -> None:
    """As many directions as weights, at right angles: n times the mean over them is the exact gradient."""
    batch = Batch(torch.randn(8, 7).double(), torch.arange(8) % 4)
    net = Blocks({"layer1": nn.Linear(7, 6)}).double()
    size = 7 * 6 + 6
    rule = _attached(net, batch, 4, protocol="ffzero", directions=size, step=1e-5)
    every = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    with mock.patch.object(ffzero, "directions", return_value=every):
        [update] = list(rule.updates(batch))
    loss = _margin_loss(net(batch.inputs), rule.get_buffer("prototypes1"), batch.targets)
    true = torch.autograd.grad(loss, list(net.parameters()))
    torch.testing.assert_close(update.loss, loss.detach())
    for parameter, gradient in zip(net.parameters(), true, strict=True):
        torch.testing.assert_close((update.gradients or {})[parameter], gradient, rtol=1e-5, atol=1e-6)


def _margin_loss(z: Tensor, prototypes: Tensor, targets: Tensor) -> Tensor:
    near = F.normalize(z, dim=1) @ prototypes.T
    return F.relu(0.3 + near - near.gather(1, targets[:, None])).sum()


def test_ffzero_moves_filter_and_gain_of_every_channel() -> None:
    """The last entry of a direction is the gain's, in probe and step; normalisation's bias and statistics stay aside."""
    images = Batch(torch.randn(6, 2, 5, 5).double(), torch.arange(6) % 4)
    norm = nn.BatchNorm2d(3)
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    net = Blocks({"conv": nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2))}).double()
    size = 2 * 9 + 1
    rule = _attached(net, images, 4, protocol="ffzero", directions=size, step=1e-5)
    every = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    rule.train()
    with mock.patch.object(ffzero, "directions", return_value=every):
        [update] = list(rule.updates(images))
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    z = norm(conv(images.inputs)).flatten(2)
    maps, prototypes = rule.get_buffer("map1"), rule.get_buffer("prototypes1")
    loss = sum(_margin_loss(z[:, c] @ maps[c], prototypes[c], images.targets) for c in range(3))
    assert isinstance(loss, Tensor)
    true = torch.autograd.grad(loss, [conv.weight, norm.weight])
    gradients = update.gradients or {}
    assert set(gradients) == {conv.weight, norm.weight}
    for parameter, gradient in zip((conv.weight, norm.weight), true, strict=True):
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-5, atol=1e-6)


def test_ffzero_restores_weights_between_probes() -> None:
    batch = _batch()
    net = mlp((9,), 3, (6,))
    before = copy.deepcopy(net.state_dict())
    rule = _attached(net, batch, 3, protocol="ffzero", directions=3)
    assert [update.unit for update in rule.updates(batch)] == ["layer1", "readout"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_ffzero_learns() -> None:
    torch.manual_seed(0)
    centres = torch.randn(3, 9)
    labels = torch.arange(60) % 3
    batch = Batch(centres[labels] + 0.3 * torch.randn(60, 9), labels)
    rule = _attached(mlp((9,), 3, (8,)), batch, 3, protocol="ffzero", directions=8)
    plain_loop(rule, [batch] * 60, partial(torch.optim.SGD, lr=1e-3))
    assert (rule.predict(batch.inputs).argmax(1) == labels).float().mean() > 0.9


# -- precision --------------------
@pytest.mark.parametrize("protocol", ["phyll", "ffzero"])
def test_autocast_neither_hides_steps_nor_rounds_what_labels_differ_in(protocol: str) -> None:
    """Casts of weights are kept while autocast is on: probes and inner steps would not be seen."""
    batch = _batch()
    found = []
    for autocast in (False, True):
        torch.manual_seed(0)
        rule = _attached(mlp((9,), 3, (6, 5)), batch, 3, protocol=protocol)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain_loop(rule, [batch], partial(torch.optim.SGD, lr=0.1))
            assert rule.predict(batch.inputs).dtype == torch.float32
        found.append(rule.blocks.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_halves_are_refused_where_they_round_steps_away() -> None:
    batch = Batch(torch.rand(6, 9).bfloat16(), torch.arange(6) % 3)
    for protocol in ("phyll", "ffzero"):
        rule = _attached(mlp((9,), 3, (6,)).bfloat16(), batch, 3, protocol=protocol)
        if protocol == "ffzero":
            with pytest.raises(ValueError, match=r"rounds away: set trainer\.precision=32-true"):
                next(rule.updates(batch))
        else:
            plain_loop(rule, [batch], ADAM)
            assert rule.predict(batch.inputs).dtype == torch.float32


# -- schedules, refusals --------------------
def test_names_make_classes() -> None:
    assert type(PhysicalFF()) is PhyLL
    assert type(PhysicalFF("ffzero")) is FFZero
    assert PhysicalFF(protocol="ffzero", directions=4).variant == "protocol=ffzero, directions=4"
    assert PhysicalFF().variant is None


def _refusals() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"protocol": "ff"}, "expected one of phyll, ffzero"
    yield {"inner_steps": 0}, "inner_steps is 0"
    yield {"theta": -1.0}, "theta is -1.0"
    yield {"protocol": "ffzero", "theta": 5.0}, "theta=5.0 means nothing with protocol=ffzero"
    yield {"directions": 2}, "directions=2 means nothing with protocol=phyll"
    yield {"step": 0.0, "protocol": "ffzero"}, "step is 0.0"


@pytest.mark.parametrize(("settings", "words"), list(_refusals()))
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PhysicalFF(**settings)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x  # type: ignore[no-any-return]


def _networks() -> Iterator[tuple[nn.Module, str, str]]:
    yield nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 5)), "phyll", "two layers of weights"
    yield nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)), "phyll", "a BatchNorm1d, and PhyLL trains linear layers"
    yield nn.Sequential(nn.Linear(9, 5), nn.Softmax(1)), "phyll", "has Softmax behind its weights"
    yield nn.Sequential(nn.Dropout(), nn.Linear(9, 5)), "ffzero", "Dropout"
    yield _Two(), "phyll", "a _Two, and PhyLL trains blocks of one"
    yield nn.Linear(9, 2), "ffzero", "2 outputs, and FFzero places 3 classes"


@pytest.mark.parametrize(("block", "protocol", "words"), list(_networks()))
def test_networks_that_do_not_fit_are_refused(block: nn.Module, protocol: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _attached(Blocks({"layer1": block}), _batch(), 3, protocol=protocol)


def test_tasks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for the label"):
        _attached(Blocks({"layer1": nn.Linear(2, 5)}), Batch(torch.rand(4, 2), torch.arange(4) % 3), 3)
    batch = _batch()
    with pytest.raises(ValueError, match="tells classes apart"):
        PhysicalFF().attach(mlp((9,), 3, (5,)), TaskInfo(batch, 3, F.mse_loss, classes=False))


def test_one_layer_after_another() -> None:
    batch = _batch()
    for protocol, units in (("phyll", ["layer1", "layer2"]), ("ffzero", ["layer1", "layer2", "readout"])):
        rule = _attached(physical((9,), 3, (6, 5), device=Simulation()), batch, 3, protocol=protocol)
        assert rule.stages == [[unit] for unit in units]
        rule.train_only(frozenset({"layer2"}))
        assert {update.unit for update in rule.updates(batch)} == {"layer2"}
        assert rule.predict(batch.inputs).shape == (12, 3)
