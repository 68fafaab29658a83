"""Physical devices on the command line: sweeps, a device of one's own, the ablation beside it, what records may run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from locallearn.cli import UsageError
from locallearn.cli.arms import arms_of
from locallearn.cli.trust import check_trusted
from tests.cli.conftest import Cli

_PHYSICAL = ("algorithm=physical_ff", "net=physical", "dataset=vowels")
Array = np.ndarray[Any, Any]


def _device(x: Array) -> Array:
    answer: Array = np.tanh(x[:, :5] + x[:, 1:6])
    return answer


class _Settable:
    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, x: Array) -> Array:
        return x * self.port


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_lab")
    vars(module).update(device=_device, Device=_Settable, broken=lambda x: x * np.nan, flat=lambda x: x[0])
    monkeypatch.setitem(sys.modules, "my_lab", module)


def test_noise_and_drift_are_swept(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("train", "-m", *_PHYSICAL, "net.device.noise=0,0.1", "net.device.drift=0.05")
    assert outcome.code == 0
    folders = [Path(line) for line in outcome.out.splitlines() if line.startswith("runs")]
    assert len(folders) == 2
    assert "What the device adds is only told beside the same network without it" in outcome.err


@pytest.mark.usefixtures("lab")
def test_a_device_of_ones_own_is_one_line(cli: Cli) -> None:
    outcome = cli("train", *_PHYSICAL, "net.device=my_lab.device")
    assert outcome.code == 0
    assert outcome.record["variant"] == "device=my_lab.device"
    assert outcome.record["config"]["net"]["device"] == "my_lab.device"
    outcome = cli(
        "train",
        *_PHYSICAL,
        "net.device.map={_target_:my_lab.Device,port:3}",
        "net.device.noise=0.1",
        "optimizer.lr=0.01",
    )
    assert outcome.code == 0
    assert outcome.record["variant"] == "device=my_lab.Device, noise=0.1"
    outcome = cli("predict", str(outcome.folder))
    assert outcome.code == 2
    assert "my_lab.Device" in outcome.err
    assert "--trust" in outcome.err


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["net.device=my_lab.broken"], "gave NaN or infinity in 2 of 2 rows"),
        (["net.device=my_lab.flat"], r"gave an array of shape (20,)"),
        (["net.device=my_lab.none"], "expected the dotted name of a callable"),
        (["net.device.map=my_lab.device", "net.device.drift=0.1"], "no transmission matrix that could wander"),
        (["net.device.noice=0.1"], "noice"),
        (["algorithm=backprop"], "net.differentiable=true"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_training(cli: Cli, tmp_path: Path, words: list[str], told: str) -> None:
    kept = [word for word in _PHYSICAL if not any(word.startswith(f"{w.partition('=')[0]}=") for w in words)]
    outcome = cli("train", *kept, *words)
    assert outcome.code == 2
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/record.json"))


def test_compare_brings_the_ablation_and_the_differentiable_control(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("compare", *_PHYSICAL, "compare.seeds=[0]", "trainer.probe_samples=0")
    assert outcome.code == 0
    assert "no device" in outcome.out
    assert "device=scatterer" in outcome.out
    assert "differentiable" in outcome.out
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 3


def test_the_ablation_has_no_formula_to_differentiate() -> None:
    words = [*_PHYSICAL, "net.differentiable=true", "algorithm.theta=5.0"]
    arms = arms_of("compare", words)[2]
    assert [arm.overrides for arm in arms][-1] == [
        "algorithm=physical_ff",
        "algorithm.theta=5.0",
        "net.device=null",
        "net.differentiable=false",
    ]


def test_a_record_may_not_name_a_device_to_import() -> None:
    net = {
        "_target_": "locallearn.nets.physical",
        "device": {"_target_": "locallearn.nets.devices.Simulation", "map": "twin"},
    }
    check_trusted({"net": net}, "a record", trust=False)
    other = {**net, "_target_": "locallearn.nets.physical.physical", "device": "os.system"}  # the same by another name
    for bad in ({**net, "device": "os.system"}, {**net, "device": {**net["device"], "map": "os.system"}}, other):  # type: ignore[dict-item]
        with pytest.raises(UsageError, match=r"would run 'os\.system' as the device"):
            check_trusted({"net": bad}, "a record", trust=False)
        check_trusted({"net": bad}, "a record", trust=True)
