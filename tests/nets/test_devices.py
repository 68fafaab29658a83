"""Devices: what goes out and comes back, what is simulated, what is counted and kept, and what is refused."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from locallearn.nets import PhysicalLayer, physical
from locallearn.nets.devices import Measured, Optical, Scatterer, SimulatedDevice, Simulation, Twin
from locallearn.nets.devices._layer import encode
from tests.references import reference

Array = np.ndarray[Any, Any]


def _layer(**settings: Any) -> PhysicalLayer:
    return PhysicalLayer(SimulatedDevice(Scatterer(6, 5), **settings), 6)


# -- the seam --------------------
def test_numbers_go_out_and_come_back() -> None:
    given: list[Array] = []

    def device(x: Array) -> Array:
        given.append(x)
        answer = x[:, :3].astype(np.float64) * 2
        x[:] = np.nan  # it may do with its copy what it wants
        return answer

    layer = PhysicalLayer(device, 4)
    assert layer.outputs == 3
    x = torch.rand(5, 4)
    kept = x.clone()
    y = layer(x)
    assert torch.equal(x, kept)
    assert torch.equal(y, 2 * x[:, :3])
    assert (y.dtype, y.requires_grad, given[-1].dtype) == (torch.float32, False, np.float32)
    assert (layer.calls, layer.samples, layer.training_calls) == (1, 5, 1)
    layer.eval()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer.calls, layer.samples, layer.training_calls) == (2, 10, 1)
    assert not list(layer.parameters())


def _refusals() -> Any:
    return [
        ("text", "expected a callable"),
        (lambda x: x[0], r"gave an array of shape \(4,\) for an input of shape \(2, 4\), expected \(2, r\)"),
        (lambda x: x[:1], r"gave an array of shape \(1, 4\)"),
        (lambda x: x * np.nan, "gave NaN or infinity in 2 of 2 rows"),
        (lambda x: x * 1j, "gave complex64 values, expected real numbers"),
        (lambda x: None, "gave an array of shape"),
        (lambda x: 1 / 0, r"fails on an array of shape \(2, 4\): division by zero"),
        (lambda x, y: x, "fails on an array of shape"),
    ]


@pytest.mark.parametrize(("device", "words"), _refusals())
def test_what_is_no_device_is_refused_before_training(device: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PhysicalLayer(device, 4)


def test_a_device_that_fails_later_is_told() -> None:
    layer = PhysicalLayer(lambda x: x if len(x) < 4 else x[:, :2], 4)
    layer(torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"expected \(5, 4\): one row per sample, as many columns in every call"):
        layer(torch.rand(5, 4))
    layer = PhysicalLayer(lambda x: np.where(x > 1, np.inf, x), 4)
    with pytest.raises(ValueError, match=r"in 1 of 3 rows \(call 1\)"):
        layer(torch.tensor([[0.1] * 4, [2.0] * 4, [0.3] * 4]))


def test_an_instrument_that_cannot_be_copied_is_shared() -> None:
    class Instrument:
        def __init__(self) -> None:
            self.line = threading.Lock()
            self.asked = 0

        def __call__(self, x: Array) -> Array:
            self.asked += 1
            return x

    instrument = Instrument()
    net = physical((4,), 2, (3,), device=instrument)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin(torch.rand(2, 4))
    assert twin[0][0].layer.device is instrument  # type: ignore[index]
    assert (net[0][0].layer.calls, twin[0][0].layer.calls) == (0, 1)  # type: ignore[index]


def test_a_module_as_device_adds_no_weights() -> None:
    inside = nn.Linear(4, 4)
    layer = PhysicalLayer(lambda x: inside(torch.from_numpy(x)).detach().numpy(), 4)
    assert not layer.state_dict().keys() - {"_extra_state"}


# -- encodings --------------------
def test_bits_are_those_of_the_microwave_code() -> None:
    numbers = reference("phyll")
    x = torch.from_numpy(numbers["microwave/x"])
    kept = x.clone()
    assert torch.equal(encode(x, "bits"), torch.from_numpy(numbers["microwave/bits"]))
    assert torch.equal(x, kept)  # theirs writes into it
    torch.testing.assert_close(encode(x, "minmax"), torch.from_numpy(numbers["microwave/x_mutated"]))


def test_rows_without_spread_are_encoded_too() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    assert all(encode(x, how).isfinite().all() for how in ("unit", "minmax", "bits", "none"))  # type: ignore[arg-type]
    assert not encode(x, "bits").any()
    with pytest.raises(ValueError, match="encode is 'log'"):
        Measured(4, None, "log")  # type: ignore[arg-type]


# -- maps --------------------
def test_the_scatterer_is_its_formula() -> None:
    made = Scatterer(6, 5, seed=3, gain=2.0)
    x = np.random.default_rng(0).standard_normal((4, 6))
    a = np.abs(x) / np.linalg.norm(x, axis=1, keepdims=True)
    intensity = np.abs((2.0 * a * np.exp(1j * np.pi * a)) @ made.matrix.numpy()) ** 2
    np.testing.assert_allclose(made.respond(torch.from_numpy(x)).numpy(), intensity / (1 + intensity), rtol=1e-12)
    spread = Scatterer(400, 400).matrix
    assert float(spread.abs().square().mean()) == pytest.approx(1 / 400, rel=0.02)


def test_the_optical_device_is_its_formula() -> None:
    made = Optical(16, seed=1, side=9, radius=3.0)
    x = np.random.default_rng(0).random((2, 16))
    image = np.zeros((2, 9, 9))
    image[:, :8, :8] = np.kron(x.reshape(2, 4, 4), np.ones((2, 2)))
    spectrum = np.fft.fftshift(np.fft.fft2(image, norm="ortho"), axes=(1, 2)).reshape(2, 81)
    far = np.arange(9) - 4
    inside = np.flatnonzero((far[:, None] ** 2 + far**2 <= 9).ravel())
    behind = np.zeros((2, 81), complex)
    behind[:, inside] = spectrum[:, inside] @ made.matrix.numpy()
    amplitude = np.abs(np.fft.ifft2(np.fft.ifftshift(behind.reshape(2, 9, 9), axes=(1, 2)), norm="ortho"))
    padded = np.pad(amplitude, ((0, 0), (1, 1), (1, 1)))
    pooled = np.array(
        [[padded[n, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean() for i in range(5) for j in range(5)] for n in (0, 1)]
    )
    np.testing.assert_allclose(made.respond(torch.from_numpy(x)).numpy(), pooled, rtol=1e-10)
    assert Optical(784, side=51).respond(torch.rand(1, 784)).shape == (1, 676)
    for given, words in (((15,), "reads square images"), ((16, 3), "has 676"), ((16, None, 0, 9, 9.0), "radius 9.0")):
        with pytest.raises(ValueError, match=words):
            Optical(*given)


def _measurements(place: Path, header: bool) -> Path:
    x = np.random.default_rng(0).random((400, 3))
    y = np.stack((x.sum(1), x[:, 0] * x[:, 1]), 1)
    np.savetxt(place, np.concatenate((x, y), 1), delimiter=",", header="a,b,c,d,e" if header else "", comments="")
    return place


def test_a_twin_is_fitted_to_measurements(tmp_path: Path) -> None:
    place = _measurements(tmp_path / "pairs.csv", header=False)
    state = torch.get_rng_state()
    twin = Twin(3, path=place, hidden=(16,), epochs=60, lr=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.error < 0.08  # the outputs' own deviation is above .2
    x = torch.rand(50, 3)
    assert float((twin.respond(x)[:, 0] - x.sum(1)).square().mean().sqrt()) < 0.1
    named = Twin(3, path=_measurements(tmp_path / "named.csv", header=True), hidden=(16,), epochs=60, lr=1e-2)
    assert torch.equal(named.respond(x), twin.respond(x))  # names are left out, numbers are not
    fitted = Simulation("twin", options={"path": str(place), "hidden": [4], "epochs": 1})
    net = physical((3,), 2, (3, 3), device=fitted)
    assert [block[0].layer.outputs for block in net] == [2, 2]  # type: ignore[index]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = net[0][0].layer(x)  # type: ignore[index]
    assert torch.equal(mixed, fitted.made_for(3, 0).respond(x))  # whatever the layers around it are computed in
    (tmp_path / "bad.csv").write_text("1,2,3,4\n1,2,x,4\n", encoding="utf-8")
    (tmp_path / "gap.csv").write_text("1,,3,4\n1,2,3,4\n", encoding="utf-8")
    (tmp_path / "wide.csv").write_bytes("1,2,3,4 µm\n".encode("utf-16"))
    for options, words in (
        ({}, "no such file"),
        ({"path": str(tmp_path / "bad.csv")}, "measurement 2"),
        ({"path": str(tmp_path / "gap.csv")}, "measurement 1"),  # no row of names
        ({"path": str(tmp_path / "wide.csv")}, "is no CSV"),
        ({"path": str(place), "epochs": 0}, "epochs 0"),
        ({"path": str(place), "depth": 3}, "map=twin does not take"),
    ):
        with pytest.raises(ValueError, match=words):
            Simulation("twin", options=options).made_for(3, 0)
    with pytest.raises(ValueError, match="has 5 columns"):
        Twin(5, path=place)


# -- what devices suffer from --------------------
def test_noise_has_the_stated_size_and_a_generator_of_its_own() -> None:
    x = torch.rand(2000, 6)
    clean = _layer()(x)
    state = torch.get_rng_state()
    noisy = _layer(noise=0.05)(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert float((noisy / clean - 1).std()) == pytest.approx(0.05, rel=0.05)
    assert float((_layer(additive=0.3)(x) - clean).std()) == pytest.approx(0.3, rel=0.05)
    layer = _layer(noise=0.05)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(_layer(noise=0.05)(x), noisy)
    assert not torch.equal(_layer(noise=0.05, seed=1)(x), noisy)


def test_a_medium_that_drifts_keeps_its_strength() -> None:
    device = SimulatedDevice(Scatterer(40, 40), drift=0.3)
    before = device.map.matrix.clone()
    x = np.random.default_rng(0).random((1, 40), dtype=np.float32)
    device(x)
    after = device.map.matrix
    overlap = float(
        (before.conj() * after).sum().real / (before.abs().square().sum() * after.abs().square().sum()).sqrt()
    )
    assert overlap == pytest.approx((1 - 0.3**2) ** 0.5, abs=0.03)
    for _ in range(30):
        device(x)
    assert float(device.map.matrix.abs().square().mean()) == pytest.approx(float(before.abs().square().mean()), rel=0.1)


def test_dead_channels_saturation_and_converters() -> None:
    x = torch.rand(50, 6)
    clean = _layer()(x)
    dead = _layer(dropped=0.4)(x)
    assert int((dead == 0).all(0).sum()) == 2
    assert torch.equal(dead[:, (dead != 0).any(0)], clean[:, (dead != 0).any(0)])
    torch.testing.assert_close(_layer(saturation=0.1)(x), clean / (1 + clean / 0.1))
    rounded = _layer(output_bits=2)(x)
    assert max(len(row.unique()) for row in (rounded * 1e5).round()) <= 4
    torch.testing.assert_close(rounded.amax(1), clean.amax(1))  # the range is the row's own
    assert float((rounded - clean).abs().max()) <= float((clean.amax(1) - clean.amin(1)).max()) / 6 + 1e-6
    small = PhysicalLayer(SimulatedDevice(lambda x: x, input_bits=2), 6)  # scaled into the range of the converter first
    assert len(small(1e-6 * x[:1]).unique()) > 2
    assert torch.equal(small(torch.zeros(1, 6)), torch.zeros(1, 6))


def test_imperfections_go_around_a_device_of_ones_own() -> None:
    net = physical((4,), 2, (3,), device=Simulation(map=lambda x: x[:, :2], noise=0.1))
    layer = net[0][0].layer  # type: ignore[index]
    x = torch.rand(3, 4)
    assert layer(x).shape == (3, 2)
    assert not torch.equal(layer(x), layer(x))
    with pytest.raises(ValueError, match="gave float64 values of shape"):
        PhysicalLayer(SimulatedDevice(lambda x: np.ones(2), noise=0.1), 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise": -0.1}, "noise is -0.1"),
        ({"drift": 1.0}, "drift is 1.0"),
        ({"dropped": 2}, "dropped is 2"),
        ({"input_bits": 0}, "input_bits is 0"),
        ({"saturation": 0.0}, "saturation is 0.0"),
        ({"map": "laser"}, "map is 'laser'"),
        ({"seed": -1}, "seed is -1"),
        ({"outputs": 0}, "outputs is 0"),
        ({"map": np.sin, "outputs": 3}, "a device of your own has what it has"),
        ({"map": np.sin, "drift": 0.1}, "no transmission matrix that could wander"),
        ({"options": {"gein": 3}}, "map=scatterer does not take"),
        ({"map": "no_lab.device"}, "expected the dotted name of a callable"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Simulation(**settings).made_for(4, 0)


def test_state_goes_through_a_checkpoint() -> None:
    net, other = (physical((6,), 2, (4,), device=Simulation(noise=0.1, drift=0.2)) for _ in range(2))
    x = torch.rand(3, 6)
    with torch.no_grad():
        net(x), net(x)
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        twin = copy.deepcopy(net)
        for _ in range(2):
            wanted = net(x)
            assert torch.equal(other(x), wanted)
            assert torch.equal(twin(x), wanted)
    assert other[0][0].layer.calls == net[0][0].layer.calls == 4  # type: ignore[index]


# -- networks --------------------
def test_media_differ_from_layer_to_layer_and_not_from_run_to_run() -> None:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(physical((6,), 2, (6, 6), device=Simulation()))
    media = [[block[0].layer.device.map.matrix for block in net] for net in nets]  # type: ignore[index]
    assert not torch.equal(media[0][0], media[0][1])
    assert torch.equal(media[0][0], media[1][0])


def test_without_a_device_a_layer_reads_its_input() -> None:
    net = physical((2, 3), 2, (5, 4))
    x = torch.rand(3, 2, 3)
    assert torch.equal(net[0][0](x), x.flatten(1))  # type: ignore[index]
    assert [block[1].in_features for block in net] == [6, 5]  # type: ignore[index]
    skipped, alone = (physical((6,), 2, (5,), device=Simulation(outputs=7), skip=skip) for skip in (True, False))
    assert (skipped[0][1].in_features, alone[0][1].in_features) == (13, 7)  # type: ignore[index]


def test_the_differentiable_control_is_the_same_map() -> None:
    nets = []
    for differentiable in (False, True):
        torch.manual_seed(0)
        device = Simulation(saturation=0.5, dropped=0.2)
        nets.append(physical((6,), 2, (5, 4), device=device, differentiable=differentiable))
    x = torch.rand(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(nets[0](x), nets[1](x))
    nets[1](x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in nets[1].parameters())
    assert nets[1].bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    for device, words in (
        (lambda x: x, "can only be measured, and net.differentiable=true needs its formula"),
        (Simulation(input_bits=4), "rounds, which has no derivative"),
        (Simulation(map=lambda x: x), "has no differentiable control"),
        (None, "device is null"),
        (Instrument, "is a class: write _target_"),
    ):
        with pytest.raises(ValueError, match=words):
            physical((6,), 2, (5,), device=device, differentiable=True)


class Instrument:
    """A class where an object is wanted."""

    def __call__(self, x: Array) -> Array:
        return x


def test_a_device_goes_by_its_dotted_name() -> None:
    net = physical((6,), 2, (5,), device="numpy.sin")
    assert net[0][0].layer.name == "sin"  # type: ignore[index]
    with pytest.raises(ValueError, match="expected the dotted name of a callable"):
        physical((6,), 2, (5,), device="numpy.no_such_thing")
    with pytest.raises(ValueError, match="expected at least one positive width"):
        physical((6,), 2, ())
    with pytest.raises(ValueError, match="activation is 'relu'"):
        physical((6,), 2, (5,), activation="relu")  # type: ignore[arg-type]
